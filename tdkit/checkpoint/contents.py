"""Get the objects out of one model file, whatever its kind, without running anything in it."""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np
import safetensors
import torch
from torch import Tensor

from tdkit.checkpoint.description import KEY
from tdkit.checkpoint.safe.archive import EXTRA, Archive, check_storages, check_sums, open_archive
from tdkit.checkpoint.safe.kinds import ASK_AGAIN, kind_of, open_file
from tdkit.checkpoint.safe.legacy import scan_legacy
from tdkit.checkpoint.safe.pickles import MOST_BYTES, scan
from tdkit.checkpoint.text import shown
from tdkit.errors import UnreadableFileError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tdkit.checkpoint.safe.classes import Allowlist
    from tdkit.checkpoint.safe.pickles import Scan

_SCALAR_DTYPES = "?bBhHiIlLqQefdFD"


@dataclass(frozen=True)
class Contents:
    """What a file held.

    Args:
        kind: Which format it had.
        value: The object in it.
        text: tdkit's own description in it, or None.
    """

    kind: Literal["torch", "safetensors"]
    value: Any
    text: str | bytes | None


def read_contents(path: Path, allowlist: Allowlist, *, unsafe: bool) -> Contents:
    """Read a file that nobody vouches for.

    Args:
        path: The file.
        allowlist: The classes that may stand in it.
        unsafe: Whether the user vouches for it after all: it may then run any code.

    Raises:
        UnsafeFileError: If it would run code, or take far more memory than it holds.
        UnreadableFileError: If it is missing, damaged or of another kind.
    """
    with open_file(path) as handle:
        kind = kind_of(handle, path)
        if kind == "safetensors":
            return _read_safetensors(path)
        if kind == "zip":
            return _read_zip(handle, path, allowlist, unsafe)
        found = None if unsafe else scan_legacy(handle, allowlist, path)
        return Contents("torch", _load(handle, path, found), None)


def _read_zip(handle: BinaryIO, path: Path, allowlist: Allowlist, unsafe: bool) -> Contents:
    archive = open_archive(handle, path)
    found = None if unsafe else _scan_zip(archive, allowlist, path)
    check_sums(archive, path)
    text = archive.read(EXTRA, MOST_BYTES, path) if EXTRA in archive.sizes else None
    handle.seek(0)
    return Contents("torch", _load(handle, path, found), text)


def _scan_zip(archive: Archive, allowlist: Allowlist, path: Path) -> Scan:
    stream = io.BytesIO(archive.read("data.pkl", MOST_BYTES, path))
    found = scan(stream, allowlist, path)
    check_storages(archive, found.storages, path)
    return found


def _load(handle: BinaryIO, path: Path, found: Scan | None) -> Any:
    """Hand a checked file to torch; without a scan, the user vouches for it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if found is None:
                return torch.load(handle, map_location="cpu", weights_only=False)
            with torch.serialization.safe_globals(_new_names(found)):
                return torch.load(handle, map_location="cpu", weights_only=True)
    except MemoryError as error:
        raise UnreadableFileError(
            f"{path} does not fit into this machine's memory", "use a machine with more memory"
        ) from error
    except Exception as error:
        raise UnreadableFileError(
            f"{path} cannot be read: {type(error).__name__}: {_first_sentence(error)}",
            "save the model again where it was made; its state_dict is the safest form",
        ) from error


def _new_names(found: Scan) -> list[Any]:
    """What torch must be told to accept, without what the caller has told it already.

    torch takes the whole list away afterwards, so what was there before must not be on it.
    """
    names = [(value, path) for path, value in found.names.items()]
    if found.numpy:
        scalar = np.float64(0).__reduce__()[0]
        names += [
            (scalar, "numpy._core.multiarray.scalar"),
            (scalar, "numpy.core.multiarray.scalar"),
            (np.dtype, "numpy.dtype"),
        ]
        kinds = {type(np.dtype(code)) for code in _SCALAR_DTYPES}
        names += [(kind, f"{kind.__module__}.{kind.__qualname__}") for kind in kinds]
    before = torch.serialization.get_safe_globals()
    return [name for name in names if name not in before]


def _read_safetensors(path: Path) -> Contents:
    try:
        with safetensors.safe_open(str(path), framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            # The tensors are views of the mapped file; a copy outlives changes of the file.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except MemoryError as error:
        raise UnreadableFileError(
            f"{path} does not fit into this machine's memory", "use a machine with more memory"
        ) from error
    except Exception as error:
        raise UnreadableFileError(
            f"{path} is not a valid safetensors file: {_first_sentence(error)}", ASK_AGAIN
        ) from error
    return Contents("safetensors", _with_shared(tensors, metadata), metadata.get(KEY))


def _with_shared(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Add the names that safetensors keeps as ``{left out: kept}`` in the metadata."""
    shared = {
        name: tensors[kept]
        for name, kept in metadata.items()
        if kept in tensors and name not in tensors
    }
    return {**tensors, **shared}


def _first_sentence(error: Exception) -> str:
    """Why torch refused, without its advice to turn its checks off."""
    paragraphs = str(error).partition("\n\nCheck the documentation")[0].split("\n\n")
    reason = paragraphs[-1].rpartition("WeightsUnpickler error:")[2]
    text = re.sub(r"\s+", " ", reason).strip() or "no reason given"
    return shown(re.split(r"(?<=[a-z])\. ", text)[0], 200)
