"""A candidate: a layer, a method and a rank, with what it costs and how far off it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tdkit.costs.base import Change
from tdkit.costs.base import to_json as costs_to_json
from tdkit.decompositions.base import Rank


@dataclass(frozen=True)
class Candidate:
    """One layer, method and rank, with what it costs and how far off it is.

    Attributes:
        layer: The layer's name.
        method: The method's name.
        rank: The method's rank.
        keep: The fraction of the layer's weight parameters that remain.
        costs: By the name of a cost that of the layer and of its factorization; None where it is
            unknown.
        errors: Approximation error by metric.
    """

    layer: str
    method: str
    rank: Rank
    keep: float
    costs: Mapping[str, Change | None]
    errors: Mapping[str, float]


def to_json(candidate: Candidate) -> dict[str, Any]:
    """A candidate as JSON values, of each cost ``{name}_before`` and ``{name}_after``."""
    rank = candidate.rank
    return {
        "layer": candidate.layer,
        "method": candidate.method,
        "rank": list(rank) if isinstance(rank, tuple) else rank,
        "keep": candidate.keep,
        **costs_to_json(candidate.costs),
        "errors": dict(candidate.errors),
    }
