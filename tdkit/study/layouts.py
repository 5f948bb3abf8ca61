"""The memory layouts that a study's convolutions run in: on a CPU, each in its faster one.

Channels last is faster for most. It is not for a wide convolution on a small map: its weights do
not fit into a core's cache, and there they are read again for every image, which takes longer
than to compute the few pixels. ``benchmarks/layouts.py`` measures both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tdkit.layers import copies, trial

# Weights of a wide convolution, at least: 2 MiB in float32, what a core's cache holds.
_WIDE = 2**19

# Pixels of a small map, at most.
_SMALL = 100


def set_layouts(model: nn.Module, inputs: Sequence[Any]) -> None:
    """Put channels last, but for wide convolutions on a CPU.

    A model that cannot run with channels last everywhere, since it views its features, stays
    contiguous: what stands in for a wide convolution may end in a narrow stage.

    Args:
        model: Changed in place; its values stay the same.
        inputs: One sample for each of its arguments.
    """
    try:
        model.to(memory_format=torch.channels_last)
        with trial(model):
            model(*copies(inputs))
            for module in filter(_has_wide_weight, model.modules()):
                module.to(memory_format=torch.contiguous_format)
            with small_maps(model):
                model(*copies(inputs))
    except Exception:  # a model may fail in any way
        model.to(memory_format=torch.contiguous_format)


@contextmanager
def small_maps(model: nn.Module) -> Iterator[None]:
    """Let wide convolutions run in the contiguous layout where their maps are small.

    This goes for all that runs inside, so also for stand-ins of a layer. Meanwhile torch's
    transformer layers leave their fast path. Nothing changes for a model without wide
    convolutions.
    """
    if any(map(_has_wide_weight, model.modules())):
        with _SmallMaps():
            yield
    else:
        yield


class _SmallMaps(TorchFunctionMode):
    # At the function, as a stand-in's stages are not modules that anybody has heard of.
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.conv2d and len(args) > 1:
            features, weight, *rest = args
            if _is_wide(weight) and math.prod(features.shape[-2:]) <= _SMALL:
                args = (features.contiguous(), weight, *rest)
        return func(*args, **kwargs or {})


def _has_wide_weight(module: nn.Module) -> bool:
    # A subclass may have done away with its weight.
    return isinstance(module, nn.Conv2d) and _is_wide(getattr(module, "weight", None))


def _is_wide(weight: Any) -> bool:
    if not isinstance(weight, Tensor) or not weight.is_cpu or weight.numel() < _WIDE:
        return False
    # A pointwise convolution is faster with channels last on all but the smallest maps.
    return math.prod(weight.shape[2:]) > 1
