"""tau-a and its bootstrap against plain loops, SciPy, and simulated studies."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from made_up_study import draw_bits
from scipy.stats import kendalltau

from tdkit.study.report import correlation
from tdkit.study.report.correlation import (
    compare,
    draw_weights,
    interval,
    measured_again,
    tau_a,
    tau_interval,
    undefined,
)

VALUES = st.sampled_from([-math.inf, -1.5, -0.0, 0.0, 1e-300, 1.0, 2.0, math.inf])


def order(a: float, b: float) -> int:
    return 1 if a > b else -1 if a < b else 0


def counted(x, y) -> float:
    """Eq. 1 of the paper by counting."""
    k = sum(order(x[i], x[j]) * order(y[i], y[j]) == 1 for i, j in combinations(range(len(x)), 2))
    d = sum(order(x[i], x[j]) * order(y[i], y[j]) == -1 for i, j in combinations(range(len(x)), 2))
    return 2 * (k - d) / (len(x) * (len(x) - 1))


@given(st.lists(st.tuples(VALUES, VALUES), min_size=2, max_size=9))
def test_tau_a_is_counted(pairs) -> None:
    x, y = (np.array(column) for column in zip(*pairs, strict=True))
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert math.isnan(tau_a(x, y))
    else:
        assert tau_a(x, y) == pytest.approx(counted(x, y), abs=1e-12)


@given(st.permutations(range(12)))
def test_without_ties_it_is_scipys(y) -> None:
    x, y = np.arange(12.0), np.array(y, float)
    assert tau_a(x, y) == pytest.approx(kendalltau(x, y).statistic, abs=1e-12)


def test_ties_count_as_neither_but_as_pairs() -> None:
    # tau-b, SciPy's default, would be 0.82.
    assert tau_a(np.array([1.0, 1, 2]), np.array([1.0, 2, 3])) == pytest.approx(2 / 3)


@given(arrays(float, 7, elements=st.floats(-1e3, 1e3)), st.permutations(range(7)))
def test_it_is_a_rank_correlation(x, places) -> None:
    y = np.array([0.0, 0, 1, 2, 3, 3, 4])
    expected = tau_a(x, y)
    assert tau_a(x[places], y[places]) == pytest.approx(expected, nan_ok=True)
    assert tau_a(y, x) == pytest.approx(expected, nan_ok=True)
    assert tau_a(x, -y) == pytest.approx(-expected, nan_ok=True)
    assert tau_a(x, np.exp(y)) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("errors", "truth", "reason"),
    [
        ([], [], "fewer than two candidates"),
        ([1.0], [2.0], "fewer than two candidates"),
        ([1.0, math.nan, 2.0], [1.0, 2.0, math.nan], "fewer than two candidates"),
        ([3.0, 3.0, 3.0], [1.0, 2.0, 3.0], "all approximation errors are equal"),
        ([math.inf, math.inf], [1.0, 2.0], "all approximation errors are equal"),
        ([1.0, 2.0, math.nan], [5.0, 5.0, 6.0], "all performance errors are equal"),
    ],
)
def test_undefined_is_said_and_is_not_zero(errors, truth, reason) -> None:
    errors, truth = np.array(errors), np.array(truth)
    assert undefined(errors, truth) == reason
    assert math.isnan(tau_a(errors, truth))


def test_what_was_not_measured_takes_part_in_no_pair() -> None:
    x, y = np.array([1.0, math.nan, 3.0, 2.0, 5.0]), np.array([1.0, 9.0, 3.0, 4.0, math.nan])
    assert undefined(x, y) is None
    assert tau_a(x, y) == tau_a(x[[0, 2, 3]], y[[0, 2, 3]]) == pytest.approx(1 / 3)


def test_weights_are_draws_with_replacement() -> None:
    weights = draw_weights(40, 3000, np.random.default_rng(0))
    assert weights.shape == (3000, 40)
    assert (weights.sum(1) == 40).all()
    # A binomial of 40 trials at 1/40.
    assert np.abs(weights.mean(0) - 1).max() < 0.1
    assert (weights == 0).mean() == pytest.approx((1 - 1 / 40) ** 40, abs=0.01)
    assert weights.var() == pytest.approx(1 - 1 / 40, abs=0.03)


def test_measuring_again_counts_wrong_answers(monkeypatch) -> None:
    wrong = np.random.default_rng(1).random((5, 33)) < 0.3
    weights = draw_weights(33, 20, np.random.default_rng(7))
    expected = [
        [sum(w for w, is_wrong in zip(row, model, strict=True) if is_wrong) for model in wrong]
        for row in weights
    ]
    counts = measured_again(wrong, 20, np.random.default_rng(7))
    np.testing.assert_array_equal(counts, expected)
    # In small blocks it is the same.
    monkeypatch.setattr(correlation, "_BLOCK", 70)
    np.testing.assert_array_equal(measured_again(wrong, 20, np.random.default_rng(7)), expected)


def looped(errors, truth, again, weights):
    """What `compare` does for one error, pair by pair."""
    n = len(truth)
    pairs = [
        (i, j)
        for i, j in combinations(range(n), 2)
        if not (math.isnan(truth[i]) or math.isnan(truth[j]))
    ]
    usable = [p for p in pairs if not (math.isnan(errors[p[0]]) or math.isnan(errors[p[1]]))]
    resampled = []
    for p, w in zip(again, weights, strict=True):
        drawn = sum(w[i] * w[j] for i, j in usable)
        agreed = sum(
            w[i] * w[j] * order(p[i], p[j]) * order(errors[i], errors[j]) for i, j in usable
        )
        resampled.append(agreed / drawn if drawn else math.nan)
    ceiling = [
        sum(order(p[i], p[j]) * order(truth[i], truth[j]) for i, j in pairs) / len(pairs)
        for p in again
    ]

    def resolved(i: int, j: int) -> bool:
        signs = [order(p[i], p[j]) for p in again]
        return max(signs.count(1), signs.count(-1)) >= 0.975 * len(again)

    clear = [p for p in usable if resolved(*p)]
    agree = [order(errors[i], errors[j]) * order(truth[i], truth[j]) for i, j in usable]
    return {
        "resampled": resampled,
        "ceiling": np.mean(ceiling),
        "resolved": np.mean([resolved(*p) for p in pairs]),
        "tied": agree.count(0) / len(usable),
        "on_resolved": np.mean([order(errors[i], errors[j]) * order(truth[i], truth[j])
                                for i, j in clear]),
    }  # fmt: skip


@pytest.mark.parametrize("block", [2**22, 40])
@pytest.mark.parametrize("gaps", [False, True])
def test_comparing_is_what_loops_do(monkeypatch, block, gaps) -> None:
    monkeypatch.setattr(correlation, "_BLOCK", block)
    rng = np.random.default_rng(3)
    errors = rng.integers(0, 6, (2, 9)).astype(float)
    truth = rng.integers(0, 30, 9).astype(float)
    again = truth + rng.integers(-2, 3, (80, 9))
    again[0] = -truth  # once everything comes the other way round
    if gaps:
        errors[0, 2] = truth[5] = math.nan
        again[:, 5] = math.nan
    weights = draw_weights(9, 80, rng)
    found = compare(errors, truth, again, weights)
    for k in range(2):
        expected = looped(errors[k], truth, again, weights)
        np.testing.assert_allclose(found.resampled[:, k], expected["resampled"], atol=1e-6)
        assert found.taus[k] == tau_a(errors[k], truth)
        assert found.ceiling == pytest.approx(expected["ceiling"])
        assert found.resolved == pytest.approx(expected["resolved"])
        assert found.tied[k] == pytest.approx(expected["tied"])
        assert found.on_resolved[k] == pytest.approx(expected["on_resolved"])
    assert 0 < found.resolved < 1
    assert found.pairs == (28 if gaps else 36)


def test_a_candidate_is_not_compared_with_its_own_copy() -> None:
    # With three candidates a third of all pairs of draws are such; they would pull tau to 0.
    truth = np.array([1.0, 2.0, 3.0])
    weights = draw_weights(3, 400, np.random.default_rng(0))
    found = compare(truth[None], truth, np.tile(truth, (400, 1)), weights)
    values = found.resampled[:, 0]
    alone = (weights == 3).any(1)
    assert np.isnan(values[alone]).all()
    assert (values[~alone] == 1).all()
    assert (found.ceiling, found.resolved) == (1, 1)


def test_fewer_than_two_candidates_are_undefined_not_an_error() -> None:
    for n in (0, 1):
        found = compare(np.ones((1, n)), np.ones(n), np.ones((5, n)), np.ones((5, n), int))
        assert found.reasons == ("fewer than two candidates",)
        assert found.pairs == 0
        assert np.isnan([found.taus[0], found.ceiling, found.resolved, found.tied[0]]).all()
        assert np.isnan(found.resampled).all()


def test_intervals() -> None:
    samples = np.append(np.linspace(0, 1, 1001), math.nan)
    assert interval(samples) == pytest.approx((0.025, 0.975))
    assert interval(samples, 0.5) == pytest.approx((0.25, 0.75))
    assert np.isnan(interval(np.full(3, math.nan))).all()
    # Percentiles and their reflection, whichever reaches further.
    assert tau_interval(0.6, samples) == pytest.approx((0.025, 1.175))
    assert np.isnan(tau_interval(math.nan, samples)).all()


@given(st.floats(-1, 1), arrays(float, 30, elements=st.floats(-1, 1)))
def test_the_interval_is_around_the_value(value, samples) -> None:
    low, high = tau_interval(value, samples)
    assert low <= value <= high


@pytest.mark.parametrize(("scale", "percentiles_do"), [(1.0, True), (0.1, False)])
def test_intervals_hold_the_tau_of_unlimited_images(scale, percentiles_do) -> None:
    """On simulated studies, where the truth is known: with clear differences and noisy ones."""
    rng = np.random.default_rng(5)
    expected = tau_a(*world(3000, scale, rng))
    held, held_by_percentiles, studies = 0, 0, 60
    for _ in range(studies):
        errors, truth = world(40, scale, rng)
        hard = rng.normal(size=1500)
        wrong = ~np.stack([draw_bits(p, hard, 0.9, rng) for p in truth])
        again = measured_again(wrong, 200, rng)
        found = compare(errors[None], wrong.sum(1).astype(float), again, draw_weights(40, 200, rng))
        low, high = tau_interval(found.taus[0], found.resampled[:, 0])
        held += low <= expected <= high
        low, high = interval(found.resampled[:, 0])
        held_by_percentiles += low <= expected <= high
    assert held >= 0.9 * studies
    assert (held_by_percentiles >= 0.9 * studies) == percentiles_do


def world(n: int, scale: float, rng: np.random.Generator):
    errors = rng.uniform(size=n)
    lost = np.clip(errors + 0.15 * rng.normal(size=n), -0.5, 2) ** 2
    return errors, np.minimum(0.07 + 0.3 * scale * lost, 0.9)


def test_the_ceiling_is_what_knowing_the_truth_reaches() -> None:
    rng = np.random.default_rng(2)
    ceilings, reached = [], []
    for _ in range(30):
        _, truth = world(40, 0.5, rng)
        hard = rng.normal(size=1500)
        wrong = ~np.stack([draw_bits(p, hard, 0.9, rng) for p in truth])
        measured = wrong.sum(1).astype(float)
        again = measured_again(wrong, 100, rng)
        found = compare(truth[None], measured, again, draw_weights(40, 100, rng))
        ceilings.append(found.ceiling)
        reached.append(found.taus[0])
    assert np.mean(ceilings) == pytest.approx(np.mean(reached), abs=0.03)
    assert np.mean(reached) < 0.95


def test_where_there_is_only_noise_few_pairs_are_resolved() -> None:
    rng = np.random.default_rng(4)
    hard = rng.normal(size=1000)
    wrong = ~np.stack([draw_bits(0.1, hard, 0.9, rng) for _ in range(30)])
    measured, again = wrong.sum(1).astype(float), measured_again(wrong, 400, rng)
    found = compare(rng.uniform(size=(1, 30)), measured, again, draw_weights(30, 400, rng))
    assert found.resolved < 0.12
    assert found.ceiling == pytest.approx(0.5, abs=0.1)
    low, high = tau_interval(found.taus[0], found.resampled[:, 0])
    assert low < 0 < high
