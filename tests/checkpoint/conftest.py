from __future__ import annotations

import urllib.error
from collections import OrderedDict
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from tdkit.hookspecs import ModelRecord

if TYPE_CHECKING:
    from collections.abc import Mapping


def _tiny(in_channels: int = 1, num_classes: int = 10, width: int = 4) -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(in_channels, width, 3, padding=1),
            norm1=nn.BatchNorm2d(width),
            relu1=nn.ReLU(inplace=True),
            conv2=nn.Conv2d(width, 2 * width, 3, stride=2),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            head=nn.Linear(2 * width, num_classes),
        )
    )


def _wide(in_channels: int = 1, num_classes: int = 10) -> nn.Module:
    return _tiny(in_channels, num_classes, width=6)


class _Tied(nn.Module):
    def __init__(self, in_channels: int = 8, num_classes: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8, bias=False)
        self.second = nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.full((3,), 2.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)) * self.scale[0]


def _seeded(create: type[nn.Module] | object) -> Mapping[str, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create().state_dict()  # type: ignore[operator]


def _offline() -> Mapping[str, torch.Tensor]:
    raise urllib.error.URLError("[Errno -3] Temporary failure in name resolution")


def _bad_hash() -> Mapping[str, torch.Tensor]:
    raise RuntimeError('invalid hash value (expected "abc", got "def")')


@pytest.fixture(scope="session")
def models() -> dict[str, ModelRecord]:
    records = [
        ModelRecord("tiny", "", _tiny, (1, 8, 8), 10, {"seed-0": lambda: _seeded(_tiny)}),
        ModelRecord("tiny-wide", "", _wide, (1, 8, 8), 10, {"offline": _offline, "bad": _bad_hash}),
        ModelRecord("tied-net", "", _Tied, (8,), 8),
    ]
    return {record.name: record for record in records}


@pytest.fixture
def tiny() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return _tiny().eval()
