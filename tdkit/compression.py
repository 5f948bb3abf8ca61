"""Model and plan to a verified compressed model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tdkit.candidates import Candidate, Grid, factorize, prepare, score
from tdkit.costs import macs, model_parameters
from tdkit.decompositions.base import Decomposition
from tdkit.errors import UnsupportedError, UsageError
from tdkit.layers import Layer, find_layers, replace_layer, unknown_name, unwrap
from tdkit.planners.base import Planner
from tdkit.plans import Cost, Move, Plan, choose
from tdkit.specs import LayerSpec, spec_of
from tdkit.verification import verify


@dataclass(frozen=True)
class Goal:
    """What a compression aims at.

    Attributes:
        budget: The fraction of the whole model's cost that may remain, in (0, 1].
        cost: ``params`` or ``macs``.
        metric: The error whose squares are summed over layers and kept small.
        planner: The planner's name, for the record.
    """

    budget: float
    cost: Cost = "params"
    metric: str = "relative-weights"
    planner: str = "greedy"

    def __post_init__(self) -> None:
        if not 0 < self.budget <= 1:
            raise UsageError(
                f"the budget {self.budget:g} is not above 0 and at most 1",
                "it is the fraction of the model that remains: 0.5 keeps at most half",
            )
        if self.cost not in ("params", "macs"):
            raise UsageError(f"unknown cost {self.cost!r}", "it is params or macs")


@dataclass(frozen=True)
class Compression:
    """A compressed model and how it came about.

    Attributes:
        model: The compressed model.
        plan: The moves that it carries.
        layers: All layers of the dense model.
        structure: The stages that stand in for each replaced layer, by name.
        put_back: Why a layer that was to be replaced is dense after all, by name.
        verified: Whether a forward pass has compared it with its dense reconstruction.
    """

    model: nn.Module
    plan: Plan
    layers: tuple[Layer, ...]
    structure: Mapping[str, tuple[LayerSpec, ...]]
    put_back: Mapping[str, str]
    verified: bool


def own_copy(model: nn.Module) -> nn.Module:
    """A copy of the plain model inside any wrapper, so that the caller's stays as it is.

    Raises:
        UnsupportedError: If the model cannot be copied.
    """
    try:
        return copy.deepcopy(unwrap(model))
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise UnsupportedError(
            f"the model cannot be copied: {str(error).splitlines()[0]}",
            "remove weight_norm and other re-parametrizations first",
        ) from error


def total_cost(model: nn.Module, layers: Sequence[Layer], cost: Cost) -> int:
    """A model's parameters, or the MACs of its convolutional and linear layers.

    Raises:
        UsageError: If MACs are asked for and the model has not been run.
    """
    if cost == "params":
        return model_parameters(model)
    counts = [layer.macs for layer in layers]
    if any(layer.calls is None for layer in layers):
        raise UsageError(
            "MACs are unknown without the shape of the input",
            "give it with --input-shape, such as 3,224,224",
        )
    return sum(number for number in counts if number is not None)


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
        candidates=tuple(chosen),
    )


def compress_model(
    model: nn.Module,
    grid: Grid,
    goal: Goal,
    planner: Planner,
    *,
    inputs: Sequence[Any] | None = None,
    batches: Sequence[Tensor] = (),
    patterns: Sequence[str] = (),
    keep_ends: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Compression:
    """Score, plan, replace and verify; layers that cannot be replaced are planned around.

    Args:
        model: A trained model; it stays as it is.
        grid: What to score.
        goal: The budget and how to count it.
        planner: Chooses among the candidates.
        inputs: Arguments of a forward pass over at least one sample. Without them MACs stay
            unknown and nothing can be verified.
        batches: Model inputs for feature metrics.
        patterns: Shell patterns of the layers to consider; all by default.
        keep_ends: Keep the first and last layer dense.
        progress: Called with units done and all units while scoring.

    Raises:
        UsageError: If the budget is out of reach or something is missing for it.
        UnsupportedError: If the model cannot be copied, run or compressed.
    """
    dense = own_copy(model)
    layers = find_layers(dense, inputs=one_sample(inputs), patterns=patterns, keep_ends=keep_ends)
    candidates = score(dense, layers, grid, batches=batches, progress=progress)
    put_back: dict[str, str] = {}
    while True:
        usable = [c for c in candidates if c.layer not in put_back]
        plan = make_plan(dense, layers, usable, goal, planner, grid.seed)
        result = apply_plan(dense, plan, grid.methods, layers=layers, inputs=inputs)
        if not result.put_back:
            return Compression(
                result.model, plan, tuple(layers), result.structure, put_back, result.verified
            )
        put_back |= result.put_back


def apply_plan(
    model: nn.Module,
    plan: Plan,
    methods: Mapping[str, Decomposition],
    *,
    layers: Sequence[Layer] | None = None,
    inputs: Sequence[Any] | None = None,
) -> Compression:
    """Replace what a plan says, on a copy, and verify it.

    Args:
        model: The dense model; it stays as it is.
        plan: The moves.
        methods: Decompositions by name.
        layers: The model's layers where they are known already.
        inputs: Arguments of a forward pass over at least one sample; None skips verifying.

    Raises:
        UsageError: If the plan names an unknown layer or method, or a rank that does not fit.
        UnsupportedError: If a layer of the plan cannot be decomposed.
    """
    dense = own_copy(model) if layers is None else model
    if layers is None:
        layers = find_layers(dense, inputs=one_sample(inputs), keep_ends=False)
    factorized = {
        layer: _factorized(dense, layer, move, methods, plan.seed)
        for layer, move in _resolve(plan, layers)
    }
    broken = verify(dense, factorized, two_samples(inputs)) if inputs is not None else {}
    kept = {layer: m for layer, m in factorized.items() if layer.name not in broken}
    compressed = copy.deepcopy(dense)
    for layer, module in kept.items():
        replace_layer(compressed, layer, module)
    return Compression(
        model=compressed,
        plan=_without(plan, broken),
        layers=tuple(layers),
        structure={layer.name: tuple(map(spec_of, module)) for layer, module in kept.items()},
        put_back=broken,
        verified=inputs is not None,
    )


def compressed_macs(compression: Compression) -> int | None:
    """Multiply-accumulates per sample after compression; None when unknown."""
    counts = [
        macs(compression.structure.get(layer.name, (layer.spec,)), layer.calls)
        for layer in compression.layers
        if layer.calls is not None and layer.spec is not None
    ]
    return sum(counts) if counts else None


def random_inputs(
    model: nn.Module, shape: Sequence[int], batch: int = 2, seed: int = 0
) -> tuple[Tensor]:
    """A batch of standard normal inputs in the model's dtype and on its device.

    Args:
        model: The model they are for.
        shape: The shape of one sample.
        batch: How many.
        seed: Of the generator that draws them.
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    if math.prod(shape) <= 0:
        raise UsageError(f"an input of shape {tuple(shape)} is empty")
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, *shape, generator=generator).to(like),)


