"""torchvision's 80 classification models, each under its own name.

The names and sizes are written down here because asking torchvision for them means importing
torch, which takes seconds; a test compares them with the installed torchvision.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from tdkit.errors import UnreadableFileError, UsageError, option
from tdkit.hookspecs import ModelRecord

if TYPE_CHECKING:
    from torch import Tensor, nn

NUM_CLASSES = 1_000
DEFAULT_SIZE = 224

NAMES: tuple[str, ...] = (
    "alexnet",
    "convnext_base",
    "convnext_large",
    "convnext_small",
    "convnext_tiny",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "efficientnet_b0",
    "efficientnet_b1",
    "efficientnet_b2",
    "efficientnet_b3",
    "efficientnet_b4",
    "efficientnet_b5",
    "efficientnet_b6",
    "efficientnet_b7",
    "efficientnet_v2_l",
    "efficientnet_v2_m",
    "efficientnet_v2_s",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mnasnet0_75",
    "mnasnet1_0",
    "mnasnet1_3",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mobilenet_v3_small",
    "regnet_x_16gf",
    "regnet_x_1_6gf",
    "regnet_x_32gf",
    "regnet_x_3_2gf",
    "regnet_x_400mf",
    "regnet_x_800mf",
    "regnet_x_8gf",
    "regnet_y_128gf",
    "regnet_y_16gf",
    "regnet_y_1_6gf",
    "regnet_y_32gf",
    "regnet_y_3_2gf",
    "regnet_y_400mf",
    "regnet_y_800mf",
    "regnet_y_8gf",
    "resnet101",
    "resnet152",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "shufflenet_v2_x1_0",
    "shufflenet_v2_x1_5",
    "shufflenet_v2_x2_0",
    "squeezenet1_0",
    "squeezenet1_1",
    "swin_b",
    "swin_s",
    "swin_t",
    "swin_v2_b",
    "swin_v2_s",
    "swin_v2_t",
    "vgg11",
    "vgg11_bn",
    "vgg13",
    "vgg13_bn",
    "vgg16",
    "vgg16_bn",
    "vgg19",
    "vgg19_bn",
    "vit_b_16",
    "vit_b_32",
    "vit_h_14",
    "vit_l_16",
    "vit_l_32",
    "wide_resnet101_2",
    "wide_resnet50_2",
)
"""What ``torchvision.models.list_models(module=torchvision.models)`` returns."""

SIZES: dict[str, int] = {
    "efficientnet_b1": 240,
    "efficientnet_b2": 288,
    "efficientnet_b3": 300,
    "efficientnet_b4": 380,
    "efficientnet_b5": 456,
    "efficientnet_b6": 528,
    "efficientnet_b7": 600,
    "efficientnet_v2_l": 480,
    "efficientnet_v2_m": 480,
    "efficientnet_v2_s": 384,
    "inception_v3": 299,
    "regnet_y_128gf": 384,
    "swin_v2_b": 256,
    "swin_v2_s": 256,
    "swin_v2_t": 256,
    "vit_h_14": 518,
}
"""Height and width in pixels where they are not 224: what the published weights want."""

_OPTIONS: dict[str, dict[str, object]] = {
    # With init_weights left out torchvision warns that its default will become False.
    "googlenet": {"init_weights": False, "aux_logits": False, "transform_input": True},
    "inception_v3": {"init_weights": False, "transform_input": True},
    # Its positions are learned for one size.
    "vit_h_14": {"image_size": SIZES["vit_h_14"]},
}
"""What makes a model with random weights the one that the published weights belong to."""


def records() -> list[ModelRecord]:
    """Return the record of every model; torch is imported when one is created."""
    return [_record(name) for name in NAMES]


def _record(name: str) -> ModelRecord:
    size = SIZES.get(name, DEFAULT_SIZE)
    return ModelRecord(
        name.replace("_", "-"),
        f"torchvision's {name}, ImageNet",
        partial(create, name),
        (3, size, size),
        NUM_CLASSES,
        weights={"imagenet": partial(published_weights, name)},
    )


def create(name: str, in_channels: int = 3, num_classes: int = NUM_CLASSES) -> nn.Module:
    """Build one of torchvision's classifiers with random weights.

    Args:
        name: torchvision's name, one of :data:`NAMES`.
        in_channels: Must be 3; torchvision's builders have no such option.
        num_classes: Length of the output, shape (batch, num_classes).

    Raises:
        UsageError: ``in_channels`` is not 3.
    """
    from torchvision import models

    if in_channels != 3:
        raise UsageError(
            f"{name} takes images of 3 channels, not {in_channels}",
            "image-folder:PATH turns greyscale images into 3 channels.",
        )
    options = _OPTIONS.get(name, {})
    model: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **options)
    return model


def published_weights(name: str) -> dict[str, Tensor]:
    """Download torchvision's default weights, or take them from torch's cache.

    Args:
        name: torchvision's name, one of :data:`NAMES`.

    Returns:
        A state dict; its tensors have any shape.

    Raises:
        UnreadableFileError: There is no network, or the file is damaged.
    """
    from torchvision import models

    try:
        # The builder, not the bare file: it renames DenseNet's old keys and drops GoogLeNet's
        # auxiliary heads. It checks the file's hash.
        model = models.get_model(name, weights="DEFAULT", progress=False)
    except (OSError, RuntimeError) as error:
        raise UnreadableFileError(
            f"the published weights of {name} could not be downloaded: {_first_line(error)}",
            f"connect to the network, give a file of weights, or use {option('weights', 'none')}",
        ) from error
    return dict(model.state_dict())


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
