"""Bases and tails that the orthogonal decompositions share."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 1e-14
"""Of an energy: what squared errors that are the same may differ by, processor to processor."""


def leading_basis(matrix: Tensor) -> Tensor:
    """An orthonormal basis of the column space, by falling energy.

    From the Gram matrix of the rows, of a tall matrix after a QR. In float64 its eigenvectors are
    orthonormal to rounding; directions below 1e-8 of the largest singular value come in no
    particular order, which moves an error by no more than that.

    Args:
        matrix: (..., m, n), float64.

    Returns:
        (..., m, min(m, n)).
    """
    rows, columns = matrix.shape[-2:]
    if rows > columns:
        tall, square = torch.linalg.qr(matrix)
        basis: Tensor = tall @ leading_basis(square)
        return basis
    vectors: Tensor = torch.linalg.eigh(matrix @ matrix.mT).eigenvectors
    return vectors.flip(-1)


def smallest_of_least(errors: Tensor, sizes: Tensor, energy: float) -> int:
    """The place of the least squared error; of those that only rounding tells apart the smallest.

    Args:
        errors: Squared errors of any shape, infinite where something does not fit.
        sizes: What each takes, of the same shape.
        energy: The squared norm of what is approximated, in whose rounding errors drown.
    """
    least = errors <= errors.min() + ROUNDING * energy
    return int(torch.where(least, sizes, torch.iinfo(torch.int64).max).argmin())


def energies(matrix: Tensor) -> Tensor:
    """The squared singular values, largest first.

    Args:
        matrix: (..., m, n), float64.

    Returns:
        (..., min(m, n)).
    """
    rows, columns = matrix.shape[-2:]
    side = matrix.mT if rows > columns else matrix
    rising: Tensor = torch.linalg.eigvalsh(side @ side.mT)
    return rising.flip(-1).clamp(min=0)


def tail_norms(energy: Tensor) -> Tensor:
    """The root of the energy that truncation at each rank leaves out.

    Args:
        energy: (n,) squared norms, one per direction.

    Returns:
        (n + 1,): entry r is the norm of what lies beyond the first r directions. Summed from the
        small end, so that small tails keep their digits.
    """
    tails = torch.zeros(len(energy) + 1, dtype=energy.dtype, device=energy.device)
    tails[:-1] = energy.flip(0).cumsum(0).flip(0)
    return tails.sqrt()


def fitted(basis: Tensor, rank: int) -> Tensor:
    """The first ``rank`` entries of the last axis of (..., n); zeros where there are fewer."""
    missing = rank - basis.shape[-1]
    return torch.nn.functional.pad(basis, (0, missing)) if missing > 0 else basis[..., :rank]
