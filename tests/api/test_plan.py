"""``tdkit.plan``: of a model as compress would, of scores in no time."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from typing import Any

import pytest
from small_cnn import SHAPE, images, same

import tdkit
from tdkit import defaults
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


@pytest.mark.parametrize("budget", [0.9, 0.5, 0.45])
def test_of_scores_at_the_keeps_of_compress_it_is_the_plan_of_compress(model, budget) -> None:
    scores = tdkit.score(model, keeps="compress", input_shape=SHAPE, seed=5)
    expected = tdkit.compress(
        model, budget, input_shape=SHAPE, seed=5, measure=False, effort="fast"
    )
    assert replace(scores.plan(budget), effort="fast") == expected.plan
    assert scores.plan(budget) == tdkit.plan(scores, budget)
    # Of the methods that are for small keeps only there are no others.
    assert max(c.keep for c in scores.candidates if c.method == "cp") < 0.3
    named = tdkit.score(model, keeps="compress", methods="cp", layers="5")
    assert max(c.keep for c in named.candidates) > 0.8


def fractions(compression: tdkit.Compression) -> dict[str, float]:
    changes = compression.report.costs
    return {name: c.after / c.before for name, c in changes.items() if c is not None}


def test_several_bounds_hold_in_the_model_and_are_recorded(model) -> None:
    options: dict[str, Any] = {**GRID, "measure": False}
    alone = fractions(tdkit.compress(model, 0.8, **options))
    bounds = {"macs": round(alone["macs"] - 0.1, 2)}
    both = tdkit.compress(model, 0.8, bounds=bounds, **options)
    left = fractions(both)
    assert left["params"] <= 0.8
    assert left["macs"] <= bounds["macs"] < alone["macs"]
    assert (both.plan.planner, both.plan.bounds) == ("exact", bounds)
    assert f"for 80% of the params and {100 * bounds['macs']:g}% of the macs" in str(both.plan)
    assert both.to_json()["bounds"] == both.plan.to_json()["bounds"] == bounds
    assert tdkit.Plan.from_json(both.plan.to_json()) == both.plan
    assert tdkit.score(model, **GRID).plan(0.8, bounds=bounds) == both.plan
    # The order of budget and bound is a matter of words.
    turned = tdkit.plan(model, bounds["macs"], cost="macs", bounds={"params": 0.8}, **GRID)
    assert turned.moves == both.plan.moves


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bounds": {"macs": 0}}, "the bound on macs 0 is not a fraction above 0"),
        ({"bounds": {"macs": "50%"}}, "the bound on macs '50%' is not a fraction"),
        ({"bounds": {"params": 0.5}}, "there are two bounds on params"),
        ({"bounds": {"joules": 0.5}}, "no cost named 'joules'"),
        ({"bounds": 0.5}, "bounds=0.5 are no bounds"),
        ({"bounds": {"macs": 0.5}, "planner": "greedy"}, "greedy holds no bound but the budget"),
        ({"bounds": {"macs": 0.1}}, "params at 0.5 and macs at 0.1 are out of reach together"),
    ],
)
def test_bounds_that_cannot_be_are_refused(model, options, reason) -> None:
    scores = tdkit.score(model, **GRID)
    for given, more in ((scores, {}), (model, GRID)):
        with pytest.raises(UsageError, match=reason):
            tdkit.plan(given, 0.5, **options, **more)


def test_what_is_out_of_reach_names_what_is_in_reach(model) -> None:
    scores = tdkit.score(model, **GRID)
    with pytest.raises(UsageError) as refused:
        scores.plan(0.5, bounds={"macs": 0.1})
    found = re.search(r"are params ([\d.]+), macs ([\d.]+)", str(refused.value))
    assert found is not None
    # There macs cannot be held, and the params named are the least of all.
    params, macs = map(float, found.groups())
    assert scores.plan(0.5, bounds={"macs": macs}).moves
    assert scores.plan(params).moves
    with pytest.raises(UsageError, match="out of reach"):
        scores.plan(0.5, bounds={"macs": macs - 2e-4})


def test_the_trade_off_is_a_plan_for_each_budget(model) -> None:
    scores = tdkit.score(model, **GRID)
    curve = scores.trade_off([0.8, 0.5, 0.01])
    assert [point.plan for point in curve.points] == [scores.plan(0.8), scores.plan(0.5), None]
    assert "smallest reachable" in (curve.points[2].failure or "")
    for point, budget in zip(curve.points[:2], (0.8, 0.5), strict=True):
        done = tdkit.compress(model, budget, measure=False, **GRID)
        costs = {name: c.after for name, c in done.report.costs.items() if c is not None}
        assert point.costs == costs
        errors = [c.errors["relative-weights"] for c in done.plan.candidates]
        assert point.penalty == pytest.approx(-sum(math.log(1 - e**2) for e in errors))
    lines = str(curve).splitlines()
    assert lines[0].split() == ["budget", "parameters", "macs", "penalty", "moves"]
    assert lines[-1].endswith("out of reach")
    assert "<table>" in curve._repr_html_()
    value = json.loads(json.dumps(curve.to_json()))
    assert [len(p["moves"] or ()) for p in value["points"]] == [
        len(p.plan.moves) if p.plan else 0 for p in curve.points
    ]
    assert len(scores.trade_off(bounds={"macs": 0.9}).points) == len(defaults.BUDGETS)
    with pytest.raises(UsageError, match="budgets='half' is no list of fractions"):
        scores.trade_off("half")
