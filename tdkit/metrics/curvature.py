"""Errors of features and of the model's output in closed form: no candidate is run for them."""

from __future__ import annotations

from tdkit.errors import UsageError, option
from tdkit.layers.evidence import COVARIANCE, GRADIENTS, Curvature
from tdkit.metrics.base import Difference, Metric


def _relative_output(difference: Difference) -> float:
    curvature = _known(difference)
    original, _ = difference.both
    size = curvature.of_output(original)
    return curvature.of_output(difference.tensor) / size if size > 0 else 0.0


def _model_output(difference: Difference) -> float:
    return _known(difference).of_model(difference.tensor)


def _known(difference: Difference) -> Curvature:
    found = difference.evidence.curvature
    if found is None:
        raise UsageError(
            "this error needs inputs of the model to look at", f"name some with {option('data')}"
        )
    return found


WHITENED = Metric(
    "whitened-features", "weights", compare=_relative_output, needs=frozenset({COVARIANCE})
)
"""What is missed of a layer's output, relative to that, both less their means where the layer has
a bias: the relative feature error over all samples at once."""

GAUSS_NEWTON = Metric(
    "output-gauss-newton",
    "weights",
    compare=_model_output,
    needs=frozenset({COVARIANCE, GRADIENTS}),
)
"""What the model's output is changed by, in the Gauss-Newton approximation; absolute, so that
layers count by what they matter. See :class:`tdkit.layers.evidence.Curvature`."""
