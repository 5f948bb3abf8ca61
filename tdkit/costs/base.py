"""What a budget bounds: a number that falls when layers are replaced."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from tdkit.errors import UnlawfulError, UsageError, first_line, option
from tdkit.layers.inventory import Layer
from tdkit.layers.stages import Stage

CALLS = "calls"
"""The need of a cost that depends on how the model calls its layers, as MACs do."""

NEEDS = frozenset({CALLS})
"""Everything that a cost may need besides the layers themselves."""


class Cost(ABC):
    """A cost. Subclass it, and register it with the hook ``tdkit_costs``.

    A budget is a bound on a sum, so the cost of a model falls by what each replaced layer saves.

    Attributes:
        name: What users type after ``cost``.
        unit: What it is counted in, in the plural, such as ``parameters``.
        needs: What must be known of the layers; a subset of :data:`NEEDS`.
    """

    name: str
    unit: str
    needs: frozenset[str] = frozenset()

    @abstractmethod
    def of(self, stages: Sequence[Stage], layer: Layer) -> int:
        """What some stages in a row cost where a layer stands, at least 0.

        Args:
            stages: What stands there; the layer itself is its own only stage.
            layer: The layer; how it is called is known if the cost needs that.
        """

    @abstractmethod
    def total(self, model: nn.Module, layers: Sequence[Layer]) -> int:
        """What a whole dense model costs, at least what its layers do.

        Args:
            model: The model.
            layers: All its layers.
        """


@dataclass(frozen=True)
class Change:
    """A cost before and after a layer is replaced."""

    before: int
    after: int

    @property
    def saving(self) -> int:
        """How much less it is; below 0 where it is more."""
        return self.before - self.after


def is_known(cost: Cost, layer: Layer) -> bool:
    """Whether what a cost needs of a layer is known."""
    return layer.spec is not None and (CALLS not in cost.needs or layer.calls is not None)


def change(cost: Cost, stages: Sequence[Stage], layer: Layer) -> Change | None:
    """What replacing a layer by stages changes; None where the cost is unknown.

    Raises:
        UnlawfulError: If the cost fails, or is no whole number of at least 0.
    """
    if layer.spec is None or not is_known(cost, layer):
        return None
    where = f"the layer {layer.name!r}"
    before, after = (
        _checked(cost, partial(cost.of, row, layer), where) for row in ([layer.spec], stages)
    )
    return Change(before, after)


def total_cost(model: nn.Module, layers: Sequence[Layer], cost: Cost) -> int:
    """What a model costs.

    Raises:
        UsageError: If the cost depends on how layers are called, and the model has not been run.
        UnlawfulError: If the cost fails, or is no whole number of at least 0.
    """
    if CALLS in cost.needs and any(layer.calls is None for layer in layers):
        raise unknown_cost(cost)
    return _checked(cost, partial(cost.total, model, layers), "the model")


def _checked(cost: Cost, count: Callable[[], int], what: str) -> int:
    """What a cost counts, of which a planner may take differences and sums."""
    try:
        found = count()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a plugin may fail in any way
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UnlawfulError(f"the cost {cost.name} fails on {what}: {reason}") from error
    if not isinstance(found, int) or found < 0:
        raise UnlawfulError(
            f"the cost {cost.name} of {what} is {found!r}, and a cost is a whole number of at"
            " least 0"
        )
    return found


def unknown_cost(cost: Cost) -> UsageError:
    """The error for a cost that takes a forward pass to know."""
    shape = option("input_shape", (3, 224, 224))
    return UsageError(
        f"{cost.unit} are unknown without the shape of the input", f"give it with {shape}"
    )


def to_json(costs: Mapping[str, Change | None]) -> dict[str, Any]:
    """Costs as JSON values: ``{name}_before`` and ``{name}_after``, null where unknown."""
    return {
        key: value
        for name, found in costs.items()
        for key, value in (
            (f"{name}_before", found and found.before),
            (f"{name}_after", found and found.after),
        )
    }
