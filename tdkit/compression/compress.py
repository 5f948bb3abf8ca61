"""Model and plan to a verified compressed model."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

from torch import nn

from tdkit import defaults
from tdkit.calibration.batchnorm import CALIBRATIONS, Calibration, has_statistics
from tdkit.compression.calibrating import Calibrated, Calibrating, Step
from tdkit.compression.kept import Kept
from tdkit.compression.plan import Move, Plan
from tdkit.compression.refit import Part
from tdkit.compression.scoring import (
    Grid,
    blamed,
    factorize,
    layer_moments,
    moments_wanted,
    prepare,
    score,
)
from tdkit.compression.surgery import Surgery
from tdkit.compression.verification import verify
from tdkit.costs.base import Change, Cost, change, is_known, total_cost
from tdkit.costs.macs import MACS
from tdkit.costs.params import PARAMS
from tdkit.decompositions.base import Decomposition, check_rank, unsupported
from tdkit.decompositions.settings import settings_of
from tdkit.errors import UnsupportedError, UsageError, command, option, unknown_name
from tdkit.layers.evidence import MOMENTS, Evidence, Moments
from tdkit.layers.inventory import Layer
from tdkit.layers.stages import Stage
from tdkit.layers.traced import TracedModel
from tdkit.metrics.base import Metric, relative
from tdkit.metrics.weights import RELATIVE
from tdkit.planners.base import Planner
from tdkit.planners.candidate import Candidate
from tdkit.planners.objective import choose

# Dense weights, in bytes as float64, that are reconstructed and verified at once: an eighth of the
# model, but as many small layers as fit into this.
_BLOCK_SHARE = 8
_BLOCK_BYTES = 2**24


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

    Raises:
        UsageError: If the budget is no such fraction, or the calibration or the effort unknown.
    """

    budget: float
    cost: Cost = PARAMS
    metric: Metric = RELATIVE
    planner: str = defaults.PLANNER
    calibration: Calibration = defaults.NO_DATA_CALIBRATION
    effort: str = defaults.EFFORT

    def __post_init__(self) -> None:
        number = isinstance(self.budget, int | float) and not isinstance(self.budget, bool)
        if not number or not 0 < self.budget <= 1:
            raise UsageError(
                f"the budget {self.budget!r} is not a fraction above 0 and at most 1",
                "it is the fraction of the model that remains: 0.5 keeps at most half",
            )
        if self.calibration not in CALIBRATIONS:
            raise UsageError(
                f"unknown calibration {self.calibration!r}",
                f"it is one of {', '.join(CALIBRATIONS)}",
            )
        if self.effort not in defaults.EFFORTS:
            raise UsageError(
                f"unknown effort {self.effort!r}", f"it is one of {', '.join(defaults.EFFORTS)}"
            )


@dataclass(frozen=True)
class Compressed:
    """A compressed model and how it came about.

    Attributes:
        model: The compressed model.
        plan: The moves that it carries.
        layers: All layers of the dense model.
        structure: The stages that stand in for each replaced layer, by name.
        errors: The relative error of each replaced layer, by name: of its weight, at most the one
            that was scored, since the rank that is taken is refined; of a layer that was fitted to
            data that of its output.
        put_back: Why a layer that was to be replaced is dense after all, by name.
        verified: Whether a forward pass has compared it with its dense reconstruction.
        costs: Of the whole model before and after, by the name of a cost; None where unknown.
        uncalibrated: Why BatchNorm is not fitted to the compressed layers although the plan asks
            for it.
        steps: What was fitted to data one after the other, and what each step made of the outputs.
        notes: What the user should know of that.
        instead: What BatchNorm is calibrated on where that is not what the plan says.
    """

    model: nn.Module
    plan: Plan
    layers: tuple[Layer, ...]
    structure: Mapping[str, tuple[Stage, ...]]
    errors: Mapping[str, float]
    put_back: Mapping[str, str]
    verified: bool
    costs: Mapping[str, Change | None] = field(default_factory=dict)
    uncalibrated: str | None = None
    steps: tuple[Step, ...] = ()
    notes: tuple[str, ...] = ()
    instead: Calibration | None = None

    @property
    def refitted(self) -> bool:
        """Whether the factors are fitted to data."""
        return len(self.steps) > 1

    @property
    def calibrated(self) -> Calibration:
        """What the compressed layers are fitted to; ``none`` where there is no such."""
        fitted = self.refitted or has_statistics(self.model)
        known = fitted and self.uncalibrated is None
        return (self.instead or self.plan.calibration) if known else "none"


def larger_than_dense(result: Compressed) -> list[str]:
    """The layers that a plan, which a person wrote, makes larger."""
    return [
        layer.name
        for layer in result.layers
        if sum(stage.parameters for stage in result.structure.get(layer.name, ()))
        > layer.parameters
    ]


