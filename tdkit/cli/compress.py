"""``tdkit compress``: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from tdkit import defaults
from tdkit.cli import options


def compress(
    model: options.Model,
    budget: Annotated[
        str,
        typer.Option("--budget", "-b", help="Fraction of the model that may remain: 0.5 or 50%."),
    ] = str(defaults.BUDGET),
    cost: Annotated[
        str, typer.Option(help="What the budget counts: params, macs or a plugin's.")
    ] = defaults.COST,
    bound: options.Bound = None,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="Where the model goes; MODEL-BUDGET.pt if unset."),
    ] = None,
    format: options.Format = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan as JSON and write nothing.")
    ] = False,
    methods: options.Methods = None,
    set: options.Set = None,
    metric: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Error that guides the planner; else of weights, with data of outputs."),
    ] = None,
    penalty: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="What errors add up by: logarithm, squares, itself; else the metric's."),
    ] = None,
    planner: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="How to choose among candidates; greedy, with --bound exact, if unset."),
    ] = None,
    keeps: options.Keeps = None,
    calibration: options.Calibration = defaults.CALIBRATION,
    effort: Annotated[
        str, typer.Option(help="How hard to fit to data: fast, default or best.")
    ] = defaults.EFFORT,
    fold: Annotated[
        bool, typer.Option("--fold", help="Fold BatchNorms into layers; ranks get their share.")
    ] = False,
    samples: options.Samples = defaults.SAMPLES,
    distill: options.Distill = None,
    finetune: options.Finetune = None,
    learning_rate: options.LearningRate = None,
    resume: options.Resume = None,
    layers: options.Layers = None,
    include_ends: options.IncludeEnds = False,
    arch: options.Arch = None,
    weights: options.Weights = None,
    allow_class: options.AllowClass = None,
    unsafe_load: options.UnsafeLoad = False,
    input_shape: options.InputShape = None,
    data: options.Data = None,
    data_root: options.DataRoot = None,
    batch_size: options.BatchSize = defaults.BATCH_SIZE,
    device: options.Device = defaults.DEVICE,
    seed: options.Seed = defaults.SEED,
    json: options.Json = False,
    force: options.Force = False,
) -> None:
    """Compress a model to a budget, verify it, and report what it costs before and after.

    Example: `tdkit compress model.pt --budget 0.5 --input-shape 3,224,224 -o small.pt`
    """
    import tdkit
    from tdkit.cli.display import note, remark, say, stdout
    from tdkit.cli.parsing import (
        file_json,
        parse_bounds,
        parse_fraction,
        parse_keeps,
        parse_names,
        parse_settings,
    )
    from tdkit.cli.stopping import resumable, told_notes
    from tdkit.cli.telling import tell_compression, tell_notes, tell_unused_plugins

    fraction, names = parse_fraction(budget, "--budget"), parse_names(methods, "--methods")
    fractions, settings = parse_keeps(keeps), parse_settings(set)
    bounds = parse_bounds(bound)
    tell_unused_plugins()
    with resumable(resume, finetune is not None or distill is not None), told_notes():
        result = tdkit.compress(
            model,
            fraction,
            cost=cost,
            bounds=bounds,
            methods=names,
            settings=settings,
            metric=metric,
            penalty=penalty,
            planner=planner,
            calibration=calibration,
            effort=effort,
            fold=fold,
            keeps=fractions,
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
            distill=distill,
            finetune=finetune,
            learning_rate=learning_rate,
            resume=resume,
            output=None if dry_run else output or "auto",
            format=format,
            force=force,
            dry_run=dry_run,
            batch_size=batch_size,
            progress=True,
            say=remark if json else say,
            note=note,
        )
    if dry_run:
        stdout().out(file_json(result.plan.to_json()), end="")
        tell_notes(result.notes)
    else:
        tell_compression(result, json=json)
