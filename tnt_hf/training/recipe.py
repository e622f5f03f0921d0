"""A recipe: all settings of a training and its evaluation as one value, from which the Trainer is made."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from os import PathLike
from typing import Any, Self

from datasets import Dataset, IterableDataset
from transformers import BaseImageProcessor, set_seed

from ..command_line import parse_settings, read_recipe
from ..conversion import load_image_processor
from ..data import DataArguments, load_images, prepare_data, present_classes, select_images
from ..evaluation import EvaluationArguments
from ..labels import OtherClasses
from ..modeling_tnt import TntDeiTForImageClassification, TntViTForImageClassification
from ..named_schedules import resolve_schedules
from .arguments import ModelArguments, TntTrainingArguments
from .setup import load_model, make_trainer
from .trainer import TntTrainer


@dataclass
class Recipe:
    """
    What to train, on which images, how, and under which budgets to evaluate it.

    Example:

    ```python
    >>> recipe = Recipe.load("merge", output_dir="runs/heads", max_steps=200)
    >>> trainer = recipe.make_trainer()
    >>> trainer.train()
    >>> rows = trainer.evaluate_schedules()
    ```
    """

    model: ModelArguments = field(default_factory=ModelArguments)
    data: DataArguments = field(default_factory=DataArguments)
    evaluation: EvaluationArguments = field(default_factory=EvaluationArguments)
    training: TntTrainingArguments = field(default_factory=TntTrainingArguments)

    @classmethod
    def load(cls, name_or_path: str | PathLike, /, **settings: Any) -> Self:
        """
        Read a recipe and override some of its settings.

        Args:
            name_or_path (`str` or `PathLike`):
                A recipe that comes with the package, such as `"merge"`, or the path of a YAML or JSON file.
            settings:
                Any field of [`ModelArguments`], [`~tnt_hf.data.DataArguments`],
                [`~tnt_hf.evaluation.EvaluationArguments`] and [`TntTrainingArguments`]: what the flags of
                `tnt-hf train` are called, with the same checks. None stands for the default of a field.

        Raises:
            ValueError: If there is no such recipe, a setting is unknown, or a value is not allowed.
        """
        recipe = read_recipe(name_or_path)
        return cls(*parse_settings([each.type for each in fields(cls)], {**recipe, **settings}))  # type: ignore[misc]

    def make_trainer(
        self,
        dataset: Mapping[str, Dataset | IterableDataset] | None = None,
        image_processor: BaseImageProcessor | None = None,
        model: TntViTForImageClassification | TntDeiTForImageClassification | None = None,
    ) -> TntTrainer:
        """
        Load what the recipe names, check that all of it fits together, and make the Trainer. Nothing is written.

        Args:
            dataset (`DatasetDict`, *optional*):
                Splits with a column of images and one of labels, in place of the images that the recipe names: `train`
                if the recipe trains; `validation`, `valid`, `val` or `test` if it evaluates.
            image_processor ([`BaseImageProcessor`], *optional*): In place of that of the checkpoint.
            model (*optional*): In place of the checkpoint; what of it learns is what requires gradients.

        Returns:
            [`TntTrainer`]: Its `images` are the splits, undecoded, with labels in the order of the model.

        Raises:
            ValueError: If something cannot be loaded or does not fit the rest.
        """
        set_seed(self.training.seed)
        wanted = {
            "train": self.training.do_train,
            "validation": self.training.do_eval,
            "train_labels": not self.training.self_distillation,
        }
        if dataset is None:
            images = load_images(self.data, **wanted, may_stream=True)
        else:
            images = select_images(dataset, self.data, **wanted)
        if model is None:
            model = load_model(self.model, images, self.training, trust_label_order=self.data.trust_label_order)
        if image_processor is None:
            image_processor = load_image_processor(self.model.model_name_or_path, self.model.model_revision)
        try:
            aligned = prepare_data(images, model, image_processor, self.data)
        except OtherClasses as error:
            if not self.training.do_train or self.model.train_backbone:
                raise
            raise OtherClasses(f"{error} For other classes train a new head with --train_backbone.") from error
        schedules, candidates = [], None
        if self.training.do_eval:
            schedules = resolve_schedules(model.config, self.evaluation.schedules)  # type: ignore[arg-type]
            if self.evaluation.candidate_classes == "present":
                candidates = present_classes(images["validation"], model.config.id2label, self.data.trust_label_order)
        return make_trainer(
            model,
            aligned,
            image_processor,
            self.training,
            self.data,
            schedules=schedules,
            random_control=self.evaluation.random_control,
            candidates=candidates,
        )


__all__ = ["Recipe"]
