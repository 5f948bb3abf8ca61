"""The one call signature of every planner. Planners see records, never tensors."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tdkit.errors import UsageError


@dataclass(frozen=True)
class Option:
    """One way to replace a layer.

    Attributes:
        layer: The layer's name.
        saving: The cost it saves, in the unit of the budget. Above 0 where the budget is the only
            bound; else it may cost more of one thing than the layer does, and save another.
        penalty: What it adds to the objective: the error of the chosen metric by its law, see
            :data:`tdkit.metrics.base.PENALTIES`.
        index: Its place in the list of candidates it was made from.
        further: What it saves of the cost of each further bound, in their order.
    """

    layer: str
    saving: int
    penalty: float
    index: int
    further: tuple[int, ...] = ()

    @property
    def savings(self) -> tuple[int, ...]:
        """What it saves of the cost of every bound, the budget's first."""
        return (self.saving, *self.further)


class Planner(Protocol):
    """Chooses at most one option per layer, under one bound."""

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


class BoundsPlanner(Protocol):
    """A planner that holds further bounds as well, which it takes as a third argument."""

    def __call__(
        self, options: Sequence[Option], needed: int, further: Sequence[int] = ()
    ) -> list[Option]:
        """Choose options that save enough of every cost at a small summed penalty.

        Args:
            options: The candidates; their order must not matter.
            needed: What to save of the budget's cost; 0 or less forbids to add as much to it.
            further: What to save of the cost of each further bound, as in ``Option.further``.

        Returns:
            The chosen options, at most one per layer.

        Raises:
            UnreachableError: If no choice holds all bounds.
        """
        ...


def holds_several(planner: Planner) -> bool:
    """Whether a planner takes further bounds as a third argument."""
    try:
        inspect.signature(planner).bind((), 0, ())
    except (TypeError, ValueError):  # the latter where a callable tells no signature
        return False
    return True


class UnreachableError(UsageError):
    """No choice saves enough.

    Attributes:
        most: The most that can be saved.
        each: Of every bound the most that can be saved while the others hold, or where these
            cannot be held, at all.
    """

    def __init__(self, most: int, *further: int) -> None:
        super().__init__("the budget is out of reach")
        self.most = most
        self.each = (most, *further)
