"""``tdkit distill`` and ``--distill``: as the functions do it, whatever stops it."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch

from tdkit.compression import distillation

pytestmark = pytest.mark.usefixtures("toy_plugin")

DATA = ("--data", "toy-data")
COMPRESS = ("compress", "toy.pt", *DATA, "--methods", "svd", "--budget", "0.6")


def same(one: str, other: str) -> bool:
    a, b = (torch.load(name, weights_only=False).state_dict() for name in (one, other))
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def test_compress_and_apply_and_the_command_make_the_same(tdkit, toy) -> None:
    assert tdkit(*COMPRESS, "-o", "plain.pt").status == 0
    done = tdkit(*COMPRESS, "--distill", "3", "-o", "small.pt")
    assert done.status == 0
    assert done.stdout.count("distillation ") > 2
    assert " steps of distillation: on inputs held back the outputs differ by " in done.stdout
    again = tdkit(
        "apply", "plain.pt.plan.json", "toy.pt", *DATA, "--distill", "3", "-o", "applied.pt"
    )
    assert again.status == 0
    later = tdkit("distill", "plain.pt", "toy.pt", *DATA, "--distill", "3", "--json")
    assert later.status == 0
    report = json.loads(later.stdout)
    assert (report["epochs"], report["seconds"]) == (3, None)
    assert report["divergence_after"] <= report["divergence_before"]
    assert report["output"] == "plain-distilled.pt"
    assert "distillation " in later.stderr
    assert same("small.pt", "applied.pt")
    assert same("small.pt", "plain-distilled.pt")


def test_a_time_and_an_effort_are_options(tdkit, toy) -> None:
    done = tdkit(*COMPRESS, "--distill", "0.2s", "-o", "small.pt", "--json")
    found = json.loads(done.stdout)["distillation"]
    assert (found["epochs"], found["seconds"]) == (None, 0.2)
    assert found["history"][-1]["position"] > 0.5
    none = tdkit(*COMPRESS, "--effort", "best", "--distill", "0", "-o", "best.pt", "--json")
    assert json.loads(none.stdout)["distillation"] is None


@pytest.mark.parametrize("command", [COMPRESS, ("distill", "small.pt", "toy.pt", *DATA)])
def test_the_same_command_goes_on_after_a_stop(tdkit, toy, tmp_path, monkeypatch, command) -> None:
    if command[0] == "distill":
        assert tdkit(*COMPRESS, "-o", "small.pt").status == 0
    how = (*command, "--distill", "4")
    assert tdkit(*how, "-o", "whole.pt").status == 0
    real, left = distillation._Run._step, iter(range(1000))

    def stopping(run, lesson) -> None:
        real(run, lesson)
        if next(left) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    resumed = (*how, "--resume", "state", "-o", "resumed.pt")
    with monkeypatch.context() as patch:
        patch.setattr(distillation._Run, "_step", stopping)
        done = tdkit(*resumed)
    assert done.status == 130
    assert "stopped; the same command goes on after the last epoch, from state" in done.stderr
    assert not (tmp_path / "resumed.pt").exists()
    rest = tdkit(*resumed)
    assert rest.status == 0
    told = [line.split()[1:3] for line in rest.stdout.splitlines() if "divergence" in line]
    assert told[0] == ["50", "%"]
    assert same("whole.pt", "resumed.pt")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--distill", "soon", *DATA), "--distill soon is neither a number of epochs nor a time"),
        (("--distill", "-1", *DATA), "--distill -1 is neither"),
        (("--distill", "20"), "distillation needs inputs, without labels"),
        (("--resume", "state", *DATA), "--finetune 1"),
    ],
)
def test_what_is_wrong_is_refused_before_any_work(tdkit, toy, arguments, said) -> None:
    done = tdkit("compress", "toy.pt", "--input-shape", "1,12,12", *arguments)
    assert done.status == 2
    assert said in done.stderr
