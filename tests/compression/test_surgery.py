"""Layers replaced in place, and put back when anything goes wrong."""

import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from tdkit.calibration import batchnorm
from tdkit.compression import applying, calibrating, surgery
from tdkit.compression.applying import Applying, Compressed, apply_plan
from tdkit.compression.compress import Goal, compress_model
from tdkit.compression.plan import Move, Plan
from tdkit.compression.scoring import Grid
from tdkit.compression.surgery import Surgery
from tdkit.decompositions.svd import Svd
from tdkit.errors import StorageError, UnsupportedError
from tdkit.forward.copying import shared_copy
from tdkit.layers.inventory import find_layers
from tdkit.layers.traced import TracedModel
from tdkit.layers.weights import FileWeights
from tdkit.metrics.weights import RELATIVE
from tdkit.planners.greedy import greedy


class Model(nn.Module):
    """Layers of several kinds, one of them shared, one frozen, one in channels-last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.first, self.norm = nn.Conv2d(8, 12, 3, bias=False), nn.BatchNorm2d(12)
        self.second, self.after = nn.Conv2d(12, 12, 3), nn.BatchNorm2d(12)
        self.shared = nn.Linear(12, 12)
        self.again = self.shared
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.norm(self.first(self.stem(x).relu())).relu()
        x = self.after(self.second(x)).relu().mean((2, 3))
        return self.head(self.again(self.shared(x).relu()).relu())


def model() -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = Model().eval()
        made.after.running_var.uniform_(0.5, 2)
    made.second.weight.requires_grad_(False)
    made.first.train()
    made.second.to(memory_format=torch.channels_last)
    return made


def images() -> Tensor:
    return torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary files go, of which none is left behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer is verified on its own."""
    monkeypatch.setattr(applying, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(applying, "_BLOCK_SHARE", 10**9)


GRID, GOAL = Grid({"svd": Svd()}, [RELATIVE], (0.2, 0.4)), Goal(0.75)


def compressed(dense: nn.Module, inplace: bool, goal: Goal = GOAL, **options: Any) -> Compressed:
    traced = TracedModel.of(dense, images(), inplace=inplace)
    return compress_model(traced, GRID, goal, greedy, **options)


PLAN = Plan(tuple(Move(name, "svd", 2) for name in ("first", "second", "shared")))


def snapshot(dense: nn.Module) -> dict[str, Any]:
    parameters = dict(dense.named_parameters())
    return {
        "state": {key: value.clone() for key, value in dense.state_dict().items()},
        "modes": [(name, type(m), m.training) for name, m in dense.named_modules()],
        "trained": {name: p.requires_grad for name, p in parameters.items()},
        "strides": {name: p.stride() for name, p in parameters.items()},
        "aliases": [name for name, _ in dense.named_modules(remove_duplicate=False)],
        "output": dense(images()).detach(),
    }


def check(dense: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(dense)
    assert list(after["state"]) == list(before["state"])
    for key, value in before["state"].items():
        assert torch.equal(after["state"][key], value), key
    assert torch.equal(after.pop("output"), before["output"])
    for key in ("modes", "trained", "strides", "aliases"):
        assert after[key] == before[key], key
    dense.train()(images()).sum().backward()
    assert isinstance(dense.get_submodule("first"), nn.Conv2d)
    assert dense.get_parameter("first.weight").grad is not None
    assert dense.get_submodule("shared") is dense.get_submodule("again")


class FaultError(Exception):
    """Not one that anybody catches."""


def late(function: Callable[..., Any], calls: int, error: BaseException) -> Callable[..., Any]:
    """A function that fails after so many calls."""
    made: list[int] = []

    def wrapped(*args: Any, **options: Any) -> Any:
        made.append(1)
        if len(made) > calls:
            raise error
        return function(*args, **options)

    return wrapped


# By name: where the fault is, how many calls go well, and how often that is called.
FAULTS: dict[str, tuple[Any, str, int]] = {
    "factorizing": (applying, "factorize", 2),
    "verifying the first": (applying, "verify", 0),
    "verifying the last": (applying, "verify", 2),
    "replacing": (surgery, "replace_layer", 2),
    "calibrating": (calibrating, "shift_statistics", 0),
    "calibrating the second layer": (batchnorm, "_shift", 1),
    "counting": (applying, "_after", 1),
}


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("error", [FaultError("late"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("name", FAULTS)
def test_after_a_fault_the_model_is_as_it_was(
    name: str, error: BaseException, inplace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = model()
    before = snapshot(dense)
    traced = TracedModel.of(dense, images(), inplace=inplace)
    where, what, calls = FAULTS[name]
    with monkeypatch.context() as patch:
        faulty = late(getattr(where, what), calls, error)
        if what == "replace_layer":
            # Putting back goes the same way: only the one call fails.
            faulty = once(getattr(where, what), calls, error)
        patch.setattr(where, what, faulty)
        expected = (
            UnsupportedError if isinstance(error, FaultError) and what == "factorize" else None
        )
        with pytest.raises(expected or type(error)):
            apply_plan(traced, PLAN, GRID.methods)
    check(traced.model, before)
    assert (traced.model is dense) is inplace
    if not inplace:
        check(dense, before)
    again = apply_plan(TracedModel.of(dense.eval(), images()), PLAN, GRID.methods)
    assert set(again.structure) == {"first", "second", "shared"}


def once(function: Callable[..., Any], calls: int, error: BaseException) -> Callable[..., Any]:
    made: list[int] = []

    def wrapped(*args: Any) -> Any:
        made.append(1)
        if len(made) == calls + 1:
            raise error
        return function(*args)

    return wrapped


@pytest.mark.parametrize("inplace", [True, False])
def test_without_a_fault_the_same_comes_of_both(inplace: bool) -> None:
    want = compressed(model(), inplace=False)
    dense = model()
    have = compressed(dense, inplace)
    assert (have.model is dense) is inplace
    assert have.plan == want.plan
    state = have.model.state_dict()
    assert list(state) == list(want.model.state_dict())
    assert all(torch.equal(state[key], v) for key, v in want.model.state_dict().items())
    assert torch.equal(have.model(images()), want.model(images()))


class Reads(Model):
    """Reads a weight from outside, so that the layer has to be put back."""

    def forward(self, x: Tensor) -> Any:
        x = self.norm(self.first(self.stem(x).relu())).relu()
        x = functional.conv2d(x, self.second.weight, self.second.bias)
        return self.head(self.again(self.shared(self.after(x).mean((2, 3))).relu()).relu())


def reads() -> Reads:
    made = Reads().eval()
    made.load_state_dict(model().state_dict())
    return made


@pytest.mark.usefixtures("blocks")
def test_planning_around_what_is_put_back_is_the_same_in_place() -> None:
    results = [compressed(reads(), inplace) for inplace in (False, True)]
    for result in results:
        assert list(result.put_back) == ["second"]
        assert result.plan.moves
        assert type(result.model.second) is nn.Conv2d
        assert result.verified
    one, other = results
    assert one.plan == other.plan
    assert one.plan.candidates == other.plan.candidates
    assert (one.errors, one.costs, one.put_back) == (other.errors, other.costs, other.put_back)
    state = other.model.state_dict()
    assert all(torch.equal(state[key], v) for key, v in one.model.state_dict().items())


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("inplace", [True, False])
def test_all_or_nothing(inplace: bool) -> None:
    dense = reads()
    before = snapshot(dense)
    traced = TracedModel.of(dense, images(), inplace=inplace)
    with Surgery(traced) as work:
        result = Applying(traced, GRID.methods).of(PLAN, work, all_or_nothing=True)
    assert list(result.put_back) == ["second"]
    after = snapshot(result.model)
    assert all(torch.equal(after["state"][key], v) for key, v in before["state"].items())
    assert list(after["state"]) == list(before["state"])


def test_in_place_dense_weights_wait_in_a_file_and_not_in_memory(folder: Path) -> None:
    dense = model()
    traced = TracedModel.of(dense, inplace=True)
    layer = next(layer for layer in find_layers(dense) if layer.name == "second")
    weight = dense.second.weight.clone()
    with Surgery(traced) as work:
        work.replace(layer, nn.Sequential(nn.Identity()))
        (inside,) = folder.iterdir()
        assert [file.name for file in inside.iterdir()] == ["0.pt"]
        work.undo()
        assert torch.equal(dense.second.weight, weight)
        assert not dense.second.weight.requires_grad
    with pytest.raises(ZeroDivisionError), Surgery(TracedModel.of(dense)) as work:  # noqa: PT012
        work.replace(layer, nn.Sequential(nn.Identity()))
        assert list(folder.iterdir()) == []
        raise ZeroDivisionError


def test_what_waits_for_nothing_is_a_copy_of_the_callers() -> None:
    dense = model()
    traced = TracedModel.of(dense)
    state = copy.deepcopy(dense.state_dict())
    with pytest.raises(ZeroDivisionError), Surgery(traced) as work:  # noqa: PT012
        work.replace(traced.layers[1], nn.Sequential(nn.Identity()))
        raise ZeroDivisionError
    first = traced.model.get_parameter("first.weight")
    assert first is not dense.first.weight
    with torch.no_grad():
        first.zero_()
    assert all(torch.equal(value, state[key]) for key, value in dense.state_dict().items())


def test_in_place_modules_and_parameters_are_the_same_after_undoing() -> None:
    dense = model()
    held = list(dense.parameters())  # as an optimizer does
    dense(images()).sum().backward()
    before = {name: (id(p), p.grad) for name, p in dense.named_parameters()}
    modules = [id(module) for module in dense.modules()]
    state = copy.deepcopy(dense.state_dict())
    traced = TracedModel.of(dense, inplace=True)
    with pytest.raises(ZeroDivisionError), Surgery(traced) as work:  # noqa: PT012
        for layer in traced.layers[1:4]:
            work.replace(layer, nn.Sequential(nn.Identity()))
        raise ZeroDivisionError
    assert {name: (id(p), p.grad) for name, p in dense.named_parameters()} == before
    assert [id(module) for module in dense.modules()] == modules
    assert all(torch.equal(value, state[key]) for key, value in dense.state_dict().items())
    with torch.no_grad():
        for parameter in held:
            parameter.zero_()
    assert not dense.first.weight.any()


def test_memory_is_free_meanwhile_and_who_holds_a_layer_has_it_afterwards() -> None:
    dense = model()
    held, weight = dense.first, dense.first.weight.clone()
    traced = TracedModel.of(dense, inplace=True)
    with Surgery(traced) as work:
        work.replace(traced.layers[1], nn.Sequential(nn.Identity()))
        assert held.weight.numel() == 0
    assert torch.equal(held.weight, weight)
    assert isinstance(dense.first, nn.Sequential)


@pytest.mark.parametrize("inplace", [True, False])
def test_what_is_put_back_is_the_same_object(inplace: bool) -> None:
    traced = TracedModel.of(reads(), images(), inplace=inplace)
    before = dict(traced.model.named_parameters())
    with Surgery(traced) as work:
        result = Applying(traced, GRID.methods).of(PLAN, work, all_or_nothing=True)
    after = dict(result.model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())


def test_a_weight_that_its_source_shares_is_left_alone() -> None:
    dense = model()
    traced = replace(TracedModel.of(dense), model=shared_copy(dense))
    state = copy.deepcopy(dense.state_dict())
    with Surgery(traced) as work:
        work.replace(traced.layers[1], nn.Sequential(nn.Identity()))
        assert torch.equal(dense.first.weight, state["first.weight"])
        work.undo()
    assert traced.model.get_parameter("first.weight") is dense.first.weight
    assert torch.equal(dense.first.weight, state["first.weight"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_temporary_folder_is_told_and_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense = model()
    before = snapshot(dense)
    monkeypatch.setattr(Surgery, "_file", lambda *_: Path("/dev/full"))
    with pytest.raises(StorageError, match="No space left on device") as caught:
        apply_plan(TracedModel.of(dense, images(), inplace=True), PLAN, GRID.methods)
    assert "TMPDIR" in str(caught.value.hint)
    check(dense, before)


def test_no_temporary_folder_at_all_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere/at/all")
    with pytest.raises(StorageError, match="cannot be kept in a temporary file") as caught:
        Surgery(TracedModel.of(model(), inplace=True))
    assert "TMPDIR" in str(caught.value.hint)


def test_a_file_of_weights_is_read_only_to_put_back(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, read = model(), []
    path = tmp_path_factory.mktemp("weights") / "dense.safetensors"
    save_file({name: v.clone().contiguous() for name, v in dense.state_dict().items()}, path)
    state, own = copy.deepcopy(dense.state_dict()), dense.first.weight
    weight = FileWeights.weight
    monkeypatch.setattr(
        FileWeights, "weight", lambda self, name: read.append(name) or weight(self, name)
    )
    traced = TracedModel.of(dense, inplace=True, weights=FileWeights(path))
    read.clear()
    with Surgery(traced) as work:
        work.replace(traced.layers[1], nn.Sequential(nn.Identity()))
        assert own.numel() == 0
        assert read == []
        work.undo()
        assert read == ["first"]
    assert dense.first.weight is own
    assert torch.equal(own, state["first.weight"])
