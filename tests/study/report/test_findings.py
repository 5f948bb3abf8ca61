"""The sentences that a user reads first, for every kind of outcome."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from made_up_study import make_results

from tdkit.study.report.analysis import analyse
from tdkit.study.report.conclusions import Advice, Analysis
from tdkit.study.report.findings import caveats, findings, listed, metric_name, percent, signed


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    results, recipe = make_results(images=300, stages=("before", "after"))
    return analyse(results, recipe, resamples=50, rng=np.random.default_rng(0))


def said(analysis: Analysis, heading: str, *advice: Advice) -> str:
    changed = replace(analysis, advice=advice or analysis.advice)
    return dict(findings(changed))[heading].replace("\u00a0", " ")


def with_verdicts(advice: Advice, verdicts: str, trusted: float | None) -> Advice:
    """One letter per keep, from 0.9 to 0.1."""
    words = {"i": "informative", "n": "noise", "b": "not informative", "c": "unclear",
             "u": "undefined"}  # fmt: skip
    keeps = tuple(
        replace(at, verdict=words[letter])
        for at, letter in zip(advice.keeps, verdicts, strict=True)
    )
    return replace(advice, keeps=keeps, trusted=trusted)


@pytest.mark.parametrize(
    ("verdicts", "trusted", "expected"),
    [
        ("iiiii", 0.9, "Trust it at every keep."),
        ("nniii", 0.5, "Trust it at keep 0.5 and below; at keep 0.9 and 0.75 candidates differ by"),
        ("niini", 0.1, "at keep 0.1, the smallest; at keep 0.9 and 0.25 candidates differ by less"),
        ("biibb", None, "Trust it at keep 0.75 and 0.5 only; at keep 0.9, 0.25 and 0.1 the images"),
        ("ccccc", None, "Trust it at no single keep by itself; at keep 0.9, 0.75, 0.5, 0.25 and"),
        ("uiiii", 0.75, "at keep 0.9 τ is undefined"),
    ],
)
def test_from_where_on(analysis, verdicts, trusted, expected) -> None:
    advice = with_verdicts(analysis.advice[0], verdicts, trusted)
    assert expected in said(analysis, "From where on", advice)


def test_both_stages_are_said_once_where_they_agree(analysis) -> None:
    before, after = (with_verdicts(a, "nniii", 0.5) for a in analysis.advice)
    text = said(analysis, "From where on", before, after)
    assert text.count("keep 0.5 and below") == text.count("0.9 and 0.75") == 1
    text = said(analysis, "From where on", before, with_verdicts(after, "nnnii", 0.25))
    assert "before fine-tuning at keep 0.5 and below, after fine-tuning at keep 0.25" in text
    assert "after fine-tuning at keep 0.9, 0.75 and 0.5 candidates" in text
    # What holds at one stage only is not said of the other.
    text = said(analysis, "From where on", with_verdicts(before, "iiiii", 0.9), after)
    assert "; after fine-tuning at keep 0.9 and 0.75 candidates" in text


def test_a_group_without_a_tau_is_counted_once_and_not_by_each_error(analysis) -> None:
    def told(*undefined: tuple[str, int]) -> list[str]:
        counts = dict(undefined)
        reason = "all performance errors are equal"
        rest = [c for c in analysis.correlations if c.choices != "methods"]
        groups = [
            replace(c, undefined=counts[c.metric], reason=reason)
            for c in analysis.correlations
            if (c.stage, c.choices) == ("before", "methods") and counts.get(c.metric)
        ]
        changed = replace(analysis, correlations=(*rest, *groups))
        return [text for text in caveats(changed) if "undefined" in text]

    why = "(all performance errors are equal); they are left out of means, not counted as 0."
    assert told() == []
    everywhere = told(*((metric, 3) for metric in analysis.metrics))
    assert everywhere == [f"τ\u00a0is undefined in 3 comparisons by each error {why}"]
    assert told((analysis.metrics[0], 1)) == [
        f"τ\u00a0is undefined in up to 1 comparison by each error {why}"
    ]


def test_which_error(analysis) -> None:
    metric = "relative-weights"
    before, after = (
        replace(a, metric=metric, best=metric, as_good=(metric, "scaled-weights"))
        for a in analysis.advice
    )
    found = analysis.correlation("before", "all", metric)
    text = said(analysis, "Which error", before, after)
    assert text.startswith("Rank by relative weights: of two candidates it names the more accurate")
    assert f"in about {50 * (1 + found.tau):.0f} % of the cases before fine-tuning" in text
    assert f"τ {found.tau:.2f}, 95 % interval " in text
    assert text.endswith("Scaled weights may do as well: these measurements cannot tell.")
    assert "may do" not in said(analysis, "Which error", before, replace(after, as_good=(metric,)))

    every = [replace(a, as_good=analysis.metrics) for a in (before, after)]
    text = said(analysis, "Which error", *every)
    assert text.endswith("These measurements cannot tell any other error from it.")

    other = replace(after, metric="scaled-features", best="scaled-features")
    text = said(analysis, "Which error", before, other)
    assert "Rank by relative weights, which" in text
    assert "Rank by scaled features, which" in text
    text = said(analysis, "Which error", replace(before, metric=None))
    assert text.startswith("Before fine-tuning no error ranks the candidates")
    text = said(analysis, "Which error", replace(before, metric=None, best=None, as_good=()))
    assert text == "Before fine-tuning no τ is defined, so nothing can be said."


def test_at_what_cost(analysis) -> None:
    text = said(analysis, "At what cost")
    for mean in analysis.mean_regrets:
        assert f"{100 * mean.regret:.2f} points of accuracy {mean.stage} fine-tuning" in text
        assert f"at worst {100 * mean.worst.regret:.2f}" in text
    unlabelled = replace(analysis, model=replace(analysis.model, labelled=False))
    assert "points of agreement with the dense model" in said(unlabelled, "At what cost")
    assert "At what cost" not in dict(findings(replace(analysis, mean_regrets=())))


def test_numbers_and_lists() -> None:
    assert signed(-0.058, 3) == "−0.058"
    assert signed(-0.0001) == signed(0.0) == "0.00"
    assert signed(math.nan) == "–"
    assert percent(0.12345) == "12.35"
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b and c"
    assert metric_name("relative-weights") == "relative weights"
    assert metric_name("planner") == "planner's rule"
