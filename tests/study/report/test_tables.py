"""The CSV tables say what the analysis says, in full."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up_study import make_results

from tdkit.study.records import Measurement
from tdkit.study.report.analysis import analyse
from tdkit.study.report.conclusions import Analysis
from tdkit.study.report.tables import rank_text, tables, to_csv

CELLS = st.one_of(st.text(), st.floats(allow_nan=False), st.integers(), st.none())


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    results, recipe = make_results(images=300, runs=2, stages=("before", "after"))
    first, *rest = results.measurements
    failed = Measurement(first.trial, failure="=HYPERLINK(1)")
    results = replace(results, measurements=(failed, *rest))
    return analyse(results, recipe, resamples=50, rng=np.random.default_rng(0))


def read(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def number(text: str) -> float:
    return float(text) if text else math.nan


def test_every_table_is_there(analysis) -> None:
    found = tables(analysis)
    assert set(found) == {
        "correlations", "candidates", "ranks", "keeps", "regret", "published", "changes",
        "failures",
    }  # fmt: skip
    for text in found.values():
        rows = list(csv.reader(io.StringIO(text)))
        assert len({len(row) for row in rows}) == 1
        assert len(set(rows[0])) == len(rows[0])


def test_tables_without_rows_are_left_out() -> None:
    results, recipe = make_results(images=100)
    analysis = analyse(
        replace(results, measurements=results.measurements[:4]),
        replace(recipe, published=()),
        resamples=20,
        rng=np.random.default_rng(0),
    )
    assert set(tables(analysis)) == {"correlations", "candidates", "ranks", "keeps", "regret"}


def test_correlations(analysis) -> None:
    rows = read(tables(analysis)["correlations"])
    assert len(rows) == len(analysis.correlations)
    for row, c in zip(rows, analysis.correlations, strict=True):
        assert (row["stage"], row["choices"], row["metric"]) == (c.stage, c.choices, c.metric)
        assert row["keep"] == ("" if c.keep is None else repr(c.keep))
        assert number(row["tau"]) == pytest.approx(c.tau, nan_ok=True, rel=0)
        assert number(row["low"]) == pytest.approx(c.interval.low, nan_ok=True, rel=0)
        assert number(row["ceiling"]) == pytest.approx(c.ceiling, nan_ok=True, rel=0)
        assert number(row["resolved"]) == pytest.approx(c.resolved, nan_ok=True, rel=0)


def test_candidates(analysis) -> None:
    rows = read(tables(analysis)["candidates"])
    assert len(rows) == len(analysis.points)
    for row, p in zip(rows, analysis.points, strict=True):
        assert (row["layer"], row["method"], row["stage"]) == (
            p.trial.layer,
            p.trial.method,
            p.trial.stage,
        )
        assert row["rank"] == rank_text(p.trial.rank)
        assert int(row["number"]) == analysis.model.numbers[p.trial.layer]
        for metric in analysis.metrics:
            assert float(row[metric]) == p.errors[metric]
        assert float(row["performance_error"]) == p.performance_error
        assert float(row["low"]) <= p.performance_error <= float(row["high"])
        assert int(row["params_after"]) == p.params_after


def test_ranks_keeps_regret_published_changes(analysis) -> None:
    found = {name: read(text) for name, text in tables(analysis).items()}
    assert found["ranks"][0] == {
        "layer": "conv2", "number": "2", "keep": "0.1", "cp": "10", "tucker": "(10, 6)",
        "tt": "(10, 4, 10)",
    }  # fmt: skip
    assert [row["verdict"] for row in found["keeps"]] == [
        at.verdict for advice in analysis.advice for at in advice.keeps
    ]
    for row in found["keeps"]:
        assert float(row["resolved"]) + float(row["unresolved"]) == pytest.approx(1)
    assert [float(row["regret"]) for row in found["regret"]] == [r.regret for r in analysis.regrets]
    assert [float(row["published"]) for row in found["published"]] == [0.775, 0.65]
    for row in found["changes"]:
        change = float(row["mean_relative_change"])
        assert float(row["log10"]) == pytest.approx(math.log10(change))


def test_reasons_are_text_and_no_formula(analysis) -> None:
    (row,) = read(tables(analysis)["failures"])
    assert row["reason"] == "'=HYPERLINK(1)"
    assert (row["layer"], row["method"], row["run"]) == ("conv2", "cp", "0")


@given(st.lists(st.lists(CELLS, min_size=2, max_size=2), min_size=1, max_size=5))
def test_cells_survive(rows) -> None:
    for read_row, row in zip(csv.reader(io.StringIO(to_csv(rows), newline="")), rows, strict=True):
        for text, cell in zip(read_row, row, strict=True):
            if cell is None:
                assert text == ""
            elif isinstance(cell, float):
                assert float(text) == cell
            elif isinstance(cell, str):
                plain = cell.replace("\r\n", "\n").replace("\r", "\n")
                guarded = plain[:1] and plain[0] in "=+-@\t\n"
                assert text == (f"'{plain}" if guarded else plain)
            else:
                assert text == str(cell)


def test_nan_is_an_empty_cell() -> None:
    assert to_csv([(math.nan, 1.5, None, 2)]) == ",1.5,,2\n"
