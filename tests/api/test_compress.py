"""``tdkit.compress``: names, files or objects in, a model out."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from small_cnn import images, same, size
from torch import Tensor, nn
from torch.nn import functional

import tdkit
from tdkit import Move, Plan
from tdkit.errors import UnreadableFileError, UnsupportedError, UsageError
from tdkit.forward.inputs import Inputs
from tdkit.layers.inventory import find_layers
from tdkit.registry import load_registry, method_limits, resolve_methods


class TestCompress:
    def test_the_result_is_smaller_and_made_of_torch_layers(self, model: nn.Sequential) -> None:
        done = tdkit.compress(model, budget=0.5, input_shape=(3, 12, 12))
        small = done.model
        assert size(small) <= 0.5 * size(model)
        assert small.eval()(images()).shape == (2, 4)
        assert done.plan.budget == 0.5
        assert {type(m).__module__.partition(".nn.")[0] for m in small.modules()} == {"torch"}
        again = tdkit.compress(model.train(), budget=0.5, input_shape=(3, 12, 12))
        assert same(again.model, small)

    def test_the_default_budget_is_a_half(self, model: nn.Sequential) -> None:
        assert size(tdkit.compress(model).model) <= 0.5 * size(model)

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
        plan = tdkit.compress(model, budget=0.8, **grid).plan
        assert {move.method for move in plan.moves} <= {"svd", "tucker", "tt"}
        plan = tdkit.compress(model, budget=0.8, methods=["cp"], **grid).plan
        assert [move.method for move in plan.moves] == ["cp"]
        plan = tdkit.compress(model, budget=0.8, layers=["5"], keeps=[limit]).plan
        assert [move.method for move in plan.moves] == ["cp"]

    def test_options_have_their_effect(self, model: nn.Sequential) -> None:
        options: dict[str, Any] = {"budget": 0.8, "seed": 3, "metric": "absolute-weights"}
        plan = tdkit.compress(model, methods=["tt"], layers=["5"], **options).plan
        assert [(m.layer, m.method) for m in plan.moves] == [("5", "tt")]
        assert (plan.seed, plan.metric, plan.planner, plan.cost) == (
            3,
            "absolute-weights",
            "greedy",
            "params",
        )
        ends: dict[str, Any] = {"layers": ["8", "0"], "include_ends": True}
        plan = tdkit.compress(model, budget=0.96, keeps=[0.5], **ends).plan
        assert {m.layer for m in plan.moves} <= {"0", "8"}
        assert plan.moves

    def test_progress_is_told(self, model: nn.Sequential) -> None:
        steps: list[tuple[str, int, int]] = []
        tdkit.compress(model, progress=lambda *step: steps.append(step))
        ended = {stage: (done, total) for stage, done, total in steps}
        assert list(ended) == ["scoring", "replacing, verifying, calibrating", "measuring"]
        assert all(done == total > 0 for done, total in ended.values())
        counted = [done for stage, done, _ in steps if stage == "scoring"]
        assert counted == sorted(counted)

    def test_macs(self, model: nn.Sequential) -> None:
        done = tdkit.compress(model, 0.5, cost="macs", input_shape=(3, 12, 12))
        costs = [
            sum(layer.macs or 0 for layer in find_layers(m, inputs=Inputs((images(1),))))
            for m in (model, done.model)
        ]
        assert costs[1] <= 0.5 * costs[0]
        assert done.plan.cost == "macs"

    @pytest.mark.parametrize(
        "metric", ["relative-features", "absolute-features", "scaled-features"]
    )
    def test_feature_metrics_and_data_instead_of_a_shape(
        self, model: nn.Sequential, metric: str
    ) -> None:
        data = [images(3), images(1)]
        done = tdkit.compress(model, 0.5, cost="macs", metric=metric, data=data)
        assert done.plan.moves
        assert all(set(c.errors) == {metric} for c in done.plan.candidates)
        assert done.model(images()).shape == (2, 4)

    def test_example_inputs(self, model: nn.Sequential) -> None:
        expected = tdkit.compress(model, 0.5, cost="macs", input_shape=(3, 12, 12)).model
        for inputs in ([images()], (images(1),), images()):
            small = tdkit.compress(model, 0.5, cost="macs", example_inputs=inputs).model
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

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Reads()
        done = tdkit.compress(model, 0.7, input_shape=(4,))
        assert [m.layer for m in done.plan.moves] == ["b"]
        assert size(done.model) <= 0.7 * size(model)
        done.model(torch.zeros(2, 4))
        assert list(done.put_back) == ["a"]
        assert "weight" in done.put_back["a"]
        with pytest.raises(UnsupportedError, match=r"no layer .* can be replaced; a: .*weight"):
            tdkit.apply(Plan((Move("a", "svd", 2),)), model, input_shape=(4,))
        both = tdkit.apply(
            Plan((Move("a", "svd", 2), Move("b", "svd", 2))), model, input_shape=(4,)
        )
        assert [m.layer for m in both.plan.moves] == ["b"]
        assert both.put_back == done.put_back
        assert any(note.startswith("a was put back: ") for note in both.notes)

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"budget": 0}, "budget"),
            ({"budget": "50%"}, "budget"),
            ({"cost": "flops"}, "no cost named 'flops'"),
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
            ({"metric": ["relative-weights"]}, "a metric is named by a string"),
            ({"input_shape": 12}, "input_shape=12 is not a shape"),
            ({"input_shape": "3;12;12"}, "input_shape='3;12;12' is not a shape"),
            ({"example_inputs": 12}, "are no arguments"),
            ({"data": "toy-data"}, "no data set named 'toy-data'"),
            ({"data": {"x": 1}}, "data=<dict> is no list of batches"),
            ({"settings": {"svd": {"sweeps": 2}}}, "svd has no setting 'sweeps'"),
            ({"settings": {"cp": {"sweep": 2}}}, "cp has no setting 'sweep'"),
            ({"settings": {"cq": {"sweeps": 2}}}, "no method named 'cq'"),
            ({"calibration": "magic"}, "unknown calibration 'magic'"),
            ({"calibration": "data"}, "calibrating BatchNorm on data needs training images"),
            ({"device": "tpu"}, "unknown device 'tpu'"),
            ({"format": "zip"}, "unknown format 'zip'"),
            ({"learning_rate": 0.1}, "learning_rate= belongs to fine-tuning"),
            ({"finetune": 1}, "fine-tuning needs labelled images"),
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
        found = tdkit.compress(model, 0.8, **one)
        expected = tdkit.compress(model, 0.8, **{**one, **listed})
        assert found.plan == expected.plan
        assert same(found.model, expected.model)

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
            ({"keeps": None}, {}),
            ({"input_shape": "3,12,12"}, {}),
            ({"input_shape": "3x12x12"}, {}),
            ({"input_shape": [3, np.int64(12), 12]}, {}),
        ],
    )
    def test_numbers_of_any_kind_will_do_and_no_data_are_none(
        self, model: nn.Sequential, given: dict[str, Any], plain: dict[str, Any]
    ) -> None:
        options: dict[str, Any] = {"methods": ["svd"], "input_shape": (3, 12, 12)}
        found = tdkit.compress(model, 0.8, **{**options, **given})
        expected = tdkit.compress(model, 0.8, **options, **plain)
        plan = found.plan
        assert plan == expected.plan
        assert json.loads(json.dumps(plan.seed)) == plan.seed
        assert same(found.model, expected.model)
        applied = tdkit.apply(plan, model, input_shape=(3, 12, 12), data=None)
        assert same(applied.model, found.model)

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
        with pytest.raises(UsageError, match="a Tensor does not name a model") as refused:
            tdkit.compress(images(), input_shape=(3, 12, 12))  # type: ignore[arg-type]
        assert refused.value.hint is not None
        assert "the path of a model file" in refused.value.hint
        with pytest.raises(UnreadableFileError, match=r"model.pt"):
            tdkit.compress("model.pt", input_shape=(3, 12, 12))

    def test_inputs_that_do_not_fit_are_refused(self, model: nn.Sequential) -> None:
        with pytest.raises(UnsupportedError, match=r"does not run on an input of shape \(1, 5, 12"):
            tdkit.compress(model, input_shape=(5, 12, 12))


def test_names_may_be_spelt_with_underscores_and_capitals() -> None:
    model = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(8, 8), nn.ReLU())))
    plan = tdkit.compress(model, 0.8, methods=["SVD"], metric="relative_weights").plan
    assert plan.metric == "relative-weights"
    assert {move.method for move in plan.moves} == {"svd"}
