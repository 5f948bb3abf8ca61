"""The laws of everything that plugins provide, as property tests that they can run on theirs.

In a plugin's tests (with ``pip install tdkit[test]``)::

    from tdkit.testing import DecompositionLaws

    class TestMyMethod(DecompositionLaws):
        method = MyMethod()

``pytest --cases 20`` is a quick round: so many layers drawn per method and kind, not 200.
"""

from tdkit.pytest_plugin import CASES
from tdkit.testing.decompositions import (
    DecompositionLaws,
    check_laws,
    layer_specs,
    layers,
)
from tdkit.testing.stages import StageLaws, check_stage, stage_cases

__all__ = [
    "CASES",
    "DecompositionLaws",
    "StageLaws",
    "check_laws",
    "check_stage",
    "layer_specs",
    "layers",
    "stage_cases",
]
