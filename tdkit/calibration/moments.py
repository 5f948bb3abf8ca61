"""What unlabelled inputs say: means and second moments of what layers are given, in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tdkit.forward.inputs import Inputs
from tdkit.forward.trial import run_on_data
from tdkit.layers.evidence import Moments

# Features that are in memory as float64 at once.
_WIDENED = 2**19


class ChannelStatistics:
    """Mean and variance per channel of all that was added, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: list[Tensor] = []

    def add(self, features: Tensor) -> None:
        """Add features (batch, channels, ...), a few samples at a time widened to float64."""
        for part in features.detach().split(max(1, _WIDENED // max(1, features[:1].numel()))):
            rows = part.double().transpose(0, 1).flatten(1)
            self.count += rows.shape[1]
            self.sums.append(torch.stack([rows.sum(1), rows.square().sum(1)]))

    @property
    def mean(self) -> Tensor:
        """(channels,)."""
        return torch.stack(self.sums).sum(0)[0] / self.count

    @property
    def variance(self) -> Tensor:
        """(channels,), at least 0."""
        squares = torch.stack(self.sums).sum(0)[1] / self.count
        return (squares - self.mean.square()).clamp(min=0)


def input_moments(
    model: nn.Module, layers: Sequence[str], batches: Iterable[Inputs]
) -> dict[str, Moments]:
    """The moments of the input channels of layers, over all positions and calls.

    One eval-mode pass over the batches serves all layers. Products are in the precision of the
    features, at least float32, sums in float64; memory is channels x channels for each layer,
    whatever the batches.

    Args:
        model: The dense model; it is afterwards as before.
        layers: Names of convolutional and linear layers.
        batches: Arguments of forward passes, tensors of any shape.

    Returns:
        By the name of a layer its moments, (channels,) and (channels, channels); a layer that the
        batches never reach is left out.

    Raises:
        UnsupportedError: If the model does not run on the batches.
    """
    sums: dict[str, _Sums] = {}

    def look(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = args[0] if args else next(iter(kwargs.values()))
        sums.setdefault(name, _Sums()).add(_rows(module, value))

    handles = [
        model.get_submodule(name).register_forward_pre_hook(partial(look, name), with_kwargs=True)
        for name in layers
    ]
    try:
        for batch in batches:
            run_on_data(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: found.moments() for name, found in sums.items()}


class _Sums:
    """Running sums over the rows of one layer's inputs."""

    def __init__(self) -> None:
        self.count = 0
        self.first: Tensor | float = 0.0
        self.second: Tensor | float = 0.0

    def add(self, rows: Tensor) -> None:
        # A sum of many squares is beyond what float16 can hold.
        rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
        self.count += len(rows)
        self.first = self.first + rows.sum(0).double()
        self.second = self.second + (rows.mT @ rows).double()

    def moments(self) -> Moments:
        assert isinstance(self.first, Tensor)
        assert isinstance(self.second, Tensor)
        return Moments(self.count, self.first / self.count, self.second / self.count)


def _rows(module: nn.Module, value: Tensor) -> Tensor:
    """A layer's input as (positions, channels)."""
    axes = len(getattr(module, "kernel_size", ()))
    if axes:
        value = value.movedim(-axes - 1, -1)
    return value.detach().flatten(0, -2) if value.ndim > 1 else value.detach()[None]
