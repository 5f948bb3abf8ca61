"""Pairs of a layer's input in one model and its output in another, which are run in step."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from tdkit.calibration.passes import Passes
from tdkit.forward.inputs import Inputs
from tdkit.forward.trial import run_on_data
from tdkit.layers.inventory import Layer
from tdkit.layers.patches import input_rows, output_rows, positions
from tdkit.layers.spec import LayerSpec

# A layer that is wider is looked at in fewer places.
_WIDE = 2048

# Columns of a Gram matrix that are multiplied at once, at least.
_BLOCK = 128


@dataclass(frozen=True, eq=False)
class Call:
    """What a dense layer returned in one call.

    Attributes:
        count: Output positions of the whole call.
        places: (n,) of them.
        rows: (groups, n, out / groups), the output there.
    """

    count: int
    places: Tensor
    rows: Tensor


@dataclass(frozen=True, eq=False)
class Wanted:
    """What a dense layer returned, by batch and call.

    Attributes:
        spec: The layer.
        calls: For each batch each call in it.
    """

    spec: LayerSpec
    calls: tuple[tuple[Call, ...], ...]


class Pairs:
    """Sums over pairs of input and output rows of one layer, in float64.

    Products are in the precision of the rows, at least float32, of what they are beyond the mean of
    the first.

    Args:
        spec: The layer.
        centred: Whether something adds a bias to the output. Else means stay in the moments.
        second: Whether second moments are of use.
    """

    def __init__(self, spec: LayerSpec, *, centred: bool = True, second: bool = True) -> None:
        self.spec = spec
        self.count = 0
        self._centred, self._second = centred, second
        self._origin: tuple[Tensor, Tensor] | None = None
        self._sums: list[Tensor] = []

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add pairs.

        Args:
            inputs: (groups, n, d).
            outputs: (groups, n, out / groups).
        """
        x, y = at_least_float(inputs), at_least_float(outputs)
        if not x.shape[1]:
            return
        if self._origin is None:
            self._origin = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
        x, y = x - self._origin[0], y - self._origin[1]
        self.count += x.shape[1]
        found = [x.sum(1), y.sum(1)]
        if self._second:
            found += [_gram(x), y.mT @ x]
        wide = [each.double() for each in found]
        self._sums = [a + b for a, b in zip(self._sums, wide, strict=True)] if self._sums else wide

    @property
    def is_finite(self) -> bool:
        """Whether no sum is NaN or infinite."""
        return all(bool(each.isfinite().all()) for each in self._sums)

    @cached_property
    def input_mean(self) -> Tensor:
        """(groups, d); zeros where nothing adds a bias."""
        return self._mean(0) if self._centred else torch.zeros_like(self._mean(0))

    @cached_property
    def output_mean(self) -> Tensor:
        """(groups, out), out being the channels of a group; zeros likewise."""
        return self._mean(1) if self._centred else torch.zeros_like(self._mean(1))

    @cached_property
    def covariance(self) -> Tensor:
        """Of the inputs, (groups, d, d)."""
        return self._moment(2, 0, 0)

    @cached_property
    def cross(self) -> Tensor:
        """Of outputs with inputs, (groups, out, d)."""
        return self._moment(3, 1, 0)

    def _mean(self, place: int) -> Tensor:
        assert self._origin is not None, "no pair was added"
        mean: Tensor = self._origin[place][:, 0].double() + self._sums[place] / self.count
        return mean

    def _moment(self, place: int, rows: int, columns: int) -> Tensor:
        beyond = self._sums[rows] / self.count, self._sums[columns] / self.count
        result: Tensor = self._sums[place] / self.count - _outer(*beyond)
        return result if self._centred else result + _outer(self._mean(rows), self._mean(columns))


