"""How far a job is: a callback, or a bar on request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the units of it that are done, and all units (0: unknown)."""


@contextmanager
def listening(progress: Progress | bool) -> Iterator[Progress]:
    """What to call with the progress of a job.

    Args:
        progress: A callback; True for a bar on stderr, if that is a terminal; False for nothing.

    Yields:
        The callback.
    """
    if callable(progress):
        yield progress
    elif progress:
        with _bar() as update:
            yield update
    else:
        yield lambda stage, done, total: None


@contextmanager
def _bar() -> Iterator[Progress]:
    """A bar with an ETA for the stage at hand."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        yield lambda stage, done, total: None
        return
    with ExitStack() as stack:
        state: dict[str, Any] = {"stage": None}

        def update(stage: str, done: int, total: int) -> None:
            if stage != state["stage"]:
                # A bar of its own for each, and none while lines are printed in between.
                stack.close()
                state.update(stage=stage, bar=stack.enter_context(_columns(console)))
                state["task"] = state["bar"].add_task(stage, total=total or None)
            state["bar"].update(state["task"], completed=done, total=total or None)
            if total and done >= total:
                stack.close()
                state["stage"] = None

        yield update


def _columns(console: Any) -> Any:
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        transient=True,
        # Units may take minutes: the ETA follows the speed of the last hour.
        speed_estimate_period=3600,
    )
