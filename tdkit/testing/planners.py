"""The laws that every planner obeys."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from types import FunctionType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tdkit import defaults
from tdkit.planners.base import Option, Planner, UnreachableError, holds_several
from tdkit.pytest_plugin import CASES

OPTIONS = st.lists(
    st.tuples(st.sampled_from("abcd"), st.integers(1, 30), st.floats(0, 1)), min_size=1, max_size=9
).map(lambda rows: [Option(name, s, p, i) for i, (name, s, p) in enumerate(rows)])
"""A few options of at most four layers."""

SEVERAL = st.lists(
    st.tuples(
        st.sampled_from("abcd"),
        st.integers(-20, 30),
        st.floats(0, 1),
        st.tuples(st.integers(-20, 30), st.integers(-20, 30)),
    ),
    min_size=1,
    max_size=9,
).map(lambda rows: [Option(name, s, p, i, more) for i, (name, s, p, more) in enumerate(rows)])
"""A few options under three bounds, which may save of one cost and add to another."""


SEEDS = st.integers(0, 99)
"""Of another order."""


class PlannerLaws:
    """Subclass it in a test module and set ``planner``."""

    planner: Planner

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        planner: Any = vars(cls).get("planner")
        if isinstance(planner, FunctionType):  # as an attribute it would become a method
            cls.planner = staticmethod(planner)

    def test_laws(self, request: pytest.FixtureRequest) -> None:
        """What :func:`check_planner` checks, on drawn options."""

        @settings(
            max_examples=request.config.getoption("cases", CASES),
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(options=OPTIONS, share=st.floats(0, 1), seed=SEEDS)
        def laws(options: list[Option], share: float, seed: int) -> None:
            check_planner(self.planner, options, int(share * most_saved(options)), seed)

        laws()

    def test_laws_of_several_bounds(self, request: pytest.FixtureRequest) -> None:
        """The same of a planner that holds further bounds; of any other there are none."""

        @settings(
            max_examples=request.config.getoption("cases", CASES),
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(options=SEVERAL, picks=st.lists(st.booleans(), min_size=9, max_size=9), seed=SEEDS)
        def laws(options: list[Option], picks: list[bool], seed: int) -> None:
            # What some choice saves is in reach.
            chosen = {o.layer: o for o, taken in zip(options, picks, strict=False) if taken}
            needed, *further = saved_in_all(list(chosen.values()), 3)
            check_planner(self.planner, options, needed, seed, further)

        if holds_several(self.planner):
            laws()

    def test_nothing_needed_is_nothing_taken(self) -> None:
        """Whatever there is to take."""
        assert list(self.planner([Option("a", 5, 0.1, 0)], 0)) == []
        assert list(self.planner([], -3)) == []

    def test_nothing_to_take_is_out_of_reach(self) -> None:
        """And says that nothing can be saved."""
        with pytest.raises(UnreachableError) as caught:
            self.planner([], 1)
        assert caught.value.most == 0


def check_planner(
    planner: Planner,
    options: Sequence[Option],
    needed: int,
    seed: int = defaults.SEED,
    further: Sequence[int] = (),
) -> None:
    """Check law 9 on some options.

    Every bound is held with at most one option per layer, their order is irrelevant, and the choice
    is never better than brute force, which would mean that the planner cheats. What is out of
    reach says how much can be saved.

    Args:
        planner: The planner.
        options: A few: all choices among them are tried.
        needed: The cost to save, in reach.
        seed: Of another order.
        further: What to save of the cost of each further bound, in reach together with it.
    """

    def plan(options: Sequence[Option], needed: int) -> list[Option]:
        several: Any = planner
        return list(several(options, needed, further) if further else planner(options, needed))

    wanted = (needed, *further)
    choice = plan(options, needed)
    assert len({option.layer for option in choice}) == len(choice), "two options of one layer"
    assert all(option in options for option in choice), "an option that was not there"
    for saved, least_saved in zip(saved_in_all(choice, len(wanted)), wanted, strict=True):
        assert saved >= least_saved, f"it saves {saved} of the {least_saved} needed"
    penalty = sum(option.penalty for option in choice)
    least = least_penalty(options, needed, further)
    assert penalty >= least - 1e-9, f"a penalty of {penalty} cannot be: the least is {least}"
    shuffled = random.Random(seed).sample(list(options), len(options))
    assert plan(shuffled, needed) == choice, "the order of the options matters"
    most = most_saved(options)
    with pytest.raises(UnreachableError) as caught:
        plan(options, most + 1)
    if not further:
        assert caught.value.most == most, f"{most} can be saved, not {caught.value.most}"


def saved_in_all(choice: Sequence[Option], bounds: int) -> list[int]:
    """What a choice saves of the cost of every bound."""
    return [sum(option.savings[bound] for option in choice) for bound in range(bounds)]


def most_saved(options: Sequence[Option]) -> int:
    """The most that can be saved with one option per layer."""
    most: dict[str, int] = {}
    for option in options:
        most[option.layer] = max(option.saving, most.get(option.layer, 0))
    return sum(most.values())


def least_penalty(options: Sequence[Option], needed: int, further: Sequence[int] = ()) -> float:
    """The least summed penalty of all choices that save as much, by trying each."""
    wanted, best = (needed, *further), math.inf
    for taken in choices(options):
        saved = saved_in_all(taken, len(wanted))
        if all(a >= b for a, b in zip(saved, wanted, strict=True)):
            best = min(best, sum(option.penalty for option in taken))
    return best


def choices(options: Sequence[Option]) -> Iterator[list[Option]]:
    """All choices of at most one option per layer."""
    layers = sorted({option.layer for option in options})
    groups = [[None, *(o for o in options if o.layer == layer)] for layer in layers]
    for choice in itertools.product(*groups):
        yield [option for option in choice if option]
