"""From candidates to what a planner sees, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from tdkit.costs.base import Cost
from tdkit.errors import UsageError
from tdkit.planners.base import Option, Planner, UnreachableError
from tdkit.planners.candidate import Candidate


def choose(
    candidates: Sequence[Candidate],
    planner: Planner,
    *,
    total: int,
    budget: float,
    cost: Cost,
    metric: str,
) -> list[Candidate]:
    """Let a planner choose so that the model's cost falls to the budget.

    Args:
        candidates: The scored grid; those whose error is not a finite number are passed over.
        planner: Sees savings and squared errors only.
        total: The whole model's cost.
        budget: The fraction of it that may remain.
        cost: Which cost.
        metric: Which error, squared, is the penalty.

    Raises:
        UsageError: If the budget is out of reach; the message names the smallest reachable one.
    """
    errors = [c.errors[metric] for c in candidates]
    # Relative to the largest, so that no square over- or underflows.
    largest = max(filter(math.isfinite, errors), default=0.0) or 1.0
    options = [
        Option(c.layer, saving, (error / largest) ** 2, index)
        for index, (c, error) in enumerate(zip(candidates, errors, strict=True))
        if (saving := _saving(c, cost)) > 0 and math.isfinite(error)
    ]
    # In fractions, so that 0.29 of 100 is 29 and the smallest budget named is in reach.
    allowed = math.floor(Fraction(str(float(budget))) * total)
    try:
        chosen = planner(options, total - allowed)
    except UnreachableError as error:
        smallest = math.ceil(Fraction(total - error.most, total) * 10**4) / 10**4
        raise UsageError(
            f"a budget of {budget:g} is out of reach: the smallest reachable is {smallest:g}",
            "score lower keeps, more --methods, or let the first and last layer in with"
            " --include-ends",
        ) from error
    return [candidates[option.index] for option in chosen]


def _saving(candidate: Candidate, cost: Cost) -> int:
    if cost == "params":
        return candidate.params_before - candidate.params_after
    if candidate.macs_before is None or candidate.macs_after is None:
        raise UsageError(
            "MACs are unknown without the shape of the input",
            "give it with --input-shape, such as 3,224,224",
        )
    return candidate.macs_before - candidate.macs_after
