"""How a forward pass calls a model's modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tdkit.errors import UnsupportedError, first_line
from tdkit.forward.copying import refuse_lazy
from tdkit.forward.inputs import copies
from tdkit.forward.trial import trial


def trace(
    model: nn.Module, modules: Sequence[nn.Module], inputs: Sequence[Any]
) -> dict[nn.Module, list[Call]]:
    """How one eval-mode forward pass calls some modules, in order of the first call.

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
            model(*copies(inputs))
    except Exception as error:
        shapes = ", ".join(str(tuple(i.shape)) for i in inputs if isinstance(i, Tensor))
        raise UnsupportedError(
            f"the model does not run on an input of shape {shapes}: {first_line(error)}",
            "name the shape that it takes with --input-shape, such as 3,224,224, or data that fit;"
            " a model of several inputs or of integers goes without, or with example_inputs in"
            " Python",
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
