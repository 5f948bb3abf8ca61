from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import tensorly
import torch
from small_models import MODELS, check_exported, check_saved, compressed
from tdkit_tensorized_linear.method import TensorizedLinear, balanced, folded
from torch import Tensor, nn

from tdkit.decompositions.base import compose, prepared, unsupported
from tdkit.errors import UsageError
from tdkit.layers.spec import LayerSpec, spec_of
from tdkit.registry import load_registry
from tdkit.testing import DecompositionLaws

METHOD = TensorizedLinear()
RANKS = [
    (3, 4, 4, 2, 2, 6, 5, 7),
    (3, 4, 4, 2, 2, 6, 6, 24),
    (6, 8, 4, 6, 9),
    (2, 2, 3, 4, 2, 2, 2, 3, 3, 9, 4),
]


class TestTensorizedLinear(DecompositionLaws):
    method = METHOD


class TestFourFactors(DecompositionLaws):
    method = TensorizedLinear(factors=4)


del DecompositionLaws


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def layer(leading: int = 1) -> LayerSpec:
    return replace(spec_of(nn.Linear(24, 48, bias=False)), leading=leading)


def test_registered_by_its_entry_point() -> None:
    registry = load_registry()
    assert registry.decompositions["tensorized-linear"].default == 0
    method = registry.decompositions["tensorized-linear"].create(factors=2)
    assert isinstance(method, TensorizedLinear)
    assert method.factors == 2
    provider = next(p for p in registry.providers if p.name == "tdkit-tensorized-linear")
    assert provider.failure is None
    assert provider.provides == {"tdkit_decompositions": ("tensorized-linear",)}


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("leading", [1, 2, 3])
def test_the_stages_with_tensorly_torchs_cores_are_its_matrix(
    rank: tuple[int, ...], leading: int
) -> None:
    import tltorch

    order = (len(rank) + 1) // 3
    shape = (rank[:order], rank[order : 2 * order])
    inner = (1, *rank[2 * order :], 1)
    theirs = tltorch.TensorizedTensor.new(shape, rank=inner, factorization="BlockTT")
    cores = [noise(*core.shape) * (1 + place) for place, core in enumerate(theirs.factors)]
    for parameter, core in zip(theirs.factors, cores, strict=True):
        parameter.data = core
    stages = METHOD.stages(layer(leading), rank)
    matrix = compose(stages, folded(cores), layer(leading))
    torch.testing.assert_close(matrix, theirs.to_matrix().detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", RANKS)
def test_the_error_is_that_of_tensorlys_tensor_train(rank: tuple[int, ...]) -> None:
    order, weight = (len(rank) + 1) // 3, noise(48, 24)
    pairs = [axis for k in range(order) for axis in (k, order + k)]
    interleaved = weight.reshape(rank[: 2 * order]).permute(pairs)
    sizes = [m * n for m, n in zip(rank[:order], rank[order : 2 * order], strict=True)]
    tensor = interleaved.reshape(sizes)
    # tensorly-torch sets the backend for all.
    with tensorly.backend_context("pytorch"):
        train = tensorly.decomposition.tensor_train(tensor, [1, *rank[2 * order :], 1])
        theirs = tensorly.tt_to_tensor(train)
    found = prepared(METHOD, layer(), weight)
    assert found.error(rank) == pytest.approx(float((tensor - theirs).norm()), rel=1e-7, abs=1e-7)
    ours = found.reconstruct(rank).reshape(rank[: 2 * order]).permute(pairs).reshape(sizes)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)


def test_factors_are_balanced() -> None:
    assert balanced(64, 3) == (4, 4, 4)
    assert balanced(768, 3) == (8, 8, 12)
    assert balanced(7, 3) == (1, 1, 7)
    for number in range(1, 60):
        assert math.prod(balanced(number, 3)) == number


@pytest.mark.parametrize(
    "rank", [3, (1, 2, 3), (3, 4, 4, 2, 2, 5, 1, 1), (3, 4, 4, 2, 2, 6, 7, 1), (6, 8, 4, 6, 0)]
)
def test_ranks_that_do_not_fit(rank: int | tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="factors of its 48 outputs"):
        METHOD.check_rank(layer(), rank)


def test_one_factor_is_none() -> None:
    with pytest.raises(UsageError, match="1 factors"):
        TensorizedLinear(factors=1)
    assert unsupported(METHOD, spec_of(nn.Conv2d(4, 4, 3))) is not None


@pytest.mark.parametrize("name", ["mlp", "block"])
@pytest.mark.parametrize("format", ["module", "state-dict", "safetensors"])
def test_saved_and_loaded_again(name: str, format: str, tmp_path: Path) -> None:
    assert name in MODELS
    check_saved(*compressed(name, "tensorized-linear", METHOD), tmp_path / "model", format)


@pytest.mark.parametrize("name", ["mlp", "block"])
def test_exported_to_onnx(name: str, tmp_path: Path) -> None:
    check_exported(*compressed(name, "tensorized-linear", METHOD), tmp_path / "model.onnx")
