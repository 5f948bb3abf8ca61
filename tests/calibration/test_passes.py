"""Passes that wait in front of layers, against the same passes begun anew for every layer."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tdkit.calibration import passes as module
from tdkit.calibration.pairs import Wanted, given_rows, wanted_outputs
from tdkit.calibration.passes import Passes
from tdkit.errors import UnsupportedError
from tdkit.forward.inputs import Inputs
from tdkit.layers.inventory import find_layers


class Net(nn.Module):
    """Named layers of one width, put together in some way."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))
        self.ran: list[str] = []
        for name in "abcd":
            layer = self.get_submodule(name)
            layer.register_forward_hook(lambda *_, name=name: self.ran.append(name))


class Plain(Net):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.d(self.c(self.b(self.a(x).tanh()).tanh()).tanh())
        return result


class Residual(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).tanh())
        result: Tensor = self.d(y + self.c(y).tanh())
        return result


class Twice(Net):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.d(self.b(self.c(self.b(self.a(x)).tanh()).tanh()))
        return result


class Orders(Net):
    """Which of two layers comes first is the batch's."""

    def forward(self, x: Tensor) -> Tensor:
        several = float(x[0, 0]) > 0
        x = self.a(x)
        first, second = (self.b, self.c) if several else (self.c, self.b)
        result: Tensor = self.d(second(first(x).tanh()).tanh())
        return result


class Sometimes(Net):
    """One layer is left out by some batches."""

    def forward(self, x: Tensor) -> Tensor:
        several = float(x[0, 0]) > 0
        x = self.a(x)
        if several:
            x = self.b(x).tanh()
        result: Tensor = self.d(self.c(x))
        return result


class Drawing(Net):
    """Random numbers between the layers, of all three kinds."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b, self.c, self.d):
            x = layer(x + torch.randn_like(x) + float(np.random.standard_normal()))
        return x


class Counting(Net):
    """A buffer that every layer adds to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b, self.c, self.d):
            x = layer(x + self.total)
            self.total += x.mean(0)
        return x


class Swapping(Counting):
    """Likewise, by another buffer of that name."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b, self.c, self.d):
            x = layer(x + self.total)
            self.total = self.total + x.mean(0)
        return x


class Locked(Net):
    """Only one pass at a time is let in."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            result: Tensor = self.d(self.c(self.b(self.a(x).tanh()).tanh()).tanh())
            return result


def batches(count: int = 5) -> list[Inputs]:
    generator = torch.Generator().manual_seed(1)
    return [Inputs((torch.randn(8, 6, generator=generator),)) for _ in range(count)]


def wanted_of(model: Net) -> dict[str, Wanted]:
    layers = [x for x in find_layers(model, inputs=batches()[0]) if x.name in "abcd"]
    return wanted_outputs(model, layers, batches(), 1000, 0)


def change(layer: nn.Module, rows: Sequence[Tensor]) -> None:
    """As a fit does: in place, by what the layer is given."""
    with torch.no_grad():
        for each in rows:
            layer.get_parameter("weight").add_(0.1 * each.mean())
            layer.get_parameter("bias").add_(each[0, 0, :1])


def fitted(model: Net, waiting: int, stop: Any = lambda name: None) -> dict[str, list[Tensor]]:
    """Change layer after layer; what each was given."""
    wanted, found = wanted_of(model), dict[str, list[Tensor]]()
    model.ran.clear()
    with Passes(model, list(wanted), batches(), waiting) as passes:
        for name in wanted:
            stop(name)
            found[name] = [inputs for _, inputs, _ in given_rows(passes, name, wanted[name])]
            change(model.get_submodule(name), found[name])
            passes.settle(name)
    return found


@pytest.fixture(autouse=True)
def leaves_no_thread() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


