"""Distillation without labels: never worse on inputs held back, and nothing else is touched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_cnn import images, network, same
from torch import Tensor, nn

import tdkit
from tdkit.calibration.divergence import divergence, outputs_of
from tdkit.compression import distillation, lessons
from tdkit.compression.distillation import Distillation, Length
from tdkit.compression.lessons import Lessons, altered
from tdkit.errors import UnsupportedError, UsageError
from tdkit.forward.inputs import Inputs

EPOCHS = Length(epochs=6)


class Regressing(nn.Module):
    """What it returns are numbers (batch, 2, 2, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = network()[:6], nn.Conv2d(16, 2, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Numbers."""
        result: Tensor = self.head(self.body(x))
        return result


class Named(nn.Module):
    """Scores and an embedding by their names, of inputs by theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 12)
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        """Both, and what is no number of theirs."""
        hidden = self.norm(self.down(self.act(self.up(x * scale)))).mean(1)
        return {"scores": self.head(hidden), "embedding": hidden, "count": torch.tensor(3)}


def embedding() -> nn.Module:
    """Unit vectors."""

    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()[:8]

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.normalize(self.body(x), dim=1)

    return Embedding()


def named_batches() -> list[Inputs]:
    generator = torch.Generator().manual_seed(1)
    return [
        Inputs(
            kwargs={"x": torch.randn(8, 7, 6, generator=generator), "scale": torch.ones(8, 1, 1)}
        )
        for _ in range(10)
    ]


def image_batches() -> list[Inputs]:
    return [Inputs((each,)) for each in images(160).split(16)]


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Inputs]]]] = {
    "logits": (network, image_batches),
    "embedding": (embedding, image_batches),
    "regression": (Regressing, image_batches),
    "dict": (Named, named_batches),
}


def pair(kind: str) -> tuple[nn.Module, nn.Module, list[Inputs]]:
    """A dense model, one that was spoilt, and inputs."""
    create, batches = KINDS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dense = create().eval()
        small = copy.deepcopy(dense)
        with torch.no_grad():
            for parameter in small.parameters():
                parameter.mul_(1 + 0.5 * torch.randn_like(parameter))
    return dense, small, batches()


