"""The contract of a decomposition, and everything that follows from it.

An author writes which layers, which rank for a keep, which stages (ordinary torch layers,
described by :class:`~tdkit.layers.spec.LayerSpec`) and their weights. Groups never show up: a
grouped layer is decomposed group by group and its stages are put side by side again.
Reconstruction, errors, parameter and MAC counts follow from the stages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn import functional

from tdkit.errors import UnsupportedError, UsageError
from tdkit.layers.evidence import Evidence
from tdkit.layers.spec import LayerSpec

Rank = int | tuple[int, ...]

RANK_RULES = ("best", "proportional")


class Decomposition(ABC):
    """A method. Subclass it, and register it with the hook ``tdkit_decompositions``.

    Every ``layer`` below is one group of the real layer: ``groups`` is 1 and there is no bias.

    Attributes:
        random: Whether the result depends on the seed. A study repeats such a method in every run
            and measures the others once.
    """

    random: bool = False
    needs: frozenset[str] = frozenset()

    def supports(self, layer: LayerSpec) -> str | None:
        """None when the layer can be decomposed, else the reason why not."""
        return None

    @abstractmethod
    def rank(self, layer: LayerSpec, keep: float) -> Rank:
        """The proportional rank: about ``keep`` of the layer's weight parameters remain.

        Args:
            layer: One group.
            keep: Fraction of the weight parameters, above 0.
        """

    @abstractmethod
    def max_rank(self, layer: LayerSpec) -> Rank:
        """The largest rank of use; at it, or at :attr:`full_rank`, the layer is reproduced."""

    @abstractmethod
    def stages(self, layer: LayerSpec, rank: Rank) -> Sequence[LayerSpec]:
        """The bias-free layers that, applied in order, stand in for one group."""

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
            One tensor per stage, in the layout of the torch layer it goes into.
        """
        raise TypeError(f"{type(self).__name__} overrides neither decompose nor prepare")

    def prepare(self, layer: LayerSpec, weight: Tensor, seed: int = 0) -> Prepared:
        """Do what all ranks share. Override it together with a subclass of :class:`Prepared`.

        Args:
            layer: The whole layer, with its groups.
            weight: The layer's weight in torch's layout.
            seed: Seeds the randomness of methods that have any.

        Raises:
            UnsupportedError: If the weight has NaN or infinite entries or the layer is not
                supported.
        """
        return Prepared(self, layer, weight, seed)


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
        seed: The seed of :meth:`Decomposition.prepare`.
    """

    def __init__(
        self,
        method: Decomposition,
        layer: LayerSpec,
        weight: Tensor,
        seed: int | Evidence = 0,
    ) -> None:
        self.method = method
        self.layer = layer
        self.group = layer.per_group()
        self.evidence = seed if isinstance(seed, Evidence) else Evidence(seed)
        self.seed = self.evidence.seed
        reason = method.supports(self.group)
        if reason:
            raise UnsupportedError(f"this layer cannot be decomposed so: {reason}")
        if not bool(torch.isfinite(weight).all()):
            raise UnsupportedError("the weight has NaN or infinite entries")
        wide = weight.detach().to(torch.float64)
        self.scale = float(wide.abs().max()) or 1.0
        self.weight = split_groups(wide / self.scale, layer)
        self._latest: tuple[Rank, list[Sequence[Tensor]]] | None = None

    @property
    def norm(self) -> float:
        """The Frobenius norm of the layer's weight."""
        return self.scale * float(torch.linalg.vector_norm(self.weight))

    def rank(self, keep: float, rule: str = "best") -> Rank:
        """The rank for a keep, the same for all groups.

        Args:
            keep: Fraction of the weight parameters that may remain, above 0.
            rule: ``proportional`` (the paper's) or ``best`` (least error, never more parameters).
        """
        if rule == "proportional":
            return self.method.rank(self.group, keep)
        return self.best_rank(int(keep * self.group.weight_parameters))

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
        """For each group the weights of its stages, in torch's layout, for the scaled weight."""
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

    def stages(self, rank: Rank) -> tuple[LayerSpec, ...]:
        """The torch layers of the factorization; the last one carries the bias."""
        return layer_stages(self.method, self.layer, rank)

    def factors(self, rank: Rank) -> list[Tensor]:
        """The weights of :meth:`stages` in torch's layout and float64, the scale spread evenly.

        Raises:
            UsageError: If the rank does not fit the layer.
        """
        check_rank(self.method, self.group, rank)
        weights = [torch.cat(column) for column in zip(*self._factors(rank), strict=True)]
        share = self.scale ** (1 / len(weights))
        return [weight * share for weight in weights]

    def dense(self) -> Tensor:
        """The layer's weight as it was given, in torch's layout and float64."""
        return join_groups(self.weight, self.layer) * self.scale

    def reconstruct(self, rank: Rank) -> Tensor:
        """The dense weight, in torch's layout and float64, that the factors amount to."""
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
    method: Decomposition, layer: LayerSpec, weight: Tensor, evidence: Evidence
) -> Prepared:
    """TEMPORARY."""
    return method.prepare(layer, weight, evidence.seed)


