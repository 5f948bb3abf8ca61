"""The architectures that can be named instead of a file; imports no torch until one is built."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tdkit.hookspecs import ModelRecord, hookimpl

if TYPE_CHECKING:
    from torch import Tensor, nn


@hookimpl
def tdkit_models() -> list[ModelRecord]:
    """Provide GaripovNet, ResNet-18 for CIFAR-10 and torchvision's classifiers."""
    from tdkit.models.torchvision import records

    return [
        ModelRecord(
            "garipov",
            "GaripovNet, six convolutions; bundled weights for Fashion-MNIST",
            _garipov,
            (1, 28, 28),
            10,
            weights={"fashion-mnist": _garipov_weights},
            recipes={"fashion-mnist": _garipov_recipe},
        ),
        ModelRecord(
            "resnet18-cifar",
            "ResNet-18 with a 3x3 first convolution, for CIFAR-10",
            _resnet18_cifar,
            (3, 32, 32),
            10,
        ),
        *records(),
    ]


def _garipov(in_channels: int = 1, num_classes: int = 10) -> nn.Module:
    from tdkit.models.garipov import create

    return create(in_channels, num_classes)


def _garipov_weights() -> dict[str, Tensor]:
    from tdkit.models.garipov import fashion_mnist_weights

    return fashion_mnist_weights()


def _garipov_recipe() -> str:
    from tdkit.models.garipov import fashion_mnist_recipe

    return fashion_mnist_recipe()


def _resnet18_cifar(in_channels: int = 3, num_classes: int = 10) -> nn.Module:
    from tdkit.models.resnet_cifar import create

    model: nn.Module = create(in_channels, num_classes)
    return model
