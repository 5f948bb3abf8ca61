"""``tdkit train``, from a recipe to weights that the other commands take."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

RECIPE = """
model = "toy-net"
data = "toy-data"
seed = 1
epochs = 2
batch_size = 20
output = "trained.safetensors"

[optimizer]
name = "sgd"
learning_rate = 0.05
"""


@pytest.mark.usefixtures("toy_plugin")
def test_training_ends_in_weights_that_compress_takes(tdkit, tmp_path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    done = tdkit("train", "recipe.toml", "--device", "cpu")
    assert done.status == 0
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["epoch", "1/2"], ["epoch", "2/2"]]
    assert lines[-1] == "wrote trained.safetensors and trained.json"
    assert json.loads((tmp_path / "trained.json").read_text())["seed"] == 1
    weights = safetensors.torch.load_file(tmp_path / "trained.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())
    options = ("--methods", "svd", "--batch-size", "1", "-o", "small.safetensors")
    done = tdkit("compress", "trained.safetensors", *options)
    assert done.status == 0
    assert "wrote small.safetensors (safetensors, " in done.stdout


def test_the_shipped_trainings_are_known_by_name_anywhere(tdkit, tmp_path) -> None:
    (tmp_path / "garipov-fashion-mnist.safetensors").touch()
    done = tdkit("train", "garipov-fashion-mnist")
    assert done.status == 6
    assert "garipov-fashion-mnist.safetensors exists" in done.stderr
    done = tdkit("train", "garipov-fashion-mnits")
    assert done.status == 2
    assert "no recipe, and no file, named 'garipov-fashion-mnits'" in done.stderr
    assert "close names: garipov-fashion-mnist" in done.stderr


@pytest.mark.usefixtures("toy_plugin")
@pytest.mark.parametrize(
    ("text", "arguments", "status", "says"),
    [
        (None, (), 4, "recipe.toml"),
        ("epochs = [", (), 2, "recipe.toml is not valid TOML"),
        (RECIPE.replace("seed", "sead"), (), 2, "sead"),
        (RECIPE.replace("toy-net", "toi-net"), (), 2, "toy-net"),
        (RECIPE.replace("toy-data", "toi-data"), (), 2, "toy-data"),
        (RECIPE, ("-o", "weights.pt"), 2, "weights.pt does not end in .safetensors"),
        (RECIPE, ("-o", "no/folder.safetensors"), 6, "mkdir -p no"),
        (RECIPE, ("--device", "tpu"), 2, "cpu, cuda or auto"),
    ],
)
def test_bad_recipes_and_options(tdkit, tmp_path, text, arguments, status, says) -> None:
    if text is not None:
        (tmp_path / "recipe.toml").write_text(text)
    before = {path.name for path in tmp_path.iterdir()}
    done = tdkit("train", "recipe.toml", *arguments)
    assert done.status == status
    assert says in done.stderr
    assert done.stdout == ""
    assert {path.name for path in tmp_path.iterdir()} == before
