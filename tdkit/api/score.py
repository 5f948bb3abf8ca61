"""``tdkit.score``: the approximation error of every candidate."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tdkit import arguments, defaults
from tdkit.api.aiming import aim
from tdkit.api.compress import Settings
from tdkit.api.files import DEFAULT
from tdkit.api.subject import Given, Model, open_subject, settled
from tdkit.api.tradeoff import Point, TradeOff
from tdkit.compression.compress import make_plan, refuse_closed
from tdkit.compression.plan import Plan
from tdkit.compression.scoring import COMPRESSION_KEEPS, PAPER_KEEPS, Grid, looks_at_data
from tdkit.compression.scoring import score as score_candidates
from tdkit.costs.base import CALLS, Cost, total_cost
from tdkit.errors import UsageError, first_line
from tdkit.files import atomic_write, check_writable
from tdkit.layers.traced import TracedModel
from tdkit.planners.candidate import Candidate, to_json
from tdkit.planners.objective import OutOfReachError
from tdkit.progress import Progress, listening
from tdkit.registry import (
    Registry,
    load_registry,
    lookup,
    method_limits,
    method_versions,
    resolve_methods,
)
from tdkit.tables import Table, sizes

KEEPS_OF_COMPRESS = "compress"
"""What stands for the keeps and methods that ``tdkit.compress`` considers."""


@dataclass(frozen=True)
class Scores:
    """The scored candidates of a model.

    Attributes:
        candidates: All of them.
        metrics: The errors that they have.
        totals: What the whole model costs, by the name of each cost that is known.
        grid: What was scored, and how.
        model: What was scored: a file, a registered name or a class.
        notes: What the user should know.
        written: The file that they were written to, where one was asked for.
    """

    candidates: tuple[Candidate, ...]
    metrics: tuple[str, ...]
    totals: Mapping[str, int]
    grid: Grid
    model: str
    notes: tuple[str, ...] = ()
    written: Path | None = None

    def __str__(self) -> str:
        """A table for each metric."""
        return "\n\n".join(f"{name}\n{self.table(name)}" for name in self.metrics)

    def _repr_html_(self) -> str:
        return "".join(f"<p>{m}</p>{self.table(m)._repr_html_()}" for m in self.metrics)

    def table(self, metric: str) -> Table:
        """A row for each candidate, with its error by one metric."""
        rows, previous = [], None
        for c in self.candidates:
            name = c.layer if c.layer != previous else ""
            previous = c.layer
            error = f"{c.errors[metric]:.4g}"
            rows.append((name, c.method, sizes(c.rank), f"{c.keep:.3f}", error))
        columns = ("layer", "method", "rank", "keep", "error")
        return Table(columns, tuple(rows), frozenset(("keep", "error")))

    def to_json(self) -> dict[str, Any]:
        """The candidates as JSON values."""
        return {
            "tdkit_scores": 1,
            "model": self.model,
            "rule": self.grid.rule,
            "seed": self.grid.seed,
            "candidates": [to_json(candidate) for candidate in self.candidates],
        }

    def plan(
        self,
        budget: float = defaults.BUDGET,
        *,
        cost: str = defaults.COST,
        bounds: Mapping[str, float] | None = None,
        metric: str = defaults.METRIC,
        penalty: str | None = None,
        planner: str | None = None,
        calibration: str = defaults.CALIBRATION,
        effort: str = defaults.EFFORT,
    ) -> Plan:
        """Choose among the candidates, without scoring again; see :func:`tdkit.plan`.

        Raises:
            UsageError: If an option is wrong or the budget is out of reach.
        """
        how = settled(calibration, defaults.NO_DATA_CALIBRATION)
        goal, chooser = aim(load_registry(), budget, cost, bounds, metric, penalty, planner, effort)
        lacking = [c.name for c, _ in goal.shares if c.name not in self.totals]
        if not all(goal.metric.name in c.errors for c in self.candidates):
            lacking.append(goal.metric.name)
        if lacking:
            there = f"they have {', '.join(self.totals)} and {', '.join(self.metrics)}"
            raise UsageError(f"the scores have no {' and no '.join(lacking)}", there)
        goal = replace(goal, calibration=how)
        return make_plan(self.totals, self.candidates, goal, chooser, self.grid)

    def trade_off(self, budgets: float | Sequence[float] | None = None, **options: Any) -> TradeOff:
        """What is to be had at every budget: a plan for each, without scoring again.

        Args:
            budgets: Fractions that may remain; some from 0.9 to 0.02 by default.
            **options: What :meth:`plan` takes beside the budget.

        Raises:
            UsageError: If an option is wrong; a budget out of reach is a row that says so.
        """
        asked = defaults.BUDGETS if budgets is None else arguments.fractions(budgets, "budgets")
        return TradeOff(tuple(self._point(budget, options) for budget in asked), self.model)

    def _point(self, budget: float, options: Mapping[str, Any]) -> Point:
        try:
            plan = self.plan(budget, **options)
        except OutOfReachError as error:
            return Point(budget, None, {}, None, str(error))
        return Point.of(plan, self.totals)

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write the candidates as JSON.

        Args:
            path: Where to.
            force: Replace an existing file.

        Raises:
            StorageError: If it cannot be written.
        """
        with atomic_write(Path(path), force=force, inputs=[self.model]) as temporary:
            temporary.write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")
        return Path(path)


