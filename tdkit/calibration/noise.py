"""Noise that stands in for data."""

from __future__ import annotations

import torch
from torch import Tensor

from tdkit import defaults

NOISE_IMAGES = 128


# The most noise images, and of them the most in a batch, each with a bound on their elements.
_NOISE = ((NOISE_IMAGES, 2**23), (64, 2**21))


def noise_images(like: Tensor, count: int = NOISE_IMAGES, seed: int = defaults.SEED) -> Tensor:
    """Random images with the spectrum of natural ones, amplitude 1/f (Field 1987).

    Args:
        like: Model inputs (batch, channels, *size), for shape, dtype and device.
        count: How many.
        seed: Of the generator that draws them.

    Returns:
        (count, channels, *size), of mean 0 and deviation 1; white where there is no ``size``.
    """
    generator = torch.Generator().manual_seed(seed)
    white = torch.randn(count, *like.shape[1:], generator=generator)
    axes = tuple(range(2, like.ndim))
    if not axes:
        return white.to(like)
    size = white.shape[2:]
    grids = torch.meshgrid(*(torch.fft.fftfreq(n) for n in size), indexing="ij")
    frequency = torch.stack(grids).square().sum(0).sqrt().clamp(min=1 / max(size))
    images = torch.fft.ifftn(torch.fft.fftn(white, dim=axes) / frequency, dim=axes).real
    scaled: Tensor = (images - images.mean()) / images.std().clamp(min=1e-6)
    return scaled.to(like)


def noise_batches(like: Tensor, seed: int = defaults.SEED) -> tuple[Tensor, ...]:
    """Noise images to match statistics on, fewer and in smaller batches where they are large.

    Args:
        like: One image (1, channels, *size), see :func:`noise_images`.
        seed: Of the generator that draws them.
    """
    size = max(1, like[0].numel())
    count, batch = (min(most, max(2, room // size)) for most, room in _NOISE)
    batches: tuple[Tensor, ...] = noise_images(like, count, seed).split(batch)
    return batches
