"""The grid of layer x method x rank, and the approximation errors of each candidate."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from tdkit import defaults
from tdkit.calibration.curvature import curvatures
from tdkit.calibration.moments import input_moments
from tdkit.compression.kept import Kept
from tdkit.costs.base import Cost, change
from tdkit.costs.macs import MACS
from tdkit.costs.params import PARAMS
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
from tdkit.errors import (
    TdkitError,
    UnlawfulError,
    UnsupportedError,
    UsageError,
    first_line,
    option,
)
from tdkit.forward.inputs import Inputs
from tdkit.layers.evidence import COVARIANCE, GRADIENTS, MOMENTS, NO_EVIDENCE, Curvature, Evidence
from tdkit.layers.inventory import Layer
from tdkit.layers.traced import TracedModel
from tdkit.layers.weights import Weights, is_finite
from tdkit.metrics.base import Difference, Metric
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
        costs: What to count of every candidate.
        versions: Of tdkit and of the plugins that the methods come from, by distribution.

    Raises:
        UsageError: If a keep is not a fraction, the rule unknown, or the seed no whole number.
    """

    methods: Mapping[str, Decomposition]
    metrics: Sequence[Metric]
    keeps: Sequence[float] = COMPRESSION_KEEPS
    rule: str = defaults.RULE
    seed: int = defaults.SEED
    limits: Mapping[str, float] = field(default_factory=dict)
    costs: Sequence[Cost] = (PARAMS, MACS)
    versions: Mapping[str, str] = field(default_factory=dict)

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
    traced: TracedModel,
    grid: Grid,
    *,
    batches: Iterable[Any] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
    kept: Kept | None = None,
) -> list[Candidate]:
    """Score every candidate that is smaller than its layer.

    Args:
        traced: The dense model; of its layers those with a reason are passed over. Only feature
            metrics and moments need it to be live.
        grid: Methods, metrics and keeps.
        batches: Model inputs, tensors of any shape, needed by feature metrics and by what looks at
            moments. Layers that they never reach have no candidates then.
        progress: Called with the units done and all units, a unit being a layer's parameters
            under one method.
        kept: Where decompositions go that may be of use afterwards.

    Raises:
        UsageError: If data are needed and there are none, or a metric or cost breaks its law.
        UnsupportedError: If a method fails on a layer, or the model on the data.
    """
    needing = [*grid.features, *(m for m in grid.metrics if m.needs)]
    wanted = needs_of(grid.methods, grid.metrics)
    given = [traced.read(batch) for batch in batches] if needing or wanted else []
    if needing and not given:
        names = ", ".join(dict.fromkeys(metric.name for metric in needing))
        need = "needs" if len(needing) == 1 else "need"
        raise UsageError(f"{names} {need} data to look at", f"name some with {option('data')}")
    usable = [layer for layer in traced.layers if layer.reason is None]
    known = layer_evidence(traced, grid, usable, given)
    scored = _scored(traced.weights, usable, grid, known, progress, kept)
    if not grid.features:
        return [candidate for candidate, _ in scored]
    groups = _grouped(scored, _TOGETHER)
    measured = (_with_features(traced.model, group, given, grid, known) for group in groups)
    return [candidate for group in measured for candidate in group]


def looks_at_data(methods: Mapping[str, Decomposition], metrics: Sequence[Metric]) -> bool:
    """Whether any method or metric looks at what the model is given."""
    features = any(metric.target == "features" for metric in metrics)
    return features or bool(needs_of(methods, metrics))


def needs_of(methods: Mapping[str, Decomposition], metrics: Iterable[Metric]) -> frozenset[str]:
    """What methods and metrics look at beside weights and features."""
    needs = [*(method.needs for method in methods.values()), *(metric.needs for metric in metrics)]
    return frozenset().union(*needs)


