"""``tdkit train``: train a registered model by a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from tdkit import defaults
from tdkit.cli import options


def train(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="A recipe file in TOML, or the name of one in recipes/ or, if that has none, "
            "of one that comes with tdkit.",
        ),
    ],
    output: Annotated[
        Optional[Path],  # noqa: UP045 - typer reads the annotation at run time on 3.10
        typer.Option("--output", "-o", help="Where the weights go; as in the recipe if unset."),
    ] = None,
    resume: options.Resume = None,
    data_root: options.DataRoot = None,
    device: options.Device = defaults.DEVICE,
    force: options.Force = False,
) -> None:
    """Train a model, and write its best weights with a JSON file on how they were made.

    Example: `tdkit train garipov-fashion-mnist`
    """
    import tdkit
    from tdkit.cli.display import say
    from tdkit.cli.stopping import resumable
    from tdkit.cli.telling import tell_unused_plugins

    tell_unused_plugins()
    with resumable(resume, True):
        done = tdkit.train(
            recipe,
            output=output,
            resume=resume,
            data_root=data_root,
            device=device,
            force=force,
            progress=True,
            say=say,
        )
    for line in done.lines():
        say(line)
