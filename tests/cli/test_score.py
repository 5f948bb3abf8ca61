"""``tdkit score``: the error of every candidate, printed and saved."""

from __future__ import annotations

import json

import pytest
import torch

from tdkit import builtin
from tdkit.decompositions.cp import Cp

SVD = ("--methods", "svd", "--keeps", "0.5,0.25")


def test_errors_are_the_tails_of_the_singular_values(tdkit, toy, tmp_path) -> None:
    done = tdkit("score", "toy.pt", "--json", "-o", "scores.json", *SVD)
    assert done.status == 0
    value = json.loads(done.stdout)
    assert value == json.loads((tmp_path / "scores.json").read_text())
    assert (value["tdkit_scores"], value["rule"], value["seed"]) == (1, "best", 0)
    candidates = value["candidates"]
    assert [c["layer"] for c in candidates] == ["2", "2", "4", "4"]
    for c in candidates:
        weight = toy.get_submodule(c["layer"]).weight.detach().double()
        # k x k to few channels, then 1 x 1: the output channels against the rest.
        values = torch.linalg.svdvals(weight.flatten(1))
        expected = values[c["rank"] :].norm() / values.norm()
        assert c["errors"] == {"relative-weights": pytest.approx(float(expected), rel=1e-6)}
        assert c["macs_before"] is None
        assert c["params_after"] < c["params_before"]


def test_tables_and_a_default_name(tdkit, toy, tmp_path) -> None:
    metrics = ("--metric", "relative-weights,absolute-weights")
    done = tdkit("score", "toy.pt", *metrics, *SVD, "--input-shape", "1,12,12")
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert "relative-weights" in lines
    assert "absolute-weights" in lines
    assert lines[1].split() == ["layer", "method", "rank", "keep", "error"]
    assert "wrote toy-scores.json, 4 candidates" in lines
    assert done.stderr == ""
    saved = json.loads((tmp_path / "toy-scores.json").read_text())["candidates"]
    assert set(saved[0]["errors"]) == {"relative-weights", "absolute-weights"}
    assert saved[0]["macs_before"] == 144 * 1152


@pytest.mark.usefixtures("toy_plugin")
def test_feature_metrics_take_data(tdkit, toy, tmp_path) -> None:
    features = ("--metric", "relative-features", "--methods", "svd", "--keeps", "0.5")
    done = tdkit("score", "toy.pt", *features)
    assert done.status == 2
    assert "relative-features needs data" in done.stderr
    assert "--data" in done.stderr
    assert not (tmp_path / "toy-scores.json").exists()
    done = tdkit("score", "toy.pt", *features, "--data", "toy-data", "--samples", "8", "--json")
    errors = [c["errors"]["relative-features"] for c in json.loads(done.stdout)["candidates"]]
    assert len(errors) == 2
    assert all(0 < error < 1 for error in errors)


def test_the_same_seed_gives_the_same_scores(tdkit, toy, monkeypatch) -> None:
    # Of the built-in methods, as they come, none draws random numbers.
    monkeypatch.setattr(builtin, "_cp", lambda: Cp(start="uniform"))

    def scores(name: str, seed: str) -> object:
        options = ("--methods", "cp", "--keeps", "0.5", "--seed", seed, "-o", name, "--json")
        return json.loads(tdkit("score", "toy.pt", *options).stdout)["candidates"]

    assert scores("a.json", "1") == scores("b.json", "1") != scores("c.json", "2")


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("--rule", "worst"), 2, "best or proportional"),
        (("--metric", "relative"), 2, "relative-weights"),
        (("--metric", ","), 2, "--metric"),
        (("--methods", "sdv"), 2, "svd"),
        (("-o", "toy.pt", "--force"), 6, "is the input itself"),
        (("-o", "there.json"), 6, "there.json exists"),
        (("-o", "no/folder.json"), 6, "mkdir -p no"),
    ],
)
def test_bad_options(tdkit, toy, tmp_path, arguments, status, says) -> None:
    (tmp_path / "there.json").write_text("mine")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    done = tdkit("score", "toy.pt", *SVD, *arguments)
    assert done.status == status
    assert says in done.stderr
    assert done.stdout == ""
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def work(*args: object, **options: object) -> None:
    raise AssertionError("it went to work")


def test_an_output_that_exists_is_told_before_the_work(tdkit, toy, tmp_path, monkeypatch) -> None:
    (tmp_path / "toy-scores.json").write_text("mine")
    monkeypatch.setattr("tdkit.api.score.score_candidates", work)
    assert tdkit("score", "toy.pt", *SVD).status == 6


def test_an_error_while_scoring_is_not_blamed_on_the_output(tdkit, toy, monkeypatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise OSError("the data set's disk went away")

    monkeypatch.setattr("tdkit.api.score.score_candidates", broken)
    done = tdkit("score", "toy.pt", *SVD)
    assert done.status == 1
    assert "the data set's disk went away" in done.stderr
    assert "cannot be written" not in done.stderr


def test_a_model_with_nothing_to_score_is_refused_with_the_reasons(tdkit, tmp_path) -> None:
    ends = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    torch.save(ends, tmp_path / "ends.pt")
    done = tdkit("score", "ends.pt")
    assert done.status == 5
    assert "no layer of the model can be compressed: the first layer is kept dense" in done.stderr
    assert not (tmp_path / "ends-scores.json").exists()


def test_a_trade_off_is_of_what_compress_considers(tdkit, toy) -> None:
    done = tdkit("score", "toy.pt", "--trade-off", "--input-shape", "1,12,12")
    assert done.status == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["budget", "parameters", "macs", "penalty", "moves"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:] if line}
    report = json.loads(
        tdkit("compress", "toy.pt", "-b", "0.5", "--input-shape", "1,12,12", "--json").stdout
    )
    params, macs, _, moves = rows["0.5"]
    assert int(params.replace(",", "")) == report["params_after"]
    assert int(macs.replace(",", "")) == report["macs_after"]
    assert int(moves) == len(report["moves"])
    assert "out of reach" in lines[-3]
    curve = json.loads(tdkit("score", "toy.pt", "--trade-off", "--json", "--force").stdout)
    assert [point["budget"] for point in curve["points"]][:2] == [0.9, 0.8]
