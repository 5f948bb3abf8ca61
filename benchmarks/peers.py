"""How others choose what becomes of each layer, with tdkit's decompositions and cost counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn

from tdkit.compression.applying import apply_plan
from tdkit.compression.plan import Move, Plan
from tdkit.compression.scoring import Grid, score
from tdkit.costs.base import Cost, change, total_cost
from tdkit.decompositions.base import Decomposition, layer_stages
from tdkit.decompositions.svd import Svd
from tdkit.layers.traced import TracedModel
from tdkit.metrics.weights import RELATIVE
from tdkit.planners.candidate import Candidate
from tdkit.registry import load_registry, resolve_methods


class UnreachableError(Exception):
    """A peer's rule reaches no such budget."""


def method(name: str) -> Decomposition:
    """A decomposition by its name."""
    (found,) = resolve_methods(load_registry(), [name]).values()
    return found


Images = Sequence[Tensor]
"""Batches that some look at."""


def uniform(
    name: str, traced: TracedModel, _images: Images, budget: float, cost: Cost
) -> nn.Module:
    """One keep for all layers, the largest that holds the budget, with tensorly's ranks."""
    how, total = method(name), total_cost(traced.model, traced.layers, cost)
    layers = [layer for layer in traced.layers if layer.reason is None and layer.spec]
    for percent in range(100, 0, -1):
        ranks = [how.rank(layer.spec.per_group(), percent / 100) for layer in layers]
        changes = [
            change(cost, layer_stages(how, layer.spec, rank), layer)
            for layer, rank in zip(layers, ranks, strict=True)
        ]
        if total - sum(each.saving for each in changes) <= budget * total:
            names = [layer.name for layer in layers]
            moves = tuple(Move(n, name, rank) for n, rank in zip(names, ranks, strict=True))
            return apply_plan(traced, Plan(moves, calibration="none"), {name: how}).model
    raise UnreachableError


def alds(traced: TracedModel, _images: Images, budget: float, cost: Cost) -> nn.Module:
    """The least largest relative error of any layer, by SVD (Liebenwein et al. 2021, ALDS)."""
    grid = Grid({"svd": Svd()}, [RELATIVE], [k / 100 for k in range(1, 100)], costs=(cost,))
    candidates = score(traced, grid)
    errors = [candidate.errors[RELATIVE.name] for candidate in candidates]
    return _least_largest(traced, candidates, errors, budget, cost)


def aimet(traced: TracedModel, images: Images, budget: float, cost: Cost) -> nn.Module:
    """Spatial SVD with AIMET's greedy selection: the score of a layer compressed alone decides.

    The score is how often the model then says what the dense one says of the images, which takes
    no labels. Nine ratios of each layer are tried, as AIMET does by default.
    """
    dense = traced.weights.model
    how = method("spatial-svd")
    ratios = [k / 10 for k in range(1, 10)]
    grid = Grid({"spatial-svd": how}, [RELATIVE], ratios, costs=(cost,))
    candidates = score(traced, grid)
    said = _classes(dense, images)
    losses = []
    for candidate in candidates:
        plan = Plan((Move(candidate.layer, "spatial-svd", candidate.rank),), calibration="none")
        alone = apply_plan(TracedModel.of(dense), plan, {"spatial-svd": how}).model
        losses.append(1 - float((_classes(alone, images) == said).float().mean()))
    return _least_largest(traced, candidates, losses, budget, cost)


def _classes(model: nn.Module, images: Images) -> Tensor:
    with torch.inference_mode():
        return torch.cat([model(batch).argmax(1) for batch in images])


def _least_largest(
    traced: TracedModel,
    candidates: Sequence[Candidate],
    errors: Sequence[float],
    budget: float,
    cost: Cost,
) -> nn.Module:
    """Of each layer what saves most with an error under a threshold, the least that will do."""
    total = total_cost(traced.model, traced.layers, cost)
    allowed = math.floor(Fraction(str(budget)) * total)
    for threshold in sorted(set(errors)):
        best: dict[str, Candidate] = {}
        for candidate, error in zip(candidates, errors, strict=True):
            if error <= threshold:
                held = best.get(candidate.layer)
                best[candidate.layer] = max(held or candidate, candidate, key=_saving(cost))
        if total - sum(map(_saving(cost), best.values())) <= allowed:
            moves = tuple(Move(c.layer, c.method, c.rank) for c in best.values())
            names = {c.method for c in best.values()}
            plan = Plan(moves, calibration="none")
            return apply_plan(traced, plan, {name: method(name) for name in names}).model
    raise UnreachableError


def _saving(cost: Cost) -> Callable[[Candidate], int]:
    return lambda candidate: candidate.costs[cost.name].saving
