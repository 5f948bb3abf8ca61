"""The grid of layer x method x rank, and the approximation errors of each candidate."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tdkit.costs import macs
from tdkit.decompositions.base import (
    Decomposition,
    Prepared,
    Rank,
    count,
    factorized_module,
)
from tdkit.errors import UnsupportedError, UsageError
from tdkit.layers import Layer
from tdkit.metrics.base import Metric
from tdkit.metrics.features import feature_errors, layer_inputs

COMPRESSION_KEEPS = (
    0.02, 0.03, 0.045, 0.06, 0.08, 0.1, 0.125, 0.15, 0.18, 0.21, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5,
    0.6, 0.7, 0.8, 0.9,
)  # fmt: skip
"""Keeps scored for compressing: dense where most budgets lead, so that planners can fine-tune."""

PAPER_KEEPS = (0.1, 0.25, 0.5, 0.75, 0.9)
"""The keeps of Tables 2 and 3 of the paper."""


@dataclass(frozen=True)
class Candidate:
    """One layer, method and rank, with what it costs and how far off it is.

    Attributes:
        layer: The layer's name.
        method: The method's name.
        rank: The method's rank.
        keep: The fraction of the layer's weight parameters that remain.
        params_before: The layer's parameters, bias included.
        params_after: Those of its factorization.
        macs_before: The layer's multiply-accumulates per sample; None when unknown.
        macs_after: Those of its factorization.
        errors: Approximation error by metric.
    """

    layer: str
    method: str
    rank: Rank
    keep: float
    params_before: int
    params_after: int
    macs_before: int | None
    macs_after: int | None
    errors: Mapping[str, float]


@dataclass(frozen=True)
class Grid:
    """What to score.

    Attributes:
        methods: Decompositions by name.
        metrics: The errors to compute.
        keeps: Fractions of a layer's weight parameters.
        rule: ``best`` or ``proportional``, see :meth:`Prepared.rank`.
        seed: Seeds every random start, together with the layer's name.
    """

    methods: Mapping[str, Decomposition]
    metrics: Sequence[Metric]
    keeps: Sequence[float] = COMPRESSION_KEEPS
    rule: str = "best"
    seed: int = 0


def score(
    model: nn.Module,
    layers: Sequence[Layer],
    grid: Grid,
    *,
    batches: Iterable[Tensor] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Candidate]:
    """Score every candidate that is smaller than its layer.

    Args:
        model: The dense model.
        layers: Its layers; those with a reason are passed over.
        grid: Methods, metrics and keeps.
        batches: Model inputs, needed by feature metrics only.
        progress: Called with the units done and all units, a unit being a layer's parameters
            under one method.

    Raises:
        UsageError: If a feature metric is asked for without data.
    """
    open_layers = [layer for layer in layers if layer.reason is None]
    features = [metric for metric in grid.metrics if metric.target == "features"]
    batches = list(batches)
    if features and not batches:
        names = ", ".join(metric.name for metric in features)
        raise UsageError(f"{names} needs data to measure features on", "name some with --data")
    total = sum(layer.parameters for layer in open_layers) * len(grid.methods)
    done, candidates = 0, []
    for layer in open_layers:
        module = model.get_submodule(layer.name)
        seen = layer_inputs(model, {layer.name: module}, batches)[layer.name] if features else []
        for name in grid.methods:
            for prepared, rank in ranks(layer, module, name, grid):
                candidates.append(_candidate(layer, module, name, prepared, rank, grid, seen))
            done += layer.parameters
            progress(done, total)
    return candidates


def ranks(
    layer: Layer, module: nn.Module, method: str, grid: Grid
) -> Iterator[tuple[Prepared, Rank]]:
    """The distinct ranks of a grid's keeps that make a layer smaller."""
    prepared = prepare(layer, module, method, grid.methods[method], grid.seed)
    if prepared is None or layer.spec is None:
        return
    seen: set[Rank] = set()
    for keep in grid.keeps:
        rank = prepared.rank(keep, grid.rule)
        if rank not in seen and count(prepared.stages(rank)) < layer.parameters:
            seen.add(rank)
            yield prepared, rank


def prepare(
    layer: Layer, module: nn.Module, method_name: str, method: Decomposition, seed: int
) -> Prepared | None:
    """Prepare one layer under one method; None where the method does not support the layer.

    The random start depends on the seed, the layer and the method alone, so that a plan applied
    later rebuilds the very factors that were scored.
    """
    if layer.spec is None or method.supports(layer.spec.per_group()) is not None:
        return None
    start = zlib.crc32(f"{seed}/{layer.name}/{method_name}".encode())
    return method.prepare(layer.spec, module.get_parameter("weight"), start)


def unsupported_by_all(layer: Layer, methods: Mapping[str, Decomposition]) -> str | None:
    """Why none of the methods supports a layer; None when one does."""
    if layer.spec is None:
        return layer.reason
    reasons = {n: method.supports(layer.spec.per_group()) for n, method in methods.items()}
    if any(reason is None for reason in reasons.values()):
        return None
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def factorize(layer: Layer, module: nn.Module, prepared: Prepared, rank: Rank) -> nn.Sequential:
    """The module that stands in for a layer: same dtype, device, mode and requires_grad."""
    weight = module.get_parameter("weight")
    bias = module._parameters.get("bias")
    result = factorized_module(
        prepared.stages(rank), prepared.factors(rank), bias, weight.dtype, weight.device
    )
    result.train(module.training)
    for name, parameter in result.named_parameters():
        model_parameter = bias if name.endswith("bias") and bias is not None else weight
        parameter.requires_grad_(model_parameter.requires_grad)
        if not bool(parameter.isfinite().all()):
            raise UnsupportedError(f"{layer.name}: the factors overflow {weight.dtype}")
    return result


def _candidate(
    layer: Layer,
    module: nn.Module,
    method: str,
    prepared: Prepared,
    rank: Rank,
    grid: Grid,
    inputs: Sequence[Tensor],
) -> Candidate:
    assert layer.spec is not None
    stages = prepared.stages(rank)
    after = count(stages)
    bias = layer.spec.out_channels if layer.spec.bias else 0
    return Candidate(
        layer=layer.name,
        method=method,
        rank=rank,
        keep=(after - bias) / layer.spec.weight_parameters,
        params_before=layer.parameters,
        params_after=after,
        macs_before=layer.macs,
        macs_after=macs(stages, layer.calls) if layer.calls is not None else None,
        errors=_errors(layer, module, prepared, rank, grid.metrics, inputs),
    )


def _errors(
    layer: Layer,
    module: nn.Module,
    prepared: Prepared,
    rank: Rank,
    metrics: Sequence[Metric],
    inputs: Sequence[Tensor],
) -> dict[str, float]:
    assert layer.spec is not None
    error, norm, size = prepared.error(rank), prepared.norm, layer.spec.weight_parameters
    result = {m.name: m.value(error, norm, size) for m in metrics if m.target == "weights"}
    features = [metric for metric in metrics if metric.target == "features"]
    if features:
        result |= feature_errors(module, factorize(layer, module, prepared, rank), inputs, features)
    return result


def to_json(candidate: Candidate) -> dict[str, Any]:
    """A candidate as JSON values."""
    fields = vars(candidate) | {"errors": dict(candidate.errors)}
    return fields | {"rank": list(r) if isinstance(r := candidate.rank, tuple) else r}
