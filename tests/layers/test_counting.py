"""Counts in closed form against torch's own counter."""

from collections.abc import Callable

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.vision_transformer import VisionTransformer

from tdkit.compression.compress import Goal, compress_model
from tdkit.compression.scoring import Grid
from tdkit.costs.base import Change, total_cost
from tdkit.costs.macs import MACS
from tdkit.costs.params import PARAMS
from tdkit.forward.trace import Call
from tdkit.layers.counting import macs, model_parameters
from tdkit.layers.spec import KINDS, LayerSpec, spec_of
from tdkit.layers.stages import Flatten, Permute, Unflatten
from tdkit.layers.traced import TracedModel
from tdkit.metrics.weights import RELATIVE
from tdkit.planners.greedy import greedy
from tdkit.registry import load_registry, resolve_methods
from tdkit.testing import layer_specs


def counted(model: nn.Module, *inputs: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(*inputs)
    return int(counter.get_total_flops()) // 2


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kind", KINDS)
def test_one_layer(kind: str) -> None:
    @settings(max_examples=40, deadline=None, database=None)
    @given(spec=layer_specs(kind), repeats=st.integers(1, 3))
    def check(spec: LayerSpec, repeats: int) -> None:
        size = tuple(range(8, 8 + len(spec.kernel_size))) or (5,)
        layer = spec.build()
        channels = (repeats, spec.in_channels, *size)
        x = torch.zeros(channels if spec.kernel_size else (repeats, *size, spec.in_channels))
        assert macs([spec], [Call(tuple(x.shape))]) == counted(layer, x)
        assert spec.output_shape(tuple(x.shape)) == layer(x).shape

    check()


def test_by_hand() -> None:
    conv = spec_of(nn.Conv2d(3, 8, 3, stride=2, padding=1))
    assert conv.output_shape((1, 3, 9, 6)) == (1, 8, 5, 3)
    assert macs([conv], [Call((1, 3, 9, 6))]) == 8 * 3 * 9 * 5 * 3
    stages = [conv, spec_of(nn.Conv2d(8, 2, 1))]
    calls = [Call((1, 3, 9, 6)), Call((4, 3, 1, 1))]
    assert macs(stages, calls) == 5 * 3 * (216 + 16) + 4 * (216 + 16)
    up = spec_of(nn.ConvTranspose1d(3, 2, 4, stride=2))
    assert macs([up, spec_of(nn.Conv1d(2, 5, 1))], [Call((1, 3, 6))]) == 6 * 24 + 14 * 10
    assert macs([conv], []) == 0


def test_the_shape_goes_through_stages_that_move_entries() -> None:
    stages = [Unflatten(-1, (2, 3)), spec_of(nn.Linear(3, 5)), Permute((0, 2, 1)), Flatten(-2, -1)]
    assert macs([*stages, spec_of(nn.Linear(10, 7))], [Call((4, 6))]) == 4 * 2 * 15 + 4 * 70


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet18": (lambda: torchvision.models.resnet18(weights=None), (3, 64, 64)),
    "mobilenet": (lambda: torchvision.models.mobilenet_v3_small(weights=None), (3, 64, 64)),
    "vit": (
        # In eval mode its attention is one fused operation, which torch's counter leaves out, as
        # tdkit does: it counts convolutional and linear layers.
        lambda: VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=5),
        (3, 32, 32),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_whole_models_dense_and_compressed(name: str) -> None:
    create, shape = MODELS[name]
    model = create().eval()
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    traced = TracedModel.of(model, x)
    assert total_cost(model, traced.layers, MACS) == counted(model, x)
    assert total_cost(model, traced.layers, PARAMS) == sum(p.numel() for p in model.parameters())
    grid = Grid(resolve_methods(load_registry(), ["svd", "tucker"]), [RELATIVE], (0.2, 0.4))
    result = compress_model(traced, grid, Goal(0.8), greedy)
    assert result.plan.moves
    assert result.costs["macs"] == Change(counted(model, x), counted(result.model, x))
    for candidate in result.plan.candidates:
        stages = result.model.get_submodule(candidate.layer)
        dense = model.get_submodule(candidate.layer)
        sizes = (sum(p.numel() for p in module.parameters()) for module in (dense, stages))
        assert candidate.costs["params"] == Change(*sizes)


def test_shared_parameters_count_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    assert model_parameters(model) == 32
    model[1].weight = model[0].weight
    assert model_parameters(model) == 16


def test_lazy_parameters_count_nothing() -> None:
    assert model_parameters(nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4))) == 20
