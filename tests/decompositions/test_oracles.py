"""The decompositions against tensorly, SciPy and the theorems they rest on."""

import itertools
import math

import numpy as np
import pytest
import tensorly
import torch
from tensorly.cp_tensor import cp_to_tensor
from tensorly.decomposition import parafac, tensor_train, tucker
from tensorly.tt_tensor import tt_to_tensor
from tensorly.tucker_tensor import tucker_to_tensor
from torch import Tensor, nn

from tdkit.decompositions import cp
from tdkit.decompositions.base import Prepared, count
from tdkit.decompositions.cp import STARTS, Cp, _orthogonal_terms
from tdkit.decompositions.svd import Svd
from tdkit.decompositions.tt import TensorTrain, size
from tdkit.decompositions.tucker import Tucker
from tdkit.errors import UsageError
from tdkit.layers.spec import spec_of

RANKS = [(2, 3), (5, 4), (7, 2)]


def smooth_weight(*shape: int, seed: int = 0, decay: float = 0.5) -> Tensor:
    """A weight whose unfoldings have falling spectra, as trained ones do."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    for mode in range(weight.ndim):
        left, values, right = torch.linalg.svd(weight.movedim(mode, 0).flatten(1), False)
        falling = values * torch.arange(1, len(values) + 1) ** -decay
        rotated = (left * falling @ right).reshape(weight.movedim(mode, 0).shape)
        weight = rotated.movedim(0, mode)
    return weight


def kruskal(columns: list[Tensor]) -> Tensor:
    """The sum of the rank-one tensors of these columns (mode size, rank)."""
    total = columns[0]
    for column in columns[1:]:
        total = torch.einsum("...r,nr->...nr", total, column)
    return total.sum(-1)


def prepared(method: object, weight: Tensor, seed: int = 0) -> Prepared:
    out_channels, in_channels, *kernel = weight.shape
    layer = nn.Conv2d(in_channels, out_channels, tuple(kernel))
    return method.prepare(spec_of(layer), weight, seed)


def test_svd_error_is_the_eckart_young_tail() -> None:
    weight = smooth_weight(12, 7, 3, 3)
    values = torch.linalg.svdvals(weight.flatten(1))
    got = prepared(Svd(), weight)
    for rank in range(1, 13):
        assert got.error(rank) == pytest.approx(float(values[rank:].norm()), rel=1e-10, abs=1e-12)


def test_svd_of_a_tall_linear_layer_is_numpys() -> None:
    weight = smooth_weight(40, 9)
    got = Svd().prepare(spec_of(nn.Linear(9, 40)), weight)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(got.reconstruct(3), left[:, :3] * values[:3] @ right[:3])


@pytest.mark.parametrize("rank", RANKS)
def test_tucker_is_tensorlys_hosvd_and_hooi(rank: tuple[int, int]) -> None:
    weight = smooth_weight(10, 8, 3, 3)
    full = (*rank, 3, 3)
    numpy = weight.numpy()
    for sweeps, tolerance in ((0, 1e-9), (30, 1e-4)):
        theirs = tucker_to_tensor(
            tucker(numpy, rank=full, n_iter_max=max(1, sweeps), tol=1e-12)
            if sweeps
            else _truncated_hosvd(numpy, full)
        )
        error = float((weight - torch.from_numpy(theirs)).norm())
        assert prepared(Tucker(sweeps), weight).error(rank) == pytest.approx(error, rel=tolerance)


@pytest.mark.parametrize("rank", RANKS)
def test_a_refined_tucker_is_hooi(rank: tuple[int, int]) -> None:
    weight = smooth_weight(10, 8, 3, 3, decay=0.1)
    plain = prepared(Tucker(), weight)
    refined = plain.refined(rank)
    theirs = tucker_to_tensor(tucker(weight.numpy(), rank=(*rank, 3, 3), n_iter_max=50, tol=1e-12))
    error = float((weight - torch.from_numpy(theirs)).norm())
    assert refined.error(rank) == pytest.approx(error, rel=1e-3)
    assert refined.error(rank) < 0.999 * plain.error(rank)


def test_hooi_with_more_outputs_than_the_other_side_can_fill() -> None:
    got = prepared(Tucker(), smooth_weight(9, 6, 1, 1))
    assert got.refined((5, 2)).error((5, 2)) == pytest.approx(got.refined((2, 2)).error((2, 2)))
    assert [tuple(f.shape[:2]) for f in got.refined((5, 2)).factors((5, 2))] == [
        (2, 6),
        (5, 2),
        (9, 5),
    ]


def _truncated_hosvd(tensor: object, ranks: tuple[int, ...]) -> tuple[object, list[object]]:
    factors = []
    for mode, rank in enumerate(ranks):
        left, _, _ = np.linalg.svd(tensorly.unfold(tensor, mode), full_matrices=False)
        factors.append(left[:, :rank])
    core = tensorly.tenalg.multi_mode_dot(tensor, [factor.T for factor in factors])
    return core, factors


@pytest.mark.parametrize("rank", RANKS)
def test_hosvd_error_stays_under_the_root_of_the_summed_tails(rank: tuple[int, int]) -> None:
    weight = smooth_weight(10, 8, 3, 3)
    tails = [
        float(torch.linalg.svdvals(weight.movedim(mode, 0).flatten(1))[r:].square().sum())
        for mode, r in enumerate(rank)
    ]
    error = prepared(Tucker(), weight).error(rank)
    assert max(tails) <= error**2 * (1 + 1e-12)
    assert error**2 <= sum(tails) * (1 + 1e-12)


@pytest.mark.parametrize("shape", [(9, 6, 3), (9, 6, 3, 3), (5, 4, 2, 3, 2)])
def test_tt_error_stays_under_the_root_of_the_summed_tails(shape: tuple[int, ...]) -> None:
    weight = smooth_weight(*shape)
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(shape) - 3](shape[1], shape[0], shape[2:])
    method = TensorTrain()
    got = method.prepare(spec_of(layer), weight)
    train = weight.movedim(0, -1)
    for keep in (0.1, 0.3, 0.6):
        rank = got.rank(keep)
        tails = [
            float(torch.linalg.svdvals(train.flatten(0, k).flatten(1))[r:].square().sum())
            for k, r in enumerate(rank)
        ]
        assert got.error(rank) ** 2 <= sum(tails) * (1 + 1e-9)
        assert got.error(rank) ** 2 >= max(tails) * (1 - 1e-9)


@pytest.mark.parametrize("rank", [(3, 5, 4), (6, 8, 5), (6, 18, 9)])
def test_tt_is_about_as_good_as_tensorlys_tt_svd(rank: tuple[int, int, int]) -> None:
    # Theirs truncates from the left only; the errors differ by the order of the cuts.
    weight = smooth_weight(9, 6, 3, 3)
    theirs = tt_to_tensor(tensor_train(weight.movedim(0, -1).numpy(), rank=(1, *rank, 1)))
    error = float((weight.movedim(0, -1) - torch.from_numpy(theirs)).norm())
    assert prepared(TensorTrain(), weight).error(rank) <= 1.02 * error + 1e-9


def test_tt_with_the_ends_saturated_is_exactly_tensorlys_tt_svd() -> None:
    weight = smooth_weight(9, 6, 3, 3)
    theirs = tt_to_tensor(tensor_train(weight.movedim(0, -1).numpy(), rank=(1, 6, 4, 9, 1)))
    error = float((weight.movedim(0, -1) - torch.from_numpy(theirs)).norm())
    assert prepared(TensorTrain(), weight).error((6, 4, 9)) == pytest.approx(error, rel=1e-9)


@pytest.mark.parametrize("rank", [3, 8, 15])
def test_cp_is_as_good_as_tensorlys(rank: int) -> None:
    weight = smooth_weight(10, 8, 3, 3)
    ours, theirs = [], []
    for seed in range(5):
        options = Cp(sweeps=100, tolerance=1e-6, start="uniform")
        ours.append(prepared(options, weight, seed).error(rank))
        fit = parafac(
            weight.numpy(), rank, n_iter_max=100, tol=1e-6, init="random", random_state=seed
        )
        theirs.append(float((weight - torch.from_numpy(cp_to_tensor(fit))).norm()))
    assert sum(ours) <= 1.02 * sum(theirs)


def test_cp_finds_an_exact_low_rank_tensor() -> None:
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(n, 3, generator=generator).double() for n in (10, 8, 3, 3)]
    weight = torch.einsum("ar,br,cr,dr->abcd", *factors)
    for start in STARTS:
        got = prepared(Cp(sweeps=500, tolerance=1e-9, start=start), weight)
        assert got.error(3) < 1e-3 * got.norm


@pytest.mark.parametrize("shape", [(10, 8, 3, 3), (5, 9, 4), (4, 3, 2, 3, 2), (6, 1, 3, 3)])
def test_the_start_of_cp_is_orthogonal_terms_the_largest_first(shape: tuple[int, ...]) -> None:
    weight = smooth_weight(*shape)
    columns = _orthogonal_terms(weight)
    terms = torch.stack([kruskal([c[:, [r]] for c in columns]) for r in range(shape[0])])
    sizes = columns[0].norm(dim=0)
    gram = torch.einsum("a...,b...->ab", terms, terms)
    torch.testing.assert_close(gram, sizes[: len(terms)].square().diag(), atol=1e-10, rtol=0)
    assert bool((sizes.diff() <= 0).all())
    for rank in (1, len(terms), columns[0].shape[1]):
        missed = float((weight - kruskal([c[:, :rank] for c in columns])).norm())
        assert missed == pytest.approx(float(sizes[rank:].norm()), abs=1e-12)


def test_cp_from_the_orthogonal_start_needs_no_luck() -> None:
    weight = smooth_weight(24, 16, 3, 3, decay=0.3)
    calm, lucky = (Cp(sweeps=3, tolerance=0, start=start) for start in STARTS)
    assert [calm.random, lucky.random] == [False, True]
    for rank in (8, 30):
        errors = {prepared(calm, weight, seed).error(rank) for seed in range(3)}
        others = [prepared(lucky, weight, seed).error(rank) for seed in range(5)]
        assert len(errors) == 1
        assert len(set(others)) == 5
        assert errors.pop() < min(others)


@pytest.mark.parametrize("seed", [1600, 1048])
def test_refined_cp_is_never_worse_close_to_an_exact_rank(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = (4, 4, 2, 2, 2)
    fibres = [torch.randn(n, 1, generator=generator, dtype=torch.float64) for n in sizes]
    noise = 1e-6 * torch.randn(sizes, generator=generator, dtype=torch.float64)
    weight = torch.einsum("ar,br,cr,dr,er->abcde", *fibres) + noise
    prepared = Cp().prepare(spec_of(nn.Conv3d(4, 4, 2)), weight, 0)
    assert prepared.refined(3).error(3) <= prepared.error(3)


def test_refined_cp_goes_on_from_the_same_start() -> None:
    weight = smooth_weight(24, 16, 3, 3, decay=0.3)
    for start in STARTS:
        quick = prepared(Cp(sweeps=2, start=start), weight)
        long = prepared(Cp(sweeps=100, tolerance=1e-4, start=start), weight)
        assert quick.refined(20).error(20) == long.error(20) < quick.error(20)


def test_an_unknown_start_of_cp_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown start 'hosvd'"):
        Cp(start="hosvd")


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("angle", [1e-1, 1e-4, 1e-8])
def test_cp_stays_finite_on_near_collinear_columns(scale: float, angle: float, start: str) -> None:
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(n, 1, generator=generator).double() for n in (10, 8, 3, 3)]
    near = [f + angle * torch.randn(len(f), 4, generator=generator).double() for f in factors]
    weight = torch.einsum("ar,br,cr,dr->abcd", *near) * scale
    got = prepared(Cp(start=start), weight)
    first, *others = got.factors(6)
    assert all(bool(f.isfinite().all()) for f in (first, *others))
    # Diverging components would cancel each other: their norms stay near the weight's.
    norms = math.prod(float(f.flatten(1).norm(dim=0).max()) for f in (first, *others))
    assert norms < 1e4 * got.norm * max(1, len(others))
    assert got.error(6) < 0.2 * got.norm


@pytest.mark.parametrize("keep", [0.05, 0.2, 0.5, 0.8])
@pytest.mark.parametrize("method", [Svd(), Tucker(), TensorTrain()], ids=["svd", "tucker", "tt"])
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.8])
def test_the_best_rank_beats_the_proportional_one_of_its_size(
    method: Svd | Tucker | TensorTrain, keep: float, decay: float
) -> None:
    weight = smooth_weight(16, 12, 3, 3, decay=decay)
    got = prepared(method, weight)
    proportional = got.rank(keep, "proportional")
    parameters = count(method.stages(got.group, proportional))
    best = got.best_rank(parameters)
    assert count(method.stages(got.group, best)) <= parameters
    assert got.error(best) <= got.error(proportional) * (
        1.01 if method is not TensorTrain else 1.05
    )


def test_the_best_tucker_rank_is_that_of_brute_force() -> None:
    weight = smooth_weight(7, 6, 3, 3)
    got = prepared(Tucker(), weight)
    pairs = [(a, b) for a in range(1, 8) for b in range(1, 7)]
    for keep in (0.1, 0.3, 0.6):
        allowed = int(keep * weight.numel())
        fitting = [p for p in pairs if count(got.method.stages(got.group, p)) <= allowed]
        assert got.error(got.rank(keep)) == pytest.approx(min(map(got.error, fitting)))


@pytest.mark.parametrize("shape", [(7, 6, 3, 3), (6, 7, 2, 3), (3, 9, 3, 1), (8, 5, 3)])
def test_the_best_tt_rank_is_that_of_brute_force(shape: tuple[int, ...]) -> None:
    weight = smooth_weight(*shape)
    layer = spec_of((nn.Conv2d if len(shape) == 4 else nn.Conv1d)(shape[1], shape[0], shape[2:]))
    got = TensorTrain().prepare(layer, weight)
    train = weight.movedim(0, -1)
    left, right = (torch.linalg.svd(weight.movedim(n, 0).flatten(1)).U for n in (1, 0))
    core = torch.einsum("i...o,ia,oz->a...z", train, left, right)
    total = float(weight.square().sum())
    inner = torch.linalg.svdvals(train.flatten(0, 1).flatten(1)) if len(shape) == 4 else None

    def bound(rank: tuple[int, ...]) -> float:
        ends = total - float(core[: rank[0], ..., : rank[-1]].square().sum())
        return ends + (float(inner[rank[1] :].square().sum()) if inner is not None else 0.0)

    sides = (1, shape[1], *shape[2:], shape[0], 1)
    most = [min(math.prod(sides[:k]), math.prod(sides[k:])) for k in range(2, len(shape) + 1)]
    everything = itertools.product(*(range(1, top + 1) for top in most))
    modes = sides[1:-1]
    realizable = [
        rank
        for rank in everything
        if all(
            after <= before * n and before <= after * n
            for before, n, after in zip(rank, modes[1:], rank[1:], strict=False)
        )
    ]
    for keep in (0.25, 0.4, 0.6, 0.9):
        allowed = int(keep * weight.numel())
        expected = min(map(bound, [r for r in realizable if size(modes, r) <= allowed]))
        best = got.best_rank(allowed)
        assert best in realizable
        assert size(modes, best) <= allowed
        assert bound(best) == pytest.approx(expected, rel=1e-9)
    assert set(got.best_rank(1)) == {1}


def test_the_tt_size_is_that_of_its_stages() -> None:
    method, spec = TensorTrain(), spec_of(nn.Conv3d(5, 7, (2, 3, 2), bias=False))
    rank = (3, 4, 5, 6)
    assert size((5, 2, 3, 2, 7), rank) == count(method.stages(spec, rank))


def test_cp_of_a_pointwise_convolution_is_its_svd() -> None:
    weight = smooth_weight(9, 14, 1, 1)
    values = torch.linalg.svdvals(weight.flatten(1))
    got = prepared(Cp(), weight)
    for rank in (1, 4, 8, 9):
        assert got.error(rank) == pytest.approx(float(values[rank:].norm()), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("shape", [(9, 8, 3, 3), (6, 5, 2, 3, 2)])
def test_trains_that_share_their_ends_are_those_prepared_alone(shape: tuple[int, ...]) -> None:
    weight = smooth_weight(*shape)
    layer = spec_of((nn.Conv2d if len(shape) == 4 else nn.Conv3d)(shape[1], shape[0], shape[2:]))
    inner = [(2,), (5,), (3,)] if len(shape) == 4 else [(2, 3), (4, 5), (3, 2)]
    shared = TensorTrain().prepare(layer, weight)
    for ends in ((4, 4), (5, 3)):
        for middle in inner:
            rank = (ends[0], *middle, ends[1])
            alone = TensorTrain().prepare(layer, weight)
            torch.testing.assert_close(shared.factors(rank), alone.factors(rank))
            assert shared.error(rank) == pytest.approx(alone.error(rank), rel=1e-9)


@pytest.mark.parametrize("small", [0.0, 1e-6, 1e-3])
def test_the_error_of_hooi_has_its_digits_where_it_is_small(small: float) -> None:
    first, second = smooth_weight(12, 4), smooth_weight(4, 9 * 8)
    weight = (first @ second).unflatten(1, (8, 3, 3))
    weight = weight + small * smooth_weight(12, 8, 3, 3, seed=1)
    got = prepared(Tucker(sweeps=3), weight)
    truth = float((weight - got.reconstruct((4, 8))).norm())
    assert got.error((4, 8)) == pytest.approx(truth, rel=1e-6, abs=1e-14 * got.norm)


def test_cp_goes_on_where_float32_cannot_tell_a_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = smooth_weight(12, 10, 3, 3, decay=0.1)
    options = Cp(sweeps=2000, tolerance=1e-9, start="uniform")
    error = prepared(options, weight).error(10)
    monkeypatch.setattr(cp, "_COARSE", math.inf)  # float64 from the second sweep on
    exact = prepared(options, weight).error(10)
    assert error == pytest.approx(exact, rel=1e-6)


class TestRanksThatOnlyRoundingTellsApart:
    """A matrix of rank 2 gains nothing by more: the smallest of the best is taken everywhere."""

    matrix = (
        torch.randn(16, 2, generator=torch.Generator().manual_seed(0)).double()
        @ torch.randn(2, 20, generator=torch.Generator().manual_seed(1)).double()
    )

    def test_tucker(self) -> None:
        spec = spec_of(nn.Conv2d(20, 16, 1))
        assert Tucker().prepare(spec, self.matrix[..., None, None]).best_rank(250) == (2, 2)

    def test_tt(self) -> None:
        spec, weight = spec_of(nn.Conv2d(20, 16, 3)), self.matrix[..., None, None]
        spread = weight * torch.ones(3, 3).double()
        for parameters in (400, 150):
            assert TensorTrain().prepare(spec, spread).best_rank(parameters) == (2, 2, 2)
