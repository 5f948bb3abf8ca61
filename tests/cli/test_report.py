"""``tdkit report``: the report of a run folder, without measuring."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from made_up_study import RECIPE, make_results

from tdkit.study.records import Measurement, Results
from tdkit.study.store import Store

SMALL = {"images": 200, "layers": (("conv2", 36864), ("conv3", 73728)), "runs": 2}


def save(results: Results, folder: Path) -> Path:
    plan = [m.trial for m in results.measurements]
    with Store(folder, identity=results.identity, recipe=results.recipe, plan=plan) as store:
        store.set_baseline(results.baseline)
        store.add([m for m in results.measurements if m.images or m.failure])
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    results, _ = make_results(**SMALL)
    first, second, *rest = results.measurements
    failed = Measurement(first.trial, failure="out of memory")
    missing = Measurement(second.trial)
    return save(replace(results, measurements=(failed, missing, *rest)), tmp_path / "run")


def test_it_writes_the_report_and_says_what_matters(tdkit, run) -> None:
    done = tdkit("report", "run", "-o", "made/here")
    assert (done.status, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "A made-up study"
    table = [line.split() for line in lines]
    assert ["error", "τ", "std", "95", "%", "interval", "ceiling", "published"] in table
    row = next(line for line in lines if line.startswith("relative weights "))
    assert row.endswith("0.775 ± 0.023")
    assert ["keep", "τ", "95", "%", "interval", "ceiling", "pairs", "resolved", "verdict"] in table
    for keep in ("0.9", "0.75", "0.5", "0.25", "0.1"):
        assert any(cells[:1] == [keep] for cells in table)
    text = done.stdout.replace("\u00a0", " ")
    for said in ("Which error: ", "From where on: ", "At what cost: ", "1 trial failed",
                 "39 of 40 trials are done"):  # fmt: skip
        assert said in text
    assert lines[-1] == "wrote made/here/report.html"
    made = run.parent / "made" / "here"
    assert (made / "report.html").stat().st_size > 50_000
    assert len([*made.glob("figures/*.png")]) == len([*made.glob("figures/*.svg")]) == 6
    assert (made / "tables" / "correlations.csv").exists()
    assert [path.name for path in run.iterdir() if "report" in path.name] == []


def test_without_a_folder_it_goes_into_the_run(tdkit, tmp_path) -> None:
    text = RECIPE.partition("[[published]]")[0]
    results, _ = make_results(text=text, **{**SMALL, "runs": 1})
    save(replace(results, measurements=results.measurements[:4]), tmp_path / "run")
    (tmp_path / "run" / "report.html").write_text("the one before")
    done = tdkit("report", "run")
    assert (done.status, done.stderr) == (0, "")
    assert "wrote run/report.html" in done.stdout
    assert "published" not in done.stdout
    assert "no standard deviation over runs" in " ".join(done.stdout.split())
    assert (tmp_path / "run" / "report.html").read_text() != "the one before"


def test_a_folder_without_a_run_is_refused(tdkit, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    done = tdkit("report", "empty")
    assert done.status == 4
    assert "empty holds no run" in done.stderr
    assert "tdkit validate" in done.stderr
    assert [*(tmp_path / "empty").iterdir()] == []


def test_an_output_that_cannot_be_is_refused_before_the_work(
    tdkit, run, tmp_path, monkeypatch
) -> None:
    def work(*args: object, **options: object) -> None:
        raise AssertionError("it went to work")

    monkeypatch.setattr("tdkit.study.report.page.analyse", work)
    (tmp_path / "file").write_text("mine")
    done = tdkit("report", "run", "-o", "file")
    assert done.status == 6
    assert "file" in done.stderr
    assert "--output" in done.stderr
    assert (tmp_path / "file").read_text() == "mine"
