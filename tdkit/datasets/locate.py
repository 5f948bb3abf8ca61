"""Where data sets are looked for: the order that every built-in data set follows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from tdkit.errors import UnreadableFileError, option

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

VARIABLE = "TDKIT_DATA"
"""Environment variable that names a folder of data sets."""


def cache_folder() -> Path:
    """Return the folder that downloads go to; it need not exist."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tdkit"


def search(
    folders: Sequence[str], marker: str, root: Path | None, system: Sequence[Path] = ()
) -> Path | None:
    """Find the folder that holds ``marker``.

    Looks in ``root``, then in ``$TDKIT_DATA``, then in the ``system`` folders, and last where an
    earlier download went. In each but the system folders also the sub-folders named in
    ``folders`` are tried.

    Args:
        folders: Sub-folders a data set commonly lies in, such as ``FashionMNIST/raw``.
        marker: Glob pattern of a file or folder that shows the data set is there.
        root: The folder of ``data_root``, or None.
        system: Folders a distribution's package installs to.

    Returns:
        The folder, or None when it is nowhere.

    Raises:
        UnreadableFileError: ``root`` or ``$TDKIT_DATA`` is given and is not a folder.
    """
    for base in _bases(root, system):
        for folder in (base, *(base / name for name in folders)):
            if any(folder.glob(marker)):
                return folder
    return None


def _bases(root: Path | None, system: Sequence[Path]) -> Iterator[Path]:
    if root is not None:
        yield _existing(root, option("data_root", str(root)), option("data_root"))
    if os.environ.get(VARIABLE):
        folder = os.environ[VARIABLE]
        yield _existing(Path(folder), f"${VARIABLE}={folder}", f"${VARIABLE}")
    yield from system
    yield cache_folder()


def _existing(folder: Path, said: str, origin: str) -> Path:
    if not folder.is_dir():
        raise UnreadableFileError(f"{said} is not a folder", f"Create it, or leave {origin} out.")
    return folder
