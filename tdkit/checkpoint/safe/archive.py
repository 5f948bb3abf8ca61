"""The zip archive that torch.save writes, checked before anything in it is believed.

torch.save stores its entries uncompressed, in one folder, one after the other from the first byte
of the file to the last. An archive that is not so was changed or made by something else.
"""

from __future__ import annotations

import struct
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from tdkit.checkpoint.safe.kinds import ASK_AGAIN
from tdkit.checkpoint.text import shown
from tdkit.errors import UnreadableFileError, UnsafeFileError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tdkit.checkpoint.safe.constructors import Storage

EXTRA = "tdkit.json"
"""The entry in which tdkit keeps its plan; torch.load ignores it."""

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_SIZE = 20
_LOCAL = struct.Struct("<4s5H3L2H")
_MOST_DIRECTORY_BYTES = 2**25
_DESCRIPTOR_SIZES = (0, 12, 16, 20, 24)
_BROKEN = (
    zipfile.BadZipFile,
    NotImplementedError,
    struct.error,
    ValueError,
    OverflowError,
    OSError,
)
_DISTRUST = "torch.save never writes such a file; save the model again, or do not trust it"


@dataclass(frozen=True)
class Archive:
    """The entries of one archive.

    Args:
        zip: The open archive.
        root: The folder that all entries are in.
        sizes: Name inside that folder to size in bytes.
    """

    zip: zipfile.ZipFile
    root: str
    sizes: Mapping[str, int]

    def read(self, name: str, limit: int, path: Path) -> bytes:
        """Read one entry and check its sum.

        Args:
            name: The entry inside the folder.
            limit: The most bytes to accept.
            path: The file, for messages.

        Raises:
            UnsafeFileError: If the entry is larger.
            UnreadableFileError: If it is damaged.
        """
        if self.sizes[name] > limit:
            raise UnsafeFileError(
                f"{path}: its entry {name} has {self.sizes[name]:,} bytes, more than the "
                f"{limit:,} that tdkit reads",
                "save the model's state_dict alone",
            )
        try:
            return self.zip.read(f"{self.root}/{name}")
        except _BROKEN as error:
            raise _damaged(path, name) from error


def open_archive(handle: BinaryIO, path: Path) -> Archive:
    """Check the structure of an archive, without its contents.

    Args:
        handle: The open file.
        path: Its path, for messages.

    Raises:
        UnreadableFileError: If it is cut short, or was not written by torch.save.
        UnsafeFileError: If it is built to mislead or to overflow the memory.
    """
    _check_end(handle, path)
    try:
        archive = zipfile.ZipFile(handle)
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        root = _root([entry.filename for entry in entries], path)
        sizes = {entry.filename[len(root) + 1 :]: entry.file_size for entry in entries}
        _check_purpose(sizes, path)
        _check_layout(handle, path, entries, archive.start_dir)
    except _BROKEN as error:
        raise UnreadableFileError(f"{path} is a damaged zip archive", ASK_AGAIN) from error
    return Archive(archive, root, sizes)


def check_storages(archive: Archive, storages: Mapping[str, Storage], path: Path) -> None:
    """Check that every declared storage is there with the declared size.

    Args:
        archive: The archive.
        storages: What its pickle declares.
        path: The file, for messages.

    Raises:
        UnsafeFileError: If a storage is declared larger than it is.
        UnreadableFileError: If one is missing or smaller.
    """
    for key, storage in storages.items():
        declared, present = storage.numel * storage.itemsize, archive.sizes.get(f"data/{key}")
        if present is None:
            raise UnreadableFileError(f"{path} lacks its weights data/{shown(key)}", ASK_AGAIN)
        if declared > present:
            raise UnsafeFileError(
                f"{path} asks for {declared:,} bytes for data/{shown(key)}, but stores {present:,}",
                _DISTRUST,
            )
        if declared < present:
            raise _damaged(path, f"data/{key}")


