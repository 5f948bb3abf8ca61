"""What factorizations are chained of: linear maps as plain records, each with its torch module.

A stage says what it costs, which module it is and what it does to an impulse. The kinds are open:
:class:`~tdkit.layers.spec.LayerSpec` covers torch's weight layers, the four below move entries
about, and plugins register more with the hook ``tdkit_stages``. No weights here: records are safe
to keep, compare and store as JSON.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from tdkit.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from typing_extensions import Self

Shape = tuple[int, ...]
"""The full shape of a tensor, batch axis included."""

MOST = 2**31
"""No size, and no product of sizes, in a description from a file reaches this."""

_MOST_AXES = 16


class Stage(ABC):
    """One linear map of a factorized layer. Subclass it as a frozen dataclass.

    What implementers may assume: inputs have a batch axis first (of a Linear, any number of
    leading axes), and a stage that has a weight keeps it in its module's parameter ``weight``.
    What others assume of them: the map is linear, and its weight alone decides it.

    Attributes:
        kinds: What stands for it in model files under ``kind``; no two classes share one.
        kind: The one of ``kinds`` that this stage is.
        bias: Whether its module has a bias, in the parameter ``bias``.
    """

    kinds: ClassVar[tuple[str, ...]] = ()
    kind: str
    bias: bool = False

    @property
    def weight_shape(self) -> Shape | None:
        """The shape of its module's ``weight``; None where it has none."""
        return None

    @property
    def state_shapes(self) -> dict[str, Shape]:
        """The names and shapes of its module's parameters."""
        return {} if self.weight_shape is None else {"weight": self.weight_shape}

    @property
    def parameters(self) -> int:
        """The number of parameters, bias included."""
        return sum(math.prod(shape) for shape in self.state_shapes.values())

    def carries_bias(self, channels: int) -> bool:
        """Whether :meth:`with_bias` gives it one bias for each of so many output channels."""
        return False

    def with_bias(self, bias: bool) -> Stage:
        """The same stage with or without a bias.

        Raises:
            UnsupportedError: If it cannot have one.
        """
        if bias:
            raise UnsupportedError(f"the stage {self.kind} has no bias")
        return self

    def repeated(self, groups: int) -> Stage:
        """This stage side by side ``groups`` times, for a grouped layer.

        Raises:
            UnsupportedError: If it cannot be put side by side: its method then says so by
                ``grouped = False``.
        """
        if groups > 1:
            raise UnsupportedError(f"the stage {self.kind} cannot stand in a grouped layer")
        return self

    def ungrouped(self, groups: int) -> Stage:
        """The inverse of :meth:`repeated`."""
        return self.repeated(groups)

    @abstractmethod
    def output_shape(self, shape: Shape) -> Shape:
        """The full shape of the output.

        Args:
            shape: The full shape of the input, batch axis included.

        Raises:
            UsageError: If the stage takes no such input.
        """

    def macs(self, shape: Shape) -> int:
        """Multiply-accumulates of one call; biases are not counted.

        Args:
            shape: The full shape of the input, batch axis included.
        """
        return 0

    @abstractmethod
    def build(self, dtype: torch.dtype | None = None, device: Any = None) -> nn.Module:
        """An ordinary module, which loads without tdkit; its weights are not initialised."""

    @abstractmethod
    def compose(self, weight: Tensor | None, signal: Tensor) -> Tensor:
        """What becomes of impulses, without stride, padding and dilation; differentiable.

        Args:
            weight: Of shape :attr:`weight_shape`, or None.
            signal: As the module's input: (impulses, channels, *kernel), the kernel of the stages
                before, or (impulses, *ones, features) in the place of a Linear, with further
                leading axes of size 1. An ordinary convolution spreads an impulse into its kernel
                as it is, not flipped.
        """

    @classmethod
    @abstractmethod
    def of(cls, module: nn.Module) -> Self | None:
        """The stage that a module is; None where it is no such."""

    @abstractmethod
    def check(self) -> str | None:
        """Why a description from a file is not one that torch could have, or None.

        Every field may hold anything that JSON knows, with tuples for lists.
        """

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON values, ``kind`` among them, read back by :meth:`from_json`."""
        assert is_dataclass(self), f"{type(self).__name__} is not a dataclass"
        return {"kind": self.kind, **asdict(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read a record that :meth:`to_json` wrote; :meth:`check` says whether to believe it.

        Raises:
            UsageError: If the value does not describe such a stage.
        """
        try:
            fields: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in value.items()
            }
            kind = fields["kind"]
            if "kind" not in getattr(cls, "__dataclass_fields__", {}):
                del fields["kind"]
            stage = cls(**fields)
        except (AttributeError, KeyError, TypeError) as error:
            raise UsageError(f"not a layer description: {value!r}") from error
        if kind not in cls.kinds:
            raise UsageError(f"unknown kind of layer {kind!r}")
        return stage


