"""Honest latency: medians of runs taken in turn, so that a drifting machine hits all alike."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn

from tdkit.forward.inputs import Inputs
from tdkit.forward.trial import mode


@dataclass(frozen=True)
class Latency:
    """How long one forward pass takes.

    Attributes:
        milliseconds: The median for each model, in the order given.
        batch: Samples per pass.
        runs: Timed passes per model.
        threads: Threads that torch used within an operation.
        device: Where the models ran.
    """

    milliseconds: tuple[float, ...]
    batch: int
    runs: int
    threads: int
    device: str


def measure_latency(
    models: Sequence[nn.Module], inputs: Inputs, *, runs: int = 15, seconds: float = 10.0
) -> Latency:
    """Time eval-mode forward passes of several models on the same inputs, in turn.

    Args:
        models: The models to compare.
        inputs: Arguments of a forward pass, at least one of them a tensor, of any shape.
        runs: Timed passes per model, fewer when time runs out, but at least three.
        seconds: About how long all of it may take.
    """
    device = inputs.tensors[0].device
    times: list[list[float]] = [[] for _ in models]
    start = time.perf_counter()
    for model in models:
        _timed(model, inputs, device)
    while len(times[0]) < runs and (len(times[0]) < 3 or time.perf_counter() - start < seconds):
        for model, taken in zip(models, times, strict=True):
            taken.append(_timed(model, inputs, device))
    return Latency(
        milliseconds=tuple(1e3 * median(taken) for taken in times),
        batch=inputs.batch or 1,
        runs=len(times[0]),
        threads=torch.get_num_threads(),
        device=device.type,
    )


def _timed(model: nn.Module, inputs: Inputs, device: torch.device) -> float:
    given = inputs.map(torch.clone)
    # Not inference_mode: what a model keeps from such a pass could not be trained with.
    with mode(model, training=False), torch.no_grad():
        _synchronize(device)
        start = time.perf_counter()
        model(*given.args, **given.kwargs)
        _synchronize(device)
        return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
