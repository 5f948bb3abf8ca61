"""What methods and metrics may look at beside the weight, in scoring and in applying a plan."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tdkit.compression import scoring
from tdkit.compression.applying import apply_plan
from tdkit.compression.compress import Goal, compress_model
from tdkit.compression.plan import Move, Plan
from tdkit.compression.scoring import Grid, score
from tdkit.decompositions.base import Prepared
from tdkit.decompositions.svd import Svd
from tdkit.errors import UsageError
from tdkit.layers.evidence import Evidence, Moments
from tdkit.layers.spec import LayerSpec
from tdkit.layers.traced import TracedModel
from tdkit.metrics.base import Difference, Metric
from tdkit.metrics.weights import RELATIVE
from tdkit.planners.greedy import greedy


class Model(nn.Module):
    """A convolution, a grouped one, a Linear over tokens that is called twice, and the ends."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3)
        self.conv = nn.Conv2d(4, 6, 3, stride=2)
        self.grouped = nn.Conv2d(6, 6, 3, groups=2, padding=1)
        self.tokens = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        x = self.grouped(self.conv(self.stem(x).relu()).relu()).relu()
        x = self.tokens(x.flatten(2).mT)
        return self.head(self.tokens(x.relu_()).mean(1))


LAYERS = ("conv", "grouped", "tokens")


def model() -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Model()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 2, 9, 9, generator=generator) for size in (3, 2)]


@torch.no_grad()
def by_hand() -> dict[str, Moments]:
    dense, data = model().eval(), torch.cat(batches())
    rows: dict[str, list[Tensor]] = {}
    x = dense.stem(data).relu()
    rows["conv"] = [v for sample in x for v in sample.flatten(1).mT]
    x = dense.conv(x).relu()
    rows["grouped"] = [v for sample in x for v in sample.flatten(1).mT]
    x = dense.grouped(x).relu().flatten(2).mT
    again = dense.tokens(x).relu()
    rows["tokens"] = [v for part in (x, again) for sample in part for v in sample]
    found = {}
    for name, vectors in rows.items():
        wide = torch.stack(vectors).double()
        second = sum(torch.outer(v, v) for v in wide) / len(wide)
        assert isinstance(second, Tensor)
        found[name] = Moments(len(wide), wide.mean(0), second)
    return found


def check(found: Moments | None, layer: str) -> None:
    want = by_hand()[layer]
    assert found is not None
    assert found.count == want.count
    assert found.mean.dtype == found.second.dtype == torch.float64
    torch.testing.assert_close(found.mean, want.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.second, want.second, rtol=1e-5, atol=1e-6)


class Looks(Svd):
    """Remembers the evidence of every layer it was given, by the layer's kind and groups."""

    needs = frozenset({"moments"})

    def __init__(self) -> None:
        self.seen: list[tuple[str, Moments | None]] = []

    def prepare(self, layer: LayerSpec, weight: Tensor, evidence: Evidence | int = 0) -> Prepared:
        assert isinstance(evidence, Evidence)
        name = "tokens" if layer.kind == "Linear" else "grouped" if layer.groups > 1 else "conv"
        self.seen.append((name, evidence.moments))
        return super().prepare(layer, weight, evidence)


