"""``tdkit apply``: a plan, as it was printed or as a person edited it, on a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tdkit.api.files import plan_title

SHAPE = ("--input-shape", "1,12,12", "--batch-size", "1")


def weights(path: Path) -> dict[str, torch.Tensor]:
    model = torch.load(path, weights_only=False)
    assert isinstance(model, nn.Module)
    return model.state_dict()


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert list(one) == list(other)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def plan_of(*moves: tuple[str, str, Any], **more: object) -> str:
    entries = [{"layer": layer, "method": method, "rank": r} for layer, method, r in moves]
    return json.dumps({"tdkit_plan": 1, "moves": entries, **more})


@pytest.mark.parametrize("methods", ["svd,tucker,tt", "cp"])
def test_a_dry_run_applied_is_the_compression_bit_for_bit(tdkit, toy, tmp_path, methods) -> None:
    grid = ("--methods", methods, "--keeps", "0.5,0.3,0.2")
    options = (*grid, "--seed", "7", "--budget", "0.4", *SHAPE)
    assert tdkit("compress", "toy.pt", "-o", "direct.pt", *options).status == 0
    (tmp_path / "my.json").write_text(tdkit("compress", "toy.pt", "--dry-run", *options).stdout)
    done = tdkit("apply", "my.json", "toy.pt", "-o", "applied.pt", *SHAPE)
    assert done.status == 0
    assert_equal(weights(tmp_path / "direct.pt"), weights(tmp_path / "applied.pt"))
    # The plan beside the model does the same again.
    assert tdkit("apply", "direct.pt.plan.json", "toy.pt", "-o", "again.pt", *SHAPE).status == 0
    assert_equal(weights(tmp_path / "direct.pt"), weights(tmp_path / "again.pt"))


@pytest.mark.usefixtures("toy_plugin")
def test_a_plan_for_random_weights_finds_the_same_weights(tdkit, tmp_path) -> None:
    random = ("toy-net", "--weights", "none")
    options = ("--methods", "svd", "--seed", "4", "--batch-size", "1")
    assert tdkit("compress", *random, "-o", "one.pt", *options).status == 0
    assert tdkit("apply", "one.pt.plan.json", *random, "-o", "two.pt", *SHAPE).status == 0
    assert_equal(weights(tmp_path / "one.pt"), weights(tmp_path / "two.pt"))
    options = ("--methods", "svd", "--seed", "5", "--batch-size", "1")
    assert tdkit("compress", *random, "-o", "other.pt", *options).status == 0
    assert not torch.equal(
        weights(tmp_path / "one.pt")["0.weight"], weights(tmp_path / "other.pt")["0.weight"]
    )


def test_an_edited_plan_is_followed(tdkit, toy, tmp_path) -> None:
    dry = tdkit("compress", "toy.pt", "--dry-run", "--methods", "svd", "--budget", "0.4")
    plan = json.loads(dry.stdout)
    assert {move["layer"] for move in plan["moves"]} == {"2", "4"}
    plan["moves"] = [move for move in plan["moves"] if move["layer"] == "4"]
    plan["moves"][0]["rank"] = 3
    plan["moves"].append({"layer": "2", "method": "tucker", "rank": [5, 4]})
    (tmp_path / "edited.json").write_text(json.dumps(plan))
    done = tdkit("apply", "edited.json", "toy.pt", "-o", "small.pt", "--json", *SHAPE)
    report = json.loads(done.stdout)
    # 16 -> 3 -> 16 over 3 x 3, then 1 x 1 with bias; 8 -> 4, 4 -> 5 over 3 x 3, 5 -> 16 with bias.
    saved = 2320 - (16 * 3 * 9 + 3 * 16 + 16) + 1168 - (8 * 4 + 4 * 5 * 9 + 5 * 16 + 16)
    assert report["params_after"] == 3738 - saved
    shapes = {name: tuple(value.shape) for name, value in weights(tmp_path / "small.pt").items()}
    assert shapes["4.0.weight"] == (3, 16, 3, 3)
    assert [shapes[f"2.{stage}.weight"][:2] for stage in range(3)] == [(4, 8), (5, 4), (16, 5)]
    assert [move["rank"] for move in report["moves"]] == [3, [5, 4]]


def test_the_plan_is_an_input_and_stays_as_it_is(tdkit, toy, tmp_path) -> None:
    text = plan_of(("4", "svd", 3), note="mine")
    (tmp_path / "small.pt.plan.json").write_text(text)
    done = tdkit("apply", "small.pt.plan.json", "toy.pt", "-o", "small.pt", *SHAPE)
    assert done.status == 0
    assert (tmp_path / "small.pt.plan.json").read_text() == text
    done = tdkit("apply", "small.pt.plan.json", "toy.pt", "-o", "small.pt.plan.json", "--force")
    assert done.status == 6
    assert "is the input itself" in done.stderr
    assert (tmp_path / "small.pt.plan.json").read_text() == text


def test_the_outputs_name_follows_model_and_plan(tdkit, toy, tmp_path) -> None:
    (tmp_path / "third.plan.json").write_text(plan_of(("4", "svd", 3)))
    (tmp_path / "fourth-0.5.pt.plan.json").write_text(plan_of(("4", "svd", 3)))
    assert tdkit("apply", "fourth-0.5.pt.plan.json", "toy.pt").status == 0
    assert (tmp_path / "toy-fourth-0.5.pt").exists()
    done = tdkit("apply", "third.plan.json", "toy.pt")
    assert done.status == 0
    assert (tmp_path / "toy-third.pt").exists()
    assert (tmp_path / "toy-third.pt.plan.json").exists()
    assert "not verified" in done.stderr


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("half-0.5.plan.json", "half-0.5"),
        ("half-0.5.safetensors.plan.json", "half-0.5"),
        ("small.json", "small"),
        ("net.onnx.pt.plan.json", "net.onnx"),
    ],
)
def test_a_plans_title_is_its_name_without_the_models_suffix(name, title) -> None:
    assert plan_title(Path(name)) == title


@pytest.mark.parametrize(
    ("text", "status", "says"),
    [
        (None, 4, "plan.json: No such file"),
        ("layer: 4", 4, "plan.json is not a JSON file"),
        ("{}", 2, "plan.json is not a tdkit plan"),
        ('{"tdkit_plan": 1}', 2, 'no list of "moves"'),
        ('{"tdkit_plan": 1, "moves": [{"layer": "4"}]}', 2, "move 1 has no method, rank"),
        (plan_of(("2", "svd", 3), ("5", "svd", 3)), 2, "close names: "),
        (plan_of(("2", "svd", 0)), 2, "layer '2', svd: rank 0 does not fit"),
        (plan_of(("2", "svd", 999)), 2, "rank 999 does not fit"),
        (plan_of(("2", "svd", [3, 3])), 2, "does not fit"),
        (plan_of(("2", "tucker", 3)), 2, "does not fit"),
        (plan_of(("2", "svd", "many")), 2, "rank 'many'"),
        (plan_of(("2", "svd", True)), 2, "rank True"),
        (plan_of(("2", "sdv", 3)), 2, "did you mean svd"),
        (plan_of(("2", "svd", 3), ("2", "tucker", [3, 3])), 2, "twice"),
        (plan_of(("7", "tucker", [3, 3])), 5, "tucker cannot decompose the layer '7'"),
        (plan_of(("2", "svd", 3), seed="x"), 2, '"seed"'),
    ],
)
def test_a_bad_plan_is_refused(tdkit, toy, tmp_path, text, status, says) -> None:
    if text is not None:
        (tmp_path / "plan.json").write_text(text)
    before = {path.name for path in tmp_path.iterdir()}
    done = tdkit("apply", "plan.json", "toy.pt", "-o", "small.pt", *SHAPE)
    assert done.status == status
    assert says in done.stderr
    assert done.stdout == ""
    assert {path.name for path in tmp_path.iterdir()} == before


def work(*args: object, **options: object) -> None:
    raise AssertionError("it went to work")


def test_an_output_that_exists_is_told_before_the_work(tdkit, toy, tmp_path, monkeypatch) -> None:
    (tmp_path / "plan.json").write_text(plan_of(("4", "svd", 3)))
    (tmp_path / "small.pt").write_text("mine")
    monkeypatch.setattr("tdkit.api.apply.apply_plan", work)
    done = tdkit("apply", "plan.json", "toy.pt", "-o", "small.pt", *SHAPE)
    assert done.status == 6
    assert "small.pt exists" in done.stderr


def test_the_seed_of_a_plan_may_be_any_whole_number(tdkit, toy, tmp_path) -> None:
    (tmp_path / "plan.json").write_text(plan_of(("4", "cp", 3), seed=-(10**30)))
    assert tdkit("apply", "plan.json", "toy.pt", "-o", "small.pt", *SHAPE).status == 0


@pytest.mark.usefixtures("toy_plugin")
def test_a_plan_is_fine_tuned_as_it_is_by_compress(tdkit, toy, tmp_path) -> None:
    tuning = ("--data", "toy-data", "--finetune", "2", "--learning-rate", "0.05")
    options = ("--methods", "svd", "--seed", "3", "--batch-size", "1")
    assert tdkit("compress", "toy.pt", *tuning, *options, "-o", "direct.pt").status == 0
    applied = ("apply", "direct.pt.plan.json", "toy.pt", *tuning, "-o", "applied.pt", *SHAPE)
    done = tdkit(*applied, "--json")
    report = json.loads(done.stdout)
    assert report["finetuning"]["epochs"] == 2
    assert report["accuracy_compressed"] is not None
    assert_equal(weights(tmp_path / "direct.pt"), weights(tmp_path / "applied.pt"))
