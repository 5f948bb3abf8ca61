"""A model and a goal to the best compressed model of several plans."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from types import MappingProxyType
from typing import Any

from torch import nn

from tdkit import defaults
from tdkit.calibration.batchnorm import CALIBRATIONS, Calibration
from tdkit.compression.applying import Applying, Compressed
from tdkit.compression.calibrating import State, kept_state, restore
from tdkit.compression.drafts import Draft, drafts_from_data
from tdkit.compression.folding import Folding
from tdkit.compression.kept import Kept
from tdkit.compression.plan import Move, Plan
from tdkit.compression.scoring import Grid, score
from tdkit.compression.surgery import Surgery
from tdkit.costs.base import Cost, total_cost
from tdkit.costs.params import PARAMS
from tdkit.decompositions.settings import settings_of
from tdkit.errors import UnsupportedError, UsageError, command, option
from tdkit.layers.inventory import Layer
from tdkit.layers.traced import TracedModel
from tdkit.metrics.base import Metric
from tdkit.metrics.weights import RELATIVE
from tdkit.planners.base import Planner
from tdkit.planners.candidate import Candidate
from tdkit.planners.objective import Bound, choose


@dataclass(frozen=True)
class Goal:
    """What a compression aims at.

    Attributes:
        budget: The fraction of the whole model's cost that may remain, in (0, 1].
        cost: What the budget counts.
        metric: The error whose penalties, summed over layers, are kept small.
        planner: The planner's name, for the record.
        calibration: What the compressed layers are fitted to; ``data`` needs some.
        effort: How hard, where it is data; one of :data:`tdkit.defaults.EFFORTS`.
        fold: Whether BatchNorms are folded into the layers before them in the end.
        further: Other costs, and the fraction of each that may remain.

    Raises:
        UsageError: If the budget or another bound is no such fraction, a cost is bounded twice, or
            the calibration or the effort unknown.
    """

    budget: float
    cost: Cost = PARAMS
    metric: Metric = RELATIVE
    planner: str = defaults.PLANNER
    calibration: Calibration = defaults.NO_DATA_CALIBRATION
    effort: str = defaults.EFFORT
    fold: bool = False
    further: tuple[tuple[Cost, float], ...] = ()

    def __post_init__(self) -> None:
        for cost, share in self.shares:
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
                what = "budget" if cost is self.cost else f"bound on {cost.name}"
                raise UsageError(
                    f"the {what} {share!r} is not a fraction above 0 and at most 1",
                    "it is the fraction of the model that remains: 0.5 keeps at most half",
                )
        names = [cost.name for cost, _ in self.shares]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UsageError(f"there are two bounds on {twice}", "leave one of them out")
        if self.calibration not in CALIBRATIONS:
            raise UsageError(
                f"unknown calibration {self.calibration!r}",
                f"it is one of {', '.join(CALIBRATIONS)}",
            )
        if self.effort not in defaults.EFFORTS:
            raise UsageError(
                f"unknown effort {self.effort!r}", f"it is one of {', '.join(defaults.EFFORTS)}"
            )

    @property
    def shares(self) -> tuple[tuple[Cost, float], ...]:
        """Every cost that is bounded and the fraction that may remain, the budget's first."""
        return ((self.cost, self.budget), *self.further)


def make_plan(
    totals: Mapping[str, int],
    candidates: Sequence[Candidate],
    goal: Goal,
    planner: Planner,
    grid: Grid,
    spared: Mapping[str, int] = MappingProxyType({}),
) -> Plan:
    """Choose among scored candidates.

    Args:
        totals: What the whole model costs, by the name of each cost that the goal bounds.
        candidates: The scored grid.
        goal: The budget and how to count it.
        planner: Chooses.
        grid: What was scored: seed, settings and versions go into the plan.
        spared: What falls away of a cost whatever is chosen, by its name.

    Raises:
        UsageError: If the budget is out of reach.
    """
    bounds = [
        Bound(cost, share, totals[cost.name], spared.get(cost.name, 0))
        for cost, share in goal.shares
    ]
    chosen = choose(candidates, planner, bounds, goal.metric)
    used = sorted({c.method for c in chosen})
    return Plan(
        moves=tuple(Move(c.layer, c.method, c.rank) for c in chosen),
        seed=grid.seed,
        budget=goal.budget,
        cost=goal.cost.name,
        metric=goal.metric.name,
        penalty=goal.metric.penalty,
        planner=goal.planner,
        calibration=goal.calibration,
        effort=goal.effort,
        fold=goal.fold,
        settings={name: settings_of(grid.methods[name]) for name in used},
        versions=grid.versions,
        bounds={cost.name: share for cost, share in goal.further},
        candidates=tuple(chosen),
    )


