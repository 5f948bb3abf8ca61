"""CP decomposition by alternating least squares (Eq. 2 of the paper).

Stages: a 1x1 convolution to ``rank`` channels, a depthwise convolution per spatial axis, a 1x1
convolution to all output channels (Lebedev et al. 2015).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from tdkit.decompositions.base import Decomposition, Prepared, Rank
from tdkit.decompositions.settings import refuse_negative
from tdkit.decompositions.spectra import leading_basis
from tdkit.errors import UsageError
from tdkit.layers.evidence import NO_EVIDENCE, Evidence
from tdkit.layers.spec import LayerSpec

STARTS = ("orthogonal", "uniform")

# Above this relative error, what float32 loses in a product is nothing beside it.
_COARSE = 0.1
# The least gain of a sweep that can be told from the rounding of such products.
_TOLD = 1e-6

# Sweeps and tolerance for the one rank that is taken; scoring many ranks makes do with less.
_REFINING = 100, 1e-4


class Cp(Decomposition):
    """CP by ALS.

    Args:
        sweeps: The most sweeps over all modes.
        tolerance: Stop when a sweep lowers the relative error by less than this.
        ridge: Weight of the l2 penalty on the factors in every least-squares step, relative to
            the mean diagonal of its normal matrix. It keeps near-collinear columns from growing
            without bound (de Silva and Lim 2008).
        start: ``orthogonal``, the largest of the orthogonal rank-one terms that SVDs along the
            modes leave (Batselier et al. 2015), far ahead of chance in the first sweeps; or
            ``uniform``, entries drawn from [0, 1), as in the paper.

    Raises:
        UsageError: If the start is unknown, or a number is below 0.
    """

    def __init__(
        self,
        sweeps: int = 5,
        tolerance: float = 1e-3,
        ridge: float = 1e-10,
        start: str = "orthogonal",
    ) -> None:
        if start not in STARTS:
            raise UsageError(f"unknown start {start!r}", f"it is {' or '.join(STARTS)}")
        refuse_negative(sweeps=sweeps, tolerance=tolerance, ridge=ridge)
        self.sweeps = sweeps
        self.tolerance = tolerance
        self.ridge = ridge
        self.start = start
        self.random = start == "uniform"

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

    def prepare(
        self, layer: LayerSpec, weight: Tensor, evidence: Evidence | int = NO_EVIDENCE
    ) -> PreparedCp:
        """What the starts share for a weight (out, in/groups, *kernel), if anything."""
        return PreparedCp(self, layer, weight, evidence)


class PreparedCp(Prepared):
    """ALS at each rank; orthogonal starts are taken from terms that all ranks share."""

    method: Cp

    def refined(self, rank: Rank) -> PreparedCp:
        """More sweeps from the same start; as it is where they gain nothing.

        Close to an exact rank the first sweeps, in float32, may end by chance where more do not.
        """
        sweeps, tolerance = _REFINING
        result = copy.copy(self)
        result.method = copy.copy(self.method)
        result.method.sweeps = max(sweeps, self.method.sweeps)
        result.method.tolerance = min(tolerance, self.method.tolerance)
        result._latest = None
        return result if result.error(rank) < self.error(rank) else self

    def group_factors(self, rank: Rank) -> list[Sequence[Tensor]]:
        """ALS, then each factor as its stage has it, (out, in, *kernel), norms spread evenly."""
        assert isinstance(rank, int)
        generator = torch.Generator().manual_seed(self.seed)
        return [
            self._staged(self._columns(g, rank, generator), rank) for g in range(len(self.weight))
        ]

    def _columns(self, group: int, rank: int, generator: torch.Generator) -> list[Tensor]:
        weight = self.weight[group]
        if rank == self.method.max_rank(self.group):
            return _fibres(weight)
        if weight[0, 0].numel() == 1:
            return _singular(weight, rank)
        if self.method.start == "orthogonal":
            return _als(weight, [term[:, :rank] for term in self._terms[group]], self.method)
        start = [
            torch.rand(n, rank, dtype=torch.float64, generator=generator).to(weight)
            for n in weight.shape
        ]
        return _als(weight, start, self.method)

    @cached_property
    def _terms(self) -> list[list[Tensor]]:
        return [_orthogonal_terms(weight) for weight in self.weight]

    def _staged(self, columns: Sequence[Tensor], rank: int) -> Sequence[Tensor]:
        out, *others = _balanced(columns)
        shapes = [stage.weight_shape for stage in self.method.stages(self.group, rank)]
        first = [f.T.reshape(shape) for f, shape in zip(others, shapes[:-1], strict=True)]
        return [*first, out.reshape(shapes[-1])]


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


def _orthogonal_terms(weight: Tensor) -> list[Tensor]:
    """Factors of every mode whose columns are orthogonal rank-one terms, the largest first.

    One SVD after the other takes a mode off, the kernel's first (TTr1SVD, Batselier et al. 2015).
    What the first r terms miss is the others' share, exactly. Only the first factor carries sizes.

    Args:
        weight: (out, in, *kernel), float64.
    """
    rest, axes = weight.movedim((0, 1), (-2, -1))[None], list[Tensor]()
    while rest.ndim > 3:
        matrix = rest.flatten(2)
        basis = leading_basis(matrix)
        axes = [axis.repeat_interleave(basis.shape[-1], 0) for axis in axes]
        axes.append(basis.mT.flatten(0, 1))
        rest = (basis.mT @ matrix).flatten(0, 1).unflatten(1, rest.shape[2:])
    left = leading_basis(rest)
    right = left.mT @ rest
    sizes = torch.linalg.vector_norm(right, dim=2)
    size, place = sizes.flatten().sort(descending=True, stable=True)
    term, column = place // sizes.shape[1], place % sizes.shape[1]
    unit = right[term, column] / size.clamp(min=torch.finfo(weight.dtype).tiny)[:, None]
    return [left[term, :, column].T * size, unit.T, *(axis[term].T for axis in axes)]


def _als(weight: Tensor, start: Sequence[Tensor], options: Cp) -> list[Tensor]:
    """The factors (mode size, rank) of every mode, from those at the start.

    The products with the whole tensor are in float32 while the error is large, since a factor that
    is off by a little costs the square of that; the solves are in float64 throughout.
    """
    factors = list(start)
    unfolded = weight.flatten(2).mT.flatten(1)
    total = float(unfolded.square().sum())
    if total == 0:
        return [torch.zeros_like(factor) for factor in factors]
    grams = [factor.T @ factor for factor in factors]
    matrix, places = unfolded.float(), math.prod(weight.shape[2:])
    buffer = matrix.new_empty(places, *factors[1].shape)
    previous = math.inf
    for _ in range(options.sweeps):
        right = _sweep(matrix, factors, grams, buffer, options.ridge)
        error = _relative_error(total, right, factors[-1], _hadamard(grams, None))
        gain, previous = previous - error, error
        # A gain that float32 cannot tell says nothing on whether to stop.
        told = matrix is unfolded or gain > _TOLD
        if gain < options.tolerance and (told or options.tolerance > _TOLD):
            break
        if matrix is not unfolded and (error < _COARSE or not told):
            matrix, buffer = unfolded, unfolded.new_empty(buffer.shape)
    return factors


def _sweep(
    matrix: Tensor, factors: list[Tensor], grams: list[Tensor], buffer: Tensor, ridge: float
) -> Tensor:
    """Update every mode in turn.

    Only the first mode meets the whole tensor. What the new first factor leaves of it, (kernel
    places, in, rank), is all that the second needs, and what the second leaves of that, (*kernel,
    rank), all that the others need: a sweep costs two large products, both in one buffer.

    Args:
        matrix: (out, kernel places * in), in the precision of the large products.
        factors: Replaced one by one.
        grams: Of the factors, likewise.
        buffer: (kernel places, in, rank), of the matrix's dtype.
        ridge: See :class:`Cp`.

    Returns:
        The right-hand side of the last mode's least squares, (mode size, rank).
    """
    spatial = _khatri_rao(factors[2:]).to(matrix)
    torch.mul(spatial[:, None], factors[1].to(matrix), out=buffer)
    _update(factors, grams, 0, matrix @ buffer.flatten(0, 1), ridge)
    torch.mm(matrix.T, factors[0].to(matrix), out=buffer.flatten(0, 1))
    right = torch.zeros_like(buffer[0])
    for part, weights in zip(buffer, spatial, strict=True):
        right.addcmul_(part, weights)
    _update(factors, grams, 1, right, ridge)
    second = factors[1].to(matrix)
    rest = torch.stack([(part * second).sum(0) for part in buffer]).double()
    rest = rest.unflatten(0, [len(factor) for factor in factors[2:]])
    for mode in range(2, len(factors)):
        right = _contract(rest, factors[2:], mode - 2)
        _update(factors, grams, mode, right, ridge)
    return right


def _update(
    factors: list[Tensor], grams: list[Tensor], mode: int, right: Tensor, ridge: float
) -> None:
    """The least-squares factor of one mode in place of its last one, and its Gram matrix."""
    solved = _solve(_hadamard(grams, mode), right.double(), ridge)
    factors[mode] = _normalised(solved, mode, len(factors))
    grams[mode] = factors[mode].T @ factors[mode]


def _solve(normal: Tensor, right: Tensor, ridge: float) -> Tensor:
    """``right`` times the inverse of the normal matrix, by Cholesky with a growing ridge."""
    diagonal = normal.diagonal().clone()
    size = max(float(diagonal.mean()), torch.finfo(normal.dtype).tiny)
    for _ in range(8):
        normal.diagonal().copy_(diagonal + ridge * size)
        lower, failed = torch.linalg.cholesky_ex(normal)
        if not bool(failed):
            return torch.cholesky_solve(right.T, lower).T
        ridge *= 100
    normal.diagonal().copy_(diagonal)
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


def _contract(rest: Tensor, factors: Sequence[Tensor], mode: int) -> Tensor:
    """Sum ``rest`` (*modes, rank) against the factor of every mode but one."""
    for axis in reversed(range(len(factors))):
        if axis != mode:
            shape = [1] * rest.ndim
            shape[axis], shape[-1] = factors[axis].shape
            rest = (rest * factors[axis].reshape(shape)).sum(axis, keepdim=True)
    return rest.reshape(factors[mode].shape)


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
