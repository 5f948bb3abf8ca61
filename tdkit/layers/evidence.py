"""What a decomposition or a metric may look at beside the weight."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tdkit import defaults

MOMENTS = "moments"
"""The need of what looks at the moments of a layer's inputs."""


@dataclass(frozen=True, eq=False)
class Moments:
    """What a layer's inputs are like, over all samples and positions.

    Attributes:
        count: How many input vectors were seen: samples times positions.
        mean: (d,), float64, one entry per input channel (Linear: input feature) of the whole
            layer, in the unit of the inputs.
        second: (d, d), float64, the uncentred second moments: the mean of x xᵀ, in that unit
            squared.
    """

    count: int
    mean: Tensor
    second: Tensor


@dataclass(frozen=True)
class Evidence:
    """What a layer is known by beside its weight.

    Attributes:
        seed: Seeds the randomness of methods that have any.
        moments: Of the layer's inputs; None where none were collected, or nobody asked for them.
    """

    seed: int = defaults.SEED
    moments: Moments | None = None


NO_EVIDENCE = Evidence()


def as_evidence(value: Evidence | int) -> Evidence:
    """Evidence as it is; a number, which it was before there was more, is the seed."""
    return value if isinstance(value, Evidence) else Evidence(seed=value)
