"""The laws of everything that plugins provide, as property tests that they can run on theirs.

In a plugin's tests (with ``pip install tdkit[test]``)::

    from tdkit.testing import DecompositionLaws

    class TestMyMethod(DecompositionLaws):
        method = MyMethod()

Likewise with :class:`MetricLaws`, :class:`PlannerLaws`, :class:`CostLaws` and :class:`StageLaws`.
``pytest --cases 20`` is a quick round: so many cases drawn per law and kind, not 200.
"""

from tdkit.pytest_plugin import CASES
from tdkit.testing.costs import CostLaws, check_cost
from tdkit.testing.decompositions import (
    DecompositionLaws,
    check_laws,
    layer_specs,
    layers,
)
from tdkit.testing.metrics import MetricLaws, check_metric
from tdkit.testing.planners import PlannerLaws, check_planner
from tdkit.testing.stages import StageLaws, check_stage, stage_cases

__all__ = [
    "CASES",
    "CostLaws",
    "DecompositionLaws",
    "MetricLaws",
    "PlannerLaws",
    "StageLaws",
    "check_cost",
    "check_laws",
    "check_metric",
    "check_planner",
    "check_stage",
    "layer_specs",
    "layers",
    "stage_cases",
]
