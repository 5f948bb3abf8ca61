"""Write a file whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import secrets
import signal
import stat
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from tdkit.errors import StorageError, option

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import FrameType

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_DISK = _FULL | {errno.EIO, errno.EROFS}
_ELSEWHERE = "choose another output path"


@contextmanager
def atomic_write(
    path: Path, *, force: bool = False, inputs: Sequence[str | Path] = ()
) -> Iterator[Path]:
    """Give a temporary path beside ``path`` that becomes ``path`` if all goes well.

    The temporary file is in the same folder and has the same suffix. It is flushed to the disk
    before it takes its name, and removed after any exception, Ctrl-C and SIGTERM included; what
    stood at ``path`` before stays until the new file is complete. Without ``force`` the name is
    taken only if it is still free, so that of two runs the second fails.

    A symlink at ``path`` counts as an existing file. With ``force`` the link itself is replaced;
    what it points to is never written to.

    Args:
        path: Where the file shall be.
        force: Whether an existing file may be replaced.
        inputs: Files that may not be replaced even so, under any name.

    Raises:
        StorageError: If ``path`` exists without ``force``, is an input, a folder or a device, if
            its folder is missing or read-only, or if the disk is full.
    """
    path = Path(path)
    check_writable(path, force=force, inputs=inputs)
    temporary = path.parent / f".tdkit-{secrets.token_hex(8)}{path.suffix}"
    try:
        with _terminating_cleanly():
            try:
                _create(temporary, path)
                mode = stat.S_IMODE(temporary.stat().st_mode)
                yield temporary
                temporary.chmod(mode)  # safetensors puts a private file in its place
                _flush(temporary)
                _take_name(temporary, path, force)
                with suppress(OSError):
                    _flush(path.parent)
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _storage_error(error, path) from error


def os_error(error: BaseException) -> OSError | None:
    """The failed write behind an error, which libraries report in their own ways.

    Args:
        error: What a library raised.
    """
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, OSError) and (current is error or current.errno in _DISK):
            return current
        current = current.__cause__ or current.__context__
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None


def check_writable(path: Path, *, force: bool = False, inputs: Sequence[str | Path] = ()) -> None:
    """Refuse an output path that could not be written, before the work that it is for.

    Args:
        path: Where the file shall be.
        force: Whether an existing file may be replaced.
        inputs: Files that may not be replaced even so, under any name; names that are no files
            are ignored.

    Raises:
        StorageError: As for :func:`atomic_write`.
    """
    try:
        for source in inputs:
            if _same_file(path, Path(source)):
                raise StorageError(f"{path} is the input itself", _ELSEWHERE)
        if not path.parent.is_dir():
            raise StorageError(f"the folder of {path} does not exist", f"mkdir -p {path.parent}")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise StorageError(f"the folder of {path} may not be written to", _ELSEWHERE)
        found = _lstat(path)
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} cannot be written: {error}", _ELSEWHERE) from error
    if path.name in ("", "..") or (found is not None and stat.S_ISDIR(found.st_mode)):
        raise StorageError(f"{path} is a folder, not a file", "add a file name")
    if found is not None and not (stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode)):
        raise StorageError(f"{path} is not an ordinary file", _ELSEWHERE)
    if found is not None and not force:
        _refuse_existing(path)


def _lstat(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except FileNotFoundError:
        return None


def _same_file(path: Path, source: Path) -> bool:
    return path.exists() and source.exists() and path.samefile(source)


def _create(temporary: Path, path: Path) -> None:
    """Make an empty file with the permissions that a new file has, or those it replaces."""
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    descriptor = os.open(temporary, flags, 0o666)
    try:
        if path.is_file() and not path.is_symlink():
            os.fchmod(descriptor, stat.S_IMODE(path.stat().st_mode))
    finally:
        os.close(descriptor)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _take_name(temporary: Path, path: Path, force: bool) -> None:
    if force:
        temporary.replace(path)
        return
    try:
        os.link(temporary, path)
    except FileExistsError:
        _refuse_existing(path)
    except OSError:
        # Some file systems have no hard links; there the check has a gap, as short as can be.
        if os.path.lexists(path):
            _refuse_existing(path)
        temporary.rename(path)


def _refuse_existing(path: Path) -> NoReturn:
    raise StorageError(f"{path} exists", f"{option('force', True)} replaces it; or {_ELSEWHERE}")


def _storage_error(error: OSError, path: Path) -> StorageError:
    if error.errno in _FULL:
        return StorageError(
            f"there is no room left to write {path}; what stood there before is untouched",
            "free some space, or choose an output path on another disk",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageError(f"the folder of {path} may not be written to", _ELSEWHERE)
    return StorageError(f"{path} cannot be written: {error}", _ELSEWHERE)


@contextmanager
def _terminating_cleanly() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into an exception, unless the program handles them itself."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is signal.SIG_DFL
    ]
    for number in numbers:
        signal.signal(number, _exit)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
