"""Fitting a compressed model to inputs: BatchNorm's statistics, and the factors themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tdkit.calibration.batchnorm import (
    Statistics,
    has_statistics,
    norm_statistics,
    shift_statistics,
)
from tdkit.calibration.noise import noise_batches
from tdkit.compression.plan import Plan
from tdkit.compression.refit import Observed, Part, refit
from tdkit.errors import UnsupportedError, first_line
from tdkit.forward.inputs import Inputs
from tdkit.layers.inventory import Layer
from tdkit.layers.traced import TracedModel
from tdkit.layers.weights import is_finite


@dataclass(frozen=True)
class Step:
    """One step on the way to a compressed model.

    Attributes:
        name: What was done.
        divergence: How far the model's outputs are then from the dense ones, on inputs that
            nothing was fitted to; see :func:`tdkit.calibration.divergence.divergence`.
    """

    name: str
    divergence: float


@dataclass(frozen=True)
class Calibrated:
    """What became of a compressed model.

    Attributes:
        steps: In order; the last one made the model. None where it saw no inputs.
        uncalibrated: Why BatchNorm stays as it is, where the plan asks for more.
        notes: What the user should know.
    """

    steps: tuple[Step, ...] = ()
    uncalibrated: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Calibrating:
    """What a dense model made of the inputs that its compression is fitted to.

    Attributes:
        statistics: Of BatchNorm.
        seen: What its layers and itself returned; None where factors stay as they are.
        effort: The plan's.
    """

    statistics: _Statistics
    seen: Observed | None
    effort: str

    @classmethod
    def of(
        cls, traced: TracedModel, layers: Sequence[Layer], plan: Plan, data: Sequence[Any]
    ) -> Calibrating:
        """Look at a dense model while it is one.

        Args:
            traced: The model.
            layers: Those that are to be replaced.
            plan: Says what is fitted to what.
            data: Model inputs, tensors of any shape, for a plan that is calibrated on data.

        Raises:
            UsageError: If there are none and the plan needs them.
            UnsupportedError: If the model does not run on them.
        """
        statistics = _Statistics.of(traced, plan.calibration, data)
        if plan.calibration != "data" or plan.effort == "fast" or not layers:
            return cls(statistics, None, plan.effort)
        batches = _in_tenths(traced, [traced.read(batch) for batch in data])
        return cls(statistics, Observed.of(traced.model, layers, batches, plan.seed), plan.effort)

    def finish(
        self,
        model: nn.Module,
        parts: Mapping[str, Part],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Calibrated:
        """Fit a compressed model in place; what makes it worse is taken back.

        Args:
            model: The compressed model.
            parts: Its replaced layers, by name.
            progress: Called with the layers that are done and all of them.
        """
        if self.seen is None or not parts:
            return Calibrated(uncalibrated=self.statistics.shift(model))
        seen = self.seen
        plain = _state(model, parts)
        uncalibrated = self.statistics.shift(model)
        steps = [Step("BatchNorm" if self.statistics.before else "factors", seen.divergence(model))]
        shifted = _state(model, parts)
        _restore(plain)
        found = refit(model, parts, seen, activations=self.effort == "best", progress=progress)
        after = seen.divergence(model)
        notes = found.notes()
        if not after <= steps[0].divergence or not all(map(is_finite, plain)):
            _restore(shifted)
            note = "the refit is taken back: it made the outputs worse on inputs held back"
            return Calibrated(tuple(steps), uncalibrated, (note, *notes))
        return Calibrated((*steps, Step("refit", after)), None, notes)


_State = dict[Tensor, Tensor]


def _state(model: nn.Module, parts: Mapping[str, Part]) -> _State:
    """Copies of all that a fit changes, by the tensors themselves."""
    owned = [t for name in parts for t in model.get_submodule(name).parameters()]
    return {tensor: tensor.detach().clone() for tensor in [*owned, *model.buffers()]}


def _restore(state: _State) -> None:
    with torch.no_grad():
        for tensor, value in state.items():
            tensor.copy_(value)


def _in_tenths(traced: TracedModel, batches: Sequence[Inputs]) -> list[Inputs]:
    """Batches of which a tenth can be held back: a single one is cut if the model can be cut so."""
    size = batches[0].batch if len(batches) == 1 else None
    alone = traced.sample is not None and traced.sample.batch == 1
    return batches[0].parts(10) if size is not None and size > 1 and alone else list(batches)


@dataclass(frozen=True)
class _Statistics:
    """What BatchNorm layers were given in the dense model, or why that is not known."""

    batches: tuple[Inputs, ...] = ()
    before: Statistics | None = None
    unknown: str | None = None

    @classmethod
    def of(cls, traced: TracedModel, how: str, data: Sequence[Any]) -> _Statistics:
        if how == "none" or not has_statistics(traced.model):
            return cls()
        if how == "data":
            batches = tuple(traced.read(batch) for batch in data)
            return cls(batches, norm_statistics(traced.model, batches))
        if traced.inputs is None:
            return cls(unknown="the shape of the model's input is unknown")
        image = traced.inputs.image
        if image is None:
            return cls(unknown="the model's input is no image that noise could stand for")
        noise = tuple(Inputs((batch,)) for batch in noise_batches(image))
        try:
            return cls(noise, norm_statistics(traced.model, noise))
        except (UnsupportedError, MemoryError, torch.OutOfMemoryError) as error:
            # A model may take no other batch than the one it was shown.
            return cls(unknown=f"on noise, {first_line(error)}")

    def shift(self, compressed: nn.Module) -> str | None:
        """Fit BatchNorm in place; why it stays as it is where that is not what was asked."""
        if self.before is not None:
            shift_statistics(compressed, self.before, self.batches)
        return self.unknown
