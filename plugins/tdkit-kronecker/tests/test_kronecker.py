from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import MODELS, check_exported, check_saved, compressed
from tdkit_kronecker.method import Kronecker, rearranged
from tiny_study import RECIPE, workspace
from torch import Tensor, nn

from tdkit.checkpoint import load_model
from tdkit.compression.scoring import factorize, prepare
from tdkit.decompositions.base import layer_stages, prepared, unsupported
from tdkit.errors import UsageError
from tdkit.layers.evidence import Evidence
from tdkit.layers.inventory import replace_layer
from tdkit.layers.spec import LayerSpec, spec_of
from tdkit.layers.stages import Flatten, Permute, Unflatten
from tdkit.layers.weights import ModuleWeights
from tdkit.registry import load_registry
from tdkit.study.recipe import to_toml
from tdkit.study.records import pack
from tdkit.study.running import run
from tdkit.study.store import Store
from tdkit.study.trials import identity, plan_trials
from tdkit.testing import DecompositionLaws

METHOD = Kronecker()


class TestKronecker(DecompositionLaws):
    method = METHOD


del DecompositionLaws


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_registered_by_its_entry_point() -> None:
    registry = load_registry()
    assert registry.decompositions["kronecker"].default == 0
    provider = next(p for p in registry.providers if p.name == "tdkit-kronecker")
    assert provider.failure is None
    assert provider.provides == {"tdkit_decompositions": ("kronecker",)}


def test_a_sum_of_products_comes_back_exactly() -> None:
    major, minor = noise(2, 3, 4).numpy(), noise(2, 5, 2).numpy()
    weight = torch.from_numpy(sum(map(np.kron, major, minor)))
    found = prepared(METHOD, spec_of(nn.Linear(8, 15)), weight)
    assert found.error((2, 3, 4)) < 1e-7 * found.norm
    torch.testing.assert_close(found.reconstruct((2, 3, 4)), weight)
    assert found.error((1, 3, 4)) > 0.1 * found.norm


def test_the_stages_are_numpys_products() -> None:
    weight = noise(6, 8)
    found = prepared(METHOD, spec_of(nn.Linear(8, 6, bias=False)), weight)
    minor, major = found.factors((2, 3, 4))
    a = major.reshape(3, 2, 4).transpose(0, 1).numpy()
    b = minor.reshape(2, 2, 2).transpose(0, 1).numpy()
    products = torch.from_numpy(sum(map(np.kron, a, b)))
    torch.testing.assert_close(found.reconstruct((2, 3, 4)), products)


def test_the_kernel_goes_with_the_second_factor() -> None:
    weight = noise(6, 4, 3, 2)
    found = prepared(METHOD, spec_of(nn.Conv2d(4, 6, (3, 2), bias=False)), weight)
    minor, major = found.factors((3, 2, 2))
    a, b = major.reshape(2, 3, 2).transpose(0, 1), minor.reshape(3, 3, 2, 3, 2).transpose(0, 1)
    products = torch.stack(
        [
            torch.from_numpy(sum(map(np.kron, a.numpy(), b[..., y, x].numpy())))
            for y in range(3)
            for x in range(2)
        ],
        -1,
    )
    torch.testing.assert_close(found.reconstruct((3, 2, 2)), products.unflatten(-1, (3, 2)))


@pytest.mark.parametrize("layer", [nn.Linear(12, 8), nn.Conv2d(6, 4, 3)])
def test_the_error_is_the_tail_of_the_rearranged_weights_singular_values(layer: nn.Module) -> None:
    weight = noise(*layer.get_parameter("weight").shape)
    found = prepared(METHOD, spec_of(layer), weight)
    for split in ((2, 3), (4, 2), (1, 1), (4, 6)):
        values = torch.linalg.svdvals(rearranged(weight, *split))
        for terms in range(1, len(values) + 1):
            tail = float(values[terms:].norm())
            assert found.error((terms, *split)) == pytest.approx(tail, abs=1e-7)
            gap = weight - found.reconstruct((terms, *split))
            assert float(gap.norm()) == pytest.approx(tail, abs=1e-7)


