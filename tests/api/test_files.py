"""``tdkit.load`` and ``tdkit.save``: models from files, and into them."""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from small_cnn import SHAPE, images, network, same
from torch import nn

import tdkit
from tdkit import Plan
from tdkit.checkpoint import load_into, load_model
from tdkit.errors import StorageError, UnsafeFileError, UsageError


def test_load_takes_the_users_word_for_a_class(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "word_nets.py").write_text(
        "from torch import nn\n\nclass Net(nn.Sequential):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    word_nets = importlib.import_module("word_nets")
    model = word_nets.Net(nn.Linear(3, 2))
    torch.save(model, tmp_path / "own.pt")
    with pytest.raises(UnsafeFileError, match="not on tdkit's list"):
        tdkit.load(tmp_path / "own.pt")
    for allowed in (["word_nets:Net"], "word_nets:Net"):
        assert same(tdkit.load(tmp_path / "own.pt", allow_classes=allowed), model)


def test_load_refuses_what_names_no_model_and_what_is_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a Linear does not name a model"):
        tdkit.load(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="not the class Linear"):
        tdkit.load(tmp_path / "model.pt", model=nn.Linear)  # type: ignore[arg-type]


def test_load_rebuilds_what_was_saved(model: nn.Sequential, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(model, path)
    assert same(tdkit.load(path), model)
    torch.save(model.state_dict(), path)
    blank = copy.deepcopy(model)
    for parameter in blank.parameters():
        nn.init.zeros_(parameter)
    assert same(tdkit.load(path, model=blank), model)


FORMATS = {"module": "pt", "state-dict": "pt", "safetensors": "safetensors"}


@pytest.mark.parametrize("format", [*FORMATS, "onnx", "pt2"])
def test_a_compression_is_saved_in_every_format(model, tmp_path, format) -> None:
    done = tdkit.compress(model, 0.7, input_shape=SHAPE, methods="svd", measure=False)
    path = tmp_path / f"small.{FORMATS.get(format, format)}"
    assert done.save(path, format=format) == path
    plan = tmp_path / f"{path.name}.plan.json"
    assert Plan.from_json(json.loads(plan.read_text())) == done.plan
    with pytest.raises(StorageError, match="exists"):
        done.save(path, format=format)
    done.save(path, format=format, force=True)
    x = images()
    expected = done.model.eval()(x)
    if format == "onnx":
        session = onnxruntime.InferenceSession(path)
        found = torch.tensor(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    elif format == "pt2":
        torch.testing.assert_close(torch.export.load(path).module()(x), expected)
    else:
        loaded = tdkit.load(path, model=None if format == "module" else network(9))
        assert same(loaded, done.model)
        assert torch.equal(loaded.eval()(x), expected)


@pytest.mark.parametrize("format", FORMATS)
def test_what_was_trained_on_is_saved_like_its_compression(model, tmp_path, format) -> None:
    done = tdkit.compress(model, 0.7, input_shape=SHAPE, methods="svd", measure=False)
    trained = done.model.train()
    before = copy.deepcopy(trained)
    trained(images(4)).square().sum().backward()
    torch.optim.SGD(trained.parameters(), 0.1).step()
    path = tmp_path / f"trained.{FORMATS[format]}"
    tdkit.save(trained.eval(), path, like=done, format=format)
    loaded = tdkit.load(path, model=None if format == "module" else network(9))
    assert same(loaded, trained)
    assert not same(loaded, before)
    known = load_model(path, models={}) if format == "module" else load_into(network(9), path)
    assert known.plan == json.loads(json.dumps(done.plan.to_json()))
    assert known.structure == done.structure


def test_a_plain_module_is_saved_and_loaded(model, tmp_path) -> None:
    assert tdkit.save(model, tmp_path / "mine.pt") == tmp_path / "mine.pt"
    assert same(tdkit.load(tmp_path / "mine.pt"), model)
    with pytest.raises(StorageError, match="exists"):
        tdkit.save(model, tmp_path / "mine.pt")
    with pytest.raises(UsageError, match="unknown format 'zip'"):
        tdkit.save(model, tmp_path / "mine.zip", format="zip")
    with pytest.raises(UsageError, match="exporting to onnx runs the model"):
        tdkit.save(model, tmp_path / "mine.onnx")
    tdkit.save(model, tmp_path / "mine.pt2", input_shape=SHAPE)
    assert (tmp_path / "mine.pt2").exists()
