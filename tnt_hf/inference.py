"""A model in evaluation mode for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards in the mode that it was in."""
    was_training = model.training
    try:
        model.eval()
        yield
    finally:
        model.train(was_training)


__all__ = ["evaluation_mode"]
