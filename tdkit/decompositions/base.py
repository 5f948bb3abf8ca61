"""The contract of a decomposition, and everything that follows from it.

An author writes the largest rank, which stages (records of ordinary torch layers, see
:class:`~tdkit.layers.stages.Stage`) and their weights, and, where the defaults do not do, which
layers and which rank for a keep. Groups never show up: a grouped layer is decomposed group by group
and its stages are put side by side again. Nor does the bias: the last stage carries it, or stages
that are appended for it. Reconstruction, errors, parameter and MAC counts follow from the stages.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, reduce
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tdkit import defaults
from tdkit.errors import UnsupportedError, UsageError
from tdkit.layers.chains import weighted
from tdkit.layers.evidence import NO_EVIDENCE, Evidence, as_evidence
from tdkit.layers.impulses import join_groups, split_groups
from tdkit.layers.spec import LayerSpec
from tdkit.layers.stages import Flatten, Permute, Stage, Unflatten
from tdkit.layers.weights import is_finite

Rank = int | tuple[int, ...]

RANK_RULES = ("best", "proportional")

# Convolutions go over up to three axes beside the batch and the channels.
_MOST_LEADING = 4


class Decomposition(ABC):
    """A method. Subclass it, and register it with the hook ``tdkit_decompositions``.

    Every ``layer`` below is one group of the real layer: ``groups`` is 1 and there is no bias.

    Attributes:
        random: Whether the result depends on the seed. A study repeats such a method in every run
            and measures the others once.
        grouped: Whether grouped layers can be decomposed group by group. Not where a stage cannot
            be put side by side, as those that move entries cannot.
        needs: What it wants of the :class:`~tdkit.layers.evidence.Evidence` beside the seed:
            one of :data:`~tdkit.layers.evidence.NEEDS`, or nothing. It must do without where there
            is none.
    """

    random: bool = False
    grouped: bool = True
    needs: ClassVar[frozenset[str]] = frozenset()

    def supports(self, layer: LayerSpec) -> str | None:
        """None when the layer can be decomposed, else the reason why not."""
        return None

    def rank(self, layer: LayerSpec, keep: float) -> Rank:
        """The proportional rank: about ``keep`` of the layer's weight parameters remain.

        Unless overridden, the rank on the :meth:`ladder` whose parameters are nearest to that.

        Args:
            layer: One group.
            keep: Fraction of the weight parameters, above 0.
        """
        return _nearest(self, layer, keep * layer.weight_parameters)

    @abstractmethod
    def max_rank(self, layer: LayerSpec) -> Rank:
        """The largest rank of use; at it the layer is reproduced."""

    def ladder(self, layer: LayerSpec) -> Sequence[Rank]:
        """Ranks from the smallest to the largest, none with fewer parameters than the one before.

        Unless overridden, all entries of the largest rank are scaled by a common share, each at
        least 1.
        """
        largest = self.max_rank(layer)
        if isinstance(largest, int):
            return range(1, largest + 1)
        top = max(largest)
        return [tuple(max(1, r * step // top) for r in largest) for step in range(1, top + 1)]

    def check_rank(self, layer: LayerSpec, rank: Rank) -> None:
        """Refuse a rank that does not fit a layer.

        Unless overridden, one of another arity than the largest, or with an entry below 1 or above
        the largest's.

        Raises:
            UsageError: Naming the rank and what is allowed.
        """
        largest = self.max_rank(layer)
        given, allowed = as_tuple(rank), as_tuple(largest)
        fits = isinstance(rank, int) == isinstance(largest, int) and len(given) == len(allowed)
        if not fits or any(not 1 <= r <= top for r, top in zip(given, allowed, strict=True)):
            one = isinstance(largest, int)
            form = "one whole number" if one else f"{len(allowed)} whole numbers"
            ranges = " and ".join(f"from 1 to {top}" for top in allowed)
            example = list(largest) if isinstance(largest, tuple) else largest
            raise UsageError(
                f"rank {rank} does not fit this layer: it must be {form}, {ranges}",
                f'in a plan the largest is written "rank": {example}',
            )

    @abstractmethod
    def stages(self, layer: LayerSpec, rank: Rank) -> Sequence[Stage]:
        """The bias-free stages that, applied in order, stand in for one group."""

    def decompose(
        self, layer: LayerSpec, weight: Tensor, rank: Rank, generator: torch.Generator
    ) -> Sequence[Tensor]:
        """The weights of the stages. Override this, or :meth:`prepare` where ranks share work.

        Args:
            layer: One group.
            weight: Its weight in float64, (out, in, *kernel), also for transposed convolutions,
                scaled to entries of at most 1.
            rank: A rank that :func:`check_rank` accepts.
            generator: The only source of randomness.

        Returns:
            One tensor per stage that has a weight, in the layout of the module it goes into.

        Raises:
            TypeError: If neither this nor :meth:`prepare` is overridden.
        """
        raise TypeError(f"{type(self).__name__} overrides neither decompose nor prepare")

    def prepare(
        self, layer: LayerSpec, weight: Tensor, evidence: Evidence | int = NO_EVIDENCE
    ) -> Prepared:
        """Do what all ranks share. Override it together with a subclass of :class:`Prepared`.

        Call it through :func:`prepared`: overrides that take a ``seed`` in the place of the
        evidence, as they did before there was any, are called with that.

        Args:
            layer: The whole layer, with its groups.
            weight: The layer's weight in torch's layout, (out, in/groups, *kernel) but for
                transposed convolutions.
            evidence: The seed, and what ``needs`` asks for where it was collected; a number is the
                seed.

        Raises:
            UnsupportedError: If the weight has NaN or infinite entries or the layer is not
                supported.
        """
        return Prepared(self, layer, weight, evidence)


class Prepared:
    """One layer's weight under one method: prepare once, read every rank.

    The weight is divided by its largest entry, so that neither 1e-23 nor 1e20 under- or overflows
    in a square. Subclasses override :meth:`unit_error`, :meth:`group_factors` and
    :meth:`best_rank` where they can do better than decomposing at every rank.

    Attributes:
        method: The decomposition.
        layer: The whole layer.
        group: One of its groups, as a layer without groups and bias.
        scale: The largest absolute entry of the weight.
        weight: The scaled weight in float64, (groups, out, in, *kernel).
        evidence: The evidence of :meth:`Decomposition.prepare`.
        seed: The seed in it.
    """

    def __init__(
        self,
        method: Decomposition,
        layer: LayerSpec,
        weight: Tensor,
        evidence: Evidence | int = NO_EVIDENCE,
    ) -> None:
        self.method = method
        self.layer = layer
        self.group = layer.per_group()
        self.evidence = as_evidence(evidence)
        self.seed = self.evidence.seed
        reason = unsupported(method, layer)
        if reason:
            raise UnsupportedError(f"this layer cannot be decomposed so: {reason}")
        if not is_finite(weight):
            raise UnsupportedError("the weight has NaN or infinite entries")
        wide = weight.detach().to(torch.float64)
        self.scale = float(wide.abs().max()) or 1.0
        self.weight = split_groups(wide / self.scale, layer)
        self._latest: tuple[Rank, list[Sequence[Tensor]]] | None = None

    @property
    def norm(self) -> float:
        """The Frobenius norm of the layer's weight."""
        return self.scale * float(torch.linalg.vector_norm(self.weight))

    def rank(self, keep: float, rule: str = defaults.RULE) -> Rank:
        """The rank for a keep, the same for all groups.

        Args:
            keep: Fraction of the weight parameters that may remain, above 0.
            rule: ``proportional`` (the paper's) or ``best`` (least error, never more parameters).
        """
        if rule == "proportional":
            return self.method.rank(self.group, keep)
        return self.best_rank(int(keep * self.group.weight_parameters) - self._carried)

    @cached_property
    def _carried(self) -> int:
        """Weights per group of the stages that only carry the bias, if there are such."""
        largest = self.method.max_rank(self.group) if self.layer.bias else 1
        stages = bias_stages(self.method, self.layer, largest)
        weights = count(stages) - (self.layer.out_channels if stages else 0)
        return -(-weights // self.layer.groups)

    def best_rank(self, parameters: int) -> Rank:
        """The rank of least error with at most this many weight parameters per group.

        The smallest rank where even that has more. Unless overridden, the largest proportional
        rank that fits.
        """
        return _largest_fitting(self.method, self.group, parameters)

    def refined(self, rank: Rank) -> Prepared:
        """The layer prepared for this one rank with more effort, never with a larger error.

        Scoring reads many ranks and must be cheap; the rank that is taken in the end deserves
        more. Unless overridden, there is nothing to gain.
        """
        return self

    def group_factors(self, rank: Rank) -> list[Sequence[Tensor]]:
        """For each group the weights of its stages, (out, in, *kernel), for the scaled weight."""
        generator = torch.Generator().manual_seed(self.seed)
        stages = self.method.stages(self.group, rank)
        groups = []
        for weight in self.weight:
            # A copy, so that a method that works in place spoils nothing but its own.
            factors = self.method.decompose(self.group, weight.clone(), rank, generator)
            groups.append(_checked(factors, stages, type(self.method).__name__))
        return groups

    def unit_error(self, rank: Rank) -> float:
        """The Frobenius norm of the scaled weight minus its reconstruction."""
        return float(torch.linalg.vector_norm(self.weight - self._unit_reconstruction(rank)))

    def error(self, rank: Rank) -> float:
        """The Frobenius norm of the layer's weight minus its reconstruction."""
        check_rank(self.method, self.group, rank)
        return self.scale * self.unit_error(rank)

    def stages(self, rank: Rank) -> tuple[Stage, ...]:
        """The stages of the factorization; one of the last carries the bias."""
        return layer_stages(self.method, self.layer, rank)

    def factors(self, rank: Rank) -> list[Tensor]:
        """The weights of :meth:`stages` that have one, (out, in/groups, *kernel), float64.

        The scale is spread evenly over the weights that the method made; what is appended to carry
        the bias has ones.

        Raises:
            UsageError: If the rank does not fit the layer.
        """
        check_rank(self.method, self.group, rank)
        weights = [torch.cat(column) for column in zip(*self._factors(rank), strict=True)]
        share = self.scale ** (1 / len(weights))
        appended = bias_stages(self.method, self.layer, rank)
        ones = [weights[0].new_ones(s.weight_shape) for s in appended if s.weight_shape is not None]
        return [*(weight * share for weight in weights), *ones]

    def dense(self) -> Tensor:
        """The layer's weight as it was given, (out, in/groups, *kernel) or transposed, float64."""
        return join_groups(self.weight, self.layer) * self.scale

    def reconstruct(self, rank: Rank) -> Tensor:
        """What the factors amount to, (out, in/groups, *kernel) or transposed, float64."""
        return join_groups(self._unit_reconstruction(rank), self.layer) * self.scale

    def _unit_reconstruction(self, rank: Rank) -> Tensor:
        stages = self.method.stages(self.group, rank)
        result = torch.stack([compose(stages, f, self.group) for f in self._factors(rank)])
        if result.shape != self.weight.shape:
            given, wanted = tuple(result.shape[1:]), tuple(self.weight.shape[1:])
            raise UnsupportedError(f"the stages amount to a weight of shape {given}, not {wanted}")
        return result

    def _factors(self, rank: Rank) -> list[Sequence[Tensor]]:
        # An error is often followed by the factors of the same rank; more is not worth its memory.
        if self._latest is None or self._latest[0] != rank:
            self._latest = (rank, self.group_factors(rank))
        return self._latest[1]


def prepared(
    method: Decomposition, layer: LayerSpec, weight: Tensor, evidence: Evidence | int = NO_EVIDENCE
) -> Prepared:
    """Prepare a layer with what the method's override of :meth:`Decomposition.prepare` takes.

    Args:
        method: The decomposition.
        layer: The whole layer.
        weight: Its weight in torch's layout, (out, in/groups, *kernel) but for transposed layers.
        evidence: See :meth:`Decomposition.prepare`. The method sees of it what its ``needs`` name;
            one of old, whose override has a parameter ``seed``, sees no more than that.

    Raises:
        UnsupportedError: As :meth:`Decomposition.prepare`.
    """
    evidence = as_evidence(evidence)
    if _takes_seed(type(method).prepare):
        old: Any = method.prepare
        result: Prepared = old(layer, weight, seed=evidence.seed)
        return result
    # Not more than it asks for, so that it makes the same factors when a plan is applied.
    return method.prepare(layer, weight, evidence.asked(method.needs))


@lru_cache
def _takes_seed(prepare: Callable[..., Prepared]) -> bool:
    return "seed" in inspect.signature(prepare).parameters


def unsupported(method: Decomposition, layer: LayerSpec) -> str | None:
    """Why a method does not serve a whole layer, with its groups and bias; None where it does."""
    if layer.groups > 1 and not method.grouped:
        return "it does not serve grouped layers"
    reason = method.supports(layer.per_group())
    if reason is not None or not layer.bias or layer.leading <= _MOST_LEADING:
        return reason
    if not bias_stages(method, layer, method.max_rank(layer.per_group())):
        return None
    return f"its bias needs at most {_MOST_LEADING} axes before the features"


def layer_stages(method: Decomposition, layer: LayerSpec, rank: Rank) -> tuple[Stage, ...]:
    """The stages that stand in for a whole layer at a rank, its bias included.

    The last one carries the bias if it puts out the layer's channels in one axis; else those of
    :func:`bias_stages` do.

    Raises:
        UsageError: If the rank does not fit the layer.
    """
    group = layer.per_group()
    check_rank(method, group, rank)
    stages = [stage.repeated(layer.groups) for stage in method.stages(group, rank)]
    appended = bias_stages(method, layer, rank)
    if appended:
        return (*stages, *appended)
    return (*stages[:-1], stages[-1].with_bias(layer.bias))


def bias_stages(method: Decomposition, layer: LayerSpec, rank: Rank) -> tuple[Stage, ...]:
    """The stages that a chain needs after its own to carry the bias; none where its last one can.

    A depthwise 1x1 convolution whose weights are ones. The features of a Linear are moved to where
    a convolution looks for channels and back.

    Args:
        method: The decomposition.
        layer: The whole layer.
        rank: A rank that fits it.
    """
    if not layer.bias:
        return ()
    group = layer.per_group()
    if method.stages(group, rank)[-1].carries_bias(group.out_channels):
        return ()
    return _bias_chain(layer)


def _bias_chain(layer: LayerSpec) -> tuple[Stage, ...]:
    out, leading = layer.out_channels, layer.leading
    if layer.kind != "Linear":
        return (_adding(layer.kind[-2], out),)
    if leading <= 1:
        return (Unflatten(-1, (out, 1)), _adding("1", out), Flatten(-2, -1))
    last = tuple(range(1, leading))
    return (
        Permute((0, leading, *last)),
        _adding(str(leading - 1), out),
        Permute((0, *(axis + 1 for axis in last), 1)),
    )


def _adding(axes: str, channels: int) -> LayerSpec:
    """A depthwise 1x1 convolution over some axes, which is there for its bias."""
    example = LayerSpec(f"Conv{axes}d", 1, 1, kernel_size=(1,) * int(axes))
    return example.pointwise(1, 1).repeated(channels).with_bias(True)


def check_rank(method: Decomposition, group: LayerSpec, rank: Rank) -> None:
    """Refuse a rank that the method cannot give to one group of a layer.

    Raises:
        UsageError: Naming the rank and what is allowed.
    """
    method.check_rank(group, rank)


def compose(stages: Sequence[Stage], weights: Sequence[Tensor], group: LayerSpec) -> Tensor:
    """The dense weight of the linear map that stages amount to.

    Of linear layers the product. Otherwise feeds one unit impulse per input channel through the
    stages, stripped of stride, padding and dilation, and reads the kernel off the output. Where
    convolutions share no axis, as in most methods, that is a product as well.

    Args:
        stages: Bias-free stages in order.
        weights: The weights of those that have one, in torch's layout.
        group: The layer they replace, without groups.

    Returns:
        (out, in, *kernel), in the dtype of the weights.
    """
    pairs = weighted(stages, weights)
    if all(stage.kind == "Linear" for stage in stages):
        return reduce(lambda product, weight: weight @ product, weights)

    def response(signal: Tensor) -> Tensor:
        for stage, weight in pairs:
            signal = stage.compose(weight, signal)
        return signal

    channels = group.in_channels
    signal = torch.eye(channels, dtype=weights[0].dtype, device=weights[0].device)
    if group.kind != "Linear":
        kernel = response(signal.reshape(channels, channels, *(1 for _ in group.kernel_size)))
        return kernel.transpose(0, 1)
    if group.leading == 0:  # the stages know of no axis for impulses
        return torch.stack([response(impulse) for impulse in signal], dim=1)
    result = response(signal.reshape(channels, *(1 for _ in range(group.leading - 1)), channels))
    return result.flatten(0, group.leading - 1).T


def factorized_module(
    stages: Sequence[Stage],
    weights: Sequence[Tensor],
    bias: Tensor | None,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> nn.Sequential:
    """The ordinary torch modules of a factorization, their weights filled in.

    Args:
        stages: In order.
        weights: The weights of those that have one, (out, in/groups, *kernel).
        bias: What goes into the stage that has a bias, or None.
        dtype: Of the module.
        device: Of the module.
    """
    module = nn.Sequential(*(stage.build(dtype=dtype, device=device) for stage in stages))
    with torch.no_grad():
        for part, (stage, weight) in zip(module, weighted(stages, weights), strict=True):
            if weight is not None:
                part.get_parameter("weight").copy_(weight)
            if stage.bias and bias is not None:
                part.get_parameter("bias").copy_(bias)
    return module


def count(stages: Sequence[Stage]) -> int:
    """The number of parameters of stages, biases included."""
    return sum(stage.parameters for stage in stages)


def as_tuple(rank: Rank) -> tuple[int, ...]:
    """A rank as a tuple, also where it is a single number."""
    return (rank,) if isinstance(rank, int) else rank


def _checked(factors: Sequence[Tensor], stages: Sequence[Stage], method: str) -> Sequence[Tensor]:
    shapes = [tuple(factor.shape) for factor in factors]
    wanted = [stage.weight_shape for stage in stages if stage.weight_shape is not None]
    if shapes != wanted:
        raise UnsupportedError(f"{method} returned factors of shapes {shapes}, not {wanted}")
    if not all(is_finite(factor) for factor in factors):
        raise UnsupportedError(f"{method} returned NaN or infinite factors")
    return factors


def _nearest(method: Decomposition, layer: LayerSpec, wanted: float) -> Rank:
    """The rank on a method's ladder with the count nearest to some, the smaller of two."""
    ladder = method.ladder(layer)

    def size(step: int) -> int:
        return count(method.stages(layer, ladder[step]))

    low, high = 0, len(ladder) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= wanted else (low, middle)
    return ladder[min((low, high), key=lambda step: abs(size(step) - wanted))]


def _largest_fitting(method: Decomposition, group: LayerSpec, parameters: int) -> Rank:
    # Parameters grow with keep, so the largest proportional rank that fits is a bisection away.
    low, high = 0.0, 2.0
    best = method.rank(group, 1e-9)
    for _ in range(40):
        keep = (low + high) / 2
        rank = method.rank(group, keep)
        if count(method.stages(group, rank)) <= parameters:
            low, best = keep, rank
        else:
            high = keep
    return best
