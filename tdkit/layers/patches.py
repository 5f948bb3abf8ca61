"""A layer as rows: what each output position is made of, so that a layer is a matrix product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tdkit.layers.spec import LayerSpec


def positions(spec: LayerSpec, output: Tensor) -> int:
    """How many output positions a call of a layer has, over all samples.

    Args:
        spec: The layer.
        output: What it returned: (..., out) of a Linear, else (batch, out, *size), the batch axis
            of which may be missing.
    """
    return output.numel() // spec.out_channels


def output_rows(spec: LayerSpec, output: Tensor, places: Tensor) -> Tensor:
    """A layer's output at some positions.

    Args:
        spec: The layer.
        output: See :func:`positions`.
        places: (n,) positions, counted through samples and then along the axes.

    Returns:
        (groups, n, out / groups).
    """
    last = output.movedim(-len(spec.kernel_size) - 1, -1)
    rows = last.reshape(-1, spec.groups, spec.out_channels // spec.groups)[places]
    return rows.transpose(0, 1)


def input_rows(spec: LayerSpec, value: Tensor, places: Tensor) -> Tensor:
    """The patches of a layer's input that its outputs at some positions are made of.

    Times the weight as (groups, out, in, *kernel), flattened from ``in``, they are the output
    without its bias. Of a transposed convolution they are windows of its input with zeros between
    the entries.

    Args:
        spec: The layer.
        value: Its input: (..., in) of a Linear, else (batch, in, *size), the batch axis of which
            may be missing.
        places: (n,) positions of its output, see :func:`output_rows`.

    Returns:
        (groups, n, in / groups * kernel places).
    """
    if spec.kind == "Linear":
        return value.reshape(-1, spec.in_channels)[places][None]
    axes = len(spec.kernel_size)
    batched = value if value.ndim == axes + 2 else value[None]
    padded = _spread(spec, batched) if spec.transposed else _padded(spec, batched)
    strides = (1,) * axes if spec.transposed else spec.stride
    windows = padded
    for axis, (kernel, dilation, stride) in enumerate(
        zip(spec.kernel_size, spec.dilation, strides, strict=True)
    ):
        windows = windows.unfold(2 + axis, dilation * (kernel - 1) + 1, stride)
        windows = windows[..., ::dilation]
    shape = [len(windows), *windows.shape[2 : 2 + axes]]
    found = windows.movedim(1, axes + 1)[torch.unravel_index(places, shape)]
    if spec.transposed:
        found = found.flip([*range(-axes, 0)])
    return found.reshape(len(places), spec.groups, -1).transpose(0, 1)


def _padded(spec: LayerSpec, value: Tensor) -> Tensor:
    """The input of a convolution with its padding around it."""
    if spec.padding == "valid":
        return value
    if isinstance(spec.padding, str):
        totals = [d * (k - 1) for d, k in zip(spec.dilation, spec.kernel_size, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(each, each) for each in spec.padding]
    mode = "constant" if spec.padding_mode == "zeros" else spec.padding_mode
    return functional.pad(value, _flat(sides), mode)


def _spread(spec: LayerSpec, value: Tensor) -> Tensor:
    """The input of a transposed convolution with zeros between and around its entries."""
    size = [(n - 1) * s + 1 for n, s in zip(value.shape[2:], spec.stride, strict=True)]
    wide = value.new_zeros(*value.shape[:2], *size)
    places: tuple[Any, ...] = (..., *(slice(None, None, step) for step in spec.stride))
    wide[places] = value
    assert not isinstance(spec.padding, str)
    sides = [
        (d * (k - 1) - p, d * (k - 1) - p + extra)
        for d, k, p, extra in zip(
            spec.dilation, spec.kernel_size, spec.padding, spec.output_padding, strict=True
        )
    ]
    return functional.pad(wide, _flat(sides))


def _flat(sides: Sequence[tuple[int, int]]) -> list[int]:
    """Paddings as torch wants them: the last axis first."""
    return [each for pair in reversed(sides) for each in pair]
