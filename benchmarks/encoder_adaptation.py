"""
Adapt an encoder to reduced tokens, without labels, for `python -m benchmarks.encoders --adaptation`.

    python -m benchmarks.encoder_adaptation --model models/dinov2_encoder --images data/photos/unlabelled \
        --output_dir models/dinov2_encoder_adaptation

LayerNorms and biases of the encoder of images learn by `tnt_hf.encoders.distillation.SelfDistillation` and
`transformers.Trainer`, on random crops. The output folder holds the adaptation, which
`tnt_hf.adaptation.set_adaptation` puts on any model with this encoder, and a `results.json` that says how it was made.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments

from tnt_hf.adaptation import ADAPTATION_NAME, save_adaptation
from tnt_hf.command_line import clear_errors, parse_recipe_and_flags
from tnt_hf.conversion import load_image_processor
from tnt_hf.data import DataArguments, decode_image, input_size, load_images
from tnt_hf.encoders import reduce_tokens
from tnt_hf.encoders.distillation import SelfDistillation
from tnt_hf.results import RESULTS_NAME, check_no_results, device_facts, file_digest, weights_digests, write_json
from tnt_hf.schedules_tnt import UNPRUNED
from tnt_hf.training.images import training_transform

from .encoders import load_encoder
from .zero_shot import reads_texts


@dataclass
class EncoderAdaptationArguments:
    """Which encoder to adapt, on which images and how."""

    model: str = field(metadata={"help": "Folder or Hub id of a vision encoder of Transformers."})
    images: str = field(metadata={"help": "Folder of images, which need no labels."})
    output_dir: str = field(metadata={"help": f"Folder for {ADAPTATION_NAME} and results.json."})
    schedules: list[str] = field(
        default_factory=lambda: ["full", "1.4286x", "2x", "2.4x", "2.8572x"],
        metadata={"help": "Schedules of which each step draws one; they leave the size of the images as it is."},
    )
    num_steps: int = field(default=300, metadata={"help": "Steps of the optimizer."})
    batch_size: int = field(default=16, metadata={"help": "Images in a step."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Of AdamW, after a warmup of a tenth of the steps."})
    seed: int = field(default=0, metadata={"help": "Of the order of the images, the crops and the schedules."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace results in the output folder."})

    def __post_init__(self):
        for name in ("num_steps", "batch_size", "learning_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name} must be above 0, got {getattr(self, name)}.")


def adapt_encoder(arguments: EncoderAdaptationArguments) -> dict[str, Any]:
    """
    Write an adaptation into the output folder; returns what `results.json` there says.

    Raises:
        ValueError: If the model is no encoder whose tokens can be reduced, a schedule does not fit it, or the images
            cannot be read; before any training.
    """
    check_no_results(arguments.output_dir, arguments.overwrite_output_dir)
    model, image_processor = load_encoder(arguments.model), load_image_processor(arguments.model)
    encoder = model.vision_model if reads_texts(model) else model
    reduce_tokens(encoder, UNPRUNED, image_size=input_size(image_processor))
    learner = SelfDistillation(encoder, arguments.schedules, arguments.seed)
    data = DataArguments(train_dir=arguments.images)
    images = load_images(data, train=True, validation=False, train_labels=False)["train"]
    transform = training_transform(image_processor, data)
    examples = images.with_transform(
        lambda batch: {"pixel_values": [transform(decode_image(record)) for record in batch["image"]]}
    )
    settings = TrainingArguments(
        arguments.output_dir,
        max_steps=arguments.num_steps,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=arguments.num_steps // 10,
        seed=arguments.seed,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(learner, settings, train_dataset=examples)
    trainer.train()
    path = Path(arguments.output_dir) / ADAPTATION_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    save_adaptation(encoder, learner.original, path)
    results = {
        "model": Path(arguments.model).name,
        "weights": weights_digests(arguments.model),
        "adaptation_sha256": file_digest(path),
        **device_facts(model.device),
        "training": {
            "dataset": Path(arguments.images).name,
            "num_images": len(images),
            "schedules": [schedule.name for schedule in learner.schedules],
            "num_steps": arguments.num_steps,
            "images_per_step": arguments.batch_size,
            "learning_rate": arguments.learning_rate,
            "augmentation": data.augmentation,
            "seed": arguments.seed,
            "num_trained_parameters": sum(value.numel() for value in learner.original.values()),
            "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        },
    }
    write_json(path.with_name(RESULTS_NAME), results)
    return results


def main() -> None:
    with clear_errors():
        (arguments,) = parse_recipe_and_flags((EncoderAdaptationArguments,), sys.argv[1:])
        print(json.dumps(adapt_encoder(arguments)))


if __name__ == "__main__":
    main()
