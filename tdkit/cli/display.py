"""What a person sees: tables, progress and how numbers are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table


def stdout() -> Console:
    """Where results go."""
    return Console(highlight=False)


def stderr() -> Console:
    """Where progress and remarks go, so that results can be piped."""
    return Console(stderr=True, highlight=False)


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with an ETA on stderr; yields what to call with units done and all units."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=stderr(), transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def table(title: str | None, *columns: str, right: Sequence[str] = ()) -> Table:
    """A plain table; the columns named in ``right`` hold numbers."""
    result = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in columns:
        result.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return result


def number(value: int | None) -> str:
    """1,234,567, or a dash."""
    return "–" if value is None else f"{value:,}"


def percent(part: float | None, whole: float | None) -> str:
    """A share such as 50.0 %, or a dash."""
    return "–" if part is None or not whole else f"{100 * part / whole:.1f} %"


def rank_text(rank: int | tuple[int, ...]) -> str:
    """A rank such as 12 or 12 x 8."""
    return " × ".join(map(str, rank)) if isinstance(rank, tuple) else str(rank)
