"""The TT-matrix of a Linear (Novikov et al. 2015, "Tensorizing neural networks", section 3).

Output and input features are reshaped into as many factors, m_1 ... m_d and n_1 ... n_d, and the
weight, as a tensor over the pairs (m_k, n_k), becomes a tensor train by TT-SVD (Oseledets 2011).
The rank is (m_1 ... m_d, n_1 ... n_d, r_1 ... r_{d-1}): the reshaping, then the inner ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tdkit.decompositions.base import Decomposition, Rank
from tdkit.decompositions.spectra import fitted, leading_basis
from tdkit.errors import UsageError
from tdkit.layers.spec import LayerSpec
from tdkit.layers.stages import Flatten, Permute, Shape, Stage, Unflatten


class TensorizedLinear(Decomposition):
    """TT-matrices, for Linear layers.

    Args:
        factors: How many factors the features are reshaped into, at least 2.

    Raises:
        UsageError: If there are fewer factors.
    """

    def __init__(self, factors: int = 3) -> None:
        if not isinstance(factors, int) or factors < 2:
            raise UsageError(f"{factors!r} factors", "a TT-matrix has at least 2")
        self.factors = factors

    def supports(self, layer: LayerSpec) -> str | None:
        """Linear layers."""
        return None if layer.kind == "Linear" else "a TT-matrix is that of a Linear"

    def max_rank(self, layer: LayerSpec) -> Shape:
        """The most balanced factors, and the smaller side of each unfolding."""
        rows = balanced(layer.out_channels, self.factors)
        columns = balanced(layer.in_channels, self.factors)
        return (*rows, *columns, *_bounds(rows, columns))

    def ladder(self, layer: LayerSpec) -> Sequence[Rank]:
        """The inner ranks scaled by a common share, the reshaping always the same."""
        largest = self.max_rank(layer)
        shape, inner = largest[: 2 * self.factors], largest[2 * self.factors :]
        top = max(inner)
        scaled = ([max(1, r * step // top) for r in inner] for step in range(1, top + 1))
        return [(*shape, *ranks) for ranks in scaled]

    def check_rank(self, layer: LayerSpec, rank: Rank) -> None:
        """Any factors of the features will do, and inner ranks up to what they allow."""
        if isinstance(rank, tuple) and len(rank) >= 5 and len(rank) % 3 == 2 and min(rank) > 0:
            rows, columns, ranks = split_rank(rank)
            whole = (math.prod(rows), math.prod(columns))
            inner = zip(ranks[1:-1], _bounds(rows, columns), strict=True)
            if whole == (layer.out_channels, layer.in_channels) and all(r <= b for r, b in inner):
                return
        raise UsageError(
            f"rank {rank} does not fit this layer: it must be factors of its {layer.out_channels}"
            f" outputs, as many of its {layer.in_channels} inputs, and the ranks between them",
            f'in a plan the largest is written "rank": {list(self.max_rank(layer))}',
        )

    def stages(self, layer: LayerSpec, rank: Rank) -> Sequence[Stage]:
        """One Linear per core, the last one first; what it put out moves to the front."""
        assert isinstance(rank, tuple)
        return tuple(_chain(layer, *split_rank(rank)))

    def decompose(
        self, layer: LayerSpec, weight: Tensor, rank: Rank, generator: torch.Generator
    ) -> Sequence[Tensor]:
        """TT-SVD from left to right."""
        assert isinstance(rank, tuple)
        rows, columns, ranks = split_rank(rank)
        pairs = [axis for k in range(len(rows)) for axis in (k, len(rows) + k)]
        rest, cores = weight.reshape(*rows, *columns).permute(pairs), list[Tensor]()
        for before, m, n, after in zip(ranks[:-1], rows, columns, ranks[1:], strict=True):
            matrix = rest.reshape(before * m * n, -1)
            basis = fitted(leading_basis(matrix), after) if len(cores) < len(rows) - 1 else matrix
            cores.append(basis.reshape(before, m, n, after))
            rest = basis.mT @ matrix
        return folded(cores)


def folded(cores: Sequence[Tensor]) -> list[Tensor]:
    """The weights of the stages: of each core (before, m, n, after), the last one first."""
    return [
        core.permute(1, 0, 2, 3).flatten(2).flatten(0, 1).contiguous() for core in reversed(cores)
    ]


def _chain(layer: LayerSpec, rows: Shape, columns: Shape, ranks: Shape) -> Iterator[Stage]:
    axis, lead = layer.leading, tuple(range(layer.leading))
    last = len(rows) - 1
    yield Unflatten(-1, (1, math.prod(columns[:-1]), columns[-1]))
    yield layer.pointwise(columns[-1], rows[-1] * ranks[-2])
    for k in reversed(range(last)):
        # (outputs done and inputs to come, n_k, m_{k+1}, r_{k+1}): to the front with m_{k+1}.
        rest = math.prod(rows[k + 2 :]) * math.prod(columns[:k])
        yield Flatten(-3, -1)
        yield Unflatten(-1, (rest, columns[k], rows[k + 1], ranks[k + 1]))
        yield Permute((*lead, axis + 2, axis, axis + 1, axis + 3))
        yield Flatten(-2, -1)
        yield layer.pointwise(columns[k] * ranks[k + 1], rows[k] * ranks[k])
    yield Flatten(-3, -2)
    yield Permute((*lead, axis + 1, axis))
    yield Flatten(-2, -1)


def split_rank(rank: Shape) -> tuple[Shape, Shape, Shape]:
    """The factors of the outputs, those of the inputs, and all ranks with a 1 at either end."""
    order = (len(rank) + 1) // 3
    return rank[:order], rank[order : 2 * order], (1, *rank[2 * order :], 1)


def balanced(number: int, parts: int) -> Shape:
    """Factors of a number, each the divisor of what is left that is nearest to an equal share."""
    result = []
    for left in range(parts, 0, -1):
        divisors = [each for each in range(1, number + 1) if number % each == 0]
        share = math.log(number) / left
        result.append(min(divisors, key=lambda each: abs(math.log(each) - share)))
        number //= result[-1]
    return tuple(result)


def _bounds(rows: Shape, columns: Shape) -> Shape:
    pairs = [m * n for m, n in zip(rows, columns, strict=True)]
    cuts = range(1, len(pairs))
    return tuple(min(math.prod(pairs[:k]), math.prod(pairs[k:])) for k in cuts)