def layer_evidence(
    traced: TracedModel, grid: Grid, layers: Sequence[Layer], batches: Sequence[Inputs]
) -> dict[str, Evidence]:
    """What is known of each layer beside its weight, of what a method or metric looks at.

    Moments take the square of a layer's channels each, curvatures that of its patches.

    Args:
        traced: The dense model.
        grid: What looks at it, and the seed.
        layers: Layers that are to be decomposed.
        batches: Model inputs; without any there is the seed alone.

    Returns:
        By the name of a layer. A layer whose curvature a metric looks at and that the batches
        never reach is left out.

    Raises:
        UnsupportedError: If the model does not run on the batches.
    """
    by_metrics = needs_of({}, grid.metrics)

    def looked_at(*needs: str) -> list[Layer]:
        wanted = frozenset(needs)
        looking = {name: method for name, method in grid.methods.items() if wanted & method.needs}
        every = wanted & by_metrics
        return [x for x in layers if every or unsupported_by_all(x, looking) is None]

    names = [layer.name for layer in looked_at(MOMENTS)]
    moments = input_moments(traced.model, names, batches) if names and batches else {}
    bent = looked_at(COVARIANCE, GRADIENTS)
    curved = _curvatures(traced, grid, bent, batches) if bent and batches else {}
    unknown = {x.name for x in bent} - curved.keys() if by_metrics - {MOMENTS} else ()
    return {
        x.name: Evidence(grid.seed, moments.get(x.name), curved.get(x.name))
        for x in layers
        if x.name not in unknown
    }


def _curvatures(
    traced: TracedModel, grid: Grid, layers: Sequence[Layer], batches: Sequence[Inputs]
) -> dict[str, Curvature]:
    outputs = GRADIENTS in needs_of(grid.methods, grid.metrics)
    sample = traced.sample or batches[0]
    return curvatures(traced.model, layers, batches, sample, grid.seed, outputs=outputs)


# A candidate and, where features are to be measured, the module that stands in for its layer.
_Scored = tuple[Candidate, nn.Sequential | None]


def _scored(
    weights: Weights,
    layers: Sequence[Layer],
    grid: Grid,
    known: Mapping[str, Evidence],
    progress: Callable[[int, int], None],
    kept: Kept | None,
) -> Iterator[_Scored]:
    """All candidates, scored on the weights."""
    total, done = sum(layer.parameters for layer in layers) * len(grid.methods), 0
    for layer in layers:
        for name in grid.methods:
            if layer.name in known:
                yield from _candidates(layer, weights, name, grid, known[layer.name], kept)
            done += layer.parameters
            progress(done, total)


