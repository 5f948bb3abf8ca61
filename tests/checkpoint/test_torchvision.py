"""Every torchvision classifier, saved whole, loads as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import models

from tdkit.checkpoint import load_model
from tdkit.checkpoint.recognition import may_be
from tdkit.checkpoint.states import build_light
from tdkit.errors import TdkitError
from tdkit.layers.spec import KINDS

EXCEPTIONS: dict[str, str] = {}
"""Classifiers that do not load when saved whole, with the reason; the documentation lists them."""

NAMES = models.list_models(module=models)
FULL_SIZE = ["mobilenet_v3_small", "shufflenet_v2_x0_5", "resnet18"]
OTHERS = [
    "fasterrcnn_mobilenet_v3_large_fpn",
    "ssdlite320_mobilenet_v3_large",
    "lraspp_mobilenet_v3_large",
    "r2plus1d_18",
    "swin3d_t",
    "raft_small",
]


def create(name: str) -> nn.Module:
    options: dict[str, Any] = {"weights": None}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    if name in OTHERS[:3]:
        options["weights_backbone"] = None
    return build_light(lambda: models.get_model(name, **options), {})


def shrink(model: nn.Module) -> nn.Module:
    """One element for every weight and buffer: classes and structure stay, the size does not."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.in_features = module.out_features = 1
        elif type(module) in KINDS.values():
            module.in_channels = module.out_channels = module.groups = 1
            module.kernel_size = (1,) * len(module.kernel_size)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                shape = (1,) * (parameter.ndim if type(module) in KINDS.values() else 1)
                module._parameters[name] = nn.Parameter(torch.rand(shape))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.rand(1)
    return model


def assert_equal(model: nn.Module, expected: nn.Module) -> None:
    assert str(model) == str(expected)
    found, wanted = model.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("name", [name for name in NAMES if name not in EXCEPTIONS])
def test_saved_whole_it_loads_bit_equal(name: str, tmp_path: Path) -> None:
    model = create(name)
    assert may_be(name.replace("_", "-"), model.state_dict())
    shrink(model)
    torch.save(model, tmp_path / "model.pt")
    assert_equal(load_model(tmp_path / "model.pt", models={}).model, model)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_it_loads_and_computes_the_same(name: str, tmp_path: Path) -> None:
    model = models.get_model(name, weights=None).eval()
    torch.save(model, tmp_path / "model.pt")
    loaded = load_model(tmp_path / "model.pt", models={}).model
    assert_equal(loaded, model)
    inputs = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(inputs), model(inputs))


@pytest.mark.parametrize("name", OTHERS)
def test_detection_segmentation_and_video_load_too(name: str, tmp_path: Path) -> None:
    model = shrink(create(name))
    torch.save(model, tmp_path / "model.pt")
    assert_equal(load_model(tmp_path / "model.pt", models={}).model, model)


def test_the_exceptions_are_still_exceptions(tmp_path: Path) -> None:
    for name in EXCEPTIONS:
        torch.save(shrink(create(name)), tmp_path / "model.pt")
        with pytest.raises(TdkitError, match=r"model\.pt"):
            load_model(tmp_path / "model.pt", models={})
