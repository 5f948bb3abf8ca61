"""The grid of layer x method x rank, and the approximation errors of each candidate."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tdkit.decompositions.base import (
    RANK_RULES,
    Decomposition,
    Prepared,
    Rank,
    count,
    factorized_module,
    prepared,
    unsupported,
)
from tdkit.errors import TdkitError, UnsupportedError, UsageError, first_line
from tdkit.layers.counting import macs
from tdkit.layers.evidence import Evidence, Moments
from tdkit.layers.inventory import Layer
from tdkit.metrics.base import Metric
from tdkit.metrics.features import feature_errors
from tdkit.planners.candidate import Candidate

COMPRESSION_KEEPS = (
    0.02, 0.03, 0.045, 0.06, 0.08, 0.1, 0.125, 0.15, 0.18, 0.21, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5,
    0.6, 0.7, 0.8, 0.9,
)  # fmt: skip
"""Keeps scored for compressing: dense where most budgets lead, so that planners can fine-tune."""

PAPER_KEEPS = (0.1, 0.25, 0.5, 0.75, 0.9)
"""The keeps of Tables 2 and 3 of the paper."""

# Parameters of factorized layers that are held in memory to be measured in one pass over the data.
_TOGETHER = 2**25


@dataclass(frozen=True)
class Grid:
    """What to score.

    Attributes:
        methods: Decompositions by name.
        metrics: The errors to compute.
        keeps: Fractions of a layer's weight parameters.
        rule: ``best`` or ``proportional``, see :meth:`Prepared.rank`.
        seed: Seeds every random start, together with the layer's name.
        limits: The largest keep of some methods, by name.

    Raises:
        UsageError: If a keep is not a fraction, the rule unknown, or the seed no whole number.
    """

    methods: Mapping[str, Decomposition]
    metrics: Sequence[Metric]
    keeps: Sequence[float] = COMPRESSION_KEEPS
    rule: str = "best"
    seed: int = 0
    limits: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for keep in self.keeps:
            if not isinstance(keep, int | float) or not 0 < keep <= 1:
                raise UsageError(f"the keep {keep!r} is not a fraction above 0 and at most 1")
        if type(self.seed) is not int:
            raise UsageError(f"the seed {self.seed!r} is not a whole number")
        if self.rule not in RANK_RULES:
            raise UsageError(f"unknown rank rule {self.rule!r}", f"it is {' or '.join(RANK_RULES)}")

    @property
    def features(self) -> list[Metric]:
        """The metrics that need data."""
        return [metric for metric in self.metrics if metric.target == "features"]


def score(
    model: nn.Module,
    layers: Sequence[Layer],
    grid: Grid,
    *,
    batches: Iterable[Tensor | Sequence[Any]] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Candidate]:
    """Score every candidate that is smaller than its layer.

    Args:
        model: The dense model.
        layers: Its layers; those with a reason are passed over.
        grid: Methods, metrics and keeps.
        batches: Model inputs, needed by feature metrics only. Layers that they never reach have
            no candidates then.
        progress: Called with the units done and all units, a unit being a layer's parameters
            under one method.

    Raises:
        UsageError: If a feature metric is asked for without data.
        UnsupportedError: If a method fails on a layer, or the model on the data.
    """
    batches = list(batches) if grid.features else []
    if grid.features and not batches:
        names = ", ".join(metric.name for metric in grid.features)
        need = "needs" if len(grid.features) == 1 else "need"
        raise UsageError(f"{names} {need} data to measure features on", "name some with --data")
    scored = _scored(model, [layer for layer in layers if layer.reason is None], grid, progress)
    if not grid.features:
        return [candidate for candidate, _ in scored]
    groups = _grouped(scored, _TOGETHER)
    return [c for group in groups for c in _with_features(model, group, batches, grid.features)]


# A candidate and, where features are to be measured, the module that stands in for its layer.
_Scored = tuple[Candidate, nn.Sequential | None]


def _scored(
    model: nn.Module,
    layers: Sequence[Layer],
    grid: Grid,
    progress: Callable[[int, int], None],
) -> Iterator[_Scored]:
    """All candidates, scored on the weights."""
    total, done = sum(layer.parameters for layer in layers) * len(grid.methods), 0
    for layer in layers:
        for name in grid.methods:
            yield from _candidates(layer, model.get_submodule(layer.name), name, grid)
            done += layer.parameters
            progress(done, total)


def _candidates(layer: Layer, module: nn.Module, method: str, grid: Grid) -> Iterator[_Scored]:
    with blamed(method, layer):
        found = prepare(layer, module, method, grid.methods[method], grid.seed)
        if found is None:
            return
        for rank in _ranks(layer, found, grid, grid.limits.get(method, 1.0)):
            stand_in = factorize(layer, module, found, rank) if grid.features else None
            yield candidate_of(layer, method, found, rank, grid.metrics), stand_in


def _ranks(layer: Layer, prepared: Prepared, grid: Grid, limit: float) -> Iterator[Rank]:
    """The distinct ranks of a grid's keeps that make a layer smaller."""
    seen: set[Rank] = set()
    for keep in grid.keeps:
        if keep > limit:
            continue
        rank = prepared.rank(keep, grid.rule)
        if rank not in seen and count(prepared.stages(rank)) < layer.parameters:
            seen.add(rank)
            yield rank


