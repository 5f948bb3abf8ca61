"""Where a model is, and having it elsewhere for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first parameter or buffer; the CPU where it has none."""
    tensors = (*model.parameters(), *model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


@contextmanager
def on_cpu(model: nn.Module) -> Iterator[None]:
    """Have all parameters and buffers of a model on the CPU meanwhile, and back where they were.

    The tensors stay the same objects, as whatever shares them relies on; what is on the meta
    device has no data and stays there.

    Args:
        model: A module on any device.
    """
    tensors = (*model.parameters(), *model.buffers())
    away = [each for each in tensors if each.device.type not in ("cpu", "meta")]
    kept = [each.data for each in away]
    try:
        for tensor in away:
            tensor.data = tensor.data.cpu()
        yield
    finally:
        for tensor, data in zip(away, kept, strict=True):
            tensor.data = data
