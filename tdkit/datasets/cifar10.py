"""CIFAR-10 (Krizhevsky, 2009): 60,000 colour images of ten classes, 32×32 pixels."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

import torch
from torchvision.datasets import CIFAR10

from tdkit import defaults
from tdkit.datasets.base import in_memory_dataset
from tdkit.datasets.locate import VARIABLE, cache_folder, search
from tdkit.errors import UnreadableFileError, option

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from tdkit.datasets.base import Dataset

_FOLDERS = ("cifar10", "cifar-10")


def create(
    root: Path | None = None,
    path: str | None = None,
    image_size: int | None = None,
    seed: int = defaults.SEED,
    reader: type[CIFAR10] = CIFAR10,
) -> Dataset:
    """Load the data set, downloading it when no folder has it.

    Args:
        root: The folder of ``data_root``, or None; see :func:`tdkit.datasets.locate.search`.
        path: Not used.
        image_size: Not used: the images keep their 32×32 pixels.
        seed: Of the validation split.
        reader: torchvision's class, or a subclass that knows the checksums of other files.

    Raises:
        UnreadableFileError: The files are missing and cannot be downloaded, or are damaged.
    """
    folder = search(_FOLDERS, reader.base_folder, root) or _download(reader)
    train, test = _read(reader, folder, train=True), _read(reader, folder, train=False)
    return in_memory_dataset("cifar10", tuple(test.classes), _part(train), _part(test), seed)


def _read(reader: type[CIFAR10], folder: Path, train: bool) -> CIFAR10:
    try:
        return reader(str(folder), train=train)
    except (OSError, RuntimeError) as error:
        raise UnreadableFileError(
            f"{folder / reader.base_folder} is incomplete or damaged",
            "remove it and fetch the data set again",
        ) from error


def _part(part: CIFAR10) -> tuple[Tensor, Tensor]:
    images = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(part.targets)


def _download(reader: type[CIFAR10]) -> Path:
    folder = cache_folder()
    try:
        # torchvision prints what it downloads; standard output may be a report in JSON.
        with contextlib.redirect_stdout(sys.stderr):
            reader(str(folder), download=True)
    except (OSError, RuntimeError) as error:
        raise UnreadableFileError(
            f"cifar10 was not found, and downloading it failed: {error}",
            f"Put {reader.base_folder}, unpacked from {reader.url}, in a folder and name that "
            f"folder with {option('data_root')} or ${VARIABLE}.",
        ) from error
    return folder
