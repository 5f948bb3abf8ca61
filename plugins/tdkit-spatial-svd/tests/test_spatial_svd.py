import torch
from tdkit_spatial_svd import _create
from torch import nn

from tdkit.layers.spec import LayerSpec, spec_of
from tdkit.registry import load_registry
from tdkit.testing import DecompositionLaws


class TestSpatialSvd(DecompositionLaws):
    method = _create()


del DecompositionLaws


def test_registered_by_its_entry_point() -> None:
    registry = load_registry()
    assert "spatial-svd" in registry.decompositions
    provider = next(p for p in registry.providers if p.name == "tdkit-spatial-svd")
    assert provider.failure is None
    assert provider.provides == {"tdkit_decompositions": ("spatial-svd",)}


def test_error_is_the_tail_of_the_unfoldings_singular_values() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Conv2d(5, 7, (3, 2)).double()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
    unfolded = layer.weight.detach().permute(1, 2, 3, 0).reshape(15, 14)
    values = torch.linalg.svdvals(unfolded)
    prepared = _create().prepare(spec_of(layer), layer.weight)
    for rank in (1, 4, 13):
        torch.testing.assert_close(prepared.error(rank), float(values[rank:].norm()))


def test_stages_are_the_two_separable_convolutions() -> None:
    layer = nn.Conv2d(6, 8, 3, stride=(2, 1), padding=1)
    first, second = _create().prepare(spec_of(layer), layer.weight).stages(4)
    assert isinstance(first, LayerSpec)
    assert isinstance(second, LayerSpec)
    assert (first.kernel_size, first.stride, first.padding) == ((3, 1), (2, 1), (1, 0))
    assert (second.kernel_size, second.stride, second.padding) == ((1, 3), (1, 1), (0, 1))
    assert second.bias
    assert not first.bias
