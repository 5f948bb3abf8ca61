"""The built-in planners, registered through the hook anyone uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tdkit.hookspecs import PlannerRecord, hookimpl

if TYPE_CHECKING:
    from tdkit.planners.base import Planner


def _greedy() -> Planner:
    from tdkit.planners.greedy import greedy

    return greedy


@hookimpl
def tdkit_planners() -> list[PlannerRecord]:
    """Provide greedy."""
    summary = "least increase of the summed squared errors per unit of cost saved, then exchanges"
    return [PlannerRecord("greedy", summary, _greedy)]
