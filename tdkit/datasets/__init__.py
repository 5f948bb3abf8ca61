"""The data sets that can be named after ``--data``; imports no torch until one is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tdkit.hookspecs import DatasetRecord, hookimpl

if TYPE_CHECKING:
    from tdkit.datasets.base import Dataset


@hookimpl
def tdkit_datasets() -> list[DatasetRecord]:
    """Provide Fashion-MNIST, its bundled sample, CIFAR-10 and folders of images."""
    return [
        DatasetRecord("fashion-mnist", "70,000 greyscale images of clothes", _fashion_mnist),
        DatasetRecord(
            "fashion-mnist-sample", "3,000 bundled images of Fashion-MNIST", _fashion_mnist_sample
        ),
        DatasetRecord("cifar10", "60,000 colour images of ten classes", _cifar10),
        DatasetRecord(
            "image-folder", "your own images, one folder per class", _image_folder, takes_path=True
        ),
    ]


def _fashion_mnist(**options: Any) -> Dataset:
    from tdkit.datasets.fashion_mnist import create

    return create(**options)


def _fashion_mnist_sample(**options: Any) -> Dataset:
    from tdkit.datasets.sample import create

    return create(**options)


def _cifar10(**options: Any) -> Dataset:
    from tdkit.datasets.cifar10 import create

    return create(**options)


def _image_folder(**options: Any) -> Dataset:
    from tdkit.datasets.image_folder import create

    return create(**options)
