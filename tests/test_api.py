"""The public API: names in, models out."""

import copy
import importlib
import inspect
import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import tdkit
from tdkit import Move, Plan
from tdkit.errors import UnreadableFileError, UnsafeFileError, UnsupportedError, UsageError
from tdkit.layers.inventory import find_layers
from tdkit.registry import load_registry, method_limits, resolve_methods


@pytest.fixture
def model() -> Iterator[nn.Sequential]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 16, 3),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, 16, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 4),
        )


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def test_everything_public_is_there_and_described() -> None:
    assert set(tdkit.__all__) <= set(dir(tdkit))
    for name in tdkit.__all__:
        value = getattr(tdkit, name)
        assert inspect.getdoc(value), name
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        tdkit.compres  # noqa: B018


class TestCompress:
    def test_the_result_is_smaller_and_made_of_torch_layers(self, model: nn.Sequential) -> None:
        small, plan = tdkit.compress(model, budget=0.5, input_shape=(3, 12, 12))
        assert size(small) <= 0.5 * size(model)
        assert small.eval()(images()).shape == (2, 4)
        assert plan.budget == 0.5
        assert {type(m).__module__.partition(".nn.")[0] for m in small.modules()} == {"torch"}
        assert same(tdkit.compress(model.train(), budget=0.5)[0], small)

    def test_the_default_budget_is_a_half(self, model: nn.Sequential) -> None:
        assert size(tdkit.compress(model)[0]) <= 0.5 * size(model)

    def test_methods_that_are_slow_at_run_time_are_for_those_who_ask(self) -> None:
        assert set(resolve_methods(load_registry())) >= {"svd", "cp", "tucker", "tt"}
        assert "spatial-svd" not in resolve_methods(load_registry())
        assert list(resolve_methods(load_registry(), ["cp"])) == ["cp"]

    def test_cp_is_considered_where_it_is_fast_unless_it_is_asked_for(
        self, model: nn.Sequential
    ) -> None:
        limit = method_limits(load_registry())["cp"]
        grid: dict[str, Any] = {"layers": ["5"], "keeps": [0.3]}
        assert 0 < limit < 0.3
        _, plan = tdkit.compress(model, budget=0.8, **grid)
        assert {move.method for move in plan.moves} <= {"svd", "tucker", "tt"}
        _, plan = tdkit.compress(model, budget=0.8, methods=["cp"], **grid)
        assert [move.method for move in plan.moves] == ["cp"]
        _, plan = tdkit.compress(model, budget=0.8, layers=["5"], keeps=[limit])
        assert [move.method for move in plan.moves] == ["cp"]

    def test_options_have_their_effect(self, model: nn.Sequential) -> None:
        options: dict[str, Any] = {"budget": 0.8, "seed": 3, "metric": "absolute-weights"}
        _, plan = tdkit.compress(model, methods=["tt"], layers=["5"], **options)
        assert [(m.layer, m.method) for m in plan.moves] == [("5", "tt")]
        assert (plan.seed, plan.metric, plan.planner, plan.cost) == (
            3,
            "absolute-weights",
            "greedy",
            "params",
        )
        _, plan = tdkit.compress(
            model, budget=0.96, keeps=[0.5], layers=["8", "0"], include_ends=True
        )
        assert {m.layer for m in plan.moves} <= {"0", "8"}
        assert plan.moves

    def test_progress_is_told(self, model: nn.Sequential) -> None:
        steps: list[tuple[int, int]] = []
        tdkit.compress(model, progress=lambda *step: steps.append(step))
        assert steps[-1][0] == steps[-1][1] > 0

    def test_macs(self, model: nn.Sequential) -> None:
        small, plan = tdkit.compress(model, 0.5, cost="macs", input_shape=(3, 12, 12))
        costs = [
            sum(layer.macs or 0 for layer in find_layers(m, inputs=[images(1)]))
            for m in (model, small)
        ]
        assert costs[1] <= 0.5 * costs[0]
        assert plan.cost == "macs"

    @pytest.mark.parametrize(
        "metric", ["relative-features", "absolute-features", "scaled-features"]
    )
    def test_feature_metrics_and_data_instead_of_a_shape(
        self, model: nn.Sequential, metric: str
    ) -> None:
        data = [images(3), images(1)]
        small, plan = tdkit.compress(model, 0.5, cost="macs", metric=metric, data=data)
        assert plan.moves
        assert all(set(c.errors) == {metric} for c in plan.candidates)
        assert small(images()).shape == (2, 4)

    def test_example_inputs(self, model: nn.Sequential) -> None:
        expected, _ = tdkit.compress(model, 0.5, cost="macs", input_shape=(3, 12, 12))
        for inputs in ([images()], (images(1),), images()):
            small, _ = tdkit.compress(model, 0.5, cost="macs", example_inputs=inputs)
            assert same(small, expected)

    def test_what_breaks_the_model_is_left_dense(self) -> None:
        class Reads(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.stem, self.head = nn.Linear(4, 16), nn.Linear(16, 2)
                self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

            def forward(self, x: Tensor) -> Tensor:
                x = functional.linear(self.stem(x), self.a.weight, self.a.bias)
                return self.head(self.b(x))

        model = Reads()
        small, plan = tdkit.compress(model, 0.8, input_shape=(4,))
        assert [m.layer for m in plan.moves] == ["b"]
        assert size(small) <= 0.8 * size(model)
        small(torch.zeros(2, 4))
        with pytest.raises(UnsupportedError, match=r"'a' cannot be replaced: .*weight"):
            tdkit.apply(Plan((Move("a", "svd", 2),)), model, input_shape=(4,))

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"budget": 0}, "budget"),
            ({"budget": "50%"}, "budget"),
            ({"cost": "flops"}, "unknown cost"),
            ({"cost": "macs"}, "MACs are unknown"),
            ({"methods": ["svdd"]}, "no method named 'svdd'"),
            ({"metric": "relative-weight"}, "no metric named"),
            ({"metric": "relative-features"}, "needs data"),
            ({"planner": "greed"}, "no planner named"),
            ({"layers": ["conv*"]}, r"no layer named 'conv\*'"),
            ({"keeps": [0]}, "keep"),
            ({"input_shape": (3, 0, 12)}, "shape"),
            ({"budget": 0.01}, "smallest reachable"),
            ({"seed": 1.5}, "the seed 1.5 is not a whole number"),
            ({"seed": True}, "the seed True is not a whole number"),
            ({"seed": "1"}, "the seed '1' is not a whole number"),
            ({"methods": 3}, "methods=3 is no list of names"),
            ({"methods": ["svd", 3]}, "is no list of names"),
            ({"layers": [2]}, r"layers=\[2\] is no list of names"),
            ({"keeps": "0.5"}, "keeps='0.5' is no list of fractions"),
            ({"keeps": ["0.5"]}, r"keeps=\['0.5'\] is no list of fractions"),
            ({"keeps": torch.ones(2, 2)}, "keeps=<Tensor> is no list of fractions"),
            ({"keeps": None}, "keeps=None is no list of fractions"),
            ({"metric": ["relative-weights"]}, "a metric is named by a string"),
            ({"input_shape": 12}, "input_shape=12 is no shape"),
            ({"input_shape": "3,12,12"}, "is no shape"),
            ({"example_inputs": 12}, "are no arguments"),
            ({"data": "toy-data"}, "data='toy-data' is no list of batches"),
            ({"data": iter([images()])}, "<list_iterator> is no list of batches"),
            ({"data": ["toy-data"]}, "a batch of data is a str"),
        ],
    )
    def test_wrong_options_are_refused(
        self, model: nn.Sequential, options: dict[str, Any], reason: str
    ) -> None:
        with pytest.raises(UsageError, match=reason):
            tdkit.compress(model, **options)

    @pytest.mark.parametrize(
        ("one", "listed"),
        [
            ({"methods": "svd"}, {"methods": ["svd"]}),
            ({"layers": "5"}, {"layers": ["5"]}),
            ({"keeps": 0.25}, {"keeps": [0.25]}),
            ({"calibration": "data", "data": images(4)}, {"data": [images(4)]}),
        ],
    )
    def test_one_of_a_thing_is_a_list_of_one(
        self, model: nn.Sequential, one: dict[str, Any], listed: dict[str, Any]
    ) -> None:
        found, plan = tdkit.compress(model, 0.8, **one)
        expected, same_plan = tdkit.compress(model, 0.8, **{**one, **listed})
        assert plan == same_plan
        assert same(found, expected)

    @pytest.mark.parametrize(
        ("given", "plain"),
        [
            ({"seed": np.int64(1)}, {"seed": 1}),
            ({"keeps": [np.float32(0.5), Fraction(1, 4)]}, {"keeps": [0.5, 0.25]}),
            ({"keeps": np.float32(0.5)}, {"keeps": [0.5]}),
            ({"keeps": np.array([0.5])}, {"keeps": [0.5]}),
            ({"keeps": torch.tensor(0.5)}, {"keeps": [0.5]}),
            ({"keeps": torch.tensor([0.5, 0.25])}, {"keeps": [0.5, 0.25]}),
            ({"data": None}, {}),
        ],
    )
    def test_numbers_of_any_kind_will_do_and_no_data_are_none(
        self, model: nn.Sequential, given: dict[str, Any], plain: dict[str, Any]
    ) -> None:
        options: dict[str, Any] = {"methods": ["svd"], "input_shape": (3, 12, 12)}
        found, plan = tdkit.compress(model, 0.8, **options, **given)
        expected, same_plan = tdkit.compress(model, 0.8, **options, **plain)
        assert plan == same_plan
        assert json.loads(json.dumps(plan.seed)) == plan.seed
        assert same(found, expected)
        assert same(tdkit.apply(plan, model, input_shape=(3, 12, 12), data=None), found)

    @pytest.mark.parametrize("option", ["methods", "keeps"])
    def test_an_empty_list_is_refused(self, model: nn.Sequential, option: str) -> None:
        empty: dict[str, Any] = {option: []}
        calls = (
            lambda: tdkit.compress(model, **empty),
            lambda: tdkit.validate(model, "fashion-mnist-sample", **empty),
        )
        for call in calls:
            with pytest.raises(UsageError, match=f"{option} is an empty list") as refused:
                call()
            hint = str(refused.value.hint)
            assert hint.startswith(f"write {option}=[")
            assert hint.endswith("], or leave it out")

    def test_what_is_no_module_is_said_to_be_none(self) -> None:
        with pytest.raises(UsageError, match=r"a model is a torch.nn.Module, not str") as refused:
            tdkit.compress("model.pt", input_shape=(3, 12, 12))  # type: ignore[arg-type]
        assert refused.value.hint is not None
        assert "tdkit.load" in refused.value.hint

    def test_inputs_that_do_not_fit_are_refused(self, model: nn.Sequential) -> None:
        with pytest.raises(UnsupportedError, match=r"does not run on an input of shape \(1, 5, 12"):
            tdkit.compress(model, input_shape=(5, 12, 12))


