"""Settings of methods: given by name, checked, kept in plans, and told when they are others."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from small_cnn import SHAPE, dataset, same

import tdkit
from tdkit import Plan
from tdkit.errors import UsageError
from tdkit.study.recipe import MethodRecipe, adapted, bundled_recipe

CP: dict[str, Any] = {"methods": "cp", "keeps": 0.5, "layers": "5", "input_shape": SHAPE}
UNIFORM = {"cp": {"start": "uniform", "sweeps": 2}}


def compressed(model, **more: Any) -> tdkit.Compression:
    return tdkit.compress(model, 0.85, measure=False, **CP, **more)


def differs(notes: tuple[str, ...]) -> list[str]:
    return [note for note in notes if note.startswith("the plan was made with")]


def test_they_change_the_outcome_and_are_in_the_plan_with_the_defaults(model) -> None:
    plain, uniform = compressed(model), compressed(model, settings=UNIFORM)
    assert not same(plain.model, uniform.model)
    defaults = {"sweeps": 5, "tolerance": 1e-3, "ridge": 1e-10, "start": "orthogonal"}
    assert plain.plan.settings == {"cp": defaults}
    assert uniform.plan.settings == {"cp": {**defaults, **UNIFORM["cp"]}}
    assert uniform.plan.versions["tdkit"] == tdkit.__version__
    scores = tdkit.score(model, settings=UNIFORM, **CP)
    assert tdkit.plan(scores, 0.85) == uniform.plan


def test_a_plan_is_applied_under_its_own_settings(model) -> None:
    done = compressed(model, settings=UNIFORM)
    plan = Plan.from_json(json.loads(json.dumps(done.plan.to_json())))
    again = tdkit.apply(plan, model, input_shape=SHAPE, measure=False)
    assert same(again.model, done.model)
    assert again.plan == plan
    assert differs(again.notes) == []


def test_other_settings_and_versions_are_told(model) -> None:
    done = compressed(model, settings=UNIFORM)
    apply: dict[str, Any] = {"input_shape": SHAPE, "measure": False}
    other = tdkit.apply(done.plan, model, settings={"cp": {"start": "orthogonal"}}, **apply)
    assert not same(other.model, done.model)
    assert other.plan.settings["cp"]["start"] == "orthogonal"
    told = "the plan was made with cp.start=uniform, and is applied with orthogonal"
    assert told in differs(other.notes)
    old = replace(done.plan, versions={"tdkit": "0.0.1", "tdkit-gone": "2.0"})
    elsewhere = tdkit.apply(old, model, **apply)
    assert same(elsewhere.model, done.model)
    assert differs(elsewhere.notes) == [
        f"the plan was made with tdkit 0.0.1, and is applied with {tdkit.__version__}",
        "the plan was made with tdkit-gone 2.0, and is applied with none",
    ]


def test_one_setting_given_anew_leaves_the_plan_s_others(model) -> None:
    plan = compressed(model, settings=UNIFORM).plan
    other = tdkit.apply(plan, model, settings={"CP": {"sweeps": 3}}, measure=False)
    assert other.plan.settings["cp"]["sweeps"] == 3
    assert other.plan.settings["cp"]["start"] == "uniform"
    assert differs(other.notes) == ["the plan was made with cp.sweeps=2, and is applied with 3"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"cp": 3}, "settings are given by method"),
        ("cp.sweeps=3", "settings are given by method"),
        ({"cp": {"sweps": 3}}, "cp has no setting 'sweps'"),
        ({"cp": {"sweeps": "3"}}, "the setting sweeps of cp is a whole number, not '3'"),
        ({"cp": {"sweeps": -3}}, "the setting sweeps must be at least 0, not -3"),
        ({"cp": {"start": "zero"}}, "unknown start 'zero'"),
        ({"tucker": {"sweeps": 3}}, "there are settings for tucker, which is not among"),
        ({"tuker": {"sweeps": 3}}, "no method named 'tuker'"),
    ],
)
def test_wrong_ones_are_refused_by_name(model, settings, says) -> None:
    plan = Plan((tdkit.Move("5", "cp", 3),))
    for job in (
        lambda: compressed(model, settings=settings),
        lambda: tdkit.score(model, settings=settings, **CP),
        lambda: tdkit.apply(plan, model, settings=settings),
    ):
        with pytest.raises(UsageError) as refused:
            job()
        assert says in str(refused.value)


def test_settings_in_a_plan_that_a_method_does_not_have_are_refused(model) -> None:
    plan = Plan((tdkit.Move("5", "cp", 3),), settings={"cp": {"swoops": 3}})
    with pytest.raises(UsageError, match="cp has no setting 'swoops'"):
        tdkit.apply(plan, model)


def test_a_study_takes_them_over_those_of_its_recipe(model) -> None:
    options: dict[str, Any] = {"layers": "5", "methods": "cp", "keeps": 0.5, "no_finetune": True}

    def study(**more: Any) -> tdkit.Study:
        return tdkit.validate(model, dataset(), **options, **more)

    plain, uniform = study(), study(settings=UNIFORM)
    assert uniform.results.measurements != plain.results.measurements
    with pytest.raises(UsageError, match="cp has no setting 'sweps'"):
        study(settings={"cp": {"sweps": 3}})
    with pytest.raises(UsageError, match="settings are given by method"):
        study(settings="cp.sweeps=3")


def test_settings_of_a_recipe_stay_where_others_are_given() -> None:
    recipe = replace(bundled_recipe("quick"), options=(MethodRecipe("cp", sweeps=3, ridge=1e-8),))
    found = adapted(recipe, settings={"cp": {"sweeps": 9}, "tucker": {"sweeps": 1}})
    assert [each.settings for each in found.options] == [
        {"ridge": 1e-8, "sweeps": 9},
        {"sweeps": 1},
    ]
    with pytest.raises(UsageError, match=r"options\.method"):
        adapted(recipe, methods=("svd",), settings={"cp": {"sweeps": 9}})
