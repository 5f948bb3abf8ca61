"""What a decomposition or a metric may look at beside the weight."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

MOMENTS = "moments"
"""The need of what looks at the moments of a layer's inputs."""


@dataclass(frozen=True, eq=False)
class Moments:
    """What unlabelled inputs say about one layer.

    Attributes:
        count: How many positions were added up, over all samples and calls.
        mean: (channels,), float64: the mean of the layer's input channels.
        second: (channels, channels), float64: their uncentred second moments, ``E[x xᵀ]``.
    """

    count: int
    mean: Tensor
    second: Tensor


@dataclass(frozen=True)
class Evidence:
    """What is known about a layer beside its weight.

    Attributes:
        seed: Seeds the randomness of methods that have any.
        moments: Of the layer's inputs; None where nobody asked for them.
    """

    seed: int = 0
    moments: Moments | None = None