class TestApply:
    def test_a_plan_from_a_file_gives_the_same_model(self, model: nn.Sequential) -> None:
        methods, shape = ["svd", "cp", "tucker", "tt"], (3, 12, 12)
        small, plan = tdkit.compress(model, 0.4, methods=methods, input_shape=shape, seed=4)
        again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
        assert again == plan
        assert same(tdkit.apply(again, model, input_shape=shape), small)
        assert same(tdkit.apply(again, model, example_inputs=images()), small)

    def test_a_plan_made_blindly_is_calibrated_where_the_shape_is_known(
        self, model: nn.Sequential
    ) -> None:
        blind, seeing = (
            tdkit.compress(model, 0.4, input_shape=shape) for shape in (None, (3, 12, 12))
        )
        assert blind[1] == seeing[1]
        assert not same(blind[0], seeing[0])
        assert same(tdkit.apply(blind[1], model), blind[0])
        assert same(tdkit.apply(blind[1], model, input_shape=(3, 12, 12)), seeing[0])

    def test_a_plan_may_be_the_path_of_its_file(self, model: nn.Sequential, tmp_path: Path) -> None:
        small, plan = tdkit.compress(model, 0.4)
        path = tmp_path / "plan.json"
        path.write_text(json.dumps(plan.to_json()))
        for named in (path, str(path)):
            assert same(tdkit.apply(named, model), small)
        with pytest.raises(UnreadableFileError, match="No such file"):
            tdkit.apply(tmp_path / "plam.json", model)

    def test_what_is_no_plan_is_refused(self, model: nn.Sequential) -> None:
        with pytest.raises(UsageError, match="a Sequential is no plan") as refused:
            tdkit.apply(model, Plan(()))  # type: ignore[arg-type]
        assert refused.value.hint is not None
        assert "then the model: tdkit.apply(plan, model)" in refused.value.hint
        with pytest.raises(UsageError, match=r"a model is a torch.nn.Module, not Plan"):
            tdkit.apply(Plan(()), Plan(()), data=images())  # type: ignore[arg-type]

    def test_unknown_methods_are_refused(self, model: nn.Sequential) -> None:
        with pytest.raises(UsageError, match="no method named 'mine'"):
            tdkit.apply(Plan((Move("2", "mine", 3),)), model)


