"""The TT-matrix of a Linear as a method of tdkit; see :mod:`tdkit_tensorized_linear.method`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tdkit.hookspecs import DecompositionRecord, hookimpl

if TYPE_CHECKING:
    from tdkit.decompositions.base import Decomposition


def _create(**settings: Any) -> Decomposition:
    # Imported here, not above: listing what a plugin provides must not import torch.
    from tdkit_tensorized_linear.method import TensorizedLinear

    return TensorizedLinear(**settings)


@hookimpl
def tdkit_decompositions() -> list[DecompositionRecord]:
    """Provide tensorized-linear, for those who ask: entries are moved about, which takes time."""
    summary = "TT-matrix of a Linear whose features are reshaped into factors"
    return [DecompositionRecord("tensorized-linear", summary, _create, default=0)]
