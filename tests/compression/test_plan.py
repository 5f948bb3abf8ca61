"""Plans as files, and the choice under a budget."""

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tdkit.compression.plan import Move, Plan, read_plan
from tdkit.costs.base import Change, Cost
from tdkit.costs.macs import MACS
from tdkit.costs.params import PARAMS
from tdkit.errors import UnreadableFileError, UsageError
from tdkit.metrics.base import Metric
from tdkit.metrics.weights import RELATIVE
from tdkit.planners.candidate import Candidate
from tdkit.planners.greedy import greedy
from tdkit.planners.objective import Bound, choose


def candidate(
    layer: str, before: int, after: int, error: float, macs: tuple[int, int] | None = None
) -> Candidate:
    costs = {"params": Change(before, after), "macs": Change(*macs) if macs else None}
    return Candidate(layer, "svd", 1, after / before, costs, {"relative-weights": error})


def pick(
    candidates: list[Candidate],
    budget: float,
    total: int = 1000,
    cost: Cost = PARAMS,
    metric: Metric = RELATIVE,
) -> list[Any]:
    return choose(candidates, greedy, [Bound(cost, budget, total)], metric)


MOVES = (Move("a.b", "svd", 3), Move("c", "tucker", (2, 4)))
FULL = Plan(
    MOVES,
    seed=7,
    budget=0.25,
    cost="macs",
    metric="absolute-weights",
    planner="greedy",
    calibration="data",
    settings={"svd": {}, "tucker": {"sweeps": 3, "tolerance": 1e-5, "deep": True, "start": "x"}},
    versions={"tdkit": "1.2", "tdkit-mine": "unknown"},
    bounds={"params": 0.5},
)


class TestJson:
    @pytest.mark.parametrize("plan", [FULL, Plan(MOVES), Plan(())])
    def test_round_trip(self, plan: Plan) -> None:
        assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan

    def test_scores_are_written_but_not_needed(self) -> None:
        costs = {"params": Change(20, 10), "macs": None}
        scored = Candidate("a.b", "svd", 3, 0.5, costs, {"relative-weights": 0.25})
        plan = Plan((MOVES[0],), candidates=(scored,))
        value = json.loads(json.dumps(plan.to_json()))
        assert value["moves"][0]["errors"] == {"relative-weights": 0.25}
        assert value["moves"][0]["params_before"] == 20
        assert value["moves"][0]["macs_after"] is None
        assert Plan.from_json(value) == plan

    def test_written_by_hand(self) -> None:
        text = '{"tdkit_plan": 1, "moves": [{"layer": 5, "method": "tt", "rank": [1, 2, 3]}]}'
        assert Plan.from_json(json.loads(text)) == Plan((Move("5", "tt", (1, 2, 3)),))

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"tdkit_plan": 2}, 'no "tdkit_plan": 1'),
            ({"moves": None}, 'no list of "moves"'),
            ({"moves": "abc"}, 'no list of "moves"'),
            ({"moves": {"layer": "a"}}, 'no list of "moves"'),
            ({"moves": ["a"]}, "move 1 is not an object"),
            ({"moves": [{"layer": "a", "rank": 1}]}, "move 1 has no method"),
            ({"moves": [{}]}, "move 1 has no layer, method, rank"),
            ({"seed": "x"}, '"seed" is not a whole number'),
            ({"seed": True}, '"seed" is not a whole number'),
            ({"seed": 1.5}, '"seed" is not a whole number'),
            ({"cost": 5}, '"cost" is not the name of a cost'),
            ({"budget": "50%"}, '"budget" is not a fraction'),
            ({"budget": 7}, '"budget" is not a fraction'),
            ({"budget": math.nan}, '"budget" is not a fraction'),
            ({"calibration": "magic"}, '"calibration" is none of none, noise, synthetic, data'),
            ({"calibration": ["none"]}, '"calibration" is none of none, noise, synthetic, data'),
            ({"settings": None}, '"settings" are not settings of methods'),
            ({"settings": []}, '"settings" are not settings of methods'),
            ({"settings": {"cp": 5}}, '"settings" are not settings of methods'),
            ({"settings": {"cp": {"sweeps": None}}}, '"settings" are not settings of methods'),
            ({"settings": {"cp": {"sweeps": [1]}}}, '"settings" are not settings of methods'),
            ({"settings": {"cp": {"sweeps": {}}}}, '"settings" are not settings of methods'),
            ({"versions": "1.2"}, '"versions" are not versions by name'),
            ({"versions": {"tdkit": 1.2}}, '"versions" are not versions by name'),
            ({"versions": None}, '"versions" are not versions by name'),
            ({"metric": 5}, '"metric" is not a name'),
            ({"bounds": None}, '"bounds" are not fractions'),
            ({"bounds": {"macs": "50%"}}, '"bounds" are not fractions'),
            ({"bounds": {"macs": 0}}, '"bounds" are not fractions'),
            ({"planner": ["greedy"]}, '"planner" is not a name'),
            ({"cost": None}, '"cost" is not the name of a cost'),
        ],
    )
    def test_what_is_no_plan_is_refused(self, change: dict[str, Any], reason: str) -> None:
        with pytest.raises(UsageError, match=f"plan.json.*{reason}"):
            Plan.from_json({**FULL.to_json(), **change}, "plan.json")

    @pytest.mark.parametrize("value", [None, [], "plan", 1, {}])
    def test_other_values_are_refused(self, value: Any) -> None:
        with pytest.raises(UsageError, match="is not a tdkit plan"):
            Plan.from_json(value)

    @pytest.mark.parametrize("rank", ["3", 2.5, True, None, [], [1, "2"], [1, [2]], {"r": 1}])
    def test_ranks_that_are_no_numbers_are_refused(self, rank: Any) -> None:
        entry = {"layer": "a", "method": "svd", "rank": rank}
        with pytest.raises(UsageError, match=r"move 2: rank .* is not a whole number"):
            Plan.from_json({"tdkit_plan": 1, "moves": [{**entry, "rank": 1}, entry]})


