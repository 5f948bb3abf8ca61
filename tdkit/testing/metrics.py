"""The laws that every metric obeys."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tdkit.layers.evidence import NEEDS, Curvature, Evidence, Moments
from tdkit.layers.spec import LayerSpec
from tdkit.metrics.base import PENALTIES, Difference, Metric
from tdkit.pytest_plugin import CASES

# How far an approximation is moved, in units of the original's norm.
_STEPS = (1e-3, 0.03, 0.25, 1.0, 2.0)

_SHAPES = ((4, 3), (1, 5), (3, 4, 3, 2), (2, 1, 1))


class MetricLaws:
    """Subclass it in a test module and set ``metric``."""

    metric: Metric

    def test_laws(self, request: pytest.FixtureRequest) -> None:
        """What :func:`check_metric` checks, on drawn tensors and directions."""

        @settings(
            max_examples=request.config.getoption("cases", CASES),
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(
            seed=st.integers(0, 2**31),
            shape=st.sampled_from(_SHAPES),
            scale=st.sampled_from([1.0, 1.0, 1e-23, 1e20, 0.0]),
        )
        def laws(seed: int, shape: tuple[int, ...], scale: float) -> None:
            generator = torch.Generator().manual_seed(seed)
            original, direction = torch.randn(2, *shape, generator=generator).double() * scale
            check_metric(self.metric, original, direction, _evidence(self.metric, shape, seed))

        laws()


def check_metric(
    metric: Metric, original: Tensor, direction: Tensor, evidence: Evidence | None = None
) -> None:
    """Check the laws on one original, while its approximation moves away along a line.

    Every error is finite and at least 0, the same each time, and none is smaller than that of an
    approximation nearer by; the farthest is larger than the nearest unless the original is zero.

    Args:
        metric: The metric.
        original: Of any shape, float64: a weight in torch's layout, or the features of one sample.
        direction: Of the same shape.
        evidence: What the metric needs.
    """
    assert metric.penalty in PENALTIES
    assert metric.target in ("weights", "features")
    assert metric.needs <= NEEDS, "it needs what nobody has"
    length = float(direction.norm()) or 1.0
    unit = direction * (float(original.norm()) / length)
    errors = [_error(metric, original, original + step * unit, evidence) for step in _STEPS]
    for error in errors:
        assert math.isfinite(error), f"an error of {error}"
        assert error >= 0, f"an error of {error}: of a ratio in dB, take the inverse as a number"
        assert metric.check(error) == error
    for near, far in pairwise(errors):
        assert far >= near * (1 - 1e-9), f"farther away it is {far}, and nearer {near}"
    if bool(original.any()) and bool(direction.any()):
        assert errors[-1] > errors[0], "it does not tell a near approximation from a far one"


def _error(
    metric: Metric, original: Tensor, approximation: Tensor, evidence: Evidence | None
) -> float:
    before = original.clone(), approximation.clone()

    def once() -> float:
        gap = float((original - approximation).norm())
        tensors = partial(_both, original, approximation)
        norm, size = float(original.norm()), original.numel()
        return metric.of(Difference(gap, norm, size, evidence or Evidence(), tensors))

    error = once()
    assert once() == error or math.isnan(error), "it gives another error each time"
    unchanged = torch.equal(original, before[0]) and torch.equal(approximation, before[1])
    assert unchanged, "it changed the tensors it was given"
    return error


def _both(original: Tensor, approximation: Tensor) -> tuple[Tensor, Tensor]:
    return original, approximation


def _evidence(metric: Metric, shape: tuple[int, ...], seed: int) -> Evidence:
    generator = torch.Generator().manual_seed(seed)

    def rows(width: int) -> Tensor:
        return torch.randn(3 * width, width, generator=generator).double()

    inputs, channels = rows(math.prod(shape[1:])), rows(shape[1])
    gradients = rows(shape[0])
    kind = "Linear" if len(shape) == 2 else f"Conv{len(shape) - 2}d"
    layer = LayerSpec(kind, shape[1], shape[0], kernel_size=shape[2:])
    curvature = Curvature(layer, (inputs.mT @ inputs)[None], (gradients.mT @ gradients)[None])
    moments = Moments(len(channels), channels.mean(0), channels.mT @ channels / len(channels))
    return Evidence(seed, moments, curvature).asked(metric.needs)
