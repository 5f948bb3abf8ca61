"""Inputs made out of what BatchNorm remembers of the training images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from tdkit import defaults
from tdkit.calibration.noise import noise_images
from tdkit.errors import UnsupportedError, first_line
from tdkit.forward.trial import trial

SYNTHETIC_IMAGES = 128

STEPS = 40

# Adam's. The images have a deviation of 1 or so.
_RATE, _BETAS, _LAST = 0.1, (0.5, 0.9), 0.05

# What a nat of doubt about an image's class counts beside those of BatchNorm's inputs.
_CLASS = 0.1


def synthetic_images(
    model: nn.Module,
    like: Tensor,
    count: int = SYNTHETIC_IMAGES,
    steps: int = STEPS,
    seed: int = defaults.SEED,
) -> Tensor:
    """Images on which every BatchNorm of a model is given what it remembers of its training.

    They start as noise. Adam then makes small, summed over the BatchNorms, the Kullback-Leibler
    divergence of the normal distributions with the mean and variance of a channel over all images,
    and with those that are stored; where the model returns scores, each image is also to look like
    a class that is drawn for it. Cai et al. 2020, "ZeroQ"; Yin et al. 2020, "Dreaming to distill"
    (DeepInversion).

    Args:
        model: It is afterwards as before.
        like: Model inputs (batch, channels, *size), for shape, dtype and device.
        count: How many, two or more.
        steps: Of Adam, each a pass forward and back of all images.
        seed: Of the generator that draws noise and classes.

    Returns:
        (count, channels, *size).

    Raises:
        UnsupportedError: If the model has no BatchNorm with statistics, does not run on such
            images or cannot be differentiated, or something is not finite.
    """
    # The steps are too small for half precision.
    start = noise_images(like.to(torch.promote_types(like.dtype, torch.float32)), count, seed)
    try:
        with trial(model), _frozen(model), torch.enable_grad():
            found = _descended(model, start, like.dtype, steps, seed)
    except (MemoryError, torch.OutOfMemoryError, UnsupportedError):
        raise
    except Exception as error:  # a model may fail in any way
        raise UnsupportedError(f"no inputs can be synthesised: {first_line(error)}") from error
    if not bool(found.isfinite().all()):
        raise UnsupportedError("what is synthesised is not finite")
    return found.to(like.dtype)


def _descended(
    model: nn.Module, start: Tensor, dtype: torch.dtype, steps: int, seed: int
) -> Tensor:
    images = start.clone().requires_grad_()
    generator = torch.Generator().manual_seed(seed)
    chances = torch.rand(len(images), generator=generator).to(images.device)
    optimizer = torch.optim.Adam([images], lr=_RATE, betas=_BETAS)
    for step in range(steps):
        falling = (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = _RATE * (_LAST + (1 - _LAST) * falling)
        optimizer.zero_grad()
        with _misses(model) as misses:
            outputs = model(images.to(dtype, copy=True))
        if not misses:
            raise UnsupportedError("the model has no BatchNorm with statistics")
        loss = torch.stack(misses).sum() + _CLASS * _doubt(outputs, chances)
        (images.grad,) = torch.autograd.grad(loss, [images])
        optimizer.step()
    return images.detach()


def _doubt(outputs: Any, chances: Tensor) -> Tensor | float:
    """How little scores say of the classes that are drawn; nothing where they are no scores."""
    scores = isinstance(outputs, Tensor) and outputs.ndim == 2 and outputs.shape[1] > 1
    if not scores or len(outputs) != len(chances):
        return 0.0
    return functional.cross_entropy(outputs.float(), (chances * outputs.shape[1]).long())


def mismatch(model: nn.Module, images: Tensor) -> float:
    """How far what each BatchNorm is given is from what it remembers, in nats a channel, summed.

    Args:
        model: It is afterwards as before.
        images: (batch, channels, *size).
    """
    with trial(model), _misses(model) as misses:
        model(images.clone())
    return float(torch.stack(misses).sum())


@contextmanager
def _misses(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects for every call of a BatchNorm how far its input is from its statistics."""
    found: list[Tensor] = []

    def look(norm: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(norm, _BatchNorm)
        found.append(_missed(norm, args[0]))

    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    handles = [norm.register_forward_pre_hook(look) for norm in norms]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _missed(norm: _BatchNorm, given: Tensor) -> Tensor:
    """KL(given || stored), the mean over channels."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    axes = [axis for axis in range(given.ndim) if axis != 1]
    variance, mean = torch.var_mean(given.float(), axes, correction=0)
    stored = norm.running_var.float() + norm.eps
    ratio = (variance + norm.eps) / stored
    off = (mean - norm.running_mean.float()).square() / stored
    missed: Tensor = (ratio + off - 1 - ratio.log()).mean() / 2
    return missed


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter is differentiated meanwhile."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_()
