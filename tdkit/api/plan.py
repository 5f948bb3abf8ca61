"""``tdkit.plan``: what to replace, without a compressed model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tdkit import defaults
from tdkit.api.compress import compress
from tdkit.api.score import Scores
from tdkit.api.subject import Model
from tdkit.compression.plan import Plan
from tdkit.errors import UsageError


def plan(
    model: Model | Scores,
    budget: float = defaults.BUDGET,
    *,
    cost: str = defaults.COST,
    bounds: Mapping[str, float] | None = None,
    metric: str | None = None,
    penalty: str | None = None,
    planner: str | None = None,
    calibration: str = defaults.CALIBRATION,
    effort: str = defaults.EFFORT,
    **more: Any,
) -> Plan:
    """Plan a compression: which layers become what.

    Of a model it is verified like a compression, so that it can be applied as it is. Of scores it
    takes milliseconds, and any number of budgets can be planned from one scoring; it is then made
    of whatever was scored: with ``keeps="compress"`` what :func:`compress` considers, so that the
    plans are those that it makes without data, and with the keeps of the paper less.

    Args:
        model: A module, a file, a registered name, or what :func:`score` returned.
        budget: The fraction of the whole model's cost that may remain, in (0, 1].
        cost: What the budget counts.
        bounds: Fractions of other costs that may remain: ``{"macs": 0.5}``.
        metric: The error whose penalties, summed over layers, are kept small; of a model see
            :func:`compress`, of scores ``relative-weights`` if None.
        penalty: By what errors add up over layers; by the metric's own law if None.
        planner: The name of the planner; ``greedy``, or with ``bounds`` ``exact``, if None.
        calibration: What the layers are to be fitted to; of scores, ``auto`` is noise.
        effort: How hard, where it is data.
        **more: Of a model, whatever else :func:`compress` takes.

    Raises:
        UsageError: If an option is wrong or the budget is out of reach.
        UnsupportedError: If the model cannot be copied, run or compressed.
    """
    how: dict[str, Any] = {"cost": cost, "bounds": bounds, "metric": metric, "penalty": penalty}
    how |= {"planner": planner, "calibration": calibration, "effort": effort}
    if not isinstance(model, Scores):
        return compress(model, budget, dry_run=True, **how, **more).plan
    if more:
        raise UsageError(
            f"{', '.join(more)} belong to the scoring, which is done",
            "say it where the scores are made",
        )
    return model.plan(budget, **how | {"metric": metric or defaults.METRIC})
