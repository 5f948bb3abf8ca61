"""Tensor Train of the weight as (in, *kernel, out), by TT-SVD (Eq. 4 of the paper).

Stages: a 1x1 convolution to r_1 channels, one convolution per spatial axis, and a 1x1 convolution
from the last rank to all output channels (Garipov et al. 2016; Oseledets 2011).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tdkit.decompositions.base import Decomposition, Prepared, Rank, count
from tdkit.decompositions.hosvd import hosvd
from tdkit.decompositions.spectra import (
    ROUNDING,
    energies,
    fitted,
    leading_basis,
    smallest_of_least,
    tail_norms,
)
from tdkit.layers.evidence import NO_EVIDENCE, Evidence
from tdkit.layers.spec import LayerSpec

# Trains of the same error that are told apart by their size, at most.
_MOST_TIES = 64


class TensorTrain(Decomposition):
    """TT-SVD; the rank holds the inner ranks, those at both ends are 1."""

    def supports(self, layer: LayerSpec) -> str | None:
        """Ordinary convolutions only."""
        if layer.kind == "Linear":
            return "the tensor train of a matrix is its SVD: use svd"
        return (
            "tensor trains of transposed convolutions are not built" if layer.transposed else None
        )

    def rank(self, layer: LayerSpec, keep: float) -> tuple[int, ...]:
        """The realizable rank of tensorly's proportional family nearest to the keep.

        tensorly's fraction is off target once ranks are cut to what TT-SVD can realize (0.5 gives
        0.18), so the fraction, in hundredths, that gives the wanted count is searched for:
        nearest in ratio. That is the rule which Tables 2 and 3 of the paper follow.
        """
        shape = _shape(layer)
        wanted = keep * layer.weight_parameters
        low, high = 1, 2
        while size(shape, _realizable(shape, high)) < wanted and high < 1e6:
            high *= 2
        while high - low > 1:
            middle = (low + high) // 2
            below = size(shape, _realizable(shape, middle)) < wanted
            low, high = (middle, high) if below else (low, middle)
        nearest = (_realizable(shape, low), _realizable(shape, high))
        return min(nearest, key=lambda rank: abs(math.log(size(shape, rank) / wanted)))

    def max_rank(self, layer: LayerSpec) -> tuple[int, ...]:
        """The smaller side of each unfolding."""
        shape = _shape(layer)
        cuts = range(1, len(shape))
        return tuple(min(math.prod(shape[:k]), math.prod(shape[k:])) for k in cuts)

    def stages(self, layer: LayerSpec, rank: Rank) -> Sequence[LayerSpec]:
        """Channels in, the spatial axes one by one, channels out."""
        assert isinstance(rank, tuple)
        return (
            layer.pointwise(layer.in_channels, rank[0]),
            *(
                layer.spatial(before, after, axes=[axis])
                for axis, (before, after) in enumerate(pairwise(rank))
            ),
            layer.pointwise(rank[-1], layer.out_channels),
        )

    def prepare(
        self, layer: LayerSpec, weight: Tensor, evidence: Evidence | int = NO_EVIDENCE
    ) -> PreparedTensorTrain:
        """The first SVD, of a weight (out, in/groups, *kernel), which all ranks share."""
        return PreparedTensorTrain(self, layer, weight, evidence)


@dataclass(frozen=True)
class _Trains:
    """Trains but for the rank at the input's end, (middles, last).

    Attributes:
        middles: Inner ranks, none where there is one axis.
        last: Ranks at the output's end, (last,).
        lost: Squared error of the inner cuts, at most, (middles, 1).
        size: Parameters that do not depend on the first rank.
        growth: Parameters for each of the first rank.
        least: The first rank that leaves the second one realizable.
        most: The largest first rank that is realizable; 0 where none is.
    """

    middles: tuple[tuple[int, ...], ...]
    last: Tensor
    lost: Tensor
    size: Tensor
    growth: Tensor
    least: Tensor
    most: Tensor


class PreparedTensorTrain(Prepared):
    """TT-SVD that cuts at both ends first, where all ranks share the channel bases.

    What is left between them is small, (r_1, *kernel, r_last), and takes the remaining SVDs. The
    squared truncation errors add up as in Oseledets 2011 (Th. 2.2), and so does the bound by the
    tails of the unfoldings (Cor. 2.4), since no cut enlarges the tail of another.
    """

    method: TensorTrain

    def __init__(
        self,
        method: Decomposition,
        layer: LayerSpec,
        weight: Tensor,
        evidence: Evidence | int = NO_EVIDENCE,
    ) -> None:
        super().__init__(method, layer, weight, evidence)
        self._shape = _shape(self.group)
        self._hosvd = hosvd(self.weight)
        self._spectra: dict[tuple[int, int], Tensor] = {}
        self._latest_cut: tuple[tuple[int, int], Tensor, Tensor] | None = None

    def best_rank(self, parameters: int) -> tuple[int, ...]:
        """The rank of least bound on the error that fits, over all end and a grid of middle ranks.

        The bound is exact in the cuts at the ends and, in the middle ones, the tail of the whole
        weight's unfolding. It falls with each rank, so the largest first rank
        that fits is tried; of all trains that only rounding tells apart the smallest is taken.
        """
        trains = self._trains
        first = (parameters - trains.size).div(trains.growth, rounding_mode="floor")
        first = first.clamp(max=trains.most)
        bounds = self._ends[trains.last, first.clamp(min=0)] + trains.lost
        bounds = torch.where(first >= trains.least, bounds, math.inf)
        if not math.isfinite(float(bounds.min())):
            return (1,) * (len(self._shape) - 1)
        energy = float(self._hosvd.squared[0, 0])
        near = (bounds <= bounds.min() + ROUNDING * energy).nonzero(as_tuple=True)
        size = (trains.size + trains.growth * trains.least).expand_as(bounds)[near]
        chosen = size.argsort(stable=True)[:_MOST_TIES]
        places = zip(near[0][chosen].tolist(), near[1][chosen].tolist(), strict=True)
        ranks = [self._smallest_first(cut, column, first, energy) for cut, column in places]
        return min(ranks, key=lambda rank: count(self.method.stages(self.group, rank)))

    def _smallest_first(
        self, cut: int, column: int, first: Tensor, energy: float
    ) -> tuple[int, ...]:
        """A train of the least first rank that is as good as the largest one that fits."""
        trains = self._trains
        last = int(trains.last[column])
        low, high = int(trains.least[cut, column]), int(first[cut, column])
        ends = self._ends[last, low : high + 1]
        low += smallest_of_least(ends, torch.arange(len(ends)), energy)
        return (low, *trains.middles[cut], last)

    def unit_error(self, rank: Rank) -> float:
        """The root of the squared truncation errors, from tables and spectra."""
        assert isinstance(rank, tuple)
        squared = float(self._hosvd.squared[rank[-1], rank[0]])
        if len(rank) == 3:
            tails = self._tails(rank)
            squared += float(tails[min(rank[1], len(tails) - 1)]) ** 2
        elif len(rank) > 3:
            squared += self._train(rank)[1]
        return math.sqrt(squared)

    def group_factors(self, rank: Rank) -> list[Sequence[Tensor]]:
        """The channel bases at both ends, those of the inner SVDs between: (out, in, *kernel)."""
        assert isinstance(rank, tuple)
        shapes = [stage.weight_shape for stage in self.method.stages(self.group, rank)]
        columns = [
            fitted(self._hosvd.basis_in, rank[0]).mT,
            *(part.movedim(-1, 1) for part in self._train(rank)[0]),
            fitted(self._hosvd.basis_out, rank[-1]),
        ]
        return [
            [part[g].reshape(shape) for part, shape in zip(columns, shapes, strict=True)]
            for g in range(self.layer.groups)
        ]

    def _tails(self, rank: tuple[int, ...]) -> Tensor:
        """The tails of the one inner cut; many ranks differ in that cut alone."""
        ends = (rank[0], rank[-1])
        if ends not in self._spectra:
            matrix = self._inner(rank).flatten(1, 2).flatten(2)
            self._spectra[ends] = tail_norms(energies(matrix).sum(0))
        return self._spectra[ends]

    def _inner(self, rank: tuple[int, ...]) -> Tensor:
        """The weight between the channel bases, (groups, r_1, *kernel, r_last)."""
        core = self._hosvd.core.transpose(1, 2).movedim(2, -1)
        return fitted(fitted(core, rank[-1]).movedim(1, -1), rank[0]).movedim(-1, 1)

    def _train(self, rank: tuple[int, ...]) -> tuple[list[Tensor], float]:
        """The inner carriages (groups, before, kernel, after), and the squared error they add."""
        rest, carriages, lost = self._inner(rank), list[Tensor](), 0.0
        for place, (before, after) in enumerate(pairwise(rank[:-1])):
            matrix = rest.reshape(self.layer.groups, before * self._shape[place + 1], -1)
            basis, core = self._first_cut(rank, matrix) if place == 0 else _in_basis(matrix)
            lost += float(core[:, after:].square().sum())
            carriages.append(fitted(basis, after).unflatten(1, (before, -1)))
            rest = fitted(core.mT, after).mT
        return [*carriages, rest.reshape(self.layer.groups, rank[-2], self._shape[-2], -1)], lost

    def _first_cut(self, rank: tuple[int, ...], matrix: Tensor) -> tuple[Tensor, Tensor]:
        """The first inner cut, which ranks share that have the same ends."""
        ends = (rank[0], rank[-1])
        if self._latest_cut is None or self._latest_cut[0] != ends:
            self._latest_cut = (ends, *_in_basis(matrix))
        return self._latest_cut[1:]

    @cached_property
    def _ends(self) -> Tensor:
        """Squared errors of the cuts at the ends, (last + 1, first + 1)."""
        return self._hosvd.squared.cpu()

    @cached_property
    def _trains(self) -> _Trains:
        middles, lost = zip(*self._middles, strict=True)
        last = torch.arange(1, self._ends.shape[0])
        parts = [self._without_first(middle, last) for middle in middles]
        size_of, growth, least, most = map(torch.stack, zip(*parts, strict=True))
        losses = torch.tensor(lost, dtype=torch.float64)[:, None]
        return _Trains(middles, last, losses, size_of, growth, least, most)

    def _without_first(self, middle: tuple[int, ...], last: Tensor) -> tuple[Tensor, ...]:
        """Size, growth, least and most of the trains with these inner ranks, each (last,)."""
        kernel = self._shape[1:-1]
        second = torch.tensor(middle[0]).expand_as(last) if middle else last
        most = (kernel[0] * second).clamp(max=self._ends.shape[1] - 1)
        if middle:
            fits = (last <= kernel[-1] * middle[-1]) & (middle[-1] <= kernel[-1] * last)
            most = torch.where(fits, most, 0)
        return (
            _chain(self._shape[2:], (*middle, last, 1)),
            self._shape[0] + kernel[0] * second,
            second.add(kernel[0] - 1).div(kernel[0], rounding_mode="floor"),
            most,
        )

    @cached_property
    def _middles(self) -> list[tuple[tuple[int, ...], float]]:
        """Inner ranks with one truncation threshold for all cuts, and the squared tails there."""
        tensor = self.weight.movedim(1, -1)
        tails = [
            tail_norms(energies(tensor.flatten(1, k).flatten(2)).sum(0)).cpu()
            for k in range(2, len(self._shape) - 1)
        ]
        if not tails:
            return [((), 0.0)]
        longest = max(tails, key=len)
        thresholds = [float(longest[r]) for r in _steps(len(longest))]
        cuts = {tuple(max(1, int((t > d).sum())) for t in tails) for d in thresholds}
        return [
            (cut, sum(float(t[r]) ** 2 for t, r in zip(tails, cut, strict=True)))
            for cut in sorted(cuts)
        ]


def _in_basis(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis by falling energy, and the matrix in it."""
    basis = leading_basis(matrix)
    return basis, basis.mT @ matrix


def size(shape: Sequence[int], rank: Sequence[int]) -> int:
    """The number of parameters of a train over modes of this shape, with these inner ranks."""
    total: int = _chain(shape, (1, *rank, 1))
    return total


def _chain(shape: Sequence[int], ranks: Sequence[Any]) -> Any:
    """Parameters of carriages over these modes, between these ranks."""
    return sum(a * n * b for a, n, b in zip(ranks, shape, ranks[1:], strict=False))


def _steps(n: int, most: int = 96) -> Tensor:
    """At most ``most`` whole numbers from 1 to n - 1, evenly spread."""
    top = max(1, n - 1)
    steps: Tensor = torch.linspace(1, top, min(most, top)).round().long().unique()
    return steps


def _realizable(shape: tuple[int, ...], hundredths: int) -> tuple[int, ...]:
    from tensorly.tt_tensor import validate_tt_rank

    rank = validate_tt_rank(shape, rank=hundredths / 100, allow_overparametrization=False)
    return tuple(int(r) for r in rank[1:-1])


def _shape(layer: LayerSpec) -> tuple[int, ...]:
    return (layer.in_channels, *layer.kernel_size, layer.out_channels)
