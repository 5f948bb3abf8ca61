"""Decompositions in the metric of a layer's inputs: laws over everything that is registered."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tdkit.decompositions import fitting, whitening
from tdkit.decompositions.base import Decomposition, Prepared, compose, prepared, unsupported
from tdkit.decompositions.fitting import metric_norm
from tdkit.decompositions.svd import Svd
from tdkit.decompositions.whitening import Covariance, DataAware, Whitened, whitened_axes
from tdkit.layers.evidence import Curvature, Evidence
from tdkit.layers.impulses import split_groups
from tdkit.layers.spec import LayerSpec, spec_of
from tdkit.registry import load_registry, resolve_methods

LAYERS: dict[str, nn.Module] = {
    "conv": nn.Conv2d(6, 8, 3, padding=1),
    "grouped": nn.Conv2d(8, 12, 3, groups=2),
    "transposed": nn.ConvTranspose2d(6, 4, 3),
    "pointwise": nn.Conv1d(6, 9, 1),
    "linear": nn.Linear(12, 8),
    "wide": nn.Conv2d(32, 6, 3),
}


def layer(name: str) -> tuple[LayerSpec, Tensor]:
    spec = spec_of(LAYERS[name])
    assert spec is not None
    generator = torch.Generator().manual_seed(3)
    return spec, torch.randn(spec.weight_shape, generator=generator, dtype=torch.float64)


def width(spec: LayerSpec) -> int:
    return spec.per_group().weight_parameters // spec.per_group().out_channels


def covariance(spec: LayerSpec, seed: int = 0) -> Tensor:
    """Of inputs whose directions differ a thousandfold in variance."""
    n = width(spec)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(spec.groups, n, n, generator=generator).double()).Q
    return basis * torch.logspace(0, -3, n, dtype=torch.float64) @ basis.mT


REGISTRY = load_registry()
METHODS: dict[str, Decomposition] = dict(resolve_methods(REGISTRY, list(REGISTRY.decompositions)))


def cases() -> Iterator[tuple[str, str]]:
    for method, record in METHODS.items():
        for name, module in LAYERS.items():
            spec = spec_of(module)
            assert spec is not None
            if unsupported(record, spec) is None:
                yield method, name


CASES = list(cases())


def missed(ready: Prepared, rank: int | tuple[int, ...], spec: LayerSpec, metric: Tensor) -> float:
    gap = split_groups(ready.dense() - ready.reconstruct(rank), spec)
    return metric_norm(gap, metric)


def test_plugins_are_among_the_cases() -> None:
    assert {"kronecker", "spatial-svd", "tensorized-linear"} <= {method for method, _ in CASES}


@pytest.mark.parametrize(("method", "name"), CASES)
def test_in_the_metric_of_white_inputs_all_is_as_without(method: str, name: str) -> None:
    spec, weight = layer(name)
    white = 4.0 * torch.eye(width(spec), dtype=torch.float64).expand(spec.groups, -1, -1)
    plain = prepared(METHODS[method], spec, weight, Evidence(1))
    data = Whitened(METHODS[method], spec, weight, white, Evidence(1))
    rank = plain.rank(0.5)
    assert data.rank(0.5) == rank
    relative = plain.error(rank) / plain.norm
    assert data.error(rank) / data.norm == pytest.approx(relative, abs=1e-6)
    torch.testing.assert_close(data.reconstruct(rank), plain.reconstruct(rank), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("method", "name"), CASES)
def test_refining_is_never_worse_and_its_error_is_the_metrics(method: str, name: str) -> None:
    spec, weight = layer(name)
    metric = covariance(spec)
    plain = prepared(METHODS[method], spec, weight, Evidence(1))
    data = Whitened(METHODS[method], spec, weight, metric, Evidence(1))
    rank = plain.rank(0.4)
    refined = data.refined(rank)
    before = missed(data, rank, spec, metric)
    after = missed(refined, rank, spec, metric)
    assert after <= before * (1 + 1e-9)
    assert refined.error(rank) == pytest.approx(after)
    assert refined.norm == pytest.approx(metric_norm(split_groups(weight, spec), metric))
    # What a method finds without data is left behind, whoever wrote the method.
    assert after < missed(plain, rank, spec, metric)


@pytest.mark.parametrize("name", ["linear", "pointwise", "conv"])
def test_of_a_matrix_the_svd_is_in_closed_form(name: str) -> None:
    spec, weight = layer(name)
    metric = covariance(spec)
    data = Whitened(Svd(), spec, weight, metric)
    matrix = weight.flatten(1)
    vectors = torch.linalg.eigh(matrix @ metric[0] @ matrix.T).eigenvectors.flip(-1)[:, :3]
    best = vectors @ vectors.T @ matrix
    torch.testing.assert_close(data.reconstruct(3).flatten(1), best)
    assert data.error(3) == pytest.approx(metric_norm((matrix - best)[None], metric))
    assert data.refined(3).error(3) == pytest.approx(data.error(3), rel=1e-6)


def test_what_is_in_closed_form_takes_no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, weight = layer("wide")
    data = Whitened(Svd(), spec, weight, covariance(spec))
    looks: list[int] = []

    def count(*args: Any) -> Tensor:
        looks.append(1)
        return compose(*args)

    monkeypatch.setattr(fitting, "compose", count)
    data.refined(3).factors(3)
    assert len(looks) == 2  # at the start, and for the last factor


@pytest.mark.parametrize("method", ["tucker", "cp", "tt"])
@pytest.mark.parametrize("name", ["conv", "transposed", "grouped"])
def test_the_last_factor_is_the_least_squares_solution(method: str, name: str) -> None:
    spec, weight = layer(name)
    if unsupported(METHODS[method], spec) is not None:
        return
    metric = covariance(spec)
    data = Whitened(METHODS[method], spec, weight, metric, Evidence(1))
    rank = data.rank(0.4)
    found = data.refined(rank, steps=3)
    stages = METHODS[method].stages(data.group, rank)
    for group, factors in enumerate(found._factors(rank)):
        *before, last = factors
        mixes = stages[-1]
        assert isinstance(mixes, LayerSpec)
        inner = replace(data.group, out_channels=mixes.in_channels)
        rows = compose(stages[:-1], before, inner).flatten(1)
        root = torch.linalg.cholesky(metric[group])
        wanted = data.weight[group].flatten(1)
        best = torch.linalg.lstsq((rows @ root).T, (wanted @ root).T).solution.T
        mixing = split_groups(last, mixes)[0].flatten(1)
        torch.testing.assert_close(mixing, best, rtol=1e-4, atol=1e-4)


def test_methods_and_ranks_share_what_is_made_of_a_covariance() -> None:
    spec, weight = layer("wide")
    metric = covariance(spec)
    shared = Covariance(metric)
    for method in ("tucker", "cp", "tt"):
        data = Whitened(METHODS[method], spec, weight, shared, Evidence(1))
        alone = Whitened(METHODS[method], spec, weight, metric, Evidence(1))
        rank = data.rank(0.3)
        assert torch.equal(
            data.refined(rank).reconstruct(rank), alone.refined(rank).reconstruct(rank)
        )
    made = {id(shared.whitened(METHODS[m], data.group)) for m in ("tucker", "cp", "tt")}
    assert len(made) == 1
    assert shared.whitened(METHODS["svd"], data.group) is None


def test_it_serves_callers_in_inference_mode() -> None:
    spec, weight = layer("conv")
    data = Whitened(METHODS["tucker"], spec, weight, covariance(spec))
    rank = data.rank(0.4)
    with torch.inference_mode():
        inside = Whitened(METHODS["tucker"], spec, weight.clone(), covariance(spec)).refined(rank)
    assert torch.equal(inside.reconstruct(rank), data.refined(rank).reconstruct(rank))


@pytest.mark.parametrize("method", ["tucker", "kronecker"])
def test_what_rounding_makes_worse_is_not_taken(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(stages: Any, start: Any, *_: Any) -> Any:
        return [1.1 * factor for factor in start]

    spec, weight = layer("grouped" if method == "tucker" else "conv")
    data = Whitened(METHODS[method], spec, weight, covariance(spec), Evidence(1))
    rank = data.rank(0.4)
    monkeypatch.setattr(whitening, "fitted_factors", spoil)
    torch.testing.assert_close(data.refined(rank).reconstruct(rank), data.reconstruct(rank))


def test_inputs_that_span_less_than_all_channels_are_served() -> None:
    spec, weight = layer("linear")
    rows = torch.randn(4, 12, generator=torch.Generator().manual_seed(0)).double()
    metric = (rows.T @ rows)[None] / 4
    data = Whitened(Svd(), spec, weight, metric)
    assert missed(data, 4, spec, metric) < 1e-3 * data.norm
    nothing = Whitened(Svd(), spec, weight, torch.zeros_like(metric))
    assert nothing.refined(2).reconstruct(2).isfinite().all()


def test_what_a_first_stage_sees_is_whitened() -> None:
    conv = spec_of(nn.Conv2d(6, 8, (3, 5)))
    assert conv is not None
    seen = {name: whitened_axes(method, conv) for name, method in METHODS.items()}
    assert (seen["svd"], seen["tucker"], seen["cp"], seen["tt"]) == ((0, 1), (), (), ())
    assert seen["spatial-svd"] == (0,)
    assert whitened_axes(METHODS["kronecker"], conv) is None


@pytest.mark.parametrize(("method", "name"), CASES)
def test_scored_in_the_metric_of_the_inputs_its_errors_are_those_of_its_factors(
    method: str, name: str
) -> None:
    spec, weight = layer(name)
    known = Evidence(0, curvature=Curvature(spec, covariance(spec)))
    ready, fitted = (
        prepared(DataAware(METHODS[method], steps), spec, weight, known) for steps in (0, 5)
    )
    rank = ready.rank(0.4)
    assert fitted.rank(0.4) == rank
    assert fitted.error(rank) == pytest.approx(missed(fitted, rank, spec, covariance(spec)))
    assert missed(fitted, rank, spec, covariance(spec)) <= missed(
        ready, rank, spec, covariance(spec)
    ) * (1 + 1e-4)
    blind = prepared(DataAware(METHODS[method], 5), spec, weight, Evidence(0))
    assert blind.error(rank) == prepared(METHODS[method], spec, weight, Evidence(0)).error(rank)
