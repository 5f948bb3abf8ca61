"""The numbers of the report against plain loops over the measurements."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from made_up_study import make_results

from tdkit.recipes import parse_recipe
from tdkit.study.recipe import StudyRecipe
from tdkit.study.records import Measurement, Results, Trial, pack
from tdkit.study.report.analysis import _trusted as trusted
from tdkit.study.report.analysis import _verdict as verdict
from tdkit.study.report.analysis import analyse
from tdkit.study.report.conclusions import PLANNER, Analysis
from tdkit.study.report.correlation import tau_a

METRIC = "relative-weights"


def conclude(
    results: Results, recipe: StudyRecipe, seed: int = 0, resamples: int = 200
) -> Analysis:
    return analyse(results, recipe, resamples=resamples, rng=np.random.default_rng(seed))


@pytest.fixture(scope="module")
def study() -> tuple[Results, StudyRecipe]:
    return make_results(images=800, runs=3, stages=("before", "after"))


@pytest.fixture(scope="module")
def analysis(study) -> Analysis:
    return conclude(*study)


def of_run(results: Results, stage: str, run: int) -> dict[tuple[str, str, float], Measurement]:
    """What a run consists of: before fine-tuning only cp is random, the others stand for all."""
    found = {}
    for m in results.measurements:
        t = m.trial
        if t.stage == stage and t.run == (run if t.method == "cp" or stage == "after" else 0):
            found[t.layer, t.method, t.keep] = m
    return found


def tau_of(measurements, metric: str = METRIC) -> float:
    errors = np.array([m.errors[metric] for m in measurements])
    return tau_a(errors, np.array([m.performance_error for m in measurements]))


@pytest.mark.parametrize("stage", ["before", "after"])
@pytest.mark.parametrize("metric", [METRIC, "scaled-features"])
def test_figures_1_to_3_are_means_and_deviations_over_runs(study, analysis, stage, metric) -> None:
    results, recipe = study
    runs = [of_run(results, stage, run) for run in range(3)]
    layers, methods = recipe.layers, recipe.methods

    def over(sets) -> list[float]:
        return [
            np.mean([tau_of([run[key] for key in keys], metric) for keys in sets]) for run in runs
        ]

    expected = {
        ("keep", keep): over([[*product(layers, methods, [keep])]]) for keep in recipe.keeps
    }
    expected["all", None] = over([[*product(layers, methods, recipe.focus)]])
    expected["layers", None] = over(
        [[*product(layers, [m], [k])] for m, k in product(methods, recipe.focus)]
    )
    expected["methods", None] = over(
        [[*product([layer], methods, [k])] for layer, k in product(layers, recipe.focus)]
    )
    for (choices, keep), taus in expected.items():
        found = analysis.correlation(stage, choices, metric, keep)
        assert found.tau == pytest.approx(np.mean(taus))
        assert found.std == pytest.approx(np.std(taus, ddof=1))
        assert found.interval.low <= found.tau <= found.interval.high
        assert found.runs == 3
        assert (found.undefined, found.reason) == (0, None)
    assert analysis.correlation(stage, "layers", metric).groups == 9
    assert analysis.correlation(stage, "methods", metric).groups == 15
    assert analysis.correlation(stage, "methods", metric).pairs == 15 * 3
    assert analysis.correlation(stage, "all", metric).pairs == 45 * 44 // 2
    assert (analysis.runs["before"], analysis.runs["after"]) == (3, 3)


def test_what_is_measured_once_stands_for_every_run() -> None:
    # With nothing random there is one run, and no deviation to report.
    methods = (("tucker", 1.0), ("tt", 1.1))
    analysis = conclude(*make_results(images=300, runs=3, methods=methods))
    found = analysis.correlation("before", "all", METRIC)
    assert (analysis.runs["before"], found.runs, found.std) == (1, 1, None)
    assert not math.isnan(found.interval.low)


def test_performance_errors_have_intervals(study, analysis) -> None:
    results, _ = study
    assert [p.trial for p in analysis.points] == [m.trial for m in results.measurements]
    for point, m in zip(analysis.points, results.measurements, strict=True):
        p = 1 - m.bits.mean()
        assert point.performance_error == pytest.approx(p)
        assert point.interval.low <= p <= point.interval.high
        # As wide as a binomial's, give or take what 200 resamples tell.
        width = 2 * 1.96 * math.sqrt(p * (1 - p) / m.images)
        assert point.interval.high - point.interval.low == pytest.approx(width, rel=0.35)
    model = analysis.model
    assert model.accuracy == results.baseline.bits.mean()
    assert model.interval.low < model.accuracy < model.interval.high


def test_the_planners_ranking(study, analysis) -> None:
    results, recipe = study
    dense = 1 - results.baseline.bits.mean()
    against_error, against_loss = [], []
    for run in range(3):
        found = of_run(results, "before", run)
        chosen = [found[key] for key in product(recipe.layers, recipe.methods, recipe.focus)]
        saved = np.array([m.params_before - m.params_after for m in chosen])
        rule = np.array([m.errors[METRIC] ** 2 for m in chosen]) / saved
        truth = np.array([m.performance_error for m in chosen])
        against_error.append(tau_a(rule, truth))
        against_loss.append(tau_a(rule, (truth - dense) / saved))
    found = analysis.correlation("before", "all", PLANNER)
    assert found.tau == pytest.approx(np.mean(against_error))
    loss = analysis.correlation("before", "all", PLANNER, truth="loss per parameter")
    assert loss.tau == pytest.approx(np.mean(against_loss))
    assert loss.std == pytest.approx(np.std(against_loss, ddof=1))
    assert loss.interval.low < loss.tau < loss.interval.high
    assert 0 < loss.ceiling <= 1


@pytest.mark.parametrize("stage", ["before", "after"])
def test_regret_is_the_pick_against_the_best_of_its_size(study, analysis, stage) -> None:
    results, _ = study
    runs = [list(of_run(results, stage, run).values()) for run in range(3)]
    regrets = {regret.saving: regret for regret in analysis.regrets if regret.stage == stage}
    savings = sorted({m.params_before - m.params_after for m in runs[0]})
    assert sorted(regrets) == savings

    def regret(needed: float) -> float:
        lost = []
        for run in runs:
            large = [m for m in run if m.params_before - m.params_after >= needed]
            pick = min(large, key=lambda m: m.errors[METRIC] ** 2)
            lost.append(pick.performance_error - min(m.performance_error for m in large))
        return float(np.mean(lost))

    for needed, found in regrets.items():
        assert found.regret == pytest.approx(regret(needed))
        assert found.regret == pytest.approx(found.pick_error - found.best_error)
        assert found.regret >= 0
        assert found.interval.low <= found.regret <= found.interval.high
        assert found.candidates == sum(m.params_before - m.params_after >= needed for m in runs[0])
    mean = next(m for m in analysis.mean_regrets if m.stage == stage)
    sizes = np.linspace(1, savings[-1], 4000)
    assert mean.regret == pytest.approx(np.mean([regret(size) for size in sizes]), rel=0.02)
    assert mean.worst.regret == max(found.regret for found in regrets.values())


def study_of(errors, wrong, *, images=1000, params=1000, **recipe) -> tuple[Results, StudyRecipe]:
    """A study of layers that are wrong about nested sets of images, by one method at one keep."""
    lines = ['title = "t"', 'model = "m"', 'data = "d"', 'methods = ["svd"]', "keeps = [0.5]"]
    lines += [f'metrics = ["{METRIC}"]', *(f"{key} = {value}" for key, value in recipe.items())]
    text = "\n".join(lines)
    measurements = tuple(
        Measurement(
            Trial(f"l{i}", "svd", 0.5, 3, 0, 0),
            params_before=params,
            params_after=params // 2,
            errors={METRIC: error},
            correct=pack(np.arange(images) >= count),
            images=images,
        )
        for i, (error, count) in enumerate(zip(errors, wrong, strict=True))
    )
    made, _ = make_results(images=images)
    results = replace(made, recipe=text, measurements=measurements, planned=len(measurements))
    return results, parse_recipe(text, StudyRecipe, "the recipe")


def test_a_perfect_error_is_informative_and_costs_nothing() -> None:
    analysis = conclude(*study_of([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [50, 150, 250, 350, 450, 550]))
    found = analysis.correlation("before", "all", METRIC)
    assert (found.tau, found.resolved, found.on_resolved, found.tied) == (1, 1, 1, 0)
    assert found.ceiling == pytest.approx(1, abs=0.01)
    (advice,) = analysis.advice
    assert (advice.metric, advice.trusted) == (METRIC, 0.5)
    assert [at.verdict for at in advice.keeps] == ["informative"]
    assert [m.regret for m in analysis.mean_regrets] == [0]
    assert analysis.regrets[0].pick == analysis.regrets[0].best


def test_a_wrong_error_is_not_informative_and_costs() -> None:
    analysis = conclude(*study_of([0.6, 0.5, 0.4, 0.3, 0.2, 0.1], [50, 150, 250, 350, 450, 550]))
    found = analysis.correlation("before", "all", METRIC)
    assert found.tau == found.on_resolved == -1
    (advice,) = analysis.advice
    assert (advice.metric, advice.best, advice.trusted) == (None, METRIC, None)
    assert [at.verdict for at in advice.keeps] == ["not informative"]
    (regret,) = analysis.regrets
    assert (regret.pick.layer, regret.best.layer) == ("l5", "l0")
    assert regret.regret == pytest.approx(0.5)
    assert regret.interval.low > 0.4


def test_what_the_images_cannot_tell_is_noise() -> None:
    rng = np.random.default_rng(0)
    wrong = 100 + rng.integers(0, 3, 12)
    analysis = conclude(*study_of(rng.uniform(size=12), wrong))
    (at,) = analysis.advice[0].keeps
    assert at.verdict == "noise"
    assert at.correlation.resolved < 0.1
    assert at.correlation.tied > 0.2


@pytest.mark.parametrize(
    ("errors", "wrong", "reason"),
    [
        ([0.2, 0.2, 0.2], [10, 20, 30], "all approximation errors are equal"),
        ([0.1, 0.2, 0.3], [20, 20, 20], "all performance errors are equal"),
        ([0.1], [20], "fewer than two candidates"),
    ],
)
def test_undefined_taus_are_said_to_be_so(errors, wrong, reason) -> None:
    analysis = conclude(*study_of(errors, wrong))
    for choices, keep in (("all", None), ("layers", None), ("keep", 0.5)):
        found = analysis.correlation("before", choices, METRIC, keep)
        assert (found.undefined, found.reason) == (1, reason)
        assert np.isnan([found.tau, found.interval.low, found.interval.high]).all()
    methods = analysis.correlation("before", "methods", METRIC)
    assert (methods.undefined, methods.groups) == (len(errors), len(errors))
    (advice,) = analysis.advice
    assert (advice.metric, advice.best, advice.trusted) == (None, None, None)
    assert [at.verdict for at in advice.keeps] == ["undefined"]


def test_undefined_groups_are_left_out_of_the_mean() -> None:
    results, recipe = make_results(images=400)
    # All methods do equally badly on conv2 at keep 0.1.
    same = next(m for m in results.measurements if m.trial.keep == 0.1)
    measurements = tuple(
        replace(m, correct=same.correct) if (m.trial.layer, m.trial.keep) == ("conv2", 0.1) else m
        for m in results.measurements
    )
    found = conclude(replace(results, measurements=measurements), recipe)
    found = found.correlation("before", "methods", METRIC)
    assert (found.undefined, found.reason) == (1, "all performance errors are equal")
    keys = of_run(replace(results, measurements=measurements), "before", 0)
    taus = [
        tau_of([keys[layer, method, keep] for method in recipe.methods])
        for layer, keep in product(recipe.layers, recipe.focus)
    ]
    assert found.tau == pytest.approx(np.nanmean(taus))
    # The ceiling is that of the same groups: the one that is left out would pull it down.
    whole = conclude(results, recipe).correlation("before", "methods", METRIC)
    assert found.ceiling > whole.ceiling * (1 - 1 / found.groups) + 1e-9


def test_failed_and_missing_trials_take_part_in_nothing(study) -> None:
    results, recipe = study
    failed = results.measurements[7]
    rest = tuple(m for m in results.measurements if m not in (failed, results.measurements[50]))
    broken = (*rest, Measurement(failed.trial, failure="NaN in the weights"))
    found = conclude(replace(results, measurements=broken), recipe)
    without = conclude(replace(results, measurements=rest), recipe)
    assert [(f.trial, f.reason) for f in found.failures] == [(failed.trial, "NaN in the weights")]
    assert (found.finished, found.planned) == (len(rest) + 1, results.planned)
    # Not even the rank's row is lost, and every number is that of the rest.
    assert found.correlations == without.correlations
    assert found.ranks == conclude(results, recipe).ranks
    assert all(p.trial != failed.trial for p in found.points)


def test_errors_that_are_not_numbers_are_passed_over() -> None:
    results, recipe = study_of([0.1, 0.2, 0.3, math.nan], [50, 150, 250, 10])
    found = conclude(results, recipe).correlation("before", "all", METRIC)
    assert found.tau == 1
    assert found.pairs == 6
    assert all(r.best.layer != "l3" for r in conclude(results, recipe).regrets)


def test_nothing_measured_is_no_error(study) -> None:
    results, recipe = study
    analysis = conclude(replace(results, measurements=()), recipe)
    assert analysis.stages == analysis.correlations == analysis.points == analysis.regrets == ()
    assert (analysis.finished, analysis.planned) == (0, results.planned)


def test_advice_takes_the_first_of_those_that_cannot_be_told_apart() -> None:
    results, recipe = make_results(images=800)
    names = ("first", "second", "wrong")
    rng = np.random.default_rng(0)

    def errors(m: Measurement) -> dict[str, float]:
        p = m.performance_error
        return {"first": p + 0.002 * rng.normal(), "second": p, "wrong": rng.uniform()}

    measured = tuple(replace(m, errors=errors(m)) for m in results.measurements)
    analysis = conclude(
        replace(results, measurements=measured), replace(recipe, metrics=names, published=())
    )
    (advice,) = analysis.advice
    assert (advice.metric, advice.best, advice.as_good) == ("first", "second", ("first", "second"))
    assert {at.correlation.metric for at in advice.keeps} == {"first"}


def test_verdicts_and_trust(analysis) -> None:
    c = analysis.correlation("before", "all", METRIC)

    def of(tau, low, ceiling, resolved):
        interval = replace(c.interval, low=low, high=1.0)
        return verdict(replace(c, tau=tau, interval=interval, ceiling=ceiling, resolved=resolved))

    assert of(0.5, 0.1, 0.9, 0.9) == "informative"
    assert of(0.4, 0.1, 0.9, 0.9) == "not informative"
    assert of(0.5, -0.1, 0.9, 0.9) == "unclear"
    assert of(0.4, 0.1, 0.9, 0.4) == "noise"
    assert of(math.nan, math.nan, math.nan, 0.9) == "undefined"

    keeps = analysis.advice[0].keeps
    at = {name: replace(keeps[0], verdict=name) for name in ("informative", "noise")}

    def trust(**verdicts: str) -> float | None:
        return trusted([replace(at[v], keep=int(k[1:]) / 100) for k, v in verdicts.items()])

    assert trust(k90="noise", k50="informative", k10="informative") == 0.5
    assert trust(k90="informative", k50="noise", k10="informative") == 0.1
    assert trust(k50="informative", k10="noise") is None
    assert trust() is None


def test_published_values_stand_beside_the_measured(study, analysis) -> None:
    both = {p.paper.stage: p for p in analysis.published}
    assert both["before"].paper.mean == 0.775
    assert both["before"].measured == analysis.correlation("before", "all", METRIC)
    assert both["after"].measured == analysis.correlation("after", "all", METRIC)
    results, recipe = study
    before = tuple(m for m in results.measurements if m.trial.stage == "before")
    both = conclude(replace(results, measurements=before), recipe).published
    assert [p.measured is None for p in both] == [False, True]


def test_figure_5_averages_over_runs(study, analysis) -> None:
    results, recipe = study
    changes = analysis.changes
    assert (changes.method, changes.keep) == ("tucker", 0.5)
    for cell in changes.cells:
        values = [
            m.change[cell.layer]
            for m in results.measurements
            if (m.trial.layer, m.trial.method, m.trial.keep) == (cell.factorized, "tucker", 0.5)
            and m.trial.stage == "after"
        ]
        assert len(values) == 3
        assert cell.change == pytest.approx(np.mean(values))
    assert len(changes.cells) == 25
    other = tuple(m for m in results.measurements if m.trial.method == "tt" and m.trial.keep != 0.5)
    changes = conclude(replace(results, measurements=other), recipe).changes
    assert (changes.method, changes.keep) == ("tt", 0.75)


def test_fine_tuned_at_some_keeps_only(study) -> None:
    results, recipe = study
    some = tuple(
        m for m in results.measurements if m.trial.stage == "before" or m.trial.keep in (0.9, 0.75)
    )
    analysis = conclude(replace(results, measurements=some), recipe)
    assert analysis.correlation("after", "keep", METRIC, 0.1) is None
    # None of the keeps in focus: all there are.
    assert analysis.correlation("after", "all", METRIC).candidates == 30
    assert [at.keep for at in analysis.advice[1].keeps] == [0.9, 0.75]


def test_tables_2_and_3(study, analysis) -> None:
    results, recipe = study
    assert [(row.layer, row.keep) for row in analysis.ranks] == [
        *product(recipe.layers, sorted(recipe.keeps))
    ]
    ranks = {
        (m.trial.layer, m.trial.keep, m.trial.method): m.trial.rank for m in results.measurements
    }
    for row in analysis.ranks:
        assert row.ranks == {
            method: ranks[row.layer, row.keep, method] for method in recipe.methods
        }
    assert analysis.model.numbers == dict(zip(recipe.layers, (2, 4, 6, 8, 10), strict=True))


def test_the_same_seed_gives_the_same_conclusions(study, analysis) -> None:
    assert repr(conclude(*study)) == repr(analysis)
    other = conclude(*study, seed=1)
    assert other.correlations != analysis.correlations
    for ours, theirs in zip(analysis.correlations, other.correlations, strict=True):
        assert ours.tau == theirs.tau
        assert ours.interval.low == pytest.approx(theirs.interval.low, abs=0.25)


def test_candidates_that_save_nothing_are_not_the_planners(study) -> None:
    results, recipe = study
    first = results.measurements[0]
    large = replace(first, params_after=first.params_before + 1, errors={METRIC: 0.0})
    analysis = conclude(replace(results, measurements=(large, *results.measurements[1:])), recipe)
    assert all(r.saving > 0 for r in analysis.regrets)
    assert all(r.pick != large.trial for r in analysis.regrets)
