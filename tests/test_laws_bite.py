"""What breaks a law of `tdkit.testing` is caught by it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from tdkit.costs.base import Cost
from tdkit.costs.macs import Macs
from tdkit.costs.params import Params
from tdkit.errors import UnlawfulError
from tdkit.layers.evidence import Evidence, Moments
from tdkit.layers.inventory import Layer
from tdkit.layers.stages import Stage
from tdkit.metrics.base import Difference, Metric
from tdkit.planners.base import Option, UnreachableError
from tdkit.planners.exact import exact
from tdkit.planners.greedy import greedy
from tdkit.testing import PlannerLaws, check_cost, check_metric, check_planner


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def snr(error: float, norm: float, size: int) -> float:
    return 20 * math.log10(norm / error)


def moving(difference: Difference) -> float:
    difference.both[0].zero_()
    return difference.error


class Counts:
    calls = 0.0

    def __call__(self, error: float, norm: float, size: int) -> float:
        self.calls += 1
        return error + self.calls


METRICS: dict[str, tuple[Any, str]] = {
    "in dB": (Metric("snr", "weights", snr), "farther away it is|of a ratio in dB"),
    "its negative": (Metric("snr", "weights", lambda *a: -snr(*a)), "of a ratio in dB"),
    "upside down": (Metric("close", "weights", lambda e, n, s: n / (n + e)), "farther away"),
    "infinite": (Metric("inf", "weights", lambda e, n, s: math.inf), "an error of inf"),
    "no number": (Metric("nan", "weights", lambda e, n, s: math.nan), "an error of nan"),
    "constant": (Metric("same", "weights", lambda e, n, s: 1.0), "a near approximation from"),
    "changing": (Metric("calls", "weights", Counts()), "another error each time"),
    "grabby": (Metric("grabby", "weights", compare=moving), "another error|changed the tensors"),
    "needy": (
        Metric("needy", "weights", compare=lambda d: d.error, needs=frozenset({"luck"})),
        "needs what nobody has",
    ),
}


@pytest.mark.parametrize("case", METRICS)
def test_metrics(case: str) -> None:
    metric, reason = METRICS[case]
    with pytest.raises(AssertionError, match=reason):
        check_metric(metric, noise(4, 3), noise(4, 3, seed=1))


def test_a_metric_that_looks_at_moments_gets_some() -> None:
    def output(difference: Difference) -> float:
        moments = difference.evidence.moments
        assert moments is not None
        gap = difference.tensor
        return float((gap @ moments.second * gap).sum().clamp(min=0).sqrt())

    rows = noise(20, 3)
    moments = Moments(20, rows.mean(0), rows.mT @ rows / 20)
    metric = Metric("output", "weights", compare=output, needs=frozenset({"moments"}))
    check_metric(metric, noise(4, 3), noise(4, 3, seed=1), Evidence(0, moments))


OPTIONS = [
    Option("a", 10, 0.3, 0),
    Option("a", 20, 0.9, 1),
    Option("b", 15, 0.2, 2),
    Option("b", 5, 0.1, 3),
]


def everything(options: Sequence[Option], needed: int) -> list[Option]:
    greedy(options, needed)
    return list(options)


def first(options: Sequence[Option], needed: int) -> list[Option]:
    greedy(options, needed)
    taken: dict[str, Option] = {}
    for option in options:
        if sum(o.saving for o in taken.values()) < needed:
            taken[option.layer] = option
    return list(taken.values())


def lavish(options: Sequence[Option], needed: int) -> list[Option]:
    return [Option(o.layer, o.saving, 0.0, o.index) for o in greedy(options, needed)]


def stingy(options: Sequence[Option], needed: int) -> list[Option]:
    return greedy(options, needed)[1:]


def obliging(options: Sequence[Option], needed: int) -> list[Option]:
    try:
        return greedy(options, needed)
    except UnreachableError as error:
        return greedy(options, error.most)


def vague(options: Sequence[Option], needed: int) -> list[Option]:
    try:
        return greedy(options, needed)
    except UnreachableError as error:
        raise UnreachableError(error.most - 1) from error


@pytest.mark.parametrize(
    ("planner", "reason"),
    [
        (everything, "two options of one layer"),
        (first, "the order of the options matters"),
        (lavish, "an option that was not there"),
        (stingy, "of the 16 needed"),
        (vague, "35 can be saved, not 34"),
    ],
)
def test_planners(planner: Callable[..., Any], reason: str) -> None:
    check_planner(greedy, OPTIONS, 16)
    with pytest.raises(AssertionError, match=reason):
        check_planner(planner, OPTIONS, 16, seed=2)


def test_a_planner_that_forgets_a_further_bound() -> None:
    def forgetful(options: Sequence[Option], needed: int, further: Any = ()) -> list[Option]:
        return exact(options, needed, (-1000,) * len(further))

    options = [Option("a", 10, 0.3, 0, (-5,)), Option("a", 10, 0.9, 1, (5,))]
    check_planner(exact, options, 10, further=(5,))
    with pytest.raises(AssertionError, match="it saves -5 of the 5 needed"):
        check_planner(forgetful, options, 10, further=(5,))


def test_a_planner_that_promises_what_cannot_be() -> None:
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check_planner(obliging, OPTIONS, 16)


def test_a_function_is_a_planner_as_it_is() -> None:
    class Laws(PlannerLaws):
        planner = greedy

    assert Laws().planner is greedy
    Laws().test_nothing_needed_is_nothing_taken()
    Laws().test_nothing_to_take_is_out_of_reach()


class Fractions(Params):
    def of(self, stages: Sequence[Stage], layer: Layer) -> Any:
        return super().of(stages, layer) / 2


class Negative(Params):
    def of(self, stages: Sequence[Stage], layer: Layer) -> int:
        return -super().of(stages, layer)


class Partial(Params):
    def total(self, model: nn.Module, layers: Sequence[Layer]) -> int:
        return super().total(model, layers) // 2


class Unbiased(Params):
    """Its layers leave out what its total counts."""

    def of(self, stages: Sequence[Stage], layer: Layer) -> int:
        return sum(stage.parameters for stage in stages[:1])


class Once(Macs):
    """As if each layer were called once."""

    def of(self, stages: Sequence[Stage], layer: Layer) -> int:
        return super().of(stages, layer) // max(1, len(layer.calls or ()))


@pytest.mark.parametrize(
    ("cost", "reason"),
    [
        (Fractions(), "is no whole number"),
        (Negative(), "the layer '0' costs -"),
        (Partial(), "the model costs"),
        (Unbiased(), "'0' replaced, the model costs"),
        (Once(), "'0' replaced, the model costs"),
    ],
)
def test_costs(cost: Cost, reason: str) -> None:
    layer = nn.Linear(8, 8)
    model, x = nn.Sequential(layer, nn.ReLU(), layer), torch.zeros(1, 8)
    check_cost(Params(), model, x)
    check_cost(Macs(), model, x)
    with pytest.raises(AssertionError, match=reason):
        check_cost(cost, model, x)


def test_a_cost_that_hides_what_it_needs() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    class Hides(Macs):
        needs = frozenset()

        def total(self, model: nn.Module, layers: Sequence[Layer]) -> Any:
            return None if layers[0].calls is None else super().total(model, layers)

    with pytest.raises(UnlawfulError, match="the cost macs of the model is None"):
        check_cost(Hides(), model, torch.zeros(1, 8))
