"""``tdkit.factorize``: a single layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tdkit
from tdkit.compression.verification import dense_weight
from tdkit.decompositions.base import unsupported
from tdkit.errors import UnsupportedError, UsageError
from tdkit.layers.inventory import find_layers
from tdkit.registry import load_registry, resolve_methods

LAYERS = {
    "Conv1d": (lambda bias: nn.Conv1d(8, 12, 3, stride=2, bias=bias), (2, 8, 11)),
    "Conv2d": (lambda bias: nn.Conv2d(8, 12, 3, padding=1, bias=bias), (2, 8, 9, 9)),
    "grouped": (lambda bias: nn.Conv2d(8, 12, 3, groups=2, bias=bias), (2, 8, 9, 9)),
    "Conv3d": (lambda bias: nn.Conv3d(6, 8, 3, bias=bias), (2, 6, 5, 5, 5)),
    "ConvTranspose2d": (
        lambda bias: nn.ConvTranspose2d(8, 12, 3, stride=2, output_padding=1, bias=bias),
        (2, 8, 5, 5),
    ),
    "Linear": (lambda bias: nn.Linear(24, 16, bias=bias), (2, 24)),
}
METHODS = resolve_methods(load_registry(), ["svd", "cp", "tucker", "tt"])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_every_kind_of_layer(method, kind, bias) -> None:
    make, shape = LAYERS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layer, x = make(bias).double(), torch.randn(*shape).double()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    (found,) = find_layers(nn.Sequential(layer), include_ends=True)
    assert found.spec is not None
    reason = unsupported(METHODS[method], found.spec)
    if reason is not None:
        with pytest.raises(UnsupportedError, match=f"^{method} cannot decompose the layer: "):
            tdkit.factorize(layer, method, keep=0.5)
        return
    done = tdkit.factorize(layer, method, keep=0.5)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert done.parameters[0] == sum(p.numel() for p in layer.parameters())
    assert done.parameters[1] == sum(p.numel() for p in done.module.parameters())
    assert done.parameters[1] < done.parameters[0]
    assert done.module(x).shape == layer(x).shape
    weight = layer.weight.detach()
    gap = torch.linalg.vector_norm(weight - dense_weight(done.module, found.spec).detach())
    expected = float(gap / torch.linalg.vector_norm(weight))
    assert done.error == pytest.approx(expected, rel=1e-6)
    assert 0 < done.error < 1
    again = tdkit.factorize(layer, method, done.rank)
    assert (again.rank, again.error) == (done.rank, done.error)


def test_the_rank_is_the_users_and_the_record_prints_it() -> None:
    layer = nn.Conv2d(16, 24, 3).eval()
    for rank in ((8, 6), [8, 6]):
        done = tdkit.factorize(layer, "tucker", rank=rank)  # type: ignore[arg-type]
        assert done.rank == (8, 6)
        assert [tuple(part.weight.shape[:2]) for part in done.module] == [(6, 16), (8, 6), (24, 8)]
        assert not done.module.training
    head, row = (line.split() for line in str(done).splitlines())
    assert head[:3] == ["method", "rank", "parameters"]
    assert row[:2] == ["tucker", "8×6"]
    assert "8×6" in done._repr_html_()


def test_settings_and_seed_have_their_effect() -> None:
    layer = nn.Conv2d(8, 12, 3)
    uniform: dict[str, Any] = {"rank": 6, "settings": {"start": "uniform"}}
    one, same, other = (tdkit.factorize(layer, "cp", seed=s, **uniform) for s in (1, 1, 2))
    assert one.error == same.error != other.error
    assert tdkit.factorize(layer, "cp", 6).error != one.error


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "svd"}, "a layer is factorized to a rank or to a keep"),
        ({"method": "svd", "rank": 2, "keep": 0.5}, "a rank or to a keep"),
        ({"method": "sdv", "rank": 2}, "no method named 'sdv'"),
        ({"method": "svd", "rank": 0}, "rank 0 does not fit"),
        ({"method": "svd", "rank": 99}, "rank 99 does not fit"),
        ({"method": "tucker", "rank": 3}, "rank 3 does not fit"),
        ({"method": "svd", "keep": 0.0}, "the keep 0.0 is not a fraction"),
        ({"method": "svd", "keep": 1.5}, "the keep 1.5 is not a fraction"),
        ({"method": "svd", "keep": 0.5, "rule": "worst"}, "it is best or proportional"),
        ({"method": "cp", "rank": 2, "settings": {"swoops": 1}}, "cp has no setting 'swoops'"),
        ({"method": "svd", "rank": 2, "seed": 0.5}, "the seed 0.5 is not a whole number"),
    ],
)
def test_what_is_refused(options, says) -> None:
    with pytest.raises(UsageError) as refused:
        tdkit.factorize(nn.Conv2d(6, 8, 3), **options)
    assert says in f"{refused.value} {refused.value.hint}"


def test_what_is_no_layer_and_what_is_not_finite() -> None:
    with pytest.raises(UnsupportedError):
        tdkit.factorize(nn.ReLU(), "svd", 2)
    layer = nn.Linear(6, 6)
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")
    with pytest.raises(UnsupportedError):
        tdkit.factorize(layer, "svd", 2)