def layer_stages(method: Decomposition, layer: LayerSpec, rank: Rank) -> tuple[LayerSpec, ...]:
    """The torch layers that stand in for a whole layer at a rank; the last carries the bias.

    Raises:
        UsageError: If the rank does not fit the layer.
    """
    group = layer.per_group()
    check_rank(method, group, rank)
    stages = [stage.repeated(layer.groups) for stage in method.stages(group, rank)]
    return (*stages[:-1], stages[-1].with_bias(layer.bias))


def check_rank(method: Decomposition, group: LayerSpec, rank: Rank) -> None:
    """Refuse a rank of the wrong arity, below one or above what is of use.

    Raises:
        UsageError: Naming the rank and what is allowed.
    """
    largest = method.max_rank(group)
    given, allowed = as_tuple(rank), as_tuple(largest)
    fits = isinstance(rank, int) == isinstance(largest, int) and len(given) == len(allowed)
    if not fits or any(not 1 <= r <= top for r, top in zip(given, allowed, strict=True)):
        form = "one whole number" if isinstance(largest, int) else f"{len(allowed)} whole numbers"
        ranges = " and ".join(f"from 1 to {top}" for top in allowed)
        example = list(largest) if isinstance(largest, tuple) else largest
        raise UsageError(
            f"rank {rank} does not fit this layer: it must be {form}, {ranges}",
            f'in a plan the largest is written "rank": {example}',
        )


def compose(stages: Sequence[LayerSpec], weights: Sequence[Tensor], group: LayerSpec) -> Tensor:
    """The dense weight of the linear map that stages amount to.

    Of linear layers the product. For convolutions, feeds one unit impulse per input channel
    through the stages, stripped of stride, padding and dilation, and reads the kernel off the
    output. Where stages share no axis, as in most methods, that is a product as well.

    Args:
        stages: Bias-free layers in order.
        weights: Their weights in torch's layout.
        group: The layer they replace, without groups.

    Returns:
        (out, in, *kernel), in the dtype of the weights.
    """
    if group.kind == "Linear":
        return reduce(lambda product, weight: weight @ product, weights)
    signal = torch.eye(group.in_channels, dtype=weights[0].dtype, device=weights[0].device)
    signal = signal.reshape(*signal.shape, *(1 for _ in group.kernel_size))
    for stage, weight in zip(stages, weights, strict=True):
        signal = _impulse_response(stage, weight, signal)
    return signal.transpose(0, 1)


