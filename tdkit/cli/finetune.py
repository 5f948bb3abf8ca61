"""``tdkit finetune``: train a model further."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from tdkit import defaults
from tdkit.cli import options


def finetune(
    model: options.Model,
    data: options.Data = None,
    data_root: options.DataRoot = None,
    output: Annotated[
        Optional[Path],  # noqa: UP045 - typer reads the annotation at run time on 3.10
        typer.Option("--output", "-o", help="Where the model goes; MODEL-finetuned.pt if unset."),
    ] = None,
    epochs: Annotated[
        int, typer.Option(min=1, help="Passes over the training images, at most.")
    ] = defaults.EPOCHS,
    format: options.Format = None,
    learning_rate: options.LearningRate = None,
    batch_size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=2, help="Images per step; as in the training if unset."),
    ] = None,
    optimizer: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="sgd, adam or adamw; as in the training if unset."),
    ] = None,
    patience: Annotated[
        int, typer.Option(min=1, help="Stop after so many epochs that validate no better.")
    ] = defaults.PATIENCE,
    autocast: Annotated[
        str, typer.Option(help="Precision of the forward pass: none (float32) or bfloat16.")
    ] = defaults.AUTOCAST,
    resume: options.Resume = None,
    arch: options.Arch = None,
    weights: options.Weights = None,
    allow_class: options.AllowClass = None,
    unsafe_load: options.UnsafeLoad = False,
    input_shape: options.InputShape = None,
    seed: options.Seed = defaults.SEED,
    device: options.Device = defaults.DEVICE,
    json: options.Json = False,
    force: options.Force = False,
) -> None:
    """Train all layers further, and keep the weights that validate best.

    Example: `tdkit finetune small.pt --data image-folder:images --epochs 10`
    """
    import tdkit
    from tdkit.cli.display import note, remark, say, stdout
    from tdkit.cli.parsing import file_json
    from tdkit.cli.stopping import resumable
    from tdkit.cli.telling import tell_notes, tell_unused_plugins

    tell_unused_plugins()
    with resumable(resume, True):
        done = tdkit.finetune(
            model,
            data,
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            optimizer=optimizer,
            patience=patience,
            autocast=autocast,
            resume=resume,
            data_root=data_root,
            arch=arch,
            weights=weights,
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
            note=note,
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
