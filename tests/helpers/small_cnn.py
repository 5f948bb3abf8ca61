"""A small network on images, for tests of the public functions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tdkit.datasets.base import Dataset, in_memory_dataset

SHAPE = (3, 12, 12)


def network(seed: int = 0) -> nn.Sequential:
    """Three convolutions, of which the inner two can be compressed, BatchNorm, a linear layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 16, 3),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, 16, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 4),
        )


def size(model: nn.Module) -> int:
    """How many parameters it has."""
    return sum(p.numel() for p in model.parameters())


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models have the same bits under the same names."""
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def images(batch: int = 2) -> Tensor:
    """Normal noise (batch, 3, 12, 12)."""
    return torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(0))


def dataset(seed: int = 0) -> Dataset:
    """Sixty images for training and sixty for testing, in four classes."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (60, *SHAPE), generator=generator, dtype=torch.uint8)
    part = pixels, torch.arange(60) % 4
    return in_memory_dataset("four", tuple("abcd"), part, part, 0)
