"""What a convolution makes of impulses, which is how the kernel of a chain is read off."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from tdkit.layers.spec import LayerSpec


def split_groups(weight: Tensor, layer: LayerSpec) -> Tensor:
    """A weight in torch's layout as (groups, out, in, *kernel)."""
    parts: Tensor = weight.unflatten(0, (layer.groups, -1))
    return parts.transpose(1, 2) if layer.transposed else parts


def join_groups(parts: Tensor, layer: LayerSpec) -> Tensor:
    """The inverse of :func:`split_groups`, from (groups, out, in, *kernel)."""
    return (parts.transpose(1, 2) if layer.transposed else parts).flatten(0, 1)


def impulse_response(stage: LayerSpec, weight: Tensor, signal: Tensor) -> Tensor:
    """A signal through a convolution stripped of stride, padding and dilation.

    Args:
        stage: The convolution.
        weight: Its weight in torch's layout.
        signal: (impulses, channels, *kernel), the kernel of the stages before.

    Returns:
        (impulses, output channels, *kernel), each axis longer by the stage's kernel less one.
    """
    if all(1 in sizes for sizes in zip(stage.kernel_size, signal.shape[2:], strict=True)):
        return _outer_product(stage, weight, signal)
    # A transposed convolution spreads an impulse into its kernel as it is; for an ordinary one
    # the same takes full padding and the flipped kernel, since torch's convolution correlates.
    axes = len(stage.kernel_size)
    if stage.transposed:
        spread = [
            functional.conv_transpose1d,
            functional.conv_transpose2d,
            functional.conv_transpose3d,
        ][axes - 1]
        return spread(signal, weight, groups=stage.groups)
    correlate = [functional.conv1d, functional.conv2d, functional.conv3d][axes - 1]
    flipped = weight.flip(tuple(range(2, 2 + axes)))
    padding = tuple(size - 1 for size in stage.kernel_size)
    return correlate(signal, flipped, padding=padding, groups=stage.groups)


def _outer_product(stage: LayerSpec, weight: Tensor, signal: Tensor) -> Tensor:
    """The response where kernel and signal have no axis in common: channels contract, axes join.

    torch's convolutions in float64 are ten times slower than this product.
    """
    axes = len(stage.kernel_size)
    inputs = signal.unflatten(1, (stage.groups, -1)).flatten(3)
    kernels = split_groups(weight, stage).flatten(3)
    joined = torch.einsum("ngcs,gtck->ngtsk", inputs, kernels).flatten(1, 2)
    apart = joined.unflatten(-1, stage.kernel_size).unflatten(2, signal.shape[2:])
    pairs = [2 + axis + side for axis in range(axes) for side in (0, axes)]
    sizes = [a * b for a, b in zip(stage.kernel_size, signal.shape[2:], strict=True)]
    response: Tensor = apart.permute(0, 1, *pairs).reshape(*apart.shape[:2], *sizes)
    return response
