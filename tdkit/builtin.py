"""All that tdkit itself provides, through the hooks that anyone uses.

Nothing here imports torch: each record carries what does so when the thing is first used.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from tdkit.hookspecs import (
    CostRecord,
    DatasetRecord,
    DecompositionRecord,
    MetricRecord,
    ModelRecord,
    PlannerRecord,
    StageRecord,
    hookimpl,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tdkit.costs.base import Cost
    from tdkit.datasets.base import Dataset
    from tdkit.decompositions.base import Decomposition
    from tdkit.layers.stages import Stage
    from tdkit.metrics.base import Metric
    from tdkit.planners.base import Planner


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


def _svd(**settings: Any) -> Decomposition:
    from tdkit.decompositions.svd import Svd

    return Svd(**settings)


def _cp(**settings: Any) -> Decomposition:
    from tdkit.decompositions.cp import Cp

    return Cp(**settings)


def _tucker(**settings: Any) -> Decomposition:
    from tdkit.decompositions.tucker import Tucker

    return Tucker(**settings)


def _tt(**settings: Any) -> Decomposition:
    from tdkit.decompositions.tt import TensorTrain

    return TensorTrain(**settings)


@hookimpl
def tdkit_decompositions() -> list[DecompositionRecord]:
    """Provide svd, cp, tucker and tt."""
    return [
        DecompositionRecord("svd", "truncated SVD: k x k to few channels, then 1x1", _svd),
        # At a fixed size its error is the least, but depthwise chains are slow: beyond this keep
        # slower than the dense layer (benchmarks/latency.py), so that one has to ask.
        DecompositionRecord("cp", "CP by ALS: 1x1, depthwise per axis, 1x1", _cp, default=0.25),
        DecompositionRecord(
            "tucker", "channel-mode Tucker by HOSVD: 1x1, k x k core, 1x1", _tucker
        ),
        DecompositionRecord("tt", "tensor train by TT-SVD: 1x1, k x 1, 1 x k, 1x1", _tt),
    ]


def _create(target: str, normalisation: str) -> Metric:
    from tdkit.metrics import features, weights

    module = {"weights": weights, "features": features}[target]
    metric: Metric = getattr(module, normalisation.upper())
    return metric


@hookimpl
def tdkit_metrics() -> list[MetricRecord]:
    """Provide {relative,absolute,scaled}-{weights,features}, and two that see inputs."""
    meaning = {
        "relative": "norm of the difference over the norm of the original",
        "absolute": "norm of the difference",
        "scaled": "norm of the difference over the number of elements",
    }
    needs = {"weights": "", "features": "; needs data"}
    return [
        MetricRecord(f"{name}-{target}", summary + needs[target], partial(_create, target, name))
        for target in needs
        for name, summary in meaning.items()
    ] + [
        MetricRecord(
            "whitened-features",
            "relative-features in closed form, from covariances; needs data",
            _whitened_features,
        ),
        MetricRecord(
            "output-gauss-newton",
            "change of the model's output, from gradients and covariances; needs data",
            _output_gauss_newton,
        ),
    ]


def _whitened_features() -> Metric:
    from tdkit.metrics.curvature import WHITENED

    return WHITENED


def _output_gauss_newton() -> Metric:
    from tdkit.metrics.curvature import GAUSS_NEWTON

    return GAUSS_NEWTON


@hookimpl
def tdkit_costs() -> list[CostRecord]:
    """Provide params and macs."""
    return [
        CostRecord("params", "parameters of the whole model", _params),
        CostRecord("macs", "multiply-accumulates of convolutional and linear layers", _macs),
    ]


def _params() -> Cost:
    from tdkit.costs.params import PARAMS

    return PARAMS


def _macs() -> Cost:
    from tdkit.costs.macs import MACS

    return MACS


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


def _greedy() -> Planner:
    from tdkit.planners.greedy import greedy

    return greedy


def _exact() -> Planner:
    from tdkit.planners.exact import create

    return create()


@hookimpl
def tdkit_planners() -> list[PlannerRecord]:
    """Provide greedy and exact."""
    summary = "least increase of the summed penalties per unit of cost saved, then exchanges"
    return [
        PlannerRecord("greedy", summary, _greedy),
        PlannerRecord("exact", "the least summed penalty, also under several bounds", _exact),
    ]


def _layers() -> type[Stage]:
    from tdkit.layers.spec import LayerSpec

    return LayerSpec


def _move(name: str) -> type[Stage]:
    from tdkit.layers import stages

    cls: type[Stage] = getattr(stages, name)
    return cls


@hookimpl
def tdkit_stages() -> list[StageRecord]:
    """Provide torch's weight layers, and what moves entries between them."""
    return [
        StageRecord("layers", "convolutions, transposed ones, and Linear", _layers),
        StageRecord("flatten", "neighbouring axes as one", partial(_move, "Flatten")),
        StageRecord("unflatten", "one axis as several", partial(_move, "Unflatten")),
        StageRecord("channel-shuffle", "channels in turn", partial(_move, "ChannelShuffle")),
        StageRecord("permute", "the axes in another order", partial(_move, "Permute")),
    ]
