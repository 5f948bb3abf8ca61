"""The laws of all that is registered; a plugin is tested the moment it is installed."""

from typing import Any

from tdkit.layers.chains import OWN_STAGES
from tdkit.registry import load_registry
from tdkit.testing import (
    CostLaws,
    DecompositionLaws,
    MetricLaws,
    PlannerLaws,
    StageLaws,
    stage_cases,
)

_REGISTRY = load_registry()


def _add(name: str, laws: type, **attributes: Any) -> None:
    title = f"Test{name.title().replace('-', '')}{laws.__name__.removesuffix('Laws')}"
    globals()[title] = type(title, (laws,), attributes)


for _name, _method in _REGISTRY.decompositions.items():
    _add(_name, DecompositionLaws, method=_method.create())
for _name, _metric in _REGISTRY.metrics.items():
    _add(_name, MetricLaws, metric=_metric.create())
for _name, _cost in _REGISTRY.costs.items():
    _add(_name, CostLaws, cost=_cost.create())
for _name, _planner in _REGISTRY.planners.items():
    _add(_name, PlannerLaws, planner=_planner.create())
for _kind in OWN_STAGES:
    _add(_kind, StageLaws, cases=stage_cases(_kind))

del CostLaws, DecompositionLaws, MetricLaws, PlannerLaws, StageLaws
