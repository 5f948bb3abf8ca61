"""``tdkit compress``: the main job, its report, its formats, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

import tdkit as library
from tdkit.compression import compress as compress_module
from tdkit.compression.applying import Compressed
from tdkit.registry import load_registry
from tdkit.training.loop import evaluate

# Enough for the toy model: one method, one sample per timed pass.
FAST = ("--methods", "svd", "--batch-size", "1")
SHAPE = ("--input-shape", "1,12,12")

KEYS = {
    "budget",
    "cost",
    "params_before",
    "params_after",
    "macs_before",
    "macs_after",
    "accuracy_before",
    "accuracy_after",
    "latency_before_ms",
    "latency_after_ms",
    "seconds",
    "output",
    "plan",
    "moves",
}
MOVE_KEYS = {"layer", "method", "rank", "keep", "params_before", "params_after", "errors"}


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def read(path: Path) -> nn.Module:
    model = torch.load(path, weights_only=False)
    assert isinstance(model, nn.Module)
    return model


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.usefixtures("toy_plugin")
def test_json_is_one_object_with_every_key_and_true_numbers(tdkit, toy, tmp_path) -> None:
    by_weights = ("--metric", "relative-weights", *FAST)
    done = tdkit(
        "compress", "toy.pt", "--json", "--data", "toy-data", "-o", "small.pt", *by_weights
    )
    assert done.status == 0
    report = json.loads(done.stdout)
    assert set(report) >= KEYS
    assert report["budget"] == 0.5
    assert report["cost"] == "params"
    assert report["params_before"] == parameters(toy) == 3738
    assert report["params_after"] == parameters(read(tmp_path / "small.pt")) <= 3738 / 2
    # Three convolutions at 12 x 12 positions, then one Linear.
    assert report["macs_before"] == 144 * (72 + 1152 + 2304) + 160
    assert 0 < report["macs_after"] < report["macs_before"]
    assert 0 <= report["accuracy_before"] <= 1
    assert 0 <= report["accuracy_after"] <= 1
    assert report["accuracy_images"] == 60
    assert min(report["latency_before_ms"], report["latency_after_ms"], report["seconds"]) > 0
    assert report["output_bytes"] == (tmp_path / "small.pt").stat().st_size
    assert (report["output"], report["plan"]) == ("small.pt", "small.pt.plan.json")
    assert report["verified"] is True
    assert report["moves"]
    saved = json.loads((tmp_path / "small.pt.plan.json").read_text())
    for move in report["moves"]:
        # What the module amounts to, refined for its rank; the plan has what was scored.
        assert 0 < move.pop("relative_error") <= move["errors"]["relative-weights"] + 1e-9
    assert saved["moves"] == report["moves"]
    for move in report["moves"]:
        assert set(move) >= MOVE_KEYS
        assert move["params_after"] < move["params_before"]
        assert list(move["errors"]) == ["relative-weights"]
    saving = sum(move["params_before"] - move["params_after"] for move in report["moves"])
    assert saving == report["params_before"] - report["params_after"]


def test_what_was_not_measured_is_null(tdkit, toy) -> None:
    report = json.loads(tdkit("compress", "toy.pt", "--json", "-o", "small.pt", *FAST).stdout)
    assert set(report) >= KEYS
    for key in ("macs_before", "macs_after", "accuracy_before", "latency_after_ms"):
        assert report[key] is None
    assert report["verified"] is False


@pytest.mark.usefixtures("toy_plugin")
def test_the_tables_tell_moves_and_totals(tdkit, toy, tmp_path) -> None:
    done = tdkit("compress", "toy.pt", "--data", "toy-data", "-o", "small.pt", *FAST)
    plan = json.loads((tmp_path / "small.pt.plan.json").read_text())
    lines = [line.split() for line in done.stdout.splitlines()]
    for move in plan["moves"]:
        row = [move["layer"], move["method"], str(move["rank"]), f"{move['params_before']:,}"]
        assert row in [line[:4] for line in lines]
    assert ["parameters", "3,738"] in [line[:2] for line in lines]
    assert "MACs per input" in done.stdout
    assert "file size of the state_dict" in done.stdout
    assert re.search(
        r"\nthe factors are fitted to unlabelled inputs(, the best of 2 plans)?:"
        " on those held back the outputs ",
        done.stdout,
    )
    assert "latency (batch 1, 1 thread, cpu)" in done.stdout
    assert "accuracy (60 images)" in done.stdout
    size = f"{(tmp_path / 'small.pt').stat().st_size / 1e6:.2f} MB"
    assert f"wrote small.pt (module, {size}), plan in small.pt.plan.json" in done.stdout
    # The toy has random weights.
    assert done.stderr.startswith("note: the model's own accuracy, ")
    assert done.stderr.count("\n") == 1
    assert "of 60 images, is near chance for 10 classes" in done.stderr


def test_without_a_shape_it_says_what_is_missing(tdkit, toy) -> None:
    done = tdkit("compress", "toy.pt", "-o", "small.pt", *FAST)
    assert done.status == 0
    assert "MACs" not in done.stdout
    assert "latency" not in done.stdout
    assert done.stderr == ("note: not verified or timed: that takes --input-shape 3,224,224\n")


ODD_FACTORY = """
from torch import nn