@contextmanager
def blamed(method: str, layer: Layer) -> Iterator[None]:
    """Whatever a method does wrong becomes an error that names it and the layer."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        what = first_line(error)
        if str(error) and not isinstance(error, TdkitError):
            what = f"{type(error).__name__}: {what}"
        raise UnsupportedError(
            f"{method} fails on the layer {layer.name!r}: {what}",
            "leave the method out with --methods, or the layer with --layers",
        ) from error


def _grouped(scored: Iterable[_Scored], most: int) -> Iterator[list[_Scored]]:
    """Runs of candidates that have at most so many parameters, or are alone."""
    group: list[_Scored] = []
    held = 0
    for candidate, module in scored:
        if group and held + candidate.params_after > most:
            yield group
            group, held = [], 0
        group.append((candidate, module))
        held += candidate.params_after
    if group:
        yield group


def _with_features(
    model: nn.Module,
    group: Sequence[_Scored],
    batches: Iterable[Tensor | Sequence[Any]],
    metrics: Sequence[Metric],
) -> Iterator[Candidate]:
    stand_ins: dict[str, list[nn.Module]] = {}
    for candidate, module in group:
        assert module is not None
        stand_ins.setdefault(candidate.layer, []).append(module)
    measured = feature_errors(model, stand_ins, batches, metrics)
    rows = {name: iter(errors) for name, errors in measured.items()}
    for candidate, _ in group:
        if candidate.layer in rows:
            errors = {**candidate.errors, **next(rows[candidate.layer])}
            yield replace(candidate, errors=errors)


def prepare(
    layer: Layer,
    module: nn.Module,
    method_name: str,
    method: Decomposition,
    seed: int,
    moments: Moments | None = None,
) -> Prepared | None:
    """Prepare one layer under one method; None where the method does not support the layer.

    The random start depends on the seed, the layer and the method alone, so that a plan applied
    later rebuilds the very factors that were scored.

    Args:
        layer: The layer.
        module: Its module.
        method_name: The method's name.
        method: The method.
        seed: The seed of the whole run.
        moments: Of the layer's inputs, where they were collected; for a method that needs them.
    """
    if layer.spec is None or unsupported(method, layer.spec) is not None:
        return None
    start = zlib.crc32(f"{seed}/{layer.name}/{method_name}".encode())
    evidence = Evidence(start, moments)
    # A copy, so that a method that works in place spoils nothing but its own.
    weight = module.get_parameter("weight").detach().clone()
    return prepared(method, layer.spec, weight, evidence)


def unsupported_by_all(layer: Layer, methods: Mapping[str, Decomposition]) -> str | None:
    """Why none of the methods supports a layer; None when one does."""
    if layer.spec is None:
        return layer.reason
    reasons = {n: unsupported(method, layer.spec) for n, method in methods.items()}
    if any(reason is None for reason in reasons.values()):
        return None
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def factorize(layer: Layer, module: nn.Module, prepared: Prepared, rank: Rank) -> nn.Sequential:
    """The module that stands in for a layer: same dtype, device, mode and requires_grad.

    Raises:
        UsageError: If the rank does not fit the layer.
        UnsupportedError: If the factors do not fit the layer's dtype.
    """
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
            raise UnsupportedError(f"the factors overflow {weight.dtype}")
    return result


def candidate_of(
    layer: Layer, method: str, prepared: Prepared, rank: Rank, metrics: Sequence[Metric]
) -> Candidate:
    """What a layer costs at a rank, and its errors by those of the metrics that need no data.

    Raises:
        UsageError: If the rank does not fit the layer.
    """
    assert layer.spec is not None
    stages = prepared.stages(rank)
    after = count(stages)
    bias = layer.spec.out_channels if layer.spec.bias else 0
    error, norm, size = prepared.error(rank), prepared.norm, layer.spec.weight_parameters
    return Candidate(
        layer=layer.name,
        method=method,
        rank=rank,
        keep=(after - bias) / size,
        params_before=layer.parameters,
        params_after=after,
        macs_before=layer.macs,
        macs_after=macs(stages, layer.calls) if layer.calls is not None else None,
        errors={m.name: m.value(error, norm, size) for m in metrics if m.target == "weights"},
    )
