"""Fitting a compressed model to inputs: BatchNorm's statistics, and the factors themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tdkit.calibration.batchnorm import (
    Calibration,
    Statistics,
    has_statistics,
    norm_statistics,
    shift_statistics,
)
from tdkit.calibration.noise import noise_batches
from tdkit.compression.plan import Plan
from tdkit.compression.refit import Observed, Part, Refitted, refit
from tdkit.compression.synthetic import synthetic_inputs
from tdkit.errors import UnsupportedError, first_line
from tdkit.forward.inputs import Inputs
from tdkit.layers.inventory import Layer
from tdkit.layers.traced import TracedModel
from tdkit.layers.weights import is_finite

# Inputs in one forward pass, at most.
_TOGETHER = 64


@dataclass(frozen=True)
class Step:
    """One step on the way to a compressed model.

    Attributes:
        name: What was done.
        divergence: How far the model's outputs are then from the dense ones, on inputs that no
            factor was fitted to; see :func:`tdkit.calibration.divergence.divergence`.
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
        errors: Of the layers that were fitted, see :class:`tdkit.compression.refit.Refitted`.
        divergence: Over all inputs that it was fitted to; infinite where there are none.
        instead: What BatchNorm is calibrated on where that is not what the plan says.
    """

    steps: tuple[Step, ...] = ()
    uncalibrated: str | None = None
    notes: tuple[str, ...] = ()
    errors: Mapping[str, float] = field(default_factory=dict)
    divergence: float = math.inf
    instead: Calibration | None = None


@dataclass(frozen=True)
class Calibrating:
    """What a dense model made of the inputs that its compression is fitted to.

    Attributes:
        statistics: Of BatchNorm.
        seen: What its layers and itself returned; None where factors stay as they are.
        effort: The plan's.
        notes: Why factors stay as they are although the plan asks for more.
        instead: What BatchNorm is calibrated on where that is not what the plan says.
    """

    statistics: _Statistics
    seen: Observed | None
    effort: str
    notes: tuple[str, ...] = ()
    instead: Calibration | None = None

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
        made, notes = _made(traced, plan)
        how, given = plan.calibration, data
        if how == "synthetic":
            how, given = ("data", made) if made else ("noise", ())
        statistics = _Statistics.of(traced, how, given)
        instead = how if plan.calibration == "synthetic" and not made else None
        if how != "data" or plan.effort == "fast" or not layers:
            return cls(statistics, None, plan.effort, notes, instead)
        # Made inputs are cut already, so that no mirror image of one held back is fitted to.
        batches = made or in_tenths(traced, [traced.read(batch) for batch in data], plan.seed)
        if len(batches) < 2:
            why = "the factors are not fitted to the data: no part of them can be held back"
            return cls(statistics, None, plan.effort, (why,))
        sample = traced.sample or batches[0]
        seen = Observed.of(traced.model, layers, batches, sample, plan.seed)
        if not seen.is_comparable:
            why = "the factors are not fitted to the data: the model returns no numbers"
            return cls(statistics, None, plan.effort, (why,))
        return cls(statistics, seen, plan.effort)

    def finish(
        self,
        model: nn.Module,
        parts: Mapping[str, Part],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Calibrated:
        """Fit a compressed model in place; what makes it worse is taken back.

        Args:
            model: The compressed model; where anything but an UnsupportedError is raised
                meanwhile, as it was.
            parts: Its replaced layers, by name.
            progress: Called with the layers that are done and all of them.

        Raises:
            UnsupportedError: If the model does not run on the inputs.
        """
        if self.seen is None or not parts:
            unknown = self.statistics.shift(model)
            return Calibrated(uncalibrated=unknown, notes=self.notes, instead=self.instead)
        plain = kept_state(model, parts)
        try:
            return self._fitted(model, parts, self.seen, plain, progress)
        except BaseException:
            restore(plain)
            raise

    def _fitted(
        self,
        model: nn.Module,
        parts: Mapping[str, Part],
        seen: Observed,
        plain: State,
        progress: Callable[[int, int], None],
    ) -> Calibrated:
        uncalibrated = self.statistics.shift(model)
        name = "BatchNorm" if self.statistics.before else "the factors"
        before = seen.divergences(model)
        shifted = kept_state(model, parts)
        restore(plain)
        try:
            found = refit(model, parts, seen, activations=self.effort == "best", progress=progress)
            why, after = None, seen.divergences(model)
        except UnsupportedError as error:
            found, why, after = Refitted({}), first_line(error), before
        if why is None and not all(map(is_finite, plain)):
            why = "not all numbers would be finite"
        elif why is None and after.is_worse(before):
            why = "on inputs held back the outputs were worse with it"
        first = Step(name, before.held_back)
        if why is not None:
            restore(shifted)
            told = f"the fit of the factors to the data is taken back: {why}"
            return Calibrated((first,), uncalibrated, (told, *found.notes()), {}, before.mean)
        steps = (first, Step("refit", after.held_back))
        return Calibrated(steps, None, found.notes(), found.errors, after.mean)


State = Mapping[Tensor, Tensor]
"""Copies of tensors of any shape, by the tensors themselves."""


def kept_state(model: nn.Module, parts: Iterable[str] = ()) -> State:
    """Copies of all that a fit changes, to put back.

    Args:
        model: A compressed model.
        parts: The names of its replaced layers.
    """
    changed: list[Tensor] = []
    for name in parts:
        changed += model.get_submodule(name).parameters()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            numbers = (module.running_mean, module.running_var, module.num_batches_tracked)
            changed += [each for each in numbers if each is not None]
    return {tensor: tensor.detach().clone() for tensor in changed}


def restore(state: State) -> None:
    """Put copies back.

    Args:
        state: From :func:`kept_state`.
    """
    with torch.no_grad():
        for tensor, value in state.items():
            tensor.copy_(value)


def _made(traced: TracedModel, plan: Plan) -> tuple[Sequence[Inputs], tuple[str, ...]]:
    """Inputs made from the model, and why there are none where that is worth a note."""
    if plan.calibration != "synthetic" or plan.effort == "fast":
        return (), ()
    try:
        return synthetic_inputs(traced, plan.seed % 2**63), ()
    except (UnsupportedError, MemoryError, torch.OutOfMemoryError) as error:
        return (), (f"noise stands in for inputs made from the model: {first_line(error)}",)


def in_tenths(traced: TracedModel, batches: Sequence[Inputs], seed: int) -> list[Inputs]:
    """Batches of which the last tenth can be held back.

    They are put in another order, since data often come sorted by class or length: images alone
    one by one, and cut anew, where the model takes any number of them, else whole batches.

    Args:
        traced: Tells whether it does.
        batches: Arguments of forward passes, tensors of any shape.
        seed: Of the order.
    """
    generator = torch.Generator().manual_seed(seed % 2**63)
    alone = traced.sample is not None and traced.sample.batch == 1
    images = [batch.image for batch in batches]
    known = [each for each in images if each is not None]
    if not alone or len(known) < len(batches) or len({each.shape[1:] for each in known}) > 1:
        return [batches[i] for i in torch.randperm(len(batches), generator=generator)]
    joined = torch.cat(known)
    mixed = joined[torch.randperm(len(joined), generator=generator)]
    size = min(_TOGETHER, max(len(each) for each in known), -(-len(mixed) // 10))
    return [Inputs((part,)) for part in mixed.split(max(1, size))]


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
