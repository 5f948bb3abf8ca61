"""A pass that returns what is remembered up to the layer, and runs the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from tdkit.study.replay.following import Forward
from tdkit.study.replay.steps import Action, Step
from tdkit.study.replay.values import Values


class Player:
    """Hands out what is remembered, and runs the rest."""

    def __init__(
        self,
        steps: Sequence[Step],
        memory: Sequence[Values],
        target: nn.Module,
        stand_in: nn.Module,
    ) -> None:
        self.done = False
        self._steps, self._memory = iter(steps), iter(memory)
        self._target, self._stand_in = target, stand_in
        # What the next call, which would change it, is to be given; None in a chain that skips it.
        self._advanced: Any = None

    def call(
        self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What the step says, up to the layer's first call.

        Raises:
            RuntimeError: If the model does something else than the steps say.
        """
        if self.done:
            return forward(*args, **kwargs)
        step = next(self._steps)
        if step.module is not (self._target if module is self._stand_in else module):
            raise RuntimeError("the model calls its modules in another order than before")
        self.done = step.module is self._target
        if step.action is Action.RUN:
            return forward(*args, **kwargs)
        if step.action is Action.SKIP:
            return None
        if step.action is Action.PASS:
            if len(args) != 1 or kwargs or args[0] is not self._advanced:
                raise RuntimeError("the model changes something else in place than before")
            self._advanced = None
            return args[0]
        found = next(self._memory).tree(copied=step.action is Action.COPY)
        if step.action is Action.ADVANCE:
            self._advanced = found
        return found
