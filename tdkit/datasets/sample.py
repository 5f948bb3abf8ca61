"""A bundled part of Fashion-MNIST, so that everything can be tried without a download.

``python -m tdkit.datasets.sample`` makes the bundled file anew from the full data set.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tdkit import defaults
from tdkit.datasets.base import (
    Dataset,
    TensorSplit,
    check_images,
    fingerprint,
    stratified_split,
)
from tdkit.datasets.fashion_mnist import CLASSES
from tdkit.errors import UnreadableFileError

if TYPE_CHECKING:
    from torch import Tensor

FILE = Path(__file__).parent.parent / "assets" / "fashion-mnist-sample.npz"
SIZES = {"train": 800, "validation": 200, "test": 2_000}
"""Images per split; the first two are training images of the full data set."""
SEED = 0
"""Of the choice of images, and of the full data set's validation split."""


def create(
    root: Path | None = None,
    path: str | None = None,
    image_size: int | None = None,
    seed: int = defaults.SEED,
    file: Path = FILE,
) -> Dataset:
    """Load the bundled images.

    Each split has the same number of images of every class, and comes from the split of that
    name of the full data set, whose mean and deviation standardise it: so a model trained on the
    full data has seen neither the validation nor the test images.

    Args:
        root: Not used.
        path: Not used.
        image_size: Not used: the images keep their 28×28 pixels.
        seed: Not used: the splits are stored.
        file: Where the images are.

    Raises:
        UnreadableFileError: The file is missing or damaged.
    """
    try:
        # np.load leaves a file it cannot read open, unless it was handed an open one.
        with file.open("rb") as handle, np.load(handle, allow_pickle=False) as stored:
            arrays = {name: torch.from_numpy(stored[name]) for name in stored.files}
        mean, std = tuple(arrays["mean"].tolist()), tuple(arrays["std"].tolist())
        parts = {part: _part(arrays, part) for part in SIZES}
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UnreadableFileError(
            f"the bundled images {file} cannot be read: {error}", "Install tdkit again."
        ) from error
    for part, (images, labels) in parts.items():
        check_images(f"{file}, {part}", images, labels, len(CLASSES))
    contents = [tensor for pair in parts.values() for tensor in pair]
    splits = {part: TensorSplit(*pair, mean, std) for part, pair in parts.items()}
    return Dataset(
        "fashion-mnist-sample",
        CLASSES,
        (1, 28, 28),
        mean,
        std,
        fingerprint(*contents),
        train=splits["train"],
        validation=splits["validation"],
        test=splits["test"],
    )


def _part(arrays: dict[str, Tensor], part: str) -> tuple[Tensor, Tensor]:
    return arrays[f"{part}_images"].unsqueeze(1), arrays[f"{part}_labels"].long()


def build(file: Path = FILE, root: Path | None = None) -> None:
    """Choose the images from the full data set and write them, compressed.

    Args:
        file: Where to write.
        root: A folder that holds the full data set; see :mod:`tdkit.datasets.locate`.

    Raises:
        UnreadableFileError: If the full data set is not there, or is damaged.
    """
    from tdkit.datasets import fashion_mnist

    full = fashion_mnist.create(root, seed=SEED)
    generator = torch.Generator().manual_seed(SEED)
    arrays: dict[str, Any] = {"mean": np.array(full.mean), "std": np.array(full.std)}
    for part, size in SIZES.items():
        split = getattr(full, part)
        _, chosen = stratified_split(split.labels, size, generator)
        arrays[f"{part}_images"] = split.images[chosen, 0].numpy()
        arrays[f"{part}_labels"] = split.labels[chosen].to(torch.uint8).numpy()
    np.savez_compressed(file, **arrays)


if __name__ == "__main__":
    build()
