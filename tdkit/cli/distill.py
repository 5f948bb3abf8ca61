"""``tdkit distill``: a compressed model learns what the dense one makes of inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from tdkit import defaults
from tdkit.cli import options


def distill(
    model: options.Model,
    dense: Annotated[str, typer.Argument(metavar="DENSE", help="The model that it was made from.")],
    data: options.Data = None,
    data_root: options.DataRoot = None,
    output: Annotated[
        Optional[Path],  # noqa: UP045 - typer reads the annotation at run time on 3.10
        typer.Option("--output", "-o", help="Where the model goes; MODEL-distilled.pt if unset."),
    ] = None,
    distill: Annotated[
        str, typer.Option(metavar="EPOCHS|TIME", help="How long: 20, 60s or 2m.")
    ] = defaults.DISTILL,
    format: options.Format = None,
    learning_rate: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="The highest, which falls to zero; by the error at the start if unset."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Images of the data set.")] = defaults.SAMPLES,
    resume: options.Resume = None,
    arch: options.Arch = None,
    allow_class: options.AllowClass = None,
    unsafe_load: options.UnsafeLoad = False,
    input_shape: options.InputShape = None,
    seed: options.Seed = defaults.SEED,
    device: options.Device = defaults.DEVICE,
    json: options.Json = False,
    force: options.Force = False,
) -> None:
    """Let a compressed model learn the dense one's outputs, without labels.

    Example: `tdkit distill small.pt garipov --data fashion-mnist --distill 60s -o better.pt`
    """
    import tdkit
    from tdkit.cli.display import remark, say, stdout
    from tdkit.cli.parsing import file_json
    from tdkit.cli.stopping import resumable
    from tdkit.cli.telling import tell_notes, tell_unused_plugins

    tell_unused_plugins()
    with resumable(resume, True):
        done = tdkit.distill(
            model,
            dense,
            data,
            distill=distill,
            learning_rate=learning_rate,
            samples=samples,
            resume=resume,
            data_root=data_root,
            arch=arch,
            allow_classes=allow_class or (),
            unsafe_load=unsafe_load,
            input_shape=input_shape,
            device=device,
            seed=seed,
            output=output or "auto",
            format=format,
            force=force,
            progress=True,
            say=remark if json else say,
        )
    assert done.written is not None
    if json:
        stdout().out(file_json(done.to_json()), end="")
    else:
        for line in done.lines():
            say(line)
        file = done.written
        say(f"wrote {file.path} ({file.format}), {done.seconds:.0f} s in all")
    tell_notes(done.notes)
