"""What a person sees: tables, progress and how numbers are written."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from typing import TextIO

from rich.console import Console, JustifyMethod
from rich.measure import Measurement
from rich.table import Table

from tdkit.tables import number, percent, sizes

__all__ = [
    "fits", "note", "number", "percent", "remark", "results_apart", "say", "show", "sizes",
    "stderr", "stdout", "table", "waiting",
]  # fmt: skip

_results: ContextVar[TextIO | None] = ContextVar("results", default=None)


@contextmanager
def results_apart() -> Iterator[None]:
    """Keep stdout for results: what models, plugins and libraries print goes to stderr."""
    # There is none where the shell has closed it.
    before = _results.set(sys.stdout or io.StringIO())
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _results.reset(before)


def stdout() -> Console:
    """Where results go. Names of layers and files are text, never markup."""
    return Console(file=_results.get(), highlight=False, markup=False, emoji=False)


def stderr() -> Console:
    """Where progress and remarks go, so that results can be piped."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def say(text: str) -> None:
    """Print a line of results; lines are never broken, so that paths in them can be copied."""
    stdout().print(text, soft_wrap=True)


def remark(text: str) -> None:
    """Print a line on stderr."""
    stderr().print(text, soft_wrap=True)


def note(text: str) -> None:
    """Print what the user should know on stderr."""
    remark(f"note: {text}")


@contextmanager
def waiting(title: str) -> Iterator[None]:
    """A spinner on stderr, if that is a terminal."""
    console = stderr()
    if not console.is_terminal:
        yield
        return
    with console.status(title):
        yield


def table(title: str | None, *columns: str, right: Sequence[str] = ()) -> Table:
    """A plain table; the columns named in ``right`` hold numbers, only the last one may wrap."""
    result = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for place, column in enumerate(columns, start=1):
        justify: JustifyMethod = "right" if column in right else "left"
        result.add_column(column, justify=justify, overflow="fold", no_wrap=place < len(columns))
    return result


def show(view: Table) -> None:
    """Print a table whole: wider than the terminal rather than cut, and unbroken into a pipe."""
    console = stdout()
    needed = _measure(console, view)
    console.width = needed.maximum if _piped(console) else max(console.width, needed.minimum)
    console.print(view)


def fits(view: Table) -> bool:
    """Whether a table can be printed without breaking a line."""
    console = stdout()
    return _piped(console) or _measure(console, view).maximum <= console.width


def _measure(console: Console, view: Table) -> Measurement:
    return Measurement.get(console, console.options.update(max_width=10_000), view)


def _piped(console: Console) -> bool:
    return not console.is_terminal and "COLUMNS" not in os.environ
