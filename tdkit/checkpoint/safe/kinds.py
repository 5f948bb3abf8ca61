"""What kind of file this is, told from its first bytes and never from its name."""

from __future__ import annotations

import stat
import zipfile
from typing import TYPE_CHECKING, BinaryIO, Literal

from tdkit.errors import UnreadableFileError, UnsafeFileError

if TYPE_CHECKING:
    from pathlib import Path

Kind = Literal["zip", "pickle", "safetensors"]

HEAD = 4096
ASK_AGAIN = "copy or download it again"
WANTED = (
    "tdkit reads what torch.save writes (.pt, .pth) and safetensors files; to use a registered "
    "model, give its name"
)

_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x1f\x8b", "a gzip archive; unpack it first"),
    (0, b"BZh", "a bzip2 archive; unpack it first"),
    (0, b"\xfd7zXZ", "an xz archive; unpack it first"),
    (0, b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (257, b"ustar", "a tar archive; unpack it first"),
    (0, b"\x89HDF", "an HDF5 file, such as Keras writes"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"GGUF", "a GGUF file"),
    (4, b"TFL3", "a TensorFlow Lite model"),
    (0, b"\x7fELF", "a program"),
    (0, b"%PDF", "a PDF document"),
    (0, b"\x89PNG", "a PNG image"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
)


def open_file(path: Path) -> BinaryIO:
    """Open an ordinary file for reading.

    Args:
        path: The file.

    Raises:
        UnreadableFileError: If it is missing, a folder, a device or not readable.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise UnreadableFileError(f"{path} is a folder, not a model file", WANTED)
        if not stat.S_ISREG(mode):
            raise UnreadableFileError(f"{path} is not an ordinary file", WANTED)
        return path.open("rb")
    except FileNotFoundError as error:
        raise UnreadableFileError(f"{path} does not exist", "check the path") from error
    except PermissionError as error:
        raise UnreadableFileError(
            f"{path} may not be read by this user", f"chmod u+r {path}, or ask its owner"
        ) from error
    except (OSError, ValueError) as error:
        raise UnreadableFileError(f"{path} cannot be opened: {error}", "check the path") from error


def kind_of(handle: BinaryIO, path: Path) -> Kind:
    """Tell the kind of an open file.

    Args:
        handle: The open file; its position is 0 afterwards.
        path: Its path, for messages.

    Raises:
        UnreadableFileError: If it is no kind that tdkit reads; the message says what it is.
        UnsafeFileError: If it is two kinds at once.
    """
    head = handle.read(HEAD)
    kind = _kind_of_head(head, path)
    if kind != "zip" and zipfile.is_zipfile(handle):
        raise UnsafeFileError(
            f"{path} is two files in one: it starts as {kind} and ends as a zip archive",
            "no tool writes such a file by accident; do not trust it",
        )
    handle.seek(0)
    return kind


def _kind_of_head(head: bytes, path: Path) -> Kind:
    if not head:
        raise UnreadableFileError(f"{path} is empty", ASK_AGAIN)
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    for offset, magic, name in _MAGIC:
        if head.startswith(magic, offset):
            raise UnreadableFileError(f"{path} is {name}", WANTED)
    # Before pickle: a header of 640 bytes starts like pickle's protocol 2.
    if head[7:9] == b"\0{":
        return "safetensors"
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        return "pickle"
    _refuse_text(head, path)
    if path.suffix == ".safetensors":
        raise UnreadableFileError(f"{path} has no valid safetensors header", ASK_AGAIN)
    if head[:1] == b"\x08" and (b"pytorch" in head or b"onnx" in head):
        raise UnreadableFileError(f"{path} is an ONNX model", WANTED)
    raise UnreadableFileError(f"{path} is neither a PyTorch nor a safetensors file", WANTED)


def _refuse_text(head: bytes, path: Path) -> None:
    text = head.decode("utf-8", errors="ignore")
    if len(text.encode()) < len(head) - 3 or any(c < " " and c not in "\t\n\r\f" for c in text):
        return
    start = text.lstrip("\ufeff \t\r\n").lower()
    if start.startswith("version https://git-lfs"):
        raise UnreadableFileError(
            f"{path} is a git-LFS pointer, not the model itself", "run git lfs pull"
        )
    if start.startswith(("<!doctype", "<html", "<head", "<?xml")):
        raise UnreadableFileError(
            f"{path} is a web page, not a model",
            "the download gave an error or log-in page; open its address in a browser",
        )
    raise UnreadableFileError(f"{path} is a text file, not a model", WANTED)
