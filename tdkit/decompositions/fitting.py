"""Fitting all factors of a layer at once to what its inputs make of an error."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tdkit.decompositions.base import compose
from tdkit.layers.spec import LayerSpec
from tdkit.layers.stages import Stage

# Products of an iteration beyond which they are in float32.
_MANY = 2**28


def weighted_rows(rows: Tensor, covariance: Tensor) -> Tensor:
    """Weights times a covariance.

    Args:
        rows: (out, in, *kernel).
        covariance: (d, d), of the channels alone or of whole patches.

    Returns:
        (out, in, *kernel).
    """
    if covariance.shape[-1] == rows.shape[1]:
        return (rows.movedim(1, -1) @ covariance).movedim(-1, 1)
    return (rows.flatten(1) @ covariance).reshape(rows.shape)


def metric_norm(weights: Tensor, covariance: Tensor) -> float:
    """The root of tr[W S Wᵀ], summed over groups.

    Args:
        weights: (groups, out, in, *kernel).
        covariance: (groups, d, d).
    """
    energy = sum(
        float((weight * weighted_rows(weight, part)).sum())
        for weight, part in zip(weights, covariance, strict=True)
    )
    return math.sqrt(max(energy, 0.0))


def fitted_factors(
    stages: Sequence[Stage],
    start: Sequence[Tensor],
    target: Tensor,
    covariance: Tensor,
    group: LayerSpec,
    steps: int,
) -> list[Tensor]:
    """Factors of least tr[(T - W~) S (T - W~)ᵀ], by L-BFGS; never worse than the start.

    Args:
        stages: Of one group.
        start: Their weights, in torch's layout, float64.
        target: T, (out, in, *kernel).
        covariance: S, (d, d).
        group: The layer that they stand in for.
        steps: Iterations, at most.
    """
    many = target.shape[0] * covariance.shape[-1] ** 2 > _MANY
    dtype = torch.float32 if many else torch.float64
    wanted, metric = target.to(dtype), covariance.to(dtype)
    energy = float((wanted * weighted_rows(wanted, metric)).sum()) or 1.0
    factors = [factor.detach().to(dtype).contiguous().clone().requires_grad_() for factor in start]
    optimizer = torch.optim.LBFGS(
        factors,
        max_iter=steps,
        history_size=10,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def value() -> Tensor:
        optimizer.zero_grad()
        made = compose(stages, factors, group)
        with torch.no_grad():
            missed = wanted - made
            pushed = weighted_rows(missed, metric)
            error = (missed * pushed).sum() / energy
        made.backward(pushed * (-2 / energy))
        return error

    with torch.enable_grad():
        optimizer.step(value)
    found = [factor.detach().to(target.dtype) for factor in factors]
    before, after = (_missed(stages, each, target, covariance, group) for each in (start, found))
    return found if after < before else list(start)


def _missed(
    stages: Sequence[Stage],
    factors: Sequence[Tensor],
    target: Tensor,
    covariance: Tensor,
    group: LayerSpec,
) -> float:
    missed = target - compose(stages, factors, group)
    return float((missed * weighted_rows(missed, covariance)).sum())