def make_plan(
    total: int,
    candidates: Sequence[Candidate],
    goal: Goal,
    planner: Planner,
    grid: Grid,
) -> Plan:
    """Choose among scored candidates.

    Args:
        total: The whole model's cost, from :func:`tdkit.costs.base.total_cost`.
        candidates: The scored grid.
        goal: The budget and how to count it.
        planner: Chooses.
        grid: What was scored: seed, settings and versions go into the plan.

    Raises:
        UsageError: If the budget is out of reach.
    """
    chosen = choose(
        candidates,
        planner,
        total=total,
        budget=goal.budget,
        cost=goal.cost,
        metric=goal.metric,
    )
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
        settings={name: settings_of(grid.methods[name]) for name in used},
        versions=grid.versions,
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
        calibration: Model inputs to match BatchNorm's statistics on, where that is the goal's
            calibration; never those that are reported on.
        progress: Called with units done and all units while scoring.
        refitting: Called with the layers that are fitted to data and all of them.

    Raises:
        UsageError: If the budget is out of reach or something is missing for it.
        UnsupportedError: If the model cannot be run or compressed.
    """
    if goal.budget < 1:
        refuse_closed(traced.layers)
    if goal.cost.name not in {cost.name for cost in grid.costs}:
        grid = replace(grid, costs=(*grid.costs, goal.cost))
    total = total_cost(traced.model, traced.layers, goal.cost)
    kept = Kept.beside(traced.model)
    candidates = score(traced, grid, batches=batches, progress=progress, kept=kept)
    put_back: dict[str, str] = {}
    found: dict[tuple[str, Move], _Factorized] = {}
    while True:
        usable = [c for c in candidates if c.layer not in put_back]
        try:
            plan = make_plan(total, usable, goal, planner, grid)
        except UsageError as error:
            if not put_back:
                raise
            raise UsageError(f"{error}; {_remarks(put_back)}", error.hint) from error
        result = apply_plan(
            traced,
            plan,
            grid.methods,
            calibration=calibration,
            batches=batches,
            costs=grid.costs,
            all_or_nothing=True,
            found=found,
            kept=kept,
            progress=refitting,
        )
        if not result.put_back:
            return replace(result, put_back=put_back)
        put_back |= result.put_back


def apply_plan(
    traced: TracedModel,
    plan: Plan,
    methods: Mapping[str, Decomposition],
    *,
    calibration: Sequence[Any] = (),
    batches: Sequence[Any] = (),
    costs: Sequence[Cost] = (PARAMS, MACS),
    all_or_nothing: bool = False,
    found: dict[tuple[str, Move], _Factorized] | None = None,
    kept: Kept | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Compressed:
    """Replace what a plan says, verify it block by block, and calibrate as the plan says.

    Args:
        traced: The dense model, which is changed in place; as it was where this raises.
        plan: The moves.
        methods: Decompositions by name.
        calibration: Model inputs, tensors of any shape, for a plan that is calibrated on data.
        batches: Model inputs, for methods that look at moments.
        costs: What to count before and after.
        all_or_nothing: Leave the model as it is when a layer of the plan breaks it.
        found: Factorizations that were made already, by layer and move; more are added.
        kept: Decompositions from scoring the same layers on the same batches.
        progress: Called with the layers that are fitted to data and all of them.

    Raises:
        UsageError: If the plan names an unknown layer or method, or a rank that does not fit, or
            needs data to calibrate on.
        UnsupportedError: If a layer of the plan cannot be decomposed.
    """
    moves = _resolve(plan, traced.layers)
    for layer, move in moves.items():
        _check_move(layer, move, methods)
    before = {cost.name: _total(traced, cost) for cost in costs}
    calibrating = Calibrating.of(traced, list(moves), plan, calibration)
    moments = _moments(traced, moves, methods, batches)
    factorized: dict[Layer, _Factorized] = {}
    broken: dict[str, str] = {}
    known = {} if found is None else found
    with Surgery(traced) as surgery:
        for block in _blocks(traced, moves):
            for layer in block:
                key = (layer.name, moves[layer])
                if key not in known:
                    evidence = Evidence(plan.seed, moments.get(layer.name))
                    known[key] = _factorized(
                        traced, layer, moves[layer], methods, evidence, kept or Kept(0)
                    )
                factorized[layer] = known[key]
            if traced.inputs is not None:
                modules = {layer: factorized[layer].module for layer in block}
                stages = {layer: factorized[layer].stages for layer in block}
                broken |= verify(traced.model, modules, traced.inputs, stages)
            for layer in block:
                if layer.name not in broken:
                    surgery.replace(layer, factorized[layer].module)
        replaced = {layer: f for layer, f in factorized.items() if layer.name not in broken}
        structure = {layer.name: f.stages for layer, f in replaced.items()}
        after = {cost.name: _after(before[cost.name], cost, replaced, structure) for cost in costs}
        if broken and all_or_nothing:
            surgery.undo()
            calibrated = Calibrated()
        else:
            parts = _parts(replaced, moves, methods, surgery)
            calibrated = calibrating.finish(traced.model, parts, progress)
    return Compressed(
        model=traced.model,
        plan=_without(replace(plan, moves=tuple(moves.values())), broken),
        layers=traced.layers,
        structure=structure,
        errors={layer.name: f.error for layer, f in replaced.items()} | dict(calibrated.errors),
        put_back=broken,
        verified=traced.inputs is not None,
        costs=after,
        uncalibrated=calibrated.uncalibrated,
        steps=calibrated.steps,
        notes=calibrated.notes,
        instead=calibrated.instead,
    )


def _moments(
    traced: TracedModel,
    moves: Mapping[Layer, Move],
    methods: Mapping[str, Decomposition],
    batches: Sequence[Any],
) -> Mapping[str, Moments]:
    """The moments of the inputs of those layers whose methods look at them."""
    used = {move.method: methods[move.method] for move in moves.values()}
    given = [traced.read(batch) for batch in batches] if moments_wanted(used, ()) else []
    looked_at = [layer for layer, move in moves.items() if MOMENTS in methods[move.method].needs]
    return layer_moments(traced, used, (), looked_at, given)


def _parts(
    replaced: Mapping[Layer, _Factorized],
    moves: Mapping[Layer, Move],
    methods: Mapping[str, Decomposition],
    surgery: Surgery,
) -> dict[str, Part]:
    """The replaced layers as a refit wants them."""
    parts = {}
    for layer, factorized in replaced.items():
        assert layer.spec is not None
        move = moves[layer]
        parts[layer.name] = Part(
            spec=layer.spec,
            weight=partial(surgery.weight, layer),
            stages=factorized.stages,
            method=methods[move.method],
            name=move.method,
            rank=move.rank,
        )
    return parts


def _blocks(traced: TracedModel, moves: Mapping[Layer, Move]) -> Iterator[list[Layer]]:
    """Runs of layers whose dense weights may be in memory once more, as float64."""
    tensors = (*traced.model.parameters(), *traced.model.buffers())
    most = max(_BLOCK_BYTES, sum(t.numel() * t.element_size() for t in tensors) // _BLOCK_SHARE)
    block: list[Layer] = []
    held = 0
    for layer in moves:
        size = 8 * layer.parameters
        if block and held + size > most:
            yield block
            block, held = [], 0
        block.append(layer)
        held += size
    if block:
        yield block


def _total(traced: TracedModel, cost: Cost) -> int | None:
    known = all(is_known(cost, layer) or layer.spec is None for layer in traced.layers)
    return total_cost(traced.model, traced.layers, cost) if known else None


def _after(
    before: int | None,
    cost: Cost,
    replaced: Mapping[Layer, _Factorized],
    structure: Mapping[str, tuple[Stage, ...]],
) -> Change | None:
    if before is None:
        return None
    saved = 0
    for layer in replaced:
        changed = change(cost, structure[layer.name], layer)
        assert changed is not None
        saved += changed.saving
    return Change(before, before - saved)


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


def _resolve(plan: Plan, layers: Sequence[Layer]) -> dict[Layer, Move]:
    """The layer of every move, and the move with that layer's first name."""
    by_name = {name: layer for layer in layers for name in (layer.name, *layer.aliases)}
    result: dict[Layer, Move] = {}
    for move in plan.moves:
        if move.layer not in by_name:
            raise unknown_name(move.layer, list(by_name), "layer")
        layer = by_name[move.layer]
        if layer in result:
            raise UsageError(
                f"the plan replaces the layer {move.layer!r} twice", "keep one of the moves"
            )
        if layer.reason is not None:
            raise UnsupportedError(f"the layer {layer.name!r} stays dense: {layer.reason}")
        result[layer] = replace(move, layer=layer.name)
    return result


