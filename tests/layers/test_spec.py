"""Layers as records: what torch builds from them is the oracle."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from tdkit.errors import UsageError
from tdkit.layers.spec import KINDS, LayerSpec, spec_of

MODULES = {
    "linear": nn.Linear(5, 7),
    "no-bias": nn.Linear(5, 7, bias=False),
    "conv1d": nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2),
    "strided": nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(1, 2), groups=2),
    "same": nn.Conv2d(4, 6, (2, 4), padding="same", padding_mode="circular"),
    "valid": nn.Conv2d(4, 6, 3, padding="valid"),
    "reflect": nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", bias=False),
    "conv3d": nn.Conv3d(2, 4, (1, 2, 3), padding=(0, 1, 2), padding_mode="replicate"),
    "transposed1d": nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1),
    "transposed2d": nn.ConvTranspose2d(4, 6, 3, stride=(2, 3), output_padding=(1, 2), groups=2),
    "transposed3d": nn.ConvTranspose3d(4, 2, 2, dilation=2, bias=False),
}


def example(spec: LayerSpec) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    size = range(7, 7 + len(spec.kernel_size))
    return torch.randn(2, spec.in_channels, *size, generator=generator)


@pytest.mark.parametrize("name", MODULES)
class TestEveryKind:
    @pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
    def test_what_is_built_from_the_description_computes_the_same(self, name: str) -> None:
        module = MODULES[name]
        spec = spec_of(module)
        built = spec.build()
        built.load_state_dict(module.state_dict())
        assert type(built) is type(module)
        assert torch.equal(built(example(spec)), module(example(spec)))
        assert spec_of(built) == spec

    def test_counts_and_shapes_are_those_of_torch(self, name: str) -> None:
        module, spec = MODULES[name], spec_of(MODULES[name])
        assert spec.weight_shape == module.get_parameter("weight").shape
        assert spec.weight_parameters == module.get_parameter("weight").numel()
        assert spec.parameters == sum(p.numel() for p in module.parameters())

    def test_json_round_trip(self, name: str) -> None:
        spec = spec_of(MODULES[name])
        assert LayerSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec

    def test_a_layer_is_its_groups_side_by_side(self, name: str) -> None:
        spec = spec_of(MODULES[name])
        group = spec.per_group()
        assert (group.groups, group.bias) == (1, False)
        assert group.repeated(spec.groups).with_bias(spec.bias) == spec


def test_repeated_layers_do_not_mix() -> None:
    spec = spec_of(nn.Conv2d(4, 6, 3, groups=2, bias=False))
    single, both = spec.build(), spec.repeated(3).build()
    weight = torch.randn(6, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    single.load_state_dict({"weight": weight})
    both.load_state_dict({"weight": torch.cat([weight, weight, weight])})
    x = example(spec)
    assert torch.allclose(both(torch.cat([x, x, x], 1)), torch.cat([single(x)] * 3, 1), atol=1e-6)


def test_pointwise_stages_move_nothing() -> None:
    for name, module in MODULES.items():
        stage = spec_of(module).pointwise(3, 9)
        assert not stage.transposed
        assert stage.weight_shape == (9, 3, *(1 for _ in stage.kernel_size))
        x = torch.randn(2, 3, *(5 for _ in stage.kernel_size))
        assert stage.build()(x).shape == (2, 9, *x.shape[2:]), name


def test_one_axis_of_a_layer_and_then_the_other_is_both() -> None:
    spec = LayerSpec("Conv2d", 3, 4, (3, 4), (2, 1), (1, 0), (1, 2), (0, 0), padding_mode="reflect")
    rows, columns = spec.spatial(3, 2, axes=[0]), spec.spatial(2, 4, axes=[1])
    assert (rows.kernel_size, rows.stride, rows.padding) == ((3, 1), (2, 1), (1, 0))
    assert (columns.kernel_size, columns.dilation) == ((1, 4), (1, 2))
    assert (rows.dilation, columns.stride, columns.padding) == ((1, 1), (1, 1), (0, 0))
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(rows.weight_shape, generator=generator)
    along = torch.randn(columns.weight_shape, generator=generator)
    stages = [rows.build(), columns.build(), spec.build()]
    both = torch.einsum("riyu,orvx->oiyx", down, along)
    for stage, weight in zip(stages, (down, along, both), strict=True):
        stage.load_state_dict({"weight": weight})
    x = example(spec)
    assert torch.allclose(stages[1](stages[0](x)), stages[2](x), atol=1e-5)


def test_all_axes_are_the_layer_between_other_channels() -> None:
    spec = spec_of(nn.Conv2d(4, 6, (3, 5), padding=1, groups=2))
    assert spec.spatial(7, 8) == replace(spec, in_channels=7, out_channels=8, groups=1, bias=False)


def test_a_transposed_stage_keeps_the_output_padding_of_its_axis() -> None:
    spec = spec_of(nn.ConvTranspose2d(4, 6, 3, stride=3, output_padding=(1, 2)))
    assert spec.spatial(4, 6, axes=[1]).output_padding == (0, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_building_draws_no_random_numbers(kind: str) -> None:
    spec = spec_of(KINDS[kind](4, 4) if kind == "Linear" else KINDS[kind](4, 4, 3))
    before = torch.get_rng_state()
    spec.build()
    assert torch.equal(torch.get_rng_state(), before)


def test_dtype_and_device_are_those_asked_for() -> None:
    built = spec_of(nn.Conv2d(2, 3, 3)).build(dtype=torch.float16, device="meta")
    weight = built.get_parameter("weight")
    assert (weight.dtype, weight.device.type) == (torch.float16, "meta")


@pytest.mark.parametrize("module", [nn.ReLU(), nn.Embedding(3, 4), nn.BatchNorm2d(3)])
def test_other_classes_have_no_description(module: nn.Module) -> None:
    with pytest.raises(KeyError, match=type(module).__name__):
        spec_of(module)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({}, "not a layer description"),
        ({"kind": "Linear", "in_channels": 3}, "not a layer description"),
        ({"kind": "Linear", "in_channels": 3, "out_channels": 4, "rank": 2}, "not a layer desc"),
        ({"kind": "LSTM", "in_channels": 3, "out_channels": 4}, "unknown kind of layer 'LSTM'"),
        ({"kind": ["Linear"], "in_channels": 3, "out_channels": 4}, "unknown kind of layer"),
        ([1, 2], "not a layer description"),
        ("Linear", "not a layer description"),
        (None, "not a layer description"),
    ],
)
def test_what_describes_no_layer_is_refused(value: object, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        LayerSpec.from_json(value)
