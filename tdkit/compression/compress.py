"""Model and plan to a verified compressed model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from tdkit.calibration.batchnorm import CALIBRATIONS, Calibration, has_statistics, match_statistics
from tdkit.calibration.noise import noise_batches
from tdkit.compression.plan import Move, Plan
from tdkit.compression.scoring import Grid, blamed, factorize, prepare, score
from tdkit.compression.verification import verify
from tdkit.costs.base import Cost, total_cost
from tdkit.decompositions.base import Decomposition, check_rank, unsupported
from tdkit.errors import UnsupportedError, UsageError, first_line, unknown_name
from tdkit.forward.copying import own_copy
from tdkit.forward.inputs import is_image, one_sample, two_samples
from tdkit.layers.counting import macs
from tdkit.layers.inventory import Layer, find_layers, replace_layer
from tdkit.layers.stages import Stage
from tdkit.metrics.base import relative
from tdkit.planners.base import Planner
from tdkit.planners.candidate import Candidate
from tdkit.planners.objective import choose


@dataclass(frozen=True)
class Goal:
    """What a compression aims at.

    Attributes:
        budget: The fraction of the whole model's cost that may remain, in (0, 1].
        cost: ``params`` or ``macs``.
        metric: The error whose squares are summed over layers and kept small.
        planner: The planner's name, for the record.
        calibration: How BatchNorm is fitted to the compressed layers; ``data`` needs some.
    """

    budget: float
    cost: Cost = "params"
    metric: str = "relative-weights"
    planner: str = "greedy"
    calibration: Calibration = "noise"

    def __post_init__(self) -> None:
        number = isinstance(self.budget, int | float) and not isinstance(self.budget, bool)
        if not number or not 0 < self.budget <= 1:
            raise UsageError(
                f"the budget {self.budget!r} is not a fraction above 0 and at most 1",
                "it is the fraction of the model that remains: 0.5 keeps at most half",
            )
        if self.cost not in ("params", "macs"):
            raise UsageError(f"unknown cost {self.cost!r}", "it is params or macs")
        if self.calibration not in CALIBRATIONS:
            raise UsageError(
                f"unknown calibration {self.calibration!r}",
                f"it is one of {', '.join(CALIBRATIONS)}",
            )


@dataclass(frozen=True)
class Compression:
    """A compressed model and how it came about.

    Attributes:
        model: The compressed model.
        plan: The moves that it carries.
        layers: All layers of the dense model.
        structure: The stages that stand in for each replaced layer, by name.
        errors: The relative error of each replaced layer's weight, by name. At most the error that
            was scored, since the rank that is taken is refined.
        put_back: Why a layer that was to be replaced is dense after all, by name.
        verified: Whether a forward pass has compared it with its dense reconstruction.
        uncalibrated: Why BatchNorm is not fitted to the compressed layers although the plan asks
            for it.
    """

    model: nn.Module
    plan: Plan
    layers: tuple[Layer, ...]
    structure: Mapping[str, tuple[Stage, ...]]
    errors: Mapping[str, float]
    put_back: Mapping[str, str]
    verified: bool
    uncalibrated: str | None = None

    @property
    def calibrated(self) -> Calibration:
        """What BatchNorm is fitted to the compressed layers on; ``none`` where there is no such."""
        if self.uncalibrated is not None or not has_statistics(self.model):
            return "none"
        return self.plan.calibration


def larger_than_dense(result: Compression) -> list[str]:
    """The layers that a plan, which a person wrote, makes larger."""
    return [
        layer.name
        for layer in result.layers
        if sum(stage.parameters for stage in result.structure.get(layer.name, ()))
        > layer.parameters
    ]


def make_plan(
    model: nn.Module,
    layers: Sequence[Layer],
    candidates: Sequence[Candidate],
    goal: Goal,
    planner: Planner,
    seed: int,
) -> Plan:
    """Choose among scored candidates.

    Raises:
        UsageError: If the budget is out of reach.
    """
    chosen = choose(
        candidates,
        planner,
        total=total_cost(model, layers, goal.cost),
        budget=goal.budget,
        cost=goal.cost,
        metric=goal.metric,
    )
    return Plan(
        moves=tuple(Move(c.layer, c.method, c.rank) for c in chosen),
        seed=seed,
        budget=goal.budget,
        cost=goal.cost,
        metric=goal.metric,
        planner=goal.planner,
        calibration=goal.calibration,
        candidates=tuple(chosen),
    )


def compress_model(
    model: nn.Module,
    grid: Grid,
    goal: Goal,
    planner: Planner,
    *,
    inputs: Sequence[Any] | None = None,
    batches: Sequence[Tensor | Sequence[Any]] = (),
    calibration: Sequence[Tensor | Sequence[Any]] = (),
    patterns: Sequence[str] = (),
    keep_ends: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Compression:
    """Score, plan, replace, verify and calibrate; what cannot be replaced is planned around.

    Args:
        model: A trained model; it stays as it is.
        grid: What to score.
        goal: The budget and how to count it.
        planner: Chooses among the candidates.
        inputs: Arguments of a forward pass over at least one sample. Without them MACs stay
            unknown and nothing can be verified.
        batches: Model inputs for feature metrics.
        calibration: Model inputs to match BatchNorm's statistics on, where that is the goal's
            calibration; never those that are reported on.
        patterns: Shell patterns of the layers to consider; all by default.
        keep_ends: Keep the first and last layer dense.
        progress: Called with units done and all units while scoring.

    Raises:
        UsageError: If the budget is out of reach or something is missing for it.
        UnsupportedError: If the model cannot be copied, run or compressed.
    """
    dense = own_copy(model)
    layers = find_layers(dense, inputs=one_sample(inputs), patterns=patterns, keep_ends=keep_ends)
    if goal.budget < 1:
        refuse_closed(layers)
    candidates = score(dense, layers, grid, batches=batches, progress=progress)
    put_back: dict[str, str] = {}
    while True:
        usable = [c for c in candidates if c.layer not in put_back]
        try:
            plan = make_plan(dense, layers, usable, goal, planner, grid.seed)
        except UsageError as error:
            if not put_back:
                raise
            raise UsageError(f"{error}; {_remarks(put_back)}", error.hint) from error
        result = apply_plan(
            dense, plan, grid.methods, layers=layers, inputs=inputs, calibration=calibration
        )
        if not result.put_back:
            return replace(result, put_back=put_back)
        put_back |= result.put_back


def apply_plan(
    model: nn.Module,
    plan: Plan,
    methods: Mapping[str, Decomposition],
    *,
    layers: Sequence[Layer] | None = None,
    inputs: Sequence[Any] | None = None,
    calibration: Sequence[Tensor | Sequence[Any]] = (),
) -> Compression:
    """Replace what a plan says, on a copy, verify it, and calibrate BatchNorm as the plan says.

    Args:
        model: The dense model; it stays as it is.
        plan: The moves.
        methods: Decompositions by name.
        layers: The model's layers where they are known already.
        inputs: Arguments of a forward pass over at least one sample; None skips verifying, and
            calibrating on noise.
        calibration: Model inputs, for a plan that is calibrated on data.

    Raises:
        UsageError: If the plan names an unknown layer or method, or a rank that does not fit, or
            needs data to calibrate on.
        UnsupportedError: If a layer of the plan cannot be decomposed.
    """
    dense = own_copy(model) if layers is None else model
    if layers is None:
        layers = find_layers(dense, inputs=one_sample(inputs), keep_ends=False)
    moves = _resolve(plan, layers)
    factorized = {
        layer: _factorized(dense, layer, move, methods, plan.seed) for layer, move in moves.items()
    }
    modules = {layer: found.module for layer, found in factorized.items()}
    stages = {layer: found.stages for layer, found in factorized.items()}
    broken = verify(dense, modules, two_samples(inputs), stages) if inputs is not None else {}
    kept = {layer: m for layer, m in modules.items() if layer.name not in broken}
    compressed = copy.deepcopy(dense)
    for layer, module in kept.items():
        replace_layer(compressed, layer, module)
    uncalibrated = _calibrate(dense, compressed, plan.calibration, inputs, calibration)
    return Compression(
        model=compressed,
        plan=_without(replace(plan, moves=tuple(moves.values())), broken),
        layers=tuple(layers),
        structure={layer.name: factorized[layer].stages for layer in kept},
        errors={layer.name: factorized[layer].error for layer in kept},
        put_back=broken,
        verified=inputs is not None,
        uncalibrated=uncalibrated,
    )


def _calibrate(
    dense: nn.Module,
    compressed: nn.Module,
    how: Calibration,
    inputs: Sequence[Any] | None,
    data: Sequence[Tensor | Sequence[Any]],
) -> str | None:
    """Fit BatchNorm in place; returns why it was left as it is where that is not what was asked."""
    if how == "none" or not has_statistics(compressed):
        return None
    if how == "data":
        match_statistics(dense, compressed, data)
        return None
    if inputs is None:
        return "the shape of the model's input is unknown"
    if len(inputs) != 1 or not is_image(inputs[0]):
        return "the model's input is no image that noise could stand for"
    try:
        match_statistics(dense, compressed, noise_batches(inputs[0]))
    except (UnsupportedError, MemoryError, torch.OutOfMemoryError) as error:
        # A model may take no other batch than the one it was shown.
        return f"on noise, {first_line(error)}"
    return None


def compressed_macs(compression: Compression) -> int | None:
    """Multiply-accumulates per sample after compression; None when unknown."""
    counts = [
        macs(compression.structure.get(layer.name, (layer.spec,)), layer.calls)
        for layer in compression.layers
        if layer.calls is not None and layer.spec is not None
    ]
    return sum(counts) if counts else None


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
            "tdkit inspect shows every layer; --include-ends lets the first and the last one in",
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


def _factorized(
    model: nn.Module, layer: Layer, move: Move, methods: Mapping[str, Decomposition], seed: int
) -> _Factorized:
    if move.method not in methods:
        raise unknown_name(move.method, list(methods), "method")
    method, module = methods[move.method], model.get_submodule(layer.name)
    assert layer.spec is not None
    reason = unsupported(method, layer.spec)
    if reason is not None:
        raise UnsupportedError(
            f"{move.method} cannot decompose the layer {layer.name!r}: {reason}",
            "take the move out of the plan, or name another method",
        )
    try:
        check_rank(method, layer.spec.per_group(), move.rank)
    except UsageError as error:
        raise UsageError(f"layer {layer.name!r}, {move.method}: {error}", error.hint) from error
    with blamed(move.method, layer):
        prepared = prepare(layer, module, move.method, method, seed)
        assert prepared is not None
        refined = prepared.refined(move.rank)
        distance = refined.error(move.rank)
        return _Factorized(
            factorize(layer, module, refined, move.rank),
            refined.stages(move.rank),
            relative(distance, refined.norm, layer.spec.weight_parameters),
        )


def _without(plan: Plan, names: Container[str]) -> Plan:
    return replace(
        plan,
        moves=tuple(m for m in plan.moves if m.layer not in names),
        candidates=tuple(c for c in plan.candidates if c.layer not in names),
    )
