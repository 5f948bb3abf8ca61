"""Decompositions that scoring made, kept for the plan that may choose them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from tdkit.decompositions.base import Prepared

# Of the model that is compressed: what decompositions may hold of memory until they are used.
_SHARE = 8


class Kept:
    """The first decompositions that fit into some memory, by layer and method.

    A layer among few is then decomposed once. Of a model whose layers are all scored by several
    methods most do not fit, and those that are chosen are decomposed again.

    Args:
        room: Bytes that they may take together.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._found: dict[tuple[str, str], Prepared] = {}

    @classmethod
    def beside(cls, model: nn.Module) -> Kept:
        """Room for an eighth of a model."""
        return cls(sum(p.numel() * p.element_size() for p in model.parameters()) // _SHARE)

    def add(self, layer: str, method: str, prepared: Prepared) -> None:
        """Keep one, if there is room."""
        size = _bytes(prepared)
        if size <= self._room:
            self._room -= size
            self._found[layer, method] = prepared

    def take(self, layer: str, method: str) -> Prepared | None:
        """One that is kept, which is then forgotten; None where there is none."""
        return self._found.pop((layer, method), None)


def _bytes(value: object) -> int:
    """Of all tensors that an object holds."""
    storages = {each.untyped_storage() for each in _tensors(value, set())}
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values())


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(value) in seen or isinstance(value, type | nn.Module):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
        return
    held: Any = ()
    if isinstance(value, Mapping):
        held = value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        held = value
    elif hasattr(value, "__dict__"):
        held = vars(value).values()
    for each in list(held):
        yield from _tensors(each, seen)
