"""Ctrl-C and SIGTERM, as an exception."""

from __future__ import annotations


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
