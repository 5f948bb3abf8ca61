"""The exact planner against all choices, and where a solver's tolerances would mislead it."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdkit.errors import UsageError
from tdkit.planners.base import Option, UnreachableError
from tdkit.planners.exact import create, exact
from tdkit.testing.planners import OPTIONS, SEVERAL, choices, least_penalty, most_saved

CASES = settings(max_examples=60, deadline=None, database=None)


def saved(choice: Sequence[Option], bounds: int) -> tuple[int, ...]:
    return tuple(sum(o.savings[number] for o in choice) for number in range(bounds))


def penalty(choice: Sequence[Option]) -> float:
    return sum(option.penalty for option in choice)


@CASES
@given(options=OPTIONS, share=st.floats(0, 1))
def test_under_one_bound_it_is_what_trying_all_choices_finds(options, share) -> None:
    needed = int(share * most_saved(options))
    choice = exact(options, needed)
    assert saved(choice, 1)[0] >= needed
    assert penalty(choice) == pytest.approx(least_penalty(options, needed), rel=1e-9, abs=0)


@CASES
@given(options=SEVERAL, wanted=st.tuples(*[st.integers(-15, 25)] * 3))
def test_under_several_bounds_too_and_what_is_out_of_reach_says_what_is_not(
    options, wanted
) -> None:
    needed, *further = wanted
    found = [saved(choice, 3) for choice in choices(options)]
    held = [row for row in found if all(a >= b for a, b in zip(row, wanted, strict=True))]
    if held:
        choice = exact(options, needed, further)
        assert all(a >= b for a, b in zip(saved(choice, 3), wanted, strict=True))
        least = least_penalty(options, needed, further)
        assert penalty(choice) == pytest.approx(least, rel=1e-9, abs=0)
        return
    with pytest.raises(UnreachableError) as caught:
        exact(options, needed, further)
    for bound, most in enumerate(caught.value.each):
        others = [n for n in range(3) if n != bound]
        rest = [row for row in found if all(row[n] >= wanted[n] for n in others)]
        assert most == max(row[bound] for row in rest or found)


@CASES
@given(
    savings=st.lists(st.integers(10**12, 10**12 + 40), min_size=6, max_size=6),
    short=st.integers(0, 40),
)
def test_bounds_hold_to_the_last_unit_of_a_trillion(savings, short) -> None:
    # HiGHS takes sums within 1e-6 of what is asked for enough: a million units of these.
    options = [Option("abc"[i // 2], s, (s % 41) / 40, i) for i, s in enumerate(savings)]
    needed = most_saved(options) - short
    choice = exact(options, needed)
    assert saved(choice, 1)[0] >= needed
    assert penalty(choice) == pytest.approx(least_penalty(options, needed), rel=1e-9, abs=0)


def test_what_costs_little_is_told_apart_beside_what_costs_much() -> None:
    options = [
        Option("a", 10, 3e-12, 0),
        Option("a", 10, 2e-12, 1),
        Option("a", 25, 1e3, 2),
        Option("b", 10, 1e-12, 3),
        Option("b", 12, 4e-12, 4),
    ]
    assert exact(options, 10) == [options[3]]
    assert exact(options, 20) == [options[1], options[3]]
    assert exact(options, 21) == [options[1], options[4]]
    assert exact(options, 30) == [options[2], options[3]]


def test_what_adds_to_one_cost_is_taken_for_what_it_saves_of_another() -> None:
    # Parameters and MACs: the first halves the one and adds to the other.
    options = [Option("a", 50, 0.1, 0, (-10,)), Option("b", -5, 0.2, 1, (30,))]
    assert exact(options, 40, (20,)) == options
    # Of each the most while the other is held, and where that cannot be, the most there is.
    for wanted, most in {(46, 20): (45, -10), (51, 20): (45, 30)}.items():
        with pytest.raises(UnreachableError) as caught:
            exact(options, wanted[0], wanted[1:])
        assert caught.value.each == most


@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_the_options_does_not_matter_where_choices_tie(seed) -> None:
    options = [Option(name, 10, 0.5, i) for i, name in enumerate("abcdabcd")]
    shuffled = random.Random(seed).sample(options, len(options))
    assert exact(shuffled, 20) == exact(options, 20)


def test_without_scipy_it_says_how_to_get_it(monkeypatch) -> None:
    assert create() is exact
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs the package scipy") as caught:
        create()
    assert caught.value.hint == "pip install 'tdkit[exact]'"
