"""Hear of every call of some modules, and let others decide what happens at it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import nn

from tdkit.forward.operators import OperatorMode

Forward = Callable[..., Any]
"""A module's own forward."""

Watch = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any], Any], None]
"""Called with a layer, its arguments, its options and its output, like a forward hook."""


class Follower(Protocol):
    """Decides at every call of a module what happens."""

    def call(
        self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What the module's forward returns, or something in its place."""


class Listener:
    """Hears of every call of some modules.

    Args:
        modules: The modules.
        target: The one whose calls are watched.
        watch: Called after each of the target's calls in a watched pass.
    """

    def __init__(
        self, modules: Iterable[nn.Module], target: nn.Module, watch: Watch | None
    ) -> None:
        self._modules = dict.fromkeys(modules)
        self._target, self._watch = target, watch
        # Of the pass that is under way.
        self._follower: Follower | None = None
        self._watching = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear of the calls inside a block; the modules are afterwards as before."""
        before = {module: vars(module).get("forward") for module in self._modules}
        try:
            for module in self._modules:
                vars(module)["forward"] = self._heard(module, module.forward)
            yield
        finally:
            for module, forward in before.items():
                if forward is None:
                    vars(module).pop("forward", None)
                else:
                    vars(module)["forward"] = forward

    @contextmanager
    def followed(self, follower: Follower | None) -> Iterator[None]:
        """Let a follower decide at the calls inside a block; None lets all of them run."""
        self._follower = follower
        try:
            yield
        finally:
            self._follower = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Show the target's calls inside a block to who watches them."""
        self._watching = True
        try:
            yield
        finally:
            self._watching = False

    def _heard(self, module: nn.Module, forward: Forward) -> Forward:
        # Neither hooks nor a wrapping module: some torch layers take another path with hooks.
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._follower is None:
                output = forward(*args, **kwargs)
            else:
                output = self._follower.call(module, forward, args, kwargs)
            if self._watching and self._watch is not None and module is self._target:
                self._watch(module, args, kwargs, output)
            return output

        return call


def counter() -> Counter:
    """A counter that counts from nought; untyped in torch."""
    return Counter()  # type: ignore[no-untyped-call]


class Counter(OperatorMode):
    """Counts the operators of torch that run."""

    count = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Count it and run it."""
        self.count += 1
        return func(*args, **kwargs or {})
