"""``tdkit score``: the approximation error of every candidate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from tdkit import defaults
from tdkit.cli import options


def score(
    model: options.Model,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="Where the candidates go; MODEL-scores.json if unset."),
    ] = None,
    metric: Annotated[
        str, typer.Option(metavar="NAME,...", help="Approximation errors; see tdkit plugins.")
    ] = defaults.METRIC,
    rule: Annotated[
        str, typer.Option(help="Ranks for a keep: best or proportional.")
    ] = defaults.RULE,
    samples: Annotated[
        int, typer.Option(min=1, help="Images for feature metrics.")
    ] = defaults.SCORE_SAMPLES,
    trade_off: Annotated[
        bool,
        typer.Option(
            "--trade-off", help="Score what compress considers, and print what is to be had of it."
        ),
    ] = False,
    methods: options.Methods = None,
    set: options.Set = None,
    keeps: options.Keeps = None,
    layers: options.Layers = None,
    include_ends: options.IncludeEnds = False,
    arch: options.Arch = None,
    weights: options.Weights = None,
    allow_class: options.AllowClass = None,
    unsafe_load: options.UnsafeLoad = False,
    input_shape: options.InputShape = None,
    data: options.Data = None,
    data_root: options.DataRoot = None,
    device: options.Device = defaults.DEVICE,
    seed: options.Seed = defaults.SEED,
    json: options.Json = False,
    force: options.Force = False,
) -> None:
    """Score every layer, method and keep; print the errors and save the candidates.

    Example: `tdkit score garipov --methods tucker,tt`
    """
    import tdkit
    from tdkit.cli.display import say, stdout
    from tdkit.cli.parsing import file_json, parse_keeps, parse_names, parse_settings
    from tdkit.cli.telling import show_table, tell_notes, tell_unused_plugins

    names = parse_names(methods, "--methods")
    metrics = parse_names(metric, "--metric") or []
    fractions, settings = parse_keeps(keeps), parse_settings(set)
    tell_unused_plugins()
    scores = tdkit.score(
        model,
        metrics,
        rule=rule,
        methods=names,
        settings=settings,
        keeps="compress" if trade_off and fractions is None else fractions,
        layers=layers or (),
        include_ends=include_ends,
        input_shape=input_shape,
        data=data,
        data_root=data_root,
        samples=samples,
        arch=arch,
        weights=weights,
        allow_classes=allow_class or (),
        unsafe_load=unsafe_load,
        device=device,
        seed=seed,
        output=output or "auto",
        force=force,
        progress=True,
    )
    curve = scores.trade_off(metric=scores.metrics[0]) if trade_off else None
    if json:
        stdout().out(file_json((curve or scores).to_json()), end="")
    else:
        if curve is not None:
            show_table(curve.table())
        for name in scores.metrics if curve is None else ():
            show_table(scores.table(name), name)
        say(f"\nwrote {scores.written}, {len(scores.candidates)} candidates")
    tell_notes(scores.notes)
