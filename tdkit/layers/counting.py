"""Parameters and multiply-accumulates in closed form. FLOPs are twice the MACs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn
from torch.nn.parameter import UninitializedParameter

from tdkit.forward.trace import Call
from tdkit.layers.stages import Shape, Stage


def model_parameters(model: nn.Module) -> int:
    """The number of parameters, shared ones counted once and those without a shape not at all."""
    return sum(p.numel() for p in model.parameters() if not isinstance(p, UninitializedParameter))


def macs(stages: Sequence[Stage], calls: Iterable[Call]) -> int:
    """Multiply-accumulates per sample of stages applied in a row; biases are not counted.

    Args:
        stages: In order; a layer that is not factorized is its own only stage.
        calls: How the model calls the first of them.
    """
    return sum(_chain_macs(stages, call.shape) for call in calls)


def _chain_macs(stages: Sequence[Stage], shape: Shape) -> int:
    total = 0
    for stage in stages:
        total += stage.macs(shape)
        shape = stage.output_shape(shape)
    return total
