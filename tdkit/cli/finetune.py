"""``tdkit finetune``: train a model further."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Optional

import typer

from tdkit.cli import options
from tdkit.cli.fitting import PATIENCE


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
    ] = 10,
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
    ] = PATIENCE,
    autocast: Annotated[
        str, typer.Option(help="Precision of the forward pass: none (float32) or bfloat16.")
    ] = "none",
    resume: options.Resume = None,
    arch: options.Arch = None,
    weights: options.Weights = None,
    allow_class: options.AllowClass = None,
    unsafe_load: options.UnsafeLoad = False,
    input_shape: options.InputShape = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    json: options.Json = False,
    force: options.Force = False,
) -> None:
    """Train all layers further, and keep the weights that validate best.

    Example: `tdkit finetune small.pt --data image-folder:images --epochs 10`
    """
    from tdkit.cli.common import Source, file_json, open_registry, open_with_data
    from tdkit.cli.display import note, say, stdout
    from tdkit.cli.finish import Destination, save
    from tdkit.cli.fitting import Finetuning
    from tdkit.training.settings import FinetuneSettings

    start = time.perf_counter()
    wishes = FinetuneSettings(epochs, learning_rate, batch_size, optimizer, patience, autocast)  # type: ignore[arg-type]
    classes = allow_class or ()
    source = Source(model, arch, weights, classes, unsafe_load, input_shape, device, seed)
    opened, dataset = open_with_data(source, open_registry(), data, data_root)
    default = f"{opened.name}-finetuned"
    destination = Destination.of(opened, output, default, format, force, inputs=[model])
    destination.check(with_plan=False)
    tuning = Finetuning.of(opened, dataset, wishes, seed, resume, inputs=[model])
    tuned = tuning.run(opened.model, quiet=json)
    after = tuning.accuracy(opened.model)
    plan, training = opened.loaded.plan, tuned.training
    save(opened, opened.model, destination, plan=plan, structure={}, training=training)
    seconds = time.perf_counter() - start
    if json:
        value = {
            **tuned.summary(),
            "seed": seed,
            "accuracy_before": tuned.accuracy,
            "accuracy_after": after,
            "accuracy_images": tuned.images,
            "seconds": round(seconds, 3),
            "output": str(destination.path),
            "format": destination.format,
        }
        stdout().out(file_json(value), end="")
    else:
        for line in tuned.lines(after):
            say(line)
        say(f"wrote {destination.path} ({destination.format}), {seconds:.0f} s in all")
    for text in opened.notes:
        note(text)