class Sees:
    """The evidence that a metric was given."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, Moments | None]] = []

    def __call__(self, difference: Difference) -> float:
        self.seen.append((difference.size, difference.evidence.moments))
        return difference.error


def needing(sees: Sees) -> Metric:
    return Metric("mine", "weights", compare=sees, needs=frozenset({"moments"}))


SIZES = {model().get_submodule(name).weight.numel(): name for name in LAYERS}


def test_a_metric_is_given_the_moments_whatever_the_methods_ask_for() -> None:
    for methods in ({"svd": Svd()}, {"looks": Looks()}):
        sees = Sees()
        score(TracedModel.of(model()), Grid(methods, [needing(sees)], (0.5,)), batches=batches())
        assert {SIZES[size] for size, _ in sees.seen} == set(LAYERS)
        for size, moments in sees.seen:
            check(moments, SIZES[size])


def test_a_metric_of_features_is_given_them_too() -> None:
    sees = Sees()
    metric = Metric("mine", "features", compare=sees, needs=frozenset({"moments"}))
    traced = TracedModel.of(model(), patterns=["grouped"])
    score(traced, Grid({"svd": Svd()}, [metric], (0.5,)), batches=batches())
    assert len(sees.seen) == 5  # samples
    for _, moments in sees.seen:
        check(moments, "grouped")


def test_a_method_is_given_them_in_scoring() -> None:
    looks = Looks()
    grid = Grid({"looks": looks, "svd": Svd()}, [RELATIVE], (0.5,))
    score(TracedModel.of(model()), grid, batches=batches())
    assert [name for name, _ in looks.seen] == list(LAYERS)
    for name, moments in looks.seen:
        check(moments, name)


def test_and_where_a_plan_is_applied() -> None:
    looks = Looks()
    moves = tuple(Move(name, "looks", 1) for name in LAYERS)
    result = apply_plan(
        TracedModel.of(model(), batches()[0]),
        Plan(moves, calibration="none"),
        {"looks": looks},
        batches=batches(),
    )
    assert set(result.structure) == set(LAYERS)
    assert [name for name, _ in looks.seen] == list(LAYERS)
    for name, moments in looks.seen:
        check(moments, name)


def test_one_that_asks_for_none_gets_none_although_they_are_known() -> None:
    class Modest(Looks):
        needs = frozenset()

    modest, sees = Modest(), Sees()
    grid = Grid({"modest": modest}, [needing(sees)], (0.5,))
    score(TracedModel.of(model()), grid, batches=batches())
    assert [moments for _, moments in modest.seen] == [None] * 3
    assert all(moments is not None for _, moments in sees.seen)


def test_a_method_goes_without_where_there_are_no_data() -> None:
    looks = Looks()
    score(TracedModel.of(model()), Grid({"looks": looks}, [RELATIVE], (0.5,)))
    assert [moments for _, moments in looks.seen] == [None] * 3


def test_a_metric_that_needs_them_is_refused_without_data() -> None:
    grid = Grid({"svd": Svd()}, [RELATIVE, needing(Sees())], (0.5,))
    with pytest.raises(UsageError, match=r"^mine needs data to look at") as caught:
        score(TracedModel.of(model()), grid)
    assert "data=" in str(caught.value.hint)


def test_they_are_gathered_for_no_layer_that_nothing_looks_at(monkeypatch) -> None:
    class OfLinear(Looks):
        def supports(self, layer: LayerSpec) -> str | None:
            return None if layer.kind == "Linear" else "it is not linear"

    names: list[list[str]] = []
    gather = scoring.input_moments
    monkeypatch.setattr(
        scoring, "input_moments", lambda m, n, b: names.append(list(n)) or gather(m, n, b)
    )
    methods = {"of-linear": OfLinear(), "svd": Svd()}
    score(TracedModel.of(model()), Grid(methods, [RELATIVE], (0.5,)), batches=batches())
    score(TracedModel.of(model()), Grid({"svd": Svd()}, [RELATIVE], (0.5,)), batches=batches())
    plan = Plan((Move("conv", "svd", 1), Move("tokens", "of-linear", 1)), calibration="none")
    apply_plan(TracedModel.of(model(), batches()[0]), plan, methods, batches=batches())
    assert names == [["tokens"], ["tokens"]]


class Weighted(Svd):
    """Its factors depend on the moments: input channels are scaled by their deviation first."""

    needs = frozenset({"moments"})

    def prepare(self, layer: LayerSpec, weight: Tensor, evidence: Evidence | int = 0) -> Prepared:
        assert isinstance(evidence, Evidence)
        moments = evidence.moments
        if layer.groups > 1 or moments is None:
            return super().prepare(layer, weight, evidence)
        scale = moments.second.diagonal().sqrt() + 1e-3
        shape = (1, -1, *(1 for _ in layer.kernel_size))
        return Unscaled(
            super().prepare(layer, weight.double() * scale.reshape(shape)), weight, scale, evidence
        )


class Unscaled(Prepared):
    def __init__(self, scaled: Prepared, weight: Tensor, by: Tensor, evidence: Evidence) -> None:
        super().__init__(scaled.method, scaled.layer, weight, evidence)
        self.scaled, self.by = scaled, by

    def group_factors(self, rank: Any) -> list[Sequence[Tensor]]:
        first, second = self.scaled.group_factors(rank)[0]
        shape = (1, -1, *(1 for _ in self.layer.kernel_size))
        return [(first * self.scaled.scale / self.scale / self.by.reshape(shape), second)]


def test_a_plan_applied_with_the_same_data_gives_the_same_bits() -> None:
    """Law 14, of a method whose factors follow the data."""
    methods = {"weighted": Weighted()}
    grid, goal = Grid(methods, [RELATIVE], (0.3, 0.6)), Goal(0.85, calibration="none")
    traced = TracedModel.of(model(), batches()[0])
    result = compress_model(traced, grid, goal, greedy, batches=batches())
    assert {move.layer for move in result.plan.moves} & {"conv", "tokens"}
    plan = Plan.from_json(result.plan.to_json())
    states = []
    for data in (batches(), batches(), []):
        traced = TracedModel.of(model(), batches()[0])
        states.append(apply_plan(traced, plan, methods, batches=data).model.state_dict())
    want = result.model.state_dict()
    for state in states[:2]:
        assert list(state) == list(want)
        assert all(torch.equal(value, want[key]) for key, value in state.items())
    assert any(not torch.equal(value, want[key]) for key, value in states[2].items())
