"""Names that come from a file, made fit to print."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def shown(value: object, limit: int = 80) -> str:
    """Text from a file without control characters, terminal escapes or endless lines.

    Args:
        value: What to show; turned into text with ``str``.
        limit: The longest text to return unabridged.
    """
    text = str(value)
    if not text.isprintable():
        text = ascii(text)[1:-1]
    return text if len(text) <= limit else text[: limit - 3] + "..."


def listed(names: Iterable[object], limit: int = 3) -> str:
    """The first few names, and how many more there are.

    Args:
        names: What to list.
        limit: How many names to spell out.
    """
    every = list(names)
    head = ", ".join(shown(name) for name in every[:limit])
    more = len(every) - limit
    return f"{head} and {more} more" if more > 0 else head
