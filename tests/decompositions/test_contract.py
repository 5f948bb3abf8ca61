"""What an author of a method may leave to the base, and what the base hands over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tdkit.decompositions.base import (
    Decomposition,
    Prepared,
    Rank,
    bias_stages,
    compose,
    count,
    factorized_module,
    layer_stages,
    prepared,
    unsupported,
)
from tdkit.decompositions.svd import Svd
from tdkit.decompositions.tt import TensorTrain
from tdkit.decompositions.tucker import Tucker
from tdkit.errors import UnsupportedError
from tdkit.layers.evidence import Evidence, Moments
from tdkit.layers.spec import LayerSpec, spec_of
from tdkit.layers.stages import ChannelShuffle, Flatten, Stage, Unflatten
from tdkit.testing import check_laws


class OnlyThree(Decomposition):
    """The SVD of a Linear by an author who wrote three methods."""

    def supports(self, layer: LayerSpec) -> str | None:
        return None if layer.kind == "Linear" else "only Linear layers"

    def max_rank(self, layer: LayerSpec) -> int:
        return min(layer.in_channels, layer.out_channels)

    def stages(self, layer: LayerSpec, rank: Rank) -> Sequence[Stage]:
        assert isinstance(rank, int)
        first = layer.pointwise(layer.in_channels, rank)
        return first, layer.pointwise(rank, layer.out_channels)

    def decompose(
        self, layer: LayerSpec, weight: Tensor, rank: Rank, generator: torch.Generator
    ) -> Sequence[Tensor]:
        assert isinstance(rank, int)
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        return values[:rank, None] * right[:rank], left[:, :rank]


class TuckerByDefault(Tucker):
    rank = Decomposition.rank  # type: ignore[assignment]


class TrainByDefault(TensorTrain):
    rank = Decomposition.rank  # type: ignore[assignment]


KEEPS = (1e-9, 0.05, 0.1, 0.3, 0.5, 0.77, 0.9, 1.0, 3.0)


@pytest.mark.parametrize("shape", [(9, 12), (40, 7), (1, 5), (64, 64)])
def test_the_default_rank_is_the_one_nearest_to_the_keep(shape: tuple[int, int]) -> None:
    layer = spec_of(nn.Linear(*shape, bias=False))
    for keep in KEEPS:
        ours = OnlyThree().rank(layer, keep)
        gaps = {
            rank: abs(rank * sum(shape) - keep * layer.weight_parameters)
            for rank in range(1, min(shape) + 1)
        }
        assert gaps[ours] == min(gaps.values())
        assert gaps[ours] == pytest.approx(gaps[Svd().rank(layer, keep)])


@pytest.mark.parametrize("method", [TuckerByDefault(), TrainByDefault()])
def test_the_default_of_tuples_scales_the_largest(method: Decomposition) -> None:
    layer = spec_of(nn.Conv2d(12, 20, 3, bias=False))
    largest = method.max_rank(layer)
    assert isinstance(largest, tuple)
    ladder = method.ladder(layer)
    assert (ladder[0], ladder[-1]) == ((1,) * len(largest), largest) or min(ladder[0]) >= 1
    sizes = [count(method.stages(layer, rank)) for rank in ladder]
    assert sizes == sorted(sizes)
    for keep in KEEPS:
        size = count(method.stages(layer, method.rank(layer, keep)))
        assert size == min(sizes, key=lambda each: abs(each - keep * layer.weight_parameters))


def test_three_methods_obey_the_laws() -> None:
    for keep in (0.1, 0.5, 0.9):
        for rule in ("best", "proportional"):
            for leading in (1, 2, 3):
                assert check_laws(OnlyThree(), nn.Linear(7, 5).double(), keep, rule, leading)


class Seeded(OnlyThree):
    """An override of old, which knows of a seed alone."""

    def prepare(self, layer: LayerSpec, weight: Tensor, seed: int = 0) -> Prepared:  # type: ignore[override]
        return PreparedOfOld(self, layer, weight, seed)


class PreparedOfOld(Prepared):
    def __init__(
        self, method: Decomposition, layer: LayerSpec, weight: Tensor, seed: int = 0
    ) -> None:
        super().__init__(method, layer, weight, seed)


class Whitened(OnlyThree):
    """Cuts the weight in the metric of the layer's inputs, where it knows them."""

    needs = frozenset({"moments"})

    def prepare(
        self, layer: LayerSpec, weight: Tensor, evidence: Evidence | int = 0
    ) -> PreparedWhitened:
        return PreparedWhitened(self, layer, weight, evidence)


class PreparedWhitened(Prepared):
    def group_factors(self, rank: Rank) -> list[Sequence[Tensor]]:
        assert isinstance(rank, int)
        moments = self.evidence.moments
        if moments is None:
            return super().group_factors(rank)
        root = torch.linalg.cholesky(moments.second)
        left, values, right = torch.linalg.svd(self.weight[0] @ root, full_matrices=False)
        first = torch.linalg.solve(root, values[:rank, None] * right[:rank], left=False)
        return [(first, left[:, :rank])]


