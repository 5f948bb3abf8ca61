"""Inputs that stand in for data, made from what a model itself remembers of its training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tdkit import defaults
from tdkit.calibration.batchnorm import running_norms
from tdkit.calibration.noise import noise_images
from tdkit.errors import UnsupportedError, first_line
from tdkit.forward.inputs import Inputs
from tdkit.forward.trial import run_on_data, trial

IMAGES = 64
"""Made at once: what BatchNorm has stored is matched by all of them together."""

STEPS = 60
"""Of Adam."""

RATE = 0.1
"""Adam's learning rate at first, in deviations of an image; it falls to 0 along a cosine. Of more
the images match less well what the model was trained on."""

# Elements of the images, at most.
_ROOM = 2**22

# Of Adam, after Yin et al.: so few steps leave no time for a longer memory.
_BETAS = (0.5, 0.9)


def synthetic_images(
    model: nn.Module,
    like: Tensor,
    seed: int = defaults.SEED,
    steps: int = STEPS,
) -> Tensor:
    """Images whose features have the means and variances that every BatchNorm has stored.

    They start as noise, see :func:`tdkit.calibration.noise.noise_images`, and Adam changes them.
    What is made small is the divergence of :func:`mismatch`. Cai et al. 2020, "ZeroQ: a novel
    zero shot quantization framework"; Yin et al. 2020, "Dreaming to distill: data-free knowledge
    transfer via DeepInversion".

    Args:
        model: Has some BatchNorm with running statistics. It stays as it is.
        like: One image (1, channels, *size), for shape, dtype and device.
        seed: Of the noise.
        steps: Of Adam.

    Returns:
        (count, channels, *size).

    Raises:
        UnsupportedError: If the model does not run on them, or is not differentiable.
    """
    try:
        images = _fitted(model, noise_images(like, image_count(like), seed), steps)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a model may fail in any way
        raise UnsupportedError(f"no inputs can be made: {first_line(error)}") from error
    if not bool(images.isfinite().all()):
        raise UnsupportedError("no inputs can be made: their features are not finite")
    return images


def image_count(like: Tensor) -> int:
    """How many images are made: :data:`IMAGES`, fewer where they are large.

    Args:
        like: One image (1, channels, *size).
    """
    return min(IMAGES, max(2, _ROOM // max(1, like[0].numel())))


def mismatch(model: nn.Module, images: Tensor) -> float:
    """How far what BatchNorm layers are given is from what they have stored, in nats.

    For every channel the Kullback-Leibler divergence of two normal distributions, that of the
    images and the stored one; the mean over channels, summed over layers.

    Args:
        model: It stays as it is.
        images: A batch (count, channels, *size).
    """
    with trial(model), _watched(model) as losses:
        Inputs((images,)).run(model)
    return float(torch.stack(losses).sum())


def _fitted(model: nn.Module, noise: Tensor, steps: int) -> Tensor:
    images = noise.clone().requires_grad_()
    adam = torch.optim.Adam([images], RATE, _BETAS)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in range(steps):
        with trial(model), _watched(model) as losses, torch.enable_grad():
            Inputs((images,)).run(model)
            # To the images alone: parameters keep the gradients that they have.
            (images.grad,) = torch.autograd.grad(torch.stack(losses).sum(), images)
        adam.step()
        schedule.step()
    return images.detach()


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the divergence of every BatchNorm that is run meanwhile, each a number."""
    losses: list[Tensor] = []

    def look(norm: _BatchNorm, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        losses.append(_divergence(norm, args[0]))

    norms = running_norms(model).values()
    handles = [norm.register_forward_pre_hook(partial(look, norm)) for norm in norms]
    try:
        yield losses
    finally:
        for handle in handles:
            handle.remove()


def _divergence(norm: _BatchNorm, given: Tensor) -> Tensor:
    """Of one layer; given (batch, channels, *size)."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    axes = [axis for axis in range(given.ndim) if axis != 1]
    variance, mean = torch.var_mean(given, axes, correction=0)
    unit = norm.running_var + norm.eps
    ratio = (variance + norm.eps) / unit
    gap = (mean - norm.running_mean).square() / unit
    return (gap + ratio - 1 - ratio.log()).mean() / 2


def random_tokens(
    model: nn.Module, example: Inputs, counts: Sequence[int], seed: int = defaults.SEED
) -> tuple[Inputs, ...]:
    """Sequences of tokens drawn alike from the vocabulary, that of the largest embedding.

    Args:
        model: It stays as it is.
        example: One sample, (1, ...) each tensor that has the batch axis; all but the tokens is
            repeated.
        counts: How many in each batch.
        seed: Of the generator that draws them.

    Returns:
        Batches; none where no embedding is given what the model is given.

    Raises:
        UnsupportedError: If the model does not run on the example.
    """
    found: list[tuple[int, Tensor]] = []

    def look(embedding: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(embedding, nn.Embedding)
        found.extend((embedding.num_embeddings, each.clone()) for each in args[:1])

    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    handles = [module.register_forward_pre_hook(look) for module in embeddings]
    try:
        run_on_data(model, example)
    finally:
        for handle in handles:
            handle.remove()
    words, tokens = max(found, key=lambda each: each[0], default=(0, torch.empty(0)))
    if not any(_are(each, tokens) for each in example.tensors):
        return ()
    generator = torch.Generator().manual_seed(seed)

    def drawn(count: int, tensor: Tensor) -> Tensor:
        if _are(tensor, tokens):
            shape = (count, *tensor.shape[1:])
            return torch.randint(words, shape, generator=generator).to(tensor)
        return tensor.repeat_interleave(count, 0) if tensor.ndim and len(tensor) == 1 else tensor

    return tuple(example.map(partial(drawn, count)) for count in counts)


def _are(given: Tensor, tokens: Tensor) -> bool:
    return given.shape == tokens.shape and given.ndim > 0 and torch.equal(given, tokens)
