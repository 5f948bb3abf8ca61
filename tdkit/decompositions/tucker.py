"""Tucker decomposition over the two channel modes, by HOSVD (Eq. 3 of the paper).

The kernel modes are contracted into the core: a 1x1 convolution to ``r_in`` channels, the k x k
core to ``r_out`` channels, a 1x1 convolution to all output channels (Kim et al. 2016).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from tdkit.decompositions.base import Decomposition, Prepared, Rank
from tdkit.decompositions.hosvd import hosvd, project
from tdkit.decompositions.settings import refuse_negative
from tdkit.decompositions.spectra import fitted, leading_basis, smallest_of_least
from tdkit.layers.evidence import NO_EVIDENCE, Evidence
from tdkit.layers.spec import LayerSpec

# HOOI for the one rank that is taken: its error has settled long before.
_REFINING = 20


class Tucker(Decomposition):
    """Channel-mode Tucker; the rank is (out, in).

    Args:
        sweeps: The most sweeps of HOOI (De Lathauwer et al. 2000b) that refine each rank's bases.
            0 is the HOSVD that the paper's text names, whose error at every rank is a table
            look-up.
        tolerance: HOOI stops when a sweep adds less than this share of the kept energy.

    Raises:
        UsageError: If a number is below 0.
    """

    def __init__(self, sweeps: int = 0, tolerance: float = 1e-5) -> None:
        refuse_negative(sweeps=sweeps, tolerance=tolerance)
        self.sweeps = sweeps
        self.tolerance = tolerance

    def supports(self, layer: LayerSpec) -> str | None:
        """Convolutions only: of a matrix, Tucker is an SVD with one stage too many."""
        return "Tucker of a matrix is its SVD: use svd" if layer.kind == "Linear" else None

    def rank(self, layer: LayerSpec, keep: float) -> tuple[int, int]:
        """Tensorly's proportional Tucker rank with the kernel modes fixed (Tables 2 and 3)."""
        from tensorly.tucker_tensor import validate_tucker_rank

        fixed = list(range(2, 2 + len(layer.kernel_size)))
        shape = (layer.out_channels, layer.in_channels, *layer.kernel_size)
        ranks = validate_tucker_rank(shape, rank=float(keep), fixed_modes=fixed)
        return tuple(
            max(1, min(int(r), top)) for r, top in zip(ranks[:2], self.max_rank(layer), strict=True)
        )  # type: ignore[return-value]

    def max_rank(self, layer: LayerSpec) -> tuple[int, int]:
        """Each channel mode's size, or less where the rest of the tensor is smaller."""
        kernel = math.prod(layer.kernel_size)
        return (
            min(layer.out_channels, layer.in_channels * kernel),
            min(layer.in_channels, layer.out_channels * kernel),
        )

    def stages(self, layer: LayerSpec, rank: Rank) -> Sequence[LayerSpec]:
        """Fewer channels in, the core, all channels out."""
        assert isinstance(rank, tuple)
        r_out, r_in = rank
        return (
            layer.pointwise(layer.in_channels, r_in),
            layer.spatial(r_in, r_out),
            layer.pointwise(r_out, layer.out_channels),
        )

    def prepare(
        self, layer: LayerSpec, weight: Tensor, evidence: Evidence | int = NO_EVIDENCE
    ) -> PreparedTucker:
        """One HOSVD of a weight (out, in/groups, *kernel), which serves all ranks."""
        return PreparedTucker(self, layer, weight, evidence)


