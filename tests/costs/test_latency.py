"""Latency without a stopwatch: a clock that only models move."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tdkit.costs import latency
from tdkit.costs.latency import measure_latency
from tdkit.forward.inputs import Inputs


class Clock:
    """Time in seconds that passes only when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(latency.time, "perf_counter", clock)
    return clock


class Takes(nn.Module):
    """A model whose passes take the given seconds, the first of them once more for warm-up."""

    def __init__(self, clock: Clock, seconds: Callable[[int], float], log: list[str], name: str):
        super().__init__()
        self.clock, self.seconds, self.log, self.name = clock, seconds, log, name
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.clock.now += self.seconds(self.log.count(self.name))
        self.log.append(self.name)
        return x.add_(1)


def test_medians_of_runs_in_turn_after_a_warm_up(clock: Clock) -> None:
    log: list[str] = []
    slow = Takes(clock, lambda i: [9.0, 0.2, 0.4, 0.3, 5.0, 0.1][i], log, "slow")
    fast = Takes(clock, lambda i: 0.05, log, "fast")
    slow.drop.eval()
    result = measure_latency([slow, fast], Inputs((torch.zeros(4, 3),)), runs=5, seconds=1e9)
    assert result.milliseconds == (pytest.approx(300), pytest.approx(50))
    assert (result.runs, result.batch, result.device) == (5, 4, "cpu")
    assert result.threads == torch.get_num_threads()
    assert log == ["slow", "fast"] * 6
    assert (slow.training, slow.drop.training) == (True, False)


def test_it_stops_when_time_runs_out_but_not_before_three_runs(clock: Clock) -> None:
    log: list[str] = []
    model = Takes(clock, lambda i: 1.0, log, "model")
    assert measure_latency([model], Inputs((torch.zeros(1),)), runs=50, seconds=10.0).runs == 9
    assert measure_latency([model], Inputs((torch.zeros(1),)), runs=50, seconds=0.5).runs == 3


def test_inputs_that_the_model_changes_are_copies(clock: Clock) -> None:
    x = torch.zeros(2, 2)
    measure_latency([Takes(clock, lambda i: 1.0, [], "model")], Inputs((x,)), runs=3)
    assert torch.equal(x, torch.zeros(2, 2))


def test_the_batch_is_that_of_the_first_tensor(clock: Clock) -> None:
    class Two(nn.Module):
        def forward(self, flag: bool, x: Tensor) -> Tensor:
            return x

    assert measure_latency([Two()], Inputs((True, torch.zeros(7, 2))), runs=3).batch == 7


def test_what_the_model_keeps_can_still_be_trained_with(clock: Clock) -> None:
    class Caches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.cache: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.cache is None:
                self.cache = torch.ones(2)
            return self.linear(x) * self.cache

    model = Caches()
    measure_latency([model], Inputs((torch.ones(1, 2),)), runs=3)
    model(torch.ones(1, 2)).sum().backward()
    assert model.linear.weight.grad is not None