class TestRead:
    def test_a_file(self, tmp_path: Path) -> None:
        path = tmp_path / "plan.json"
        path.write_text(json.dumps(FULL.to_json(), indent=2), encoding="utf-8")
        assert read_plan(path) == FULL

    @pytest.mark.parametrize(
        "content", [b"", b"\xff\xfe\x00", b"moves: []", b"[" * 100_000, b'{"a": ' * 100_000]
    )
    def test_what_is_not_json_is_refused(self, content: bytes, tmp_path: Path) -> None:
        path = tmp_path / "plan.json"
        path.write_bytes(content)
        with pytest.raises(UnreadableFileError, match=r"plan\.json is not a JSON file") as caught:
            read_plan(path)
        assert "tdkit.plan" in str(caught.value.hint)

    def test_a_missing_file_and_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(UnreadableFileError, match="No such file"):
            read_plan(tmp_path / "plan.json")
        with pytest.raises(UnreadableFileError, match="directory"):
            read_plan(tmp_path)


class TestChoose:
    grid = (
        candidate("a", 500, 100, 0.5),
        candidate("a", 500, 300, 0.1),
        candidate("b", 400, 200, 0.2),
    )

    def test_the_budget_counts_the_whole_model(self) -> None:
        assert pick([*self.grid], 0.8) == [self.grid[1]]
        assert pick([*self.grid], 0.6) == [self.grid[1], self.grid[2]]
        assert pick([*self.grid], 0.4) == [self.grid[0], self.grid[2]]

    def test_a_budget_of_one_takes_nothing(self) -> None:
        assert pick([*self.grid], 1.0) == []

    def test_candidates_that_save_nothing_are_left_out(self) -> None:
        larger = candidate("a", 100, 900, 0.0)
        assert pick([larger, *self.grid], 0.8) == [self.grid[1]]

    def test_macs_are_counted_when_asked(self) -> None:
        few, many = candidate("a", 9, 8, 0.1, (10, 9)), candidate("b", 9, 8, 0.2, (900, 100))
        assert pick([few, many], 0.5, cost=MACS) == [many]

    def test_unknown_macs_are_refused(self) -> None:
        with pytest.raises(UsageError, match="MACs are unknown") as caught:
            pick([*self.grid], 0.5, cost=MACS)
        assert "input_shape=(3, 224, 224)" in str(caught.value.hint)

    def test_56_the_smallest_reachable_budget_is_named(self) -> None:
        with pytest.raises(
            UsageError, match=r"0\.39 is out of reach.* smallest reachable is 0\.4$"
        ):
            pick([*self.grid], 0.39)

    @settings(max_examples=300, deadline=None, database=None)
    @given(total=st.integers(10, 10**12), share=st.floats(0.001, 0.99))
    def test_56_it_is_reachable_and_nothing_much_smaller_is(self, total: int, share: float) -> None:
        saving = max(1, int(share * total))
        only = [candidate("a", total, total - saving, 0.1)]
        smallest = named(only, total)
        assert pick(only, smallest, total) == only
        if smallest > 2e-4:
            with pytest.raises(UsageError, match="out of reach"):
                pick(only, smallest - 1.1e-4, total)

    @settings(max_examples=300, deadline=None, database=None)
    @given(total=st.integers(1, 10**12), percent=st.integers(1, 99))
    @example(total=100, percent=29)  # 0.29 * 100 is 28.999...
    @example(total=3 * 10**11, percent=7)
    def test_no_rounding_takes_more_than_the_budget_or_asks_for_less(
        self, total: int, percent: int
    ) -> None:
        allowed = math.floor(Fraction(percent, 100) * total)
        only = [candidate("a", total + 1, allowed + 1, 0.1)]
        if allowed < total:
            assert pick(only, percent / 100, total) == only
            with pytest.raises(UsageError, match="out of reach"):
                pick([candidate("a", total + 1, allowed + 2, 0.1)], percent / 100, total)

    @pytest.mark.parametrize("error", [math.nan, math.inf])
    def test_errors_that_are_not_finite_are_left_out(self, error: float) -> None:
        assert pick([candidate("a", 500, 10, error), *self.grid], 0.8) == [self.grid[1]]

    @pytest.mark.parametrize("scale", [1e-200, 1e200])
    def test_squares_neither_overflow_nor_vanish(self, scale: float) -> None:
        small, large = candidate("b", 500, 100, scale), candidate("a", 500, 100, 3 * scale)
        squares = RELATIVE.adding_up_by("squares")
        assert pick([large, small], 0.6, metric=squares) == [small]
        assert pick([small, large], 0.6, metric=squares) == [small]

    def test_all_errors_zero(self) -> None:
        assert len(pick([candidate("a", 500, 100, 0.0), candidate("b", 500, 100, 0.0)], 0.6)) == 1


def named(candidates: list[Candidate], total: int) -> float:
    with pytest.raises(UsageError, match="smallest reachable is") as caught:
        pick(candidates, 1e-12, total)
    return float(str(caught.value).rpartition(" ")[2])
