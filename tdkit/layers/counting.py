"""Parameters and multiply-accumulates in closed form. FLOPs are twice the MACs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import nn
from torch.nn.parameter import UninitializedParameter

from tdkit.forward.trace import Call
from tdkit.layers.spec import LayerSpec


def model_parameters(model: nn.Module) -> int:
    """The number of parameters, shared ones counted once and those without a shape not at all."""
    return sum(p.numel() for p in model.parameters() if not isinstance(p, UninitializedParameter))


def macs(stages: Sequence[LayerSpec], calls: Iterable[Call]) -> int:
    """Multiply-accumulates per sample of layers applied in a row; biases are not counted.

    Args:
        stages: The layers in order; a layer that is not factorized is its own only stage.
        calls: How the model calls the first of them.
    """
    return sum(call.repeats * _chain_macs(stages, call.size) for call in calls)


def output_size(layer: LayerSpec, size: tuple[int, ...]) -> tuple[int, ...]:
    """The spatial size of a layer's output, from that of its input."""
    if layer.kind == "Linear" or layer.padding == "same":
        return size
    padding = (0,) * len(size) if isinstance(layer.padding, str) else layer.padding
    axes = zip(size, layer.kernel_size, layer.stride, padding, layer.dilation, strict=True)
    if layer.transposed:
        return tuple(
            (n - 1) * s - 2 * p + d * (k - 1) + extra + 1
            for (n, k, s, p, d), extra in zip(axes, layer.output_padding, strict=True)
        )
    return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)


def _chain_macs(stages: Sequence[LayerSpec], size: tuple[int, ...]) -> int:
    total = 0
    for stage in stages:
        after = output_size(stage, size)
        # Every weight meets every output position; in a transposed convolution, every input's.
        total += stage.weight_parameters * math.prod(size if stage.transposed else after)
        size = after
    return total