def _candidates(
    layer: Layer,
    weights: Weights,
    method: str,
    grid: Grid,
    evidence: Evidence,
    kept: Kept | None,
) -> Iterator[_Scored]:
    with blamed(method, layer):
        ready = prepare(layer, weights, method, grid.methods[method], evidence)
        if ready is None:
            return
        for rank in _ranks(layer, ready, grid, grid.limits.get(method, 1.0)):
            stand_in = factorize(layer, weights, ready, rank) if grid.features else None
            found = candidate_of(layer, method, ready, rank, grid.metrics, grid.costs, evidence)
            yield found, stand_in
        if kept is not None:
            kept.add(layer.name, method, ready)


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
    """Whatever a method does wrong becomes an error that names it and the layer.

    Raises:
        UnsupportedError: For whatever a method raises itself.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, UnlawfulError):
        raise  # not the method's fault
    except Exception as error:
        what = first_line(error)
        if str(error) and not isinstance(error, TdkitError):
            what = f"{type(error).__name__}: {what}"
        raise UnsupportedError(
            f"{method} fails on the layer {layer.name!r}: {what}",
            f"leave the method out with {option('methods')}, or the layer with {option('layers')}",
        ) from error


def _grouped(scored: Iterable[_Scored], most: int) -> Iterator[list[_Scored]]:
    """Runs of candidates that have at most so many parameters, or are alone."""
    group: list[_Scored] = []
    held = 0
    for candidate, module in scored:
        size = sum(p.numel() for p in module.parameters()) if module is not None else 0
        if group and held + size > most:
            yield group
            group, held = [], 0
        group.append((candidate, module))
        held += size
    if group:
        yield group


def _with_features(
    model: nn.Module,
    group: Sequence[_Scored],
    batches: Sequence[Inputs],
    grid: Grid,
    known: Mapping[str, Evidence],
) -> Iterator[Candidate]:
    stand_ins: dict[str, list[nn.Module]] = {}
    for candidate, module in group:
        assert module is not None
        stand_ins.setdefault(candidate.layer, []).append(module)
    measured = feature_errors(model, stand_ins, batches, grid.features, known)
    rows = {name: iter(errors) for name, errors in measured.items()}
    for candidate, _ in group:
        if candidate.layer in rows:
            errors = {**candidate.errors, **next(rows[candidate.layer])}
            yield replace(candidate, errors=errors)


def prepare(
    layer: Layer, weights: Weights, method_name: str, method: Decomposition, evidence: Evidence
) -> Prepared | None:
    """Prepare one layer under one method; None where the method does not support the layer.

    The random start depends on the seed, the layer and the method alone, so that a plan applied
    later rebuilds the very factors that were scored.

    Args:
        layer: The layer.
        weights: Where its weight is.
        method_name: The method's name.
        method: The method.
        evidence: The seed of the whole run, and what is known of the layer's inputs; the method
            sees of it what it asks for.
    """
    if layer.spec is None or unsupported(method, layer.spec) is not None:
        return None
    start = zlib.crc32(f"{evidence.seed}/{layer.name}/{method_name}".encode())
    # A copy, so that a method that works in place spoils nothing but its own.
    weight = weights.weight(layer.name).detach().clone()
    return prepared(method, layer.spec, weight, replace(evidence, seed=start))


def unsupported_by_all(layer: Layer, methods: Mapping[str, Decomposition]) -> str | None:
    """Why none of the methods supports a layer; None when one does."""
    if layer.spec is None:
        return layer.reason
    reasons = {n: unsupported(method, layer.spec) for n, method in methods.items()}
    if any(reason is None for reason in reasons.values()):
        return None
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def factorize(layer: Layer, weights: Weights, prepared: Prepared, rank: Rank) -> nn.Sequential:
    """The module that stands in for a layer: same dtype, device and requires_grad, in train mode.

    Raises:
        UsageError: If the rank does not fit the layer.
        UnsupportedError: If the factors do not fit the layer's dtype.
    """
    weight, bias = weights.weight(layer.name), weights.bias(layer.name)
    result = factorized_module(
        prepared.stages(rank), prepared.factors(rank), bias, weight.dtype, weight.device
    )
    for name, parameter in result.named_parameters():
        original = bias if name.endswith("bias") and bias is not None else weight
        # A file does not say whether a weight is to be trained: it is.
        trained = original.requires_grad or not isinstance(original, nn.Parameter)
        parameter.requires_grad_(trained)
        if not is_finite(parameter):
            raise UnsupportedError(f"the factors overflow {weight.dtype}")
    return result


def candidate_of(
    layer: Layer,
    method: str,
    prepared: Prepared,
    rank: Rank,
    metrics: Sequence[Metric],
    costs: Sequence[Cost] = (PARAMS, MACS),
    evidence: Evidence = NO_EVIDENCE,
) -> Candidate:
    """What a layer costs at a rank, and its errors by those of the metrics that need no features.

    An error that is no finite number because the method's is none is left to whoever chooses, who
    passes it over.

    Args:
        layer: The layer.
        method: The method's name.
        prepared: The layer, prepared under it.
        rank: The method's rank.
        metrics: The errors to compute, of those that look at weights.
        costs: What to count.
        evidence: What else is known of the layer, for metrics.

    Raises:
        UsageError: If the rank does not fit the layer, or a metric or cost breaks its law.
    """
    assert layer.spec is not None
    stages = prepared.stages(rank)
    bias = layer.spec.out_channels if layer.spec.bias else 0
    difference = weight_difference(prepared, rank, evidence)
    return Candidate(
        layer=layer.name,
        method=method,
        rank=rank,
        keep=(count(stages) - bias) / layer.spec.weight_parameters,
        costs={cost.name: change(cost, stages, layer) for cost in costs},
        errors={m.name: _error(m, difference) for m in metrics if m.target == "weights"},
    )


def _error(metric: Metric, difference: Difference) -> float:
    error = metric.of(difference)
    return metric.check(error) if math.isfinite(difference.error) else error


def weight_difference(
    prepared: Prepared, rank: Rank, evidence: Evidence = NO_EVIDENCE
) -> Difference:
    """A layer's weight and what its factors amount to, as a metric sees them.

    Args:
        prepared: The layer, prepared under a method.
        rank: The method's rank.
        evidence: What else is known of the layer; the seed is the method's.
    """
    return Difference(
        error=prepared.error(rank),
        norm=prepared.norm,
        size=prepared.layer.weight_parameters,
        evidence=replace(evidence, seed=prepared.seed),
        tensors=lambda: (prepared.dense(), prepared.reconstruct(rank)),
    )
