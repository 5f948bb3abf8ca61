"""A folder of image files as a data set, decoded as they are needed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import is_image_file
from torchvision.transforms import functional

from tdkit import defaults
from tdkit.datasets.base import (
    Dataset,
    batches_of,
    crop_and_flip,
    image_order,
    standardise,
    stratified_split,
    validation_size,
)
from tdkit.errors import UnreadableFileError, UsageError, option

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

DEFAULT_SIZE = 224
MEAN = (0.485, 0.456, 0.406)
"""ImageNet's mean per channel, which published weights expect."""
STD = (0.229, 0.224, 0.225)
"""ImageNet's standard deviation per channel."""

# The centre crop keeps 224 of 256 pixels, as in most published evaluations.
_KEPT, _RESIZED = 224, 256

# Folders of splits, which are no classes.
_SPLIT_NAMES = ("train", "training", "val", "valid", "validation", "test", "testing")


@dataclass(frozen=True, eq=False)
class FolderSplit:
    """A :class:`~tdkit.datasets.base.Split` of image files.

    Args:
        files: One path per image.
        labels: int64 of shape (n,), or None.
        size: Height and width that images are resized and centre-cropped to, in pixels.
    """

    files: tuple[Path, ...]
    labels: Tensor | None
    size: tuple[int, int]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.files)

    def batches(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        augment: bool = False,
        limit: int | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield standardised batches; see :meth:`tdkit.datasets.base.Split.batches`.

        Yields:
            Images, float32 of shape (batch, channels, height, width), and labels, int64 (batch,).

        Raises:
            UsageError: The batch size is not positive, or augmentation lacks a generator.
            UnreadableFileError: A file is no image that can be decoded.
        """
        if augment and generator is None:
            raise UsageError("augmentation is random and needs a torch.Generator")
        for index in batches_of(image_order(len(self), generator, limit), batch_size):
            images = torch.stack([decode(self.files[i], self.size) for i in index.tolist()])
            if augment and generator is not None:
                images = crop_and_flip(images, generator)
            labels = torch.full_like(index, -1) if self.labels is None else self.labels[index]
            yield standardise(images, MEAN, STD), labels

    def subset(self, index: Tensor) -> FolderSplit:
        """Return the images at some positions, int64 of shape (m,)."""
        labels = None if self.labels is None else self.labels[index]
        return FolderSplit(tuple(self.files[i] for i in index.tolist()), labels, self.size)


def decode(file: Path, size: tuple[int, int]) -> Tensor:
    """Read an image, resize it with its proportions kept, and cut out its centre.

    For a square size this is torchvision's ``Resize(size * 256 // 224)`` and
    ``CenterCrop(size)``, in bilinear interpolation.

    Args:
        file: Any format that Pillow reads; greyscale and palettes become three channels.
        size: Height and width in pixels.

    Returns:
        uint8 of shape (3, height, width).

    Raises:
        UnreadableFileError: The file is no image that can be decoded.
    """
    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableFileError(
            f"{file} cannot be decoded as an image", "Remove or replace the file."
        ) from error
    height, width = (side * _RESIZED // _KEPT for side in size)
    if image.height * width >= image.width * height:
        shape = [image.height * width // image.width, width]
    else:
        shape = [height, image.width * height // image.height]
    resized = functional.resize(image, shape)
    pixels: Tensor = functional.pil_to_tensor(functional.center_crop(resized, list(size)))
    return pixels


def create(
    root: Path | None = None,
    path: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    seed: int = defaults.SEED,
) -> Dataset:
    """Find the images under a folder; they are decoded when a batch is asked for.

    Three layouts are known:

    - ``PATH/train/<class>/*`` with ``PATH/val/<class>/*``, ``PATH/test/<class>/*`` or both. When
      only one of the two exists it is the test split, and a stratified choice of training images
      validates.
    - ``PATH/<class>/*``: all of it is the test split.
    - ``PATH/*``: all of it is the test split, without labels.

    Args:
        root: Not used: the path is the user's own.
        path: The folder.
        image_size: Height and width in pixels, one number when they are equal; 224 when None.
        seed: Of the validation split.

    Raises:
        UsageError: There is no path.
        UnreadableFileError: The folder is missing or holds no images, or the splits differ in
            their classes.
    """
    if not path:
        raise UsageError(
            "image-folder needs a folder", f"Write {option('data', 'image-folder:PATH')}."
        )
    folder = Path(path)
    if not folder.is_dir():
        raise UnreadableFileError(f"{folder} is not a folder", "Check the path after the colon.")
    size = image_size or DEFAULT_SIZE
    size = (size, size) if isinstance(size, int) else size
    parts = _parts(folder)
    found = {part: _find(place, size) for part, place in parts.items()}
    classes = _common_classes(folder, {part: names for part, (names, _) in found.items()})
    splits = {part: split for part, (_, split) in found.items()}
    if "train" in splits and "validation" not in splits:
        splits |= _hold_back(splits["train"], seed)
    return Dataset(
        f"image-folder:{path}",
        classes,
        (3, *size),
        MEAN,
        STD,
        _fingerprint(folder, splits),
        notes=_notes(size) if image_size is None else (),
        **splits,
    )


def _notes(size: tuple[int, int]) -> tuple[str, ...]:
    height, width = size
    return (
        f"nothing tells the size of the images: they are brought to {height}×{width};"
        f" {option('input_shape', (3, 'H', 'W'))} names another",
    )


def _parts(folder: Path) -> dict[str, Path]:
    """Return the folder of each split that the layout has."""
    held = [folder / name for name in ("val", "test") if (folder / name).is_dir()]
    if not (folder / "train").is_dir() or not held:
        _refuse_splits_as_classes(folder)
        return {"test": folder}
    parts = {"train": folder / "train", "test": held[-1]}
    return parts if len(held) == 1 else {**parts, "validation": held[0]}


def _refuse_splits_as_classes(folder: Path) -> None:
    for name in _SPLIT_NAMES:
        place = folder / name
        if place.is_dir() and any(entry.is_dir() for entry in place.iterdir()):
            raise UnreadableFileError(
                f"{folder}: {name} looks like a split, not like a class",
                f"the splits are called train, val and test; or name {place} itself",
            )


def _find(folder: Path, size: tuple[int, int]) -> tuple[tuple[str, ...], FolderSplit]:
    """Return the classes and the images of one split."""
    if any(entry.is_dir() for entry in folder.iterdir()):
        try:
            tree = ImageFolder(str(folder))
        except FileNotFoundError as error:
            raise UnreadableFileError(
                f"{folder}: {error}", "Give each class a sub-folder with at least one image."
            ) from error
        files = tuple(Path(file) for file, _ in tree.samples)
        return tuple(tree.classes), FolderSplit(files, torch.tensor(tree.targets), size)
    files = tuple(sorted(entry for entry in folder.iterdir() if is_image_file(entry.name)))
    if not files:
        raise UnreadableFileError(
            f"{folder} holds no images", "Put images there, in one sub-folder per class."
        )
    return (), FolderSplit(files, None, size)


def _common_classes(folder: Path, classes: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    first = next(iter(classes.values()))
    for names in classes.values():
        different = sorted(set(names) ^ set(first))
        if different:
            raise UnreadableFileError(
                f"{folder}: not every split has the class {different[0]}",
                "give all splits the same sub-folders",
            )
    return first


def _hold_back(train: FolderSplit, seed: int) -> dict[str, FolderSplit]:
    if train.labels is None:
        return {}
    generator = torch.Generator().manual_seed(seed)
    kept, held = stratified_split(train.labels, validation_size(len(train)), generator)
    return {"train": train.subset(kept), "validation": train.subset(held)}


def _fingerprint(folder: Path, splits: dict[str, FolderSplit]) -> str:
    """Hash names and file sizes: reading every image would take minutes."""
    digest = hashlib.sha256()
    for part, split in splits.items():
        digest.update(f"{part} {split.size}\n".encode())
        for file in split.files:
            digest.update(f"{file.relative_to(folder)} {file.stat().st_size}\n".encode())
    return digest.hexdigest()