class _Move(Stage):
    """A stage without weight, which only moves entries about."""

    def compose(self, weight: Tensor | None, signal: Tensor) -> Tensor:
        """The same move of an impulse, of any shape that the module takes."""
        moved: Tensor = self.build()(signal)
        return moved


@dataclass(frozen=True)
class Flatten(_Move):
    """``nn.Flatten``: neighbouring axes as one.

    Args:
        start: The first of them; negative from the end.
        end: The last of them.
    """

    start: int
    end: int

    kinds = ("Flatten",)
    kind = "Flatten"

    def output_shape(self, shape: Shape) -> Shape:
        """The axes from start to end replaced by their product.

        Raises:
            UsageError: If the shape lacks one of them, or they are in the wrong order.
        """
        start, end = _axis(self.start, shape, self.kind), _axis(self.end, shape, self.kind)
        if start > end:
            raise UsageError(f"Flatten from axis {start} to {end} of the shape {shape}")
        return (*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :])

    def build(self, dtype: torch.dtype | None = None, device: Any = None) -> nn.Module:
        """An ``nn.Flatten``."""
        return nn.Flatten(self.start, self.end)

    @classmethod
    def of(cls, module: nn.Module) -> Flatten | None:
        """From an ``nn.Flatten``."""
        return cls(module.start_dim, module.end_dim) if type(module) is nn.Flatten else None

    def check(self) -> str | None:
        """Two axes, in order where that can be told."""
        if not (is_axis(self.start) and is_axis(self.end)):
            return "its axes are not axes"
        if (self.start < 0) == (self.end < 0) and self.start > self.end:
            return "its axes are in the wrong order"
        return None


@dataclass(frozen=True)
class Unflatten(_Move):
    """``nn.Unflatten``: one axis as several.

    Args:
        dim: The axis; negative from the end.
        sizes: What it becomes, in order.
    """

    dim: int
    sizes: Shape

    kinds = ("Unflatten",)
    kind = "Unflatten"

    def output_shape(self, shape: Shape) -> Shape:
        """The axis replaced by the sizes.

        Raises:
            UsageError: If the shape lacks the axis, or it is not of the sizes' product.
        """
        dim = _axis(self.dim, shape, self.kind)
        if shape[dim] != math.prod(self.sizes):
            raise UsageError(f"an axis of size {shape[dim]} is not {self.sizes} unflattened")
        return (*shape[:dim], *self.sizes, *shape[dim + 1 :])

    def build(self, dtype: torch.dtype | None = None, device: Any = None) -> nn.Module:
        """An ``nn.Unflatten``."""
        return nn.Unflatten(self.dim, self.sizes)

    @classmethod
    def of(cls, module: nn.Module) -> Unflatten | None:
        """From an ``nn.Unflatten`` without named axes."""
        if type(module) is not nn.Unflatten or not isinstance(module.dim, int):
            return None
        return cls(module.dim, tuple(module.unflattened_size))

    def check(self) -> str | None:
        """An axis, and sizes whose product a tensor could have."""
        if not is_axis(self.dim):
            return "its axis is not one"
        if not (is_sizes(self.sizes) and math.prod(self.sizes) < MOST):
            return "its sizes are not those of a tensor"
        return None


