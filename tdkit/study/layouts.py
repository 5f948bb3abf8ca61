"""The memory layouts that a study's convolutions run in: on a CPU, each in its faster one.

Channels last is faster for most. It is not for a wide convolution on a small map: its weights do
not fit into a core's cache, and there they are read again for every image, which takes longer
than to compute the few pixels. ``benchmarks/layouts.py`` measures both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tdkit.forward.inputs import Inputs
from tdkit.forward.trial import trial

# Weights of a wide convolution, at least: 2 MiB in float32, what a core's cache holds.
_WIDE = 2**19

# Pixels of a small map, at most.
_SMALL = 100


def set_layouts(model: nn.Module, inputs: Inputs) -> None:
    """Put channels last, but for wide convolutions whose maps are small.

    A model that cannot run with channels last everywhere, since it views its features, stays
    contiguous: what stands in for a wide convolution may end in a narrow stage.

    Args:
        model: Changed in place; its values stay the same.
        inputs: One sample (1, channels, height, width).
    """
    try:
        model.to(memory_format=torch.channels_last)
        with trial(model):
            for module in _on_small_maps(model, inputs):
                module.to(memory_format=torch.contiguous_format)
            with small_maps(model):
                inputs.run(model)
    except Exception:  # a model may fail in any way
        model.to(memory_format=torch.contiguous_format)


@contextmanager
def small_maps(model: nn.Module) -> Iterator[None]:
    """Let wide convolutions run in the contiguous layout where their maps are small.

    This goes for all that runs inside, so also for stand-ins of a layer. Meanwhile torch's
    transformer layers leave their fast path. Nothing changes for a model that
    :func:`set_layouts` has left in one layout.
    """
    layouts = {_layout(convolution.weight) for convolution in _convolutions(model)}
    if layouts >= {torch.channels_last, torch.contiguous_format}:
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
            contiguous = _is_wide(weight) and _layout(weight) == torch.contiguous_format
            if contiguous and _is_small(features):
                args = (features.contiguous(), weight, *rest)
        return func(*args, **kwargs or {})


def _on_small_maps(model: nn.Module, inputs: Inputs) -> list[nn.Module]:
    """The wide convolutions that a pass calls on small maps and on no others."""
    small: dict[nn.Module, bool] = {}

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        small[module] = small.get(module, True) and _is_small(args[0])

    with ExitStack() as stack:
        for convolution in _convolutions(model):
            if _is_wide(convolution.weight):
                stack.callback(convolution.register_forward_pre_hook(note).remove)
        inputs.run(model)
    return [module for module in small if small[module]]


def _convolutions(model: nn.Module) -> Iterator[nn.Conv2d]:
    for module in model.modules():
        # A subclass may have done away with its weight.
        if isinstance(module, nn.Conv2d) and isinstance(getattr(module, "weight", None), Tensor):
            yield module


def _is_wide(weight: Tensor) -> bool:
    # A pointwise convolution is faster with channels last on all but the smallest maps.
    pointwise = math.prod(weight.shape[2:]) == 1
    return weight.is_cpu and not pointwise and weight.numel() >= _WIDE


def _is_small(features: Tensor) -> bool:
    return math.prod(features.shape[-2:]) <= _SMALL


def _layout(weight: Tensor) -> torch.memory_format | None:
    """The one layout that a weight has; None where both can be said of it."""
    found = [
        layout
        for layout in (torch.contiguous_format, torch.channels_last)
        if weight.is_contiguous(memory_format=layout)
    ]
    return found[0] if len(found) == 1 else None