class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = (nn.Linear(12, 12) for _ in range(3))
        print("made by a talkative factory")

    def forward(self, x):
        print("run by a talkative model")
        if len(x) > 2:
            raise ValueError("at most two at a time")
        return self.head(self.body(self.stem(x)))
"""


@pytest.fixture
def odd(tmp_path: Path) -> tuple[str, ...]:
    """The arguments for a model that prints, and takes two samples at the most."""
    (tmp_path / "odd_nets.py").write_text(ODD_FACTORY)
    layers = {name: nn.Linear(12, 12) for name in ("stem", "body", "head")}
    torch.save(nn.ModuleDict(layers).state_dict(), tmp_path / "odd.pt")
    return ("compress", "odd.pt", "--arch", "odd_nets:Odd", "--input-shape", "12", "-b", "0.9")


def test_a_model_that_cannot_be_timed_is_written_all_the_same(tdkit, odd, tmp_path) -> None:
    done = tdkit(*odd, "--methods", "svd", "-o", "small.pt")
    assert done.status == 0
    assert "note: not timed on a batch of 32: at most two at a time\n" in done.stderr
    assert "latency" not in done.stdout
    assert parameters(library.load(tmp_path / "small.pt", arch="odd_nets:Odd")) <= 0.9 * 468


def test_a_folder_alone_is_no_data_set(tdkit, toy, tmp_path) -> None:
    (tmp_path / "shapes" / "val").mkdir(parents=True)
    done = tdkit("compress", "toy.pt", "--data", "shapes/val", "-o", "small.pt", *FAST)
    assert done.status == 2
    assert "hint: for images in folders write --data image-folder:shapes/val\n" in done.stderr
    assert "is a folder" in done.stderr


@pytest.mark.usefixtures("toy_plugin")
def test_it_says_what_batchnorm_is_calibrated_on(tdkit, tmp_path) -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10),
    )  # fmt: skip
    torch.save(net.eval(), tmp_path / "net.pt")

    def told(*options: str) -> tuple[str, str]:
        command = ("compress", "net.pt", *options, "-o", "small.pt", "--force", *FAST)
        shown = [line for line in tdkit(*command).stdout.splitlines() if "BatchNorm" in line]
        return json.loads(tdkit(*command, "--json").stdout)["calibration"], *shown

    assert told(*SHAPE) == ("noise", "BatchNorm is calibrated on noise")
    data = ("--data", "toy-data")
    fast = ("--effort", "fast")
    assert told(*data, *fast) == ("data", "BatchNorm is calibrated on training images")
    how, line = told(*data)
    assert how == "data"
    assert re.fullmatch(
        r"the factors are fitted to unlabelled inputs(, the best of 2 plans)?: on those held back"
        r" the outputs differ by \S+ where BatchNorm alone left \S+",
        line,
    )
    assert told(*data, "--calibration", "none") == ("none", "no BatchNorm is calibrated")
    assert told() == ("none", "no BatchNorm is calibrated")


@pytest.mark.parametrize("size", [(), ("--input-shape", "3,12,12")])
def test_a_size_of_images_that_nothing_tells_is_noted(tdkit, tmp_path, size) -> None:
    (tmp_path / "val" / "a").mkdir(parents=True)
    to_pil_image(torch.zeros(3, 12, 12, dtype=torch.uint8)).save(tmp_path / "val" / "a" / "0.png")
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3), nn.Conv2d(12, 12, 3), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(12, 1),
    )  # fmt: skip
    torch.save(net.eval(), tmp_path / "net.pt")
    data = ("--data", "image-folder:val")
    done = tdkit("compress", "net.pt", *data, *size, "-o", "small.pt", *FAST)
    assert done.status == 0
    assert ("brought to 224×224; --input-shape 3,H,W names another\n" in done.stderr) is (
        size == ()
    )
    assert done.stderr.count("note: ") == (not size)


def test_two_formats_of_one_name_keep_their_own_plans(tdkit, toy, tmp_path) -> None:
    for output, budget in (("small.pt", "0.5"), ("small.safetensors", "0.4")):
        assert tdkit("compress", "toy.pt", "-b", budget, *SHAPE, "-o", output, *FAST).status == 0
        plan = json.loads((tmp_path / f"{output}.plan.json").read_text())
        assert plan["budget"] == float(budget)


def test_images_without_labels_give_no_accuracy_and_say_so(tdkit, tmp_path) -> None:
    (tmp_path / "flat").mkdir()
    to_pil_image(torch.zeros(3, 12, 12, dtype=torch.uint8)).save(tmp_path / "flat" / "0.png")
    (tmp_path / "flat_nets.py").write_text(TOY_FACTORY.replace("Conv2d(1,", "Conv2d(3,"))
    layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 10)]
    state = {
        f"{place}.{key}": value
        for place, layer in zip((0, 2, 4, 7), layers, strict=True)
        for key, value in layer.state_dict().items()
    }
    torch.save(state, tmp_path / "flat.pt")
    source = ("flat.pt", "--arch", "flat_nets:make", "--input-shape", "3,12,12")
    done = tdkit("compress", *source, "--data", "image-folder:flat", "-o", "s.pt", *FAST)
    assert done.status == 0
    assert "note: no accuracy: image-folder:flat has no labelled test images\n" in done.stderr
    assert "accuracy" not in done.stdout


def test_stdout_is_for_the_result_whatever_the_model_prints(tdkit, odd) -> None:
    done = tdkit(*odd, "--methods", "svd", "-o", "small.pt", "--json")
    report = json.loads(done.stdout)
    assert report["latency"] is None
    assert report["untimed"] == "not timed on a batch of 32: at most two at a time"
    assert "made by a talkative factory\n" in done.stderr
    assert "run by a talkative model\n" in done.stderr


def test_a_full_disk_behind_stdout_leaves_the_model_and_says_where(toy, tmp_path) -> None:
    command = [sys.executable, "-m", "tdkit", "compress", "toy.pt", *FAST, "-o", "small.pt"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 6
    assert done.stderr == (
        "the model is written to small.pt all the same\n"
        "error: standard output cannot be written: there is no room left\n"
        "hint: free some space where it goes to\n"
    )
    assert files(tmp_path) == {"toy.pt", "small.pt", "small.pt.plan.json"}


def test_the_outputs_name_follows_model_and_budget(tdkit, toy, tmp_path) -> None:
    assert tdkit("compress", "toy.pt", "--budget", "0.40", *FAST).status == 0
    assert files(tmp_path) == {"toy.pt", "toy-0.4.pt", "toy-0.4.pt.plan.json"}


def test_names_are_never_markup(tdkit, toy, tmp_path) -> None:
    done = tdkit("compress", "toy.pt", "-o", "a[red]:smile:b.pt", *FAST)
    assert (
        "wrote a[red]:smile:b.pt (module, 0.02 MB), plan in a[red]:smile:b.pt.plan.json"
        in done.stdout
    )
    assert (tmp_path / "a[red]:smile:b.pt").exists()


@pytest.mark.parametrize("budget", ["50%", " 0.5 ", "0.5", "5e-1"])
def test_a_budget_is_a_fraction_or_a_percentage(tdkit, toy, budget) -> None:
    done = tdkit("compress", "toy.pt", "--budget", budget, "--dry-run", *FAST)
    assert json.loads(done.stdout)["budget"] == 0.5


@pytest.mark.parametrize("budget", ["0", "-1", "nan", "2", "150%", "0%", "inf", "half", ""])
def test_other_budgets_are_explained(tdkit, toy, tmp_path, budget) -> None:
    done = tdkit("compress", "toy.pt", f"--budget={budget}", *FAST)
    assert done.status == 2
    assert f"--budget {budget!r} is not a fraction" in done.stderr
    assert "--budget 0.5 or --budget 50%" in done.stderr
    assert done.stdout == ""
    assert files(tmp_path) == {"toy.pt"}


def test_a_budget_out_of_reach_names_the_smallest_and_that_one_works(tdkit, toy) -> None:
    done = tdkit("compress", "toy.pt", "--budget", "0.01", *FAST)
    assert done.status == 2
    assert "a budget of 0.01 is out of reach: the smallest reachable is 0." in done.stderr
    assert "--include-ends" in done.stderr
    smallest = done.stderr.partition("reachable is ")[2].split()[0]
    done = tdkit("compress", "toy.pt", "--budget", smallest, *FAST)
    assert done.status == 0


def test_a_budget_that_holds_already_replaces_nothing(tdkit, toy, images, tmp_path) -> None:
    done = tdkit("compress", "toy.pt", "--budget", "1", *SHAPE, "-o", "same.pt", *FAST)
    assert done.status == 0
    assert "note: nothing was replaced" in done.stderr
    assert "method" not in done.stdout
    assert torch.equal(read(tmp_path / "same.pt")(images), toy(images))


@pytest.mark.parametrize(
    ("arguments", "wrong", "close"),
    [
        (("toy.pt", "--methods", "svd,tuker"), "'tuker'", "tucker"),
        (("toy.pt", "--metric", "relative-wieghts"), "'relative-wieghts'", "relative-weights"),
        (("toy.pt", "--planner", "gredy"), "'gredy'", "greedy"),
        (("toy.pt", "--data", "fashion-mnst"), "'fashion-mnst'", "fashion-mnist"),
        (("toy.pt", "--format", "safetensor"), "'safetensor'", "safetensors"),
        (("toy.pt", "--cost", "flops"), "'flops'", "macs"),
        (("toy.pt", "--device", "gpu"), "'gpu'", "cuda"),
        (("toy.pt", "--layers", "2x"), "'2x'", "2"),
        (("garipv",), "garipv", "garipov"),
        (("resnet18", "--weights", "imagnet"), "imagnet", "imagenet"),
    ],
)
def test_an_unknown_name_lists_close_ones(tdkit, toy, tmp_path, arguments, wrong, close) -> None:
    done = tdkit("compress", *arguments)
    assert done.status == 2
    message, hint = done.stderr.splitlines()
    assert message.startswith("error: ")
    assert wrong in message
    assert hint.startswith("hint: ")
    assert close in hint
    assert done.stdout == ""
    assert files(tmp_path) == {"toy.pt"}


def test_names_are_taken_with_underscores_and_capitals(tdkit, toy) -> None:
    names = ("--metric", "Absolute_Weights", "--planner", "GREEDY", "--methods", "SVD")
    done = tdkit("compress", "toy.pt", *names, "--dry-run")
    assert done.status == 0
    plan = json.loads(done.stdout)
    assert (plan["metric"], plan["planner"]) == ("absolute-weights", "greedy")
    assert list(plan["moves"][0]["errors"]) == ["absolute-weights"]


def test_penalty_and_effort_are_options(tdkit, toy) -> None:
    done = tdkit("compress", "toy.pt", "--penalty", "squares", "--effort", "best", "--dry-run")
    assert done.status == 0
    plan = json.loads(done.stdout)
    assert (plan["penalty"], plan["effort"]) == ("squares", "best")
    wrong = tdkit("compress", "toy.pt", "--effort", "hard")
    assert wrong.status == 2
    assert "unknown effort 'hard'" in wrong.stderr
    assert "fast, default, best" in wrong.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("toy.pt", "--cost", "macs"), 2, "--input-shape"),
        (("toy.pt", "--format", "onnx"), 2, "--input-shape"),
        (("toy.pt", "--metric", "relative-features"), 2, "--data"),
        (("toy.pt", "--calibration", "data"), 2, "--data"),
        (("toy.pt", "--calibration", "magic"), 2, "unknown calibration 'magic'"),
        (("toy.pt", "--methods", ","), 2, "--methods"),
        (("toy.pt", "--keeps", "0.5,2"), 2, "--keeps '2'"),
        (("toy.pt", "--keeps", ""), 2, "--keeps"),
        (("toy.pt", "--input-shape", "12x"), 2, "--input-shape 12x is not a shape"),
        (("toy.pt", "--input-shape", "3,12,12"), 5, "(1, 3, 12, 12)"),
        (("toy.pt", "--data", "image-folder"), 2, "image-folder:PATH"),
        (("toy.pt", "--data", "fashion-mnist:here"), 2, "--data-root"),
        (("missing.pt",), 4, "missing.pt"),
        (("text.pt",), 4, "text.pt"),
        (("empty.pt",), 4, "empty.pt"),
        ((".",), 4, "folder"),
        (("relu.pt",), 5, "no parameters"),
        (("toy.pt", "--seed", "-1"), 2, "--seed"),
    ],
)
def test_what_is_refused_says_what_where_and_the_next_step(
    tdkit, toy, tmp_path, arguments, status, says
) -> None:
    (tmp_path / "text.pt").write_text("no model at all\n" * 20)
    (tmp_path / "empty.pt").touch()
    torch.save(nn.Sequential(nn.ReLU()), tmp_path / "relu.pt")
    before = files(tmp_path)
    done = tdkit("compress", *arguments)
    assert done.status == status
    assert says in done.stderr
    assert done.stdout == ""
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (("--cost", "macs"), 2),
        (("--format", "onnx"), 2),
        (("-o", "there.pt"), 6),
        (("-o", "other.pt"), 6),
    ],
)
def test_what_can_be_told_before_the_work_is(
    tdkit, toy, tmp_path, monkeypatch, arguments, status
) -> None:
    def work(*args: object, **options: object) -> None:
        raise AssertionError("it went to work")

    (tmp_path / "there.pt").write_text("mine")
    (tmp_path / "other.pt.plan.json").write_text("mine")
    monkeypatch.setattr("tdkit.api.compress.compress_model", work)
    assert tdkit("compress", "toy.pt", *arguments, *FAST).status == status


def test_a_file_that_another_run_wrote_meanwhile_is_kept(tdkit, toy, tmp_path, monkeypatch) -> None:
    def compress(*args: Any, **options: Any) -> Compressed:
        (tmp_path / "small.pt").write_text("the other run's")
        return really_compress(*args, **options)

    really_compress = compress_module.compress_model
    monkeypatch.setattr("tdkit.api.compress.compress_model", compress)
    done = tdkit("compress", "toy.pt", "-o", "small.pt", *FAST)
    assert done.status == 6
    assert "small.pt exists" in done.stderr
    assert (tmp_path / "small.pt").read_text() == "the other run's"
    assert not (tmp_path / "small.pt.plan.json").exists()


def test_a_plan_that_finds_no_room_takes_the_model_with_it(
    tdkit, toy, tmp_path, monkeypatch
) -> None:
    def full(path: Path, *args: object, **options: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_text", full)
    done = tdkit("compress", "toy.pt", "-o", "small.pt", *FAST)
    assert done.status == 6
    assert "no room left to write small.pt.plan.json" in done.stderr
    assert files(tmp_path) == {"toy.pt"}


def test_a_device_that_is_not_there(tdkit, toy, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = tdkit("compress", "toy.pt", "--device", "cuda", *FAST)
    assert done.status == 2
    assert "no CUDA device" in done.stderr
    assert "--device cpu" in done.stderr
    assert files(tmp_path) == {"toy.pt"}


def test_an_existing_output_is_kept_unless_forced(tdkit, toy, tmp_path) -> None:
    output, plan = tmp_path / "small.pt", tmp_path / "small.pt.plan.json"
    output.write_text("mine")
    done = tdkit("compress", "toy.pt", "-o", "small.pt", *FAST)
    assert done.status == 6
    assert "small.pt exists" in done.stderr
    assert "--force" in done.stderr
    assert output.read_text() == "mine"
    assert not plan.exists()
    assert tdkit("compress", "toy.pt", "-o", "small.pt", "--force", *FAST).status == 0
    assert parameters(read(output)) < 3738
    output.unlink()
    plan.write_text("mine")
    assert tdkit("compress", "toy.pt", "-o", "small.pt", *FAST).status == 6
    assert plan.read_text() == "mine"
    assert not output.exists()


def test_the_input_is_never_replaced(tdkit, toy, tmp_path) -> None:
    before = (tmp_path / "toy.pt").read_bytes()
    (tmp_path / "link.pt").symlink_to("toy.pt")
    for output in ("toy.pt", "./toy.pt", "link.pt"):
        done = tdkit("compress", "toy.pt", "-o", output, "--force", *FAST)
        assert done.status == 6
        assert "is the input itself" in done.stderr
    assert (tmp_path / "toy.pt").read_bytes() == before


def test_a_folder_that_is_missing(tdkit, toy, tmp_path) -> None:
    done = tdkit("compress", "toy.pt", "-o", "there/small.pt", *FAST)
    assert done.status == 6
    assert "mkdir -p there" in done.stderr
    assert not (tmp_path / "there").exists()


def test_a_full_disk_loses_nothing(tdkit, toy, tmp_path) -> None:
    good = b"a good model" * 100
    (tmp_path / "small.pt").write_bytes(good)
    (tmp_path / "small.pt.plan.json").write_text("its plan")
    before = files(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, hard))
    try:
        done = tdkit("compress", "toy.pt", "-o", "small.pt", "--force", *FAST)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert done.status == 6
    assert "no room left to write small.pt" in done.stderr
    assert "untouched" in done.stderr
    assert (tmp_path / "small.pt").read_bytes() == good
    assert (tmp_path / "small.pt.plan.json").read_text() == "its plan"
    assert files(tmp_path) == before


def test_a_dry_run_prints_the_plan_and_writes_nothing(tdkit, toy, tmp_path) -> None:
    (tmp_path / "toy-0.5.pt").write_text("an earlier result")
    done = tdkit("compress", "toy.pt", "--dry-run", "--seed", "7", *FAST)
    assert done.status == 0
    plan = json.loads(done.stdout)
    assert (plan["tdkit_plan"], plan["seed"], plan["planner"]) == (1, 7, "greedy")
    assert all(set(move) >= MOVE_KEYS for move in plan["moves"])
    assert files(tmp_path) == {"toy.pt", "toy-0.5.pt"}
    assert (tmp_path / "toy-0.5.pt").read_text() == "an earlier result"


def test_layers_and_ends_are_chosen(tdkit, toy) -> None:
    def layers(budget: str, *arguments: str) -> set[str]:
        done = tdkit("compress", "toy.pt", "-b", budget, "--dry-run", *FAST, *arguments)
        return {move["layer"] for move in json.loads(done.stdout)["moves"]}

    assert layers("0.4") == {"2", "4"}
    assert layers("0.75", "--layers", "4") == {"4"}
    assert layers("0.4", "--layers", "2", "--layers", "[4-5]") == {"2", "4"}
    # The last layer, 170 of 3,738 parameters, is only there to be had when it is asked for.
    assert layers("0.98", "--layers", "7", "--include-ends") == {"7"}
    done = tdkit("compress", "toy.pt", "-b", "0.98", "--layers", "7", *FAST, "--dry-run")
    assert done.status == 5
    assert "the last layer is kept dense" in done.stderr
    assert "--include-ends" in done.stderr


def test_compression_is_the_librarys(tdkit, toy, images, tmp_path) -> None:
    options = ("--methods", "cp,tucker", "--seed", "3", "--keeps", "0.6,0.4", *SHAPE)
    assert tdkit("compress", "toy.pt", "-o", "small.pt", *options).status == 0
    done = library.compress(
        toy, 0.5, methods=["cp", "tucker"], seed=3, keeps=(0.6, 0.4), input_shape=(1, 12, 12)
    )
    assert done.plan.moves
    assert torch.equal(read(tmp_path / "small.pt")(images), done.model(images))
    saved = json.loads((tmp_path / "small.pt.plan.json").read_text())
    assert saved == json.loads(json.dumps(done.plan.to_json()))


def test_a_method_of_an_installed_plugin_needs_no_change_in_tdkit(tdkit, toy, tmp_path) -> None:
    pytest.importorskip("tdkit_spatial_svd")
    options = ("--methods", "spatial-svd", "--json", "-o", "small.pt", *SHAPE)
    report = json.loads(tdkit("compress", "toy.pt", *options).stdout)
    assert {move["method"] for move in report["moves"]} == {"spatial-svd"}
    first, second = read(tmp_path / "small.pt").get_submodule("4")
    assert (first.kernel_size, second.kernel_size) == ((3, 1), (1, 3))


@pytest.mark.parametrize("format", ["module", "state-dict", "safetensors", "onnx", "pt2"])
def test_every_format_loads_and_computes_the_same(tdkit, toy, images, tmp_path, format) -> None:
    suffix = {"safetensors": "safetensors", "onnx": "onnx", "pt2": "pt2"}.get(format, "pt")
    torch.save(toy.state_dict(), tmp_path / "weights.pt")
    (tmp_path / "formats_nets.py").write_text(TOY_FACTORY)
    source = ("weights.pt", "--arch", "formats_nets:make", *SHAPE, *FAST)
    assert tdkit("compress", *source, "--format", "module", "-o", "reference.pt").status == 0
    expected = read(tmp_path / "reference.pt")(images)
    assert not torch.equal(expected, toy(images))
    done = tdkit("compress", *source, "--format", format, "-o", f"small.{suffix}")
    assert done.status == 0
    assert f"small.{suffix} ({format}, " in done.stdout
    assert done.stderr == ""
    output = tmp_path / f"small.{suffix}"
    assert output.stat().st_size > 1000
    actual = _run_format(format, output, images)
    if format in ("onnx", "pt2"):
        torch.testing.assert_close(actual, expected)
    else:
        assert torch.equal(actual, expected)


TOY_FACTORY = """
from torch import nn