def held_back(dense: nn.Module, small: nn.Module, batches: list[Inputs]) -> float:
    return divergence(list(outputs_of(dense, batches[-1:])), outputs_of(small, batches[-1:]))


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_a_model_returns_comes_nearer_on_what_is_held_back(kind: str) -> None:
    dense, small, batches = pair(kind)
    before, known = held_back(dense, small, batches), copy.deepcopy(dense.state_dict())
    done = Distillation(EPOCHS, 3e-3, 0).run(small, dense, batches, kind != "dict")
    assert done.before == before
    assert done.after == held_back(dense, small, batches)
    assert done.after < 0.8 * before
    assert all(torch.equal(value, known[key]) for key, value in dense.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", [10.0, 1e30])
def test_it_is_never_worse_than_before(kind: str, rate: float) -> None:
    dense, small, batches = pair(kind)
    plain = copy.deepcopy(small)
    done = Distillation(Length(epochs=2), rate, 0).run(small, dense, batches, kind != "dict")
    assert done.after <= done.before == held_back(dense, plain, batches)
    assert held_back(dense, small, batches) == done.after
    if not done.is_better:
        assert same(small, plain)
        assert "taken back" in done.notes[-1]
    if rate > 1e20:
        assert not done.is_better


def test_a_loss_that_is_not_finite_ends_it_and_the_best_stays(monkeypatch) -> None:
    dense, small, batches = pair("logits")
    real, left = distillation._loss, iter(range(1000))

    def broken(*args: Any) -> Tensor:
        return real(*args) * (1.0 if next(left) < 15 else float("nan"))

    monkeypatch.setattr(distillation, "_loss", broken)
    done = Distillation(EPOCHS, 3e-3, 0).run(small, dense, batches, True)
    assert done.notes == ("distillation ends at step 16: its loss is nan",)
    assert done.is_better
    assert done.history[-1].steps == 15


def test_what_is_frozen_stays_and_modes_flags_and_hooks_are_as_before() -> None:
    dense, small, batches = pair("logits")
    small.train()
    small[3].eval()
    small[2].requires_grad_(False)
    frozen = copy.deepcopy(small[2].state_dict())
    statistics = small[3].running_mean.clone()
    modes = [module.training for module in small.modules()]
    state = torch.random.get_rng_state()
    done = Distillation(EPOCHS, 3e-3, 0).run(small, dense, batches, True)
    assert done.is_better
    assert all(torch.equal(value, frozen[key]) for key, value in small[2].state_dict().items())
    assert torch.equal(small[3].running_mean, statistics)
    assert_left_alone(small, dense, modes)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [p.requires_grad for p in small[2].parameters()] == [False, False]
    small.requires_grad_(False)
    with pytest.raises(UnsupportedError, match="nothing to distil"):
        Distillation(EPOCHS, 3e-3, 0).run(small, dense, batches, True)


def assert_left_alone(small: nn.Module, dense: nn.Module, modes: list[bool]) -> None:
    assert [module.training for module in small.modules()] == modes
    for module in (*small.modules(), *dense.modules()):
        assert not module._forward_hooks
    for parameter in small.parameters():
        assert parameter.grad is None
        assert parameter.is_contiguous()


def test_a_stop_leaves_the_model_as_it_was(monkeypatch) -> None:
    dense, small, batches = pair("logits")
    plain, modes = copy.deepcopy(small), [module.training for module in small.modules()]
    real, left = distillation._Run._step, iter(range(1000))

    def stopping(run: Any, lesson: Any) -> None:
        if next(left) == 7:
            raise KeyboardInterrupt
        real(run, lesson)

    monkeypatch.setattr(distillation._Run, "_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        Distillation(EPOCHS, 3e-3, 0).run(small, dense, batches, True)
    assert same(small, plain)
    assert_left_alone(small, dense, modes)


@pytest.mark.parametrize("kind", ["logits", "dict"])
@pytest.mark.parametrize("last", [3, 7, 14])
def test_going_on_after_a_stop_ends_in_the_same_bits(kind, last, tmp_path, monkeypatch) -> None:
    whole = pair(kind)
    told = Distillation(EPOCHS, 3e-3, 5).run(whole[1], whole[0], whole[2], kind != "dict")
    real, left = distillation._Run._step, iter(range(1000))

    def stopping(run: Any, lesson: Any) -> None:
        if next(left) == last:
            raise KeyboardInterrupt
        real(run, lesson)

    how = Distillation(EPOCHS, 3e-3, 5, tmp_path / "state")
    dense, small, batches = pair(kind)
    with monkeypatch.context() as patch:
        patch.setattr(distillation._Run, "_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            how.run(small, dense, batches, kind != "dict")
    again = how.run(small, dense, batches, kind != "dict")
    assert same(small, whole[1])
    assert (again.before, again.after) == (told.before, told.after)
    assert [line.divergence for line in again.history] == [c.divergence for c in told.history]
    other = Distillation(EPOCHS, 1e-3, 5, tmp_path / "state")
    with pytest.raises(UsageError, match="another choice of options"):
        other.run(pair(kind)[1], dense, batches, kind != "dict")


def test_what_is_nearer_is_taught_in_smaller_steps() -> None:
    dense, small, batches = pair("logits")
    rates = []
    for share in (1.0, 0.5, 0.0):
        near = copy.deepcopy(dense)
        with torch.no_grad():
            for mine, theirs in zip(near.parameters(), small.parameters(), strict=True):
                mine.lerp_(theirs, share)
        done = Distillation(EPOCHS, None, 0).run(near, dense, batches, True)
        assert done.after <= done.before
        rates.append(done.learning_rate)
    assert 2e-3 >= rates[0] > rates[1] > rates[2] == 1e-4


def test_the_seed_decides() -> None:
    made = []
    for seed in (0, 0, 1):
        dense, small, batches = pair("logits")
        Distillation(EPOCHS, 3e-3, seed).run(small, dense, batches, True)
        made.append(small)
    assert same(made[0], made[1])
    assert not same(made[0], made[2])


def test_a_time_is_kept_and_the_rate_has_fallen_by_then(monkeypatch) -> None:
    dense, small, batches = pair("logits")
    now = iter(range(10_000))
    monkeypatch.setattr(distillation.time, "perf_counter", lambda: 0.1 * next(now))
    rates = []
    real = torch.optim.AdamW.step

    def step(optimizer: Any) -> None:
        rates.append(optimizer.param_groups[0]["lr"])
        real(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    done = Distillation(Length(seconds=60), 3e-3, 0).run(small, dense, batches, True)
    assert 60 <= done.history[-1].seconds < 62
    assert done.history[-1].position == 1
    assert rates[0] > 0.99 * 3e-3
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.01 * 3e-3


def test_half_precision_is_trained_in_single() -> None:
    dense, small, batches = pair("logits")
    batches = [batch.map(lambda x: x.bfloat16()) for batch in batches]
    done = Distillation(EPOCHS, 3e-3, 0).run(small.bfloat16(), dense.bfloat16(), batches, True)
    assert done.is_better
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    assert done.after == held_back(dense, small, batches)


def test_a_chain_of_badly_balanced_factors_stays_finite_and_learns() -> None:
    data = list(images(160).split(16))
    dense = network().eval()
    small = tdkit.compress(dense, 0.7, methods="cp", data=data, effort="fast", measure=False)
    assert small.plan.moves
    even, odd = copy.deepcopy(small.model), small.model
    for move in small.plan.moves:
        chain = [module for module in odd.get_submodule(move.layer) if hasattr(module, "weight")]
        with torch.no_grad():
            chain[0].weight.mul_(1e4)
            chain[-1].weight.mul_(1e-4)
    batches, how = [Inputs((each,)) for each in data], Distillation(EPOCHS, 1e-3, 0)
    balanced, unbalanced = (how.run(each, dense, batches, True) for each in (even, odd))
    assert unbalanced.notes == ()
    losses = [line.loss for line in unbalanced.history if line.loss is not None]
    assert max(losses) < 2 * max(line.loss or 0 for line in balanced.history)
    assert balanced.after < 0.9 * balanced.before
    assert unbalanced.after < 0.9 * unbalanced.before
    assert unbalanced.after == pytest.approx(balanced.after, rel=0.2)


def test_what_is_too_much_is_not_kept(monkeypatch) -> None:
    dense, _, batches = pair("logits")
    names = ["1", "4"]
    first = Lessons(dense, batches, True, names, 0)
    assert (first.names, first.versions, first.notes) == (("1", "4"), lessons.VERSIONS, [])
    one = first.get(0, 0)
    assert one is first.get(lessons.VERSIONS, 0)
    bare = one.bytes(()) * first.count
    monkeypatch.setattr(lessons, "KEPT", 3 * bare)
    fewer = Lessons(dense, batches, True, names, 0)
    assert fewer.names != first.names
    assert set(fewer.names) < {"1", "4"}
    assert 1 <= fewer.versions <= 3
    assert "features of the last" in fewer.notes[0]
    monkeypatch.setattr(lessons, "KEPT", bare // 2)
    anew = Lessons(dense, batches, True, names, 0)
    assert "run anew" in anew.notes[0]
    lesson, same_again = anew.get(3, 1), anew.get(3, 1)
    assert lesson is not same_again
    assert torch.equal(lesson.outputs[0], same_again.outputs[0])
    assert torch.equal(lesson.outputs[0], first.get(3, 1).outputs[0])


def test_versions_are_mirrored_shifted_and_mixed() -> None:
    pixels = torch.rand(40, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    made = altered(pixels, torch.Generator().manual_seed(1))
    assert made.shape == pixels.shape
    assert float(made.min()) >= 0
    assert float(made.max()) <= 1
    inner = slice(4, -4)
    found = {"plain": 0, "mirrored": 0, "mixed": 0}
    for image in made:
        kinds = set()
        for name, each in (("plain", pixels), ("mirrored", pixels.flip(-1))):
            for down in range(-2, 3):
                for right in range(-2, 3):
                    moved = each.roll((down, right), (-2, -1))[..., inner, inner]
                    if bool((moved == image[..., inner, inner]).flatten(1).all(1).any()):
                        kinds.add(name)
        found[kinds.pop() if kinds else "mixed"] += 1
    assert min(found.values()) >= 5
    # Other numbers have no pixels, and are mixed only.
    rows = torch.rand(50, 4, generator=torch.Generator().manual_seed(0))
    mixed = altered(rows, torch.Generator().manual_seed(1))
    kept = sum(bool((row == rows).all(1).any()) for row in mixed)
    assert 10 < kept < 40


@pytest.mark.parametrize(
    ("value", "length"),
    [
        (20, Length(epochs=20)),
        ("20", Length(epochs=20)),
        ("60s", Length(seconds=60)),
        ("2m", Length(seconds=120)),
        ("0.5 h", Length(seconds=1800)),
        (0, Length(epochs=0)),
    ],
)
def test_a_length_is_a_number_of_epochs_or_a_time(value, length) -> None:
    assert Length.read(value) == length
    assert length.is_nothing == (value == 0)


@pytest.mark.parametrize("value", ["", "60 seconds", "-3", 1.5, True, "²", None, "s", "1m30s"])
def test_anything_else_is_refused(value) -> None:
    with pytest.raises(UsageError, match="neither a number of epochs nor a time"):
        Length.read(value)
