"""A cost that a plugin provides, with no line of its own in tdkit."""

import json
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tdkit.compression.applying import Compressed, apply_plan
from tdkit.compression.compress import Goal, compress_model
from tdkit.compression.plan import Plan
from tdkit.compression.scoring import Grid, score
from tdkit.costs.base import Change, Cost, total_cost
from tdkit.costs.macs import MACS
from tdkit.costs.params import PARAMS
from tdkit.decompositions.svd import Svd
from tdkit.errors import UnlawfulError, UsageError
from tdkit.layers.inventory import Layer
from tdkit.layers.stages import Stage
from tdkit.layers.traced import TracedModel
from tdkit.metrics.weights import RELATIVE
from tdkit.planners.greedy import greedy
from tdkit.registry import load_registry
from tdkit.testing import check_cost

SOURCE = """
from tdkit.hookspecs import CostRecord, hookimpl

def create():
    from tdkit.costs.base import Cost

    class Bytes(Cost):
        name = "bytes"
        unit = "bytes"

        def of(self, stages, layer):
            return layer.bytes_per_parameter * sum(stage.parameters for stage in stages)

        def total(self, model, layers):
            return sum(p.numel() * p.element_size() for p in model.parameters())

    return Bytes()

@hookimpl
def tdkit_costs():
    return [CostRecord("bytes", "bytes of all parameters", create)]
"""


@pytest.fixture
def bytes_cost(monkeypatch: pytest.MonkeyPatch) -> Cost:
    plugin = ModuleType("bytes_plugin")
    monkeypatch.setitem(sys.modules, plugin.__name__, plugin)
    exec(compile(SOURCE, plugin.__name__, "exec"), vars(plugin))
    registry = load_registry([EntryPoint("bytes", plugin.__name__, "tdkit")])
    assert registry.providers[1].failure is None
    return registry.costs["bytes"].create()


