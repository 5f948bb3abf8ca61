"""Write down the calls before the layer in one pass, and plan what to do at each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import nn

from tdkit.study.replay.following import Forward, counter
from tdkit.study.replay.steps import Action, Step
from tdkit.study.replay.values import Values, changed_in_place, returned_anew


@dataclass
class Call:
    """One call of a module before the layer's first call."""

    module: nn.Module
    forward: Forward
    begun: int
    ended: int = 0
    calls: list[Call] = field(default_factory=list)
    returned: Values | None = None
    changed: Values | None = None
    aliased: bool = False

    @property
    def action(self) -> Action:
        """What to do at this call in the pass of a stand-in."""
        if self.returned is None or self.hooked:
            return Action.RUN
        if self.returned.intact:
            return Action.HAND_OUT
        # A copy would not share the change with the input that it is a view of.
        return Action.RUN if self.aliased else Action.COPY

    def is_advanced_by(self, following: Call) -> bool:
        """Whether all that happens to what it returned is that the following call changes it."""
        if self.action is not Action.COPY or following.changed is None or following.hooked:
            return False
        assert self.returned is not None
        return (
            following.changed.same(self.returned.tree())
            and following.changed.intact
            and following.begun == self.ended
        )

    @property
    def hooked(self) -> bool:
        """Whether somebody listens to this call or to one inside."""
        own = self.module._forward_hooks or self.module._forward_pre_hooks
        return bool(own) or any(call.hooked for call in self.calls)

    @property
    def is_chain(self) -> bool:
        """Whether each call inside gets what the one before returned, and nobody else does."""
        if getattr(self.forward, "__func__", None) is not nn.Sequential.forward:
            return False
        assert isinstance(self.module, nn.Sequential)
        stages = list(self.module)[: len(self.calls)]
        return [id(call.module) for call in self.calls] == [id(stage) for stage in stages]


def plan(calls: Sequence[Call], is_chain: bool = False) -> Iterator[Step]:
    """What to do at each call, in the order in which they begin.

    Args:
        calls: Those of a scouting pass, as a tree.
        is_chain: Whether each of them gets what the one before returned, and nobody else does.
    """
    actions = [call.action for call in calls]
    for place, (call, following) in enumerate(pairwise(calls)):
        if call.is_advanced_by(following):
            actions[place : place + 2] = [Action.ADVANCE, Action.PASS]
    for call, action in zip(calls, _skipping(actions) if is_chain else actions, strict=True):
        yield Step(call.module, action)
        if action is Action.RUN:
            yield from plan(call.calls, call.is_chain)


def _skipping(actions: Sequence[Action]) -> Sequence[Action]:
    """The actions of a chain, without handing out what no call of it looks at."""
    found: list[Action] = []
    wanted = True  # what the last call returns
    for action in reversed(actions):
        if action not in (Action.RUN, Action.PASS) and not wanted:
            found.append(Action.SKIP)
        else:
            found.append(action)
        wanted = action is Action.RUN or (action is Action.PASS and wanted)
    return found[::-1]


class Scout:
    """Writes down the calls before the layer's first one, as a tree."""

    def __init__(self, target: nn.Module) -> None:
        self.counter = counter()
        self.calls: list[Call] = []
        self.done = False
        self._target = target
        self._siblings = self.calls

    def call(
        self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run it, and see what it does to its inputs."""
        self.done = self.done or module is self._target
        if self.done:
            return forward(*args, **kwargs)
        call, siblings = Call(module, forward, self.counter.count), self._siblings
        siblings.append(call)
        self._siblings = call.calls
        given = Values((args, kwargs))
        try:
            output = forward(*args, **kwargs)
        finally:
            self._siblings = siblings
        call.ended = self.counter.count
        if not self.done:
            call.returned = returned_anew(given, (args, kwargs), output)
            call.changed = changed_in_place(args, kwargs, output)
        if call.returned is not None:
            places = call.returned.storages
            call.aliased = len({*places, *given.storages}) < len(places) + len({*given.storages})
        return output
