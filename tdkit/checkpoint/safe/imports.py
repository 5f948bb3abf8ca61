"""Import what the user named on purpose, never what a file names."""

from __future__ import annotations

import difflib
import importlib
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdkit.checkpoint.text import shown
from tdkit.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def import_named(text: str, option: str) -> Any:
    """Import ``package.module:name`` with the current folder on the path.

    Args:
        text: What the user typed.
        option: The option it was typed after, for messages.

    Raises:
        UsageError: If the text has another form, or the import fails.
    """
    if not _NAME.fullmatch(text):
        raise UsageError(
            f"{option} {shown(text)} does not have the form package.module:name",
            "put a colon between the module and the name, as in mypackage.nets:MyNet",
        )
    module, _, attributes = text.partition(":")
    try:
        with _current_folder_importable():
            found: Any = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"{option} {text}: importing {module} failed: {type(error).__name__}: {shown(error)}",
            "run tdkit in the folder that holds the module, or install its package",
        ) from error
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            close = difflib.get_close_matches(attribute, dir(found), n=3)
            raise UsageError(
                f"{option} {text}: {module} has no {attributes}",
                f"did you mean {' or '.join(close)}?" if close else f"see what {module} defines",
            )
        found = getattr(found, attribute)
    return found


@contextmanager
def _current_folder_importable() -> Iterator[None]:
    folder = str(Path.cwd())
    if folder in sys.path or "" in sys.path:
        yield
        return
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
