"""The exact planner: the least summed penalty under any number of bounds.

At most one option per layer, and a bound on every cost, is the multiple-choice knapsack problem in
several dimensions (Kellerer, Pferschy, Pisinger: Knapsack Problems, 2004, chapters 9 and 11). It is
solved as a mixed-integer program by HiGHS, the solver of :func:`scipy.optimize.milp`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tdkit.errors import UsageError, option
from tdkit.planners.base import BoundsPlanner, Option, UnreachableError

# HiGHS takes what differs by 1e-6 for equal: it is handed savings as whole numbers up to this, and
# the largest penalty as this.
_SCALE = 10**6

_INFEASIBLE = 2

# An optimum below this share of the largest penalty is looked for again, without what is dearer.
_SHARE = 1e-3


def create() -> BoundsPlanner:
    """The planner, where there is what it solves with.

    Raises:
        UsageError: If scipy is not installed.
    """
    if importlib.util.find_spec("scipy") is None:
        raise UsageError(
            "the planner exact, which also holds several bounds at once, needs the package scipy",
            "pip install 'tdkit[exact]'",
        )
    return exact


def exact(options: Sequence[Option], needed: int, further: Sequence[int] = ()) -> list[Option]:
    """The options of the least summed penalty that hold all bounds; see `BoundsPlanner`.

    The bounds hold in whole numbers, whatever the tolerances of the solver.

    Raises:
        UnreachableError: If no choice holds all bounds.
        UsageError: If the solver fails.
    """
    wanted = (needed, *further)
    if max(wanted) <= 0:
        return []
    problem = _Problem.of(options, len(wanted))
    found = _cheapest(problem, wanted)
    if found is None:
        raise UnreachableError(*(_most(problem, wanted, bound) for bound in range(len(wanted))))
    return found


@dataclass(frozen=True)
class _Problem:
    """Options by layer, n of them.

    Attributes:
        options: In the order of their layers.
        penalties: Shape (n,).
        savings: Of every bound, shape (bounds, n).
        layers: The number of each option's layer, shape (n,).
    """

    options: tuple[Option, ...]
    penalties: NDArray[np.float64]
    savings: NDArray[np.int64]
    layers: NDArray[np.int64]

    @staticmethod
    def of(options: Sequence[Option], bounds: int) -> _Problem:
        """The options that no other of their layer beats, in an order of their own."""
        kept = [each for front in _fronts(options).values() for each in front]
        numbers = {name: number for number, name in enumerate(sorted({o.layer for o in kept}))}
        return _Problem(
            tuple(kept),
            np.array([o.penalty for o in kept], np.float64),
            np.array([o.savings for o in kept], np.int64).reshape(-1, bounds).T,
            np.array([numbers[o.layer] for o in kept], np.int64),
        )

    def keep(self, which: NDArray[np.bool_]) -> _Problem:
        """Some of its options."""
        return replace(
            self,
            options=tuple(o for o, kept in zip(self.options, which, strict=True) if kept),
            penalties=self.penalties[which],
            savings=self.savings[:, which],
            layers=self.layers[which],
        )

    def per_layer(self) -> Any:
        """A row for each layer, of 1 at its options: a sparse array, shape (layers, n)."""
        from scipy.sparse import csr_array

        columns = np.arange(len(self.layers))
        return csr_array((np.ones(len(columns)), (self.layers, columns)))

    def missing(self, taken: NDArray[np.bool_], wanted: Sequence[int | None]) -> int | None:
        """The first bound that a choice does not hold, counted in whole numbers."""
        for bound, least in enumerate(wanted):
            if least is not None and int(self.savings[bound, taken].sum()) < least:
                return bound
        return None

    def more(self, taken: NDArray[np.bool_], bound: int) -> NDArray[np.bool_]:
        """The options that save more than what a choice takes of their layer, or leaves."""
        present = np.zeros(self.layers.max() + 1, np.int64)
        present[self.layers[taken]] = self.savings[bound, taken]
        found: NDArray[np.bool_] = self.savings[bound] > present[self.layers]
        return found


def _cheapest(problem: _Problem, wanted: Sequence[int]) -> list[Option] | None:
    """The choice of least penalty; None if no choice holds the bounds."""
    while (taken := _solve(problem, problem.penalties, wanted)) is not None:
        chosen = [o for o, there in zip(problem.options, taken, strict=True) if there]
        least = problem.penalties[taken].sum()
        if not 0 < least < _SHARE * problem.penalties.max():
            return chosen
        # What is dearer alone than all of this is in no better choice, and made it look like 0.
        problem = problem.keep(problem.penalties <= least)
    return None


def _solve(
    problem: _Problem, objective: NDArray[Any], wanted: Sequence[int | None]
) -> NDArray[np.bool_] | None:
    """Which options to take, shape (n,), so that the objective is least; None if it is infeasible.

    A bound that is None is free. A choice that holds a bound only as the solver sees it, rounded or
    within its tolerance, is cut off with all that save no more in any layer: one has to save more.
    """
    from scipy.optimize import LinearConstraint, milp

    if not problem.options:
        return None
    rows = [LinearConstraint(problem.per_layer(), ub=1)]
    for savings, least in zip(problem.savings, wanted, strict=True):
        if least is not None:
            # Savings rounded up and what is needed down: whatever holds the bound holds this one.
            unit = -(-int(np.abs(savings).max()) // _SCALE) or 1
            whole = -(-savings // unit).astype(np.float64)
            # Of whole numbers it is the same, and what just holds it is held with some room.
            rows.append(LinearConstraint(whole, lb=least // unit - 0.5))
    while True:
        found = milp(
            objective / (np.abs(objective).max() or 1) * _SCALE,
            integrality=np.ones(len(objective)),
            bounds=(0, 1),
            constraints=rows,
            options={"mip_rel_gap": 0},
        )
        if found.x is None:
            if found.status != _INFEASIBLE:
                raise UsageError(f"HiGHS fails: {found.message}", option("planner", "greedy"))
            return None
        taken: NDArray[np.bool_] = found.x > 0.5
        if (bound := problem.missing(taken, wanted)) is None:
            return taken
        rows.append(LinearConstraint(problem.more(taken, bound).astype(np.float64), lb=0.5))


def _most(problem: _Problem, wanted: Sequence[int], bound: int) -> int:
    """The most that can be saved of one cost while the other bounds hold, or else at all."""
    if len(wanted) > 1:
        others = [None if number == bound else least for number, least in enumerate(wanted)]
        taken = _solve(problem, -problem.savings[bound], others)
        if taken is not None:
            return int(problem.savings[bound, taken].sum())
    largest: dict[str, int] = {}
    for each in problem.options:
        largest[each.layer] = max(each.savings[bound], largest.get(each.layer, 0))
    return sum(largest.values())


def _fronts(options: Sequence[Option]) -> dict[str, list[Option]]:
    """Per layer the options that save something and that no other beats in everything."""
    fronts: dict[str, list[Option]] = {}
    for each in sorted(options, key=_key):
        front = fronts.setdefault(each.layer, [])
        if max(each.savings) > 0 and not any(_covers(other, each) for other in front):
            front.append(each)
    return fronts


def _covers(one: Option, other: Option) -> bool:
    """Whether an option of no larger penalty saves at least as much of everything."""
    return all(a >= b for a, b in zip(one.savings, other.savings, strict=True))


def _key(each: Option) -> tuple[str, float, list[int], int]:
    return (each.layer, each.penalty, [-saving for saving in each.savings], each.index)