@dataclass(frozen=True)
class _Factorized:
    module: nn.Sequential
    stages: tuple[Stage, ...]
    error: float


def _check_move(layer: Layer, move: Move, methods: Mapping[str, Decomposition]) -> None:
    if move.method not in methods:
        raise unknown_name(move.method, list(methods), "method")
    assert layer.spec is not None
    reason = unsupported(methods[move.method], layer.spec)
    if reason is not None:
        raise UnsupportedError(
            f"{move.method} cannot decompose the layer {layer.name!r}: {reason}",
            "take the move out of the plan, or name another method",
        )
    try:
        check_rank(methods[move.method], layer.spec.per_group(), move.rank)
    except UsageError as error:
        raise UsageError(f"layer {layer.name!r}, {move.method}: {error}", error.hint) from error


def _factorized(
    traced: TracedModel,
    layer: Layer,
    move: Move,
    methods: Mapping[str, Decomposition],
    evidence: Evidence,
    kept: Kept,
) -> _Factorized:
    assert layer.spec is not None
    with blamed(move.method, layer):
        method = methods[move.method]
        prepared = kept.take(layer.name, move.method) or prepare(
            layer, traced.weights, move.method, method, evidence
        )
        assert prepared is not None
        refined = prepared.refined(move.rank)
        distance = refined.error(move.rank)
        return _Factorized(
            factorize(layer, traced.weights, refined, move.rank),
            refined.stages(move.rank),
            relative(distance, refined.norm, layer.spec.weight_parameters),
        )


def _without(plan: Plan, names: Container[str]) -> Plan:
    return replace(
        plan,
        moves=tuple(m for m in plan.moves if m.layer not in names),
        candidates=tuple(c for c in plan.candidates if c.layer not in names),
    )
