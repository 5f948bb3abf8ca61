"""The higher-order SVD over the two channel modes, which Tucker and Tensor Train share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tdkit.decompositions.spectra import leading_basis


@dataclass(frozen=True)
class Hosvd:
    """Orthonormal channel bases by falling energy, and the weight expressed in them.

    Attributes:
        basis_out: (groups, out, p).
        basis_in: (groups, in, q).
        core: (groups, p, q, *kernel).
        squared: (p + 1, q + 1): entry (i, j) is the squared error of keeping the leading i and j
            directions, ``||W||^2 - ||core[:i, :j]||^2``, over all groups.
    """

    basis_out: Tensor
    basis_in: Tensor
    core: Tensor
    squared: Tensor


def hosvd(weight: Tensor) -> Hosvd:
    """Decompose over the channel modes only (De Lathauwer et al. 2000).

    Args:
        weight: (groups, out, in, *kernel), float64.
    """
    cube = weight.flatten(3) if weight.ndim > 3 else weight.unsqueeze(-1)
    basis_out = leading_basis(cube.flatten(2))
    basis_in = leading_basis(cube.transpose(1, 2).flatten(2))
    core = project(cube, basis_out, basis_in)
    squared = _outside_corner(core.square().sum((0, 3)))
    return Hosvd(basis_out, basis_in, core.unflatten(3, weight.shape[3:] or (1,)), squared)


def project(cube: Tensor, basis_out: Tensor, basis_in: Tensor) -> Tensor:
    """A weight (groups, out, in, k) in channel bases (groups, channels, rank)."""
    half = torch.einsum("gtck,gtr->grck", cube, basis_out)
    return torch.einsum("grck,gcs->grsk", half, basis_in)


def _outside_corner(energy: Tensor) -> Tensor:
    """Entry (i, j): the energy outside the leading i x j corner, added up without cancelling.

    Args:
        energy: (m, n) squared core entries.

    Returns:
        (m + 1, n + 1).
    """
    m, n = energy.shape
    beside = torch.zeros(m, n + 1, dtype=energy.dtype, device=energy.device)
    beside[:, :n] = energy.flip(1).cumsum(1).flip(1)
    result = torch.zeros(m + 1, n + 1, dtype=energy.dtype, device=energy.device)
    result[1:] = beside.cumsum(0)
    result[:m] += beside[:, 0].flip(0).cumsum(0).flip(0)[:, None]
    return result
