"""A plan: which layers become what. A JSON file that a person can read, edit and apply again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args

from tdkit.calibration import CALIBRATIONS, Calibration
from tdkit.candidates import Candidate, to_json
from tdkit.errors import UnreadableFileError, UsageError
from tdkit.planners.base import Option, Planner, UnreachableError

Cost = Literal["params", "macs"]

FORMAT = 1

_MADE_BY = "make one with: tdkit compress MODEL --dry-run"


@dataclass(frozen=True)
class Move:
    """One layer's replacement. To write one by hand, these three are enough.

    Attributes:
        layer: The layer's name.
        method: The method's name.
        rank: An int or a tuple of ints, as the method has it.
    """

    layer: str
    method: str
    rank: int | tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What to replace, and how it was chosen.

    Attributes:
        moves: The replacements.
        seed: Seeds the random starts of methods that have any.
        budget: The fraction of the model's cost that was asked for; None when written by hand.
        cost: The cost that the budget counts.
        metric: The error that guided the choice.
        planner: The planner that chose.
        calibration: How BatchNorm is fitted to the compressed layers; ``data`` needs some.
        candidates: The scored candidates behind the moves, in the same order, where known.
    """

    moves: tuple[Move, ...]
    seed: int = 0
    budget: float | None = None
    cost: Cost = "params"
    metric: str | None = None
    planner: str | None = None
    calibration: Calibration = "noise"
    candidates: tuple[Candidate, ...] = field(default=(), compare=False)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        detailed = [to_json(candidate) for candidate in self.candidates]
        plain = [
            {"layer": m.layer, "method": m.method, "rank": _listed(m.rank)} for m in self.moves
        ]
        return {
            "tdkit_plan": FORMAT,
            "budget": self.budget,
            "cost": self.cost,
            "metric": self.metric,
            "planner": self.planner,
            "seed": self.seed,
            "calibration": self.calibration,
            "moves": detailed or plain,
        }

    @classmethod
    def from_json(cls, value: Any, source: str = "the plan") -> Plan:
        """Read what :meth:`to_json` wrote, or a person edited.

        Raises:
            UsageError: If a key is missing, or a value is of the wrong type.
        """
        if not isinstance(value, Mapping) or value.get("tdkit_plan") != FORMAT:
            raise UsageError(
                f'{source} is not a tdkit plan: it has no "tdkit_plan": {FORMAT}', _MADE_BY
            )
        entries = value.get("moves")
        if not isinstance(entries, Sequence) or isinstance(entries, str):
            raise UsageError(f'{source} has no list of "moves"', _MADE_BY)
        seed, cost, budget = value.get("seed", 0), value.get("cost", "params"), value.get("budget")
        if type(seed) is not int:
            raise UsageError(f'{source}: "seed" is not a whole number: {seed!r}')
        if cost not in get_args(Cost):
            raise UsageError(f'{source}: "cost" is neither params nor macs: {cost!r}')
        calibration = value.get("calibration", "noise")
        if calibration not in CALIBRATIONS:
            known = ", ".join(CALIBRATIONS)
            raise UsageError(f'{source}: "calibration" is none of {known}: {calibration!r}')
        if budget is not None and not (type(budget) in (int, float) and 0 < budget <= 1):
            raise UsageError(
                f'{source}: "budget" is not a fraction above 0 and at most 1: {budget!r}',
                "it is for the record: leave it out where it is not known",
            )
        moves = tuple(_move(entry, f"{source}, move {i + 1}") for i, entry in enumerate(entries))
        return cls(
            moves=moves,
            seed=seed,
            budget=budget,
            cost=cost,
            metric=value.get("metric"),
            planner=value.get("planner"),
            calibration=calibration,
        )


def read_plan(path: Path) -> Plan:
    """Read a plan file.

    Raises:
        UnreadableFileError: If it is missing or not JSON.
        UsageError: If it is not a plan.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnreadableFileError(f"{path}: {error.strerror}", _MADE_BY) from error
    except (ValueError, RecursionError) as error:
        raise UnreadableFileError(
            f"{path} is not a JSON file: {error}",
            f"the plan comes first, then the model; {_MADE_BY}",
        ) from error
    return Plan.from_json(value, str(path))


def choose(
    candidates: Sequence[Candidate],
    planner: Planner,
    *,
    total: int,
    budget: float,
    cost: Cost,
    metric: str,
) -> list[Candidate]:
    """Let a planner choose so that the model's cost falls to the budget.

    Args:
        candidates: The scored grid; those whose error is not a finite number are passed over.
        planner: Sees savings and squared errors only.
        total: The whole model's cost.
        budget: The fraction of it that may remain.
        cost: Which cost.
        metric: Which error, squared, is the penalty.

    Raises:
        UsageError: If the budget is out of reach; the message names the smallest reachable one.
    """
    errors = [c.errors[metric] for c in candidates]
    # Relative to the largest, so that no square over- or underflows.
    largest = max(filter(math.isfinite, errors), default=0.0) or 1.0
    options = [
        Option(c.layer, saving, (error / largest) ** 2, index)
        for index, (c, error) in enumerate(zip(candidates, errors, strict=True))
        if (saving := _saving(c, cost)) > 0 and math.isfinite(error)
    ]
    # In fractions, so that 0.29 of 100 is 29 and the smallest budget named is in reach.
    allowed = math.floor(Fraction(str(float(budget))) * total)
    try:
        chosen = planner(options, total - allowed)
    except UnreachableError as error:
        smallest = math.ceil(Fraction(total - error.most, total) * 10**4) / 10**4
        raise UsageError(
            f"a budget of {budget:g} is out of reach: the smallest reachable is {smallest:g}",
            "score lower keeps, more --methods, or let the first and last layer in with"
            " --include-ends",
        ) from error
    return [candidates[option.index] for option in chosen]


def _saving(candidate: Candidate, cost: Cost) -> int:
    if cost == "params":
        return candidate.params_before - candidate.params_after
    if candidate.macs_before is None or candidate.macs_after is None:
        raise UsageError(
            "MACs are unknown without the shape of the input",
            "give it with --input-shape, such as 3,224,224",
        )
    return candidate.macs_before - candidate.macs_after


def _move(entry: Any, source: str) -> Move:
    if not isinstance(entry, Mapping):
        raise UsageError(f"{source} is not an object with layer, method and rank")
    missing = [key for key in ("layer", "method", "rank") if key not in entry]
    if missing:
        raise UsageError(f"{source} has no {', '.join(missing)}")
    rank = entry["rank"]
    numbers = rank if isinstance(rank, list) else [rank]
    if not numbers or any(type(number) is not int for number in numbers):
        raise UsageError(
            f"{source}: rank {rank!r} is not a whole number or a list of them",
            'write "rank": 8, or "rank": [8, 8] for a method of several',
        )
    return Move(
        str(entry["layer"]), str(entry["method"]), tuple(rank) if isinstance(rank, list) else rank
    )


def _listed(rank: int | tuple[int, ...]) -> int | list[int]:
    return list(rank) if isinstance(rank, tuple) else rank
