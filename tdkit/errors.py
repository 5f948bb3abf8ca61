"""What can go wrong, as exceptions that carry their exit status and the user's next step."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


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
    close = difflib.get_close_matches(wanted, known, n=3, cutoff=0.4) or list(known)[:8]
    return UsageError(f"no {what} named {wanted!r}", f"close names: {', '.join(close)}")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
