"""Predictions of a model with one layer replaced, without computing again what ran before it.

The dense model runs once per batch. What its modules returned before the layer's first call does
not depend on the layer, so for every stand-in they return it again instead of computing it, whole
blocks at once; from the layer on everything runs. This goes by call and not by name, so a module
may be called several times.

Which calls can be replayed is read off a scouting pass over two samples: those that ended before
the layer's first call, changed none of their inputs in place and returned nothing but tensors.
The tensors' version counters tell what is changed in place (``out += identity``,
``ReLU(inplace=True)``): such outputs are remembered and handed out as copies. Where the very next
thing that happens to an output is a module that changes it in place, it is handed out as it is
after that; reading it in between without an operator of torch, as ``numpy()`` does, is not seen.
The rest is checked again on every batch, and on the first batch the logits of a
replay are compared with those of a full pass. Where anything does not fit (data-dependent control
flow, weights that are read without calling their module), full passes give the result instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tdkit.errors import TdkitError, UnsupportedError, UsageError, first_line
from tdkit.forward.inputs import copies
from tdkit.forward.operators import OperatorMode
from tdkit.forward.trial import mode, trial
from tdkit.layers.inventory import Layer, replace_layer

Watch = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any], Any], None]
"""Called with the layer, its arguments, its options and its output, like a forward hook."""

_Forward = Callable[..., Any]

# Two, as a model may treat a batch of one in its own way.
_SCOUTED = 2

_PLAIN = (
    type(None), bool, int, float, complex, str, bytes, slice,
    torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip

# Powers of the precision: by how much two passes of a deterministic model may differ (some CUDA
# kernels add up in any order), and how closely a replay has to agree with a full pass.
_DETERMINISTIC = 0.5
_REPLAYED = 0.75


def predictions(
    model: nn.Module,
    layer: Layer,
    stand_ins: Sequence[nn.Module],
    batches: Iterable[Tensor],
    *,
    watch: Watch | None = None,
) -> tuple[Tensor, list[Tensor | str]]:
    """The classes that a model predicts as it is, and with each stand-in in a layer's place.

    One dense pass per batch, and for each stand-in what comes after the layer's first call; for
    the first batch two more passes. Memory does not grow with the number of stand-ins. The
    model, its hooks and its modes are afterwards as before, also when something raises.

    Args:
        model: The dense model; it runs in eval mode.
        layer: The layer to replace, under all its names.
        stand_ins: What to put in its place, on its device.
        batches: Inputs of the model, (batch, ...), on its device and in its dtype.
        watch: Called after each of the layer's calls in the dense pass, once per batch.

    Returns:
        Dense, and for each stand-in, the predicted classes, int64 (n,) on the CPU, or the reason
        why the model fails with this stand-in. The class of logits with a NaN is -1.

    Raises:
        UnsupportedError: If the dense model does not run on the inputs, gives another output each
            time, or none of shape (batch, classes).
        UsageError: If there are no inputs.
    """
    session = _Session(model, layer, stand_ins, watch)
    with session.following():
        for batch in batches:
            with trial(model):
                session.measure(batch, dense=True)
    return _joined(session.dense).cpu(), session.found()


def replaced_predictions(
    model: nn.Module, layer: Layer, stand_ins: Sequence[nn.Module], batches: Iterable[Tensor]
) -> list[Tensor | str]:
    """What :func:`predictions` gives for the stand-ins, where the dense model is of no interest.

    What ran before the layer is then remembered in a stand-in's pass.
    """
    session = _Session(model, layer, stand_ins, None)
    with session.following():
        for batch in batches:
            with trial(model):
                session.measure(batch, dense=False)
    return session.found()


def dense_predictions(model: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """The classes that a model predicts, int64 (n,) on the CPU; see :func:`predictions`."""
    found: list[Tensor] = []
    for batch in batches:
        with trial(model):
            logits = _logits(model, batch)
            if not found:
                _refuse_random(logits, _logits(model, batch))
            found.append(_classes(logits))
    return _joined(found).cpu()


def reason_of(error: BaseException) -> str:
    """Why something failed, in one line."""
    if isinstance(error, TdkitError):
        return str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return f"out of memory: {first_line(error)}"
    return f"{type(error).__name__}: {first_line(error)}"


class _Session:
    """Measures the stand-ins of one layer batch by batch."""

    def __init__(
        self,
        model: nn.Module,
        layer: Layer,
        stand_ins: Sequence[nn.Module],
        watch: Watch | None,
    ) -> None:
        self.dense: list[Tensor] = []
        self._model, self._layer, self._stand_ins = model, layer, stand_ins
        self._watch = watch
        self._target = model.get_submodule(layer.name)
        self._follower: _Follower | None = None
        self._watching = False
        self._first = True
        self._can_replay = True
        self._steps: list[_Step] | None = None
        # Of the batch at hand: what its full pass has left, and whether one is still to come.
        self._memory: list[_Values] | None = None
        self._to_record = False
        self._replayed: tuple[nn.Module, Tensor] | None = None
        self._found: list[list[Tensor]] = [[] for _ in stand_ins]
        self._failures: dict[int, str] = {}

    def measure(self, batch: Tensor, dense: bool) -> None:
        """Add the predictions for one batch."""
        self._to_record = True
        if self._first or dense:
            logits = self._remember(batch)
            self.dense.append(_classes(logits))
            if self._first:
                _refuse_random(logits, self._run(batch))
        found = self._all(batch)
        if self._first and self._replayed and not self._confirmed(batch, *self._replayed):
            self._can_replay, self._memory = False, None
            found = self._all(batch)
        self._memory = self._replayed = None
        self._first = False
        for place, classes in found.items():
            self._found[place].append(classes)

    def found(self) -> list[Tensor | str]:
        """For each stand-in the predictions, on the CPU, or why there are none."""
        good = [place for place in range(len(self._found)) if place not in self._failures]
        # All at once, as each transfer waits for the device.
        joined = torch.stack([_joined(self._found[place]) for place in good]).cpu() if good else ()
        return [
            self._failures[place] if place in self._failures else joined[good.index(place)]
            for place in range(len(self._found))
        ]

    @contextmanager
    def following(self) -> Iterator[None]:
        """Hear of every call of the model's and the stand-ins' modules, stand-ins in eval mode."""
        modules = dict.fromkeys([*self._model.modules(), *self._stand_ins])
        before = {module: vars(module).get("forward") for module in modules}
        with ExitStack() as stack:
            for stand_in in self._stand_ins:
                stack.enter_context(mode(stand_in, training=False))
            try:
                for module in modules:
                    vars(module)["forward"] = self._followed(module, module.forward)
                yield
            finally:
                for module, forward in before.items():
                    if forward is None:
                        vars(module).pop("forward", None)
                    else:
                        vars(module)["forward"] = forward

    def _followed(self, module: nn.Module, forward: _Forward) -> _Forward:
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

    def _run(self, batch: Tensor, follower: _Follower | None = None) -> Tensor:
        self._follower = follower
        try:
            return _logits(self._model, batch)
        finally:
            self._follower = None

    def _remember(self, batch: Tensor) -> Tensor:
        """The dense logits of a batch; fills the memory if it can be replayed."""
        self._to_record = False
        if self._can_replay and self._steps is None:
            self._steps = self._scouted(batch[:_SCOUTED])
        self._watching = True
        try:
            logits = self._recorded(batch, self._target)
        finally:
            self._watching = False
        if self._can_replay and self._memory is None:
            # Not what the two samples, or the batch before, had promised.
            self._steps = self._scouted(batch)
            self._recorded(batch, self._target)
            self._can_replay = self._memory is not None
        return logits

    def _scouted(self, batch: Tensor) -> list[_Step] | None:
        """What to do at every call before the layer's first one; None if it is never called."""
        scout = _Scout(self._target)
        try:
            with scout.counter:
                self._run(batch, scout)
        except UnsupportedError:
            return None
        return [*_plan(scout.calls), _Step(self._target, _Action.RUN)] if scout.done else None

    def _recorded(self, batch: Tensor, stand_in: nn.Module) -> Tensor:
        """The logits of a full pass; fills the memory if they came about as the steps say."""
        if self._steps is None or not self._can_replay:
            return self._run(batch)
        recorder = _Recorder(self._steps, self._target, stand_in)
        with recorder.counter:
            logits = self._run(batch, recorder)
        if recorder.done and recorder.fits and all(held.intact for held in recorder.memory):
            self._memory = recorder.memory
        return logits

    def _all(self, batch: Tensor) -> dict[int, Tensor]:
        """For each stand-in the predicted classes, by its place; notes those that fail."""
        found = {}
        for place, stand_in in enumerate(self._stand_ins):
            if place in self._failures:
                continue
            if self._can_replay and self._steps is None:
                self._remember(batch)
            with self._replaced(stand_in):
                logits: Tensor | str | None = self._replay(batch, stand_in)
                if logits is None:
                    # Freed first, as memory may be what was missing.
                    self._memory = None
                    logits = self._full(batch, stand_in)
            if isinstance(logits, str):
                self._failures[place] = logits
            else:
                found[place] = _classes(logits)
        return found

    def _replay(self, batch: Tensor, stand_in: nn.Module) -> Tensor | None:
        """The logits by a replay; None where it does not work out."""
        if self._steps is None or self._memory is None:
            return None
        player = _Player(self._steps, self._memory, self._target, stand_in)
        logits = self._attempt(lambda: self._run(batch, player))
        if isinstance(logits, str):
            return None
        self._replayed = (stand_in, logits)
        if not all(held.intact for held in self._memory):
            self._memory = None  # this pass has changed what the next one would get
        return logits

    def _full(self, batch: Tensor, stand_in: nn.Module) -> Tensor | str:
        """The logits by a full pass, which is remembered where none of this batch is yet."""
        if not self._to_record:
            return self._attempt(lambda: self._run(batch))
        logits = self._attempt(lambda: self._recorded(batch, stand_in))
        if not isinstance(logits, str):
            self._to_record = False
            if self._memory is None:
                self._steps = None  # the next stand-in begins anew
        return logits

    def _confirmed(self, batch: Tensor, stand_in: nn.Module, logits: Tensor) -> bool:
        """Whether a full pass agrees with a replay."""
        with self._replaced(stand_in):
            full = self._attempt(lambda: self._run(batch))
        return not isinstance(full, str) and not _differ(full, logits, _REPLAYED)

    def _attempt(self, work: Callable[[], Tensor]) -> Tensor | str:
        try:
            return work()
        except Exception as error:  # a model may fail in any way with a layer replaced
            return reason_of(error.__cause__ or error)

    @contextmanager
    def _replaced(self, stand_in: nn.Module) -> Iterator[None]:
        replace_layer(self._model, self._layer, stand_in)
        try:
            yield
        finally:
            replace_layer(self._model, self._layer, self._target)


