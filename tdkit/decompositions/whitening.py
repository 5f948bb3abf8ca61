"""Any decomposition in the metric of a layer's inputs: whiten, decompose, fold back, refine.

The mean squared error of a layer's output is tr[(W - W~) S (W - W~)ᵀ], S being the covariance of
what it is given. With S = L Lᵀ that is the plain error of W L: a method decomposes W L, and its
first stage, which mixes the input channels, takes L⁻¹ in. For matrices that is Wang et al. 2024
(SVD-LLM), for convolutions by SVD Zhang et al. 2016. Where the first stage sees the channels alone,
S is averaged over the places of the kernel, and what that misses is left to the refinement.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from tdkit.decompositions.base import Decomposition, Prepared, Rank, compose, prepared
from tdkit.decompositions.fitting import fitted_factors, metric_norm
from tdkit.layers.evidence import COVARIANCE, NO_EVIDENCE, Evidence, as_evidence
from tdkit.layers.impulses import join_groups, split_groups
from tdkit.layers.spec import LayerSpec
from tdkit.layers.stages import Stage

# Of the mean variance, added to all where the covariance alone has no Cholesky factor.
_RIDGES = (0.0, 1e-9, 1e-6, 1e-3)

# The width from which on products are in float32: what is fitted is compared in float64 at the end.
_WIDE = 256

REFINING = 40
"""Steps of L-BFGS on the factors that are taken, unless a layer is very wide."""

# The width beyond which steps are dear, and how many there are then. From so many on, what rounding
# makes worse than it was is not taken; of fewer, for scoring, it does not matter.
_VERY_WIDE, _FEWER = 2048, 12


class Covariance:
    """What a layer is given, and whatever of that methods need, made once for all of them.

    Args:
        values: The covariance of the inputs of each group: (groups, d, d), d being the input
            channels of a group, or those times the places of the kernel, as
            :func:`tdkit.layers.patches.input_rows` has them; float64.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self._whitenings: dict[tuple[int, ...] | None, _Whitening] = {}
        self._whitened: dict[tuple[int, ...] | None, Tensor | None] = {}

    def whitening(self, method: Decomposition, group: LayerSpec) -> _Whitening:
        """How weights are whitened for a method.

        Args:
            method: The decomposition.
            group: One group of the layer.
        """
        axes = whitened_axes(method, group)
        if axes not in self._whitenings:
            self._whitenings[axes] = _Whitening.of(axes, group, self.values)
        return self._whitenings[axes]

    def whitened(self, method: Decomposition, group: LayerSpec) -> Tensor | None:
        """The covariance (groups, d, d) of whitened inputs; None where that is the unit matrix.

        Args:
            method: The decomposition.
            group: One group of the layer.
        """
        axes, whitening = whitened_axes(method, group), self.whitening(method, group)
        if axes not in self._whitened:
            dtype = torch.float32 if self.values.shape[-1] > _WIDE else torch.float64
            whole = whitening.is_whole(self.values)
            self._whitened[axes] = None if whole else whitening.metric(self.values.to(dtype))
        return self._whitened[axes]


