"""Sums of Kronecker products, W ≈ Σ_r A_r ⊗ B_r (Van Loan and Pitsianis 1993).

The output channels split into m1 x m2, the input channels into n1 x n2, and the weight, rearranged
as (m1 n1) x (m2 n2), is cut by an SVD: each rank-one term is one product. The kernel of a
convolution goes with B. The rank is (terms, m1, n1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tdkit.decompositions.base import Decomposition, Prepared, Rank
from tdkit.decompositions.spectra import leading_basis, tail_norms
from tdkit.errors import UsageError
from tdkit.layers.evidence import NO_EVIDENCE, Evidence
from tdkit.layers.spec import LayerSpec
from tdkit.layers.stages import Flatten, Permute, Stage, Unflatten


class Kronecker(Decomposition):
    """Sums of Kronecker products, for Conv2d and Linear layers without groups."""

    grouped = False

    def supports(self, layer: LayerSpec) -> str | None:
        """Conv2d and Linear."""
        known = layer.kind in ("Conv2d", "Linear")
        return None if known else "Kronecker products need a Conv2d or a Linear"

    def max_rank(self, layer: LayerSpec) -> tuple[int, int, int]:
        """All terms of the split with the smallest ones, the most balanced among these."""
        rows, columns = layer.out_channels, layer.in_channels
        splits = [(m, n) for m in _divisors(rows) for n in _divisors(columns)]

        def order(split: tuple[int, int]) -> tuple[int, int]:
            m1, n1 = split
            return sum(_sides(layer, m1, n1)), max(m1, rows // m1, n1, columns // n1)

        m1, n1 = min(splits, key=order)
        return min(_sides(layer, m1, n1)), m1, n1

    def ladder(self, layer: LayerSpec) -> Sequence[Rank]:
        """More and more terms of one split."""
        terms, *split = self.max_rank(layer)
        return [(r, *split) for r in range(1, terms + 1)]

    def check_rank(self, layer: LayerSpec, rank: Rank) -> None:
        """Any divisors of the channels will do, and as many terms as they allow."""
        terms, m1, n1 = rank if isinstance(rank, tuple) and len(rank) == 3 else (0, 0, 0)
        splits = min(m1, n1) > 0 and not (layer.out_channels % m1 or layer.in_channels % n1)
        if not (splits and 1 <= terms <= min(_sides(layer, m1, n1))):
            raise UsageError(
                f"rank {rank} does not fit this layer: it must be the terms, a divisor of its"
                f" {layer.out_channels} outputs and one of its {layer.in_channels} inputs",
                f'in a plan the largest is written "rank": {list(self.max_rank(layer))}',
            )

    def stages(self, layer: LayerSpec, rank: Rank) -> Sequence[Stage]:
        """B on the minor input channels, then A on the major ones and the terms."""
        assert isinstance(rank, tuple)
        terms, m1, n1 = rank
        m2, n2 = layer.out_channels // m1, layer.in_channels // n1
        if layer.kind == "Linear":
            axis, lead = layer.leading, tuple(range(layer.leading))
            return (
                Unflatten(-1, (n1, n2)),
                layer.pointwise(n2, m2 * terms),
                Unflatten(-1, (m2, terms)),
                Permute((*lead, axis + 1, axis + 2, axis)),
                Flatten(-2, -1),
                layer.pointwise(terms * n1, m1),
                Permute((*lead, axis + 1, axis)),
                Flatten(-2, -1),
            )
        kernel = _beside(layer, n2, m2 * terms)
        return (
            Unflatten(1, (n1, n2)),
            Permute((0, 2, 1, 3, 4)),
            kernel,
            Unflatten(1, (m2, terms)),
            Flatten(2, 3),
            Permute((0, 2, 1, 3, 4)),
            kernel.pointwise(terms * n1, m1),
            Flatten(1, 2),
        )

    def prepare(
        self, layer: LayerSpec, weight: Tensor, evidence: Evidence | int = NO_EVIDENCE
    ) -> PreparedKronecker:
        """One SVD per split, which serves all numbers of terms."""
        return PreparedKronecker(self, layer, weight, evidence)


class PreparedKronecker(Prepared):
    """The SVD of the rearranged weight; the error of some terms is the tail of what follows."""

    method: Kronecker
    _latest_svd: tuple[tuple[int, ...], tuple[Tensor, Tensor]] | None = None

    def unit_error(self, rank: Rank) -> float:
        """The tail of the rearranged weight's singular values (Eckart and Young 1936)."""
        assert isinstance(rank, tuple)
        _, core = self._svd(rank[1:])
        return float(tail_norms(core.square().sum(1))[rank[0]])

    def group_factors(self, rank: Rank) -> list[Sequence[Tensor]]:
        """B and A, both with the root of the singular values."""
        assert isinstance(rank, tuple)
        terms, m1, n1 = rank
        basis, core = self._svd((m1, n1))
        basis, core = basis[:, :terms], core[:terms]
        root = torch.linalg.vector_norm(core, dim=1).sqrt()
        major = (basis * root).reshape(m1, n1, terms).transpose(1, 2)
        minor = core / torch.where(root > 0, root, 1)[:, None]
        minor = minor.reshape(terms, self.group.out_channels // m1, -1).transpose(0, 1)
        shapes = [s.weight_shape for s in self.method.stages(self.group, rank) if s.weight_shape]
        return [(minor.reshape(shapes[0]), major.reshape(shapes[1]))]

    def _svd(self, split: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """An orthonormal basis (m1 n1, k), and the rearranged weight in it, (k, m2 n2 kernel)."""
        if self._latest_svd is None or self._latest_svd[0] != split:
            matrix = rearranged(self.weight[0], *split)
            basis = leading_basis(matrix)
            self._latest_svd = split, (basis, basis.mT @ matrix)
        return self._latest_svd[1]


def rearranged(weight: Tensor, m1: int, n1: int) -> Tensor:
    """Van Loan and Pitsianis's matrix, whose rank-one terms are Kronecker products.

    Args:
        weight: (m1 m2, n1 n2, *kernel).
        m1: Major output channels.
        n1: Major input channels.

    Returns:
        (m1 n1, m2 n2 kernel).
    """
    blocks = weight.unflatten(0, (m1, -1)).unflatten(2, (n1, -1))
    matrix: Tensor = blocks.transpose(1, 2).flatten(2).flatten(0, 1)
    return matrix


def _sides(layer: LayerSpec, m1: int, n1: int) -> tuple[int, int]:
    """The sizes of A and of B, kernel included: what a term costs, and what bounds their number."""
    return m1 * n1, layer.weight_parameters // (m1 * n1)


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def _beside(layer: LayerSpec, in_channels: int, out_channels: int) -> LayerSpec:
    """A Conv2d as a Conv3d that goes over one more axis, moving nothing along it."""
    return replace(
        layer,
        kind="Conv3d",
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=(1, *layer.kernel_size),
        stride=(1, *layer.stride),
        padding=layer.padding if isinstance(layer.padding, str) else (0, *layer.padding),
        dilation=(1, *layer.dilation),
        output_padding=(0, *layer.output_padding),
    )