class _Follower(Protocol):
    """Decides at every call of a module what happens."""

    def call(
        self, module: nn.Module, forward: _Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What the module's forward returns, or something in its place."""


class _Action(Enum):
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


def _counter() -> _Counter:
    return _Counter()  # type: ignore[no-untyped-call]


class _Counter(OperatorMode):
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


@dataclass(frozen=True)
class _Step:
    module: nn.Module
    action: _Action


class _Values:
    """The leaves of nested arguments or outputs, and the versions of the tensors among them."""

    def __init__(self, tree: Any) -> None:
        self.leaves, self.structure = pytree.tree_flatten(tree)
        # Only of these is it known whether they change.
        self.known = all(_is_plain(leaf) for leaf in self.leaves)
        self.versions = [t._version for t in self.tensors] if self.known else []

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the leaves."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    @property
    def intact(self) -> bool:
        """Whether no tensor was changed in place since."""
        return self.known and [t._version for t in self.tensors] == self.versions

    @property
    def storages(self) -> list[int]:
        """Where the tensors are; views of one another are in the same place."""
        return [tensor.untyped_storage().data_ptr() for tensor in self.tensors]

    def same(self, tree: Any) -> bool:
        """Whether a tree has the same objects in the same places."""
        leaves, structure = pytree.tree_flatten(tree)
        return structure == self.structure and all(
            one is other for one, other in zip(leaves, self.leaves, strict=True)
        )

    def copy(self) -> _Values:
        """The same with copies of the tensors."""
        return _Values(self.tree(copied=True))

    def tree(self, copied: bool = False) -> Any:
        """The nested value, in containers of its own."""
        leaves = copies(self.leaves) if copied else self.leaves
        return pytree.tree_unflatten(leaves, self.structure)


@dataclass
class _Call:
    """One call of a module before the layer's first call."""

    module: nn.Module
    forward: _Forward
    begun: int
    ended: int = 0
    calls: list[_Call] = field(default_factory=list)
    returned: _Values | None = None
    changed: _Values | None = None
    aliased: bool = False

    @property
    def action(self) -> _Action:
        """What to do at this call in the pass of a stand-in."""
        if self.returned is None or self.hooked:
            return _Action.RUN
        if self.returned.intact:
            return _Action.HAND_OUT
        # A copy would not share the change with the input that it is a view of.
        return _Action.RUN if self.aliased else _Action.COPY

    def is_advanced_by(self, following: _Call) -> bool:
        """Whether all that happens to what it returned is that the following call changes it."""
        if self.action is not _Action.COPY or following.changed is None or following.hooked:
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


def _plan(calls: Sequence[_Call], is_chain: bool = False) -> Iterator[_Step]:
    actions = [call.action for call in calls]
    for place, (call, following) in enumerate(pairwise(calls)):
        if call.is_advanced_by(following):
            actions[place : place + 2] = [_Action.ADVANCE, _Action.PASS]
    for call, action in zip(calls, _skipping(actions) if is_chain else actions, strict=True):
        yield _Step(call.module, action)
        if action is _Action.RUN:
            yield from _plan(call.calls, call.is_chain)


def _skipping(actions: Sequence[_Action]) -> Sequence[_Action]:
    """The actions of a chain, without handing out what no call of it looks at."""
    found: list[_Action] = []
    wanted = True  # what the last call returns
    for action in reversed(actions):
        if action not in (_Action.RUN, _Action.PASS) and not wanted:
            found.append(_Action.SKIP)
        else:
            found.append(action)
        wanted = action is _Action.RUN or (action is _Action.PASS and wanted)
    return found[::-1]


class _Scout:
    """Writes down the calls before the layer's first one, as a tree."""

    def __init__(self, target: nn.Module) -> None:
        self.counter = _counter()
        self.calls: list[_Call] = []
        self.done = False
        self._target = target
        self._siblings = self.calls

    def call(
        self, module: nn.Module, forward: _Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run it, and see what it does to its inputs."""
        self.done = self.done or module is self._target
        if self.done:
            return forward(*args, **kwargs)
        call, siblings = _Call(module, forward, self.counter.count), self._siblings
        siblings.append(call)
        self._siblings = call.calls
        given = _Values((args, kwargs))
        try:
            output = forward(*args, **kwargs)
        finally:
            self._siblings = siblings
        call.ended = self.counter.count
        if not self.done:
            call.returned = _returned(given, (args, kwargs), output)
            call.changed = _changed(args, kwargs, output)
        if call.returned is not None:
            places = call.returned.storages
            call.aliased = len({*places, *given.storages}) < len(places) + len({*given.storages})
        return output


class _Recorder:
    """Runs everything, and remembers what the steps say."""

    def __init__(self, steps: Sequence[_Step], target: nn.Module, stand_in: nn.Module) -> None:
        self.counter = _counter()
        self.memory: list[_Values] = []
        self.fits = True
        self.done = False
        self._steps = iter(steps)
        self._target, self._stand_in = target, stand_in
        self._inside = False
        self._advanced: tuple[Any, int] | None = None

    def call(
        self, module: nn.Module, forward: _Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
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
        if self.done or step.action is _Action.RUN:
            return forward(*args, **kwargs)
        given, begun = _Values((args, kwargs)), self.counter.count
        self._inside = True
        try:
            output = forward(*args, **kwargs)
        finally:
            self._inside = False
        if step.action is _Action.PASS:
            self._keep_changed(_changed(args, kwargs, output), begun)
            self._advanced = None
        else:
            self._keep(_returned(given, (args, kwargs), output), step.action)
            if step.action is _Action.ADVANCE:
                self._advanced = output, self.counter.count
        return output

    def _keep(self, returned: _Values | None, action: _Action) -> None:
        if returned is None:
            self._misfit()
        elif self.fits and action not in (_Action.SKIP, _Action.ADVANCE):
            self.memory.append(returned.copy() if action is _Action.COPY else returned)

    def _keep_changed(self, changed: _Values | None, begun: int) -> None:
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


class _Player:
    """Hands out what is remembered, and runs the rest."""

    def __init__(
        self,
        steps: Sequence[_Step],
        memory: Sequence[_Values],
        target: nn.Module,
        stand_in: nn.Module,
    ) -> None:
        self.done = False
        self._steps, self._memory = iter(steps), iter(memory)
        self._target, self._stand_in = target, stand_in
        # What the next call, which would change it, is to be given; None in a chain that skips it.
        self._advanced: Any = None

    def call(
        self, module: nn.Module, forward: _Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What the step says, up to the layer's first call."""
        if self.done:
            return forward(*args, **kwargs)
        step = next(self._steps)
        if step.module is not (self._target if module is self._stand_in else module):
            raise RuntimeError("the model calls its modules in another order than before")
        self.done = step.module is self._target
        if step.action is _Action.RUN:
            return forward(*args, **kwargs)
        if step.action is _Action.SKIP:
            return None
        if step.action is _Action.PASS:
            if len(args) != 1 or kwargs or args[0] is not self._advanced:
                raise RuntimeError("the model changes something else in place than before")
            self._advanced = None
            return args[0]
        found = next(self._memory).tree(copied=step.action is _Action.COPY)
        if step.action is _Action.ADVANCE:
            self._advanced = found
        return found


def _returned(given: _Values, inputs: Any, output: Any) -> _Values | None:
    """What may be returned in place of a call; None if it does more than return something new."""
    if not (given.intact and given.same(inputs)):
        return None
    returned = _Values(output)
    return returned if returned.known and returned.tensors else None


def _changed(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> _Values | None:
    """What a call returned if that is its only input, which it may have changed in place."""
    if len(args) != 1 or kwargs or output is not args[0]:
        return None
    changed = _Values(output)
    return changed if changed.known and changed.tensors else None


def _is_plain(leaf: Any) -> bool:
    """Whether all that can change about a value is a tensor's content, and that is counted."""
    if isinstance(leaf, Tensor):
        ordinary = type(leaf) in (Tensor, nn.Parameter) and leaf.layout == torch.strided
        return ordinary and not leaf.is_nested and not leaf.is_inference()
    return isinstance(leaf, _PLAIN)


def _logits(model: nn.Module, batch: Tensor) -> Tensor:
    try:
        output = model(*copies([batch]))
    except (MemoryError, torch.OutOfMemoryError, TdkitError):
        raise
    except Exception as error:  # a model may fail in any way
        raise UnsupportedError(
            f"the model does not run on images of shape {tuple(batch.shape[1:])}:"
            f" {first_line(error)}"
        ) from error
    for tensor in _tensors(output):
        if tensor.ndim == 2 and len(tensor) == len(batch) and tensor.is_floating_point():
            return tensor
    raise UnsupportedError(
        f"the model gives no output of shape ({len(batch)}, classes) for {len(batch)} images"
    )


def _tensors(output: Any) -> Iterator[Tensor]:
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            yield from _tensors([getattr(leaf, each.name) for each in fields(leaf)])


def _classes(logits: Tensor) -> Tensor:
    return torch.where(logits.isnan().any(1), -1, logits.argmax(1))


def _joined(found: Sequence[Tensor]) -> Tensor:
    if not found:
        raise UsageError("there are no images to measure on")
    return torch.cat(list(found))


def _refuse_random(first: Tensor, second: Tensor) -> None:
    if _differ(first, second, _DETERMINISTIC):
        raise UnsupportedError(
            "the model cannot be measured, as it is not deterministic in eval mode: the same"
            " images give different outputs",
            "does it draw random numbers, or keep something from one pass to the next?",
        )


def _differ(first: Tensor, second: Tensor, power: float) -> bool:
    """Whether logits differ by more than a power of their precision, relative to the largest."""
    if first.shape != second.shape:
        return True
    tolerance = torch.finfo(first.dtype).eps ** power
    wide = first.double()
    scale = float(wide.nan_to_num(0, 0, 0).abs().max())
    return not torch.allclose(wide, second.double(), 0, tolerance * scale, equal_nan=True)
