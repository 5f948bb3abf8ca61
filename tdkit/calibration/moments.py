"""What unlabelled inputs say about a layer: means and variances."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Mean and variance per channel of all that was added, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: list[Tensor] = []

    def add(self, features: Tensor) -> None:
        """Add features (batch, channels, ...)."""
        rows = features.detach().double().transpose(0, 1).flatten(1)
        self.count += rows.shape[1]
        self.sums.append(torch.stack([rows.sum(1), rows.square().sum(1)]))

    @property
    def mean(self) -> Tensor:
        """(channels,)."""
        return torch.stack(self.sums).sum(0)[0] / self.count

    @property
    def variance(self) -> Tensor:
        """(channels,), at least 0."""
        squares = torch.stack(self.sums).sum(0)[1] / self.count
        return (squares - self.mean.square()).clamp(min=0)