def test_one_product_is_no_worse_than_any_found_by_alternating_least_squares() -> None:
    weight = noise(4, 4)
    best = prepared(METHOD, spec_of(nn.Linear(4, 4)), weight).error((1, 2, 2))
    blocks = weight.reshape(2, 2, 2, 2).permute(0, 2, 1, 3)
    found = []
    for seed in range(20):
        minor = torch.randn(2, 2, generator=torch.Generator().manual_seed(seed)).double()
        for _ in range(200):
            major = torch.einsum("ijkl,kl->ij", blocks, minor) / minor.square().sum()
            minor = torch.einsum("ijkl,ij->kl", blocks, major) / major.square().sum()
        found.append(float((weight - torch.from_numpy(np.kron(major, minor))).norm()))
    assert best == pytest.approx(min(found), rel=1e-6)


def test_splits_are_small_then_balanced() -> None:
    assert METHOD.max_rank(spec_of(nn.Linear(32, 64))) == (32, 8, 4)
    assert METHOD.max_rank(spec_of(nn.Conv2d(64, 64, 3))) == (144, 16, 16)
    assert METHOD.max_rank(spec_of(nn.Linear(5, 7)))[1:] in [(7, 1), (1, 5)]
    with pytest.raises(UsageError, match="a divisor of its 64 outputs"):
        METHOD.check_rank(spec_of(nn.Linear(32, 64)), (1, 7, 4))
    for rank in (3, (1, 8), (0, 8, 4), (33, 8, 4), (1, 0, 4)):
        with pytest.raises(UsageError, match="does not fit"):
            METHOD.check_rank(spec_of(nn.Linear(32, 64)), rank)


def test_grouped_layers_stay_dense() -> None:
    assert unsupported(METHOD, spec_of(nn.Conv2d(4, 4, 3, groups=2))) is not None
    assert unsupported(METHOD, spec_of(nn.Conv2d(4, 4, 3))) is None


def test_a_bias_costs_what_its_stages_cost() -> None:
    spec, rank = spec_of(nn.Linear(32, 64)), (2, 8, 4)
    with_bias = sum(s.parameters for s in layer_stages(METHOD, spec, rank))
    without = sum(s.parameters for s in layer_stages(METHOD, replace(spec, bias=False), rank))
    assert with_bias - without == 64 + 64


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("format", ["module", "state-dict", "safetensors"])
def test_saved_and_loaded_again(name: str, format: str, tmp_path: Path) -> None:
    check_saved(*compressed(name, "kronecker", METHOD), tmp_path / "model", format)


@pytest.mark.parametrize("name", MODELS)
def test_exported_to_onnx(name: str, tmp_path: Path) -> None:
    check_exported(*compressed(name, "kronecker", METHOD), tmp_path / "model.onnx")


def test_from_the_command_line(tmp_path: Path) -> None:
    command = "compress garipov --methods kronecker --budget 0.8 --output small.pt"
    subprocess.run(
        [sys.executable, "-m", "tdkit", *command.split()],
        cwd=tmp_path,
        capture_output=True,
        check=True,
    )
    moves = json.loads((tmp_path / "small.pt.plan.json").read_text())["moves"]
    assert {move["method"] for move in moves} == {"kronecker"}
    loaded = load_model(tmp_path / "small.pt", models={})
    assert sum(p.numel() for p in loaded.model.parameters()) <= 0.8 * 555_978
    assert {type(stage) for stage in loaded.structure[moves[0]["layer"]]} == {
        LayerSpec,
        Unflatten,
        Permute,
        Flatten,
    }


def test_a_study_measures_what_the_factorized_model_gets_right(tmp_path: Path) -> None:
    space = workspace(replace(RECIPE, methods=("kronecker",), options=()))
    plan = plan_trials(space)
    with Store(
        tmp_path, identity=identity(space), recipe=to_toml(space.recipe), plan=plan
    ) as store:
        results = run(space, store)
    assert results.measurements
    layers = {layer.name: layer for layer in space.layers}
    assert space.dataset.test is not None
    images, labels = next(iter(space.dataset.test.batches(60)))
    for measured in results.measurements:
        layer, module = layers[measured.trial.layer], copy.deepcopy(space.model)
        weights = ModuleWeights(module)
        found = prepare(layer, weights, "kronecker", METHOD, Evidence(3))
        assert found is not None
        rank = measured.trial.rank
        replace_layer(module, layer, factorize(layer, weights, found, rank))
        with torch.no_grad():
            correct = module(images).argmax(1) == labels
        assert measured.correct == pack(correct.numpy())
        assert measured.errors["relative-weights"] == pytest.approx(found.error(rank) / found.norm)
