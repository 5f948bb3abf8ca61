"""What a metric is: an approximation error e(W~, W), larger is worse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """An approximation error made from norms.

    Attributes:
        name: As registered.
        target: ``weights``, or ``features`` (the layer's output; averaged over samples).
        value: Maps the Frobenius norm of the difference, the norm of the original and its number
            of elements to the error.
    """

    name: str
    target: Literal["weights", "features"]
    value: Callable[[float, float, int], float]


def absolute(error: float, norm: float, size: int) -> float:
    """The norm of the difference."""
    return error


def relative(error: float, norm: float, size: int) -> float:
    """The norm of the difference over the norm of the original; 0 / 0 is 0."""
    return error / norm if norm > 0 else 0.0


def scaled(error: float, norm: float, size: int) -> float:
    """The norm of the difference over the number of elements."""
    return error / size
