"""An encoder that learns to answer with fewer tokens as it did with all of them, or which matter, without labels."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from ..adaptation import adaptable_parameters
from ..inference import evaluation_mode
from ..schedules_tnt import UNPRUNED, Schedule
from .hooks import BeforeLayer
from .reduction import first_hook, resolve_for


# What is compared where the output has it: answers by their divergence, the rest by its direction.
ANSWERS = ("logits", "logits_per_image")
FEATURES = ("pooler_output", "image_embeds", "last_hidden_state")


class SelfDistillation(nn.Module):
    """
    A model under [`~tnt_hf.encoders.reduce_tokens`] whose LayerNorms and biases learn from its own output with all
    tokens: for [`~transformers.Trainer`], Accelerate or a plain loop, in which the module is called with the inputs of
    the model and returns the loss. The rest of the model is frozen.

    Each call draws one of the schedules. The loss is the KL divergence of the answers and 1 less the cosine of the
    pooled embedding and of all tokens, of those that the output has. [`~tnt_hf.adaptation.save_adaptation`] keeps what
    was learned in a file of its own.

    Args:
        model (`nn.Module`): The reduced model.
        schedules (`Sequence`): Schedules or texts as in [`~tnt_hf.encoders.reduce_tokens`].
        seed (`int`, *optional*, defaults to 0): Of the draws, which are the same in all processes.

    Attributes:
        original (`dict[str, torch.Tensor]`): By name, what the adapted numbers were before.

    Raises:
        ValueError: If the model does not reduce tokens, or cannot carry out a schedule; it is as before then.
    """

    def __init__(self, model: nn.Module, schedules: Sequence[str | Schedule], seed: int = 0):
        super().__init__()
        self.first_hook = first_hook(model)
        self.schedules = [resolve_for(model, schedule) for schedule in schedules]
        if not self.schedules:
            raise ValueError("`schedules` must name one schedule or more, got none.")
        self.model, self.seed, self.num_calls = model, seed, 0
        adaptable = adaptable_parameters(model)
        self.original = {name: value.detach().clone() for name, value in adaptable.items()}
        model.requires_grad_(False)
        for value in adaptable.values():
            value.requires_grad_(True)

    def forward(self, pixel_values: torch.Tensor, **inputs: Any) -> dict[str, torch.Tensor]:
        """
        The inputs of the model, images of shape `(batch_size, num_channels, height, width)` and what else it takes ->
        `{"loss": loss}`, a mean over the images.

        Raises:
            ValueError: If the output of the model has nothing to learn from.
        """
        inputs["pixel_values"] = pixel_values
        original = {name: value.to(next(self.model.parameters()).device) for name, value in self.original.items()}
        with _unpruned(self.first_hook), torch.no_grad(), evaluation_mode(self.model):
            expected = functional_call(self.model, original, kwargs=inputs)
        self.num_calls += 1
        drawn = random.Random(f"{self.seed} {self.num_calls}").choice(self.schedules)
        self.first_hook.schedule = drawn  # until the next call, as layers may be computed again in the backward pass
        return {"loss": _distance(self.model(**inputs), expected)}


class ScoreLearning(nn.Module):
    """
    A model under [`~tnt_hf.encoders.reduce_tokens`] whose scoring heads learn which tokens its own output depends on:
    for [`~transformers.Trainer`], Accelerate or a plain loop, in which the module is called with the inputs of the
    model and returns the loss. The model is frozen, and in evaluation mode, so that noise is all that disturbs it.

    In training mode each call adds noise to the patch tokens after the first layers, as
    [`~tnt_hf.token_reduction_tnt.TokenState.add_noise`] does, the less the higher they score, drawn from torch's
    global generator. Elsewhere, in evaluation mode or without gradients, the model reduces its tokens. The loss is the
    distance from its output with all tokens and no noise, as in [`SelfDistillation`]. `scorer.save_pretrained` keeps
    what was learned.

    Args:
        model (`nn.Module`): The reduced model.

    Attributes:
        scorer ([`~tnt_hf.encoders.TokenScorer`]): The heads.

    Raises:
        ValueError: If the model does not reduce tokens, or does so without a scorer; it is as before then.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.first_hook = first_hook(model)
        if self.first_hook.scorer is None:
            raise ValueError(
                f"{type(model).__name__} reduces tokens without scoring heads, so that none can learn: pass "
                "`scorer=TokenScorer.for_encoder(model)` to `reduce_tokens`."
            )
        self.model, self.scorer = model.requires_grad_(False), self.first_hook.scorer.requires_grad_(True)

    def forward(self, pixel_values: torch.Tensor, **inputs: Any) -> dict[str, torch.Tensor]:
        """
        The inputs of the model, images of shape `(batch_size, num_channels, height, width)` and what else it takes ->
        `{"loss": loss}`, a mean over the images.

        Raises:
            ValueError: If the output of the model has nothing to learn from.
        """
        inputs["pixel_values"] = pixel_values
        with evaluation_mode(self.model):
            with _unpruned(self.first_hook), torch.no_grad():
                expected = self.model(**inputs)
            if not (self.training and torch.is_grad_enabled()):
                return {"loss": _distance(self.model(**inputs), expected)}
            with _unpruned(self.first_hook, adds_noise=True):
                return {"loss": _distance(self.model(**inputs), expected)}


@contextmanager
def _unpruned(hook: BeforeLayer, adds_noise: bool = False) -> Iterator[None]:
    """No token leaves the model of this hook meanwhile; its heads may let noise be added instead."""
    before = hook.schedule
    hook.schedule, hook.adds_noise = UNPRUNED, adds_noise
    try:
        yield
    finally:
        hook.schedule, hook.adds_noise = before, False


def _distance(outputs: Any, expected: Any) -> torch.Tensor:
    """Of all that two outputs have to compare; raises ValueError if that is nothing."""
    losses = [_divergence(outputs[name], expected[name]) for name in ANSWERS if _has(outputs, name)]
    losses += [_angle(outputs[name], expected[name]) for name in FEATURES if _has(outputs, name)]
    if not losses:
        raise ValueError(
            f"The output of the model must have one of {', '.join((*ANSWERS, *FEATURES))} to learn from, got "
            f"{', '.join(outputs)}."
        )
    return sum(losses)


def _has(outputs: Any, name: str) -> bool:
    return isinstance(outputs.get(name), torch.Tensor)


def _divergence(logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    logits, expected = logits.float().log_softmax(dim=-1), expected.float().log_softmax(dim=-1)
    return nn.functional.kl_div(logits, expected, reduction="batchmean", log_target=True)


def _angle(features: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return (1 - nn.functional.cosine_similarity(features.float(), expected.float(), dim=-1)).mean()


__all__ = ["ScoreLearning", "SelfDistillation"]