class Whitened(Prepared):
    """One layer's weight under one method, in the metric of its inputs.

    Of a method whose first stage does not mix all input channels the factors are those that it
    finds without data, until :meth:`refined` fits them.

    Args:
        method: The decomposition.
        layer: The whole layer.
        weight: Its weight in torch's layout, (out, in/groups, *kernel) but for transposed layers.
        covariance: Of its inputs; a tensor as :class:`Covariance` takes it where no other method
            and no other weight shares it.
        evidence: The seed of the method.
        steps: Of L-BFGS, for the factors of every rank that is read.

    Raises:
        UnsupportedError: As :class:`Prepared`.
    """

    def __init__(
        self,
        method: Decomposition,
        layer: LayerSpec,
        weight: Tensor,
        covariance: Tensor | Covariance,
        evidence: Evidence = NO_EVIDENCE,
        steps: int = 0,
    ) -> None:
        super().__init__(method, layer, weight, evidence)
        if isinstance(covariance, Tensor):
            covariance = Covariance(covariance)
        self._shared: Covariance = covariance
        self.covariance: Tensor = covariance.values
        self._whitening = covariance.whitening(method, self.group)
        whitened = join_groups(self._whitening.forward(self.weight), layer)
        self._inner = prepared(method, layer, whitened, evidence)
        self._steps = steps
        self._missed: tuple[Rank, float] | None = None

    @property
    def norm(self) -> float:
        """The norm of what the layer makes of its inputs, less its mean."""
        return self.scale * (self._exact_norm if self._steps else self._inner.norm)

    @cached_property
    def _exact_norm(self) -> float:
        return metric_norm(self.weight, self.covariance)

    def best_rank(self, parameters: int) -> Rank:
        """The rank of least error in this metric, see :meth:`Prepared.best_rank`."""
        return self._inner.best_rank(parameters)

    def unit_error(self, rank: Rank) -> float:
        """The norm of what the factors miss of the output, for the scaled weight."""
        if not self._steps:
            return self._inner.error(rank)
        self._factors(rank)
        if self._missed is None or self._missed[0] != rank:
            missed = self.weight - self._unit_reconstruction(rank)
            self._missed = rank, metric_norm(missed, self.covariance)
        return self._missed[1]

    def group_factors(self, rank: Rank) -> list[Sequence[Tensor]]:
        """Those of the whitened weight, (out, in, *kernel) each, with the inverse in the first."""
        starts = self._inner._factors(rank)
        return self._fitted(rank, starts) if self._steps else self._folded(rank, starts)

    def refined(self, rank: Rank, steps: int | None = None) -> Whitened:
        """All factors fitted to the exact metric together; it was averaged over the kernel before.

        Args:
            rank: A rank that fits the layer.
            steps: Of L-BFGS, at most; None for :data:`REFINING`, and fewer for very wide layers.
        """
        if steps is None:
            steps = REFINING if self.covariance.shape[-1] <= _VERY_WIDE else _FEWER
        result = copy.copy(self)
        result._steps, result._latest, result._missed = steps, None, None
        return result

    def _fitted(self, rank: Rank, starts: Sequence[Sequence[Tensor]]) -> list[Sequence[Tensor]]:
        stages = self.method.stages(self.group, rank)
        metric = self._shared.whitened(self.method, self.group)
        found = [
            fitted_factors(
                stages,
                start,
                self._inner.weight[group],
                None if metric is None else metric[group],
                self.group,
                self._steps,
            )
            for group, start in enumerate(starts)
        ]
        ends = [found] if self._steps < _FEWER else [starts, found]
        several = zip(*(self._folded(rank, each) for each in ends), strict=True)
        best = [self._better(stages, group, each) for group, each in enumerate(several)]
        self._missed = rank, math.hypot(*(missed for missed, _ in best))
        return [factors for _, factors in best]

    def _better(
        self, stages: Sequence[Stage], group: int, several: Iterable[Sequence[Tensor]]
    ) -> tuple[float, Sequence[Tensor]]:
        """The factors that miss least of one group's output, and how much; the first of equals."""
        part, metric = self.weight[group], self.covariance[group : group + 1]
        missed = ((part - compose(stages, each, self.group), each) for each in several)
        found = [(metric_norm(gap[None], metric), each) for gap, each in missed]
        return min(found, key=lambda pair: pair[0])

    def _folded(self, rank: Rank, groups: Sequence[Sequence[Tensor]]) -> list[Sequence[Tensor]]:
        first = self.method.stages(self.group, rank)[0]
        return [
            self._whitening.back(group, first, factors, self._inner.scale)
            for group, factors in enumerate(groups)
        ]


class DataAware(Decomposition):
    """A method that decomposes in the metric of a layer's inputs, where that is known.

    Args:
        method: The decomposition.
        steps: Of L-BFGS, for the factors of every rank that is read.
    """

    needs = frozenset({COVARIANCE})

    def __init__(self, method: Decomposition, steps: int) -> None:
        self.method = method
        self.steps = steps
        self.random, self.grouped = method.random, method.grouped

    def supports(self, layer: LayerSpec) -> str | None:
        """As the method."""
        return self.method.supports(layer)

    def rank(self, layer: LayerSpec, keep: float) -> Rank:
        """As the method."""
        return self.method.rank(layer, keep)

    def max_rank(self, layer: LayerSpec) -> Rank:
        """As the method."""
        return self.method.max_rank(layer)

    def ladder(self, layer: LayerSpec) -> Sequence[Rank]:
        """As the method."""
        return self.method.ladder(layer)

    def check_rank(self, layer: LayerSpec, rank: Rank) -> None:
        """As the method.

        Raises:
            UsageError: If the rank does not fit.
        """
        self.method.check_rank(layer, rank)

    def stages(self, layer: LayerSpec, rank: Rank) -> Sequence[Stage]:
        """As the method."""
        return self.method.stages(layer, rank)

    def prepare(
        self, layer: LayerSpec, weight: Tensor, evidence: Evidence | int = NO_EVIDENCE
    ) -> Prepared:
        """In the metric of the evidence's curvature; without that, as the method.

        Args:
            layer: The whole layer.
            weight: Its weight in torch's layout, (out, in/groups, *kernel) but for transposed ones.
            evidence: Whose curvature is looked at, and whose seed is the method's.

        Raises:
            UnsupportedError: As :class:`Prepared`.
        """
        known = as_evidence(evidence)
        if known.curvature is None:
            return prepared(self.method, layer, weight, known)
        metric = known.curvature.inputs
        return Whitened(self.method, layer, weight, metric, Evidence(known.seed), self.steps)


