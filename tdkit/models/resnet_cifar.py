"""ResNet-18 for 32×32 images, the other network of the paper's section 4.1."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torchvision.models import resnet18

if TYPE_CHECKING:
    from torchvision.models import ResNet


def create(in_channels: int = 3, num_classes: int = 10) -> ResNet:
    """Build torchvision's ResNet-18 with a 3×3 first convolution of stride 1.

    The published 7×7 stride-2 stem would leave a 32×32 image only 1×1 pixels at the last stage.

    Args:
        in_channels: Channels of the input, shape (batch, in_channels, 32, 32).
        num_classes: Length of the output, shape (batch, num_classes).
    """
    model: ResNet = resnet18(weights=None, num_classes=num_classes)
    model.conv1 = nn.Conv2d(in_channels, 64, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    return model