class PreparedTucker(Prepared):
    """The full HOSVD: its core's energy gives the error of every (r_out, r_in) at once."""

    method: Tucker

    def __init__(
        self,
        method: Decomposition,
        layer: LayerSpec,
        weight: Tensor,
        evidence: Evidence | int = NO_EVIDENCE,
    ) -> None:
        super().__init__(method, layer, weight, evidence)
        self._hosvd = hosvd(self.weight)

    def best_rank(self, parameters: int) -> tuple[int, int]:
        """The (r_out, r_in) of least HOSVD error, from the table of all of them."""
        group = self.group
        squared = self._hosvd.squared[1:, 1:].cpu()
        r_out = torch.arange(1, squared.shape[0] + 1)[:, None]
        r_in = torch.arange(1, squared.shape[1] + 1)[None, :]
        size = (
            group.in_channels * r_in
            + math.prod(group.kernel_size) * r_in * r_out
            + group.out_channels * r_out
        )
        fitting = torch.where(size <= parameters, squared, math.inf)
        best = smallest_of_least(fitting, size, float(self._hosvd.squared[0, 0]))
        return best // squared.shape[1] + 1, best % squared.shape[1] + 1

    def unit_error(self, rank: Rank) -> float:
        """What the core leaves out, as the factors are orthonormal; without HOOI from the table."""
        if not self.method.sweeps:
            return math.sqrt(float(self._hosvd.squared[rank]))
        total = float(self.weight.square().sum())
        missed = total - sum(float(core.square().sum()) for _, core, _ in self._factors(rank))
        # A small difference of large numbers has too few digits.
        return math.sqrt(missed) if missed > 1e-8 * total else super().unit_error(rank)

    def refined(self, rank: Rank) -> PreparedTucker:
        """The bases of this rank improved by HOOI, from those of the HOSVD."""
        if self.method.sweeps:
            return self
        result = copy.copy(self)
        result.method = copy.copy(self.method)
        result.method.sweeps = _REFINING
        result._latest = None
        return result

    def group_factors(self, rank: Rank) -> list[Sequence[Tensor]]:
        """The leading bases, refined by HOOI where asked, the core between: (out, in, *kernel)."""
        assert isinstance(rank, tuple)
        r_out, r_in = rank
        basis_out = self._hosvd.basis_out[..., :r_out]
        if self.method.sweeps:
            basis_out, basis_in, core = self._hooi(basis_out, r_in)
        else:
            basis_in = self._hosvd.basis_in[..., :r_in]
            core = project(self.weight.flatten(3), basis_out, basis_in)
        return [self._fold(*parts) for parts in zip(basis_in, core, basis_out, strict=True)]

    def _hooi(self, basis_out: Tensor, r_in: int) -> tuple[Tensor, Tensor, Tensor]:
        """Each basis in turn the best for the other, which never lowers the kept energy.

        The start is the sequentially truncated HOSVD (Vannieuwenhoven et al. 2012).
        """
        r_out, kept = basis_out.shape[-1], 0.0
        half = _projected(self._out_last, basis_out)
        basis_in = fitted(leading_basis(half), r_in)
        for _ in range(self.method.sweeps):
            basis_out = fitted(leading_basis(_projected(self._in_last, basis_in)), r_out)
            half = _projected(self._out_last, basis_out)
            basis_in = fitted(leading_basis(half), r_in)
            core = basis_in.mT @ half
            previous, kept = kept, float(core.square().sum())
            if kept - previous <= self.method.tolerance * kept:
                break
        return basis_out, basis_in, core.unflatten(2, (-1, r_out)).permute(0, 3, 1, 2)

    @cached_property
    def _in_last(self) -> Tensor:
        """(groups, out, kernel, in): a product takes the last axis without copying the rest."""
        return self.weight.flatten(3).permute(0, 1, 3, 2).contiguous()

    @cached_property
    def _out_last(self) -> Tensor:
        return self.weight.flatten(3).permute(0, 2, 3, 1).contiguous()

    def _fold(self, basis_in: Tensor, core: Tensor, basis_out: Tensor) -> Sequence[Tensor]:
        r_out, r_in = core.shape[:2]
        first, middle, last = self.method.stages(self.group, (r_out, r_in))
        if middle.transposed:
            core = core.transpose(0, 1)
        return (
            basis_in.T.reshape(first.weight_shape),
            core.reshape(middle.weight_shape),
            basis_out.reshape(last.weight_shape),
        )


def _projected(cube: Tensor, basis: Tensor) -> Tensor:
    """(groups, m, kernel, n) with n in a basis (groups, n, rank), as (groups, m, kernel * rank)."""
    half = cube.flatten(1, 2) @ basis
    wide: Tensor = half.unflatten(1, cube.shape[1:3]).flatten(2)
    return wide
