"""Sums of Kronecker products as a method of tdkit; see :mod:`tdkit_kronecker.method`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tdkit.hookspecs import DecompositionRecord, hookimpl

if TYPE_CHECKING:
    from tdkit.decompositions.base import Decomposition


def _create() -> Decomposition:
    # Imported here, not above: listing what a plugin provides must not import torch.
    from tdkit_kronecker.method import Kronecker

    return Kronecker()


@hookimpl
def tdkit_decompositions() -> list[DecompositionRecord]:
    """Provide kronecker, for those who ask: entries are moved about, which takes its time."""
    summary = "a sum of Kronecker products; Conv2d and Linear"
    return [DecompositionRecord("kronecker", summary, _create, default=0)]