def make():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )
"""


def _run_format(format: str, path: Path, images: Tensor) -> Tensor:
    with torch.no_grad():
        if format == "onnx":
            session = onnxruntime.InferenceSession(path)
            name = session.get_inputs()[0].name
            return torch.from_numpy(session.run(None, {name: images.numpy()})[0])
        if format == "pt2":
            result: Tensor = torch.export.load(path).module()(images)
            return result
        if format == "module":
            return read(path)(images)
        loaded: Tensor = library.load(path, arch="formats_nets:make")(images)
        return loaded


@pytest.mark.usefixtures("toy_plugin")
def test_a_state_dict_of_a_registered_model_needs_no_arch(tdkit, images, tmp_path) -> None:
    options = ("--weights", "none", "--seed", "5", *FAST)
    assert tdkit("compress", "toy-net", "-o", "whole.pt", *options).status == 0
    small = ("--format", "state-dict", "-o", "small.pt")
    assert tdkit("compress", "toy-net", *small, *options).status == 0
    held = torch.load(tmp_path / "small.pt", weights_only=True)
    assert all(isinstance(value, Tensor) for value in held["state_dict"].values())
    expected = read(tmp_path / "whole.pt")(images)
    assert torch.equal(library.load(tmp_path / "small.pt")(images), expected)


def test_a_state_dict_with_the_users_own_architecture(tdkit, toy, images, tmp_path) -> None:
    (tmp_path / "own_nets.py").write_text(TOY_FACTORY)
    torch.save(toy.state_dict(), tmp_path / "weights.pt")
    options = ("--arch", "own_nets:make", "-o", "small.pt", *SHAPE, *FAST)
    assert tdkit("compress", "weights.pt", *options).status == 0
    small = library.load(tmp_path / "small.pt", arch="own_nets:make")
    assert parameters(small) <= 3738 / 2
    done = tdkit("inspect", "small.pt", "--arch", "own_nets:make", "--json")
    assert json.loads(done.stdout)["parameters"] == parameters(small)
    done = tdkit("compress", "weights.pt", "--arch", "own_nets:mk", "-o", "other.pt", *FAST)
    assert done.status == 2
    assert "own_nets has no mk\nhint: did you mean make?\n" in done.stderr


def test_a_class_of_the_users_own_is_allowed_by_name(tdkit, images, tmp_path, monkeypatch) -> None:
    source = TOY_FACTORY.replace("def make():", "class Net(nn.Module):").replace(
        "    return nn.Sequential(",
        "    def __init__(self):\n        super().__init__()\n        self.body = nn.Sequential(",
    )
    source += "\n    def forward(self, x):\n        return self.body(x) * 2\n"
    (tmp_path / "own_class.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    import own_class  # type: ignore[import-not-found]

    net = own_class.Net().eval()
    torch.save(net, tmp_path / "net.pt")
    done = tdkit("compress", "net.pt", *SHAPE, "-o", "small.pt", *FAST)
    assert done.status == 3
    assert "--allow-class own_class:Net" in done.stderr
    assert not (tmp_path / "small.pt").exists()
    allowed = ("--allow-class", "own_class:Net")
    done = tdkit("compress", "net.pt", *allowed, *SHAPE, "-o", "small.pt", *FAST)
    assert done.status == 0
    small = read(tmp_path / "small.pt")
    assert type(small) is own_class.Net
    assert parameters(small) <= 3738 / 2
    assert small(images).shape == (3, 10)


WITHOUT_TDKIT = """
import sys

