"""The one call signature of every planner. Planners see records, never tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tdkit.errors import UsageError


@dataclass(frozen=True)
class Option:
    """One way to replace a layer.

    Attributes:
        layer: The layer's name.
        saving: The cost it saves, in the unit of the budget; above 0.
        penalty: What it adds to the objective: the error of the chosen metric by its law, see
            :data:`tdkit.metrics.base.PENALTIES`.
        index: Its place in the list of candidates it was made from.
    """

    layer: str
    saving: int
    penalty: float
    index: int


class Planner(Protocol):
    """Chooses at most one option per layer."""

    def __call__(self, options: Sequence[Option], needed: int) -> list[Option]:
        """Choose options that together save at least ``needed`` at a small summed penalty.

        Args:
            options: The candidates; their order must not matter.
            needed: The cost to save; 0 or less asks for nothing.

        Returns:
            The chosen options, at most one per layer.

        Raises:
            UnreachableError: If all layers together cannot save as much.
        """
        ...


class UnreachableError(UsageError):
    """No choice saves enough.

    Attributes:
        most: The most that can be saved.
    """

    def __init__(self, most: int) -> None:
        super().__init__("the budget is out of reach")
        self.most = most
