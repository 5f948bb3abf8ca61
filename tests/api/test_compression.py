"""How ``compress`` and ``apply`` end: nothing of the caller's is moved, trained or kept."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_cnn import SHAPE, dataset, images, network, same
from torch import nn

import tdkit
from tdkit.api.subject import Subject
from tdkit.costs.base import Cost
from tdkit.datasets.base import in_memory_dataset
from tdkit.hookspecs import CostRecord
from tdkit.registry import load_registry

SVD: dict[str, Any] = {"methods": "svd", "keeps": 0.4}
TUNE: dict[str, Any] = {"finetune": 1, "learning_rate": 0.5, "batch_size": 1}


class Fixed(nn.Sequential):
    """A model that cannot be moved without being noticed."""

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        raise AssertionError("the model is moved")


@pytest.fixture
def file(model, tmp_path) -> Any:
    return tdkit.save(model, tmp_path / "model.pt")


@pytest.fixture
def elsewhere(monkeypatch) -> None:
    """The device of the models counts as another one than the one asked for."""
    monkeypatch.setattr("tdkit.opening.pick_device", lambda name: torch.device("meta"))


def test_the_dense_model_of_a_report_is_the_one_before_the_fine_tuning(model, file) -> None:
    labels = torch.arange(60) % 4
    shades = (60 * labels).to(torch.uint8)[:, None, None, None].expand(60, *SHAPE).contiguous()
    data = in_memory_dataset("shades", tuple("abcd"), (shades, labels), (shades, labels), 0)
    options: dict[str, Any] = {"data": data, **SVD, **TUNE, "finetune": 5, "learning_rate": 0.05}
    plain = tdkit.compress(model, 0.8, data=data, batch_size=1, **SVD)
    for source in (model, file):
        tuned = tdkit.compress(source, 0.8, **options)
        assert plain.report.accuracy is not None
        assert tuned.report.accuracy is not None
        assert tuned.report.accuracy[0] == plain.report.accuracy[0]
        assert not same(tuned.model, plain.model)


def test_a_dry_run_and_a_plan_train_and_write_nothing(model, tmp_path) -> None:
    said: list[str] = []
    options: dict[str, Any] = {"data": dataset(), **SVD, **TUNE, "resume": tmp_path / "state"}
    options |= {"output": tmp_path / "small.pt", "say": said.append}
    done = tdkit.compress(model, 0.8, dry_run=True, **options)
    plan = tdkit.plan(model, 0.8, **options)
    assert (done.plan, done.written, done.report.finetuning) == (plan, None, None)
    assert said == []
    assert list(tmp_path.iterdir()) == []
    # What could not be done is refused all the same.
    with pytest.raises(tdkit.errors.UsageError, match="labelled images"):
        tdkit.plan(model, 0.8, input_shape=SHAPE, finetune=1)


def test_the_seed_is_also_that_of_the_fine_tuning(model, monkeypatch) -> None:
    seeds = []
    from tdkit.training import finetuning

    fit = finetuning.fit
    monkeypatch.setattr(
        finetuning, "fit", lambda *a, seed, **k: seeds.append(seed) or fit(*a, seed=seed, **k)
    )
    tdkit.compress(model, 0.8, data=dataset(), seed=7, measure=False, **SVD, **TUNE)
    assert seeds == [7]


def test_writing_leaves_the_model_where_it_is(tmp_path) -> None:
    model = Fixed(*network())
    tdkit.save(model, tmp_path / "module.safetensors")
    done = tdkit.compress(model, 0.8, input_shape=SHAPE, measure=False, **SVD)
    done.save(tmp_path / "small.safetensors")
    done.save(tmp_path / "small.pt", format="state-dict")
    # Fixed raises where it is moved; what is written is the model all the same.
    weights = load_file(tmp_path / "small.safetensors")
    for key, value in done.model.state_dict().items():
        assert torch.equal(weights[key], value)


@pytest.mark.usefixtures("elsewhere")
def test_a_module_that_has_to_move_is_copied(model) -> None:
    before = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    tdkit.inspect(model, device="cuda")
    assert all(not p.is_meta for p in model.parameters())
    now = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    assert now == before


def test_the_dense_model_is_not_kept(file) -> None:
    model = network()
    done = tdkit.compress(model, 0.8, input_shape=SHAPE, measure=False, **SVD)
    dense = weakref.ref(model)
    del model
    gc.collect()
    assert dense() is None
    assert done.opened.model is done.model
    assert done.save(file.with_name("again.pt")).exists()


def test_images_are_read_for_what_looks_at_them_and_once(model, monkeypatch) -> None:
    read = []
    before = Subject._images
    monkeypatch.setattr(
        Subject, "_images", lambda self, *args: read.append(args) or before(self, *args)
    )
    options: dict[str, Any] = {"data": dataset(), "measure": False, **SVD}
    plan = tdkit.compress(model, 0.8, calibration="noise", **options).plan
    tdkit.apply(plan, model, data=dataset(), calibration="noise", measure=False)
    tdkit.score(model, data=dataset(), **SVD)
    assert read == []
    tdkit.compress(model, 0.8, metric="relative-features", **options)
    assert len(read) == 1


def test_scores_of_weights_need_no_copy(model) -> None:
    class Only(nn.Sequential):
        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("the model is copied")

    assert tdkit.score(Only(*model), **SVD).candidates == tdkit.score(model, **SVD).candidates


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = (nn.Linear(16, 16) for _ in range(3))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(self.first(x))
        return self.last(self.attention(x, x, x)[0])


@pytest.mark.parametrize("measure", [True, False])
def test_macs_left_out_are_told_of_files_too(tmp_path, measure) -> None:
    file = tdkit.save(Attending(), tmp_path / "model.pt")
    allowed = f"{Attending.__module__}:Attending"
    options: dict[str, Any] = {"input_shape": (5, 16), "batch_size": 1, **SVD}
    done = tdkit.compress(file, 0.95, allow_classes=allowed, measure=measure, **options)
    assert any(note.startswith("MACs leave out") for note in done.notes)


def test_what_stops_the_measuring_is_told_that_the_model_is_written(
    model, tmp_path, monkeypatch
) -> None:
    def fails(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tdkit.api.compression.measure", fails)
    path = tmp_path / "small.pt"
    with pytest.raises(KeyboardInterrupt) as stopped:
        tdkit.compress(model, 0.8, input_shape=SHAPE, output=path, **SVD)
    assert stopped.value.__notes__ == [f"the model is written to {path} all the same"]
    assert tdkit.load(path).eval()(images()).shape == (2, 4)


class Halves(Cost):
    """Counts what cannot be counted."""

    name = "halves"
    unit = "halves"

    def of(self, stages: Any, layer: Any) -> Any:
        return 0.5

    def total(self, model: Any, layers: Any) -> Any:
        return 1.5


class Doubles(Halves):
    """Twice the parameters."""

    name = "doubles"

    def of(self, stages: Any, layer: Any) -> Any:
        return 2 * sum(stage.parameters for stage in stages)

    def total(self, model: Any, layers: Any) -> Any:
        return 2 * sum(p.numel() for p in model.parameters())


@pytest.fixture
def with_costs(monkeypatch) -> None:
    registry = load_registry()
    mine = {cost.name: CostRecord(cost.name, "a test's", cost) for cost in (Halves, Doubles)}
    more = replace(registry, costs={**registry.costs, **mine})
    for job in ("compress", "score", "apply"):
        monkeypatch.setattr(f"tdkit.api.{job}.load_registry", lambda: more)


@pytest.mark.usefixtures("with_costs")
def test_a_cost_that_nobody_asked_for_stops_no_scoring(model) -> None:
    scores = tdkit.score(model, **SVD)
    assert any(note.startswith("the cost halves is left out") for note in scores.notes)
    assert set(scores.totals) == {"params", "doubles"}


@pytest.mark.usefixtures("with_costs")
def test_what_a_plan_was_made_for_is_reported_when_it_is_applied(model) -> None:
    done = tdkit.compress(model, 0.8, cost="doubles", input_shape=SHAPE, measure=False, **SVD)
    applied = tdkit.apply(done.plan, model, input_shape=SHAPE, measure=False)
    assert applied.report.costs["doubles"] == done.report.costs["doubles"] is not None
    # Where the plugin is no longer there, the usual ones are.
    gone = tdkit.apply(replace(done.plan, cost="gone"), model, measure=False)
    assert set(gone.report.costs) == {"params", "macs"}


def test_scores_can_be_planned_to_be_calibrated_on_data(model) -> None:
    scores = tdkit.score(model, input_shape=SHAPE, **SVD)
    assert tdkit.plan(scores, 0.8).calibration == "noise"
    assert tdkit.plan(scores, 0.8, calibration="data").calibration == "data"