KINDS = (Plain, Residual, Twice, Orders, Sometimes, Drawing, Counting, Swapping)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_that_waited_gives_what_one_that_is_begun_anew_gives(kind: type[Net]) -> None:
    anew, waited = kind(), kind()
    state, before = (torch.get_rng_state(), hooks(waited))
    one, other = fitted(anew, 0), fitted(waited, 2**20)
    assert one.keys() == other.keys()
    for name, rows in one.items():
        assert len(rows) == len(other[name]) > 0
        assert all(torch.equal(a, b) for a, b in zip(rows, other[name], strict=True))
    for key, value in anew.state_dict().items():
        assert torch.equal(value, waited.state_dict()[key]), key
    assert torch.equal(torch.get_rng_state(), state)
    assert hooks(waited) == before


@pytest.mark.parametrize("kind", [Plain, Residual, Drawing])
def test_every_layer_is_run_once_for_each_batch(kind: type[Net]) -> None:
    model = kind()
    fitted(model, 2**20)
    assert sorted(model.ran) == sorted("abc" * 5)
    fitted(model, 0)
    assert sorted(model.ran) == sorted("aaabbc" * 5)


def test_they_hold_no_more_than_they_may() -> None:
    # In front of a layer a batch holds itself, and what the layer before and the tanh made of it.
    one = 2 * 8 * 6 * 4
    model, most, held = Plain(), 3 * one, list[int]()
    wanted = wanted_of(model)
    model.ran.clear()
    with Passes(model, list(wanted), batches(), most) as passes:
        for name in wanted:
            for _ in given_rows(passes, name, wanted[name]):
                held.append(passes.held)
            passes.settle(name)
    assert max(held) <= most
    assert max(held) >= one
    anew, once = len("aaabbc"), len("abc")
    assert 5 * once < len(model.ran) < 5 * anew


def test_what_a_model_raises_in_one_batch_is_told_as_ever() -> None:
    class Failing(Plain):
        fails = False

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(self.a(x))
            if self.fails and self.ran.count("b") == 3:
                raise ValueError("no third batch")
            result: Tensor = self.d(self.c(x))
            return result

    model = Failing()
    before = hooks(model)

    def fail(_: str) -> None:
        model.fails = True

    with pytest.raises(UnsupportedError, match="no third batch"):
        fitted(model, 2**20, fail)
    assert hooks(model) == before


@pytest.mark.parametrize("where", ["between", "within"])
def test_what_stops_it_leaves_no_thread_and_no_hook(where: str) -> None:
    class Stopped(Plain):
        stops = False

        def forward(self, x: Tensor) -> Tensor:
            x = self.c(self.b(self.a(x)))
            if self.stops:
                raise KeyboardInterrupt
            result: Tensor = self.d(x)
            return result

    model = Stopped()
    model.train()
    before = hooks(model)

    def stop(name: str) -> None:
        if name == "c" and where == "between":
            raise KeyboardInterrupt
        model.stops = name == "d"

    with pytest.raises(KeyboardInterrupt):
        fitted(model, 2**20, stop)
    assert hooks(model) == before
    assert all(each.training for each in model.modules())


def test_a_lock_of_the_models_own_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.05)
    one, other = fitted(Locked(), 0), fitted(Locked(), 2**20)
    for name, rows in one.items():
        assert all(torch.equal(a, b) for a, b in zip(rows, other[name], strict=True))


def test_torchs_own_modes_are_those_of_the_caller() -> None:
    class Looking(Plain):
        seen: Any = None

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(
                (
                    torch.is_grad_enabled(),
                    torch.is_inference_mode_enabled(),
                    torch.is_autocast_enabled("cpu"),
                    torch.get_autocast_dtype("cpu"),
                    torch.get_default_device().type,
                )
            )
            return super().forward(x)

    model = Looking()
    model.seen = []
    wanted = wanted_of(model)
    model.seen.clear()
    first = Wanted(wanted["b"].spec, wanted["b"].calls[:1])
    modes = torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)
    with modes[0], modes[1], Passes(model, list(wanted), batches(1)) as passes:
        rows = [inputs for _, inputs, _ in given_rows(passes, "b", first)]
    assert model.seen == [(False, True, True, torch.bfloat16, "cpu")]
    assert rows[0].dtype == torch.bfloat16
