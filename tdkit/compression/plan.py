"""A plan: which layers become what. A JSON file that a person can read, edit and apply again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tdkit import defaults
from tdkit.calibration.batchnorm import CALIBRATIONS, Calibration
from tdkit.errors import UnreadableFileError, UsageError, command
from tdkit.planners.candidate import Candidate, to_json
from tdkit.recipes import Setting
from tdkit.tables import Table, number, percent, sizes

FORMAT = 1

Settings = Mapping[str, Mapping[str, Setting]]
"""By the name of a method its settings."""


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
        penalty: By what its errors add up over layers.
        planner: The planner that chose.
        calibration: What the compressed layers are fitted to; ``data`` needs some.
        effort: How hard, where it is data; one of :data:`tdkit.defaults.EFFORTS`.
        fold: Whether BatchNorms are folded into the layers before them in the end.
        settings: Of the methods of the moves, defaults included, where known.
        versions: Of tdkit and of the plugins that they come from, where known.
        bounds: The fraction of other costs that may remain, by their names.
        candidates: The scored candidates behind the moves, in the same order, where known.
    """

    moves: tuple[Move, ...]
    seed: int = defaults.SEED
    budget: float | None = None
    cost: str = defaults.COST
    metric: str | None = None
    penalty: str | None = None
    planner: str | None = None
    calibration: Calibration = defaults.NO_DATA_CALIBRATION
    effort: str = defaults.OLD_EFFORT
    fold: bool = False
    settings: Settings = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    bounds: Mapping[str, float] = field(default_factory=dict)
    candidates: tuple[Candidate, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        """What it aims at, and a line for each move."""
        return f"{self._head()}\n\n{self.table()}" if self.moves else self._head()

    def _repr_html_(self) -> str:
        head = f"<p>{self._head()}</p>"
        return head + (self.table()._repr_html_() if self.moves else "")

    def _head(self) -> str:
        if self.budget is None:
            return f"a plan of {len(self.moves)} moves, written by hand"
        shares = {self.cost: self.budget, **self.bounds}.items()
        what = " and ".join(f"{100 * share:g}% of the {cost}" for cost, share in shares)
        return f"a plan of {len(self.moves)} moves for {what}"

    def table(self) -> Table:
        """The moves, with what is known of their parameters and errors."""
        if not self.candidates:
            rows = tuple((m.layer, m.method, sizes(m.rank)) for m in self.moves)
            return Table(("layer", "method", "rank"), rows)
        numbers = ("parameters", "after", "kept", "error")
        columns = ("layer", "method", "rank", *numbers)
        return Table(columns, tuple(map(self._row, self.candidates)), frozenset(numbers))

    def _row(self, c: Candidate) -> tuple[str, ...]:
        found = c.costs.get("params")
        before, after = (found.before, found.after) if found else (None, None)
        error = "–" if self.metric is None else f"{c.errors[self.metric]:.4f}"
        counts = (number(before), number(after), percent(after, before))
        return (c.layer, c.method, sizes(c.rank), *counts, error)

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
            "bounds": dict(self.bounds),
            "metric": self.metric,
            "penalty": self.penalty,
            "planner": self.planner,
            "seed": self.seed,
            "calibration": self.calibration,
            "effort": self.effort,
            "fold": self.fold,
            "settings": {name: dict(values) for name, values in self.settings.items()},
            "versions": dict(self.versions),
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
                f'{source} is not a tdkit plan: it has no "tdkit_plan": {FORMAT}', _made_by()
            )
        entries = value.get("moves")
        if not isinstance(entries, Sequence) or isinstance(entries, str):
            raise UsageError(f'{source} has no list of "moves"', _made_by())
        seed, cost = value.get("seed", defaults.SEED), value.get("cost", defaults.COST)
        budget = value.get("budget")
        if type(seed) is not int:
            raise UsageError(f'{source}: "seed" is not a whole number: {seed!r}')
        if not isinstance(cost, str):
            raise UsageError(f'{source}: "cost" is not the name of a cost: {cost!r}')
        for key in ("metric", "penalty", "planner"):
            if not isinstance(value.get(key), str | None):
                raise UsageError(f'{source}: "{key}" is not a name: {value[key]!r}')
        calibration = value.get("calibration", defaults.NO_DATA_CALIBRATION)
        if calibration not in CALIBRATIONS:
            known = ", ".join(CALIBRATIONS)
            raise UsageError(f'{source}: "calibration" is none of {known}: {calibration!r}')
        effort = value.get("effort", defaults.OLD_EFFORT)
        if effort not in defaults.EFFORTS:
            known = ", ".join(defaults.EFFORTS)
            raise UsageError(f'{source}: "effort" is none of {known}: {effort!r}')
        fold = value.get("fold", False)
        if not isinstance(fold, bool):
            raise UsageError(f'{source}: "fold" is neither true nor false: {fold!r}')
        if budget is not None and not _is_share(budget):
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
            penalty=value.get("penalty"),
            planner=value.get("planner"),
            calibration=calibration,
            effort=effort,
            fold=fold,
            settings=_settings(value.get("settings", {}), source),
            versions=_versions(value.get("versions", {}), source),
            bounds=_bounds(value.get("bounds", {}), source),
        )


def _settings(value: Any, source: str) -> Settings:
    plain = isinstance(value, Mapping) and all(
        isinstance(settings, Mapping)
        and all(isinstance(setting, bool | int | float | str) for setting in settings.values())
        for settings in value.values()
    )
    if not plain:
        raise UsageError(
            f'{source}: "settings" are not settings of methods',
            'write them as {"cp": {"sweeps": 20}}, or leave them out',
        )
    return {str(name): dict(settings) for name, settings in value.items()}


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= 1


def _bounds(value: Any, source: str) -> dict[str, float]:
    if not isinstance(value, Mapping) or not all(map(_is_share, value.values())):
        raise UsageError(
            f'{source}: "bounds" are not fractions above 0 and at most 1 by cost',
            "they are for the record: leave them out where they are not known",
        )
    return {str(name): share for name, share in value.items()}


def _versions(value: Any, source: str) -> dict[str, str]:
    if not isinstance(value, Mapping) or not all(isinstance(v, str) for v in value.values()):
        raise UsageError(
            f'{source}: "versions" are not versions by name', "they are for the record: leave them"
        )
    return {str(name): version for name, version in value.items()}


def read_plan(path: Path) -> Plan:
    """Read a plan file.

    Raises:
        UnreadableFileError: If it is missing or not JSON.
        UsageError: If it is not a plan.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnreadableFileError(f"{path}: {error.strerror}", _made_by()) from error
    except (ValueError, RecursionError) as error:
        raise UnreadableFileError(
            f"{path} is not a JSON file: {error}",
            f"the plan comes first, then the model; {_made_by()}",
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


def _made_by() -> str:
    return f"make one with: {command('plan')}"