def factorized_module(
    stages: Sequence[LayerSpec],
    weights: Sequence[Tensor],
    bias: Tensor | None,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> nn.Sequential:
    """The ordinary torch layers of a factorization, their weights filled in.

    Args:
        stages: The layers in order.
        weights: Their weights, in torch's layout.
        bias: The bias of the last layer, or None.
        dtype: Of the module.
        device: Of the module.
    """
    module = nn.Sequential(*(stage.build(dtype=dtype, device=device) for stage in stages))
    with torch.no_grad():
        for layer, weight in zip(module, weights, strict=True):
            layer.get_parameter("weight").copy_(weight)
        if bias is not None:
            module[-1].get_parameter("bias").copy_(bias)
    return module


def split_groups(weight: Tensor, layer: LayerSpec) -> Tensor:
    """A weight in torch's layout as (groups, out, in, *kernel)."""
    parts: Tensor = weight.unflatten(0, (layer.groups, -1))
    return parts.transpose(1, 2) if layer.transposed else parts


def join_groups(parts: Tensor, layer: LayerSpec) -> Tensor:
    """The inverse of :func:`split_groups`."""
    return (parts.transpose(1, 2) if layer.transposed else parts).flatten(0, 1)


def count(stages: Sequence[LayerSpec]) -> int:
    """The number of parameters of stages, biases included."""
    return sum(stage.parameters for stage in stages)


def as_tuple(rank: Rank) -> tuple[int, ...]:
    """A rank as a tuple, also where it is a single number."""
    return (rank,) if isinstance(rank, int) else rank


def _checked(
    factors: Sequence[Tensor], stages: Sequence[LayerSpec], method: str
) -> Sequence[Tensor]:
    shapes = [tuple(factor.shape) for factor in factors]
    wanted = [stage.weight_shape for stage in stages]
    if shapes != wanted:
        raise UnsupportedError(f"{method} returned factors of shapes {shapes}, not {wanted}")
    if not all(bool(torch.isfinite(factor).all()) for factor in factors):
        raise UnsupportedError(f"{method} returned NaN or infinite factors")
    return factors


def _impulse_response(stage: LayerSpec, weight: Tensor, signal: Tensor) -> Tensor:
    if all(1 in sizes for sizes in zip(stage.kernel_size, signal.shape[2:], strict=True)):
        return _outer_product(stage, weight, signal)
    # A transposed convolution spreads an impulse into its kernel as it is; for an ordinary one
    # the same takes full padding and the flipped kernel, since torch's convolution correlates.
    axes = len(stage.kernel_size)
    if stage.transposed:
        spread = [
            functional.conv_transpose1d,
            functional.conv_transpose2d,
            functional.conv_transpose3d,
        ][axes - 1]
        return spread(signal, weight, groups=stage.groups)
    correlate = [functional.conv1d, functional.conv2d, functional.conv3d][axes - 1]
    flipped = weight.flip(tuple(range(2, 2 + axes)))
    padding = tuple(size - 1 for size in stage.kernel_size)
    return correlate(signal, flipped, padding=padding, groups=stage.groups)


def _outer_product(stage: LayerSpec, weight: Tensor, signal: Tensor) -> Tensor:
    """The response where kernel and signal have no axis in common: channels contract, axes join.

    torch's convolutions in float64 are ten times slower than this product.
    """
    axes = len(stage.kernel_size)
    inputs = signal.unflatten(1, (stage.groups, -1)).flatten(3)
    kernels = split_groups(weight, stage).flatten(3)
    joined = torch.einsum("ngcs,gtck->ngtsk", inputs, kernels).flatten(1, 2)
    apart = joined.unflatten(-1, stage.kernel_size).unflatten(2, signal.shape[2:])
    pairs = [2 + axis + side for axis in range(axes) for side in (0, axes)]
    sizes = [a * b for a, b in zip(stage.kernel_size, signal.shape[2:], strict=True)]
    response: Tensor = apart.permute(0, 1, *pairs).reshape(*apart.shape[:2], *sizes)
    return response


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
