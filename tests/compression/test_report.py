"""What is told of a compression, beyond what the commands' tests see."""

import json

import pytest

from tdkit.compression.report import Report, near_chance
from tdkit.costs.base import Change


def report(accuracy: float, images: int) -> Report:
    return Report({"params": Change(1, 1)}, (1, 1), accuracy=(accuracy, 0.0), images=images)


@pytest.mark.parametrize(
    ("accuracy", "images", "classes", "doubted"),
    [
        (0.104, 10_000, 10, True),
        (0.16, 10_000, 10, False),
        (0.9378, 10_000, 10, False),
        (0.02, 50_000, 1000, True),
        (0.69, 50_000, 1000, False),
        (0.53, 10_000, 2, True),
        (0.6, 10_000, 2, False),
        # Two of twenty images are no evidence for one class in ten; half of them are.
        (0.2, 20, 10, True),
        (0.5, 20, 10, False),
        (0.75, 4, 2, True),
        (1.0, 4, 2, False),
        (1.0, 9, 1, False),
    ],
)
def test_an_accuracy_near_chance_is_doubted(
    accuracy: float, images: int, classes: int, doubted: bool
) -> None:
    doubt = near_chance(report(accuracy, images), classes)
    assert (doubt is not None) is doubted
    assert not doubted or f"{accuracy:.2%} of {images:,} images" in str(doubt)


def test_costs_of_plugins_are_apart_from_other_totals() -> None:
    costs = {
        "params": Change(9, 3),
        "macs": None,
        "bytes": Change(8, 4),
        "accuracy": Change(2, 1),
        "mine": None,
    }
    value = json.loads(json.dumps(Report(costs, (36, 12), accuracy=(0.9, 0.8)).to_json()))
    assert (value["bytes_before"], value["bytes_after"]) == (36, 12)
    assert (value["accuracy_before"], value["accuracy_after"]) == (0.9, 0.8)
    assert (value["params_before"], value["params_after"]) == (9, 3)
    assert (value["macs_before"], value["macs_after"]) == (None, None)
    assert value["costs"] == {
        "bytes": {"before": 8, "after": 4},
        "accuracy": {"before": 2, "after": 1},
        "mine": None,
    }