def one_sample(inputs: Sequence[Any] | None) -> list[Any] | None:
    """The first sample of every tensor among a forward pass's arguments."""
    if inputs is None:
        return None
    return [x[:1] if isinstance(x, Tensor) else x for x in inputs]


def two_samples(inputs: Sequence[Any]) -> list[Any]:
    """At least two samples: BatchNorm in train mode refuses one."""
    return [
        torch.cat([x, x.flip(-1)]) if isinstance(x, Tensor) and len(x) == 1 else x for x in inputs
    ]


def _resolve(plan: Plan, layers: Sequence[Layer]) -> list[tuple[Layer, Move]]:
    by_name = {layer.name: layer for layer in layers}
    result: dict[str, tuple[Layer, Move]] = {}
    for move in plan.moves:
        if move.layer not in by_name:
            raise unknown_name(move.layer, list(by_name), "layer")
        if move.layer in result:
            raise UsageError(f"the plan replaces the layer {move.layer!r} twice")
        layer = by_name[move.layer]
        if layer.reason is not None:
            raise UnsupportedError(f"the layer {layer.name!r} stays dense: {layer.reason}")
        result[move.layer] = (layer, move)
    return list(result.values())


def _factorized(
    model: nn.Module, layer: Layer, move: Move, methods: Mapping[str, Decomposition], seed: int
) -> nn.Sequential:
    if move.method not in methods:
        raise unknown_name(move.method, list(methods), "method")
    module = model.get_submodule(layer.name)
    prepared = prepare(layer, module, move.method, methods[move.method], seed)
    if prepared is None:
        assert layer.spec is not None
        reason = methods[move.method].supports(layer.spec.per_group())
        raise UnsupportedError(f"{move.method} cannot decompose the layer {layer.name!r}: {reason}")
    try:
        return factorize(layer, module, prepared, move.rank)
    except UsageError as error:
        raise UsageError(f"layer {layer.name!r}, {move.method}: {error}") from error


def _without(plan: Plan, names: Mapping[str, str]) -> Plan:
    return Plan(
        **vars(plan)
        | {
            "moves": tuple(m for m in plan.moves if m.layer not in names),
            "candidates": tuple(c for c in plan.candidates if c.layer not in names),
        }
    )
