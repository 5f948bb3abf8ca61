"""``tdkit inspect``: every layer, and whether it can be compressed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tdkit.cli import options

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.table import Table

    from tdkit.layers.inventory import Layer


def inspect(
    model: options.Model,
    arch: options.Arch = None,
    weights: options.Weights = None,
    allow_class: options.AllowClass = None,
    unsafe_load: options.UnsafeLoad = False,
    input_shape: options.InputShape = None,
    layers: options.Layers = None,
    include_ends: options.IncludeEnds = False,
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Print every layer: kind, weight, parameters, MACs, compressible or why not.

    Example: `tdkit inspect resnet18 --weights none`
    """
    from dataclasses import replace

    from tdkit.cli.common import Source, file_json, open_model, open_registry
    from tdkit.cli.display import note, stdout
    from tdkit.compression.scoring import unsupported_by_all
    from tdkit.costs.uncounted import left_out, outside_macs
    from tdkit.forward.inputs import one_sample
    from tdkit.layers.counting import model_parameters
    from tdkit.layers.inventory import find_layers
    from tdkit.registry import resolve_methods

    registry = open_registry()
    source = Source(model, arch, weights, allow_class or (), unsafe_load, input_shape, device)
    opened = open_model(source, registry)
    methods = resolve_methods(registry, list(registry.decompositions))
    inputs = one_sample(opened.inputs())
    found = [
        replace(layer, reason=layer.reason or unsupported_by_all(layer, methods))
        for layer in find_layers(
            opened.model,
            inputs=inputs,
            patterns=layers or (),
            keep_ends=not include_ends,
        )
    ]
    total = model_parameters(opened.model)
    outside = None if inputs is None else outside_macs(opened.model, found, inputs)
    if json:
        value = {
            "parameters": total,
            "macs": _sum_macs(found),
            "macs_outside": outside,
            "layers": [_row(layer) for layer in found],
        }
        stdout().out(file_json(value), end="")
    else:
        _print(found, total, opened.shape)
    told = None if inputs is None else left_out(outside, found)
    for text in (told, *opened.notes):
        if text is not None:
            note(text)


def _print(layers: list[Layer], total: int, shape: tuple[int, ...] | None) -> None:
    from tdkit.cli.display import fits, number, percent, say, show, sizes

    view, footnotes = _table(layers, {}), []
    if not fits(view):
        reasons = dict.fromkeys(layer.reason for layer in layers if layer.reason)
        marks = {reason: f"[{place}]" for place, reason in enumerate(reasons, start=1)}
        view = _table(layers, {reason: f" {mark}" for reason, mark in marks.items()})
        footnotes = ["", *(f"{mark} {reason}" for reason, mark in marks.items())]
    show(view)
    for line in footnotes:
        say(line)
    open_parameters = sum(layer.parameters for layer in layers if layer.reason is None)
    say(
        f"\n{len(layers)} layers; {number(total)} parameters,"
        f" {percent(open_parameters, total)} of them compressible"
    )
    if shape is None:
        say("MACs need the shape of one input: --input-shape C,H,W")
    else:
        say(f"{number(_sum_macs(layers))} MACs for one input of {sizes(shape)}")


def _table(layers: list[Layer], marks: Mapping[str, str]) -> Table:
    """One row per layer; a reason that has a mark stands outside the table."""
    from tdkit.cli.display import number, sizes, table

    numbers = ("parameters", "MACs")
    view = table(None, "layer", "kind", "weight", *numbers, "compressible", right=numbers)
    for layer in layers:
        names = " = ".join((layer.name, *layer.aliases))
        weight = sizes(layer.spec.weight_shape) if layer.spec else "–"
        reason = marks.get(layer.reason or "", f": {layer.reason}")
        answer, style = ("yes", None) if layer.reason is None else (f"no{reason}", "dim")
        row = (names, layer.kind, weight, number(layer.parameters), number(layer.macs), answer)
        view.add_row(*row, style=style)
    return view


def _sum_macs(layers: list[Layer]) -> int | None:
    counts = [layer.macs for layer in layers if layer.macs is not None]
    return sum(counts) if counts else None


def _row(layer: Layer) -> dict[str, Any]:
    return {
        "name": layer.name,
        "aliases": list(layer.aliases),
        "kind": layer.kind,
        "weight": list(layer.spec.weight_shape) if layer.spec else None,
        "parameters": layer.parameters,
        "macs": layer.macs,
        "reason": layer.reason,
    }
