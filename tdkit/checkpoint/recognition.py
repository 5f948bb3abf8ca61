"""Tell the architecture of a state dict from its names and shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tdkit.checkpoint.states import Fit, Structure, fit
from tdkit.checkpoint.text import listed
from tdkit.errors import UsageError, option

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from tdkit.hookspecs import ModelRecord

_SIGNS: Mapping[str, str] = {
    "alexnet": "classifier.6.",
    "convnext": "features.1.0.layer_scale",
    "densenet": "features.denseblock1.",
    "efficientnet": "features.1.0.block.0.0.",
    "googlenet": "inception3a.",
    "inception": "Conv2d_1a_3x3.",
    "maxvit": "blocks.0.layers.0.layers.MBconv.",
    "mnasnet": "layers.8.0.layers.0.",
    "mobilenet-v2": "features.1.conv.",
    "mobilenet-v3": "features.1.block.0.0.",
    "regnet": "trunk_output.block1.",
    "resnet": "layer1.0.conv1.",
    "resnext": "layer1.0.conv1.",
    "shufflenet": "stage2.0.branch2.",
    "squeezenet": "features.3.squeeze.",
    "swin": "features.1.0.attn.",
    "vgg": "classifier.6.",
    "vit": "encoder.layers.encoder_layer_0.",
    "wide-resnet": "layer1.0.conv1.",
}
"""What torchvision's families are called, and how a name in their state dicts begins."""


def recognise(
    models: Mapping[str, ModelRecord],
    structure: Structure,
    state: Mapping[str, Tensor],
    path: Path,
) -> tuple[str, Fit]:
    """Find the one registered model that a state dict fits.

    Models that fit with their own class and channel counts come before those that need others.

    Args:
        models: The registered models.
        structure: What stands in the place of replaced layers.
        state: The state dict; its tensors may have any shape.
        path: The file, for messages.

    Raises:
        UsageError: If none fits, or several do.
    """
    likely = {name: record for name, record in models.items() if may_be(name, state)}
    for candidates in (likely, {name: models[name] for name in models if name not in likely}):
        fits = _fits(candidates, structure, state)
        exact = {name: found for name, found in fits.items() if not found.options}
        chosen = exact or fits
        if len(chosen) == 1:
            return next(iter(chosen.items()))
        if chosen:
            raise _unclear(path, f"fits several registered models: {', '.join(chosen)}")
    raise _unclear(path, f"fits no registered model; it holds {listed(state)}")


def may_be(name: str, state: Mapping[str, Tensor]) -> bool:
    """Whether a model is worth building: its family's names occur, or none are known.

    Args:
        name: The registered name.
        state: The state dict; its tensors may have any shape.
    """
    sign = next((sign for family, sign in _SIGNS.items() if name.startswith(family)), None)
    return sign is None or any(sign in key for key in state)


def _fits(
    models: Mapping[str, ModelRecord], structure: Structure, state: Mapping[str, Tensor]
) -> dict[str, Fit]:
    fits = {}
    for name, record in models.items():
        try:
            found = fit(record.create, {}, structure, state)
        except Exception:  # a model that cannot be made is not the one
            continue
        if isinstance(found, Fit):
            fits[name] = found
    return fits


def _unclear(path: Path, reason: str) -> UsageError:
    return UsageError(
        f"{path} is a state_dict that {reason}",
        f"name its architecture: {option('arch', 'NAME')} or "
        f"{option('arch', 'package.module:callable')}",
    )
