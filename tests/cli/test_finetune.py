"""``tdkit finetune``: better weights or the same, in the format they came in, whatever stops it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tdkit as library
from tdkit.checkpoint import load_model
from tdkit.checkpoint.writing import save_model
from tdkit.datasets.base import Dataset
from tdkit.progress import listening
from tdkit.registry import load_registry
from tdkit.training import loop
from tdkit.training.finetuning import fit
from tdkit.training.loop import Epoch, evaluate
from tdkit.training.recipe import FitRecipe, OptimizerRecipe

PLUGIN = """
from tdkit.hookspecs import DatasetRecord, hookimpl


def data(brightest, root=None, path=None, image_size=None, seed=0):
    import torch

    from tdkit.datasets.base import in_memory_dataset

    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 10
    noise = torch.randint(60, (200, 1, 12, 12), generator=generator)
    images = (noise + brightest * labels.view(-1, 1, 1, 1) // 10).byte()
    half = (images[:100], labels[:100]), (images[100:], labels[100:])
    return in_memory_dataset("grey", tuple("abcdefghij"), *half, seed)


@hookimpl
def tdkit_datasets():
    def record(name, brightest):
        return DatasetRecord(name, "ten greys", lambda **options: data(brightest, **options))

    return [record("grey", 180), record("other-grey", 150)]
"""


@pytest.fixture(autouse=True)
def grey(install, toy_plugin) -> Path:
    """Data that can be learned: the class is the brightness."""
    site: Path = install("tdkit-grey", PLUGIN)
    return site


DATA = ("--data", "grey", "--device", "cpu")
FAST = (*DATA, "--learning-rate", "0.05", "--batch-size", "10")


def grey_data(seed: int = 0) -> Dataset:
    return load_registry().datasets["grey"].create(seed=seed)


def read(path: Path) -> nn.Module:
    model = torch.load(path, weights_only=False)
    assert isinstance(model, nn.Module)
    return model


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    assert list(one.state_dict()) == list(other.state_dict())
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def changed(one: nn.Module, other: nn.Module) -> set[str]:
    theirs = other.state_dict()
    return {
        name for name, value in one.state_dict().items() if not torch.equal(value, theirs[name])
    }


def test_json_is_one_object_with_true_numbers(tdkit, toy, tmp_path) -> None:
    done = tdkit("finetune", "toy.pt", *FAST, "--epochs", "6", "--patience", "6", "--json")
    assert done.status == 0
    report = json.loads(done.stdout)
    tuned, data = read(tmp_path / "toy-finetuned.pt"), grey_data()
    for name, split in (("validation", data.validation), ("accuracy", data.test)):
        assert report[f"{name}_before"] == evaluate(toy, split).accuracy
        assert report[f"{name}_after"] == evaluate(tuned, split).accuracy
    assert report["validation_after"] > report["validation_before"]
    assert report["epochs"] == len(report["history"]) == 6
    best = report["history"][report["best_epoch"] - 1]
    assert best["validation_accuracy"] == report["validation_after"]
    assert (report["learning_rate"], report["batch_size"]) == (0.05, 10)
    assert (report["optimizer"], report["seed"]) == ("sgd", 0)
    assert report["accuracy_images"] == 100
    assert (report["output"], report["format"]) == ("toy-finetuned.pt", "module")
    assert changed(toy, tuned) == set(toy.state_dict())
    assert not any(module.training for module in tuned.modules())
    # Progress and remarks are not for whoever reads the JSON.
    assert "epoch   6/6" in done.stderr


def test_a_person_is_told_loss_accuracy_and_what_is_kept(tdkit, toy) -> None:
    done = tdkit("finetune", "toy.pt", *FAST, "--epochs", "2", "-o", "tuned.pt")
    assert done.status == 0
    lines = done.stdout.splitlines()
    assert lines[0].split()[:2] == ["before", "validation"]
    assert [line.split()[:2] for line in lines[1:3]] == [["epoch", "1/2"], ["epoch", "2/2"]]
    assert len({line.index("validation") for line in lines[:3]}) == 1
    assert all(word in lines[1] for word in ("loss", "validation", "min left"))
    assert "accuracy on 100 test images: " in done.stdout
    assert "wrote tuned.pt (module)" in lines[-1]
    assert done.stderr.startswith("note: learning rate 0.05, as asked for\n")


def test_a_bar_within_the_epoch_is_for_terminals(tdkit, toy, monkeypatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    done = tdkit("finetune", "toy.pt", *FAST, "--epochs", "2", "--json")
    for title in ("epoch 1/2", "epoch 1/2, validating", "epoch 2/2", "epoch 2/2, validating"):
        assert title in done.stderr
    assert json.loads(done.stdout)["epochs"] == 2


class Bar:
    """Notes what a bar of rich would be told."""

    def __init__(self, happened: list[str]) -> None:
        self.happened = happened

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self.happened.append("gone")

    def add_task(self, title: str, total: int | None) -> int:
        self.happened.append(title)
        return 0

    def update(self, task: int, completed: int, total: int | None) -> None:
        self.happened.append("waiting" if total is None else f"{completed} of {total}")


def test_the_bar_is_gone_when_a_line_comes_and_time_is_that_of_whole_epochs(monkeypatch) -> None:
    happened: list[str] = []
    epochs = [Epoch(0, None, 0.5, 0.9, 1.0), Epoch(1, 0.4, 0.5, 0.9, 60.0)]
    state: Any = {"history": [asdict(epoch) for epoch in epochs]}

    def train(*args: Any, on_step: Any, on_epoch: Any, **options: Any) -> None:
        on_epoch(epochs[0], {**state, "history": state["history"][:1]})
        on_step(1, 1, 2)
        on_step(1, 2, 2)
        on_epoch(epochs[1], state)
        on_step(2, 1, 2)

    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setattr("tdkit.progress._columns", lambda console: Bar(happened))
    monkeypatch.setattr("tdkit.training.finetuning.train", train)
    recipe = FitRecipe(epochs=3, batch_size=2, optimizer=OptimizerRecipe("sgd", 0.1))
    with listening(True) as update:
        fit(
            nn.Linear(2, 2),
            grey_data(),
            recipe,
            device=torch.device("cpu"),
            seed=0,
            resume=None,
            progress=update,
            say=lambda line: happened.append(line.strip()),
        )
    before, *others = happened
    assert before.split() == ["before", "validation", "90.00", "%"]
    line = "epoch   1/3  loss 0.4000  validation 90.00 %  60 s, 2 min left"
    steps = ["epoch 1/3", "1 of 2", "2 of 2", "gone"]
    validating = ["epoch 1/3, validating", "waiting", "1 of 1", "gone"]
    assert others == [*steps, *validating, line, "epoch 2/3", "1 of 2", "gone"]


def test_weights_that_nothing_improves_are_written_as_they_were(tdkit, toy, tmp_path) -> None:
    slow = (*DATA, "--learning-rate", "1e-30", "--epochs", "9", "--patience", "2")
    done = tdkit("finetune", "toy.pt", *slow)
    assert done.status == 0
    assert "epoch   2/9" in done.stdout
    assert "epoch   3/9" not in done.stdout
    assert "note: no epoch validates better than the weights before, which are kept" in done.stderr
    assert_equal(toy, read(tmp_path / "toy-finetuned.pt"))
    # Nor is anything new known about their training.
    done = tdkit("finetune", "toy-finetuned.pt", *DATA, "--epochs", "1")
    assert "note: learning rate 0.001, the default for sgd" in done.stderr


def test_frozen_parameters_stay_and_are_named(tdkit, toy, tmp_path) -> None:
    toy[0].requires_grad_(False)
    torch.save(toy, tmp_path / "frozen.pt")
    done = tdkit("finetune", "frozen.pt", *FAST, "--epochs", "6", "--patience", "6")
    said = "2 of 8 parameters require no gradient and stay as they are: 0.weight, 0.bias"
    assert f"note: {said}\n" in done.stderr
    tuned = read(tmp_path / "frozen-finetuned.pt")
    assert changed(toy, tuned) == set(toy.state_dict()) - {"0.weight", "0.bias"}
    assert not tuned[0].weight.requires_grad
    torch.save(toy.requires_grad_(False), tmp_path / "frozen.pt")
    torch.save(nn.Sequential(nn.Flatten()), tmp_path / "empty.pt")
    for name in ("frozen.pt", "empty.pt"):
        done = tdkit("finetune", name, *FAST, "--force")
        assert done.status == 5
        assert "nothing to train" in done.stderr


@pytest.mark.parametrize("format", ["module", "state-dict", "safetensors"])
def test_a_compressed_model_stays_one_that_loads(tdkit, images, tmp_path, format) -> None:
    suffix = "safetensors" if format == "safetensors" else "pt"
    small, tuned = f"small.{suffix}", f"small-finetuned.{suffix}"
    source = ("toy-net", "--weights", "none", "--methods", "svd,tucker", "--batch-size", "1")
    assert tdkit("compress", *source, "--format", format, "-o", small).status == 0
    (tmp_path / f"{tuned}.plan.json").write_text("of no concern")
    done = tdkit("finetune", small, *FAST, "--epochs", "6", "--patience", "6")
    assert done.status == 0, done.stderr
    assert f"wrote {tuned} ({format})" in done.stdout
    before, after = library.load(tmp_path / small), library.load(tmp_path / tuned)
    assert [type(module) for module in before.modules()] == [type(m) for m in after.modules()]
    assert changed(before, after) == set(before.state_dict())
    models = load_registry().models
    one, other = (load_model(tmp_path / name, models=models) for name in (small, tuned))
    assert one.plan == other.plan
    assert one.structure == other.structure != {}
    assert other.format == one.format == format
    assert (tmp_path / f"{tuned}.plan.json").read_text() == "of no concern"
    # The next one goes on at the rate that this one ended with.
    done = tdkit("finetune", tuned, *DATA, "--epochs", "1")
    assert "note: learning rate 0.05, the last one of its training" in done.stderr
    assert after(images).shape == (3, 10)


RECIPE = """
model = "toy-net"
data = "grey"
seed = 4
epochs = 3
batch_size = 20
output = "trained.safetensors"
[optimizer]
name = "sgd"
learning_rate = 0.05
[schedule]
name = "multistep"
milestones = [2]
"""


def test_the_last_rate_of_a_training_goes_through_every_file(tdkit, toy, tmp_path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    assert tdkit("train", "recipe.toml", "--device", "cpu").status == 0
    compress = ("--methods", "svd", "--batch-size", "1", "-o", "small.pt")
    assert tdkit("compress", "trained.safetensors", *compress).status == 0
    for name in ("trained.safetensors", "small.pt"):
        done = tdkit("finetune", name, *DATA, "--epochs", "1", "--json", "--force")
        assert "note: learning rate 0.005, the last one of its training" in done.stderr
        report = json.loads(done.stdout)
        assert report["batch_size"] == 20
        # Of the split that validated the training, not of the seed of the fine-tuning.
        validation = grey_data(seed=4).validation
        loaded = library.load(tmp_path / name)
        assert report["validation_before"] == evaluate(loaded, validation).accuracy
    # Which is of the order of the images.
    other = (*DATA, "--epochs", "1", "--json", "--force", "--seed", "1")
    again = json.loads(tdkit("finetune", "small.pt", *other).stdout)
    assert again["history"][0]["loss"] != report["history"][0]["loss"]
    assert again["validation_before"] == report["validation_before"]
    done = tdkit("finetune", "toy.pt", *DATA, "--epochs", "1")
    unknown = "the default for sgd: nothing is known about the training of the model"
    assert f"note: learning rate 0.001, {unknown}\n" in done.stderr


def test_a_training_checkpoint_tells_its_last_rate(tdkit, tmp_path) -> None:
    model = load_registry().models["toy-net"].create()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    checkpoint = {"epoch": 3, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(checkpoint, tmp_path / "last.pt")
    done = tdkit("finetune", "last.pt", "--arch", "toy-net", *DATA, "--epochs", "1", "--json")
    assert done.status == 0, done.stderr
    assert "note: learning rate 0.003, the last one of its training" in done.stderr
    assert json.loads(done.stdout)["optimizer"] == "adam"


EPOCHS = ("--epochs", "5", "--patience", "5", "--resume", "state.pt")


@pytest.mark.parametrize("last", [0, 1, 4])
def test_the_same_command_goes_on_after_a_stop(tdkit, toy, tmp_path, monkeypatch, last) -> None:
    whole = tdkit("finetune", "toy.pt", *FAST, "--epochs", "5", "--patience", "5", "-o", "whole.pt")
    evaluated = iter(range(last + 2))
    real = loop.evaluate

    def stopping(*args, **options):
        # The training's own: one before, then one per epoch.
        if next(evaluated) == last + 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", stopping)
        done = tdkit("finetune", "toy.pt", *FAST, *EPOCHS)
    assert done.status == 130
    assert done.stderr.endswith(
        "\nstopped; the same command goes on after the last epoch, from state.pt\n"
    )
    assert {path.name for path in tmp_path.glob("*.pt")} == {"toy.pt", "whole.pt", "state.pt"}
    resumed = tdkit("finetune", "toy.pt", *FAST, *EPOCHS)
    assert resumed.status == 0
    numbers = [line.split()[1] for line in resumed.stdout.splitlines() if line.startswith("epoch")]
    assert numbers == [f"{number}/5" for number in range(last + 1, 6)]
    assert_equal(read(tmp_path / "whole.pt"), read(tmp_path / "toy-finetuned.pt"))
    kept = [line for line in whole.stdout.splitlines() if line.startswith(("kept", "accuracy"))]
    assert set(kept) <= set(resumed.stdout.splitlines())


def test_without_a_state_a_stop_says_how_there_could_be_one(tdkit, toy, tmp_path, monkeypatch):
    def stop(*args, **options) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop.torch.optim.SGD, "step", stop)
    done = tdkit("finetune", "toy.pt", *FAST)
    assert done.status == 143
    assert done.stderr.endswith("; with --resume FILE a training can go on after a stop\n")
    assert [path.name for path in tmp_path.glob("*.pt")] == ["toy.pt"]


KILLED = """
import os, signal, sys
from tdkit import cli
from tdkit.training import loop
from tdkit.training.finetuning import fit

real, left = loop.evaluate, int(sys.argv.pop(1))

def evaluate(*args, **options):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **options)

