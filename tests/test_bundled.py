"""What is promised of the bundled model, on the real test set where it is there."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.optimize import LinearConstraint, milp
from torch import nn

from tdkit.calibration.batchnorm import Calibration
from tdkit.checkpoint import load_model
from tdkit.compression.applying import apply_plan
from tdkit.compression.compress import Goal, make_plan
from tdkit.compression.plan import Plan
from tdkit.compression.scoring import Grid, score
from tdkit.costs.base import Cost, total_cost
from tdkit.costs.macs import MACS
from tdkit.costs.params import PARAMS
from tdkit.datasets.base import Dataset
from tdkit.errors import UnreadableFileError
from tdkit.forward.inputs import random_inputs
from tdkit.layers.counting import model_parameters
from tdkit.layers.traced import TracedModel
from tdkit.metrics.base import penalties
from tdkit.metrics.weights import RELATIVE
from tdkit.planners.candidate import Candidate
from tdkit.planners.greedy import greedy
from tdkit.registry import load_registry, method_limits, resolve_methods
from tdkit.training.loop import evaluate

REGISTRY = load_registry()
METHODS = resolve_methods(REGISTRY)


GRID = Grid(METHODS, [RELATIVE], limits=method_limits(REGISTRY))


@dataclass(frozen=True)
class Scored:
    """The bundled model, looked at and scored."""

    traced: TracedModel
    candidates: list[Candidate]

    @property
    def model(self) -> nn.Module:
        return self.traced.model

    def plan(self, goal: Goal) -> Plan:
        totals = {goal.cost.name: total_cost(self.model, self.traced.layers, goal.cost)}
        return make_plan(totals, self.candidates, goal, greedy, GRID)


def traced() -> TracedModel:
    model = load_model("garipov", models=REGISTRY.models).model
    return TracedModel.of(model, random_inputs(model, (1, 28, 28)))


@pytest.fixture(scope="module")
def scored() -> Scored:
    found = traced()
    return Scored(found, score(found, GRID))


@pytest.fixture(scope="module")
def data() -> Dataset:
    try:
        dataset = REGISTRY.datasets["fashion-mnist"].create()
    except UnreadableFileError as error:
        pytest.skip(f"the full Fashion-MNIST is not here: {error}")
    return dataset


@pytest.fixture(scope="module")
def all_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def dense_accuracy(scored: Scored, data: Dataset, all_threads: None) -> float:
    assert data.test is not None
    return evaluate(scored.model, data.test).accuracy


def test_the_bundled_model_is_right_on_93_of_100_test_images(dense_accuracy: float) -> None:
    assert dense_accuracy >= 0.930


# Points of accuracy that may be lost: without any data, and with 512 unlabelled images.
@pytest.mark.parametrize(
    ("budget", "how", "points"),
    [
        pytest.param(0.5, "noise", 0.2, marks=pytest.mark.slow),
        pytest.param(0.25, "noise", 0.5, marks=pytest.mark.slow),
        (0.1, "noise", 4.0),
        pytest.param(0.5, "data", 0.2, marks=pytest.mark.slow),
        pytest.param(0.25, "data", 0.5, marks=pytest.mark.slow),
        pytest.param(0.1, "data", 1.8, marks=pytest.mark.slow),
        pytest.param(0.05, "data", 4.5, marks=pytest.mark.slow),
    ],
)
def test_accuracy(
    scored: Scored,
    data: Dataset,
    dense_accuracy: float,
    budget: float,
    how: Calibration,
    points: float,
) -> None:
    assert data.test is not None
    assert data.train is not None
    small = apply_plan(
        traced(),
        scored.plan(Goal(budget, calibration=how)),
        METHODS,
        calibration=[images for images, _ in data.train.batches(64, limit=512)],
    )
    assert small.verified
    assert not small.put_back
    assert model_parameters(small.model) <= budget * model_parameters(scored.model)
    assert 100 * (dense_accuracy - evaluate(small.model, data.test).accuracy) <= points


@pytest.mark.parametrize("budget", [0.9, 0.7, 0.5, 0.35, 0.25, 0.15, 0.1, 0.08])
@pytest.mark.parametrize("cost", [PARAMS, MACS], ids=lambda cost: cost.name)
def test_the_objective_is_within_two_percent_of_the_optimum(
    scored: Scored, budget: float, cost: Cost
) -> None:
    plan = scored.plan(Goal(budget, cost))
    penalty = penalties(errors_of(plan.candidates), "logarithm").sum()
    assert penalty <= 1.02 * optimum(scored, budget, cost.name)


def errors_of(candidates: Sequence[Candidate]) -> list[float]:
    return [c.errors["relative-weights"] for c in candidates]


def optimum(scored: Scored, budget: float, cost: str) -> float:
    candidates, layers = scored.candidates, scored.traced.layers
    total = model_parameters(scored.model) if cost == "params" else sum(x.macs or 0 for x in layers)
    saving = np.array([[c.costs[cost].saving for c in candidates]], float)
    names = sorted({c.layer for c in candidates})
    one_each = np.array([[c.layer == name for c in candidates] for name in names], float)
    result = milp(
        c=penalties(errors_of(candidates), "logarithm"),
        integrality=np.ones(len(candidates)),
        bounds=(0, 1),
        constraints=[
            LinearConstraint(one_each, ub=1),
            LinearConstraint(saving, lb=total - int(budget * total)),
        ],
        options={"mip_rel_gap": 1e-6},
    )
    assert result.status == 0
    return float(result.fun)
