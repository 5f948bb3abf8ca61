"""How a forward pass calls a model's modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tdkit.errors import UnsupportedError, first_line, option
from tdkit.forward.copying import refuse_lazy
from tdkit.forward.inputs import Inputs
from tdkit.forward.trial import trial

Calls = Mapping[nn.Module, "Sequence[Call]"]
"""How a pass calls modules, in order of the first call."""


def trace(model: nn.Module, modules: Sequence[nn.Module], inputs: Inputs) -> Calls:
    """How one eval-mode forward pass calls some modules, in order of the first call.

    Args:
        model: The model; it is afterwards as before.
        modules: Some of its modules.
        inputs: Arguments of the pass, tensors of any shape.

    Raises:
        UnsupportedError: If the model is lazy, or does not run on the inputs.
    """
    refuse_lazy(model)
    seen: dict[nn.Module, list[Call]] = {}

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = args[0] if args else next(iter(kwargs.values()))
        seen.setdefault(module, []).append(_call(module, value))

    handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in modules]
    try:
        with trial(model):
            inputs.run(model)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a model may fail in any way
        raise UnsupportedError(
            f"the model does not run on an input of shape {inputs.shapes()}: {first_line(error)}",
            f"name the shape that it takes with {option('input_shape', (3, 224, 224))}, or data"
            f" that fit; a model of several inputs or of integers takes {option('example_inputs')}"
            " in Python, or goes without",
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _call(module: nn.Module, value: Tensor) -> Call:
    axes, shape = len(getattr(module, "kernel_size", ())), tuple(value.shape)
    return Call((1, *shape) if axes and len(shape) == axes + 1 else shape)


@dataclass(frozen=True)
class Call:
    """One call of a layer while the model ran on a single sample.

    Attributes:
        shape: The full shape of the layer's input. Its first axis is 1, or more where the model
            folds other axes into the batch; a convolution's input without a batch axis gets one.
    """

    shape: tuple[int, ...]
