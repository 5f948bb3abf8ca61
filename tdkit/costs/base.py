"""What a budget bounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from tdkit.errors import UsageError
from tdkit.layers.counting import model_parameters
from tdkit.layers.inventory import Layer


def total_cost(model: nn.Module, layers: Sequence[Layer], cost: Cost) -> int:
    """A model's parameters, or the MACs of its convolutional and linear layers.

    Raises:
        UsageError: If MACs are asked for and the model has not been run.
    """
    if cost == "params":
        return model_parameters(model)
    counts = [layer.macs for layer in layers]
    if any(layer.calls is None for layer in layers):
        raise UsageError(
            "MACs are unknown without the shape of the input",
            "give it with --input-shape, such as 3,224,224",
        )
    return sum(number for number in counts if number is not None)


Cost = Literal["params", "macs"]