class Mixed(nn.Module):
    """Layers in bfloat16 between layers in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 12), nn.Linear(12, 3)
        self.wide, self.small = nn.Linear(12, 12), nn.Linear(12, 12).bfloat16()
        self.norm = nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(self.stem(x).relu()).relu()
        x = self.small(x.bfloat16()).relu().float()
        result: Tensor = self.head(self.norm(x))
        return result


def mixed() -> Mixed:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Mixed()


X = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))


def counted(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def compressed(cost: Cost, budget: float, *costs: Cost) -> Compressed:
    grid = Grid({"svd": Svd()}, [RELATIVE], (0.2, 0.4, 0.6), costs=costs or (PARAMS, MACS))
    goal = Goal(budget, cost, calibration="none")
    return compress_model(TracedModel.of(mixed(), X), grid, goal, greedy)


def test_it_obeys_the_laws(bytes_cost: Cost) -> None:
    check_cost(bytes_cost, mixed(), X)


def test_it_is_scored(bytes_cost: Cost) -> None:
    grid = Grid({"svd": Svd()}, [RELATIVE], (0.4,), costs=(PARAMS, bytes_cost))
    found = {c.layer: c.costs for c in score(TracedModel.of(mixed(), X), grid)}
    for layer, size in (("wide", 4), ("small", 2)):
        params, held = found[layer]["params"], found[layer]["bytes"]
        assert params is not None
        assert held == Change(size * params.before, size * params.after)
        assert params.before == 12 * 12 + 12


@pytest.mark.parametrize("budget", [0.9, 0.8, 0.7])
def test_it_is_planned_under_and_counted(bytes_cost: Cost, budget: float) -> None:
    result = compressed(bytes_cost, budget)
    before = counted(mixed())
    assert result.verified
    assert result.costs["bytes"] == Change(before, counted(result.model))
    assert counted(result.model) <= budget * before
    assert set(result.costs) == {"params", "macs", "bytes"}
    assert result.plan.cost == "bytes"


def test_what_it_counts_decides(bytes_cost: Cost) -> None:
    """The layer in bfloat16 has half the bytes of its parameters."""
    one = {move.layer for move in compressed(bytes_cost, 0.8, PARAMS).plan.moves}
    assert "wide" in one
    same = Grid({"svd": Svd()}, [RELATIVE], (0.4,), costs=(PARAMS, bytes_cost))
    found = {c.layer: c for c in score(TracedModel.of(mixed(), X), same)}
    wide, small = (found[name].costs["bytes"] for name in ("wide", "small"))
    assert wide is not None
    assert small is not None
    assert wide.saving == 2 * small.saving


def test_it_is_in_the_plan(bytes_cost: Cost) -> None:
    result = compressed(bytes_cost, 0.8)
    value = json.loads(json.dumps(result.plan.to_json()))
    assert value["cost"] == "bytes"
    for move in value["moves"]:
        size = 2 if move["layer"] == "small" else 4
        assert move["bytes_before"] == size * move["params_before"]
        assert move["bytes_after"] == size * move["params_after"]
        assert move["bytes_after"] == counted(result.model.get_submodule(move["layer"]))
    assert Plan.from_json(value) == result.plan
    again = apply_plan(
        TracedModel.of(mixed(), X), Plan.from_json(value), {"svd": Svd()}, costs=(bytes_cost,)
    )
    assert again.costs == {"bytes": result.costs["bytes"]}


class Traffic(Cost):
    """Entries that go in and out of layers, which takes their calls to know."""

    name = "traffic"
    unit = "entries"
    needs = frozenset({"calls"})

    def of(self, stages: Sequence[Stage], layer: Layer) -> int:
        return sum(stage.macs(call.shape) for stage in stages for call in layer.calls or ())

    def total(self, model: nn.Module, layers: Sequence[Layer]) -> int:
        return sum(self.of([layer.spec], layer) for layer in layers if layer.spec)


@pytest.mark.parametrize("cost", [Traffic(), MACS])
def test_one_that_needs_calls_is_refused_without_inputs(cost: Cost) -> None:
    blind = TracedModel.of(mixed())
    grid = Grid({"svd": Svd()}, [RELATIVE], (0.4,), costs=(PARAMS, cost))
    with pytest.raises(UsageError, match=f"^{cost.unit} are unknown without the shape") as caught:
        compress_model(blind, grid, Goal(0.8, cost), greedy)
    assert "input_shape=(3, 224, 224)" in str(caught.value.hint)
    with pytest.raises(UsageError, match=f"^{cost.unit} are unknown"):
        total_cost(blind.model, blind.layers, cost)
    # Beside another that the budget counts it is only unknown.
    assert all(c.costs[cost.name] is None for c in score(blind, grid))
    result = compress_model(TracedModel.of(mixed()), grid, Goal(0.8), greedy)
    assert result.costs[cost.name] is None
    moves = json.loads(json.dumps(result.plan.to_json()))["moves"]
    assert moves
    assert all(move[f"{cost.name}_after"] is None for move in moves)


class Breaking(Cost):
    name = "mine"
    unit = "things"

    def __init__(self, layer: Any = 0, model: Any = 10**6) -> None:
        self.layer, self.model = layer, model

    def of(self, stages: Sequence[Stage], layer: Layer) -> int:
        return self.give(self.layer)

    def total(self, model: nn.Module, layers: Sequence[Layer]) -> int:
        return self.give(self.model)

    def give(self, value: Any) -> Any:
        if isinstance(value, BaseException):
            raise value
        return value


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (ZeroDivisionError("by nothing"), "fails on {}: ZeroDivisionError: by nothing"),
        (KeyError("x"), "fails on {}: KeyError: 'x'"),
        (-1, "of {} is -1, and a cost is a whole number of at least 0"),
        (2.5, r"of {} is 2\.5, and a cost is a whole number"),
        (None, "of {} is None, and"),
        ("9", "of {} is '9', and"),
    ],
)
def test_one_that_breaks_is_told_by_its_name(value: Any, reason: str) -> None:
    layer, model = Breaking(layer=value), Breaking(model=value)
    with pytest.raises(UnlawfulError, match=f"the cost mine {reason.format('the model')}"):
        compressed(model, 0.8)
    where = "the layer 'wide'"
    expected = f"the cost mine {reason.format(where)}"
    with pytest.raises(UnlawfulError, match=expected):
        compressed(layer, 0.8)
    with pytest.raises(UnlawfulError, match=expected):
        compressed(PARAMS, 0.8, PARAMS, layer)
    plan = compressed(PARAMS, 0.8).plan
    for cost in (layer, model):
        traced = TracedModel.of(mixed(), X)
        state = {key: value.clone() for key, value in traced.model.state_dict().items()}
        with pytest.raises(UnlawfulError, match="the cost mine"):
            apply_plan(traced, plan, {"svd": Svd()}, costs=(cost,))
        after = traced.model.state_dict()
        assert list(after) == list(state), "as it was where this raises"


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt()])
def test_running_out_of_memory_is_not_its_fault(error: Any) -> None:
    with pytest.raises(type(error)):
        compressed(Breaking(layer=error), 0.8)
