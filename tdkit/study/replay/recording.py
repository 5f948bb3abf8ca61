"""A full pass that remembers what the steps say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from tdkit.study.replay.following import Forward, counter
from tdkit.study.replay.steps import Action, Step
from tdkit.study.replay.values import Values, changed_in_place, returned_anew


class Recorder:
    """Runs everything, and remembers what the steps say."""

    def __init__(self, steps: Sequence[Step], target: nn.Module, stand_in: nn.Module) -> None:
        self.counter = counter()
        self.memory: list[Values] = []
        self.fits = True
        self.done = False
        self._steps = iter(steps)
        self._target, self._stand_in = target, stand_in
        self._inside = False
        self._advanced: tuple[Any, int] | None = None

    def call(
        self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run it; remember its output where a step says so."""
        if self.done:
            return forward(*args, **kwargs)
        if self._inside:
            if module is self._stand_in:
                self._misfit()
            return forward(*args, **kwargs)
        step = next(self._steps)
        self.done = step.module is self._target
        if step.module is not (self._target if module is self._stand_in else module):
            self._misfit()
        if self.done or step.action is Action.RUN:
            return forward(*args, **kwargs)
        given, begun = Values((args, kwargs)), self.counter.count
        self._inside = True
        try:
            output = forward(*args, **kwargs)
        finally:
            self._inside = False
        if step.action is Action.PASS:
            self._keep_changed(changed_in_place(args, kwargs, output), begun)
            self._advanced = None
        else:
            self._keep(returned_anew(given, (args, kwargs), output), step.action)
            if step.action is Action.ADVANCE:
                self._advanced = output, self.counter.count
        return output

    def _keep(self, returned: Values | None, action: Action) -> None:
        if returned is None:
            self._misfit()
        elif self.fits and action not in (Action.SKIP, Action.ADVANCE):
            self.memory.append(returned.copy() if action is Action.COPY else returned)

    def _keep_changed(self, changed: Values | None, begun: int) -> None:
        if self._advanced is None:
            return  # in a chain whose next call does not look at it
        output, ended = self._advanced
        if changed is None or begun != ended or not changed.same(output):
            self._misfit()
        elif self.fits:
            self.memory.append(changed)

    def _misfit(self) -> None:
        self.fits, self.done = False, True
        self.memory.clear()