loop.evaluate = evaluate
cli.main()
"""


def test_a_killed_process_loses_one_epoch_at_most(tdkit, toy, grey, tmp_path) -> None:
    paths = [str(grey), str(Path(library.__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, "3", "finetune", "toy.pt", *FAST, *EPOCHS]
    killed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "toy-finetuned.pt").exists()
    done = tdkit("finetune", "toy.pt", *FAST, *EPOCHS)
    assert done.status == 0
    assert done.stdout.startswith("epoch   3/5")
    whole = tdkit("finetune", "toy.pt", *FAST, *EPOCHS[:-2], "-o", "whole.pt")
    assert whole.status == 0
    assert_equal(read(tmp_path / "whole.pt"), read(tmp_path / "toy-finetuned.pt"))


@pytest.mark.parametrize(
    ("arguments", "another"),
    [
        (("toy.pt", "--seed", "1"), "choice of options"),
        (("toy.pt", "--learning-rate", "0.1"), "choice of options"),
        (("other.pt",), "model"),
        (("toy.pt", "--data", "other-grey"), "data set"),
    ],
)
def test_the_state_of_another_fine_tuning_is_refused(
    tdkit, toy, tmp_path, arguments, another
) -> None:
    torch.save(nn.Sequential(*toy[:-1], nn.Linear(16, 10)), tmp_path / "other.pt")
    state = ("--epochs", "1", "--resume", "state.pt")
    assert tdkit("finetune", "toy.pt", *FAST, *state, "-o", "tuned.pt").status == 0
    done = tdkit("finetune", *FAST, *state, *arguments, "-o", "again.pt")
    assert done.status == 2
    assert f"state.pt belongs to another {another}" in done.stderr
    assert not (tmp_path / "again.pt").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("toy.pt",), 2, "name some with --data"),
        (
            ("toy.pt", "--data", "image-folder:plain"),
            2,
            "image-folder:plain has no training images",
        ),
        (("toy.pt", *DATA, "--epochs", "0"), 2, "--epochs"),
        (("toy.pt", *DATA, "--batch-size", "1"), 2, "--batch-size"),
        (("toy.pt", *DATA, "--patience", "0"), 2, "--patience"),
        (("toy.pt", *DATA, "--learning-rate", "0"), 2, "learning_rate must be above 0"),
        (("toy.pt", *DATA, "--learning-rate", "nan"), 2, "learning_rate must be"),
        (("toy.pt", *DATA, "--learning-rate", "inf"), 2, "learning_rate must be"),
        (("toy.pt", *DATA, "--optimizer", "sdg"), 2, "it is one of sgd, adam, adamw"),
        (("toy.pt", *DATA, "--autocast", "float16"), 2, "autocast is none or bfloat16"),
        (("toy.pt", *DATA, "--format", "zip"), 2, "unknown format 'zip'"),
        (("toy.pt", *DATA, "-o", "there.pt"), 6, "there.pt exists"),
        (("toy.pt", *DATA, "-o", "toy.pt", "--force"), 6, "toy.pt is the input itself"),
        (("toy.pt", *DATA, "--resume", "toy.pt"), 6, "toy.pt is the input itself"),
        (("toy.pt", *DATA, "--resume", "no/state.pt"), 6, "mkdir -p no"),
        (("toy.pt", *DATA, "--resume", "there.pt"), 4, "there.pt is not a state"),
        (("missing.pt", *DATA), 4, "missing.pt"),
    ],
)
def test_what_cannot_be_done_is_told_before_the_work(
    tdkit, toy, tmp_path, monkeypatch, arguments, status, says
) -> None:
    def work(*args: object, **options: object) -> None:
        raise AssertionError("it went to work")

    from PIL import Image

    (tmp_path / "plain" / "cat").mkdir(parents=True)
    Image.new("L", (12, 12)).save(tmp_path / "plain" / "cat" / "1.png")
    (tmp_path / "there.pt").write_text("mine")
    monkeypatch.setattr("tdkit.training.finetuning.train", work)
    before = {path.name for path in tmp_path.iterdir()}
    done = tdkit("finetune", *arguments)
    assert done.status == status
    assert says in done.stderr
    assert done.stdout == ""
    assert {path.name for path in tmp_path.iterdir()} == before
    assert (tmp_path / "there.pt").read_text() == "mine"


@pytest.mark.parametrize("wrong", ["images", "classes"])
def test_a_model_that_does_not_fit_the_data_is_explained(tdkit, tmp_path, wrong) -> None:
    channels, classes = (3, 10) if wrong == "images" else (1, 7)
    model = load_registry().models["toy-net"].create(channels, classes)
    save_model(model, tmp_path / "net.pt", format="module")
    done = tdkit("finetune", "net.pt", *FAST)
    assert done.status == 2
    wanted = {"images": "images of shape (1, 12, 12)", "classes": "at least 10 classes"}
    assert wanted[wrong] in done.stderr
    assert not (tmp_path / "net-finetuned.pt").exists()


def test_a_training_that_diverges_says_what_to_do(tdkit, toy, tmp_path) -> None:
    done = tdkit("finetune", "toy.pt", *DATA, "--learning-rate", "1e30")
    assert done.status == 1
    assert "the training loss became" in done.stderr
    assert "hint: lower the learning rate\n" in done.stderr
    assert not (tmp_path / "toy-finetuned.pt").exists()
