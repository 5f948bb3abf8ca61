"""``--set METHOD.SETTING=VALUE``, and a cost that a plugin brings."""

from __future__ import annotations

import json

import pytest
import torch

CP = ("--methods", "cp", "--keeps", "0.5", "--budget", "0.9", "--input-shape", "1,12,12")


def test_settings_are_set_recorded_and_applied(tdkit, toy, tmp_path) -> None:
    given = ("--set", "cp.sweeps=2", "--set", "cp.start=uniform", "--set", "cp.ridge=1e-8")
    done = tdkit("compress", "toy.pt", *CP, *given, "-o", "small.pt", "--json")
    assert done.status == 0, done.stderr
    settings = {"sweeps": 2, "tolerance": 1e-3, "ridge": 1e-8, "start": "uniform"}
    assert json.loads(done.stdout)["settings"] == {"cp": settings}
    saved = json.loads((tmp_path / "small.pt.plan.json").read_text())
    assert saved["settings"] == {"cp": settings}
    again = tdkit("apply", "small.pt.plan.json", "toy.pt", "-o", "again.pt", *CP[-2:])
    assert again.status == 0
    assert "the plan was made with" not in again.stderr
    one, two = (
        torch.load(tmp_path / name, weights_only=False).state_dict()
        for name in ("small.pt", "again.pt")
    )
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    other = ("apply", "small.pt.plan.json", "toy.pt", "-o", "other.pt", "--set", "cp.sweeps=5")
    done = tdkit(*other, *CP[-2:])
    assert done.status == 0
    told = "note: the plan was made with cp.sweeps=2, and is applied with 5\n"
    assert told in done.stderr


def test_scores_take_settings(tdkit, toy) -> None:
    def errors(*given: str) -> list[float]:
        done = tdkit("score", "toy.pt", *CP[:4], *given, "--json", "--force")
        return [c["errors"]["relative-weights"] for c in json.loads(done.stdout)["candidates"]]

    assert errors("--set", "cp.start=uniform", "--set", "cp.sweeps=1") != errors()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("cp.sweps=2",), "cp has no setting 'sweps'\nhint: it has sweeps, tolerance, ridge, st"),
        (("cp.sweeps=-1",), "the setting sweeps must be at least 0, not -1"),
        (("cp.sweeps=many",), "the setting sweeps of cp is a whole number, not 'many'"),
        (("cp.start=zero",), "unknown start 'zero'"),
        (("tt.sweeps=1",), "there are settings for tt, which is not among the methods"),
        (("cq.sweeps=1",), "no method named 'cq'"),
        (("sweeps=1",), "--set 'sweeps=1' is no setting\nhint: write METHOD.SETTING=VALUE"),
        (("cp.sweeps",), "--set 'cp.sweeps' is no setting"),
        (("cp.sweeps=",), "is no setting"),
        (("cp.sweeps=1", "cp.sweeps=2"), "--set gives cp.sweeps twice"),
    ],
)
@pytest.mark.parametrize("command", ["compress", "score"])
def test_wrong_ones_are_refused(tdkit, toy, tmp_path, command, given, says) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    options = [word for text in given for word in ("--set", text)]
    done = tdkit(command, "toy.pt", *CP[:4], *options)
    assert done.status == 2
    assert f"error: {says}" in done.stderr or says in done.stderr
    assert done.stdout == ""
    assert {path.name for path in tmp_path.iterdir()} == before


BYTES = """
from tdkit.hookspecs import CostRecord, hookimpl


def create():
    from tdkit.costs.base import Cost

    class Bytes(Cost):
        name = "bytes"
        unit = "bytes"

        def of(self, stages, layer):
            return 4 * sum(stage.parameters for stage in stages)

        def total(self, model, layers):
            return 4 * sum(p.numel() for p in model.parameters())

    return Bytes()


@hookimpl
def tdkit_costs():
    return [CostRecord("bytes", "of the parameters", create)]
"""


def test_a_cost_of_an_installed_plugin_is_a_budgets(tdkit, toy, install, tmp_path) -> None:
    assert "no cost named 'bytes'" in tdkit("compress", "toy.pt", "--cost", "bytes").stderr
    install("tdkit-bytes", BYTES)
    options = ("--cost", "bytes", "--methods", "svd", "--input-shape", "1,12,12")
    done = tdkit("compress", "toy.pt", *options, "--batch-size", "1", "-o", "small.pt")
    assert done.status == 0, done.stderr
    row = next(line.split() for line in done.stdout.splitlines() if line.startswith("bytes "))
    small = torch.load(tmp_path / "small.pt", weights_only=False)
    counts = [f"{4 * sum(p.numel() for p in each.parameters()):,}" for each in (toy, small)]
    assert row[1:3] == counts
    plan = json.loads((tmp_path / "small.pt.plan.json").read_text())
    assert plan["cost"] == "bytes"
    assert {move["layer"] for move in plan["moves"]} <= {"2", "4"}
    assert "bytes" in tdkit("plugins").stdout


def test_bounds_beside_the_budget_are_held_and_recorded(tdkit, toy, tmp_path) -> None:
    given = ("--budget", "0.7", "--bound", "macs=60%", "--input-shape", "1,12,12")
    done = tdkit("compress", "toy.pt", *given, "-o", "small.pt", "--json")
    assert done.status == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["bounds"], report["planner"]) == ({"macs": 0.6}, "exact")
    assert report["params_after"] <= 0.7 * report["params_before"]
    assert report["macs_after"] <= 0.6 * report["macs_before"]
    assert json.loads((tmp_path / "small.pt.plan.json").read_text())["bounds"] == {"macs": 0.6}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("macs",), "--bound 'macs' is no bound\nhint: write COST=FRACTION: --bound macs=0.5"),
        (("=0.5",), "--bound '=0.5' is no bound"),
        (("macs=2",), "--bound macs '2' is not a fraction"),
        (("macs=0.5", "macs=0.4"), "--bound bounds macs twice"),
        (("params=0.5",), "there are two bounds on params"),
        (("macs=0.5",), "MACs are unknown without the shape of the input"),
    ],
)
def test_wrong_bounds_are_refused(tdkit, toy, given, says) -> None:
    bounds = [word for each in given for word in ("--bound", each)]
    done = tdkit("compress", "toy.pt", *bounds)
    assert done.status == 2
    assert says in done.stderr
