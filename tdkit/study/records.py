"""What a study is made of: what to measure, and what came out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tdkit.decompositions.base import (
    Rank,
)

Phase = Literal["before", "after"]
"""Of fine-tuning: the performance error p, or p* (section 3.1 of the paper)."""


@dataclass(frozen=True)
class Trial:
    """One candidate in one run: a set of hyperparameters h_i of the paper's section 3.1.

    Attributes:
        layer: The layer's name.
        method: The decomposition's name.
        keep: The keep that was asked for, as the recipe has it.
        rank: The rank it led to.
        run: Which repetition, from 0. Where neither the method nor fine-tuning is random there is
            only run 0, which stands for every run.
        seed: Seeds the method's random start and the fine-tuning of this run.
        stage: Before or after fine-tuning.
    """

    layer: str
    method: str
    keep: float
    rank: Rank
    run: int
    seed: int
    stage: Phase = "before"


@dataclass(frozen=True)
class Measurement:
    """What came out of a trial; a failed one has a reason and nothing else.

    Attributes:
        trial: What was measured.
        params_before: The layer's parameters, bias included.
        params_after: Those of its factorization.
        macs_before: The layer's multiply-accumulates per sample; None when unknown.
        macs_after: Those of its factorization.
        errors: Approximation error by the name of the metric. After fine-tuning the same as
            before it: it is what a user knows when choosing.
        correct: For each evaluation image one bit, packed as by ``numpy.packbits``: whether the
            model is right about it (without labels: whether it agrees with the dense model).
        images: How many evaluation images there are.
        change: Only after fine-tuning: by the name of a layer, the relative difference of the
            norm of its weight, ``| ||W*|| - ||W|| | / ||W||``, the factorized layer's weight
            being what its factors amount to (Figure 5 of the paper).
        seconds: Wall time.
        failure: Why there is no result; None when there is one.
    """

    trial: Trial
    params_before: int = 0
    params_after: int = 0
    macs_before: int | None = None
    macs_after: int | None = None
    errors: Mapping[str, float] = field(default_factory=dict)
    correct: bytes = b""
    images: int = 0
    change: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    failure: str | None = None

    @property
    def bits(self) -> NDArray[np.bool_]:
        """Which images the model is right about, bool of shape (images,)."""
        return unpack(self.correct, self.images)

    @property
    def performance_error(self) -> float:
        """The share of images that it is wrong about; NaN for a failed trial."""
        return 1 - float(self.bits.mean()) if self.images else float("nan")


@dataclass(frozen=True)
class Baseline:
    """The dense model on the same images.

    Attributes:
        correct: Packed like those of a :class:`Measurement`; all ones without labels.
        images: How many evaluation images there are.
        labelled: Whether the images have labels. If not, the performance error is
            1 - agreement with the dense model.
        params: Parameters of the whole model.
        macs: Its multiply-accumulates per sample; None when unknown.
        layers: Its compressible and other layers in the order of the forward pass: name and
            parameters.
    """

    correct: bytes
    images: int
    labelled: bool
    params: int
    macs: int | None
    layers: tuple[tuple[str, int], ...]

    @property
    def bits(self) -> NDArray[np.bool_]:
        """Which images the model is right about, bool of shape (images,)."""
        return unpack(self.correct, self.images)


@dataclass(frozen=True)
class Results:
    """All that a run folder holds, and all that a report is made from.

    Attributes:
        recipe: The text of the recipe, in TOML.
        identity: What the measurements depend on, as JSON values: hashes of model and data, the
            values of the recipe that matter, versions.
        baseline: The dense model.
        measurements: Finished trials in the order of the recipe, failed ones included.
        planned: How many trials the recipe asks for.
    """

    recipe: str
    identity: Mapping[str, Any]
    baseline: Baseline
    measurements: tuple[Measurement, ...]
    planned: int


def pack(correct: NDArray[np.bool_]) -> bytes:
    """One bit per image."""
    return np.packbits(correct).tobytes()


def unpack(bits: bytes, images: int) -> NDArray[np.bool_]:
    """The inverse of :func:`pack`."""
    return np.unpackbits(np.frombuffer(bits, np.uint8), count=images).astype(bool)


def outcome_key(trial: Trial) -> Trial:
    """What a trial's outcome depends on: everything but the keep that led to its rank."""
    return replace(trial, keep=0.0)
