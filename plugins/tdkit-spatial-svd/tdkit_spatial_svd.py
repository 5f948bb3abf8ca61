"""Spatial SVD: a k x k convolution as k x 1 followed by 1 x k (Jaderberg et al. 2014).

The weight (out, in, y, x) is unfolded as (in * y) x (x * out) and truncated by an SVD. One rank
joins both stages, the number of channels between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tdkit.hookspecs import DecompositionRecord, hookimpl

if TYPE_CHECKING:
    from tdkit.decompositions.base import Decomposition


def _create() -> Decomposition:
    # Imported here, not above: listing what a plugin provides must not import torch.
    import torch
    from torch import Tensor

    from tdkit.decompositions.base import Decomposition, Rank
    from tdkit.layers.spec import LayerSpec

    class SpatialSvd(Decomposition):
        def supports(self, layer: LayerSpec) -> str | None:
            return None if layer.kind == "Conv2d" else "spatial SVD needs a Conv2d"

        def _sides(self, layer: LayerSpec) -> tuple[int, int]:
            height, width = layer.kernel_size
            return layer.in_channels * height, layer.out_channels * width

        def rank(self, layer: LayerSpec, keep: float) -> int:
            wanted = round(keep * layer.weight_parameters / sum(self._sides(layer)))
            return max(1, min(wanted, self.max_rank(layer)))

        def max_rank(self, layer: LayerSpec) -> int:
            return min(self._sides(layer))

        def stages(self, layer: LayerSpec, rank: Rank) -> Sequence[LayerSpec]:
            assert isinstance(rank, int)
            return (
                layer.spatial(layer.in_channels, rank, axes=[0]),
                layer.spatial(rank, layer.out_channels, axes=[1]),
            )

        def decompose(
            self, layer: LayerSpec, weight: Tensor, rank: Rank, generator: torch.Generator
        ) -> Sequence[Tensor]:
            assert isinstance(rank, int)
            rows, columns = self._sides(layer)
            height, width = layer.kernel_size
            unfolded = weight.permute(1, 2, 3, 0).reshape(rows, columns)
            left, values, right = torch.linalg.svd(unfolded, full_matrices=False)
            root = values[:rank].sqrt()
            vertical = (left[:, :rank] * root).T.reshape(rank, layer.in_channels, height, 1)
            horizontal = (root[:, None] * right[:rank]).reshape(rank, 1, width, -1)
            return vertical, horizontal.permute(3, 0, 1, 2)

    return SpatialSvd()


@hookimpl
def tdkit_decompositions() -> list[DecompositionRecord]:
    """Provide spatial-svd."""
    summary = "k x 1, then 1 x k, of one rank"
    return [DecompositionRecord("spatial-svd", summary, _create, default=0)]
