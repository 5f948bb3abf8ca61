"""From candidates to what a planner sees, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast

from tdkit.costs.base import Cost, unknown_cost
from tdkit.errors import UnlawfulError, UsageError, option
from tdkit.metrics.base import Metric, penalties
from tdkit.planners.base import Option, Planner, UnreachableError, holds_several
from tdkit.planners.candidate import Candidate


@dataclass(frozen=True)
class Bound:
    """What may remain of a model's cost.

    Attributes:
        cost: Which cost.
        share: The fraction of it that may remain.
        total: The whole model's cost.
        spared: What falls away of it whatever is chosen.
    """

    cost: Cost
    share: float
    total: int
    spared: int = 0

    @property
    def needed(self) -> int:
        """How much is to be saved."""
        # In fractions, so that 0.29 of 100 is 29 and the smallest budget named is in reach.
        allowed = math.floor(Fraction(str(float(self.share))) * self.total)
        return self.total - allowed - self.spared

    def smallest(self, most: int) -> float:
        """The fraction that remains where so much is saved, rounded up."""
        if self.total == 0:
            return 0.0
        return math.ceil(Fraction(self.total - self.spared - most, self.total) * 10**4) / 10**4


class OutOfReachError(UsageError):
    """No choice of the candidates holds the bounds; the message names what is in reach."""


def choose(
    candidates: Sequence[Candidate], planner: Planner, bounds: Sequence[Bound], metric: Metric
) -> list[Candidate]:
    """Let a planner choose so that the model's costs fall to the bounds.

    Args:
        candidates: The scored grid; those whose error is not a finite number are passed over, and
            those that save nothing of any of the costs.
        planner: Sees savings and penalties only.
        bounds: The budget, then further bounds, for a planner that holds several.
        metric: Which error; its law says by what penalty it adds up over layers.

    Raises:
        OutOfReachError: If the bounds are out of reach, which names the smallest reachable ones.
        UsageError: If a cost is unknown, an error negative, or the planner holds one bound only.
        UnlawfulError: If what the planner gives is no choice of the options, takes two of one
            layer, or saves too little; the message names the planner.
    """
    if len(bounds) > 1 and not holds_several(planner):
        raise UsageError(
            f"the planner {_name(planner)} holds no bound but the budget",
            f"leave it out, or take {option('planner', 'exact')}",
        )
    added = penalties([c.errors[metric.name] for c in candidates], metric.penalty)
    options = []
    for index, (candidate, penalty) in enumerate(zip(candidates, added.tolist(), strict=True)):
        saving, *further = (_saving(candidate, bound.cost) for bound in bounds)
        if max(saving, *further, 0) > 0 and math.isfinite(penalty):
            options.append(Option(candidate.layer, saving, penalty, index, tuple(further)))
    needed, *more = (bound.needed for bound in bounds)
    try:
        several: tuple[Any, ...] = (more,) if more else ()
        chosen = cast(Any, planner)(options, needed, *several)
    except UnreachableError as error:
        raise _out_of_reach(bounds, error.each) from error
    _check(planner, chosen, options, bounds)
    return [candidates[option.index] for option in chosen]


def _out_of_reach(bounds: Sequence[Bound], most: Sequence[int]) -> OutOfReachError:
    hint = (
        f"score lower {option('keeps')} or more {option('methods')}, or let the first and the"
        f" last layer in with {option('include_ends', True)}"
    )
    if len(bounds) == 1:
        asked, least = f"{bounds[0].share:g}", f"{bounds[0].smallest(most[0]):g}"
        return OutOfReachError(
            f"a budget of {asked} is out of reach: the smallest reachable is {least}", hint
        )
    asked = " and ".join(f"{each.cost.name} at {each.share:g}" for each in bounds)
    pairs = zip(bounds, most, strict=False)
    least = ", ".join(f"{each.cost.name} {each.smallest(saved):g}" for each, saved in pairs)
    return OutOfReachError(
        f"{asked} are out of reach together: the smallest reachable, each with the others held"
        f" where that can be, are {least}",
        hint,
    )


def _check(
    planner: Planner, chosen: Sequence[Option], options: Sequence[Option], bounds: Sequence[Bound]
) -> None:
    """Hold a choice against what a planner, which may be a plugin's, promises."""
    name = _name(planner)
    known = set(options)
    if not isinstance(chosen, Sequence) or not all(
        isinstance(each, Option) and each in known for each in chosen
    ):
        raise UnlawfulError(f"the planner {name} gives what is no choice of its options")
    layers = [each.layer for each in chosen]
    twice = next((layer for layer in layers if layers.count(layer) > 1), None)
    if twice is not None:
        raise UnlawfulError(f"the planner {name} takes two options of the layer {twice!r}")
    for number, bound in enumerate(bounds):
        saved, what = sum(each.savings[number] for each in chosen), "budget"
        if saved < bound.needed:
            what = f"bound on {bound.cost.name}" if number else "budget"
            raise UnlawfulError(
                f"the planner {name} saves {saved:,} of the {bound.needed:,} that the {what} asks"
                " for"
            )


def _name(planner: Planner) -> str:
    return str(getattr(planner, "__name__", type(planner).__name__))


def _saving(candidate: Candidate, cost: Cost) -> int:
    found = candidate.costs.get(cost.name)
    if found is None:
        raise unknown_cost(cost)
    return found.saving