def check_sums(archive: Archive, path: Path) -> None:
    """Compare every entry with its checksum.

    Args:
        archive: The archive.
        path: The file, for messages.

    Raises:
        UnreadableFileError: If one differs, as after a flipped bit.
    """
    try:
        bad = archive.zip.testzip()
    except _BROKEN as error:
        raise UnreadableFileError(f"{path} is a damaged zip archive", ASK_AGAIN) from error
    if bad is not None:
        raise _damaged(path, bad.partition("/")[2])


def _damaged(path: Path, name: str) -> UnreadableFileError:
    return UnreadableFileError(
        f"{path} is damaged: its entry {shown(name)} does not match its size or checksum",
        ASK_AGAIN,
    )


def _check_end(handle: BinaryIO, path: Path) -> None:
    size = handle.seek(0, 2)
    handle.seek(max(0, size - _END.size))
    tail = handle.read(_END.size)
    if len(tail) < _END.size or not tail.startswith(b"PK\5\6"):
        if zipfile.is_zipfile(handle):
            raise UnsafeFileError(f"{path} goes on after the end of its archive", _DISTRUST)
        raise UnreadableFileError(f"{path} is a zip archive that is cut short", ASK_AGAIN)
    directory = _END.unpack(tail)[5]
    if directory == 0xFFFFFFFF and size >= _END.size + _LOCATOR_SIZE + _END64.size:
        handle.seek(size - _END.size - _LOCATOR_SIZE - _END64.size)
        directory = _END64.unpack(handle.read(_END64.size))[8]
    if directory > _MOST_DIRECTORY_BYTES:
        raise UnsafeFileError(f"{path} lists far too many entries", _DISTRUST)
    handle.seek(0)


def _check_layout(
    handle: BinaryIO, path: Path, entries: list[zipfile.ZipInfo], directory: int
) -> None:
    end = 0
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise UnsafeFileError(
                f"{path}: its entry {shown(entry.filename)} is compressed or encrypted, "
                f"{entry.compress_size:,} bytes for {entry.file_size:,}",
                _DISTRUST,
            )
        if entry.file_size != entry.compress_size or entry.header_offset - end not in (
            _DESCRIPTOR_SIZES if end else (0,)
        ):
            raise _hidden(path)
        handle.seek(entry.header_offset)
        header = _LOCAL.unpack(handle.read(_LOCAL.size))
        end = entry.header_offset + _LOCAL.size + header[9] + header[10] + entry.file_size
    if directory - end not in _DESCRIPTOR_SIZES:
        raise _hidden(path)


def _hidden(path: Path) -> UnsafeFileError:
    return UnsafeFileError(f"{path} hides bytes between the entries of its archive", _DISTRUST)


def _root(names: list[str], path: Path) -> str:
    root = names[0].partition("/")[0] if names else ""
    if len({name.lower() for name in names}) < len(names):
        raise UnsafeFileError(f"{path} holds two entries of one name", _DISTRUST)
    if "" in (name.partition("/")[2] for name in names) or any(
        not name.startswith(f"{root}/") for name in names
    ):
        raise UnreadableFileError(
            f"{path} is a zip archive that torch.save did not write",
            "unpack it and name the model file in it",
        )
    return root


def _check_purpose(sizes: Mapping[str, int], path: Path) -> None:
    if "constants.pkl" in sizes:
        raise UnreadableFileError(
            f"{path} is a TorchScript archive, whose layers cannot be replaced",
            "save the original model with torch.save(model, path), or its state_dict",
        )
    if "archive_format" in sizes or "models/model.json" in sizes:
        raise UnreadableFileError(
            f"{path} is an exported program, whose layers cannot be replaced",
            "save the original model with torch.save(model, path), or its state_dict",
        )
    if "data.pkl" not in sizes:
        raise UnreadableFileError(
            f"{path} is a zip archive without data.pkl, so torch.save did not write it",
            "unpack it and name the model file in it",
        )
