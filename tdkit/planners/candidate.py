"""A candidate: a layer, a method and a rank, with what it costs and how far off it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tdkit.decompositions.base import (
    Rank,
)


@dataclass(frozen=True)
class Candidate:
    """One layer, method and rank, with what it costs and how far off it is.

    Attributes:
        layer: The layer's name.
        method: The method's name.
        rank: The method's rank.
        keep: The fraction of the layer's weight parameters that remain.
        params_before: The layer's parameters, bias included.
        params_after: Those of its factorization.
        macs_before: The layer's multiply-accumulates per sample; None when unknown.
        macs_after: Those of its factorization.
        errors: Approximation error by metric.
    """

    layer: str
    method: str
    rank: Rank
    keep: float
    params_before: int
    params_after: int
    macs_before: int | None
    macs_after: int | None
    errors: Mapping[str, float]


def to_json(candidate: Candidate) -> dict[str, Any]:
    """A candidate as JSON values."""
    fields = vars(candidate) | {"errors": dict(candidate.errors)}
    return fields | {"rank": list(r) if isinstance(r := candidate.rank, tuple) else r}
