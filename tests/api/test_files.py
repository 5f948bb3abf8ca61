"""``tdkit.load`` and ``tdkit.save``: models from files, and into them."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from small_cnn import same
from torch import nn

import tdkit
from tdkit.errors import UnsafeFileError, UsageError


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
