"""The weight errors of Table 1 of the paper, worked out by hand."""

import math

import pytest
import torch

from tdkit.metrics.weights import ABSOLUTE, RELATIVE, SCALED
from tdkit.registry import load_registry

RECORDS = load_registry().metrics


def test_by_hand() -> None:
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    other = torch.tensor([[0.0, 4.0], [0.0, 4.0]])
    error, norm, size = float((weight - other).norm()), float(weight.norm()), weight.numel()
    assert ABSOLUTE.value(error, norm, size) == 5
    assert RELATIVE.value(error, norm, size) == 1
    assert SCALED.value(error, norm, size) == 5 / 4


def test_zero_over_zero_is_zero() -> None:
    assert RELATIVE.value(0.0, 0.0, 4) == 0


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_only_the_relative_error_ignores_the_scale(scale: float) -> None:
    assert math.isclose(RELATIVE.value(2 * scale, 4 * scale, 8), 0.5)
    assert math.isclose(ABSOLUTE.value(2 * scale, 4 * scale, 8), 2 * scale)
    assert math.isclose(SCALED.value(2 * scale, 4 * scale, 8), scale / 4)


@pytest.mark.parametrize("target", ["weights", "features"])
@pytest.mark.parametrize("normalisation", ["relative", "absolute", "scaled"])
def test_the_six_metrics_are_registered_under_their_names(target: str, normalisation: str) -> None:
    record = RECORDS[f"{normalisation}-{target}"]
    metric = record.create()
    assert (metric.name, metric.target) == (record.name, target)
    expected = {"relative": 6 / 3, "absolute": 6, "scaled": 6 / 4}[normalisation]
    assert metric.value(6.0, 3.0, 4) == expected
    assert ("data" in record.summary) == (target == "features")
