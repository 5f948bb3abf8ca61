"""Arguments of a forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tdkit.errors import UsageError


def copies(inputs: Sequence[Any]) -> list[Any]:
    """Arguments of a forward pass that the model may change in place."""
    return [value.clone() if isinstance(value, Tensor) else value for value in inputs]


def arguments(batch: Tensor | Sequence[Any]) -> Sequence[Any]:
    """A batch as the arguments of a forward pass; a tensor is the only one."""
    return [batch] if isinstance(batch, Tensor) else batch


def is_image(value: Any) -> bool:
    """Whether a value is a tensor of floats with a batch axis and more."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2


def random_inputs(
    model: nn.Module, shape: Sequence[int], batch: int = 2, seed: int = 0
) -> tuple[Tensor]:
    """A batch of standard normal inputs in the model's dtype and on its device.

    Args:
        model: The model they are for.
        shape: The shape of one sample.
        batch: How many.
        seed: Of the generator that draws them.
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    if any(size < 1 for size in shape):
        raise UsageError(f"an input of shape {tuple(shape)} is empty")
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, *shape, generator=generator).to(like),)


def one_sample(inputs: Sequence[Any] | None) -> list[Any] | None:
    """A forward pass's arguments with the first sample of every tensor that has the batch axis."""
    if inputs is None:
        return None
    batch = _batch(inputs)
    return [x[:1] if _size(x) == batch else x for x in inputs]


def two_samples(inputs: Sequence[Any]) -> list[Any]:
    """At least two samples: BatchNorm in train mode refuses one."""
    if _batch(inputs) != 1:
        return list(inputs)
    return [torch.cat([x, x.flip(-1)]) if _size(x) == 1 else x for x in inputs]


def _batch(inputs: Sequence[Any]) -> int | None:
    """The size of the batch axis: the first one of the first tensor that has any."""
    return next((size for size in map(_size, inputs) if size is not None), None)


def _size(value: Any) -> int | None:
    return len(value) if isinstance(value, Tensor) and value.ndim else None
