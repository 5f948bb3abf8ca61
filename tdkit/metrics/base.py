"""What a metric is: an approximation error e(W~, W) with its law, larger is worse."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tdkit.errors import TdkitError, UnlawfulError, UsageError, first_line
from tdkit.layers.evidence import Evidence

Floats = NDArray[np.float64]

# Of relative errors: at the square root of this a layer counts as dead.
_DEAD = 1 - 1e-6


def _logarithm(errors: Floats) -> Floats:
    squares = np.square(np.minimum(errors, 1e100))
    within = np.minimum(squares, _DEAD)
    # Beyond it goes on along the tangent: worse than dead is worse.
    result: Floats = -np.log1p(-within) + (squares - within) / (1 - _DEAD)
    return result


def _relative_to_largest(errors: Floats) -> Floats:
    return errors / (errors[np.isfinite(errors)].max(initial=0.0) or 1.0)


PENALTIES: Mapping[str, Callable[[Floats], Floats]] = {
    "logarithm": _logarithm,
    "squares": lambda errors: np.square(_relative_to_largest(errors)),
    "itself": _relative_to_largest,
}
"""The laws that an error may add up by, each a rising function of errors of at least 0.

``logarithm`` is minus the logarithm of 1 - e², the share of the energy that is kept, so that their
sum is that of the kept shares' product: unlike e² it does not forgive a layer that is dead. It is
for errors relative to what they approximate. The others are relative to the largest error, so that
nothing over- or underflows.
"""


@dataclass(frozen=True)
class Difference:
    """An original and its approximation, as a metric sees them.

    Attributes:
        error: The Frobenius norm of the difference.
        norm: That of the original.
        size: How many elements the original has.
        evidence: What else is known about the layer.
        tensors: Gives the original and the approximation, float64 and of the same shape: for
            weights torch's layout of the layer, for features (channels, ...) of one sample.
    """

    error: float
    norm: float
    size: int
    evidence: Evidence = field(default=Evidence(), compare=False)
    tensors: Callable[[], tuple[Tensor, Tensor]] | None = field(default=None, compare=False)

    @cached_property
    def tensor(self) -> Tensor:
        """The original minus its approximation, float64, of any shape."""
        original, approximation = self.both
        return original - approximation

    @cached_property
    def both(self) -> tuple[Tensor, Tensor]:
        """The original and its approximation, float64, of any shape."""
        assert self.tensors is not None, "whoever makes a difference for a metric gives its tensors"
        return self.tensors()


@dataclass(frozen=True)
class Metric:
    """An approximation error, and its law: a number of at least 0 that adds up by a penalty.

    Attributes:
        name: As registered.
        target: ``weights``, or ``features`` (the layer's output; averaged over samples).
        value: Maps the Frobenius norm of the difference, the norm of the original and its number
            of elements to the error.
        compare: Instead of ``value``, maps a :class:`Difference` to the error; it may look at the
            tensors and at the evidence.
        penalty: By what the error adds up over layers, one of :data:`PENALTIES`. Planner and study
            rank by it.
        needs: What evidence ``compare`` looks at, such as ``moments``.

    Raises:
        UsageError: If the penalty is not one of these, or not exactly one of ``value`` and
            ``compare`` is given.
    """

    name: str
    target: Literal["weights", "features"]
    value: Callable[[float, float, int], float] | None = None
    compare: Callable[[Difference], float] | None = None
    penalty: str = "squares"
    needs: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.penalty not in PENALTIES:
            raise UsageError(
                f"the metric {self.name} adds up by {self.penalty!r}, which is no penalty",
                f"it is {', '.join([*PENALTIES][:-1])} or {[*PENALTIES][-1]}",
            )
        if (self.value is None) == (self.compare is None):
            raise UsageError(
                f"the metric {self.name} needs a value of norms, or a compare of a difference",
                "give one of the two",
            )

    def adding_up_by(self, penalty: str | None) -> Metric:
        """The same error under another law; as it is for None.

        Raises:
            UsageError: If there is no such penalty.
        """
        return self if penalty is None else replace(self, penalty=penalty)

    def of(self, difference: Difference) -> float:
        """The error of an approximation, not yet held against the law; see :meth:`check`.

        Raises:
            UnlawfulError: If the metric fails; the message names it.
        """
        try:
            if self.compare is not None:
                return float(self.compare(difference))
            assert self.value is not None
            return float(self.value(difference.error, difference.norm, difference.size))
        except (MemoryError, torch.OutOfMemoryError, TdkitError):
            raise
        except Exception as error:  # a plugin may fail in any way
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise UnlawfulError(f"the metric {self.name} fails: {reason}") from error

    def check(self, error: float) -> float:
        """Hold an error against the law.

        Raises:
            UnlawfulError: If it is negative, infinite or no number; the message names the metric.
        """
        if not (math.isfinite(error) and error >= 0):
            raise UnlawfulError(
                f"the metric {self.name} gives {error:g}, and an error is finite and at least 0",
                "larger is worse: of a ratio in dB, for instance, take the inverse as a number",
            )
        return error


def penalties(errors: Iterable[float] | Floats, law: str) -> Floats:
    """What each error adds to the sum that a planner keeps small.

    Args:
        errors: Any shape.
        law: One of :data:`PENALTIES`.

    Returns:
        The same shape, float64; NaN where an error is not a finite number.

    Raises:
        UsageError: If an error is negative.
    """
    values = np.asarray([*errors] if not isinstance(errors, np.ndarray) else errors, np.float64)
    known = np.isfinite(values)
    if (values[known] < 0).any():
        raise UsageError(
            f"an error of {values[known].min():g} cannot guide a planner: errors are at least 0"
        )
    return PENALTIES[law](np.where(known, values, np.nan))


def absolute(error: float, norm: float, size: int) -> float:
    """The norm of the difference."""
    return error


def relative(error: float, norm: float, size: int) -> float:
    """The norm of the difference over the norm of the original; 0 / 0 is 0."""
    return error / norm if norm > 0 else 0.0


def scaled(error: float, norm: float, size: int) -> float:
    """The norm of the difference over the number of elements."""
    return error / size