def wanted_outputs(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Inputs], rows: int, seed: int
) -> dict[str, Wanted]:
    """What layers return on some inputs, at random positions.

    Args:
        model: The dense model; it is afterwards as before.
        layers: Of it, decomposable ones.
        batches: Arguments of forward passes, tensors of any shape.
        rows: Positions of each layer in all batches together, about; of wide layers fewer.
        seed: Seeds the choice of positions.

    Returns:
        By the name of a layer, in the order in which the first batch reaches them; those that are
        never reached are left out.

    Raises:
        UnsupportedError: If the model does not run on the batches.
    """
    specs = {layer.name: layer.spec for layer in layers}
    share = {
        x.name: -(-_enough(x.spec, rows) // max(1, len(batches) * len(x.calls or (0,))))
        for x in layers
        if x.spec is not None
    }
    now: dict[str, list[Call]] = {}
    found: list[dict[str, list[Call]]] = []

    def look(name: str, _module: nn.Module, _args: Any, output: Tensor) -> None:
        spec, calls = specs[name], now.setdefault(name, [])
        assert spec is not None
        key = f"{seed}/{name}/{len(found)}/{len(calls)}"
        count = positions(spec, output)
        places = drawn(count, share[name], key).to(output.device)
        calls.append(Call(count, places, output_rows(spec, output.detach(), places).clone()))

    handles = [
        model.get_submodule(layer.name).register_forward_hook(partial(look, layer.name))
        for layer in layers
    ]
    with removed(handles):
        for batch in batches:
            now.clear()
            run_on_data(model, batch)
            found.append(dict(now))
    return {
        name: Wanted(spec, tuple(tuple(calls.get(name, ())) for calls in found))
        for name in dict.fromkeys(name for calls in found for name in calls)
        if (spec := specs[name]) is not None
    }


def given_rows(passes: Passes, name: str, wanted: Wanted) -> Iterator[tuple[int, Tensor, Tensor]]:
    """What a layer is given where another model returned what is wanted; nothing is run beyond it.

    Args:
        passes: Of the model, on the same batches as the other.
        name: The layer, or what stands in for it.
        wanted: From the other.

    Yields:
        The number of the batch, the inputs (groups, n, d) and the outputs (groups, n, out/groups).

    Raises:
        UnsupportedError: If the model does not run on the batches.
    """
    for number, calls in enumerate(wanted.calls):
        rows: list[Tensor | None] = []
        if calls:
            passes.run(number, name, partial(_look, wanted.spec, calls, rows))
        for inputs, call in zip(rows, calls, strict=False):
            if inputs is not None:
                yield number, inputs, call.rows


def _look(spec: LayerSpec, calls: Sequence[Call], rows: list[Tensor | None], value: Tensor) -> bool:
    """Take the rows of one call after the other; returns whether it was the last one."""
    call = calls[len(rows)]
    # A model may hand on another number of tokens or boxes than the dense one did.
    same = math.prod(spec.output_shape(tuple(value.shape))) == call.count * spec.out_channels
    rows.append(input_rows(spec, value.detach(), call.places) if same else None)
    return len(rows) == len(calls)


def at_least_float(rows: Tensor) -> Tensor:
    """Rows of any shape, in float32 where they are of half precision."""
    return rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows


@contextmanager
def removed(handles: Sequence[Any]) -> Iterator[None]:
    """Remove hooks at the end, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def drawn(count: int, most: int, key: str) -> Tensor:
    """About so many of some positions at most, (n,) in order.

    Args:
        count: How many there are.
        most: How many are wanted.
        key: What seeds the choice.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    if count <= most:
        return torch.arange(count)
    if count > 8 * most:  # hardly any twice
        some: Tensor = torch.randint(count, (most,), generator=generator).unique()
        return some
    return torch.randperm(count, generator=generator)[:most].sort().values


def _gram(rows: Tensor) -> Tensor:
    """Rows (groups, n, d) transposed times themselves, of which half is the other half."""
    width = rows.shape[-1]
    step = max(_BLOCK, -(-width // 8))
    result = rows.new_empty(len(rows), width, width)
    for start in range(0, width, step):
        block = rows[..., start : start + step].mT @ rows[..., start:]
        result[:, start : start + step, start:] = block
        result[:, start:, start : start + step] = block.mT
    return result


def _enough(spec: LayerSpec, rows: int) -> int:
    """How many rows of a layer to look at: a covariance costs their number times its width twice.

    Of a wide one half will do, but for twice its width.
    """
    width = spec.per_group().weight_parameters // spec.per_group().out_channels
    return rows if width <= _WIDE else min(rows, max(rows // 2, 2 * width))


def _outer(rows: Tensor, columns: Tensor) -> Tensor:
    return rows[:, :, None] * columns[:, None]
