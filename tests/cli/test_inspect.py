"""``tdkit inspect``: every layer, its cost, and why it is kept dense."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

SHAPE = ("--input-shape", "1,12,12")


def test_json_has_the_numbers_worked_out_by_hand(tdkit, toy) -> None:
    done = tdkit("inspect", "toy.pt", "--json", *SHAPE)
    assert done.status == 0
    report = json.loads(done.stdout)
    rows = {row["name"]: row for row in report["layers"]}
    assert list(rows) == ["0", "2", "4", "7"]
    assert [row["parameters"] for row in rows.values()] == [80, 1168, 2320, 170]
    assert [row["macs"] for row in rows.values()] == [144 * 72, 144 * 1152, 144 * 2304, 160]
    assert report["parameters"] == 3738
    assert report["macs"] == 144 * (72 + 1152 + 2304) + 160
    assert rows["2"]["weight"] == [16, 8, 3, 3]
    assert [row["kind"] for row in rows.values()] == ["Conv2d", "Conv2d", "Conv2d", "Linear"]
    reasons = [row["reason"] for row in rows.values()]
    assert reasons == ["the first layer is kept dense", None, None, "the last layer is kept dense"]


def test_the_table_says_yes_or_why_not(tdkit, toy) -> None:
    done = tdkit("inspect", "toy.pt", *SHAPE)
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["layer", "kind", "weight", "parameters", "MACs", "compressible"]
    second = "2 Conv2d 16×8×3×3 1,168 165,888 yes"
    assert " ".join(lines[2].split()) == second
    assert lines[1].endswith("no: the first layer is kept dense")
    assert "4 layers; 3,738 parameters, 93.3 % of them compressible" in lines
    assert "508,192 MACs for one input of 1×12×12" in lines
    assert done.stderr == ""


def test_attention_that_macs_leave_out_is_noted(tdkit, tmp_path) -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.TransformerEncoderLayer(16, 4, 32, batch_first=True))
    torch.save(model, tmp_path / "attends.pt")
    shape = ("--input-shape", "10,6")
    done = tdkit("inspect", "attends.pt", *shape, "--json")
    assert json.loads(done.stdout)["macs_outside"] == 13440
    assert done.stderr.startswith("note: MACs leave out 13,440 per input")
    done = tdkit("compress", "attends.pt", *shape, "--budget", "1", "--batch-size", "1")
    assert "note: MACs leave out 13,440 per input" in done.stderr
    assert "MACs" not in tdkit("inspect", "attends.pt").stderr


def test_a_narrow_terminal_gets_the_reasons_below_the_table(tdkit, toy, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    lines = tdkit("inspect", "toy.pt", *SHAPE).stdout.splitlines()
    assert lines[1].rstrip().endswith("no [1]")
    assert lines[4].rstrip().endswith("no [2]")
    assert lines[6] == "[1] the first layer is kept dense"
    assert lines[7] == "[2] the last layer is kept dense"
    assert max(map(len, lines[:5])) <= 60


def test_a_name_is_never_cut_or_broken(tdkit, tmp_path, monkeypatch) -> None:
    name = "a_layer_of_a_model_by_somebody_who_likes_long_names"
    model = nn.Sequential()
    for place in range(3):
        model.add_module(f"{name}_{place}", nn.Linear(4, 4))
        model.add_module(f"relu_{place}", nn.ReLU())
    torch.save(model, tmp_path / "long.pt")
    monkeypatch.setenv("COLUMNS", "40")
    assert f"\n{name}_1 " in tdkit("inspect", "long.pt").stdout
    # Into a pipe, where nobody says how wide it is, every row is one line.
    monkeypatch.delenv("COLUMNS")
    lines = tdkit("inspect", "long.pt").stdout.splitlines()
    assert lines[1].rstrip().endswith("no: the first layer is kept dense")


def test_without_a_shape_macs_are_dashes_and_the_option_is_named(tdkit, toy) -> None:
    done = tdkit("inspect", "toy.pt")
    assert done.status == 0
    assert "–" in done.stdout.splitlines()[1]
    assert "--input-shape C,H,W" in done.stdout
    report = json.loads(tdkit("inspect", "toy.pt", "--json").stdout)
    assert report["macs"] is None
    assert {row["macs"] for row in report["layers"]} == {None}


def test_options_change_what_is_compressible(tdkit, toy) -> None:
    def open_layers(*arguments: str) -> list[str]:
        report = json.loads(tdkit("inspect", "toy.pt", "--json", *arguments).stdout)
        return [row["name"] for row in report["layers"] if row["reason"] is None]

    assert open_layers() == ["2", "4"]
    assert open_layers("--include-ends") == ["0", "2", "4", "7"]
    assert open_layers("--layers", "4", "--layers", "7") == ["4"]


def test_layers_that_stay_dense_are_listed_with_their_reason(tdkit, tmp_path) -> None:
    shared = nn.Linear(6, 6)
    broken = nn.Linear(6, 6)
    with torch.no_grad():
        broken.weight[0, 0] = torch.nan
    depthwise = nn.Conv1d(6, 6, 3, groups=6)
    ends = nn.Conv1d(6, 6, 3), nn.Linear(6, 6)
    model = nn.Sequential(ends[0], shared, broken, nn.ReLU(), depthwise, shared, ends[1])
    torch.save(model, tmp_path / "odd.pt")
    rows = json.loads(tdkit("inspect", "odd.pt", "--json").stdout)["layers"]
    found = {row["name"]: (row["aliases"], row["reason"]) for row in rows}
    assert found["1"] == (["5"], None)
    assert "NaN" in found["2"][1]
    assert "depthwise" in found["4"][1]
    assert "1 = 5" in tdkit("inspect", "odd.pt").stdout


@pytest.mark.usefixtures("toy_plugin")
def test_notes_about_the_model_go_to_stderr(tdkit) -> None:
    done = tdkit("inspect", "toy-net", "--weights", "none", "--json")
    assert done.stderr == "note: toy-net has random weights\n"
    assert json.loads(done.stdout)["parameters"] == 80 + 876 + 130


@pytest.mark.parametrize(
    ("model", "status", "says"),
    [
        ("missing.pt", 4, "missing.pt"),
        ("text.pt", 4, "text.pt"),
        ("relu.pt", 5, "no parameters"),
        ("resnet81", 2, "resnet18"),
    ],
)
def test_bad_models(tdkit, tmp_path, model, status, says) -> None:
    (tmp_path / "text.pt").write_text("no model at all\n" * 20)
    torch.save(nn.Sequential(nn.ReLU()), tmp_path / "relu.pt")
    done = tdkit("inspect", model)
    assert done.status == status
    assert says in done.stderr
    assert done.stdout == ""
