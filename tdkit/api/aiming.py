"""From the names of a budget, its costs, an error and a planner to what they stand for."""

from __future__ import annotations

from collections.abc import Mapping

from tdkit import arguments, defaults
from tdkit.compression.compress import Goal
from tdkit.planners.base import Planner
from tdkit.registry import Registry, lookup


def aim(
    registry: Registry,
    budget: float,
    cost: str,
    bounds: Mapping[str, float] | None,
    metric: str,
    penalty: str | None,
    planner: str | None,
    effort: str,
) -> tuple[Goal, Planner]:
    """What a compression aims at, and the planner that chooses; see :func:`tdkit.compress`.

    Args:
        registry: Everything that can be named.
        budget: The fraction of the whole model's cost that may remain.
        cost: What the budget counts.
        bounds: The fraction of other costs that may remain, by their names.
        metric: The error whose penalties are kept small.
        penalty: By what errors add up over layers.
        planner: The name of the planner; of the one that holds so many bounds if None.
        effort: How hard to fit to data.

    Raises:
        UsageError: If a name is unknown, a bound no fraction, or a package missing.
    """
    shares = arguments.bounds(bounds)
    if planner is None:
        planner = defaults.SEVERAL_PLANNER if shares else defaults.PLANNER
    chooser = lookup(registry.planners, planner, "planner")
    goal = Goal(
        budget,
        lookup(registry.costs, cost, "cost").create(),
        lookup(registry.metrics, metric, "metric").create().adding_up_by(penalty),
        chooser.name,
        effort=effort,
        further=tuple(
            (lookup(registry.costs, name, "cost").create(), share) for name, share in shares.items()
        ),
    )
    return goal, chooser.create()