def compress_model(
    traced: TracedModel,
    grid: Grid,
    goal: Goal,
    planner: Planner,
    *,
    batches: Sequence[Any] = (),
    calibration: Sequence[Any] = (),
    by_data: bool = False,
    fit: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
    refitting: Callable[[int, int], None] = lambda done, total: None,
) -> Compressed:
    """Score, plan, replace, verify and calibrate; what cannot be replaced is planned around.

    Args:
        traced: The model, which is changed in place. If it was not run, MACs stay unknown and
            nothing can be verified.
        grid: What to score.
        goal: The budget and how to count it.
        planner: Chooses among the candidates.
        batches: Model inputs, tensors of any shape, for feature metrics and moments.
        calibration: Model inputs to fit the compressed layers to, where that is the goal's
            calibration; never those that are reported on.
        by_data: Where factors are fitted to data, plan by what these say of the candidates; with
            the best effort build several plans and keep the one whose model is nearest to the
            dense one.
        fit: Whether factors are fitted to data at all; it takes no fit to make a plan, but several
            cannot be compared without: the first is taken.
        progress: Called with units done and all units while scoring.
        refitting: Called with the layers that are fitted to data and all of them.

    Raises:
        UsageError: If the budget is out of reach or something is missing for it.
        UnsupportedError: If the model cannot be run or compressed.
    """
    if min(share for _, share in goal.shares) < 1:
        refuse_closed(traced.layers)
    counted = {cost.name: cost for cost in (*grid.costs, *(cost for cost, _ in goal.shares))}
    grid = replace(grid, costs=tuple(counted.values()))
    totals = {c.name: total_cost(traced.model, traced.layers, c) for c, _ in goal.shares}
    kept = Kept.beside(traced.model)
    drafts = [
        Draft(goal.metric, score(traced, grid, batches=batches, progress=progress, kept=kept))
    ]
    notes: tuple[str, ...] = ()
    if by_data and goal.calibration == "data" and goal.effort != "fast":
        share = None if goal.further else _share(traced, totals[goal.cost.name], goal)
        plain = drafts[0].candidates
        found, notes = drafts_from_data(
            traced, grid, goal.effort, share, plain, calibration, progress
        )
        drafts = [*found, *drafts]
    applying = Applying(traced, grid.methods, calibration, batches, grid.costs, refitting, kept, {})
    folding = Folding.of(traced, grid.costs) if goal.fold else Folding()
    job = _Job(applying, grid, goal, planner, totals, folding, fit)
    with Surgery(traced) as surgery:
        result = applying.finished(job.best(drafts, surgery), folding, surgery)
    return replace(result, notes=(*notes, *result.notes))


def _share(traced: TracedModel, total: int, goal: Goal) -> float:
    """The fraction of the layers that can be replaced which may remain."""
    free = [layer for layer in traced.layers if layer.reason is None and layer.spec is not None]
    of = [goal.cost.of([layer.spec], layer) for layer in free if layer.spec is not None]
    return max(0.0, 1 - (1 - goal.budget) * total / max(1, sum(of)))


@dataclass(frozen=True, eq=False)
class _Job:
    """What several plans for one goal have in common."""

    applying: Applying
    grid: Grid
    goal: Goal
    planner: Planner
    totals: Mapping[str, int]
    folding: Folding
    fit: bool

    def best(self, drafts: Sequence[Draft], surgery: Surgery) -> Compressed:
        """The model of the draft that leaves the least divergence, which the model then is.

        Without the best effort that of the first draft that reaches the budget.
        """
        if self.goal.effort != "best" or not self.fit:
            return next(self._built(drafts, surgery))
        model = self.applying.traced.model
        best, compared = None, 0
        for result in self._built(drafts, surgery):
            found = _Built(result, kept_state(model), surgery.take_off())
            compared += 1
            if best is None or result.divergence < best.result.divergence:
                best = found
        assert best is not None
        for layer, module in best.modules.items():
            surgery.replace(layer, module)
        restore(best.norms)
        return replace(best.result, compared=compared)

    def _built(self, drafts: Sequence[Draft], surgery: Surgery) -> Iterator[Compressed]:
        """The models of those drafts that reach the budget, by different plans; at least one."""
        seen: list[frozenset[Move]] = []
        for number, draft in enumerate(drafts):
            try:
                plan = self.plan(draft, {})
                moves = frozenset(plan.moves)
                if moves in seen:
                    continue
                result = self.built(draft, plan, surgery)
            except UsageError:
                if not seen and number == len(drafts) - 1:
                    raise
                continue
            seen.append(moves)
            yield result

    def built(self, draft: Draft, plan: Plan, surgery: Surgery) -> Compressed:
        """The model of a draft, planned around what breaks it."""
        put_back: dict[str, str] = {}
        applying = replace(self.applying, found={})
        while True:
            done = plan if self.fit else replace(plan, effort="fast")
            result = applying.of(done, surgery, all_or_nothing=True)
            if not result.put_back:
                now = replace(result.plan, effort=plan.effort)
                return replace(result, plan=now, put_back=put_back)
            put_back |= result.put_back
            plan = self.plan(draft, put_back)

    def plan(self, draft: Draft, put_back: Mapping[str, str]) -> Plan:
        methods, takes = self.grid.methods, self.folding.takes
        usable = [
            c
            for c in draft.candidates
            if c.layer not in put_back and takes(c.layer, methods[c.method], c.rank)
        ]
        goal = replace(self.goal, metric=draft.metric)
        spared = {name: self.folding.saving(name) for name in self.totals}
        try:
            return make_plan(self.totals, usable, goal, self.planner, self.grid, spared)
        except UsageError as error:
            if not put_back:
                raise
            raise UsageError(f"{error}; {_remarks(put_back)}", error.hint) from error


@dataclass(frozen=True, eq=False)
class _Built:
    """A compressed model, taken apart."""

    result: Compressed
    norms: State
    modules: Mapping[Layer, nn.Module]


def refuse_closed(layers: Sequence[Layer]) -> None:
    """Refuse a model none of whose layers can be compressed.

    Raises:
        UnsupportedError: With the reasons.
    """
    reasons = dict.fromkeys(layer.reason for layer in layers)
    if not layers:
        raise UnsupportedError("the model has no convolutional or linear layer")
    if None not in reasons:
        raise UnsupportedError(
            f"no layer of the model can be compressed: {'; '.join(filter(None, reasons))}",
            f"{command('inspect')} shows every layer; {option('include_ends', True)} lets the first"
            " and the last one in",
        )


def _remarks(put_back: Mapping[str, str], most: int = 3) -> str:
    remarks = [f"{name} was put back: {why}" for name, why in islice(put_back.items(), most)]
    more = len(put_back) - most
    return "; ".join([*remarks, f"and {more} more"] if more > 0 else remarks)
