"""``tdkit.plan``: of a model as compress would, of scores in no time."""

from __future__ import annotations

from typing import Any

import pytest
from small_cnn import SHAPE, images, same

import tdkit
from tdkit.decompositions.base import Prepared
from tdkit.errors import UsageError

GRID: dict[str, Any] = {
    "methods": ["svd", "tucker", "tt"],
    "keeps": [0.7, 0.5, 0.3, 0.15],
    "input_shape": SHAPE,
    "seed": 5,
}


@pytest.mark.parametrize("cost", ["params", "macs"])
def test_of_one_scoring_any_number_of_budgets_as_of_the_model(model, cost, monkeypatch) -> None:
    scores = tdkit.score(model, **GRID)
    budgets = (1.0, 0.8, 0.6, 0.45)
    expected = [tdkit.plan(model, budget, cost=cost, **GRID) for budget in budgets]

    def work(*args: object, **options: object) -> None:
        raise AssertionError("it decomposes")

    for name in ("group_factors", "unit_error", "factors", "refined"):
        monkeypatch.setattr(Prepared, name, work)
    found = [tdkit.plan(scores, budget, cost=cost) for budget in budgets]
    assert found == expected
    assert [plan.candidates for plan in found] == [plan.candidates for plan in expected]
    assert len({plan.moves for plan in found}) > 2


def test_a_plan_of_scores_is_applied_as_it_is(model) -> None:
    plan = tdkit.plan(tdkit.score(model, **GRID), 0.5)
    direct = tdkit.compress(model, 0.5, measure=False, **GRID)
    applied = tdkit.apply(plan, model, input_shape=SHAPE, measure=False)
    assert same(applied.model, direct.model)
    assert not [note for note in applied.notes if "the plan was made with" in note]


def test_what_belongs_to_the_scoring_is_refused(model) -> None:
    scores = tdkit.score(model, **GRID)
    with pytest.raises(UsageError, match="keeps, seed belong to the scoring, which is done"):
        tdkit.plan(scores, 0.5, keeps=[0.5], seed=1)
    with pytest.raises(UsageError, match="the scores have no absolute-weights") as refused:
        tdkit.plan(scores, 0.5, metric="absolute-weights")
    assert "they have params, macs" in str(refused.value.hint)
    with pytest.raises(UsageError, match="smallest reachable"):
        tdkit.plan(scores, 0.01)
    blind = tdkit.score(model, **{**GRID, "input_shape": None})
    with pytest.raises(UsageError, match="the scores have no macs"):
        tdkit.plan(blind, 0.5, cost="macs")


def test_a_plan_says_by_what_errors_added_up_and_how_hard_to_fit(model, tmp_path) -> None:
    scores = tdkit.score(model, **GRID)
    usual, squares = tdkit.plan(scores, 0.5), tdkit.plan(scores, 0.5, penalty="squares")
    assert (usual.penalty, squares.penalty) == ("logarithm", "squares")
    best = tdkit.plan(scores, 0.5, effort="best", calibration="data")
    assert (best.effort, best.to_json()["effort"]) == ("best", "best")
    assert tdkit.Plan.from_json(best.to_json()) == best
    old = {key: v for key, v in usual.to_json().items() if key not in ("effort", "penalty")}
    assert tdkit.Plan.from_json(old).effort == "fast"
    with pytest.raises(UsageError, match="adds up by 'cubes', which is no penalty"):
        tdkit.plan(scores, 0.5, penalty="cubes")
    with pytest.raises(UsageError, match='"effort" is none of fast, default, best'):
        tdkit.Plan.from_json({**old, "effort": "hard"})


def test_a_plan_of_a_model_takes_no_fit(model, monkeypatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("it fits factors")

    monkeypatch.setattr("tdkit.compression.calibrating.refit", fail)
    options = {**GRID, "data": [images(20), images(20)], "effort": "best"}
    assert tdkit.plan(model, 0.5, **options).effort == "best"
