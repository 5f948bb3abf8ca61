"""Fashion-MNIST (Xiao et al., 2017): 70,000 greyscale images of clothes, 28×28 pixels."""

from __future__ import annotations

import contextlib
import gzip
import math
import struct
import sys
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

import torch

from tdkit import defaults
from tdkit.datasets.base import in_memory_dataset
from tdkit.datasets.locate import VARIABLE, cache_folder, search
from tdkit.errors import UnreadableFileError, option

if TYPE_CHECKING:
    from torch import Tensor

    from tdkit.datasets.base import Dataset

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
SYSTEM_FOLDERS = (Path("/usr/share/datasets/fashion-mnist"),)
"""Where Debian's package dataset-fashion-mnist puts the files."""

_FOLDERS = ("fashion-mnist", "FashionMNIST/raw")
_MARKER = "t10k-images-idx3-ubyte*"
_UNSIGNED_BYTE = 8


def create(
    root: Path | None = None,
    path: str | None = None,
    image_size: int | None = None,
    seed: int = defaults.SEED,
) -> Dataset:
    """Load the data set, downloading it when no folder has it.

    Args:
        root: The folder of ``data_root``, or None; see :func:`tdkit.datasets.locate.search`.
        path: Not used.
        image_size: Not used: the images keep their 28×28 pixels.
        seed: Of the validation split.

    Raises:
        UnreadableFileError: The files are missing and cannot be downloaded, or are damaged.
    """
    folder = search(_FOLDERS, _MARKER, root, SYSTEM_FOLDERS) or _download()
    train, test = _read_part(folder, "train"), _read_part(folder, "t10k")
    return in_memory_dataset("fashion-mnist", CLASSES, train, test, seed)


def read_idx(path: Path) -> Tensor:
    """Read a file of unsigned bytes in the IDX format, gzipped or not.

    The header is two zero bytes, the type (8 for unsigned bytes), the number of axes, and the
    length of each axis as a big-endian 32-bit integer; the values follow in row-major order.

    Args:
        path: The file; gzip is assumed when its name ends in ``.gz``.

    Returns:
        uint8 of any shape: that of the header.

    Raises:
        UnreadableFileError: The file cannot be read, is not IDX, or is too short or too long.
    """
    hint = "Remove it and fetch the data set again."
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with cast("IO[bytes]", opener(path, "rb")) as file:
            zeros, kind, axes = struct.unpack(">HBB", file.read(4))
            if zeros or kind != _UNSIGNED_BYTE:
                raise UnreadableFileError(f"{path}: this is not an IDX file of bytes", hint)
            shape = struct.unpack(f">{axes}I", file.read(4 * axes))
            values = file.read(math.prod(shape) + 1)
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise UnreadableFileError(f"{path} cannot be read: {error}", hint) from error
    if len(values) != math.prod(shape):
        raise UnreadableFileError(f"{path}: the header promises {shape} bytes, not so many", hint)
    if not values:
        return torch.empty(shape, dtype=torch.uint8)
    return torch.frombuffer(bytearray(values), dtype=torch.uint8).reshape(shape)


def _read_part(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    images = read_idx(_file(folder, f"{part}-images-idx3-ubyte"))
    labels = read_idx(_file(folder, f"{part}-labels-idx1-ubyte"))
    if images.ndim != 3 or images.shape[1:] != (28, 28):
        raise UnreadableFileError(
            f"{folder}: the {part} images have shape {tuple(images.shape)}, not (n, 28, 28)"
        )
    return images.unsqueeze(1), labels.long()


def _file(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise UnreadableFileError(
        f"{folder} lacks the file {name}.gz", "Copy all four files of the data set there."
    )


def _download() -> Path:
    from torchvision.datasets import FashionMNIST

    folder = cache_folder()
    try:
        # torchvision prints what it downloads; standard output may be a report in JSON.
        with contextlib.redirect_stdout(sys.stderr):
            FashionMNIST(str(folder), download=True)
    except (OSError, RuntimeError) as error:
        raise UnreadableFileError(
            f"fashion-mnist was not found, and downloading it failed: {error}",
            "Install Debian's package dataset-fashion-mnist, or put the four .gz files in a "
            f"folder and name it with {option('data_root')} or ${VARIABLE}.",
        ) from error
    return folder / "FashionMNIST" / "raw"
