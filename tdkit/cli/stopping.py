"""Ctrl-C and SIGTERM, as an exception."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class StoppedError(BaseException):
    """A signal, as an exception, so that every half-written file is removed on the way out.

    Neither a KeyboardInterrupt, which typer answers itself, nor a SystemExit, which is what plugins
    and architectures are forgiven when they are imported.

    Attributes:
        number: Of the signal.
        said: What the user is told. Commands that can go on later say so.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.said = "no half-written file is left"


@contextmanager
def told_notes() -> Iterator[None]:
    """Tell the notes on whatever is raised meanwhile."""
    from tdkit.cli.display import remark

    try:
        yield
    except BaseException as error:
        for text in getattr(error, "__notes__", ()):
            remark(text)
        raise


@contextmanager
def resumable(resume: Path | None, training: bool) -> Iterator[None]:
    """Tell whoever stops a training how it goes on.

    Args:
        resume: The file that its state is kept in.
        training: Whether there is a training at all.
    """
    try:
        yield
    except StoppedError as stop:
        if training and resume is None:
            stop.said += "; with --resume FILE a training can go on after a stop"
        elif resume is not None and resume.exists():
            stop.said = f"the same command goes on after the last epoch, from {resume}"
        raise
