"""
Zero-shot classification by a model that reads images and texts, such as CLIP: each class is a text, and an image is of
the class whose text is nearest. `python -m benchmarks.encoders` evaluates it where the model is such a one.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tnt_hf.labels import WORDNET_ID


@dataclass(frozen=True)
class ZeroShotClassifier:
    """
    Classes as a model embeds their texts, once for all images.

    Args:
        class_embeddings (`torch.Tensor` of shape `(num_classes, embedding_size)`): Of length 1.
        scale, bias (`torch.Tensor`): Of the cosines, as they were learned; scalars, or of shape `(1,)`.
    """

    class_embeddings: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor

    @classmethod
    @torch.inference_mode()
    def of(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
    ) -> "ZeroShotClassifier":
        """The classes that the prompts, one for each, describe to a model, padded as its `pipeline` pads them."""
        tokens = tokenizer(
            list(prompts),
            padding="max_length" if "siglip" in model.config.model_type else True,
            truncation=True,
            max_length=model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        embeddings = model.get_text_features(**tokens.to(model.device)).pooler_output
        bias = getattr(model, "logit_bias", torch.zeros((), device=model.device))
        return cls(nn.functional.normalize(embeddings, dim=-1), model.logit_scale.exp(), bias)

    def __call__(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Embeddings of images, `(batch_size, embedding_size)` -> `logits_per_image`, `(batch_size, num_classes)`."""
        return nn.functional.normalize(embeddings, dim=-1) @ self.class_embeddings.T * self.scale + self.bias


def reads_texts(model: PreTrainedModel) -> bool:
    """Whether a model embeds images and texts in one space."""
    return all(hasattr(model, name) for name in ("get_image_features", "get_text_features", "logit_scale"))


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a checkpoint.

    Raises:
        ValueError: If it has none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except Exception as error:  # of whatever class the checkpoint names
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"--model {name_or_path} reads texts, but has no tokenizer: {reason}") from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # made up where there is no file
        raise ValueError(f"--model {name_or_path} reads texts, but has no tokenizer: its vocabulary is empty.")
    return tokenizer


def class_prompts(folders: Sequence[str], template: str, class_names: str | None = None) -> list[str]:
    """
    A text for each class.

    Args:
        folders (`Sequence[str]`): Names of the folders of images.
        template (`str`): The text, with `{}` where the name of the class is.
        class_names (`str`, *optional*):
            JSON file that maps folders to the names of their classes. Without it folders are called as their class.

    Raises:
        ValueError: If the file lacks a class, or there is none and the folders are ids of WordNet.
    """
    names = {folder: folder.replace("_", " ") for folder in folders}
    if class_names is not None:
        names = _read_class_names(class_names)
        if missing := [folder for folder in folders if folder not in names]:
            raise ValueError(
                f"--class_names {class_names} must name the class of each folder, but lacks {missing[0]}."
            )
    elif all(map(WORDNET_ID.fullmatch, folders)):
        raise ValueError(
            f"Folders such as {folders[0]} do not name their class: pass --class_names, a JSON file such as "
            f'{{"{folders[0]}": "name"}}.'
        )
    return [template.replace("{}", names[folder]) for folder in folders]


def _read_class_names(path: str) -> dict[str, str]:
    try:
        names = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"--class_names {path} cannot be read: {error}") from error
    if not isinstance(names, dict) or not all(isinstance(name, str) and name for name in names.values()):
        raise ValueError(f"--class_names {path} must map folders to names of classes, got something else.")
    return names
