"""The format that torch.save wrote before torch 1.6: five pickles, then the weights.

State dicts from that time are still what many download sites serve. Whole models of that time hold
their own source code and cannot be read safely.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, BinaryIO

from tdkit.checkpoint.safe.kinds import ASK_AGAIN
from tdkit.checkpoint.safe.pickles import MOST_BYTES, Scan, scan
from tdkit.errors import UnreadableFileError, UnsafeFileError

if TYPE_CHECKING:
    from pathlib import Path

    from tdkit.checkpoint.safe.classes import Allowlist

_MAGIC = 0x1950A86A20F9469CFC6C
_SIZE_BYTES = 8
_MOST_MISSING = 100


def scan_legacy(handle: BinaryIO, allowlist: Allowlist, path: Path) -> Scan:
    """Check a file of the old format.

    Args:
        handle: The open file; its position is 0 afterwards.
        allowlist: What it may name.
        path: Its path, for messages.

    Raises:
        UnsafeFileError: If it would run code or take more memory than it holds.
        UnreadableFileError: If it is damaged, or an ordinary pickle.
    """
    size = handle.seek(0, 2)
    handle.seek(0)
    stream = io.BytesIO(handle.read(MOST_BYTES))
    first = scan(stream, allowlist, path)
    if first.root != _MAGIC:
        raise UnreadableFileError(
            f"{path} was written by pickle, not by torch.save",
            "save it again with torch.save(model.state_dict(), path)",
        )
    for _ in ("protocol version", "system"):
        scan(stream, allowlist, path)
    found = scan(stream, allowlist, path)
    keys = scan(stream, allowlist, path).root
    if not (isinstance(keys, list) and sorted(map(str, keys)) == sorted(found.storages)):
        raise UnreadableFileError(f"{path} lists other weights than it uses", ASK_AGAIN)
    stored = sum(storage.numel * storage.itemsize for storage in found.storages.values())
    expected = stream.tell() + stored + _SIZE_BYTES * len(keys)
    if expected > size:
        error = UnsafeFileError if stored > _MOST_MISSING * size else UnreadableFileError
        raise error(
            f"{path} asks for {stored:,} bytes of weights, more than its {size:,} bytes hold",
            f"it is cut short or forged: {ASK_AGAIN}",
        )
    if expected < size:
        raise UnsafeFileError(
            f"{path} goes on for {size - expected:,} bytes after its weights",
            "torch.save never writes such a file; save the model again, or do not trust it",
        )
    handle.seek(0)
    return found
