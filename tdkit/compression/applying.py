"""A plan onto a model: replace, verify, fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import nn

from tdkit.calibration.batchnorm import Calibration, has_statistics
from tdkit.compression.calibrating import Calibrated, Calibrating, Step
from tdkit.compression.folding import Folding
from tdkit.compression.kept import Kept
from tdkit.compression.plan import Move, Plan
from tdkit.compression.refit import Part
from tdkit.compression.scoring import Grid, blamed, factorize, layer_evidence, needs_of, prepare
from tdkit.compression.surgery import Surgery
from tdkit.compression.verification import verify
from tdkit.costs.base import Change, Cost, change, is_known, total_cost
from tdkit.costs.macs import MACS
from tdkit.costs.params import PARAMS
from tdkit.decompositions.base import Decomposition, check_rank, unsupported
from tdkit.errors import UnsupportedError, UsageError, unknown_name
from tdkit.layers.evidence import Evidence
from tdkit.layers.inventory import Layer
from tdkit.layers.stages import Stage
from tdkit.layers.traced import TracedModel
from tdkit.metrics.base import relative

# Dense weights, in bytes as float64, that are reconstructed and verified at once: an eighth of the
# model, but as many small layers as fit into this.
_BLOCK_SHARE = 8
_BLOCK_BYTES = 2**24


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
        divergence: How far the model's outputs are from the dense ones on all inputs that it was
            fitted to, see :func:`tdkit.calibration.divergence.divergence`; infinite where it was
            fitted to none.
        compared: How many plans it is the best of.
        instead: What BatchNorm is calibrated on where that is not what the plan says.
        had_statistics: Whether there was any BatchNorm to fit, which may be folded since.
        notes: What the user should know of that.
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
    divergence: float = math.inf
    compared: int = 1
    instead: Calibration | None = None
    had_statistics: bool = False
    notes: tuple[str, ...] = ()

    @property
    def refitted(self) -> bool:
        """Whether the factors are fitted to data."""
        return len(self.steps) > 1

    @property
    def calibrated(self) -> Calibration:
        """What the compressed layers are fitted to; ``none`` where there is no such."""
        fitted = self.refitted or self.had_statistics
        known = fitted and self.uncalibrated is None
        return (self.instead or self.plan.calibration) if known else "none"


def larger_than_dense(result: Compressed) -> list[str]:
    """The layers that a plan, which a person wrote, makes larger."""
    moved = {move.layer for move in result.plan.moves}
    return [
        layer.name
        for layer in result.layers
        if layer.name in moved
        and sum(stage.parameters for stage in result.structure[layer.name]) > layer.parameters
    ]


def apply_plan(
    traced: TracedModel,
    plan: Plan,
    methods: Mapping[str, Decomposition],
    *,
    calibration: Sequence[Any] = (),
    batches: Sequence[Any] = (),
    costs: Sequence[Cost] = (PARAMS, MACS),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Compressed:
    """Replace what a plan says, verify it block by block, and calibrate as the plan says.

    Args:
        traced: The dense model, which is changed in place; as it was where this raises.
        plan: The moves.
        methods: Decompositions by name.
        calibration: Model inputs, tensors of any shape, for a plan that is calibrated on data.
        batches: Model inputs, for methods that look at data.
        costs: What to count before and after.
        progress: Called with the layers that are fitted to data and all of them.

    Raises:
        UsageError: If the plan names an unknown layer or method, or a rank that does not fit, or
            needs data to calibrate on.
        UnsupportedError: If a layer of the plan cannot be decomposed.
    """
    applying = Applying(traced, methods, calibration, batches, costs, progress)
    folding = Folding.of(traced, costs) if plan.fold else Folding()
    with Surgery(traced) as surgery:
        return applying.finished(applying.of(plan, surgery), folding, surgery)


@dataclass(frozen=True, eq=False)
class Applying:
    """What plans are applied with.

    Attributes:
        traced: The dense model, which is changed in place.
        methods: Decompositions by name.
        calibration: Model inputs, tensors of any shape, for a plan that is calibrated on data.
        batches: Model inputs, for methods that look at data.
        costs: What to count before and after.
        progress: Called with the layers that are fitted to data and all of them.
        kept: Decompositions from scoring the same layers on the same batches.
        found: Factorizations that were made already, by layer and move; more are added.
    """

    traced: TracedModel
    methods: Mapping[str, Decomposition]
    calibration: Sequence[Any] = ()
    batches: Sequence[Any] = ()
    costs: Sequence[Cost] = (PARAMS, MACS)
    progress: Callable[[int, int], None] = lambda done, total: None
    kept: Kept = field(default_factory=lambda: Kept(0))
    found: dict[tuple[str, Move], _Factorized] = field(default_factory=dict)

    def of(self, plan: Plan, surgery: Surgery, *, all_or_nothing: bool = False) -> Compressed:
        """Apply a plan.

        Args:
            plan: The moves.
            surgery: Of the model.
            all_or_nothing: Leave the model as it is when a layer of the plan breaks it.

        Raises:
            UsageError: See :func:`apply_plan`.
            UnsupportedError: Likewise.
        """
        moves = _resolve(plan, self.traced.layers)
        for layer, move in moves.items():
            _check_move(layer, move, self.methods)
        before = {cost.name: _total(self.traced, cost) for cost in self.costs}
        calibrating = Calibrating.of(self.traced, list(moves), plan, self.calibration)
        replaced, broken = self._replace(moves, plan.seed, surgery)
        structure = {layer.name: f.stages for layer, f in replaced.items()}
        after = {c.name: _after(before[c.name], c, replaced, structure) for c in self.costs}
        if broken and all_or_nothing:
            surgery.undo()
            calibrated = Calibrated()
        else:
            parts = _parts(replaced, moves, self.methods, surgery)
            calibrated = calibrating.finish(self.traced.model, parts, self.progress)
        return Compressed(
            model=self.traced.model,
            plan=_without(replace(plan, moves=tuple(moves.values())), broken),
            layers=self.traced.layers,
            structure=structure,
            errors={layer.name: f.error for layer, f in replaced.items()} | dict(calibrated.errors),
            put_back=broken,
            verified=self.traced.inputs is not None,
            costs=after,
            uncalibrated=calibrated.uncalibrated,
            steps=calibrated.steps,
            divergence=calibrated.divergence,
            instead=calibrated.instead,
            had_statistics=has_statistics(self.traced.model),
            notes=calibrated.notes,
        )

    def finished(self, result: Compressed, folding: Folding, surgery: Surgery) -> Compressed:
        """Fold what is to be folded, and count anew.

        Args:
            result: The compressed model.
            folding: Of the dense model.
            surgery: Of the model.
        """
        if not folding.norms:
            return result
        structure, folded = folding.fold(self.traced, result.structure, surgery)
        costs = {
            name: found
            and replace(found, after=found.after - sum(folding.savings[name][x] for x in folded))
            for name, found in result.costs.items()
        }
        return replace(result, structure=structure, costs=costs)

    def _replace(
        self, moves: Mapping[Layer, Move], seed: int, surgery: Surgery
    ) -> tuple[dict[Layer, _Factorized], dict[str, str]]:
        """Replace what can be, block by block; why the others cannot, by name."""
        known = _evidence(self.traced, moves, self.methods, self.batches, seed)
        replaced: dict[Layer, _Factorized] = {}
        broken: dict[str, str] = {}
        for block in _blocks(self.traced, moves):
            made = {x: self._factorized(x, moves[x], known[x.name]) for x in block}
            if self.traced.inputs is not None:
                modules = {layer: each.module for layer, each in made.items()}
                stages = {layer: each.stages for layer, each in made.items()}
                broken |= verify(self.traced.model, modules, self.traced.inputs, stages)
            for layer, each in made.items():
                if layer.name not in broken:
                    surgery.replace(layer, each.module)
                    replaced[layer] = each
        return replaced, broken

    def _factorized(self, layer: Layer, move: Move, evidence: Evidence) -> _Factorized:
        key = (layer.name, move)
        if key not in self.found:
            self.found[key] = _factorized(
                self.traced, layer, move, self.methods, evidence, self.kept
            )
        return self.found[key]


def _evidence(
    traced: TracedModel,
    moves: Mapping[Layer, Move],
    methods: Mapping[str, Decomposition],
    batches: Sequence[Any],
    seed: int,
) -> Mapping[str, Evidence]:
    """What the methods of a plan see beside the weights."""
    used = {move.method: methods[move.method] for move in moves.values()}
    given = [traced.read(batch) for batch in batches] if needs_of(used, ()) else []
    looking = [layer for layer, move in moves.items() if methods[move.method].needs]
    known = layer_evidence(traced, Grid(used, (), seed=seed), looking, given)
    return {layer.name: known.get(layer.name, Evidence(seed)) for layer in moves}


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
