"""Forward passes that stand still in front of a layer and go on once that is fitted.

To fit layer after layer to what the fitted ones before deliver takes the input of each in turn. A
model that is run anew for every layer runs half its layers squared. So the pass of each batch runs
in a thread of its own, which waits in front of the layer that is looked at: what is in memory
meanwhile is what the model itself holds there. One thread runs at a time, ever.
"""

from __future__ import annotations

import contextvars
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tdkit.forward.inputs import Inputs
from tdkit.forward.trial import buffer_watch, random_state, set_random_state, tried_on_data

WAITING = 2**29
"""What passes that wait hold in memory together, in bytes; those beyond are run anew."""

# Threads of passes that wait, with those that compute for each of them.
_THREADS = 2**10

# Seconds without a sign after which a pass is taken to wait for what another one holds, as a lock.
_PATIENCE = 60.0

Look = Callable[[Tensor], bool]
"""Is shown a layer's input, of any shape; returns whether that was the last one it wants."""


class Passes:
    """The passes of some batches through a model whose layers are changed one after the other.

    Args:
        model: The model; each pass leaves it as it was. Enter this before anything is run.
        layers: Names of those that are still to be changed.
        batches: Arguments of forward passes, tensors of any shape.
        waiting: What passes that wait may hold in memory, in bytes; 0 runs all of them anew.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        batches: Sequence[Inputs],
        waiting: int = WAITING,
    ) -> None:
        self.batches = batches
        self._model, self._most = model, waiting
        self._open = set(layers)
        self._waiting: dict[int, _Pass] = {}
        self._running: _Pass | None = None
        self._longest = 0.0
        self._stack = ExitStack()

    def __enter__(self) -> Passes:
        with ExitStack() as stack:
            stack.callback(self._end)
            for module in self._model.modules():
                if not isinstance(module, torch.jit.ScriptModule):
                    stack.callback(module.register_forward_hook(self._made).remove)
            for name in self._open:
                layer = self._model.get_submodule(name)
                reached: Any = partial(self._reached, name)
                handle = layer.register_forward_pre_hook(reached, with_kwargs=True, prepend=True)
                stack.callback(handle.remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def held(self) -> int:
        """What those that wait hold in memory, in bytes."""
        return sum(each.held() for each in self._waiting.values())

    def run(self, number: int, name: str, look: Look) -> None:
        """Run a batch up to the call of a layer that is the last one looked at, or to its end.

        Args:
            number: Of the batch.
            name: The layer, one that is still to be changed.
            look: Is shown what it is given, call after call.

        Raises:
            UnsupportedError: If the model does not run on the batch.
        """
        going = self._waiting.pop(number, None) or _Pass(self._model, self.batches[number])
        going.goal, going.look = name, look
        start, self._running = time.monotonic(), going
        try:
            with tried_on_data(self._model):
                is_written = buffer_watch(self._model)
                going.go_on(max(_PATIENCE, 20 * self._longest), self._stuck)
                if going.waits and is_written():  # what is put back it would miss later
                    going.end()
        finally:
            self._running = None
        self._longest = max(self._longest, time.monotonic() - start)
        if going.waits:
            self._waiting[number] = going

    def settle(self, name: str) -> None:
        """A layer is changed no more: passes may go through it."""
        self._open.discard(name)

    def _reached(
        self, name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        here = self._running
        if here is None:
            return
        if here.ending:
            raise _Enough
        if name == here.goal:
            value = args[0] if args else next(iter(kwargs.values()))
            if here.look(value):
                here.keep(value)
                if not self._may_wait(here):
                    here.ending = True
                    raise _Enough
                here.wait()
        # Behind a layer that is still to be changed a pass is of no use later.
        here.stale |= name in self._open

    def _may_wait(self, here: _Pass) -> bool:
        room = (len(self._waiting) + 1) * torch.get_num_threads() <= _THREADS
        return not here.stale and room and self.held + here.held() <= self._most

    def _made(self, _module: nn.Module, _args: Any, output: Any) -> None:
        if self._running is not None:
            self._running.keep(output)

    def _stuck(self) -> None:
        """What a pass needs another one may hold: from now on none waits."""
        self._most = -1
        self._end()

    def _end(self) -> None:
        several = list(self._waiting.values())
        self._waiting.clear()
        for each in several:
            each.let_end()
        for each in several:
            each.end()


class _Enough(BaseException):
    """All that is wanted was seen. No model catches it as an error of its own."""


class _Pass:
    """A forward pass in a thread of its own.

    Attributes:
        goal: The layer to go on to.
        look: See :data:`Look`.
        stale: Whether it went through a layer that was changed, or is to be changed, after that.
        waits: Whether it stands in front of its goal.
        ending: Whether it is to end as soon as it can.
    """

    def __init__(self, model: nn.Module, batch: Inputs) -> None:
        self.goal = ""
        self.look: Look = lambda value: True
        self.stale = self.waits = self.ending = False
        self._model, self._batch = model, batch
        self._modes = _modes()
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._work,), daemon=True)
        self._error: BaseException | None = None
        self._given = sum(tensor.nbytes for tensor in batch.tensors)
        self._kept: list[weakref.ref[Tensor]] = []

    def go_on(self, patience: float, stuck: Callable[[], None]) -> None:
        """Run on to the goal, or to the end.

        Args:
            patience: Seconds after which it may be that it never gets there.
            stuck: Called then.
        """
        self.waits = False
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._turn.release()
        try:
            while not self._back.acquire(timeout=patience):
                stuck()
        except BaseException:
            self.end()
            raise
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Stand still, in the pass's own thread, until it is to go on or to end."""
        randomness, self.waits = random_state(), True
        self._back.release()
        self._turn.acquire()
        if self.ending:
            raise _Enough
        set_random_state(randomness)

    def end(self) -> None:
        """End it, wherever it is: at the latest in front of the next layer."""
        self.let_end()
        self._thread.join()

    def let_end(self) -> None:
        """The same, without waiting for it."""
        self.ending, self.waits = True, False
        self._turn.release()

    def keep(self, output: Any) -> None:
        """Count what a module returned, tensors of any shape, while it is alive."""
        self._kept += [weakref.ref(x) for x in pytree.tree_leaves(output) if isinstance(x, Tensor)]

    def held(self) -> int:
        """What is alive of the arguments and of all that was returned, in bytes."""
        alive = [tensor for kept in self._kept if (tensor := kept()) is not None]
        self._kept = [weakref.ref(tensor) for tensor in alive]
        storages = {s.data_ptr(): s.nbytes() for s in (x.untyped_storage() for x in alive)}
        return self._given + sum(storages.values())

    def _work(self) -> None:
        try:
            with self._modes() as _, torch.no_grad():
                self._batch.run(self._model)
        except _Enough:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._back.release()


def _modes() -> Callable[[], ExitStack]:
    """What torch keeps for each thread, as it is in this one, to be entered in another."""
    inference, device = torch.is_inference_mode_enabled(), torch.get_default_device()
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    dtypes = [torch.get_autocast_dtype(kind) for kind in kinds]
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    def enter() -> ExitStack:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(inference))
            if device.type != "cpu":
                stack.enter_context(device)
            for kind, dtype in zip(kinds, dtypes, strict=True):
                # Weights that were cast once are others after a fit.
                stack.enter_context(torch.autocast(kind, dtype, cache_enabled=False))
            if stream is not None:
                stack.enter_context(torch.cuda.stream(stream))
            return stack.pop_all()

    return enter
