"""The weight that stages amount to, against the stages run one after the other."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from tdkit.decompositions.base import compose
from tdkit.layers.spec import LayerSpec, spec_of

KERNELS = {
    "none": [(1, 1), (1, 1)],
    "one": [(1, 1), (3, 2), (1, 1)],
    "apart": [(3, 1), (1, 1), (1, 2)],
    "shared": [(3, 1), (2, 3)],
}


def stage(channels: int, outputs: int, kernel: tuple[int, int], groups: int = 1) -> LayerSpec:
    return spec_of(nn.Conv2d(channels, outputs, kernel, groups=groups, bias=False))


@pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_amount_to_what_they_do_in_turn(
    kernels: list[tuple[int, int]], groups: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    widths = [6, *(8 - 2 * (i % 2) for i in range(len(kernels)))]
    stages = [
        stage(widths[i], widths[i + 1], kernel, groups if i == 1 else 1)
        for i, kernel in enumerate(kernels)
    ]
    weights = [
        torch.randn(s.weight_shape, dtype=torch.float64, generator=generator) for s in stages
    ]
    height, width = (sum(sides) - len(kernels) + 1 for sides in zip(*kernels, strict=True))
    whole = compose(stages, weights, stage(6, widths[-1], (height, width)))
    images = torch.randn(2, 6, 9, 8, dtype=torch.float64, generator=generator)
    expected = images
    for spec, weight in zip(stages, weights, strict=True):
        expected = functional.conv2d(expected, weight, groups=spec.groups)
    torch.testing.assert_close(functional.conv2d(images, whole), expected, rtol=1e-12, atol=1e-12)
