"""What a person sees: tables, progress and how numbers are written."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from typing import TextIO

from rich.console import Console, JustifyMethod
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

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


@contextmanager
def progress_bar(title: str, then: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with an ETA on stderr, if that is a terminal.

    Args:
        title: What is counted.
        then: What follows when all units are done.

    Yields:
        What to call with the units done and all units.
    """
    console = stderr()
    if not console.is_terminal:
        yield lambda done, total: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(
        *columns,
        console=console,
        transient=True,
        # Units may take minutes: the ETA follows the speed of the last hour.
        speed_estimate_period=3600,
    ) as progress:
        task = progress.add_task(title, total=None)

        def update(done: int, total: int) -> None:
            text = title if done < total else then
            progress.update(task, completed=done, total=total, description=text)

        yield update


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


def number(value: int | None) -> str:
    """1,234,567, or a dash."""
    return "–" if value is None else f"{value:,}"


def percent(part: float | None, whole: float | None) -> str:
    """A share such as 50.0 %, or a dash."""
    return "–" if part is None or not whole else f"{100 * part / whole:.1f} %"


def sizes(values: int | Sequence[int]) -> str:
    """A rank or a shape, such as 12 or 64×3×3×3."""
    return str(values) if isinstance(values, int) else "×".join(map(str, values))
