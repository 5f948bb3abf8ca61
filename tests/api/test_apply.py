"""``tdkit.apply``: a plan, on a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_cnn import images, same
from torch import nn

import tdkit
from tdkit import Move, Plan
from tdkit.errors import UnreadableFileError, UsageError


class TestApply:
    def test_a_plan_from_a_file_gives_the_same_model(self, model: nn.Sequential) -> None:
        methods, shape = ["svd", "cp", "tucker", "tt"], (3, 12, 12)
        done = tdkit.compress(model, 0.4, methods=methods, input_shape=shape, seed=4)
        small, plan = done.model, done.plan
        again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
        assert again == plan
        assert same(tdkit.apply(again, model, input_shape=shape).model, small)
        assert same(tdkit.apply(again, model, example_inputs=images()).model, small)

    def test_a_plan_made_blindly_is_calibrated_where_the_shape_is_known(
        self, model: nn.Sequential
    ) -> None:
        blind, seeing = (
            tdkit.compress(model, 0.4, input_shape=shape) for shape in (None, (3, 12, 12))
        )
        assert blind.plan == seeing.plan
        assert not same(blind.model, seeing.model)
        assert same(tdkit.apply(blind.plan, model).model, blind.model)
        seen = tdkit.apply(blind.plan, model, input_shape=(3, 12, 12))
        assert same(seen.model, seeing.model)

    def test_a_plan_may_be_the_path_of_its_file(self, model: nn.Sequential, tmp_path: Path) -> None:
        done = tdkit.compress(model, 0.4)
        small, plan = done.model, done.plan
        path = tmp_path / "plan.json"
        path.write_text(json.dumps(plan.to_json()))
        for named in (path, str(path)):
            assert same(tdkit.apply(named, model).model, small)
        with pytest.raises(UnreadableFileError, match="No such file"):
            tdkit.apply(tmp_path / "plam.json", model)

    def test_what_is_no_plan_is_refused(self, model: nn.Sequential) -> None:
        with pytest.raises(UsageError, match="a Sequential is no plan") as refused:
            tdkit.apply(model, Plan(()))  # type: ignore[arg-type]
        assert refused.value.hint is not None
        assert "then the model: tdkit.apply(plan, model)" in refused.value.hint
        with pytest.raises(UsageError, match=r"a Plan does not name a model"):
            tdkit.apply(Plan(()), Plan(()), data=images())  # type: ignore[arg-type]

    def test_unknown_methods_are_refused(self, model: nn.Sequential) -> None:
        with pytest.raises(UsageError, match="no method named 'mine'"):
            tdkit.apply(Plan((Move("2", "mine", 3),)), model)
