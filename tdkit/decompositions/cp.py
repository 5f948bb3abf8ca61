"""CP decomposition by alternating least squares (Eq. 2 of the paper).

Stages: a 1x1 convolution to ``rank`` channels, a depthwise convolution per spatial axis, a 1x1
convolution to all output channels (Lebedev et al. 2015).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tdkit.decompositions.base import Decomposition, Rank
from tdkit.specs import LayerSpec


class Cp(Decomposition):
    """CP by ALS from a random start.

    Args:
        sweeps: The most sweeps over all modes.
        tolerance: Stop when a sweep lowers the relative error by less than this.
        ridge: Weight of the l2 penalty on the factors in every least-squares step, relative to
            the mean diagonal of its normal matrix. It keeps near-collinear columns from growing
            without bound (de Silva and Lim 2008).
    """

    random = True

    def __init__(self, sweeps: int = 50, tolerance: float = 1e-4, ridge: float = 1e-10) -> None:
        self.sweeps = sweeps
        self.tolerance = tolerance
        self.ridge = ridge

    def supports(self, layer: LayerSpec) -> str | None:
        """Ordinary convolutions only."""
        if layer.kind == "Linear":
            return "the CP decomposition of a matrix is its SVD: use svd"
        return "CP of transposed convolutions is not built" if layer.transposed else None

    def rank(self, layer: LayerSpec, keep: float) -> int:
        """Tensorly's CP rank for a fraction (Tables 2 and 3 of the paper)."""
        from tensorly.cp_tensor import validate_cp_rank

        shape = (layer.out_channels, layer.in_channels, *layer.kernel_size)
        return max(1, min(int(validate_cp_rank(shape, rank=float(keep))), self.max_rank(layer)))

    def max_rank(self, layer: LayerSpec) -> int:
        """The product of all modes but the largest, a bound on the rank of any tensor."""
        modes = (layer.out_channels, layer.in_channels, *layer.kernel_size)
        return math.prod(modes) // max(modes)

    def stages(self, layer: LayerSpec, rank: Rank) -> Sequence[LayerSpec]:
        """Channels in, one depthwise convolution per axis, channels out."""
        assert isinstance(rank, int)
        return (
            layer.pointwise(layer.in_channels, rank),
            *(
                layer.spatial(rank, rank, axes=[axis], groups=rank)
                for axis in range(len(layer.kernel_size))
            ),
            layer.pointwise(rank, layer.out_channels),
        )

    def decompose(
        self, layer: LayerSpec, weight: Tensor, rank: Rank, generator: torch.Generator
    ) -> Sequence[Tensor]:
        """ALS, then each factor reshaped into its stage, column norms spread evenly."""
        assert isinstance(rank, int)
        if rank == self.max_rank(layer):
            factors = _fibres(weight)
        elif weight[0, 0].numel() == 1:
            factors = _singular(weight, rank)
        else:
            factors = _als(weight, rank, self, generator)
        out, *others = _balanced(factors)
        stages = self.stages(layer, rank)
        first = [
            factor.T.reshape(s.weight_shape) for factor, s in zip(others, stages[:-1], strict=True)
        ]
        return [*first, out.reshape(stages[-1].weight_shape)]


def _fibres(weight: Tensor) -> list[Tensor]:
    """The exact factors at full rank: one column per fibre along the largest mode."""
    largest = max(range(weight.ndim), key=lambda mode: weight.shape[mode])
    others = [n for mode, n in enumerate(weight.shape) if mode != largest]
    place = torch.cartesian_prod(*(torch.arange(n, device=weight.device) for n in others))
    factors = [
        torch.nn.functional.one_hot(column, n).T.to(weight)
        for column, n in zip(place.T, others, strict=True)
    ]
    factors.insert(largest, weight.movedim(largest, 0).flatten(1))
    return factors


def _singular(weight: Tensor, rank: int) -> list[Tensor]:
    """The best factors of a 1x1 convolution, a matrix: what ALS takes many sweeps to come close to.

    Eckart and Young 1936.
    """
    left, values, right = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    ones = [torch.ones(1, rank).to(weight) for _ in weight.shape[2:]]
    return [left[:, :rank] * values[:rank], right[:rank].T, *ones]


