"""Stages that move entries, chains, and what a model's file may say about them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.ops import Permute as PermuteModule

from tdkit.decompositions.base import compose
from tdkit.errors import UnsupportedError, UsageError
from tdkit.forward.inputs import Inputs
from tdkit.layers.chains import OWN_STAGES, read_stage, stage_of, weighted
from tdkit.layers.inventory import find_layers
from tdkit.layers.reasons import is_factorization
from tdkit.layers.spec import KINDS, LayerSpec, spec_of
from tdkit.layers.stages import ChannelShuffle, Flatten, Permute, Stage, Unflatten

MOVES: list[Stage] = [
    Flatten(1, -1),
    Unflatten(-1, (2, 3)),
    ChannelShuffle(2),
    Permute((0, 2, 1)),
]


def test_the_own_kinds_are_closed() -> None:
    assert set(OWN_STAGES) == {*KINDS, "Flatten", "Unflatten", "ChannelShuffle", "Permute"}
    with pytest.raises(TypeError):
        OWN_STAGES["Evil"] = Flatten  # type: ignore[index]


@pytest.mark.parametrize(
    ("stage", "shape"),
    [
        (Flatten(0, 3), (2, 3, 4)),
        (Flatten(2, 1), (2, 3, 4)),
        (Unflatten(1, (2, 2)), (2, 3, 4)),
        (Unflatten(-4, (2, 2)), (2, 3, 4)),
        (ChannelShuffle(2), (2, 3, 4)),
        (ChannelShuffle(1), (2, 3)),
        (Permute((0, 2, 1)), (2, 3)),
    ],
)
def test_an_input_that_does_not_fit(stage: Stage, shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError):
        stage.output_shape(shape)
    with pytest.raises((RuntimeError, IndexError, AssertionError, TypeError)):
        stage.build()(torch.zeros(shape))


@pytest.mark.parametrize("stage", MOVES, ids=lambda stage: stage.kind)
def test_moves_have_no_weight_and_no_groups(stage: Stage) -> None:
    assert stage.weight_shape is None
    assert (stage.parameters, stage.state_shapes, stage.macs((2, 6, 6))) == (0, {}, 0)
    assert stage.repeated(1) == stage.ungrouped(1) == stage.with_bias(False) == stage
    assert not stage.carries_bias(6)
    with pytest.raises(UnsupportedError, match="cannot stand in a grouped layer"):
        stage.repeated(2)
    with pytest.raises(UnsupportedError, match="has no bias"):
        stage.with_bias(True)


def test_what_a_module_is() -> None:
    assert stage_of(nn.Flatten()) == Flatten(1, -1)
    assert stage_of(nn.Unflatten(1, (2, 3))) == Unflatten(1, (2, 3))
    assert stage_of(nn.ChannelShuffle(3)) == ChannelShuffle(3)
    assert stage_of(PermuteModule([1, 0])) == Permute((1, 0))
    assert stage_of(nn.Linear(2, 3)) == LayerSpec("Linear", 2, 3, bias=True)
    assert stage_of(nn.ReLU()) is None
    assert stage_of(nn.Flatten(), {"Permute": Permute}) is None


def test_what_derives_from_a_stages_module_is_none() -> None:
    class Loud(nn.Flatten):
        pass

    class Scaled(nn.Linear):
        pass

    assert stage_of(Loud()) is stage_of(Scaled(2, 2)) is None


def test_leading_axes_are_in_json_where_they_say_something() -> None:
    spec = spec_of(nn.Linear(2, 3))
    assert "leading" not in spec.to_json()
    other = LayerSpec("Linear", 2, 3, leading=3)
    assert LayerSpec.from_json(json.loads(json.dumps(other.to_json()))) == other


HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"kind": "Flatten", "start": 0, "end": 99}, "axes"),
    ({"kind": "Flatten", "start": -17, "end": 1}, "axes"),
    ({"kind": "Flatten", "start": 3, "end": 1}, "wrong order"),
    ({"kind": "Flatten", "start": True, "end": 1}, "axes"),
    ({"kind": "Flatten", "start": 0.5, "end": 1}, "axes"),
    ({"kind": "Flatten", "start": [0], "end": 1}, "axes"),
    ({"kind": "Flatten", "start": 0}, "unknown way"),
    ({"kind": "Flatten", "start": 0, "end": 1, "forward": "os.abort"}, "unknown way"),
    ({"kind": "Unflatten", "dim": 1, "sizes": [-1, 4]}, "sizes"),
    ({"kind": "Unflatten", "dim": 1, "sizes": [0, 4]}, "sizes"),
    ({"kind": "Unflatten", "dim": 1, "sizes": [2**20, 2**20]}, "sizes"),
    ({"kind": "Unflatten", "dim": 1, "sizes": [2**31]}, "sizes"),
    ({"kind": "Unflatten", "dim": 1, "sizes": [10**400]}, "sizes"),
    ({"kind": "Unflatten", "dim": 1, "sizes": [1] * 17}, "sizes"),
    ({"kind": "Unflatten", "dim": 1, "sizes": []}, "sizes"),
    ({"kind": "Unflatten", "dim": 1, "sizes": "44"}, "sizes"),
    ({"kind": "Unflatten", "dim": 1, "sizes": {"0": 4}}, "sizes"),
    ({"kind": "Unflatten", "dim": 99, "sizes": [2, 2]}, "axis"),
    ({"kind": "Unflatten", "dim": "channels", "sizes": [2, 2]}, "axis"),
    ({"kind": "ChannelShuffle", "groups": 0}, "groups"),
    ({"kind": "ChannelShuffle", "groups": -2}, "groups"),
    ({"kind": "ChannelShuffle", "groups": 2**31}, "groups"),
    ({"kind": "ChannelShuffle", "groups": [2]}, "groups"),
    ({"kind": "Permute", "dims": [0, 0]}, "dims"),
    ({"kind": "Permute", "dims": [0, 2]}, "dims"),
    ({"kind": "Permute", "dims": [-1, 0]}, "dims"),
    ({"kind": "Permute", "dims": []}, "dims"),
    ({"kind": "Permute", "dims": list(range(17))}, "dims"),
    ({"kind": "Permute", "dims": 3}, "dims"),
    ({"kind": "Permute", "dims": [[0], 1]}, "dims"),
    ({"kind": "Linear", "in_channels": 2, "out_channels": 2, "leading": -1}, "leading"),
    ({"kind": "Linear", "in_channels": 2, "out_channels": 2, "leading": "1"}, "leading"),
    ({"kind": "Evil"}, "unknown way"),
    ({"kind": ["Flatten"], "start": 0, "end": 1}, "unknown way"),
    ({}, "unknown way"),
]


@pytest.mark.parametrize(("value", "match"), HOSTILE, ids=[str(value)[:60] for value, _ in HOSTILE])
def test_absurd_descriptions(value: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        read_stage(value)


def test_a_kind_is_read_where_the_caller_lists_it() -> None:
    value = Permute((1, 0)).to_json()
    assert read_stage(value) == read_stage(value, {"Permute": Permute}) == Permute((1, 0))
    with pytest.raises(UsageError, match="unknown way"):
        read_stage(value, {"Flatten": Flatten})


def test_every_stage_with_its_weight() -> None:
    stages = [Unflatten(-1, (2, 2)), spec_of(nn.Linear(2, 2)), Flatten(-2, -1)]
    weight = torch.ones(2, 2)
    assert weighted(stages, [weight]) == [(stages[0], None), (stages[1], weight), (stages[2], None)]
    for weights in ([], [weight, weight]):
        with pytest.raises(UnsupportedError, match="weights for 1 stages"):
            weighted(stages, weights)


@pytest.mark.parametrize("leading", [0, 1, 2, 3])
def test_a_chain_with_moves_is_its_dense_weight(leading: int) -> None:
    """Against the modules, one impulse after another."""
    axis, lead = leading, tuple(range(leading))
    layer = LayerSpec("Linear", 6, 10, leading=leading)
    stages: list[Stage] = [
        Unflatten(-1, (2, 3)),
        layer.pointwise(3, 5),
        Permute((*lead, axis + 1, axis)),
        Flatten(-2, -1),
    ]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    dense = compose(stages, [weight], layer)
    module = nn.Sequential(*(stage.build(dtype=torch.float64) for stage in stages))
    with torch.no_grad():
        module[1].weight.copy_(weight)
        x = torch.randn(*[2, 3, 4][:leading], 6, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(module(x), x @ dense.T)
    (gradient,) = torch.autograd.grad(dense.sum(), weight)
    assert gradient.shape == weight.shape


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ([nn.Unflatten(-1, (2, 2)), nn.Linear(2, 4), nn.Flatten(-2), nn.Linear(8, 3)], True),
        ([nn.Linear(4, 2), nn.Linear(2, 4), PermuteModule([1, 0])], True),
        ([nn.Linear(4, 2), nn.Unflatten(1, (1, 2))], False),
        ([nn.Flatten(), nn.Linear(4, 2), nn.Linear(2, 4)], False),
        ([nn.Linear(4, 8), nn.Unflatten(1, (8, 1)), nn.ConvTranspose1d(8, 2, 3)], False),
        ([nn.Linear(4, 2), nn.Dropout(), nn.Linear(2, 4)], False),
        ([nn.Conv2d(4, 4, 3, groups=4), nn.ChannelShuffle(2), nn.Conv2d(4, 8, 1)], False),
    ],
)
def test_which_chains_are_factorizations(modules: list[nn.Module], expected: bool) -> None:
    assert is_factorization(nn.Sequential(*modules)) is expected


class Reshaping(nn.Module):
    """Calls one Linear on inputs of one and two leading axes, another always on two."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.tokens, self.rows = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rows(self.both(self.tokens(self.both(x)).mean(1)))


def test_a_linear_knows_its_leading_axes_where_its_calls_agree() -> None:
    model = Reshaping()
    layers = find_layers(model, inputs=Inputs((torch.zeros(1, 3, 4),)), include_ends=True)
    assert {a.name: a.spec.leading for a in layers if a.spec} == {"both": 1, "tokens": 2, "rows": 1}
    unseen = find_layers(model, include_ends=True)
    assert {a.spec.leading for a in unseen if a.spec} == {1}
