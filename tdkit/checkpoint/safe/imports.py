"""Import what the user named on purpose, never what a file names."""

from __future__ import annotations

import importlib
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdkit.checkpoint.text import shown
from tdkit.errors import UsageError, close_names, option

if TYPE_CHECKING:
    from collections.abc import Iterator

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def import_named(text: str, key: str | None) -> Any:
    """Import ``package.module:name`` with the current folder on the path.

    Args:
        text: What the user typed.
        key: The option that it was given by; None where a plugin names it.

    Raises:
        UsageError: If the text has another form, or the import fails.
    """
    if not _NAME.fullmatch(text):
        raise UsageError(
            f"{said(shown(text), key)} does not have the form package.module:name",
            "put a colon between the module and the name, as in mypackage.nets:MyNet",
        )
    module, _, attributes = text.partition(":")
    try:
        with _current_folder_importable():
            found: Any = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"{said(text, key)}: importing {module} failed: {type(error).__name__}: {shown(error)}",
            "run this in the folder that holds the module, or install its package",
        ) from error
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            close = close_names(attribute, dir(found))
            raise UsageError(
                f"{said(text, key)}: {module} has no {attributes}",
                f"did you mean {' or '.join(close)}?" if close else f"see what {module} defines",
            )
        found = getattr(found, attribute)
    return found


def said(text: str, key: str | None) -> str:
    """A name as whoever reads a message gave it.

    Args:
        text: The name.
        key: The option that it was given by; None where a plugin names it.
    """
    return f"the allowed class {text} of a plugin" if key is None else option(key, text)


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
