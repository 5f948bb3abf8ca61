"""Every hook is documented, and the example in its documentation runs as it stands."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import textwrap
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from tdkit import hookspecs
from tdkit.hookspecs import HOOKS
from tdkit.planners.base import Option, UnreachableError
from tdkit.registry import load_registry
from tdkit.testing import check_cost, check_laws, check_metric, check_planner, check_stage


def specs() -> dict[str, Any]:
    functions = inspect.getmembers(hookspecs, inspect.isfunction)
    return {name: function for name, function in functions if hasattr(function, "tdkit_spec")}


def example(hook: str) -> str:
    doc = inspect.getdoc(specs()[hook])
    assert doc is not None
    first, _, code = doc.partition("Example::\n")
    assert first.strip().endswith(".")
    assert code, f"{hook} has no example"
    return textwrap.dedent(code).strip()


@pytest.fixture
def record(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The one record that an example's plugin provides, once the registry has taken it."""
    hook = request.param
    plugin = ModuleType(f"example_of_{hook}")
    monkeypatch.setitem(sys.modules, plugin.__name__, plugin)
    exec(compile(example(hook), plugin.__name__, "exec"), vars(plugin))
    registry = load_registry([EntryPoint("example", plugin.__name__, "tdkit")])
    provider = registry.providers[1]
    assert provider.failure is None
    assert list(provider.provides) == [hook]
    (name,) = provider.provides[hook]
    return getattr(registry, hook.removeprefix("tdkit_"))[name]


def test_hooks_and_specifications_are_the_same() -> None:
    assert set(specs()) == set(HOOKS)
    for hook, spec in specs().items():
        assert not inspect.signature(spec).parameters
        assert inspect.signature(spec).return_annotation == f"list[{HOOKS[hook].__name__}]"


@pytest.mark.parametrize("hook", HOOKS)
def test_every_field_of_a_record_is_described(hook) -> None:
    doc = inspect.getdoc(HOOKS[hook])
    assert doc is not None
    for field in dataclasses.fields(HOOKS[hook]):
        assert f"\n    {field.name}: " in doc, f"{field.name} is not described"


@pytest.mark.parametrize("hook", HOOKS)
def test_an_example_imports_nothing_heavy_before_it_is_used(hook) -> None:
    top = [line for line in example(hook).splitlines() if line.startswith(("import ", "from "))]
    assert top == [f"from tdkit.hookspecs import {HOOKS[hook].__name__}, hookimpl"]


@pytest.mark.parametrize("kind", ["decomposition", "metric", "cost"])
def test_a_new_kind_takes_the_lines_that_the_guide_says(kind) -> None:
    guide = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    lines = sum(bool(line.strip()) for line in example(f"tdkit_{kind}s").splitlines())
    assert f"**A {kind}, {lines} lines.**" in guide
    assert lines <= 40


@pytest.mark.parametrize("record", ["tdkit_decompositions"], indirect=True)
def test_the_decomposition_obeys_the_laws(record) -> None:
    method = record.create()
    for keep in (0.1, 0.5, 0.9):
        for rule in ("best", "proportional"):
            assert check_laws(method, nn.Linear(7, 5).double(), keep, rule)
    assert not check_laws(method, nn.Conv2d(4, 4, 3).double(), 0.5, "best")


@pytest.mark.parametrize("record", ["tdkit_metrics"], indirect=True)
def test_the_metric_computes(record) -> None:
    metric = record.create()
    assert (metric.name, metric.target) == (record.name, "weights")
    assert metric.value(3.0, 5.0, 10) == 9.0
    original = torch.arange(12.0).double().reshape(4, 3)
    check_metric(metric, original, torch.ones(4, 3).double())


@pytest.mark.parametrize("record", ["tdkit_costs"], indirect=True)
def test_the_cost_counts(record) -> None:
    cost = record.create()
    assert cost.name == record.name
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
    check_cost(cost, model, torch.zeros(1, 6))
    assert cost.total(model, []) == 4 * (6 * 8 + 8 + 8 * 6 + 6)


@pytest.mark.parametrize("record", ["tdkit_models"], indirect=True)
def test_the_model_runs(record) -> None:
    assert record.create()(torch.zeros(2, *record.input_shape)).shape == (2, record.num_classes)
    other = record.create(in_channels=3, num_classes=4)
    assert other(torch.zeros(2, 3, *record.input_shape[1:])).shape == (2, 4)


@pytest.mark.parametrize("record", ["tdkit_datasets"], indirect=True)
def test_the_data_set_yields_batches(record) -> None:
    data = record.create(root=None, path=None, image_size=(8, 6), seed=0)
    assert data.name == record.name
    assert data.input_shape == (1, 8, 6)
    assert len(data.test) == 100
    images, labels = next(iter(data.train.batches(16)))
    assert images.shape == (16, 1, 8, 6)
    assert set(labels.tolist()) == {0, 1}


@pytest.mark.parametrize("record", ["tdkit_planners"], indirect=True)
def test_the_planner_plans(record) -> None:
    planner = record.create()
    options = [
        Option("a", 10, 0.3, 0),
        Option("a", 20, 0.9, 1),
        Option("b", 15, 0.2, 2),
        Option("b", 5, 0.1, 3),
    ]
    for needed in (0, 12, 16, 30, 35):
        check_planner(planner, options, needed)
    assert planner(options, 12) == [options[2]]
    assert planner(options, 16) == [options[2], options[1]]
    assert planner(options[::-1], 16) == [options[2], options[1]]
    assert planner(options, 0) == []
    with pytest.raises(UnreachableError, match="out of reach") as caught:
        planner(options, 36)
    assert caught.value.most == 35


@pytest.mark.parametrize("record", ["tdkit_stages"], indirect=True)
def test_the_stage_obeys_the_laws(record) -> None:
    kind = record.create()
    check_stage(kind(2), (3, 8, 4, 5))
    assert kind(-1).check() is not None
