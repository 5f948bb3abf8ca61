"""Multiply-accumulates of convolutional and linear layers. FLOPs are twice the MACs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tdkit.costs.base import CALLS, Cost
from tdkit.layers.counting import macs
from tdkit.layers.inventory import Layer
from tdkit.layers.stages import Stage


class Macs(Cost):
    """Multiply-accumulates per sample; attention and the like are left out (see uncounted)."""

    name = "macs"
    unit = "MACs"
    needs = frozenset({CALLS})

    def of(self, stages: Sequence[Stage], layer: Layer) -> int:
        """Over all calls of the layer that one sample causes."""
        return macs(stages, layer.calls or ())

    def total(self, model: nn.Module, layers: Sequence[Layer]) -> int:
        """The sum over all layers whose hyperparameters are known."""
        return sum(layer.macs or 0 for layer in layers)


MACS = Macs()
