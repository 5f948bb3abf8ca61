"""Inputs to fit a compressed model to where there are no data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tdkit.calibration.batchnorm import has_statistics
from tdkit.calibration.synthesis import STEPS, image_count, random_tokens, synthetic_images
from tdkit.errors import UnsupportedError
from tdkit.forward.inputs import Inputs
from tdkit.layers.traced import TracedModel

# Multiply-accumulates of all forward passes, at most: half a minute of a core or two.
_WORK = 2**40

# Of them one is held back.
_BATCHES = 10

# Token sequences in each.
_SEQUENCES = 6

# Axes of a batch of pictures, of which the mirror image is one, too.
_PICTURE = 4


def synthetic_inputs(traced: TracedModel, seed: int) -> Sequence[Inputs]:
    """Images that BatchNorm takes for its training images, or random tokens.

    Args:
        traced: The dense model.
        seed: Of what is random about them.

    Returns:
        Batches, tensors of any shape; none where the model remembers nothing to make any from.

    Raises:
        UnsupportedError: If the model cannot be run or differentiated on them, or is too large.
    """
    sample = traced.sample
    if sample is None or sample.batch != 1:
        return ()
    if sample.image is None:
        _refuse_long(traced, _BATCHES * _SEQUENCES)
        return random_tokens(traced.model, sample, [_SEQUENCES] * _BATCHES, seed)
    if not has_statistics(traced.model):
        return ()
    _refuse_long(traced, STEPS * image_count(sample.image))
    images = synthetic_images(traced.model, sample.image, seed)
    parts = images.chunk(_BATCHES)
    return [Inputs((_with_mirrored(part),)) for part in parts]


def _with_mirrored(images: Tensor) -> Tensor:
    """Both in one batch, so that none is held back of which the other is not."""
    return torch.cat([images, images.flip(-1)]) if images.ndim == _PICTURE else images


def _refuse_long(traced: TracedModel, passes: int) -> None:
    work = passes * sum(layer.macs or 0 for layer in traced.layers)
    if work > _WORK:
        raise UnsupportedError(f"it would take {work:.1g} multiplications, more than {_WORK:.1g}")
