"""``tdkit.inspect``: every layer, and whether it can be compressed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tdkit import arguments
from tdkit.api.subject import Given, Model, open_subject
from tdkit.compression.scoring import unsupported_by_all
from tdkit.costs.uncounted import left_out, outside_macs
from tdkit.layers.counting import model_parameters
from tdkit.layers.inventory import Layer
from tdkit.layers.traced import TracedModel
from tdkit.registry import load_registry, resolve_methods
from tdkit.tables import Table, number, sizes


@dataclass(frozen=True)
class Inspection:
    """What is in a model.

    Attributes:
        layers: All convolutional and linear layers; each has the reason why it cannot be
            compressed, or None.
        parameters: Of the whole model.
        macs_outside: Multiply-accumulates per sample outside of these layers; None when unknown.
        shape: The shape of one input; None when nothing tells it.
        notes: What the user should know.
    """

    layers: tuple[Layer, ...]
    parameters: int
    macs_outside: int | None
    shape: tuple[int, ...] | None
    notes: tuple[str, ...]

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates per sample of all layers; None when the model was not run."""
        counts = [layer.macs for layer in self.layers if layer.macs is not None]
        return sum(counts) if counts else None

    @property
    def compressible(self) -> int:
        """Parameters of the layers that can be compressed."""
        return sum(layer.parameters for layer in self.layers if layer.reason is None)

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def table(self) -> Table:
        """A row for each layer."""
        numbers = ("parameters", "MACs")
        rows = tuple(map(_row, self.layers))
        return Table(
            ("layer", "kind", "weight", *numbers, "compressible"), rows, frozenset(numbers)
        )

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "parameters": self.parameters,
            "macs": self.macs,
            "macs_outside": self.macs_outside,
            "layers": [_json(layer) for layer in self.layers],
        }


def inspect(
    model: Model,
    *,
    layers: str | Sequence[str] = (),
    include_ends: bool = False,
    input_shape: str | Sequence[int] | None = None,
    example_inputs: Any = None,
    arch: str | None = None,
    weights: str | None = None,
    allow_classes: str | Sequence[str] = (),
    unsafe_load: bool = False,
    device: str | None = None,
) -> Inspection:
    """List a model's layers: kind, weight, parameters, MACs, compressible or why not.

    Args:
        model: A module, which stays as it is; a model file; or a registered name.
        layers: Shell patterns of layer names; the others count as not selected.
        include_ends: Consider the first and the last layer too.
        input_shape: The shape of one sample; MACs need it, or ``example_inputs``.
        example_inputs: Arguments of a forward pass, tensors of any shape; see :func:`compress`.
        arch: The architecture of a state_dict.
        weights: Weights of a registered model.
        allow_classes: Classes of yours that the file may hold.
        unsafe_load: Run whatever code the file holds.
        device: Where to work.

    Raises:
        UsageError: If an option is wrong, or a pattern matches no layer.
        UnsupportedError: If the model cannot be copied or run.
        TdkitError: Of the kind that fits what is wrong with a file.
    """
    registry = load_registry()
    given = Given(
        arch,
        weights,
        allow_classes,
        unsafe_load,
        input_shape,
        None if example_inputs is None else arguments.example(example_inputs),
        device=device,
    )
    subject = open_subject(model, registry, given)
    patterns = arguments.names(layers, "layers")
    traced = TracedModel.of(
        subject.model,
        subject.inputs(),
        patterns=patterns,
        include_ends=include_ends,
        readonly=True,
    )
    methods = resolve_methods(registry, list(registry.decompositions))
    found = [replace(x, reason=x.reason or unsupported_by_all(x, methods)) for x in traced.layers]
    sample = traced.sample
    outside = None if sample is None else outside_macs(traced.model, found, sample)
    told = None if sample is None else left_out(outside, found)
    return Inspection(
        layers=tuple(found),
        parameters=model_parameters(traced.model),
        macs_outside=outside,
        shape=subject.opened.shape,
        notes=(*([told] if told else []), *subject.opened.notes, *traced.notes),
    )


def _row(layer: Layer) -> tuple[str, ...]:
    names = " = ".join((layer.name, *layer.aliases))
    weight = sizes(layer.spec.weight_shape) if layer.spec else "–"
    answer = "yes" if layer.reason is None else f"no: {layer.reason}"
    return names, layer.kind, weight, number(layer.parameters), number(layer.macs), answer


def _json(layer: Layer) -> dict[str, Any]:
    return {
        "name": layer.name,
        "aliases": list(layer.aliases),
        "kind": layer.kind,
        "weight": list(layer.spec.weight_shape) if layer.spec else None,
        "parameters": layer.parameters,
        "macs": layer.macs,
        "reason": layer.reason,
    }
