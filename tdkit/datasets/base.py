"""What a data set is: named splits that yield standardised batches of images."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch

from tdkit.errors import UnreadableFileError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

PADDING = 4
"""Pixels of zeros around an image before the random crop (the paper's section 4.1)."""

VALIDATION_IMAGES = 5_000
"""Training images held back for validation (the paper's section 4.1)."""

# Images of a split that are kept on a GPU.
_KEPT_BYTES = 2**28


class Split(Protocol):
    """Images of one split, in a fixed order."""

    @property
    def labels(self) -> Tensor | None:
        """Class of every image, int64 of shape (n,), or None when they are unlabelled."""

    def __len__(self) -> int:
        """Return the number of images n."""

    def batches(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        augment: bool = False,
        limit: int | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of images and their labels; the last batch may be smaller.

        Args:
            batch_size: Images per batch.
            generator: Source of the order and of the augmentation; None keeps the fixed order.
            augment: Whether to crop and flip at random; needs a generator.
            limit: Use at most this many images: a random choice with a generator, otherwise
                evenly spaced ones, because neighbours in a folder are of one class.

        Yields:
            Standardised images, float32 of shape (batch, channels, height, width), and labels,
            int64 of shape (batch,); -1 stands for each label of an unlabelled split.

        Raises:
            UsageError: If the batch size is not positive, or augmentation lacks a generator.
            UnreadableFileError: If an image cannot be read.
        """

    def subset(self, index: Tensor) -> Split:
        """Return the images at some positions, int64 of shape (m,)."""


@dataclass(frozen=True)
class Dataset:
    """A data set with its splits; a split that does not exist is None.

    Args:
        name: What the user typed.
        classes: Names of the classes; empty when the images are unlabelled.
        input_shape: (channels, height, width) of one image.
        mean: Mean per channel of pixels in [0, 1], subtracted from every image.
        std: Standard deviation per channel, by which every image is divided.
        fingerprint: Changes when the images, labels or splits do; a hexadecimal SHA-256.
        train: Images to train on.
        validation: Images to choose by: early stopping, hyperparameters.
        test: Images to report on.
        notes: What the user should know about how the images are prepared.
    """

    name: str
    classes: tuple[str, ...]
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str
    train: Split | None = None
    validation: Split | None = None
    test: Split | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class TensorSplit:
    """A :class:`Split` held in memory.

    Args:
        images: (n, channels, height, width), either uint8 (divided by 255) or float in [0, 1].
        labels: int64 of shape (n,), or None.
        mean: Mean per channel.
        std: Standard deviation per channel.
    """

    images: Tensor
    labels: Tensor | None
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def batches(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        augment: bool = False,
        limit: int | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield standardised batches; see :meth:`Split.batches`.

        Yields:
            Images, float32 of shape (batch, channels, height, width), and labels, int64 (batch,).

        Raises:
            UsageError: If the batch size is not positive, or augmentation lacks a generator.
        """
        if augment and generator is None:
            raise UsageError("augmentation is random and needs a torch.Generator")
        for index in batches_of(image_order(len(self), generator, limit), batch_size):
            # Images that are kept on a GPU are chosen there, without waiting for it.
            images = self.images[index.to(self.images.device, non_blocking=True)]
            if augment and generator is not None:
                images = crop_and_flip(images, generator)
            labels = torch.full_like(index, -1) if self.labels is None else self.labels[index]
            yield standardise(images, self.mean, self.std), labels

    def subset(self, index: Tensor) -> TensorSplit:
        """Return the images at some positions, int64 of shape (m,)."""
        labels = None if self.labels is None else self.labels[index]
        return TensorSplit(self.images[index], labels, self.mean, self.std)


def kept_on(dataset: Dataset, device: torch.device) -> Dataset:
    """A data set whose images are moved to a device once and for all.

    Splits that are not in memory, have more than 256 MiB of images, or find no room there stay
    where they are; their batches are moved one by one by those who use them. Labels stay on the
    CPU.

    Args:
        dataset: The data set, its images on the CPU.
        device: Where they are used.
    """
    return replace(
        dataset,
        train=_kept(dataset.train, device),
        validation=_kept(dataset.validation, device),
        test=_kept(dataset.test, device),
    )


def _kept(split: Split | None, device: torch.device) -> Split | None:
    if not isinstance(split, TensorSplit) or split.images.nbytes > _KEPT_BYTES:
        return split
    try:
        return replace(split, images=split.images.to(device))
    except torch.OutOfMemoryError:
        return split


def image_order(count: int, generator: torch.Generator | None, limit: int | None) -> Tensor:
    """Return the positions of the images to visit, int64 of shape (min(count, limit),).

    Args:
        count: Number of images in the split.
        generator: Shuffles, or None for the fixed order.
        limit: As in :meth:`Split.batches`.

    Raises:
        UsageError: The limit is not positive.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"the number of images must be at least 1, not {limit}")
    wanted = count if limit is None else min(count, limit)
    if generator is not None:
        return torch.randperm(count, generator=generator)[:wanted]
    return torch.arange(wanted) * count // max(wanted, 1)


def batches_of(positions: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Cut positions into batches; the last one may be smaller.

    Args:
        positions: Of images, int64 (n,).
        batch_size: Images per batch.

    Yields:
        Positions, (batch,).

    Raises:
        UsageError: The batch size is not positive.
    """
    if batch_size < 1:
        raise UsageError(f"the batch size must be at least 1, not {batch_size}")
    for start in range(0, len(positions), batch_size):
        yield positions[start : start + batch_size]


def standardise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scale uint8 to [0, 1], subtract the mean and divide by the deviation of each channel.

    Args:
        images: (n, channels, height, width), uint8 or float.
        mean: Mean per channel.
        std: Standard deviation per channel.

    Returns:
        float32 of the same shape.
    """
    pixels = images / 255 if images.dtype == torch.uint8 else images.to(torch.float32)
    both = torch.tensor([mean, std]).to(images.device, non_blocking=True)
    centre, width = both.view(2, 1, -1, 1, 1).unbind()
    scaled: Tensor = (pixels - centre) / width
    return scaled


def crop_and_flip(images: Tensor, generator: torch.Generator, padding: int = PADDING) -> Tensor:
    """Shift each image by up to ``padding`` pixels per axis, and mirror every second one.

    The same as padding with zeros, cropping at random to the old size, and flipping
    horizontally with probability one half, drawn independently for each image.

    Args:
        images: (n, channels, height, width) before standardisation, so that zero is black.
        generator: Source of all randomness.
        padding: Zeros on each side.

    Returns:
        A new tensor of the same shape and dtype.
    """
    count, channels, height, width = images.shape
    padded = torch.nn.functional.pad(images, [padding] * 4)
    shift = torch.randint(2 * padding + 1, (2, count, 1), generator=generator)
    mirrored = torch.randint(2, (count, 1), generator=generator).bool()
    columns = torch.arange(width)
    columns = torch.where(mirrored, columns.flip(0), columns) + shift[1]
    rows = torch.arange(height) + shift[0]
    sample = torch.arange(count).view(-1, 1, 1, 1)
    channel = torch.arange(channels).view(1, -1, 1, 1)
    return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


def stratified_split(
    labels: Tensor, size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Choose ``size`` positions with the class shares of the whole, and return the rest too.

    Args:
        labels: int64 of shape (n,).
        size: Number of positions to choose, at most n. Each class gives its share rounded down;
            the classes with the largest remainders give one more.
        generator: Source of the choice.

    Returns:
        The remaining and the chosen positions, int64 (n - size,) and (size,), both sorted.
    """
    counts = torch.bincount(labels)
    share = counts * size
    quota = share // len(labels)
    largest_first = (share % len(labels)).argsort(descending=True, stable=True)
    quota[largest_first[: size - int(quota.sum())]] += 1
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label, wanted in enumerate(quota.tolist()):
        members = (labels == label).nonzero().flatten()
        order = torch.randperm(len(members), generator=generator)
        chosen[members[order[:wanted]]] = True
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()


def validation_size(count: int) -> int:
    """Return how many of ``count`` training images validate: 5,000, but at most a tenth."""
    return min(VALIDATION_IMAGES, count // 10)


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel of uint8 images, in units of [0, 1].

    Args:
        images: uint8 of shape (n, channels, height, width).
    """
    mean, std = [], []
    values = torch.arange(256, dtype=torch.float64) / 255
    for channel in images.unbind(1):
        # The histogram is exact, and needs no float copy of the data.
        shares = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        centre = float(shares @ values)
        mean.append(centre)
        # A constant channel would otherwise be divided by zero.
        std.append(float(shares @ (values - centre) ** 2) ** 0.5 or 1.0)
    return tuple(mean), tuple(std)


def fingerprint(*tensors: Tensor) -> str:
    """Return the SHA-256 of the contents, dtypes and shapes of tensors, in hexadecimal.

    Args:
        tensors: On the CPU, of any shape.
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_images(source: str, images: Tensor, labels: Tensor | None, num_classes: int) -> None:
    """Refuse images and labels that no model could be measured on.

    Args:
        source: Names the data in the message.
        images: Should be uint8 or float of shape (n, channels, height, width).
        labels: Should be int64 of shape (n,) with values from 0 to num_classes − 1, or None.
        num_classes: Number of classes.

    Raises:
        UnreadableFileError: There are no images, their shape or dtype is wrong, a pixel is not
            finite, or a label is missing or out of range.
    """
    hint = "Check that the file is complete and is the data set you meant."
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise UnreadableFileError(f"{source}: images are {images.dtype}, not uint8 or float", hint)
    if images.ndim != 4:
        shape = tuple(images.shape)
        raise UnreadableFileError(f"{source}: images have shape {shape}, not (n, c, h, w)", hint)
    if images.numel() == 0:
        raise UnreadableFileError(f"{source}: there are no images", hint)
    if images.is_floating_point() and not images.isfinite().all():
        raise UnreadableFileError(f"{source}: some pixels are NaN or infinite", hint)
    if labels is not None:
        _check_labels(source, labels, len(images), num_classes)


def _check_labels(source: str, labels: Tensor, count: int, num_classes: int) -> None:
    hint = "Check that images and labels belong together."
    if labels.dtype != torch.int64 or labels.shape != (count,):
        found = f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise UnreadableFileError(f"{source}: labels are {found}, not {count} integers", hint)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        wrong = low if low < 0 else high
        raise UnreadableFileError(
            f"{source}: label {wrong} is outside 0 to {num_classes - 1}", hint
        )


def in_memory_dataset(
    name: str,
    classes: tuple[str, ...],
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    seed: int,
) -> Dataset:
    """Build a data set from its official training and test part, split as in the paper.

    A stratified choice of training images (:func:`validation_size`) becomes the validation
    split; mean and deviation come from the training images that remain.

    Args:
        name: What the user typed.
        classes: Names of the classes.
        train: uint8 images of shape (n, channels, height, width) and int64 labels (n,).
        test: The same for the test part.
        seed: Of the choice of validation images.

    Raises:
        UnreadableFileError: See :func:`check_images`; or the image sizes of the parts differ.
    """
    for part, (images, labels) in (("training part", train), ("test part", test)):
        check_images(f"{name}, {part}", images, labels, len(classes))
    images, labels = train
    if images.shape[1:] != test[0].shape[1:]:
        raise UnreadableFileError(f"{name}: training and test images differ in size")
    generator = torch.Generator().manual_seed(seed)
    kept, held = stratified_split(labels, validation_size(len(labels)), generator)
    mean, std = channel_statistics(images[kept])
    channels, height, width = images.shape[1:]
    return Dataset(
        name,
        classes,
        (channels, height, width),
        mean,
        std,
        fingerprint(*train, *test, held),
        train=TensorSplit(images[kept], labels[kept], mean, std),
        validation=TensorSplit(images[held], labels[held], mean, std),
        test=TensorSplit(*test, mean, std),
    )