def whitened_axes(method: Decomposition, group: LayerSpec) -> tuple[int, ...] | None:
    """The axes of the kernel that a method's first stage sees beside all input channels.

    None where it does not mix all channels, and nothing can be folded into it.

    Args:
        method: The decomposition.
        group: One group of a layer.
    """
    first = method.stages(group, method.max_rank(group))[0]
    if not isinstance(first, LayerSpec) or first.groups > 1:
        return None
    pairs = list(zip(first.kernel_size, group.kernel_size, strict=True))
    if first.in_channels != group.in_channels or any(k not in (1, whole) for k, whole in pairs):
        return None
    return tuple(axis for axis, (k, _) in enumerate(pairs) if k > 1)


@dataclass(frozen=True)
class _Whitening:
    """How weights are whitened: over the input channels and some axes of the kernel.

    Attributes:
        lower: (groups, n, n), the Cholesky factor; None where nothing is whitened.
        axes: The axes of the kernel, counted from 0.
        channels: Input channels of a group.
        kernel: The sizes of all axes of the kernel.
    """

    lower: Tensor | None
    axes: tuple[int, ...]
    channels: int
    kernel: tuple[int, ...]

    @classmethod
    def of(cls, axes: tuple[int, ...] | None, group: LayerSpec, covariance: Tensor) -> _Whitening:
        channels, kernel = group.in_channels, group.kernel_size
        if axes is None:
            return cls(None, (), channels, kernel)
        if covariance.shape[-1] == channels:
            axes, over = (), covariance
        else:
            over = _averaged(covariance, channels, kernel, axes)
        return cls(_lower(over), axes, channels, kernel)

    def forward(self, weight: Tensor) -> Tensor:
        """A weight (groups, out, in, *kernel) times the factor."""
        if self.lower is None:
            return weight
        pairs = zip(weight, self.lower, strict=True)
        changes = ((part, partial(torch.matmul, other=lower)) for part, lower in pairs)
        return torch.stack([self._along(part, change) for part, change in changes])

    def is_whole(self, covariance: Tensor) -> bool:
        """Whether nothing of a covariance (groups, d, d) is left out."""
        return self.lower is not None and self.lower.shape[-1] == covariance.shape[-1]

    def metric(self, covariance: Tensor) -> Tensor:
        """The covariance (groups, d, d) as it is for whitened weights."""
        if self.lower is None:
            return covariance
        return torch.stack(
            [
                self._undone(self._undone(part, lower.to(part)).mT, lower.to(part))
                for part, lower in zip(covariance, self.lower, strict=True)
            ]
        )

    def back(
        self, group: int, stage: Stage, factors: Sequence[Tensor], scale: float
    ) -> Sequence[Tensor]:
        """Factors of a whitened and scaled weight as those of the weight itself.

        Args:
            group: The number of the group.
            stage: The first stage.
            factors: In torch's layout.
            scale: What the weight was divided by.
        """
        first, *others = factors
        if self.lower is None:
            return (first * scale, *others)
        assert isinstance(stage, LayerSpec)
        solve = torch.linalg.solve_triangular
        undo = partial(solve, self.lower[group], upper=False, left=False)
        unfolded = self._along(split_groups(first, stage)[0], undo)
        return (join_groups(unfolded[None], stage) * scale, *others)

    def _undone(self, rows: Tensor, lower: Tensor) -> Tensor:
        """Rows (n, d) times the inverse of the factor's transpose."""
        kernel = self.kernel if rows.shape[-1] > self.channels else (1,) * len(self.kernel)
        solve = torch.linalg.solve_triangular
        undo = partial(solve, lower.mT, upper=True, left=False)
        return self._along(rows.reshape(-1, self.channels, *kernel), undo).reshape(rows.shape)

    def _along(self, value: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Change a value (rows, in, *kernel), as rows over the channels and the whitened axes."""
        others = [2 + a for a in range(len(self.kernel)) if a not in self.axes]
        order = [0, *others, 1, *(2 + a for a in self.axes)]
        moved = value.permute(order)
        size = math.prod(moved.shape[1 + len(others) :])
        changed = change(moved.reshape(-1, size)).reshape(moved.shape)
        back = sorted(range(len(order)), key=order.__getitem__)
        return changed.permute(back)


def _lower(covariance: Tensor) -> Tensor:
    """The Cholesky factor, (groups, n, n)."""
    size = covariance.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=torch.finfo(torch.float64).tiny)
    unit = size[:, None, None] * torch.eye(covariance.shape[-1]).to(covariance)
    for ridge in _RIDGES:
        lower: Tensor
        lower, failed = torch.linalg.cholesky_ex(covariance + ridge * unit)
        if not bool(failed.any()):
            return lower
    return unit.sqrt()


def _averaged(
    covariance: Tensor, channels: int, kernel: Sequence[int], axes: Sequence[int]
) -> Tensor:
    """The covariance (groups, n, n) over channels and some axes, averaged over the others."""
    wide = covariance.reshape(-1, channels, *kernel, channels, *kernel)
    half = 1 + len(kernel)
    for axis in reversed(range(len(kernel))):
        if axis not in axes:
            row, column = 2 + axis, 2 + axis + half
            wide = wide.diagonal(dim1=row, dim2=column).mean(-1)
            half -= 1
    size = math.isqrt(wide[0].numel())
    return wide.reshape(-1, size, size)
