"""What a compression achieved, measured on the whole model."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdkit.compression.compress import Compression, compressed_macs
from tdkit.costs.base import total_cost
from tdkit.costs.latency import Latency, measure_latency
from tdkit.datasets.base import Split
from tdkit.errors import first_line
from tdkit.layers.counting import model_parameters
from tdkit.training.loop import evaluate


@dataclass(frozen=True)
class Report:
    """Totals before and after; None where something could not be measured.

    Attributes:
        params: Parameters of the whole model.
        macs: Multiply-accumulates of its convolutional and linear layers, per sample.
        bytes: Size of the state_dict as a file, which compares models whatever the format.
        latency: Medians of forward passes.
        untimed: Why there is no latency although there are inputs.
        accuracy: On the test split.
        images: How many images that split has.
        compressed: The accuracy of the compressed model before it was fine-tuned.
        finetuning: How it was fine-tuned, as JSON values; None where it was not.
    """

    params: tuple[int, int]
    macs: tuple[int, int] | None
    bytes: tuple[int, int]
    latency: Latency | None
    accuracy: tuple[float, float] | None
    images: int | None
    compressed: float | None = None
    finetuning: Mapping[str, Any] | None = None
    untimed: str | None = None


def measure(
    dense: nn.Module,
    compression: Compression,
    *,
    inputs: Sequence[Any] | None,
    test: Split | None = None,
) -> Report:
    """Measure the dense and the compressed model side by side, on the dense one's device.

    Args:
        dense: The original.
        compression: Its compression.
        inputs: Arguments of a forward pass, for MACs and latency.
        test: Labelled images, for accuracy.
    """
    device = next(dense.parameters()).device
    small = compression.model.to(device)
    after = compressed_macs(compression)
    latency, untimed = (None, None) if inputs is None else _latency((dense, small), inputs)
    accuracy = None
    if test is not None and test.labels is not None:
        both = [evaluate(model, test, device=device).accuracy for model in (dense, small)]
        accuracy = (both[0], both[1])
    return Report(
        params=(model_parameters(dense), model_parameters(small)),
        macs=None if after is None else (total_cost(dense, compression.layers, "macs"), after),
        bytes=(_state_bytes(dense), _state_bytes(small)),
        latency=latency,
        untimed=untimed,
        accuracy=accuracy,
        images=None if accuracy is None or test is None else len(test),
    )


def summary(
    report: Report,
    compression: Compression,
    *,
    seconds: float,
    output: Path,
    plan: Path,
) -> dict[str, Any]:
    """The one JSON object that ``tdkit compress --json`` prints."""
    latency = report.latency
    moves = [
        {**move, "relative_error": compression.errors[move["layer"]]}
        for move in compression.plan.to_json()["moves"]
    ]
    return {
        "budget": compression.plan.budget,
        "cost": compression.plan.cost,
        "metric": compression.plan.metric,
        "planner": compression.plan.planner,
        "seed": compression.plan.seed,
        **_pair("params", report.params),
        **_pair("macs", report.macs),
        **_pair("bytes", report.bytes),
        **_pair("accuracy", report.accuracy),
        "accuracy_compressed": report.compressed,
        "accuracy_images": report.images,
        "finetuning": report.finetuning,
        "latency_before_ms": None if latency is None else latency.milliseconds[0],
        "latency_after_ms": None if latency is None else latency.milliseconds[1],
        "latency": None if latency is None else _conditions(latency),
        "untimed": report.untimed,
        "verified": compression.verified,
        "calibration": compression.calibrated,
        "uncalibrated": compression.uncalibrated,
        "put_back": dict(compression.put_back),
        "seconds": round(seconds, 3),
        "output": str(output),
        "output_bytes": output.stat().st_size,
        "plan": str(plan),
        "moves": moves,
    }


def near_chance(report: Report, classes: int) -> str | None:
    """A doubt about the data where the dense model is hardly better than guessing; or None.

    Args:
        report: What was measured.
        classes: How many classes the labels are of.
    """
    if report.accuracy is None or not report.images or classes < 2:
        return None
    accuracy, chance = report.accuracy[0], 1 / classes
    # Two standard errors, so that a few images are not trusted too far.
    margin = max(0.05, 2 * math.sqrt(chance * (1 - chance) / report.images))
    if accuracy >= chance + margin:
        return None
    return (
        f"the model's own accuracy, {accuracy:.2%} of {report.images:,} images, is near chance for"
        f" {classes} classes: are the images standardised, and the classes ordered, as in its"
        " training?"
    )


def _latency(
    models: Sequence[nn.Module], inputs: Sequence[Any]
) -> tuple[Latency | None, str | None]:
    """The latency, or why there is none."""
    try:
        return measure_latency(models, inputs), None
    except Exception as error:  # a model may fail in any way, and be right on other inputs
        return None, f"not timed on a batch of {len(inputs[0])}: {first_line(error)}"


def _pair(name: str, values: tuple[float, float] | None) -> Mapping[str, float | None]:
    before, after = values if values is not None else (None, None)
    return {f"{name}_before": before, f"{name}_after": after}


def _conditions(latency: Latency) -> dict[str, Any]:
    return {k: getattr(latency, k) for k in ("batch", "runs", "threads", "device")}


def _state_bytes(model: nn.Module) -> int:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.getbuffer().nbytes
