"""``tdkit.plan``: what to replace, without a compressed model."""

from __future__ import annotations

from typing import Any

from tdkit import defaults
from tdkit.api.compress import compress
from tdkit.api.score import Scores
from tdkit.api.subject import Model, settled
from tdkit.compression.compress import Goal, make_plan
from tdkit.compression.plan import Plan
from tdkit.errors import UsageError
from tdkit.registry import load_registry, lookup


def plan(
    model: Model | Scores,
    budget: float = defaults.BUDGET,
    *,
    cost: str = defaults.COST,
    metric: str = defaults.METRIC,
    penalty: str | None = None,
    planner: str = defaults.PLANNER,
    calibration: str = defaults.CALIBRATION,
    effort: str = defaults.EFFORT,
    **more: Any,
) -> Plan:
    """Plan a compression: which layers become what.

    Of a model it is verified like a compression, so that it can be applied as it is. Of scores it
    takes milliseconds, and any number of budgets can be planned from one scoring; it is then made
    of whatever was scored, where :func:`compress` by default takes some methods at small keeps
    only and others not at all.

    Args:
        model: A module, a file, a registered name, or what :func:`score` returned.
        budget: The fraction of the whole model's cost that may remain, in (0, 1].
        cost: What the budget counts.
        metric: The error whose penalties, summed over layers, are kept small.
        penalty: By what errors add up over layers; by the metric's own law if None.
        planner: The name of the planner.
        calibration: What the layers are to be fitted to; of scores, ``auto`` is noise.
        effort: How hard, where it is data.
        **more: Of a model, whatever else :func:`compress` takes.

    Raises:
        UsageError: If an option is wrong or the budget is out of reach.
        UnsupportedError: If the model cannot be copied, run or compressed.
    """
    if not isinstance(model, Scores):
        more |= {"metric": metric, "penalty": penalty, "planner": planner}
        more |= {"calibration": calibration, "effort": effort}
        return compress(model, budget, cost=cost, dry_run=True, **more).plan
    if more:
        raise UsageError(
            f"{', '.join(more)} belong to the scoring, which is done",
            "say it where the scores are made",
        )
    registry = load_registry()
    chooser = lookup(registry.planners, planner, "planner")
    goal = Goal(
        budget,
        lookup(registry.costs, cost, "cost").create(),
        lookup(registry.metrics, metric, "metric").create().adding_up_by(penalty),
        chooser.name,
        settled(calibration, defaults.NO_DATA_CALIBRATION),
        effort,
    )
    total = model.totals.get(goal.cost.name)
    if total is None or not all(goal.metric.name in c.errors for c in model.candidates):
        there = f"they have {', '.join(model.totals)} and {', '.join(model.metrics)}"
        raise UsageError(f"the scores have no {goal.cost.name} or no {goal.metric.name}", there)
    return make_plan(total, model.candidates, goal, chooser.create(), model.grid)