@dataclass(frozen=True)
class ChannelShuffle(_Move):
    """``nn.ChannelShuffle``: channels (groups, n) in the order (n, groups).

    Args:
        groups: A divisor of the number of channels, which are axis 1.
    """

    groups: int

    kinds = ("ChannelShuffle",)
    kind = "ChannelShuffle"

    def output_shape(self, shape: Shape) -> Shape:
        """The same shape.

        Raises:
            UsageError: If there is nothing beside the channels, or they are no such groups.
        """
        if len(shape) < 3 or shape[1] % self.groups:
            raise UsageError(f"no {self.groups} groups of channels in the shape {shape}")
        return shape

    def compose(self, weight: Tensor | None, signal: Tensor) -> Tensor:
        """The same shuffle of (impulses, channels, *kernel).

        By operations that have a gradient on every device.
        """
        shuffled: Tensor = signal.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)
        return shuffled

    def build(self, dtype: torch.dtype | None = None, device: Any = None) -> nn.Module:
        """An ``nn.ChannelShuffle``."""
        return nn.ChannelShuffle(self.groups)

    @classmethod
    def of(cls, module: nn.Module) -> ChannelShuffle | None:
        """From an ``nn.ChannelShuffle``."""
        return cls(module.groups) if type(module) is nn.ChannelShuffle else None

    def check(self) -> str | None:
        """A number of groups."""
        return None if is_int(self.groups, 1) else "its groups are not a positive number"


@dataclass(frozen=True)
class Permute(_Move):
    """``torchvision.ops.Permute``: the axes in another order.

    Args:
        dims: All axes, each once, the batch axis included.
    """

    dims: Shape

    kinds = ("Permute",)
    kind = "Permute"

    def output_shape(self, shape: Shape) -> Shape:
        """The sizes in the order of the axes.

        Raises:
            UsageError: If the shape has more or fewer axes.
        """
        if len(shape) != len(self.dims):
            raise UsageError(f"the permutation {self.dims} does not fit the shape {shape}")
        return tuple(shape[dim] for dim in self.dims)

    def compose(self, weight: Tensor | None, signal: Tensor) -> Tensor:
        """The same permutation, of any shape that has these axes."""
        return signal.permute(self.dims)

    def build(self, dtype: torch.dtype | None = None, device: Any = None) -> nn.Module:
        """A ``torchvision.ops.Permute``."""
        # torchvision imports torch's compiler, which most runs need not wait for.
        from torchvision.ops import Permute as Module

        module: nn.Module = Module(list(self.dims))
        return module

    @classmethod
    def of(cls, module: nn.Module) -> Permute | None:
        """From a ``torchvision.ops.Permute``."""
        found = (type(module).__module__, type(module).__name__)
        dims: Any = vars(module).get("dims")
        if found != ("torchvision.ops.misc", "Permute") or not isinstance(dims, list | tuple):
            return None
        return cls(tuple(dims))

    def check(self) -> str | None:
        """Every axis once."""
        if not is_sizes(self.dims, least=0) or sorted(self.dims) != [*range(len(self.dims))]:
            return "its dims are not a permutation of all axes"
        return None


def is_int(value: object, least: int) -> bool:
    """Whether a value is a whole number, at least so large, that a size of a tensor can be."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < MOST


def is_axis(value: object) -> bool:
    """Whether a value can name an axis of a tensor."""
    return is_int(value, -_MOST_AXES) and value < _MOST_AXES  # type: ignore[operator]


def is_sizes(values: object, least: int = 1) -> bool:
    """Whether a value is a tuple of sizes, a few of them."""
    return (
        isinstance(values, tuple)
        and 1 <= len(values) <= _MOST_AXES
        and all(is_int(value, least) for value in values)
    )


def _axis(dim: int, shape: Sequence[int], kind: str) -> int:
    if not -len(shape) <= dim < len(shape):
        raise UsageError(f"{kind} of axis {dim}: the shape {tuple(shape)} has none")
    return dim % len(shape)
