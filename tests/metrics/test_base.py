"""The law of metrics, held where errors are made and where they guide."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tdkit.compression.scoring import Grid, score
from tdkit.costs.base import Change
from tdkit.costs.params import PARAMS
from tdkit.decompositions.svd import Svd
from tdkit.errors import UnlawfulError, UsageError
from tdkit.layers.traced import TracedModel
from tdkit.metrics import features, weights
from tdkit.metrics.base import Difference, Metric, penalties
from tdkit.planners.base import Option
from tdkit.planners.candidate import Candidate
from tdkit.planners.greedy import greedy
from tdkit.planners.objective import Bound, choose


def noise(error: float, norm: float, size: int) -> float:
    """Of a signal-to-noise ratio in dB the negative: more is worse, but it is below 0."""
    return -20 * math.log10(norm / error)


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(4, 8, 3, groups=2),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 4, 3),
            nn.Flatten(2),
            nn.Linear(81, 12),
            nn.Linear(12, 3),
        )


def images() -> Tensor:
    return torch.randn(3, 2, 9, 9, generator=torch.Generator().manual_seed(1))


def scored(*metrics: Metric, batches: Sequence[Tensor] = ()) -> list[Candidate]:
    grid = Grid({"svd": Svd()}, metrics, (0.3, 0.6))
    found = score(TracedModel.of(network(), include_ends=True), grid, batches=batches)
    assert {candidate.layer for candidate in found} >= {"2", "4", "6"}
    return found


@pytest.mark.parametrize("penalty", ["square", "", "cubes", None])
def test_unknown_penalties_are_refused_at_construction(penalty: Any) -> None:
    with pytest.raises(UsageError, match="the metric mine adds up by") as caught:
        Metric("mine", "weights", weights.RELATIVE.value, penalty=penalty)
    assert caught.value.hint == "it is logarithm, squares or itself"


@pytest.mark.parametrize("both", [True, False])
def test_a_metric_has_one_way_to_an_error(both: bool) -> None:
    ways: dict[str, Any] = {"value": noise, "compare": lambda d: 0.0} if both else {}
    with pytest.raises(UsageError, match="the metric mine needs a value of norms, or a compare"):
        Metric("mine", "weights", **ways)


@pytest.mark.parametrize(
    "metric",
    [
        Metric("minus-snr", "weights", noise),
        Metric("minus-snr", "weights", compare=lambda d: noise(d.error, d.norm, d.size)),
        Metric("minus-snr", "features", noise),
        Metric("minus-snr", "features", compare=lambda d: noise(d.error, d.norm, d.size)),
    ],
)
def test_an_error_below_zero_is_refused_by_the_name_of_the_metric(metric: Metric) -> None:
    with pytest.raises(UnlawfulError, match="the metric minus-snr gives -") as caught:
        scored(weights.RELATIVE, metric, batches=[images()])
    assert "dB" in str(caught.value.hint)
    assert caught.value.exit_status == UsageError.exit_status


def test_one_sample_below_zero_is_seen_among_many() -> None:
    def mostly(error: float, norm: float, size: int) -> float:
        seen.append(error)
        return -1e-3 if len(seen) == 2 else 5.0

    seen: list[float] = []
    with pytest.raises(UnlawfulError, match=r"the metric mostly gives -0\.001"):
        scored(Metric("mostly", "features", mostly), batches=[images()])


def failing(*_: Any) -> float:
    return float(1 / 0)


@pytest.mark.parametrize("target", ["weights", "features"])
@pytest.mark.parametrize("way", ["value", "compare"])
def test_a_metric_that_fails_is_told_by_its_name(way: str, target: Any) -> None:
    metric = Metric("mine", target, **{way: failing})
    with pytest.raises(UnlawfulError, match="the metric mine fails: ZeroDivisionError: division"):
        scored(metric, batches=[images()])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_error_that_is_no_number_is_the_metrics_where_the_methods_is_one(value: float) -> None:
    with pytest.raises(UnlawfulError, match=r"the metric odd gives (nan|inf), and an error is"):
        scored(Metric("odd", "weights", lambda e, n, s: value))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "way", [{"value": lambda value: lambda *_: value}, {"compare": lambda value: lambda _: value}]
)
def test_so_it_is_where_the_features_are_finite(value: float, way: dict[str, Any]) -> None:
    metric = Metric("odd", "features", **{key: make(value) for key, make in way.items()})
    with pytest.raises(UnlawfulError, match=r"the metric odd gives (nan|inf), and an error is"):
        scored(metric, batches=[images()])


def candidate(layer: str, saving: int, error: float) -> Candidate:
    costs = {"params": Change(1000, 1000 - saving)}
    return Candidate(layer, "svd", 1, 0.5, costs, {"mine": error})


def mine(penalty: str) -> Metric:
    return Metric("mine", "weights", weights.RELATIVE.value, penalty=penalty)


def pick(
    candidates: Sequence[Candidate], metric: Metric, budget: float, planner: Any = greedy
) -> list[Candidate]:
    return choose(candidates, planner, [Bound(PARAMS, budget, 10_000)], metric)


@pytest.mark.parametrize("penalty", ["squares", "itself"])
def test_errors_below_zero_never_reach_a_planner(penalty: str) -> None:
    with pytest.raises(UsageError, match=r"an error of -12 cannot guide a planner"):
        pick([candidate("a", 500, 0.1), candidate("b", 500, -12.0)], mine(penalty), 0.97)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (lambda options: [], "saves 0 of the 300 that the budget asks for"),
        (lambda options: options[2:], "saves 100 of the 300 that the budget"),
        (lambda options: options[:2], "takes two options of the layer 'a'"),
        (lambda options: [options[0], options[0]], "takes two options of the layer 'a'"),
        (lambda options: [Option("c", 900, 0.0, 0)], "gives what is no choice of its options"),
        (lambda options: [*options[:1], "b"], "gives what is no choice of its options"),
        (lambda options: [[]], "gives what is no choice of its options"),
        (lambda options: None, "gives what is no choice of its options"),
    ],
)
def test_a_planner_that_breaks_its_word_is_told_by_its_name(choice: Any, message: str) -> None:
    def cheat(options: Sequence[Option], needed: int) -> Any:
        return choice(list(options))

    found = [candidate("a", 250, 0.4), candidate("a", 200, 0.1), candidate("b", 100, 0.2)]
    with pytest.raises(UnlawfulError, match=f"^the planner cheat {message}"):
        pick(found, mine("squares"), 0.97, cheat)
    kept = pick(found, mine("squares"), 0.97, lambda options, needed: options[::2])
    assert kept == found[::2]


def test_by_what_errors_add_up_decides() -> None:
    large, halves = candidate("a", 200, 0.6), [candidate(name, 100, 0.4) for name in "bc"]
    assert pick([large, *halves], mine("squares"), 0.98) == halves
    assert pick([large, *halves], mine("itself"), 0.98) == [large]


def brute_force(options: Sequence[Option], needed: int) -> list[Option]:
    groups = [[None, *(o for o in options if o.layer == layer)] for layer in "abc"]
    choices = [[o for o in choice if o] for choice in itertools.product(*groups)]
    enough = [taken for taken in choices if sum(o.saving for o in taken) >= needed]
    return min(enough, key=lambda taken: sum(o.penalty for o in taken))


@settings(max_examples=200, deadline=None, database=None)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 400), st.floats(1e-3, 1e3)),
        min_size=1,
        max_size=8,
    ),
    share=st.floats(0.01, 1),
)
@pytest.mark.parametrize(
    ("penalty", "law"), [("squares", lambda e: e * e), ("itself", lambda e: e)]
)
def test_what_a_planner_keeps_small_is_the_sum_of_the_law(
    penalty: str, law: Callable[[float], float], rows: list[Any], share: float
) -> None:
    candidates = [candidate(*row) for row in rows]
    most = sum(max((s for n, s, _ in rows if n == name), default=0) for name in "abc")
    needed = max(1, int(share * most))
    chosen = pick(candidates, mine(penalty), 1 - needed / 10_000, brute_force)
    least = brute_force(
        [Option(name, saving, law(error), i) for i, (name, saving, error) in enumerate(rows)],
        needed,
    )
    assert sum(law(c.errors["mine"]) for c in chosen) == pytest.approx(
        sum(option.penalty for option in least)
    )


def test_penalties_are_relative_to_the_largest_and_rise_with_the_error() -> None:
    errors = [3e200, 0.0, math.nan, 1e200, math.inf]
    for law, power in (("squares", 2), ("itself", 1)):
        found = penalties(errors, law).tolist()
        assert found[:2] == [1.0, 0.0]
        assert found[3] == pytest.approx(3**-power)
        assert math.isnan(found[2])
        assert math.isnan(found[4])


def test_the_logarithm_is_of_the_energy_that_is_kept_and_rises_beyond_all() -> None:
    errors = [0.0, 0.1, 0.5, 0.999, 1.0, 1.5, 1e200]
    found = penalties(errors, "logarithm")
    assert found[:4] == pytest.approx([-math.log(1 - e * e) for e in errors[:4]])
    assert np.isfinite(found).all()
    assert (np.diff(found) > 0).all()
    assert penalties([1e-9], "logarithm") == pytest.approx([1e-18])


def test_a_dead_layer_is_forgiven_by_squares_and_not_by_the_logarithm() -> None:
    dead, worse = candidate("a", 200, 0.999), [candidate("a", 100, 0.7), candidate("b", 100, 0.75)]
    assert pick([dead, *worse], mine("squares"), 0.98) == [dead]
    assert pick([dead, *worse], mine("logarithm"), 0.98) == worse
    assert mine("squares").adding_up_by("logarithm").penalty == "logarithm"
    assert mine("squares").adding_up_by(None) == mine("squares")


def norms(difference: Difference) -> float:
    original, approximation = difference.both
    assert original.dtype == approximation.dtype == torch.float64
    assert torch.equal(difference.tensor, original - approximation)
    assert original.numel() == difference.size
    assert float(original.norm()) == pytest.approx(difference.norm)
    return float(difference.tensor.norm()) / float(original.norm())


@pytest.mark.parametrize("reference", [weights.RELATIVE, features.RELATIVE])
def test_a_metric_that_sees_the_tensors_gives_the_same(reference: Metric) -> None:
    own = Metric("mine", reference.target, compare=norms)
    for found in scored(reference, own, batches=[images(), images()[:1]]):
        assert found.errors["mine"] == pytest.approx(found.errors[reference.name], rel=1e-6)
        assert found.errors["mine"] > 0


def test_it_sees_them_in_the_layout_of_the_layer() -> None:
    shapes: dict[str, set[tuple[int, ...]]] = {"weights": set(), "features": set()}

    def look(target: str) -> Callable[[Difference], float]:
        def compare(difference: Difference) -> float:
            shapes[target].add(tuple(difference.tensor.shape))
            return difference.error

        return compare

    model = network()
    metrics = [Metric(target, target, compare=look(target)) for target in shapes]  # type: ignore[arg-type]
    found = {c.layer for c in scored(*metrics, batches=[images()])}
    assert shapes["weights"] == {tuple(model.get_submodule(n).weight.shape) for n in found}
    outputs, x = {}, images()
    for name, layer in model.named_children():
        outputs[name] = tuple((x := layer(x)).shape[1:])
    assert shapes["features"] == {outputs[name] for name in found}


@pytest.mark.parametrize("target", ["weights", "features"])
def test_a_metric_sees_the_seed_of_the_scoring(target: Any) -> None:
    seen = set()

    def look(difference: Difference) -> float:
        seen.add(difference.evidence.seed)
        return 0.5

    grid = Grid({"svd": Svd()}, [Metric("mine", target, compare=look)], (0.5,), seed=7)
    score(TracedModel.of(network(), include_ends=True), grid, batches=[images()])
    assert 0 not in seen
    assert seen == {7} or target == "weights"
