"""From candidates to what a planner sees, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from tdkit.costs.base import Cost, unknown_cost
from tdkit.errors import UnlawfulError, UsageError, option
from tdkit.metrics.base import Metric, penalties
from tdkit.planners.base import Option, Planner, UnreachableError
from tdkit.planners.candidate import Candidate


def choose(
    candidates: Sequence[Candidate],
    planner: Planner,
    *,
    total: int,
    budget: float,
    cost: Cost,
    metric: Metric,
    spared: int = 0,
) -> list[Candidate]:
    """Let a planner choose so that the model's cost falls to the budget.

    Args:
        candidates: The scored grid; those whose error is not a finite number are passed over.
        planner: Sees savings and penalties only.
        total: The whole model's cost.
        budget: The fraction of it that may remain.
        cost: Which cost.
        metric: Which error; its law says by what penalty it adds up over layers.
        spared: What falls away whatever is chosen.

    Raises:
        UsageError: If the budget is out of reach, which names the smallest reachable one; if the
            cost is unknown; or if an error is negative.
        UnlawfulError: If what the planner gives is no choice of the options, takes two of one
            layer, or saves too little; the message names the planner.
    """
    added = penalties([c.errors[metric.name] for c in candidates], metric.penalty)
    options = [
        Option(c.layer, saving, penalty, index)
        for index, (c, penalty) in enumerate(zip(candidates, added.tolist(), strict=True))
        if (saving := _saving(c, cost)) > 0 and math.isfinite(penalty)
    ]
    # In fractions, so that 0.29 of 100 is 29 and the smallest budget named is in reach.
    allowed = math.floor(Fraction(str(float(budget))) * total) + spared
    try:
        chosen = planner(options, total - allowed)
    except UnreachableError as error:
        smallest = math.ceil(Fraction(total - spared - error.most, total) * 10**4) / 10**4
        raise UsageError(
            f"a budget of {budget:g} is out of reach: the smallest reachable is {smallest:g}",
            f"score lower {option('keeps')} or more {option('methods')}, or let the first and the"
            f" last layer in with {option('include_ends', True)}",
        ) from error
    _check(planner, chosen, options, total - allowed)
    return [candidates[option.index] for option in chosen]


def _check(
    planner: Planner, chosen: Sequence[Option], options: Sequence[Option], needed: int
) -> None:
    """Hold a choice against what a planner, which may be a plugin's, promises."""
    name = getattr(planner, "__name__", type(planner).__name__)
    known = set(options)
    if not isinstance(chosen, Sequence) or not all(
        isinstance(each, Option) and each in known for each in chosen
    ):
        raise UnlawfulError(f"the planner {name} gives what is no choice of its options")
    layers = [each.layer for each in chosen]
    twice = next((layer for layer in layers if layers.count(layer) > 1), None)
    if twice is not None:
        raise UnlawfulError(f"the planner {name} takes two options of the layer {twice!r}")
    saved = sum(each.saving for each in chosen)
    if saved < needed:
        raise UnlawfulError(
            f"the planner {name} saves {saved:,} of the {needed:,} that the budget asks for"
        )


def _saving(candidate: Candidate, cost: Cost) -> int:
    found = candidate.costs.get(cost.name)
    if found is None:
        raise unknown_cost(cost)
    return found.saving
