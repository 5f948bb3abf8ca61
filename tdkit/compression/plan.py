"""A plan: which layers become what. A JSON file that a person can read, edit and apply again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from tdkit.calibration.batchnorm import CALIBRATIONS, Calibration
from tdkit.costs.base import Cost
from tdkit.errors import UnreadableFileError, UsageError
from tdkit.planners.candidate import Candidate, to_json

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
