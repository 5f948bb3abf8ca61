"""Law 14: a plan applied twice under the same settings and versions gives the same bits."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tdkit.compression.applying import Compressed, apply_plan
from tdkit.compression.compress import Goal, compress_model
from tdkit.compression.plan import Plan
from tdkit.compression.scoring import Grid
from tdkit.layers.traced import TracedModel
from tdkit.metrics.features import RELATIVE as FEATURES
from tdkit.metrics.weights import RELATIVE
from tdkit.planners.greedy import greedy
from tdkit.registry import load_registry, method_versions, resolve_methods
from tdkit.version import __version__

SETTINGS = {"cp": {"start": "uniform", "sweeps": 4}, "tucker": {"sweeps": 3, "tolerance": 1e-3}}
NAMES = ("svd", "cp", "tucker", "tt")


def model() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(8, 12, 3),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 12, 3, padding=1),
            nn.Conv2d(12, 12, 3, padding=1, groups=2),
            nn.BatchNorm2d(12),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(12, 12),
            nn.Linear(12, 3),
        ).eval()


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def compressed(names: tuple[str, ...], how: Any, seed: int = 5, **options: Any) -> Compressed:
    registry = load_registry()
    settings = {name: SETTINGS[name] for name in names if name in SETTINGS}
    methods = resolve_methods(registry, names, settings)
    grid = Grid(
        methods,
        [RELATIVE, FEATURES] if "batches" in options else [RELATIVE],
        (0.1, 0.25, 0.5),
        seed=seed,
        versions=method_versions(registry, names),
    )
    goal = Goal(0.5, calibration=how)
    return compress_model(TracedModel.of(model(), images(2)), grid, goal, greedy, **options)


def applied(plan: Plan, **options: Any) -> Compressed:
    """The plan as somebody else reads it, its methods made anew from what it says."""
    plan = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    names = sorted({move.method for move in plan.moves})
    methods = resolve_methods(load_registry(), names, plan.settings)
    return apply_plan(TracedModel.of(model(), images(2)), plan, methods, **options)


def same(one: Compressed, other: Compressed) -> bool:
    have, want = other.model.state_dict(), one.model.state_dict()
    return list(have) == list(want) and all(torch.equal(have[key], want[key]) for key in want)


@pytest.mark.parametrize("how", ["none", "noise", "data"])
@pytest.mark.parametrize("names", [*((name,) for name in NAMES), NAMES])
def test_law_14(names: tuple[str, ...], how: str) -> None:
    data = {"calibration": [images(16), images(9)]} if how == "data" else {}
    first = compressed(names, how, **data)
    assert len(first.plan.moves) >= 2
    once, twice = (applied(first.plan, **data) for _ in range(2))
    assert same(first, once)
    assert same(once, twice)
    assert once.plan == twice.plan == first.plan
    assert once.errors == twice.errors == first.errors
    assert (once.costs, once.structure) == (first.costs, first.structure)


def test_law_14_for_a_plan_that_features_guided() -> None:
    first = compressed(NAMES, "none", batches=[images(4)])
    assert same(first, applied(first.plan))


def test_settings_and_versions_are_in_the_plan() -> None:
    every = compressed(NAMES, "none").plan
    assert set(every.settings) == {move.method for move in every.moves}
    plan = compressed(("cp",), "none").plan
    assert plan.settings["cp"] == {
        "sweeps": 4,
        "tolerance": 1e-3,
        "ridge": 1e-10,
        "start": "uniform",
    }
    assert plan.versions == {"tdkit": __version__}
    value = json.loads(json.dumps(plan.to_json()))
    assert value["settings"]["cp"]["start"] == "uniform"
    assert Plan.from_json(value).settings == plan.settings
    assert Plan.from_json(value).versions == plan.versions


def test_other_settings_or_another_seed_give_others() -> None:
    """Else the law would say nothing."""
    first = compressed(("cp",), "none")
    methods = resolve_methods(load_registry(), ["cp"], {"cp": {"start": "orthogonal"}})
    traced = TracedModel.of(model(), images(2))
    assert not same(first, apply_plan(traced, first.plan, methods))
    value = {**first.plan.to_json(), "seed": 6}
    assert not same(first, applied(Plan.from_json(value)))
