r"""
Convert a checkpoint of the authors' code, of DeiT or of timm into a Transformers folder with TNT pruning.

    tnt-hf convert tnt_deit_small_distil.pth models/tnt-deit-small --schedule single
    tnt-hf convert deit_base_distilled_patch16_224-df68dfff.pth models/deit-base
    tnt-hf convert vit_base_patch16_224.safetensors models/vit-base --normalization inception \
        --compare_with vit_base_patch16_224

The folder is written only if the converted model loads from it again with equal tensors and gives finite logits.
Attention heads, LayerNorm eps and activation, which no file of weights shows, are assumed to be DeiT's unless they are
given. The last line says so, config.json records it, and --compare_with checks it.
"""

import argparse
from pathlib import Path

from ..command_line import clear_errors, needing_extra
from ..conversion import evaluation_image_processor, load_research_checkpoint, save_verified
from ..labels import read_class_names
from ..named_schedules import SCHEDULE_FORMS, parse_schedule, resolve_schedules
from ..schedules_tnt import height_and_width


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoint", type=Path, help="Checkpoint (.pth or .safetensors) with the parameter names of timm."
    )
    parser.add_argument("output_dir", type=Path, help="New folder for the converted model.")
    parser.add_argument(
        "--schedule",
        default="full",
        help=f"Schedule that the config stores: {SCHEDULE_FORMS}. By default full, which does not prune.",
    )
    parser.add_argument(
        "--normalization",
        choices=("imagenet", "inception"),
        default="imagenet",
        help="Normalisation in training: ImageNet's mean and deviation (DeiT, the authors), or inception's, both 0.5.",
    )
    parser.add_argument(
        "--crop_ratio", type=float, default=0.875, help="Share of the resized image that the centre crop keeps."
    )
    parser.add_argument(
        "--num_attention_heads",
        type=int,
        help="Attention heads. Needed unless they are DeiT's: 3, 6, 12, 16 at the hidden sizes 192, 384, 768, 1024.",
    )
    parser.add_argument(
        "--layer_norm_eps", type=float, help="Eps of LayerNorm. By default 1e-6, as in DeiT and timm's ViTs."
    )
    parser.add_argument("--hidden_act", help="Activation of Transformers, such as quick_gelu. By default gelu.")
    parser.add_argument(
        "--compare_with",
        metavar="TIMM_MODEL",
        help="Refuse the conversion unless this model of timm gives the same logits; such as vit_small_patch16_224.",
    )
    parser.add_argument(
        "--image_size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="Image size in pixels, needed if it is not square.",
    )
    parser.add_argument(
        "--id2label", type=Path, help="JSON file of class names: a list in order, or a mapping from label to name."
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    with clear_errors():
        schedule, fields = parse_schedule(arguments.schedule), {}
        for name in ("num_attention_heads", "layer_norm_eps", "hidden_act", "image_size"):
            if getattr(arguments, name) is not None:
                fields[name] = getattr(arguments, name)
        if arguments.id2label is not None:
            fields["id2label"] = dict(enumerate(read_class_names(arguments.id2label)))
            fields["label2id"] = {name: label for label, name in fields["id2label"].items()}
        with needing_extra("train"):
            model = load_research_checkpoint(arguments.checkpoint, compare_with=arguments.compare_with, **fields)
        (schedule,) = resolve_schedules(model.config, [schedule])
        model.set_schedule(schedule)
        image_size = height_and_width(model.config.image_size)
        image_processor = evaluation_image_processor(image_size, arguments.normalization, arguments.crop_ratio)
        save_verified(model, image_processor, arguments.output_dir)
    config = model.config
    assumed = ", ".join(f"{name} {value}" for name, value in config.conversion["assumed"].items()) or "nothing"
    compared_with = config.conversion["compared_with"]
    compared = f"equal logits in {compared_with}" if compared_with else "compared with no other implementation"
    print(
        f"{type(model).__name__}: {config.num_hidden_layers} layers, width {config.hidden_size}, "
        f"{config.num_attention_heads} heads, {config.num_patches} patch tokens, {config.num_labels} classes; "
        f"saved to {arguments.output_dir}, loads again with equal tensors; assumed: {assumed}; {compared}"
    )
