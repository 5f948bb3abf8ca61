"""The laws that every planner obeys."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from types import FunctionType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tdkit import defaults
from tdkit.planners.base import Option, Planner, UnreachableError
from tdkit.pytest_plugin import CASES

OPTIONS = st.lists(
    st.tuples(st.sampled_from("abcd"), st.integers(1, 30), st.floats(0, 1)), min_size=1, max_size=9
).map(lambda rows: [Option(name, s, p, i) for i, (name, s, p) in enumerate(rows)])
"""A few options of at most four layers."""


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
        @given(options=OPTIONS, share=st.floats(0, 1), seed=st.integers(0, 99))
        def laws(options: list[Option], share: float, seed: int) -> None:
            check_planner(self.planner, options, int(share * most_saved(options)), seed)

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
    planner: Planner, options: Sequence[Option], needed: int, seed: int = defaults.SEED
) -> None:
    """Check law 9 on some options.

    The budget is held with at most one option per layer, their order is irrelevant, and the choice
    is never better than brute force, which would mean that the planner cheats. What is out of
    reach says how much can be saved.

    Args:
        planner: The planner.
        options: A few: all choices among them are tried.
        needed: The cost to save, in reach.
        seed: Of another order.
    """
    choice = planner(options, needed)
    assert len({option.layer for option in choice}) == len(choice), "two options of one layer"
    assert all(option in options for option in choice), "an option that was not there"
    saved = sum(option.saving for option in choice)
    assert saved >= needed, f"it saves {saved} of the {needed} needed"
    penalty, least = sum(option.penalty for option in choice), least_penalty(options, needed)
    assert penalty >= least - 1e-9, f"a penalty of {penalty} cannot be: the least is {least}"
    shuffled = random.Random(seed).sample(list(options), len(options))
    assert planner(shuffled, needed) == choice, "the order of the options matters"
    most = most_saved(options)
    with pytest.raises(UnreachableError) as caught:
        planner(options, most + 1)
    assert caught.value.most == most, f"{most} can be saved, not {caught.value.most}"


def most_saved(options: Sequence[Option]) -> int:
    """The most that can be saved with one option per layer."""
    most: dict[str, int] = {}
    for option in options:
        most[option.layer] = max(option.saving, most.get(option.layer, 0))
    return sum(most.values())


def least_penalty(options: Sequence[Option], needed: int) -> float:
    """The least summed penalty of all choices that save as much, by trying each."""
    layers = sorted({option.layer for option in options})
    groups = [[None, *(o for o in options if o.layer == layer)] for layer in layers]
    best = math.inf
    for choice in itertools.product(*groups):
        taken = [option for option in choice if option]
        if sum(option.saving for option in taken) >= needed:
            best = min(best, sum(option.penalty for option in taken))
    return best
