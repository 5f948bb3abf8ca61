"""Nested arguments and outputs of a call, and whether they were changed in place since."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tdkit.forward.inputs import copies

_PLAIN = (
    type(None), bool, int, float, complex, str, bytes, slice,
    torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip


class Values:
    """The leaves of nested arguments or outputs, and the versions of the tensors among them.

    Args:
        tree: What a module was given or returned; its tensors may have any shape.
    """

    def __init__(self, tree: Any) -> None:
        self.leaves, self.structure = pytree.tree_flatten(tree)
        # Only of these is it known whether they change.
        self.known = all(_is_plain(leaf) for leaf in self.leaves)
        self.versions = [t._version for t in self.tensors] if self.known else []

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the leaves, of any shape."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    @property
    def intact(self) -> bool:
        """Whether no tensor was changed in place since."""
        return self.known and [t._version for t in self.tensors] == self.versions

    @property
    def storages(self) -> list[int]:
        """Where the tensors are; views of one another are in the same place."""
        return [tensor.untyped_storage().data_ptr() for tensor in self.tensors]

    def same(self, tree: Any) -> bool:
        """Whether a tree has the same objects in the same places."""
        leaves, structure = pytree.tree_flatten(tree)
        return structure == self.structure and all(
            one is other for one, other in zip(leaves, self.leaves, strict=True)
        )

    def copy(self) -> Values:
        """The same with copies of the tensors."""
        return Values(self.tree(copied=True))

    def tree(self, copied: bool = False) -> Any:
        """The nested value, in containers of its own."""
        leaves = copies(self.leaves) if copied else self.leaves
        return pytree.tree_unflatten(leaves, self.structure)


def returned_anew(given: Values, inputs: Any, output: Any) -> Values | None:
    """What may be returned in place of a call; None if it does more than return something new.

    Args:
        given: Its inputs, as they were before; tensors of any shape.
        inputs: The same containers afterwards.
        output: What it returned.
    """
    if not (given.intact and given.same(inputs)):
        return None
    returned = Values(output)
    return returned if returned.known and returned.tensors else None


def changed_in_place(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
) -> Values | None:
    """What a call returned if that is its only input, which it may have changed in place."""
    if len(args) != 1 or kwargs or output is not args[0]:
        return None
    changed = Values(output)
    return changed if changed.known and changed.tensors else None


def _is_plain(leaf: Any) -> bool:
    """Whether all that can change about a value is a tensor's content, and that is counted."""
    if isinstance(leaf, Tensor):
        ordinary = type(leaf) in (Tensor, nn.Parameter) and leaf.layout == torch.strided
        return ordinary and not leaf.is_nested and not leaf.is_inference()
    return isinstance(leaf, _PLAIN)
