"""What is promised of the bundled model, on the real test set where it is there."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.optimize import LinearConstraint, milp
from torch import nn

from tdkit.calibration.batchnorm import Calibration
from tdkit.checkpoint import load_model
from tdkit.compression.compress import Goal, apply_plan, make_plan
from tdkit.compression.scoring import Grid, score
from tdkit.datasets.base import Dataset
from tdkit.errors import UnreadableFileError
from tdkit.forward.inputs import random_inputs
from tdkit.layers.counting import model_parameters
from tdkit.layers.inventory import Layer, find_layers
from tdkit.metrics.weights import RELATIVE
from tdkit.planners.candidate import Candidate
from tdkit.planners.greedy import greedy
from tdkit.registry import load_registry, method_limits, resolve_methods
from tdkit.training.loop import evaluate

REGISTRY = load_registry()
METHODS = resolve_methods(REGISTRY)
Scored = tuple[nn.Module, list[Layer], list[Candidate]]


@pytest.fixture(scope="module")
def scored() -> Scored:
    model = load_model("garipov", models=REGISTRY.models).model
    layers = find_layers(model, inputs=random_inputs(model, (1, 28, 28), 1))
    grid = Grid(METHODS, [RELATIVE], limits=method_limits(REGISTRY))
    return model, layers, score(model, layers, grid)


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
    return evaluate(scored[0], data.test).accuracy


def test_the_bundled_model_is_right_on_93_of_100_test_images(dense_accuracy: float) -> None:
    assert dense_accuracy >= 0.930


# Points of accuracy that may be lost: without any data, and with 512 unlabelled images.
@pytest.mark.parametrize(
    ("budget", "how", "points"),
    [
        (0.5, "noise", 0.2),
        (0.25, "noise", 0.5),
        (0.1, "noise", 4.0),
        (0.5, "data", 0.2),
        (0.25, "data", 0.5),
        (0.1, "data", 3.0),
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
    model, layers, candidates = scored
    assert data.test is not None
    assert data.train is not None
    plan = make_plan(model, layers, candidates, Goal(budget, calibration=how), greedy, seed=0)
    small = apply_plan(
        model,
        plan,
        METHODS,
        layers=layers,
        inputs=random_inputs(model, (1, 28, 28)),
        calibration=[images for images, _ in data.train.batches(64, limit=512)],
    )
    assert small.verified
    assert not small.put_back
    assert model_parameters(small.model) <= budget * model_parameters(model)
    assert 100 * (dense_accuracy - evaluate(small.model, data.test).accuracy) <= points


@pytest.mark.parametrize("budget", [0.9, 0.7, 0.5, 0.35, 0.25, 0.15, 0.1, 0.08])
@pytest.mark.parametrize("cost", ["params", "macs"])
def test_the_objective_is_within_two_percent_of_the_optimum(
    scored: Scored, budget: float, cost: str
) -> None:
    model, layers, candidates = scored
    plan = make_plan(model, layers, candidates, Goal(budget, cost), greedy, seed=0)  # type: ignore[arg-type]
    penalty = sum(c.errors["relative-weights"] ** 2 for c in plan.candidates)
    assert penalty <= 1.02 * optimum(model, layers, candidates, budget, cost)


def optimum(
    model: nn.Module, layers: list[Layer], candidates: list[Candidate], budget: float, cost: str
) -> float:
    before = [getattr(c, f"{cost}_before") for c in candidates]
    after = [getattr(c, f"{cost}_after") for c in candidates]
    total = model_parameters(model) if cost == "params" else sum(x.macs or 0 for x in layers)
    saving = np.array([before], float) - np.array([after], float)
    names = sorted({c.layer for c in candidates})
    one_each = np.array([[c.layer == name for c in candidates] for name in names], float)
    result = milp(
        c=[c.errors["relative-weights"] ** 2 for c in candidates],
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
