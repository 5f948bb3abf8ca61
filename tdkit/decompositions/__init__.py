"""The built-in decomposition methods, registered through the hook anyone uses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tdkit.hookspecs import DecompositionRecord, hookimpl

if TYPE_CHECKING:
    from tdkit.decompositions.base import Decomposition


def _svd() -> Decomposition:
    from tdkit.decompositions.svd import Svd

    return Svd()


def _cp(**settings: Any) -> Decomposition:
    from tdkit.decompositions.cp import Cp

    return Cp(**settings)


def _tucker(**settings: Any) -> Decomposition:
    from tdkit.decompositions.tucker import Tucker

    return Tucker(**settings)


def _tt() -> Decomposition:
    from tdkit.decompositions.tt import TensorTrain

    return TensorTrain()


@hookimpl
def tdkit_decompositions() -> list[DecompositionRecord]:
    """Provide svd, cp, tucker and tt."""
    return [
        DecompositionRecord("svd", "truncated SVD: k x k to few channels, then 1x1", _svd),
        # At a fixed size its error is the least, but depthwise chains are slow: beyond this keep
        # slower than the dense layer (benchmarks/latency.py), so that one has to ask.
        DecompositionRecord("cp", "CP by ALS: 1x1, depthwise per axis, 1x1", _cp, default=0.25),
        DecompositionRecord(
            "tucker", "channel-mode Tucker by HOSVD: 1x1, k x k core, 1x1", _tucker
        ),
        DecompositionRecord("tt", "tensor train by TT-SVD: 1x1, k x 1, 1 x k, 1x1", _tt),
    ]
