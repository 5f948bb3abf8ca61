"""What can go wrong, as exceptions that carry their exit status and the user's next step."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol


class TdkitError(Exception):
    """Base of every error tdkit raises on purpose.

    Args:
        message: One sentence that names the file, layer or value and says what is wrong.
        hint: The next step for the user, or None when there is none.
    """

    exit_status = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(TdkitError):
    """A wrong option, name, budget, rank, plan or recipe."""

    exit_status = 2


class UnlawfulError(UsageError):
    """A metric, a cost or a planner that breaks what it promises; the message names it."""


class UnsafeFileError(TdkitError):
    """A file that would run code, or ask for absurd amounts of memory, when read."""

    exit_status = 3


class UnreadableFileError(TdkitError):
    """A file that is missing, damaged or not what it should be."""

    exit_status = 4


class UnsupportedError(TdkitError):
    """A model, layer or weight that tdkit cannot work on."""

    exit_status = 5


class StorageError(TdkitError):
    """An output that cannot be written."""

    exit_status = 6


def unknown_name(wanted: str, known: Sequence[str], what: str) -> UsageError:
    """The error for a name that is not there, with the close ones."""
    close = close_names(wanted, known) or list(known)[:8]
    return UsageError(f"no {what} named {wanted!r}", f"close names: {', '.join(close)}")


def close_names(wanted: str, known: Iterable[str]) -> list[str]:
    """The known names that somebody may have meant, the closest first; three at most."""
    return difflib.get_close_matches(wanted, list(known), n=3, cutoff=0.5)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class Spelling(Protocol):
    """How a door of tdkit, Python or the shell, writes what its users can say."""

    def option(self, key: str, value: object) -> str:
        """An option, such as ``budget=0.5``; None for the value leaves it open."""

    def command(self, name: str) -> str:
        """One of tdkit's jobs, such as ``tdkit.compress``."""


class PythonSpelling:
    """As Python is written."""

    def option(self, key: str, value: object) -> str:
        """``key=value``."""
        return f"{key}={'' if value is None else repr(value)}"

    def command(self, name: str) -> str:
        """The function's name."""
        return f"tdkit.{name}"


_PYTHON = PythonSpelling()
_SPELLING: ContextVar[Spelling] = ContextVar("spelling", default=_PYTHON)


@contextmanager
def spelled(spelling: Spelling) -> Iterator[None]:
    """Let messages that are made inside a block speak to the users of another door."""
    before = _SPELLING.set(spelling)
    try:
        yield
    finally:
        _SPELLING.reset(before)


def spelling() -> Spelling:
    """The one in force, to hand on to other processes and threads, which begin in Python's."""
    return _SPELLING.get()


def option(key: str, value: object = None) -> str:
    """An option as whoever reads the message writes it: ``input_shape=(3, 224, 224)`` in Python,
    ``--input-shape 3,224,224`` in the shell.

    Args:
        key: Its name in Python, which is the name of the thing itself.
        value: An example; None leaves it open.
    """  # noqa: D205
    return _SPELLING.get().option(key, value)


def command(name: str) -> str:
    """One of tdkit's jobs as whoever reads the message starts it.

    Args:
        name: Of the public function, such as ``inspect``.
    """
    return _SPELLING.get().command(name)


def noted(error: BaseException, text: str) -> None:
    """Put a note on an exception on its way, as ``add_note`` does, which Python 3.10 has not."""
    vars(error).setdefault("__notes__", []).append(text)