def _als(weight: Tensor, rank: int, options: Cp, generator: torch.Generator) -> list[Tensor]:
    """The factors (mode size, rank) of every mode, from a uniform [0, 1) start.

    Only the first mode meets the whole tensor. Its product with the new first factor, (all other
    modes, rank), is what the other modes contract, so a sweep costs two large products.
    """
    factors = [
        torch.rand(n, rank, dtype=torch.float64, generator=generator).to(weight)
        for n in weight.shape
    ]
    unfolded = weight.flatten(1)
    total = float(unfolded.square().sum())
    if total == 0:
        return [torch.zeros_like(factor) for factor in factors]
    grams = [factor.T @ factor for factor in factors]
    previous = math.inf
    for _ in range(options.sweeps):
        projected = unfolded.T
        for mode in range(weight.ndim):
            right = (
                unfolded @ _khatri_rao(factors[1:])
                if mode == 0
                else _contract(projected, factors, mode)
            )
            normal = _hadamard(grams, mode)
            factors[mode] = _normalised(_solve(normal, right, options.ridge), mode, weight.ndim)
            grams[mode] = factors[mode].T @ factors[mode]
            if mode == 0:
                projected = (unfolded.T @ factors[0]).unflatten(0, weight.shape[1:])
        error = _relative_error(total, right, factors[-1], _hadamard(grams, None))
        if previous - error < options.tolerance:
            break
        previous = error
    return factors


def _solve(normal: Tensor, right: Tensor, ridge: float) -> Tensor:
    """``right`` times the inverse of the normal matrix, by Cholesky with a growing ridge."""
    size = max(float(normal.diagonal().mean()), torch.finfo(normal.dtype).tiny)
    identity = torch.eye(len(normal), dtype=normal.dtype, device=normal.device)
    for _ in range(8):
        lower, failed = torch.linalg.cholesky_ex(normal + ridge * size * identity)
        if not bool(failed):
            return torch.cholesky_solve(right.T, lower).T
        ridge *= 100
    inverse: Tensor = torch.linalg.pinv(normal, hermitian=True)
    return right @ inverse


def _normalised(factor: Tensor, mode: int, modes: int) -> Tensor:
    # All but the last factor of a sweep get unit columns, so the scale sits in one place and no
    # normal matrix over- or underflows.
    if mode == modes - 1:
        return factor
    norms = torch.linalg.vector_norm(factor, dim=0)
    return factor / torch.where(norms > 0, norms, 1)


def _balanced(factors: Sequence[Tensor]) -> list[Tensor]:
    norms = torch.stack([torch.linalg.vector_norm(factor, dim=0) for factor in factors])
    share = norms.prod(0) ** (1 / len(factors))
    return [f / torch.where(n > 0, n, 1) * share for f, n in zip(factors, norms, strict=True)]


def _khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    result = factors[0]
    for factor in factors[1:]:
        result = (result[:, None] * factor[None]).flatten(0, 1)
    return result


def _contract(projected: Tensor, factors: Sequence[Tensor], mode: int) -> Tensor:
    """Sum ``projected`` (*other modes, rank) against every factor but the first and ``mode``."""
    for axis in reversed(range(1, len(factors))):
        if axis != mode:
            shape = [1] * projected.ndim
            shape[axis - 1], shape[-1] = factors[axis].shape
            projected = (projected * factors[axis].reshape(shape)).sum(axis - 1, keepdim=True)
    return projected.reshape(factors[mode].shape)


def _hadamard(grams: Sequence[Tensor], without: int | None) -> Tensor:
    chosen = [gram for mode, gram in enumerate(grams) if mode != without]
    result = chosen[0].clone()
    for gram in chosen[1:]:
        result *= gram
    return result


def _relative_error(total: float, right: Tensor, last: Tensor, normal: Tensor) -> float:
    """From Gram matrices, without rebuilding the tensor."""
    squared = total - 2 * float((right * last).sum()) + float(normal.sum())
    return math.sqrt(max(squared, 0.0) / total)
