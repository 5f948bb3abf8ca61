"""A model that was looked at once, and is handed on through all that is done with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tdkit.errors import UnsupportedError
from tdkit.forward.copying import own_copy, plain_module, refuse_lazy, refuse_uncopyable
from tdkit.forward.inputs import Inputs, readings
from tdkit.forward.placement import device_of
from tdkit.forward.trace import Calls, trace
from tdkit.layers.inventory import Layer, find_layers, weight_layers
from tdkit.layers.weights import ModuleWeights, Weights


@dataclass(frozen=True)
class TracedModel:
    """A model to work on, with what one look at it told. Nothing else runs it for the first time.

    Attributes:
        model: An own copy, unless it was given away; it may be changed in place.
        weights: The dense weights of its layers, whatever happens to ``model``.
        layers: All its convolutional and linear layers.
        inputs: Arguments of a forward pass as the user nests them; None where they are unknown.
        sample: The same with one sample, or as they are where the model does not run on one.
        form: Which of the :func:`~tdkit.forward.inputs.readings` of a value the model takes.
        notes: What the user should know about the inputs.
    """

    model: nn.Module
    weights: Weights
    layers: tuple[Layer, ...]
    inputs: Inputs | None = None
    sample: Inputs | None = None
    form: int = 0
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        model: nn.Module,
        example: Any = None,
        *,
        patterns: Sequence[str] = (),
        include_ends: bool = False,
        inplace: bool = False,
        readonly: bool = False,
        weights: Weights | None = None,
    ) -> TracedModel:
        """Copy a model, run it once where there are inputs for it, and list its layers.

        Args:
            model: Any module; it stays as it is unless ``inplace``.
            example: Arguments of a forward pass, nested in any way; tensors of any shape.
            patterns: Shell patterns of the layers to consider; all by default.
            include_ends: Let the first and the last layer be factorized too.
            inplace: Work on the model itself, or on the plain one inside its wrapper.
            readonly: Only look: a model of which there can be no copy will do.
            weights: Where the layers' weights are, if not in the model, which may then be on the
                meta device.

        Raises:
            UsageError: If it is no module, or a pattern matches no layer.
            UnsupportedError: If the model cannot be copied or run, or has no parameters.
        """
        plain = plain_module(model)
        if not readonly:
            refuse_uncopyable(plain)
        own = plain if inplace or readonly else own_copy(plain)
        found = _run(own, example)
        layers = find_layers(
            own, calls=found.calls, patterns=patterns, include_ends=include_ends, weights=weights
        )
        return cls(
            model=own,
            weights=weights or ModuleWeights(plain),
            layers=tuple(layers),
            inputs=found.inputs,
            sample=found.sample,
            form=found.form,
            notes=found.notes,
        )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return device_of(self.model)

    def read(self, value: Any) -> Inputs:
        """A batch as the model takes it, in the form that its example inputs had.

        Args:
            value: Tensors of any shape, however nested.
        """
        found = readings(value)
        return found[min(self.form, len(found) - 1)]


@dataclass(frozen=True)
class _Run:
    """How a model takes an example.

    Attributes:
        inputs: The example as arguments.
        sample: What it was run on: one sample, or all where one alone does not run.
        form: Which of the readings of the example it is.
        calls: How that called the layers.
    """

    inputs: Inputs | None = None
    sample: Inputs | None = None
    form: int = 0
    calls: Calls | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        if self.inputs is None or self.sample is None or self.sample.batch == 1:
            return ()
        batch = self.inputs.batch
        if batch is None:
            return ()
        text = "the model does not run on one sample of its inputs alone: MACs are those of all"
        return (f"{text} {batch}",)


def _run(model: nn.Module, example: Any) -> _Run:
    """Run a model on an example, cut to one sample if that runs, in the form in which it does."""
    if example is None:
        return _Run()
    refuse_lazy(model)
    modules, first = list(weight_layers(model)), None
    for form, inputs in enumerate(readings(example)):
        for sample in (inputs.first_sample(), inputs):
            try:
                return _Run(inputs, sample, form, trace(model, modules, sample))
            except UnsupportedError as error:
                first = first or error
    assert first is not None
    raise first
