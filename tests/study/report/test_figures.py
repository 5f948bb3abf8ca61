"""What the figures choose to show; that they can be seen is tested in test_page.py."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from made_up_study import make_results

from tdkit.study.report.analysis import analyse
from tdkit.study.report.conclusions import Analysis, Change, Changes
from tdkit.study.report.figures import (
    PALETTE,
    charts,
    colours,
    figure_1,
    figure_2,
    figure_4_metrics,
    figure_5,
    guide,
    inline,
    markers,
    regret_figure,
)


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    results, recipe = make_results(images=200, runs=2, stages=("before", "after"))
    return analyse(results, recipe, resamples=20, rng=np.random.default_rng(0))


def drawn(chart, place: int = 0) -> str:
    return inline(chart, chart.panels[place], "x")


def test_the_errors_of_figures_1_3_and_4_are_the_papers_where_measured(analysis) -> None:
    assert guide(analysis) == "relative-weights"
    assert figure_4_metrics(analysis) == ("relative-weights", "absolute-weights")
    other = replace(analysis, metrics=("mine", "scaled-features", "third"))
    assert guide(other) == "mine"
    assert figure_4_metrics(other) == ("mine", "scaled-features")


def test_bars_say_their_numbers(analysis) -> None:
    chart = figure_2(analysis)
    assert [panel.title for panel in chart.panels] == ["Before fine-tuning", "After fine-tuning"]
    for stage, place in (("before", 0), ("after", 1)):
        text = drawn(chart, place)
        for metric in analysis.metrics:
            found = analysis.correlation(stage, "all", metric)
            assert f"{found.tau:.3f}±{found.std:.3f}".replace("-", "−") in text
            assert f">{metric.replace('-', ' ')}<" in text
            assert f"τ {found.tau:.2f}".replace("-", "−") in chart.panels[place].alt
        published = next(p.paper for p in analysis.published if p.paper.stage == stage)
        assert f"{published.mean:.3f}±{published.std:.3f}" in text
    labels = [label for label, _ in chart.legend]
    assert labels == ["mean τ", "± std over runs", "95 % interval", "ceiling", "published"]
    assert "published" not in [label for label, _ in figure_1(analysis).legend]


def test_the_page_gets_variables_for_colours_and_text_as_text(analysis) -> None:
    text = drawn(figure_1(analysis))
    for variable in ("--bar", "--ink", "--ceiling", "--font"):
        assert f"var({variable})" in text
    assert ">keep 0.25<" in text
    assert "<style" not in text
    assert "<metadata" not in text


@pytest.mark.parametrize("count", [2, 7, 8, 60])
def test_every_layer_has_a_colour_of_its_own(analysis, count) -> None:
    names = tuple(f"layer{i}" for i in range(count))
    found = colours(replace(analysis, layers=names))
    assert tuple(found) == names
    assert len(set(found.values())) == count
    assert set(found.values()) <= set(PALETTE) or count > len(PALETTE)
    assert len(set(markers(analysis).values())) == 3


@pytest.mark.parametrize("layers", [5, 30])
def test_figure_5_has_numbers_or_a_scale(analysis, layers) -> None:
    names = [f"l{i}" for i in range(layers)]
    cells = tuple(
        Change(a, b, 0.0 if b == "l1" else 0.1 if a == b else 0.001)
        for a in names[:3]
        for b in names
    )
    chart = figure_5(replace(analysis, changes=Changes("tt", 0.25, cells)))
    assert chart.panels[0].title == "tt, keep 0.25"
    # l1 did not change at all, not even where it was factorized.
    assert "the most in 2 of 3 rows" in chart.panels[0].alt
    text = drawn(chart)
    # Three rows of five, less their own cells and those without a change; or a tick of the scale.
    assert text.count(">−3.0<") == (10 if layers == 5 else 1)
    assert text.count(">0<") == (3 if layers == 5 else 0)
    assert (">l28<" in text) == (layers == 30)
    assert figure_5(replace(analysis, changes=None)).panels == ()


def test_figure_6_starts_at_nothing_and_ends_at_the_largest_saving(analysis) -> None:
    chart = regret_figure(analysis)
    mean = analysis.mean_regrets[0]
    assert (
        chart.panels[0].title == f"Before fine-tuning, mean regret {100 * mean.regret:.2f} points"
    )
    largest = max(regret.saving for regret in analysis.regrets) / analysis.model.params
    ticks = [f">{tick}<" for tick in range(0, math.ceil(100 * largest), 5)]
    assert all(tick in drawn(chart) for tick in ticks)


def test_dollar_signs_in_names_are_text() -> None:
    results, recipe = make_results(images=50, layers=(("$x$", 5000), ("b_{", 6000)))
    analysis = analyse(results, recipe, resamples=20, rng=np.random.default_rng(0))
    for chart in charts(analysis):
        drawn(chart)