def test_load_takes_the_users_word_for_a_class(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "word_nets.py").write_text(
        "from torch import nn\n\nclass Net(nn.Sequential):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    word_nets = importlib.import_module("word_nets")
    model = word_nets.Net(nn.Linear(3, 2))
    torch.save(model, tmp_path / "own.pt")
    with pytest.raises(UnsafeFileError, match="not on tdkit's list"):
        tdkit.load(tmp_path / "own.pt")
    for allowed in (["word_nets:Net"], "word_nets:Net"):
        assert same(tdkit.load(tmp_path / "own.pt", allow_classes=allowed), model)


def test_load_refuses_what_names_no_model_and_what_is_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a Linear does not name a model"):
        tdkit.load(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="not the class Linear"):
        tdkit.load(tmp_path / "model.pt", model=nn.Linear)  # type: ignore[arg-type]


def test_load_rebuilds_what_was_saved(model: nn.Sequential, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(model, path)
    assert same(tdkit.load(path), model)
    torch.save(model.state_dict(), path)
    blank = copy.deepcopy(model)
    for parameter in blank.parameters():
        nn.init.zeros_(parameter)
    assert same(tdkit.load(path, model=blank), model)


def test_names_may_be_spelt_with_underscores_and_capitals() -> None:
    model = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(8, 8), nn.ReLU())))
    _, plan = tdkit.compress(model, 0.8, methods=["SVD"], metric="relative_weights")
    assert plan.metric == "relative-weights"
    assert {move.method for move in plan.moves} == {"svd"}
