"""Law 9, for every registered planner: the budget is held, order does not matter, and on small
instances a plan is never better than brute force (which would mean that it cheats)."""

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdkit.planners.base import Option, UnreachableError
from tdkit.registry import load_registry

PLANNERS = {name: record.create() for name, record in load_registry().planners.items()}

OPTIONS = st.lists(
    st.tuples(st.sampled_from("abcd"), st.integers(1, 30), st.floats(0, 1)), min_size=1, max_size=9
).map(lambda rows: [Option(name, s, p, i) for i, (name, s, p) in enumerate(rows)])


def brute_force(options: list[Option], needed: int) -> float:
    groups = [
        [None, *(o for o in options if o.layer == layer)] for layer in {o.layer for o in options}
    ]
    best = math.inf
    for choice in itertools.product(*groups):
        taken = [option for option in choice if option]
        if sum(option.saving for option in taken) >= needed:
            best = min(best, sum(option.penalty for option in taken))
    return best


@pytest.mark.parametrize("name", PLANNERS)
@settings(max_examples=200, deadline=None, database=None)
@given(options=OPTIONS, share=st.floats(0, 1), seed=st.integers(0, 99))
def test_law_9(name: str, options: list[Option], share: float, seed: int) -> None:
    planner = PLANNERS[name]
    most = sum(
        max(o.saving for o in options if o.layer == layer) for layer in {o.layer for o in options}
    )
    needed = int(share * most)
    plan = planner(options, needed)
    assert len({option.layer for option in plan}) == len(plan)
    assert sum(option.saving for option in plan) >= needed
    assert all(option in options for option in plan)
    penalty = sum(option.penalty for option in plan)
    assert penalty >= brute_force(options, needed) - 1e-9
    shuffled = random.Random(seed).sample(options, len(options))
    assert planner(shuffled, needed) == plan


@pytest.mark.parametrize("name", PLANNERS)
def test_nothing_needed_is_nothing_taken(name: str) -> None:
    assert PLANNERS[name]([Option("a", 5, 0.1, 0)], 0) == []
    assert PLANNERS[name]([], -3) == []


@pytest.mark.parametrize("name", PLANNERS)
def test_an_unreachable_budget_says_what_can_be_saved(name: str) -> None:
    options = [Option("a", 5, 0.1, 0), Option("a", 7, 0.2, 1), Option("b", 4, 0.3, 2)]
    with pytest.raises(UnreachableError) as caught:
        PLANNERS[name](options, 12)
    assert caught.value.most == 11
