"""Pairs of a layer's input in one model and its output in another, which are run in step."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from tdkit.errors import UnsupportedError, first_line
from tdkit.forward.inputs import Inputs
from tdkit.forward.trial import trial
from tdkit.layers.inventory import Layer
from tdkit.layers.patches import input_rows, output_rows, positions
from tdkit.layers.spec import LayerSpec

_Call = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Wanted:
    """What a dense layer returned at some positions, by batch and call.

    Attributes:
        spec: The layer.
        calls: For each batch and each call in it the positions (n,) and the rows
            (groups, n, out / groups).
    """

    spec: LayerSpec
    calls: tuple[tuple[_Call, ...], ...]


class Pairs:
    """Sums over pairs of input and output rows of one layer, in float64.

    Products are in the precision of the rows, at least float32.

    Args:
        spec: The layer.
    """

    def __init__(self, spec: LayerSpec) -> None:
        self.spec = spec
        self.count = 0
        self._sums: tuple[Tensor, ...] | None = None

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add pairs.

        Args:
            inputs: (groups, n, d).
            outputs: (groups, n, out / groups).
        """
        x, y = _at_least_float(inputs), _at_least_float(outputs)
        self.count += x.shape[1]
        found = [x.sum(1), y.sum(1), x.mT @ x, y.mT @ x]
        if self._sums is None:
            self._sums = tuple(each.double() for each in found)
        else:
            for total, each in zip(self._sums, found, strict=True):
                total += each

    @cached_property
    def input_mean(self) -> Tensor:
        """(groups, d)."""
        return self._known[0] / self.count

    @cached_property
    def output_mean(self) -> Tensor:
        """(groups, out), out being the channels of a group."""
        return self._known[1] / self.count

    @cached_property
    def covariance(self) -> Tensor:
        """Of the inputs, (groups, d, d)."""
        mean = self.input_mean
        return self._known[2] / self.count - mean[:, :, None] * mean[:, None]

    @cached_property
    def cross(self) -> Tensor:
        """Of outputs with inputs, (groups, out, d)."""
        return self._known[3] / self.count - self.output_mean[:, :, None] * self.input_mean[:, None]

    @property
    def _known(self) -> tuple[Tensor, ...]:
        assert self._sums is not None, "no pair was added"
        return self._sums


def wanted_outputs(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Inputs], rows: int, seed: int
) -> dict[str, Wanted]:
    """What layers return on some inputs, at random positions.

    Args:
        model: The dense model; it is afterwards as before.
        layers: Of it, decomposable ones.
        batches: Arguments of forward passes, tensors of any shape.
        rows: Positions of each layer in all batches together, about.
        seed: Seeds the choice of positions.

    Returns:
        By the name of a layer, in the order in which the first batch reaches them; those that are
        never reached are left out.

    Raises:
        UnsupportedError: If the model does not run on the batches.
    """
    share = {x.name: -(-rows // max(1, len(batches) * len(x.calls or (0,)))) for x in layers}
    specs = {layer.name: layer.spec for layer in layers}
    now: dict[str, list[_Call]] = {}
    found: list[dict[str, list[_Call]]] = []

    def look(name: str, _module: nn.Module, _args: Any, output: Tensor) -> None:
        spec, calls = specs[name], now.setdefault(name, [])
        assert spec is not None
        key = f"{seed}/{name}/{len(found)}/{len(calls)}"
        places = _drawn(positions(spec, output), share[name], key).to(output.device)
        calls.append((places, output_rows(spec, output.detach(), places).clone()))

    handles = [
        model.get_submodule(layer.name).register_forward_hook(partial(look, layer.name))
        for layer in layers
    ]
    with _removed(handles):
        for batch in batches:
            now.clear()
            _run(model, batch)
            found.append(dict(now))
    return {
        name: Wanted(spec, tuple(tuple(calls.get(name, ())) for calls in found))
        for name in dict.fromkeys(name for calls in found for name in calls)
        if (spec := specs[name]) is not None
    }


def given_rows(
    model: nn.Module, name: str, wanted: Wanted, batches: Sequence[Inputs]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """What a layer is given where another model returned what is wanted; nothing is run beyond it.

    Args:
        model: The model; it is afterwards as before.
        name: The layer, or what stands in for it.
        wanted: From the dense model on the same batches.
        batches: Arguments of forward passes, tensors of any shape.

    Yields:
        The number of the batch, the inputs (groups, n, d) and the outputs (groups, n, out/groups).

    Raises:
        UnsupportedError: If the model does not run on the batches.
    """
    rows: list[Tensor] = []

    def look(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        value = args[0] if args else next(iter(kwargs.values()))
        places = wanted.calls[number][len(rows)][0]
        rows.append(input_rows(wanted.spec, value.detach(), places))
        if len(rows) == len(wanted.calls[number]):
            raise _Enough

    handle = model.get_submodule(name).register_forward_pre_hook(look, with_kwargs=True)
    with _removed([handle]):
        for number, batch in enumerate(batches):
            rows.clear()
            if wanted.calls[number]:
                _run(model, batch)
            for inputs, (_, outputs) in zip(rows, wanted.calls[number], strict=True):
                yield number, inputs, outputs


class _Enough(BaseException):
    """All that is wanted was seen. No model catches it as an error of its own."""


def _run(model: nn.Module, batch: Inputs) -> Any:
    try:
        with trial(model):
            return batch.run(model)
    except _Enough:
        return None
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a model may fail in any way
        raise UnsupportedError(
            f"the model does not run on the data: {first_line(error)}"
        ) from error


@contextmanager
def _removed(handles: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _drawn(count: int, most: int, key: str) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    if count <= most:
        return torch.arange(count)
    return torch.randperm(count, generator=generator)[:most].sort().values


def _at_least_float(rows: Tensor) -> Tensor:
    return rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
