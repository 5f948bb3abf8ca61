"""``tdkit apply``: a plan from a file, on a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from tdkit import defaults
from tdkit.cli import options


def apply(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file, as compress writes.")],
    model: options.Model,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="Where the model goes; MODEL-PLAN.pt if unset."),
    ] = None,
    format: options.Format = None,
    set: options.Set = None,
    arch: options.Arch = None,
    weights: options.Weights = None,
    allow_class: options.AllowClass = None,
    unsafe_load: options.UnsafeLoad = False,
    input_shape: options.InputShape = None,
    data: options.Data = None,
    data_root: options.DataRoot = None,
    calibration: options.Calibration = defaults.CALIBRATION,
    samples: options.Samples = defaults.SAMPLES,
    distill: options.Distill = None,
    finetune: options.Finetune = None,
    learning_rate: options.LearningRate = None,
    resume: options.Resume = None,
    batch_size: options.BatchSize = defaults.BATCH_SIZE,
    device: options.Device = defaults.DEVICE,
    json: options.Json = False,
    force: options.Force = False,
) -> None:
    """Apply a plan to a model, verify it, and report what it costs before and after.

    Example: `tdkit apply plan.json garipov -o small.pt`
    """
    import tdkit
    from tdkit.cli.display import note, remark, say
    from tdkit.cli.parsing import parse_settings
    from tdkit.cli.stopping import resumable, told_notes
    from tdkit.cli.telling import tell_compression, tell_unused_plugins

    settings = parse_settings(set)
    tell_unused_plugins()
    with resumable(resume, finetune is not None or distill is not None), told_notes():
        result = tdkit.apply(
            plan,
            model,
            settings=settings,
            calibration=calibration,
            input_shape=input_shape,
            data=data,
            data_root=data_root,
            samples=samples,
            arch=arch,
            weights=weights,
            allow_classes=allow_class or (),
            unsafe_load=unsafe_load,
            device=device,
            distill=distill,
            finetune=finetune,
            learning_rate=learning_rate,
            resume=resume,
            output=output or "auto",
            format=format,
            force=force,
            batch_size=batch_size,
            progress=True,
            say=remark if json else say,
            note=note,
        )
    tell_compression(result, json=json)
