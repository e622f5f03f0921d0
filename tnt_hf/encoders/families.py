"""How vision encoders of Transformers are built, as far as the reduction of their tokens has to know: one table."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..configuration_tnt import TokenPruningFields


@dataclass(frozen=True)
class Family:
    """
    Names inside a layer of an encoder, which must compute `x = x + attention(norm_1(x))`, then put out the tensor
    `x + mlp(norm_2(x))`, each branch scaled or not. Names may have dots.

    Args:
        num_prefix_tokens (`int`):
            Tokens before those of the patches, such as [CLS]; register tokens of the config come on top.
        norms (`tuple[str, str]`): The norms before the attention and before the MLP.
        attention (`str`): The attention.
        mlp (`str`, *optional*):
            The MLP. None where the residual is added inside it: tokens are then merged after the layer instead of
            before its MLP, which saves less.
        is_padded (`bool`, *optional*, defaults to `False`):
            Whether the attention mask marks padding behind images of several sizes.
    """

    num_prefix_tokens: int
    norms: tuple[str, str] = ("layernorm_before", "layernorm_after")
    attention: str = "attention"
    mlp: str | None = "mlp"
    is_padded: bool = False

    def reduces_before_mlp(self, settings: TokenPruningFields) -> bool:
        """Whether tokens leave between the attention and the MLP of a layer instead of after it."""
        return settings.reduces_before_mlp and self.mlp is not None

    def fits(self, layer: nn.Module) -> bool:
        """Whether a layer has the parts of this family."""
        names = {name for name, _ in layer.named_modules()}
        return names.issuperset(filter(None, (*self.norms, self.attention, self.mlp)))


_DINO: dict[str, Any] = {"num_prefix_tokens": 1, "norms": ("norm1", "norm2")}
_CLIP: dict[str, Any] = {"norms": ("layer_norm1", "layer_norm2"), "attention": "self_attn"}

# By the class of the layers.
FAMILIES = {
    "ViTLayer": Family(1),
    "DeiTLayer": Family(2),
    "ViTMAELayer": Family(1),
    "ViTMSNLayer": Family(1),
    "IJepaLayer": Family(0),
    "BeitLayer": Family(1),
    "Dinov2Layer": Family(**_DINO),
    "Dinov2WithRegistersLayer": Family(**_DINO),
    "DINOv3ViTLayer": Family(**_DINO),
    "Tipsv2VisionLayer": Family(**_DINO),
    "InternVLVisionLayer": Family(1),
    "CLIPEncoderLayer": Family(1, **_CLIP),
    "AltCLIPEncoderLayer": Family(1, **_CLIP),
    "MetaClip2EncoderLayer": Family(1, **_CLIP),
    "ChineseCLIPVisionLayer": Family(1, **_CLIP),
    "CLIPSegEncoderLayer": Family(1, **_CLIP),
    "OwlViTEncoderLayer": Family(1, **_CLIP),
    "Owlv2EncoderLayer": Family(1, **_CLIP),
    "GitVisionEncoderLayer": Family(1, **_CLIP),
    "SiglipEncoderLayer": Family(0, **_CLIP),
    "Siglip2EncoderLayer": Family(0, **_CLIP, is_padded=True),
    "Idefics3EncoderLayer": Family(0, **_CLIP),
    "SmolVLMEncoderLayer": Family(0, **_CLIP),
    "JanusVisionEncoderLayer": Family(0, **_CLIP),
    "Aimv2EncoderLayer": Family(0, norms=("rms_norm1", "rms_norm2"), mlp="ffn"),
    "VitPoseBackboneLayer": Family(0),
    "DPTViTLayer": Family(1, mlp=None),
}


@dataclass(frozen=True)
class Encoder:
    """The layers of an encoder inside a model, and the modules around them from the model inwards."""

    name: str
    layers: nn.ModuleList
    around: tuple[nn.Module, ...]

    @property
    def layer_class(self) -> str:
        return type(self.layers[0]).__name__

    @property
    def config(self):
        """The config of the innermost module around the layers that has one, or None."""
        return next((module.config for module in reversed(self.around) if hasattr(module, "config")), None)


def find_encoders(model: nn.Module) -> Iterator[Encoder]:
    """The lists of layers in a model that look at images: whose config has a `patch_size`, and in no decoder."""
    for name, layers in model.named_modules():
        if not isinstance(layers, nn.ModuleList) or len(layers) == 0 or "decoder" in name:
            continue
        *path, _ = name.split(".")
        around = tuple(model.get_submodule(".".join(path[:depth])) for depth in range(len(path) + 1))
        encoder = Encoder(name, layers, around)
        if hasattr(encoder.config, "patch_size"):
            yield encoder


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a LayerNorm or an RMSNorm, of which Transformers has a class for each family."""
    return isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")


def only_encoder(model: nn.Module) -> Encoder:
    """The encoder of a model, whose layers have norms; raises ValueError if it has none, or several."""
    found = [encoder for encoder in find_encoders(model) if any(map(is_norm, encoder.layers[0].modules()))]
    if len(found) != 1:
        names = ", ".join(encoder.name for encoder in found) or "none"
        raise ValueError(f"{type(model).__name__} must have one vision encoder, found are: {names}.")
    return found[0]


def known_encoder(model: nn.Module, family: Family | None = None) -> tuple[Encoder, Family]:
    """
    The one encoder in a model whose layers are of a family of the table, or of the given one.

    Raises:
        ValueError: If there is none, or several.
    """
    candidates = ((encoder, family or FAMILIES.get(encoder.layer_class)) for encoder in find_encoders(model))
    known = [(encoder, each) for encoder, each in candidates if each is not None and each.fits(encoder.layers[0])]
    if not known:
        lists = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 0)
        names = ", ".join(sorted({type(modules[0]).__name__ for modules in lists}))
        raise ValueError(
            f"{type(model).__name__} has no vision encoder whose tokens can be reduced: "
            f"{f'its lists of modules are of {names}' if names else 'it has no list of modules'}; layers can be "
            f"{', '.join(FAMILIES) if family is None else f'those that fit {family}'}."
        )
    if len(known) > 1:
        names = ", ".join(encoder.name for encoder, _ in known)
        raise ValueError(f"{type(model).__name__} has several encoders, {names}: pass the one whose tokens are meant.")
    return known[0]


__all__ = ["FAMILIES", "Encoder", "Family", "find_encoders", "is_norm", "known_encoder", "only_encoder"]
