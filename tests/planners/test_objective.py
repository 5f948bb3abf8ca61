"""Several bounds between candidates and planners, which may be of the form that knows one."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdkit.costs.base import Change
from tdkit.costs.macs import MACS
from tdkit.costs.params import PARAMS
from tdkit.errors import UnlawfulError, UsageError
from tdkit.metrics.weights import RELATIVE
from tdkit.planners.base import Option, holds_several
from tdkit.planners.candidate import Candidate
from tdkit.planners.exact import exact
from tdkit.planners.greedy import greedy
from tdkit.planners.objective import Bound, OutOfReachError, choose


def candidate(layer: str, params: int, macs: int, error: float) -> Candidate:
    """Of a layer of 1,000 parameters and as many MACs."""
    costs = {"params": Change(1000, params), "macs": Change(1000, macs)}
    return Candidate(layer, "svd", 1, params / 1000, costs, {"relative-weights": error})


def bounds(params: float, macs: float, total: int = 3000) -> list[Bound]:
    return [Bound(PARAMS, params, total), Bound(MACS, macs, total)]


CANDIDATES = st.lists(
    st.builds(
        candidate, st.sampled_from("abc"), *[st.integers(100, 1200)] * 2, st.floats(0.01, 0.99)
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60, deadline=None, database=None)
@given(candidates=CANDIDATES, params=st.floats(0.05, 1), macs=st.floats(0.05, 1))
def test_all_bounds_hold_to_the_integer_and_what_is_named_is_in_reach(
    candidates, params, macs
) -> None:
    asked = bounds(params, macs)
    try:
        chosen = choose(candidates, exact, asked, RELATIVE)
    except OutOfReachError as error:
        # Each that is named can be had.
        named = re.findall(r"(params|macs) ([\d.]+)(?:,|$)", str(error))
        for bound, (name, share) in zip(asked, named, strict=True):
            assert name == bound.cost.name
            choose(candidates, exact, [Bound(bound.cost, float(share), 3000)], RELATIVE)
        return
    for bound in asked:
        changes = [c.costs[bound.cost.name] for c in chosen]
        left = 3000 - sum(change.saving for change in changes if change)
        assert left <= math.floor(Fraction(str(bound.share)) * 3000)


def test_what_adds_to_one_cost_is_a_candidate_where_another_is_bounded_too() -> None:
    # Of few parameters and many MACs, and the other way round.
    narrow, fast = candidate("a", 200, 1100, 0.2), candidate("b", 1100, 200, 0.2)
    assert choose([narrow, fast], exact, bounds(0.77, 0.77), RELATIVE) == [narrow, fast]
    # The MACs that one adds take the other to save.
    assert choose([narrow, fast], exact, bounds(0.9, 1), RELATIVE) == [narrow, fast]
    assert choose([narrow, fast], exact, bounds(0.9, 1)[:1], RELATIVE) == [narrow]


def first_fit(options: Sequence[Option], needed: int) -> list[Option]:
    """A planner of a plugin, of the form that knows one bound."""
    assert all(option.saving > 0 for option in options)
    chosen: dict[str, Option] = {}
    for option in sorted(options, key=lambda o: (o.penalty, o.index)):
        if sum(o.saving for o in chosen.values()) < needed:
            chosen.setdefault(option.layer, option)
    return list(chosen.values())


def test_a_planner_of_the_old_form_holds_the_budget_and_is_asked_for_no_more() -> None:
    candidates = [candidate("a", 200, 1100, 0.2), candidate("b", 300, 200, 0.3)]
    assert not holds_several(first_fit)
    assert choose(candidates, first_fit, bounds(0.6, 1)[:1], RELATIVE) == candidates
    with pytest.raises(UsageError, match="first_fit holds no bound but the budget") as caught:
        choose(candidates, first_fit, bounds(0.6, 0.9), RELATIVE)
    assert "exact" in (caught.value.hint or "")


def test_a_planner_that_forgets_a_bound_is_named() -> None:
    def forgetful(options: Sequence[Option], needed: int, further: Any = ()) -> list[Option]:
        one = [option for option in options if option.saving > 0]
        return greedy(one, needed)

    assert holds_several(forgetful)
    candidates = [candidate("a", 200, 1100, 0.2), candidate("b", 900, 200, 0.3)]
    with pytest.raises(
        UnlawfulError, match="forgetful saves -100 of the 300 that the bound on macs asks for"
    ):
        choose(candidates, forgetful, bounds(0.8, 0.9), RELATIVE)


def test_callables_say_by_their_signature_what_they_hold() -> None:
    class Both:
        def __call__(self, options: Any, needed: int, further: Any = ()) -> list[Option]:
            return []

    assert holds_several(exact)
    assert holds_several(Both())
    assert not holds_several(greedy)
