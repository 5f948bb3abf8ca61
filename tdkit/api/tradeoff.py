"""What is to be had at every budget: the record that ``Scores.trade_off`` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tdkit.compression.plan import Plan
from tdkit.metrics.base import penalties
from tdkit.tables import Table, number


@dataclass(frozen=True)
class Point:
    """One budget, and what is to be had at it.

    Attributes:
        budget: The fraction of the whole model's cost that may remain.
        plan: What to replace; None where the budget is out of reach.
        costs: What the whole model then costs, by the name of each cost that is known.
        penalty: The sum that the planner keeps small.
        failure: Why there is no plan.
    """

    budget: float
    plan: Plan | None
    costs: Mapping[str, int]
    penalty: float | None
    failure: str | None = None

    @staticmethod
    def of(plan: Plan, totals: Mapping[str, int]) -> Point:
        """A plan made of scores, against what the whole model costs."""
        assert plan.budget is not None
        costs = {}
        for name, total in totals.items():
            changes = [candidate.costs.get(name) for candidate in plan.candidates]
            known = [change.saving for change in changes if change is not None]
            if len(known) == len(changes):
                costs[name] = total - sum(known)
        errors = [candidate.errors[plan.metric or ""] for candidate in plan.candidates]
        penalty = sum(penalties(errors, plan.penalty or "").tolist())
        return Point(plan.budget, plan, costs, penalty)

    def to_json(self) -> dict[str, Any]:
        """The point as JSON values; its plan as moves."""
        return {
            "budget": self.budget,
            "costs": dict(self.costs),
            "penalty": self.penalty,
            "failure": self.failure,
            "moves": None if self.plan is None else self.plan.to_json()["moves"],
        }


@dataclass(frozen=True)
class TradeOff:
    """What is to be had at every budget.

    Attributes:
        points: One for each budget, in the order that was asked for.
        model: What was scored.
    """

    points: tuple[Point, ...]
    model: str

    def __str__(self) -> str:
        """The table."""
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def table(self) -> Table:
        """A row for each budget: what the model costs, and the summed penalty."""
        names = list(dict.fromkeys(name for point in self.points for name in point.costs))
        heads = ["parameters" if name == "params" else name for name in names]
        columns = ("budget", *heads, "penalty", "moves")
        rows = tuple(self._row(point, names) for point in self.points)
        return Table(columns, rows, frozenset(columns))

    def _row(self, point: Point, names: list[str]) -> tuple[str, ...]:
        if point.plan is None:
            return (f"{point.budget:g}", *("–" for _ in names), "–", "out of reach")
        costs = (number(point.costs.get(name)) for name in names)
        moves = str(len(point.plan.moves))
        return (f"{point.budget:g}", *costs, f"{point.penalty:.4g}", moves)

    def to_json(self) -> dict[str, Any]:
        """The points as JSON values."""
        points = [point.to_json() for point in self.points]
        return {"tdkit_trade_off": 1, "model": self.model, "points": points}
