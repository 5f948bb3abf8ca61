"""Parameters: what a model takes to store."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tdkit.costs.base import Cost
from tdkit.layers.counting import model_parameters
from tdkit.layers.inventory import Layer
from tdkit.layers.stages import Stage


class Params(Cost):
    """Parameters, biases included; those that several modules share count once."""

    name = "params"
    unit = "parameters"

    def of(self, stages: Sequence[Stage], layer: Layer) -> int:
        """Weights and biases of all stages."""
        return sum(stage.parameters for stage in stages)

    def total(self, model: nn.Module, layers: Sequence[Layer]) -> int:
        """All parameters of the model, whatever module holds them."""
        return model_parameters(model)


PARAMS = Params()
