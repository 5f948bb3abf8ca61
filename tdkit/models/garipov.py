"""GaripovNet, the seven-layer network of the paper's section 4.1 (Garipov et al., 2016)."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from tdkit.errors import UnreadableFileError

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_FILE = Path(__file__).parent.parent / "assets" / "garipov-fashion-mnist.safetensors"

# Output channels of the six convolutions; a pooling layer follows the second and the fourth.
_CHANNELS = (64, 64, 128, 128, 128, 128)
_POOL_AFTER = (2, 4)


def create(in_channels: int = 1, num_classes: int = 10) -> nn.Sequential:
    """Build GaripovNet with random weights, from ``torch.nn`` layers only.

    Being one flat ``nn.Sequential``, a file that holds the whole module loads without tdkit.

    Args:
        in_channels: Channels of the input, shape (batch, in_channels, height, width); global
            average pooling accepts any height and width. 28 pixels become 14 and then 7.
        num_classes: Length of the output, shape (batch, num_classes).
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = in_channels
    for number, out_channels in enumerate(_CHANNELS, start=1):
        last = number == len(_CHANNELS)
        # BatchNorm subtracts the mean, so a bias before it would have no effect.
        layers[f"conv{number}"] = nn.Conv2d(channels, out_channels, 3, padding=1, bias=last)
        if not last:
            layers[f"bn{number}"] = nn.BatchNorm2d(out_channels)
            layers[f"relu{number}"] = nn.ReLU()
        if number in _POOL_AFTER:
            pool = _POOL_AFTER.index(number) + 1
            layers[f"pool{pool}"] = nn.MaxPool2d(3, stride=2, padding=1)
        channels = out_channels
    layers["avgpool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(channels, num_classes)
    return nn.Sequential(layers)


def fashion_mnist_weights() -> dict[str, Tensor]:
    """Read the bundled weights, trained by ``recipes/garipov-fashion-mnist.toml``.

    Returns:
        A state dict: kernels (out, in, height, width), matrices (out, in) and biases (out,).

    Raises:
        UnreadableFileError: The file is missing or damaged.
    """
    try:
        return load_file(WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise UnreadableFileError(
            f"the bundled weights {WEIGHTS_FILE} cannot be read: {error}", "Install tdkit again."
        ) from error


def fashion_mnist_recipe() -> str:
    """Read the recipe that the bundled weights were trained by, in TOML.

    Raises:
        UnreadableFileError: The file beside the weights is missing or damaged.
    """
    file = WEIGHTS_FILE.with_suffix(".json")
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["recipe"])
    except (OSError, ValueError, KeyError) as error:
        raise UnreadableFileError(
            f"{file} cannot be read: {error}", "Install tdkit again."
        ) from error
