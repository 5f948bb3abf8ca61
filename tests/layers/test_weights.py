"""Weights from a model, a state_dict or a file: the same scores and modules from each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tdkit.compression.scoring import Grid, factorize, prepare, score
from tdkit.errors import UnreadableFileError, UsageError
from tdkit.layers.evidence import Evidence
from tdkit.layers.inventory import find_layers
from tdkit.layers.traced import TracedModel
from tdkit.layers.weights import FileWeights, ModuleWeights, StateWeights, Weights, is_finite
from tdkit.metrics.weights import ABSOLUTE, RELATIVE
from tdkit.planners.candidate import Candidate
from tdkit.registry import load_registry, resolve_methods

METHODS = resolve_methods(load_registry(), ["svd", "cp", "tucker", "tt"])
GRID = Grid(METHODS, [RELATIVE, ABSOLUTE], (0.2, 0.5), seed=3)


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 12, 3, groups=2),
            nn.Conv2d(12, 6, 3, bias=False),
            nn.Flatten(),
            nn.Linear(54, 10).bfloat16(),
            nn.Linear(10, 4).bfloat16(),
        )


Source = Callable[[nn.Module, Path], Weights]


def _state(model: nn.Module, folder: Path) -> Weights:
    return StateWeights(model.state_dict())


def _file(model: nn.Module, folder: Path) -> Weights:
    path = folder / "model.safetensors"
    save_file(model.state_dict(), path)
    return FileWeights(path)


def empty() -> nn.Module:
    return network().to("meta")


@pytest.mark.parametrize("source", [_state, _file])
def test_scores_are_those_of_the_live_model(source: Source, tmp_path: Path) -> None:
    weights = source(network(), tmp_path)
    traced = TracedModel.of(empty(), weights=weights)
    live = TracedModel.of(network())
    assert traced.layers == live.layers
    assert {p.device.type for p in traced.model.parameters()} == {"meta"}
    found = score(traced, GRID)
    assert found == score(live, GRID)
    assert {candidate.method for candidate in found} == set(METHODS)
    assert {candidate.layer for candidate in found} == {"2", "3", "5"}


def factorized(traced: TracedModel, candidate: Candidate) -> nn.Sequential:
    layer = next(layer for layer in traced.layers if layer.name == candidate.layer)
    method = METHODS[candidate.method]
    found = prepare(layer, traced.weights, candidate.method, method, Evidence(3))
    assert found is not None
    return factorize(layer, traced.weights, found, candidate.rank)


@pytest.mark.parametrize("source", [_state, _file])
def test_so_are_the_factors(source: Source, tmp_path: Path) -> None:
    traced = TracedModel.of(empty(), weights=source(network(), tmp_path))
    live = TracedModel.of(network())
    for candidate in score(live, GRID):
        one, other = factorized(live, candidate), factorized(traced, candidate)
        assert repr(one) == repr(other)
        have, want = other.state_dict(), one.state_dict()
        assert list(have) == list(want)
        for key, value in have.items():
            assert value.dtype == want[key].dtype
            assert value.device.type == "cpu"
            assert torch.equal(value, want[key])
        assert all(p.requires_grad for p in other.parameters())


@pytest.mark.parametrize("source", [_state, _file])
def test_a_weight_that_cannot_be_decomposed_is_seen_there_too(
    source: Source, tmp_path: Path
) -> None:
    model = network()
    with torch.no_grad():
        model[2].weight[0, 0, 0, 0] = float("nan")
    traced = TracedModel.of(empty(), weights=source(model, tmp_path))
    assert {layer.name: layer.reason for layer in traced.layers if layer.reason} == {
        "0": "the first layer is kept dense",
        "2": "its weight has NaN or infinite entries",
        "6": "the last layer is kept dense",
    }


def test_by_name(tmp_path: Path) -> None:
    model = network()
    for weights in (ModuleWeights(model), _state(model, tmp_path), _file(model, tmp_path)):
        assert torch.equal(weights.weight("3"), model[3].weight)
        assert weights.bias("3") is None
        assert torch.equal(weights.bias("2"), model[2].bias)


def test_what_is_not_there(tmp_path: Path) -> None:
    model = network()
    with pytest.raises(UsageError, match="the state_dict has no weight of the layer 'body'"):
        _state(model, tmp_path).weight("body")
    with pytest.raises(UnreadableFileError, match="has no weight of the layer 'body'"):
        _file(model, tmp_path).weight("body")
    with pytest.raises(UnreadableFileError, match=r"none\.safetensors cannot be read"):
        FileWeights(tmp_path / "none.safetensors").weight("2")
    damaged = tmp_path / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.raises(UnreadableFileError, match=r"model\.safetensors cannot be read"):
        FileWeights(damaged).bias("2")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_weight_is_finite_where_all_its_entries_are(dtype) -> None:
    weight = torch.linspace(-1, 1, 60, dtype=dtype).reshape(3, 4, 5)
    assert is_finite(nn.Parameter(weight))
    assert is_finite(weight.mT)
    assert is_finite(weight[:0])
    for value in ("nan", "inf", "-inf"):
        broken = weight.clone()
        broken[1, 2, 3] = float(value)
        assert not is_finite(broken)


class Largest(TorchDispatchMode):
    """The most entries of a tensor that any operation makes, views of a model's aside."""

    entries = 0

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.known = {each.data_ptr() for each in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [each for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
        own = [each for each in made if each.data_ptr() not in self.known]
        self.entries = max([self.entries, *(each.numel() for each in own)])
        return result


def test_looking_at_layers_takes_no_memory_of_their_size() -> None:
    model = nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 300), nn.Linear(300, 8))
    with Largest(model) as made:
        find_layers(model)
    assert made.entries < 300
