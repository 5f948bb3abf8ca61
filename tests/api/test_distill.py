"""``tdkit.distill``, and the distillation of ``compress`` and ``apply``."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from small_cnn import SHAPE, dataset, images, network, same

import tdkit
from tdkit.errors import UnsupportedError, UsageError

# Of many colours, so that scores are not all alike.
COLOURS = 2 * torch.randn(80, 3, 1, 1, generator=torch.Generator().manual_seed(1))
DATA = list((images(80) + COLOURS).split(8))
CP: dict[str, Any] = {"methods": "cp", "data": DATA, "measure": False}


def test_compress_distils_before_it_writes_and_tells_what_it_gained(model, tmp_path) -> None:
    known = copy.deepcopy(model.state_dict())
    said: list[str] = []
    plain = tdkit.compress(model, 0.4, **CP)
    done = tdkit.compress(
        model, 0.4, distill=9, output=tmp_path / "small.pt", say=said.append, **CP
    )
    assert done.plan == plain.plan
    assert [step.name for step in done.steps] == [*(s.name for s in plain.steps), "distillation"]
    assert done.distilled is not None
    assert done.distilled.before == plain.steps[-1].divergence
    assert done.steps[-1].divergence == done.distilled.after < done.distilled.before
    assert same(tdkit.load(tmp_path / "small.pt"), done.model)
    assert not same(plain.model, done.model)
    assert all(torch.equal(value, known[key]) for key, value in model.state_dict().items())
    told = str(done).splitlines()[-1]
    assert "steps of distillation: on inputs held back the outputs differ by" in told
    assert len(said) == len(done.distilled.history) > 2
    value = json.loads(json.dumps(done.to_json()))
    assert value["distillation"]["steps"] == done.distilled.history[-1].steps
    assert value["steps"][-1] == {"name": "distillation", "divergence": done.distilled.after}
    assert done.training is not None
    assert done.training["distillation"]["epochs"] == 9
    applied = tdkit.apply(plain.plan, model, data=DATA, distill=9, measure=False)
    assert same(applied.model, done.model)


@pytest.mark.parametrize("measure", [False, True])
def test_the_dense_model_of_a_file_teaches_too(model, tmp_path, measure) -> None:
    file = tdkit.save(model, tmp_path / "model.pt")
    options = {**CP, "measure": measure, "batch_size": 2, "distill": 9}
    of_file = tdkit.compress(file, 0.4, allow_classes=(), **options)
    assert same(of_file.model, tdkit.compress(model, 0.4, **options).model)


def test_without_any_calibration_it_distils_all_the_same(model) -> None:
    done = tdkit.compress(model, 0.4, distill=9, calibration="none", **CP)
    assert [step.name for step in done.steps] == ["the factors", "distillation"]
    assert done.steps[1].divergence < done.steps[0].divergence


def test_the_effort_best_distils_for_a_while_unless_told_otherwise(model, monkeypatch) -> None:
    monkeypatch.setattr("tdkit.api.compression.DISTILL", "3")
    usual = tdkit.compress(model, 0.4, effort="best", **CP)
    assert usual.steps[-1].name == "distillation"
    assert usual.distilled is not None
    assert usual.distilled.length.epochs == 3
    none = tdkit.compress(model, 0.4, effort="best", distill=0, **CP)
    assert none.distilled is None
    assert none.steps == usual.steps[:-1]
    applied = tdkit.apply(usual.plan, model, data=DATA, measure=False)
    assert same(applied.model, usual.model)
    assert tdkit.compress(model, 0.4, **CP).distilled is None
    inplace = tdkit.compress(copy.deepcopy(model), 0.4, effort="best", inplace=True, **CP)
    assert inplace.distilled is None
    assert any("not distilled: the dense model is no longer there" in n for n in inplace.notes)
    one = {**CP, "data": DATA[0][:1]}
    alone = tdkit.compress(model, 0.4, effort="best", **one)
    assert any("not distilled: distillation holds a part" in note for note in alone.notes)


def test_a_plan_distils_nothing(model) -> None:
    done = tdkit.compress(model, 0.4, distill=9, dry_run=True, **CP)
    assert done.distilled is None
    assert done.plan == tdkit.compress(model, 0.4, **CP).plan


def test_it_goes_before_a_fine_tuning_and_each_keeps_its_own_state(model, tmp_path) -> None:
    options: dict[str, Any] = {"methods": "cp", "data": dataset(), "measure": False}
    options |= {"distill": 2, "finetune": 1, "learning_rate": 0.01}
    done = tdkit.compress(model, 0.4, resume=tmp_path / "state", **options)
    assert {path.name for path in tmp_path.iterdir()} == {"state", "state.distill"}
    assert done.training is not None
    assert {"distillation", "optimizer"} <= set(done.training) or "distillation" in done.training
    again = tdkit.compress(model, 0.4, resume=tmp_path / "state", **options)
    assert same(again.model, done.model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distill": 9, "input_shape": SHAPE}, "distillation needs inputs"),
        ({"distill": 9, "data": DATA, "inplace": True}, "the dense model is no longer there"),
        ({"distill": "soon", "data": DATA}, "neither a number of epochs nor a time"),
        ({"distill": 9, "data": DATA[:1]}, "there is one batch of them"),
    ],
)
def test_what_cannot_be_distilled_is_refused(model, options, message) -> None:
    one = (
        {**options, "data": options["data"][0][:1]}
        if len(options.get("data", ())) == 1
        else options
    )
    with pytest.raises(UsageError, match=message):
        tdkit.compress(model, 0.4, methods="cp", measure=False, **one)


def test_a_compressed_model_is_distilled_later(model, tmp_path) -> None:
    small = tdkit.compress(model, 0.4, **CP)
    before = copy.deepcopy(small.model)
    done = tdkit.distill(small.model, model, DATA, distill=9, seed=0)
    assert same(small.model, before)
    assert same(done.model, tdkit.compress(model, 0.4, distill=9, **CP).model)
    assert "divergence, inputs held back" in str(done)
    assert done._repr_html_()
    dense, file = tdkit.save(model, tmp_path / "dense.pt"), small.save(tmp_path / "small.pt")
    of_files = tdkit.distill(file, dense, DATA, distill=9, output=tmp_path / "better.pt")
    assert same(of_files.model, done.model)
    assert same(tdkit.load(tmp_path / "better.pt"), done.model)
    value = json.loads(json.dumps(of_files.to_json()))
    assert value["divergence_after"] < value["divergence_before"]
    assert value["output"] == str(tmp_path / "better.pt")


def test_what_tdkit_distill_cannot_do_is_refused(model) -> None:
    with pytest.raises(UsageError, match="nothing to do"):
        tdkit.distill(network(1), model, DATA, distill=0)
    with pytest.raises(UsageError, match="learning_rate"):
        tdkit.distill(network(1), model, DATA, learning_rate=0.0)
    with pytest.raises(UsageError, match="needs inputs"):
        tdkit.distill(network(1), model, None, input_shape=SHAPE)
    with pytest.raises(UnsupportedError, match="nothing to distil"):
        tdkit.distill(network(1).requires_grad_(False), model, DATA, distill=1)
