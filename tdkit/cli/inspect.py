"""``tdkit inspect``: every layer, and whether it can be compressed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tdkit import defaults
from tdkit.cli import options

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.table import Table

    from tdkit.api.inspect import Inspection


def inspect(
    model: options.Model,
    arch: options.Arch = None,
    weights: options.Weights = None,
    allow_class: options.AllowClass = None,
    unsafe_load: options.UnsafeLoad = False,
    input_shape: options.InputShape = None,
    layers: options.Layers = None,
    include_ends: options.IncludeEnds = False,
    device: options.Device = defaults.DEVICE,
    json: options.Json = False,
) -> None:
    """Print every layer: kind, weight, parameters, MACs, compressible or why not.

    Example: `tdkit inspect resnet18 --weights none`
    """
    import tdkit
    from tdkit.cli.display import stdout
    from tdkit.cli.parsing import file_json
    from tdkit.cli.telling import tell_notes, tell_unused_plugins

    tell_unused_plugins()
    found = tdkit.inspect(
        model,
        layers=layers or (),
        include_ends=include_ends,
        input_shape=input_shape,
        arch=arch,
        weights=weights,
        allow_classes=allow_class or (),
        unsafe_load=unsafe_load,
        device=device,
    )
    if json:
        stdout().out(file_json(found.to_json()), end="")
    else:
        _print(found)
    tell_notes(found.notes)


def _print(found: Inspection) -> None:
    from tdkit.cli.display import fits, number, percent, say, show, sizes

    view, footnotes = _table(found, {}), []
    if not fits(view):
        reasons = dict.fromkeys(layer.reason for layer in found.layers if layer.reason)
        marks = {reason: f"[{place}]" for place, reason in enumerate(reasons, start=1)}
        view = _table(found, {f": {reason}": f" {mark}" for reason, mark in marks.items()})
        footnotes = ["", *(f"{mark} {reason}" for reason, mark in marks.items())]
    show(view)
    for line in footnotes:
        say(line)
    say(
        f"\n{len(found.layers)} layers; {number(found.parameters)} parameters,"
        f" {percent(found.compressible, found.parameters)} of them compressible"
    )
    if found.shape is None:
        say("MACs need the shape of one input: --input-shape C,H,W")
    else:
        say(f"{number(found.macs)} MACs for one input of {sizes(found.shape)}")


def _table(found: Inspection, marks: Mapping[str, str]) -> Table:
    """One row per layer; a reason that has a mark stands outside the table."""
    from tdkit.cli.display import table

    plain = found.table()
    view = table(None, *plain.columns, right=tuple(plain.right))
    for row in plain.rows:
        answer = row[-1]
        for reason, mark in marks.items():
            answer = f"no{mark}" if answer == f"no{reason}" else answer
        view.add_row(*row[:-1], answer, style=None if answer == "yes" else "dim")
    return view