def inputs(count: int, features: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(features, features, generator=generator, dtype=torch.float64)
    return torch.randn(count, features, generator=generator, dtype=torch.float64) @ mixing


def moments_of(x: Tensor) -> Moments:
    return Moments(len(x), x.mean(0), x.T @ x / len(x))


def test_an_override_with_a_seed_goes_on_working() -> None:
    layer, weight = spec_of(nn.Linear(4, 3)), torch.ones(3, 4)
    for evidence in (7, Evidence(seed=7), Evidence(7, moments_of(inputs(9, 4)))):
        found = prepared(Seeded(), layer, weight, evidence)
        assert isinstance(found, PreparedOfOld)
        assert found.seed == 7
        assert found.evidence == Evidence(seed=7)
    assert prepared(OnlyThree(), layer, weight, 5).seed == 5
    assert Prepared(OnlyThree(), layer, weight, 4).evidence == Evidence(seed=4)
    assert OnlyThree().prepare(layer, weight).evidence == Evidence()


def test_moments_reach_the_method_that_asks_for_them() -> None:
    layer, x = spec_of(nn.Linear(6, 5, bias=False)), inputs(50, 6)
    weight = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = prepared(OnlyThree(), layer, weight).reconstruct(2)
    whitened = prepared(Whitened(), layer, weight, Evidence(0, moments_of(x))).reconstruct(2)
    without = prepared(Whitened(), layer, weight).reconstruct(2)
    torch.testing.assert_close(without, plain)

    def feature_error(approximation: Tensor) -> float:
        return float((x @ (weight - approximation).T).norm())

    values = torch.linalg.svdvals(x @ weight.T)
    assert feature_error(whitened) == pytest.approx(float(values[2:].norm()))
    assert feature_error(whitened) < 0.95 * feature_error(plain)


def test_moments_are_handed_to_those_that_ask_only() -> None:
    moments, weight = moments_of(inputs(50, 6)), torch.ones(5, 6)
    found = [
        prepared(method, spec_of(nn.Linear(6, 5)), weight, Evidence(2, moments)).evidence
        for method in (Whitened(), OnlyThree(), Seeded())
    ]
    assert [each.moments for each in found] == [moments, None, None]
    assert {each.seed for each in found} == {2}


class Shuffled(Decomposition):
    """A convolution between shuffles that undo each other."""

    grouped = False

    def max_rank(self, layer: LayerSpec) -> int:
        return 1

    def stages(self, layer: LayerSpec, rank: Rank) -> Sequence[Stage]:
        out = layer.out_channels
        if layer.kind == "Linear":
            return layer.pointwise(layer.in_channels, out), Unflatten(-1, (out, 1)), Flatten(-2, -1)
        return layer.spatial(layer.in_channels, out), ChannelShuffle(out)

    def decompose(
        self, layer: LayerSpec, weight: Tensor, rank: Rank, generator: torch.Generator
    ) -> Sequence[Tensor]:
        return (weight.transpose(0, 1) if layer.transposed else weight,)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(3, 4, 3, padding=1),
        nn.Conv2d(3, 4, 3, stride=2),
        nn.Conv3d(3, 4, 2),
        nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1),
        nn.Linear(3, 4),
    ],
)
def test_a_chain_that_ends_in_a_move_carries_the_bias_behind_it(layer: nn.Module) -> None:
    layer = layer.double()
    for leading in range(5) if isinstance(layer, nn.Linear) else [1]:
        spec = replace(spec_of(layer), leading=leading)
        found = prepared(Shuffled(), spec, layer.get_parameter("weight").detach())
        appended = bias_stages(Shuffled(), spec, 1)
        assert count(appended) == 4 + 4
        stages, factors = found.stages(1), found.factors(1)
        assert stages[-len(appended) :] == appended
        assert torch.equal(factors[-1].flatten(), torch.ones(4, dtype=torch.float64))
        bias = layer.get_parameter("bias").detach()
        module = factorized_module(stages, factors, bias, torch.float64)
        sizes = [2, 5, 6, 7][:leading] if isinstance(layer, nn.Linear) else []
        shape = (*sizes, 3) if isinstance(layer, nn.Linear) else (2, 3, 6, 6, 6)
        x = inputs(2 * 216, 3).flatten()[: torch.Size(shape).numel()].reshape(shape)
        x = x if isinstance(layer, nn.Linear) else x[(..., *[0] * (5 - layer.weight.ndim))]  # type: ignore[operator]
        with torch.no_grad():
            torch.testing.assert_close(module(x), layer(x))
            dense = compose(stages, factors, spec.per_group())
            torch.testing.assert_close(dense, found.weight[0] * found.scale)
        assert layer_stages(Shuffled(), replace(spec, bias=False), 1) == stages[: -len(appended)]


def test_the_rank_for_a_keep_leaves_room_for_what_carries_the_bias() -> None:
    class Behind(OnlyThree):
        grouped = False

        def stages(self, layer: LayerSpec, rank: Rank) -> Sequence[Stage]:
            out = layer.out_channels
            return (*super().stages(layer, rank), Unflatten(-1, (out, 1)), Flatten(-2, -1))

    weight = torch.ones(20, 20)
    layer = spec_of(nn.Linear(20, 20))
    bare = replace(layer, bias=False)
    assert prepared(Behind(), bare, weight).rank(0.5) == 5
    found = prepared(Behind(), layer, weight)
    assert found.rank(0.5) == 4
    assert count(found.stages(4)) == 4 * 40 + 20 + 20
    assert check_laws(Behind(), nn.Linear(20, 20).double(), 0.5, "best")


def test_a_method_without_groups_and_a_bias_without_room() -> None:
    grouped = spec_of(nn.Conv2d(4, 4, 3, groups=2))
    assert unsupported(Shuffled(), grouped) == "it does not serve grouped layers"
    assert unsupported(Svd(), grouped) is None
    with pytest.raises(UnsupportedError, match="does not serve grouped layers"):
        prepared(Shuffled(), grouped, torch.ones(4, 2, 3, 3))
    wide = replace(spec_of(nn.Linear(4, 4)), leading=5)
    assert "at most 4 axes" in str(unsupported(Shuffled(), wide))
    assert unsupported(Shuffled(), replace(wide, bias=False)) is None
    assert unsupported(Svd(), wide) is None
