"""BatchNorm statistics that fit the compressed layers in front of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tdkit.errors import UsageError
from tdkit.layers import mode


def recalibrate(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Measure the running mean and variance of every BatchNorm again; no labels, no gradients.

    A truncated layer passes on less energy than the original, and the statistics that follow it
    were measured on the original. Changes the model in place; weights stay as they are.

    Args:
        model: The compressed model.
        batches: Model inputs, such as a few hundred training images.

    Returns:
        How many BatchNorm layers there were.

    Raises:
        UsageError: If there are no inputs.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    inputs = list(batches)
    if not inputs:
        raise UsageError("recalibrating needs data", "name some with --data")
    with mode(model, training=False), _measuring(norms), torch.no_grad():
        for batch in inputs:
            model(batch)
    return len(norms)


@contextmanager
def _measuring(norms: list[_BatchNorm]) -> Iterator[None]:
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # an average over all batches instead of a moving one
        norm.training = True
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
