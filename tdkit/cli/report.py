"""``tdkit report``: draw the conclusions of a study again, and print them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from tdkit.api.report import Study


def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run folder of tdkit validate, finished or not.")
    ],
    output: Annotated[
        Optional[Path],  # noqa: UP045 - typer reads the annotation at run time on 3.10
        typer.Option(
            "--output", "-o", metavar="DIR", help="Where the report goes; the run folder if unset."
        ),
    ] = None,
) -> None:
    """Render the report of a study again, without measuring anything.

    Example: `tdkit report runs/quick -o report/`
    """
    import tdkit
    from tdkit.cli.display import say, waiting

    with waiting("drawing conclusions"):
        study = tdkit.report(run, output=output)
    print_summary(study)
    say(f"\nwrote {study.report}")


def print_summary(study: Study) -> None:
    """Print what the report says first: the advice, tau by error, and the verdict on each keep."""
    from tdkit.cli.display import say, stdout
    from tdkit.cli.telling import show_table

    console = stdout()
    console.print(f"{study.analysis.title}\n")
    for title, table in study.tables():
        show_table(table, title)
        say("")
    for sentence in study.sentences():
        console.print(sentence)
