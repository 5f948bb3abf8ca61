"""Arguments of a forward pass, nested in whatever way a model takes them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tdkit import defaults
from tdkit.errors import UsageError, first_line


@dataclass(frozen=True)
class Inputs:
    """What a forward pass is called with.

    Attributes:
        args: Positional arguments: tensors of any shape, and whatever else the model takes.
        kwargs: Keyword arguments.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Any) -> Inputs:
        """The first of :func:`readings`: what a value most likely means as arguments."""
        return readings(value)[0]

    def run(self, model: Callable[..., Any]) -> Any:
        """Call a model with copies of the tensors, so that it may change them in place."""
        given = self.map(torch.clone)
        return model(*given.args, **given.kwargs)

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """The same arguments with every tensor, of any shape and however nested, replaced."""
        args = tuple(map_tensors(value, change) for value in self.args)
        return Inputs(args, {key: map_tensors(v, change) for key, v in self.kwargs.items()})

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, of any shape, in order."""
        found: list[Tensor] = []

        def collect(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self.map(collect)
        return found

    @property
    def batch(self) -> int | None:
        """The size of the batch axis: the first one of the first tensor that has any."""
        return next((len(tensor) for tensor in self.tensors if tensor.ndim), None)

    def first_sample(self) -> Inputs:
        """The first sample of every tensor that has the batch axis."""
        return self._of_batch(self.batch, lambda tensor: tensor[:1])

    def two_samples(self) -> Inputs:
        """At least two samples, the second one mirrored: BatchNorm in train mode refuses one."""
        if self.batch != 1:
            return self
        return self._of_batch(1, lambda tensor: torch.cat([tensor, tensor.flip(-1)]))

    def _of_batch(self, size: int | None, change: Callable[[Tensor], Tensor]) -> Inputs:
        return self.map(lambda x: change(x) if x.ndim and len(x) == size else x)

    @property
    def image(self) -> Tensor | None:
        """The only argument where that is a tensor of floats (batch, ...); else None."""
        value = self.args[0] if len(self.args) == 1 and not self.kwargs else None
        images = isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2
        return value if images else None

    @property
    def is_finite(self) -> bool:
        """Whether no tensor holds NaN or infinity."""
        return all(bool(tensor.isfinite().all()) for tensor in self.tensors)

    def shapes(self) -> str:
        """The shapes of the tensors, for messages."""
        return ", ".join(str(tuple(tensor.shape)) for tensor in self.tensors)


def readings(value: Any) -> tuple[Inputs, ...]:
    """What a value may mean as the arguments of a forward pass, the likeliest first.

    A tuple or a list is several positional arguments, or one argument that is a list; a mapping
    is keyword arguments, or one argument that is a mapping; anything else is one argument.

    Args:
        value: Tensors of any shape, however nested.
    """
    if isinstance(value, Inputs):
        return (value,)
    alone = Inputs((value,))
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return Inputs(kwargs=dict(value)), alone
    # A named tuple, such as a packed sequence, is one thing.
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return Inputs(tuple(value)), alone
    return (alone,)


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A nested value with every tensor replaced; containers are new, other leaves stay.

    Args:
        value: Tensors, mappings, lists, tuples, named tuples and dataclasses in any nesting.
        change: Called with each tensor, of any shape.

    Raises:
        UsageError: If there can be no second container of its kind.
    """
    if isinstance(value, Tensor):
        return change(value)
    if is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in fields(value) if hasattr(value, f.name)]
        changed = {name: map_tensors(getattr(value, name), change) for name in names}
        return _rebuilt(value, lambda: replace(value, **changed), partial(_set_fields, changed))
    if isinstance(value, Mapping):
        items = {key: map_tensors(part, change) for key, part in value.items()}
        kind: Any = type(value)
        return (
            items
            if kind is dict
            else _rebuilt(value, lambda: kind(items), partial(_set_items, items))
        )
    if isinstance(value, list | tuple):
        parts = [map_tensors(part, change) for part in value]
        kind = type(value)
        several = hasattr(value, "_fields")
        make = (lambda: kind(*parts)) if several else (lambda: kind(parts))
        return _rebuilt(value, make, partial(_set_parts, parts))
    return value


def _rebuilt(value: Any, make: Callable[[], Any], fill: Callable[[Any], None]) -> Any:
    """A container made anew; where its constructor takes something else, a copy that is filled."""
    try:
        return make()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # a class of the caller's may fail in any way
        return _copied(value, fill)


def _copied(value: Any, fill: Callable[[Any], None]) -> Any:
    try:
        made = copy.copy(value)
        fill(made)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UsageError(
            f"the inputs hold a {type(value).__name__}, of which no other can be made:"
            f" {first_line(error)}",
            "give a dict, a list, a tuple or a dataclass instead",
        ) from error
    return made


def _set_fields(changed: Mapping[str, Any], made: Any) -> None:
    for name, part in changed.items():
        object.__setattr__(made, name, part)  # it may be frozen


def _set_items(changed: Mapping[Any, Any], made: Any) -> None:
    for key, part in changed.items():
        made[key] = part


def _set_parts(parts: Sequence[Any], made: Any) -> None:
    made[:] = parts


def random_inputs(
    model: nn.Module, shape: Sequence[int], batch: int = 2, seed: int = defaults.SEED
) -> Inputs:
    """A batch of standard normal inputs in the model's dtype and on its device.

    Args:
        model: The model they are for.
        shape: The shape of one sample.
        batch: How many.
        seed: Of the generator that draws them.

    Returns:
        One tensor (batch, *shape).

    Raises:
        UsageError: If a sample of this shape has no elements.
    """
    if any(size < 1 for size in shape):
        raise UsageError(f"an input of shape {tuple(shape)} is empty")
    generator = torch.Generator().manual_seed(seed)
    return Inputs((torch.randn(batch, *shape, generator=generator).to(first_float(model)),))


def first_float(model: nn.Module) -> Tensor:
    """The first parameter of floats, of any shape, whose dtype and device a model's inputs have."""
    return next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))


def copies(inputs: Sequence[Any]) -> list[Any]:
    """Arguments of a forward pass, tensors of any shape among them, that may be changed."""
    return [value.clone() if isinstance(value, Tensor) else value for value in inputs]
