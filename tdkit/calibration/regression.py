"""The weight that a layer should have, given what the compressed layers before it deliver."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tdkit.calibration.pairs import Pairs

RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
"""What may be added to the covariance, of the mean variance of the inputs."""


@dataclass(frozen=True, eq=False)
class Regressed:
    """A layer's target.

    Attributes:
        weight: (groups, out, d), float64.
        metric: S + ridge, (groups, d, d): least squares towards the wanted outputs, drawn to the
            dense weight, miss the target by just this metric.
        ridge: Of the mean variance of the inputs; infinite where the target is the dense weight.
    """

    weight: Tensor
    metric: Tensor
    ridge: float


def regressed(weight: Tensor, pairs: Pairs, held: tuple[Tensor, Tensor] | None) -> Regressed:
    """The linear map that best makes the wanted outputs of the inputs, drawn towards the weight.

    T = W + (C - W S)(S + ridge I)⁻¹, S and C being the covariances of inputs, and of outputs with
    inputs. With the inputs of the dense model T = W. Zhang et al. 2016 (asymmetric reconstruction);
    for matrices the update of Wang et al. 2024 (SVD-LLM). The ridge is that of the least error on
    pairs that were held back; where any ridge is worse than the weight itself, that stays.

    Args:
        weight: W, (groups, out, d), float64.
        pairs: What S and C are made of.
        held: Inputs (groups, n, d) and outputs (groups, n, out) that were held back; None for the
            first ridge.
    """
    covariance = pairs.covariance
    gap = pairs.cross - weight @ covariance
    apart = None if held is None else _centred(pairs, *held)
    least = _error(weight, apart)
    best = Regressed(weight, _with_ridge(covariance, RIDGES[0]), math.inf)
    for ridge in RIDGES if apart is not None else RIDGES[:1]:
        metric = _with_ridge(covariance, ridge)
        lower, failed = torch.linalg.cholesky_ex(metric)
        if bool(failed.any()):
            continue
        target = weight + torch.cholesky_solve(gap.mT, lower).mT
        error = _error(target, apart)
        if apart is None or error < least:
            best, least = Regressed(target, metric, ridge), error
        elif best.ridge < ridge:
            break  # it grows from here on
    return best


def _with_ridge(covariance: Tensor, ridge: float) -> Tensor:
    result = covariance.clone()
    diagonal = result.diagonal(dim1=-2, dim2=-1)
    # Inputs that are all alike have no variance at all.
    diagonal += ridge * diagonal.mean(-1, keepdim=True).clamp(min=torch.finfo(result.dtype).tiny)
    return result


def _centred(pairs: Pairs, inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs that were held back less the means of the others, which the best bias makes of them."""
    return (
        inputs - pairs.input_mean[:, None].to(inputs),
        outputs - pairs.output_mean[:, None].to(outputs),
    )


def _error(weight: Tensor, apart: tuple[Tensor, Tensor] | None) -> float:
    """The squared error on pairs that were held back, in their precision."""
    if apart is None:
        return math.inf
    inputs, outputs = apart
    return float((outputs - inputs @ weight.mT.to(inputs)).square().double().sum())