def score(
    model: Model,
    metrics: str | Sequence[str] = defaults.METRIC,
    *,
    rule: str = defaults.RULE,
    methods: str | Sequence[str] | None = None,
    settings: Settings | None = None,
    keeps: float | str | Sequence[float] | None = None,
    layers: str | Sequence[str] = (),
    include_ends: bool = False,
    input_shape: str | Sequence[int] | None = None,
    example_inputs: Any = None,
    data: Any = None,
    data_root: str | Path | None = None,
    samples: int = defaults.SCORE_SAMPLES,
    arch: str | None = None,
    weights: str | None = None,
    allow_classes: str | Sequence[str] = (),
    unsafe_load: bool = False,
    device: str | None = None,
    seed: int = defaults.SEED,
    output: str | Path | None = None,
    force: bool = False,
    progress: Progress | bool = False,
) -> Scores:
    """Score every layer, method and keep.

    Args:
        model: A module, which stays as it is; a model file; or a registered name.
        metrics: Names of approximation errors; those of features need ``data``.
        rule: ``best`` or ``proportional``, see
            :meth:`tdkit.decompositions.base.Prepared.rank`.
        methods: Names of decompositions; all of them by default.
        settings: Of methods: ``{"cp": {"sweeps": 20}}``.
        keeps: Fractions of a layer's parameters; those of the paper by default. ``compress``
            stands for what :func:`compress` considers: more of them, and by default each method
            only where it is fast, so that plans of the scores are those that it makes.
        layers: Shell patterns of layer names; all by default.
        include_ends: Score the first and the last layer too.
        input_shape: See :func:`compress`, as for all that follows.
        example_inputs: Arguments of a forward pass, tensors of any shape.
        data: Batches of model inputs, tensors of any shape, or a data set.
        data_root: Folder to look for data sets in first.
        samples: Images of a data set to measure features on.
        arch: The architecture of a state_dict.
        weights: Weights of a registered model.
        allow_classes: Classes of yours that the file may hold.
        unsafe_load: Run whatever code the file holds.
        device: Where to work.
        seed: Seeds every random start.
        output: Write the candidates there as JSON; ``auto`` makes a name from the model's.
        force: Replace an existing file.
        progress: A callback, or True for a bar.

    Raises:
        UsageError: If an option is wrong, or data are missing.
        UnsupportedError: If the model cannot be copied or run, or no layer can be compressed.
        TdkitError: Of the kind that fits what is wrong with a file.
    """
    registry = load_registry()
    names = arguments.names(metrics, "metrics")
    found = [lookup(registry.metrics, name, "metric") for name in names]
    planning = isinstance(keeps, str) and keeps == KEEPS_OF_COMPRESS
    wanted = None if methods is None else arguments.methods(methods)
    usual = COMPRESSION_KEEPS if planning else PAPER_KEEPS
    limits = method_limits(registry, wanted) if planning else {}
    if wanted is None and not planning:
        wanted = tuple(registry.decompositions)
    chosen = resolve_methods(registry, wanted, settings)
    grid = Grid(
        chosen,
        [record.create() for record in found],
        usual if keeps is None or planning else arguments.keeps(keeps),
        rule,
        arguments.seed(seed),
        limits=limits,
        versions=method_versions(registry, chosen),
    )
    given = Given(
        arch,
        weights,
        allow_classes,
        unsafe_load,
        input_shape,
        None if example_inputs is None else arguments.example(example_inputs),
        data,
        data_root,
        device,
        seed,
    )
    subject = open_subject(model, registry, given)
    source = subject.opened.loaded.source
    path = _path(output, subject.opened.name)
    if path is not None:
        check_writable(path, force=force, inputs=[source])
    with listening(progress) as update:
        patterns = arguments.names(layers, "layers")
        looks = looks_at_data(grid.methods, grid.metrics)
        traced = TracedModel.of(
            subject.model,
            subject.inputs(),
            patterns=patterns,
            include_ends=include_ends,
            inplace=subject.owned,
            # What only reads the weights needs no copy of them.
            readonly=not looks,
        )
        refuse_closed(traced.layers)
        totals, costs, doubts = _totals(traced, registry)
        grid = replace(grid, costs=costs)
        candidates = score_candidates(
            traced,
            grid,
            batches=subject.features(samples) if looks else (),
            progress=lambda done, total: update("scoring", done, total),
        )
    scores = Scores(
        candidates=tuple(candidates),
        metrics=tuple(record.name for record in found),
        totals=totals,
        grid=grid,
        model=source,
        notes=(*subject.opened.notes, *traced.notes, *doubts),
        written=path,
    )
    if path is not None:
        scores.save(path, force=force)
    return scores


def _totals(
    traced: TracedModel, registry: Registry
) -> tuple[dict[str, int], list[Cost], list[str]]:
    """What the model costs, by all costs that work, and a note on each that does not."""
    totals, costs, notes = {}, [], []
    known = all(layer.calls is not None for layer in traced.layers)
    for name, record in registry.costs.items():
        try:
            cost = record.create()
            if known or CALLS not in cost.needs:
                totals[name] = total_cost(traced.model, traced.layers, cost)
            costs.append(cost)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a plugin may fail in any way, and nobody asked for it
            notes.append(f"the cost {name} is left out: {first_line(error)}")
    return totals, costs, notes


def _path(output: str | Path | None, name: str) -> Path | None:
    if output is None:
        return None
    return Path(f"{name}-scores.json") if str(output) == DEFAULT else Path(output)