import torch
from torch import nn

sys.modules["tdkit"] = None
sys.modules["tensorly"] = None
own = [nn.Sequential, nn.Conv2d, nn.ReLU, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear]
with torch.serialization.safe_globals(own):
    model = torch.load("small.pt", weights_only=True)
try:
    import tdkit
except ImportError:
    torch.save(model(torch.load("images.pt")), "outputs.pt")
"""


def test_a_whole_module_runs_where_tdkit_is_not_installed(tdkit, toy, images, tmp_path) -> None:
    methods = ("--methods", "svd,cp,tucker,tt", "--batch-size", "1")
    assert tdkit("compress", "toy.pt", *SHAPE, "-o", "small.pt", *methods).status == 0
    torch.save(images, tmp_path / "images.pt")
    subprocess.run([sys.executable, "-c", WITHOUT_TDKIT], cwd=tmp_path, check=True)
    outputs = torch.load(tmp_path / "outputs.pt")
    # Another process may use another number of threads, which rounds sums differently.
    torch.testing.assert_close(outputs, read(tmp_path / "small.pt")(images))


def test_progress_is_for_terminals_and_never_in_the_results(tdkit, toy, monkeypatch) -> None:
    done = tdkit("compress", "toy.pt", *SHAPE, "--json", "-o", "quiet.pt", *FAST)
    assert done.stderr == ""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    done = tdkit("compress", "toy.pt", *SHAPE, "--json", "-o", "lively.pt", *FAST)
    assert "scoring" in done.stderr
    assert "replacing, verifying, calibrating" in done.stderr
    assert "measuring" in done.stderr
    assert json.loads(done.stdout)["output"] == "lively.pt"


TUNING = ("--data", "toy-data", "--finetune", "2", "--learning-rate", "0.05")


@pytest.mark.usefixtures("toy_plugin")
@pytest.mark.parametrize("extra", [(), ("--calibration", "none")])
def test_fine_tuning_follows_replacing_and_is_measured(tdkit, tmp_path, extra) -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10),
    )  # fmt: skip
    torch.save(net.eval(), tmp_path / "net.pt")
    plain = ("net.pt", "--data", "toy-data", "-o", "plain.pt", *extra, *FAST)
    assert tdkit("compress", *plain).status == 0
    done = tdkit("compress", "net.pt", *TUNING, *extra, "--json", "-o", "small.pt", *FAST)
    assert done.status == 0
    report = json.loads(done.stdout)
    data = load_registry().datasets["toy-data"].create(seed=0)
    compressed, small = read(tmp_path / "plain.pt"), read(tmp_path / "small.pt")
    for key, model in (("before", net), ("compressed", compressed), ("after", small)):
        assert report[f"accuracy_{key}"] == evaluate(model, data.test).accuracy
    tuning = report["finetuning"]
    assert tuning["validation_before"] == evaluate(compressed, data.validation).accuracy
    assert tuning["validation_after"] == evaluate(small, data.validation).accuracy
    assert (tuning["epochs"], tuning["learning_rate"]) == (2, 0.05)
    assert report["params_after"] == parameters(small) == parameters(compressed)
    assert report["moves"]
    assert "epoch   2/2" in done.stderr
    rate = "note: learning rate 0.05, as asked for\n"
    assert done.stderr.count(rate) == 1
    assert done.stderr.index(rate) < done.stderr.index("epoch   1/2")
    # The same as fine-tuning what compress writes without it.
    same = ("--data", "toy-data", "--epochs", "2", "--learning-rate", "0.05", "-o", "two-steps.pt")
    assert tdkit("finetune", "plain.pt", *same).status == 0
    for name, value in read(tmp_path / "two-steps.pt").state_dict().items():
        assert torch.equal(value, small.state_dict()[name]), name


@pytest.mark.usefixtures("toy_plugin")
def test_fine_tuning_is_told_and_its_weights_are_those_that_load(tdkit, images, tmp_path) -> None:
    source = ("toy-net", "--weights", "none", *TUNING, *FAST)
    done = tdkit("compress", *source, "-o", "whole.pt")
    assert done.status == 0
    assert "accuracy, not fine-tuned (60 images)" in done.stdout
    assert "accuracy, fine-tuned (60 images)" in done.stdout
    assert "epoch   2/2" in done.stdout
    for name in ("small.safetensors", "state.pt"):
        format = "safetensors" if name.endswith("safetensors") else "state-dict"
        assert tdkit("compress", *source, "-o", name, "--format", format).status == 0
        loaded = library.load(tmp_path / name)
        assert torch.equal(loaded(images), read(tmp_path / "whole.pt")(images))


@pytest.mark.usefixtures("toy_plugin")
@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("--finetune", "2"), 2, "name some with --data"),
        (("--finetune", "2", "--data", "image-folder:plain"), 2, "has no training images"),
        (("--finetune", "2", "--data", "image-folder:unlabelled"), 2, "training needs labels"),
        (("--finetune", "0", "--data", "toy-data"), 2, "--finetune"),
        (("--learning-rate", "0.1", "--data", "toy-data"), 2, "--finetune 1"),
        (("--resume", "state.pt", "--data", "toy-data"), 2, "--finetune 1"),
        ((*TUNING, "--resume", "toy.pt"), 6, "toy.pt is the input itself"),
    ],
)
def test_a_fine_tuning_that_cannot_be_done_is_told_before_the_work(
    tdkit, toy, tmp_path, monkeypatch, arguments, status, says
) -> None:
    def work(*args: object, **options: object) -> None:
        raise AssertionError("it went to work")

    for place in ("plain", "unlabelled/train", "unlabelled/val"):
        (tmp_path / place).mkdir(parents=True)
        to_pil_image(torch.zeros(3, 12, 12)).save(tmp_path / place / "1.png")
    monkeypatch.setattr("tdkit.api.compress.compress_model", work)
    done = tdkit("compress", "toy.pt", *arguments, "-o", "small.pt", *FAST)
    assert done.status == status
    assert says in done.stderr
    assert done.stdout == ""


@pytest.mark.usefixtures("toy_plugin")
def test_a_stop_while_fine_tuning_leaves_what_the_same_command_needs(
    tdkit, toy, tmp_path, monkeypatch
) -> None:
    def stop(*args: object, **options: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    assert tdkit("compress", "toy.pt", *TUNING, "-o", "whole.pt", *FAST).status == 0
    again = ("compress", "toy.pt", *TUNING, "--resume", "state.pt", "-o", "small.pt", *FAST)
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", stop)
        done = tdkit(*again)
    assert done.status == 130
    assert "the same command goes on after the last epoch, from state.pt" in done.stderr
    assert not (tmp_path / "small.pt").exists()
    assert not (tmp_path / "small.pt.plan.json").exists()
    assert tdkit(*again).status == 0
    whole = read(tmp_path / "whole.pt").state_dict()
    for name, value in read(tmp_path / "small.pt").state_dict().items():
        assert torch.equal(value, whole[name]), name
