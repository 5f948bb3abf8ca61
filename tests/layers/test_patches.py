"""A layer is its rows times its weight."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tdkit.layers.impulses import split_groups
from tdkit.layers.patches import input_rows, output_rows, positions
from tdkit.layers.spec import KINDS, LayerSpec, spec_of
from tdkit.testing import layer_specs


def example(spec: LayerSpec, seed: int, batched: bool) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = [
        max(5, d * (k - 1) + 1) + axis
        for axis, (d, k) in enumerate(zip(spec.dilation, spec.kernel_size, strict=True))
    ]
    shape = (3, 2, spec.in_channels) if spec.kind == "Linear" else (3, spec.in_channels, *size)
    value = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return value if batched else value[0]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_times_the_weight_are_the_output(kind: str) -> None:
    @settings(max_examples=60, deadline=None, database=None)
    @given(spec=layer_specs(kind), seed=st.integers(0, 2**31), batched=st.booleans())
    def check(spec: LayerSpec, seed: int, batched: bool) -> None:
        value = example(spec, seed, batched)
        module: nn.Module = spec.with_bias(False).build(dtype=torch.float64)
        with torch.no_grad():
            module.get_parameter("weight").normal_(generator=torch.Generator().manual_seed(seed))
            output = module(value)
        count = positions(spec, output)
        places = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:7]
        weight = split_groups(module.get_parameter("weight").detach(), spec).flatten(2)
        made = input_rows(spec, value, places) @ weight.mT
        assert made.shape == (spec.groups, len(places), spec.out_channels // spec.groups)
        torch.testing.assert_close(made, output_rows(spec, output, places), rtol=1e-10, atol=1e-10)

    check()


def test_positions_are_counted_through_samples_then_along_the_axes() -> None:
    spec = spec_of(nn.Conv2d(1, 1, 1, bias=False))
    assert spec is not None
    value = torch.arange(12.0).reshape(2, 1, 2, 3)
    places = torch.tensor([0, 5, 6, 11])
    assert input_rows(spec, value, places).flatten().tolist() == [0.0, 5.0, 6.0, 11.0]
    assert output_rows(spec, value, places).flatten().tolist() == [0.0, 5.0, 6.0, 11.0]
