"""Truncated SVD of the weight unfolded as out x (in * kernel).

A k x k convolution to ``rank`` channels, then a 1x1 convolution to all output channels (Zhang et
al. 2016, "Accelerating very deep convolutional networks"); a Linear becomes two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tdkit.decompositions.base import Decomposition, Prepared, Rank
from tdkit.decompositions.spectra import leading_basis, tail_norms
from tdkit.layers.evidence import NO_EVIDENCE, Evidence
from tdkit.layers.spec import LayerSpec


class Svd(Decomposition):
    """Truncated singular value decomposition; for Linear and all convolutions."""

    def rank(self, layer: LayerSpec, keep: float) -> int:
        """The rank whose parameter count is nearest to the keep."""
        return _clip(round(keep * layer.weight_parameters / _per_rank(layer)), layer)

    def max_rank(self, layer: LayerSpec) -> int:
        """The smaller side of the unfolding."""
        return min(layer.out_channels, layer.weight_parameters // layer.out_channels)

    def stages(self, layer: LayerSpec, rank: Rank) -> Sequence[LayerSpec]:
        """The layer itself with fewer outputs, then a mixing of channels."""
        assert isinstance(rank, int)
        return (
            layer.spatial(layer.in_channels, rank),
            layer.pointwise(rank, layer.out_channels),
        )

    def prepare(
        self, layer: LayerSpec, weight: Tensor, evidence: Evidence | int = NO_EVIDENCE
    ) -> PreparedSvd:
        """One eigendecomposition of the smaller Gram matrix serves all ranks.

        Args:
            layer: The layer.
            weight: Its weight, (out, in/groups, *kernel) but for transposed convolutions.
            evidence: Not looked at.
        """
        return PreparedSvd(self, layer, weight, evidence)


class PreparedSvd(Prepared):
    """The bases of the unfolding; the error at rank r is the norm of what lies beyond."""

    method: Svd

    def __init__(
        self,
        method: Decomposition,
        layer: LayerSpec,
        weight: Tensor,
        evidence: Evidence | int = NO_EVIDENCE,
    ) -> None:
        super().__init__(method, layer, weight, evidence)
        unfolded = self.weight.flatten(2)
        self._tall = unfolded.shape[1] > unfolded.shape[2]
        side = unfolded.mT if self._tall else unfolded
        self._basis = leading_basis(side)
        self._core = self._basis.mT @ side
        self._tails = tail_norms(self._core.square().sum((0, 2)))

    def best_rank(self, parameters: int) -> int:
        """The largest rank that fits, since the error falls with every rank."""
        return _clip(parameters // _per_rank(self.group), self.group)

    def unit_error(self, rank: Rank) -> float:
        """The tail of the squared singular values (Eckart and Young 1936)."""
        assert isinstance(rank, int)
        return float(self._tails[rank])

    def group_factors(self, rank: Rank) -> list[Sequence[Tensor]]:
        """Both factors, (out, in, *kernel), carry the root of the singular values."""
        assert isinstance(rank, int)
        basis, core = self._basis[..., :rank], self._core[:, :rank]
        root = torch.linalg.vector_norm(core, dim=2).sqrt()
        safe = torch.where(root > 0, root, 1)
        basis, core = basis * root[:, None], core / safe[..., None]
        left, right = (core.mT, basis.mT) if self._tall else (basis, core)
        return [self._fold(u, v) for u, v in zip(left, right, strict=True)]

    def _fold(self, left: Tensor, right: Tensor) -> Sequence[Tensor]:
        first, second = self.method.stages(self.group, left.shape[1])
        folded = right.reshape(left.shape[1], self.group.in_channels, *self.group.kernel_size)
        return _torch_layout(folded, first), left.reshape(second.weight_shape)


def _per_rank(layer: LayerSpec) -> int:
    return layer.out_channels + layer.weight_parameters // layer.out_channels


def _clip(rank: int, layer: LayerSpec) -> int:
    largest = min(layer.out_channels, layer.weight_parameters // layer.out_channels)
    return max(1, min(rank, largest))


def _torch_layout(weight: Tensor, layer: LayerSpec) -> Tensor:
    return weight.transpose(0, 1) if layer.transposed else weight
