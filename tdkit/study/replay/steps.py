"""What to do at each call before the layer's first one."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch import nn


class Action(Enum):
    """What to do at a call."""

    RUN = "run"
    """Run it, and decide at each call inside."""
    HAND_OUT = "hand out"
    """Return what it returned."""
    COPY = "copy"
    """Return a copy of what it returned, as that is changed in place later."""
    ADVANCE = "advance"
    """Return what it returned, as the next call has changed it."""
    PASS = "pass"
    """Return the input, which this call would change in place, and which has changed already."""
    SKIP = "skip"
    """Return nothing, as only a call that does not run would get it."""


@dataclass(frozen=True)
class Step:
    """A call of a module, and what to do at it."""

    module: nn.Module
    action: Action
