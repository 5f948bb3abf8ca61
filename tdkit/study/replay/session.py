"""Measure the stand-ins of one layer, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tdkit.errors import UnsupportedError
from tdkit.forward.trial import mode, trial
from tdkit.layers.inventory import Layer, replace_layer
from tdkit.study.replay.following import Follower, Listener, Watch
from tdkit.study.replay.logits import agree, classes, joined, logits_of, reason_of, refuse_random
from tdkit.study.replay.playing import Player
from tdkit.study.replay.recording import Recorder
from tdkit.study.replay.scouting import Scout, plan
from tdkit.study.replay.steps import Action, Step
from tdkit.study.replay.values import Values

# Two, as a model may treat a batch of one in its own way.
_SCOUTED = 2


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
    return joined(session.kept.dense).cpu(), session.found()


def replaced_predictions(
    model: nn.Module, layer: Layer, stand_ins: Sequence[nn.Module], batches: Iterable[Tensor]
) -> list[Tensor | str]:
    """What :func:`predictions` gives for the stand-ins, where the dense model is of no interest.

    What ran before the layer is then remembered in a stand-in's pass.

    Args:
        model: As for :func:`predictions`, like all others.
        layer: The layer to replace.
        stand_ins: What to put in its place.
        batches: Inputs of the model, (batch, ...).

    Returns:
        For each stand-in the predicted classes, int64 (n,) on the CPU, or why there are none.

    Raises:
        UnsupportedError: If the dense model cannot be measured.
        UsageError: If there are no inputs.
    """
    session = _Session(model, layer, stand_ins)
    with session.following():
        for batch in batches:
            with trial(model):
                session.measure(batch, dense=False)
    return session.found()


@dataclass(frozen=True)
class _Replaced:
    """What is measured: a model with each of some stand-ins in a layer's place.

    Attributes:
        model: The dense model.
        layer: The layer to replace.
        target: Its module.
        stand_ins: What to put in its place.
    """

    model: nn.Module
    layer: Layer
    target: nn.Module
    stand_ins: Sequence[nn.Module]

    @contextmanager
    def by(self, stand_in: nn.Module) -> Iterator[None]:
        """Put a stand-in in the layer's place for a block."""
        replace_layer(self.model, self.layer, stand_in)
        try:
            yield
        finally:
            replace_layer(self.model, self.layer, self.target)


@dataclass
class _Kept:
    """What lives as long as the session.

    Attributes:
        found: The predicted classes of every batch, for each stand-in.
        dense: The same for the dense model, where it was asked for.
        failures: Why a stand-in, by its place, has no more predictions.
        steps: What to do at every call before the layer's first one; None where that is still to
            be found out, or was found not to be known.
        can_replay: Whether replays have not been given up.
        is_first: Whether no batch is done yet.
    """

    found: list[list[Tensor]]
    dense: list[Tensor] = field(default_factory=list)
    failures: dict[int, str] = field(default_factory=dict)
    steps: list[Step] | None = None
    can_replay: bool = True
    is_first: bool = True


@dataclass
class _Batch:
    """What lives as long as the batch at hand.

    Attributes:
        inputs: Of the model, (batch, ...).
        memory: What its full pass has left for replays, if anything.
        to_record: Whether that pass is still to come.
        replayed: The last stand-in that was replayed, and its logits, (batch, classes).
    """

    inputs: Tensor
    memory: list[Values] | None = None
    to_record: bool = True
    replayed: tuple[nn.Module, Tensor] | None = None


class _Session:
    """Measures the stand-ins of one layer batch by batch.

    Attributes:
        kept: What lives from batch to batch. All else that changes is in a :class:`_Batch`.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: Layer,
        stand_ins: Sequence[nn.Module],
        watch: Watch | None = None,
    ) -> None:
        target = model.get_submodule(layer.name)
        self.kept = _Kept([[] for _ in stand_ins])
        self._replaced = _Replaced(model, layer, target, stand_ins)
        self._listener = Listener([*model.modules(), *stand_ins], target, watch)

    @contextmanager
    def following(self) -> Iterator[None]:
        """Hear of every call of the model's and the stand-ins' modules, stand-ins in eval mode."""
        with ExitStack() as stack:
            for stand_in in self._replaced.stand_ins:
                stack.enter_context(mode(stand_in, training=False))
            stack.enter_context(self._listener.listening())
            yield

    def measure(self, inputs: Tensor, dense: bool) -> None:
        """Add the predictions for one batch, (batch, ...)."""
        batch, kept = _Batch(inputs), self.kept
        if kept.is_first or dense:
            logits = self._remember(batch)
            kept.dense.append(classes(logits))
            if kept.is_first:
                refuse_random(logits, self._run(inputs))
        found = self._all(batch)
        if kept.is_first and batch.replayed and not self._confirmed(batch, *batch.replayed):
            kept.can_replay, batch.memory = False, None
            found = self._all(batch)
        kept.is_first = False
        for place, predicted in found.items():
            kept.found[place].append(predicted)

    def found(self) -> list[Tensor | str]:
        """For each stand-in the predictions, int64 (n,) on the CPU, or why there are none."""
        found, failures = self.kept.found, self.kept.failures
        good = [place for place in range(len(found)) if place not in failures]
        # All at once, as each transfer waits for the device.
        together = torch.stack([joined(found[place]) for place in good]).cpu() if good else ()
        return [
            failures[place] if place in failures else together[good.index(place)]
            for place in range(len(found))
        ]

    def _run(self, inputs: Tensor, follower: Follower | None = None) -> Tensor:
        with self._listener.followed(follower):
            return logits_of(self._replaced.model, inputs)

    def _remember(self, batch: _Batch) -> Tensor:
        """The dense logits of a batch; fills its memory if it can be replayed."""
        batch.to_record = False
        kept, target = self.kept, self._replaced.target
        if kept.can_replay and kept.steps is None:
            kept.steps = self._scouted(batch.inputs[:_SCOUTED])
        with self._listener.watched():
            logits = self._recorded(batch, target)
        if kept.can_replay and batch.memory is None:
            # Not what the two samples, or the batch before, had promised.
            kept.steps = self._scouted(batch.inputs)
            self._recorded(batch, target)
            kept.can_replay = batch.memory is not None
        return logits

    def _scouted(self, inputs: Tensor) -> list[Step] | None:
        """What to do at every call before the layer's first one; None if it is never called."""
        target = self._replaced.target
        scout = Scout(target)
        try:
            with scout.counter:
                self._run(inputs, scout)
        except UnsupportedError:
            return None
        return [*plan(scout.calls), Step(target, Action.RUN)] if scout.done else None

    def _recorded(self, batch: _Batch, stand_in: nn.Module) -> Tensor:
        """The logits of a full pass; fills the memory if they came about as the steps say."""
        steps = self.kept.steps
        if steps is None or not self.kept.can_replay:
            return self._run(batch.inputs)
        recorder = Recorder(steps, self._replaced.target, stand_in)
        with recorder.counter:
            logits = self._run(batch.inputs, recorder)
        if recorder.done and recorder.fits and all(held.intact for held in recorder.memory):
            batch.memory = recorder.memory
        return logits

    def _all(self, batch: _Batch) -> dict[int, Tensor]:
        """For each stand-in the predicted classes, by its place; notes those that fail."""
        kept, found = self.kept, {}
        for place, stand_in in enumerate(self._replaced.stand_ins):
            if place in kept.failures:
                continue
            if kept.can_replay and kept.steps is None:
                self._remember(batch)
            with self._replaced.by(stand_in):
                logits: Tensor | str | None = self._replay(batch, stand_in)
                if logits is None:
                    # Freed first, as memory may be what was missing.
                    batch.memory = None
                    logits = self._full(batch, stand_in)
            if isinstance(logits, str):
                kept.failures[place] = logits
            else:
                found[place] = classes(logits)
        return found

    def _replay(self, batch: _Batch, stand_in: nn.Module) -> Tensor | None:
        """The logits by a replay; None where it does not work out."""
        if self.kept.steps is None or batch.memory is None:
            return None
        player = Player(self.kept.steps, batch.memory, self._replaced.target, stand_in)
        logits = _attempt(lambda: self._run(batch.inputs, player))
        if isinstance(logits, str):
            return None
        batch.replayed = (stand_in, logits)
        if not all(held.intact for held in batch.memory):
            batch.memory = None  # this pass has changed what the next one would get
        return logits

    def _full(self, batch: _Batch, stand_in: nn.Module) -> Tensor | str:
        """The logits by a full pass, which is remembered where none of this batch is yet."""
        if not batch.to_record:
            return _attempt(lambda: self._run(batch.inputs))
        logits = _attempt(lambda: self._recorded(batch, stand_in))
        if not isinstance(logits, str):
            batch.to_record = False
            if batch.memory is None:
                self.kept.steps = None  # the next stand-in begins anew
        return logits

    def _confirmed(self, batch: _Batch, stand_in: nn.Module, logits: Tensor) -> bool:
        """Whether a full pass agrees with a replay."""
        with self._replaced.by(stand_in):
            full = _attempt(lambda: self._run(batch.inputs))
        return not isinstance(full, str) and agree(full, logits)


def _attempt(work: Callable[[], Tensor]) -> Tensor | str:
    try:
        return work()
    except Exception as error:  # a model may fail in any way with a layer replaced
        return reason_of(error.__cause__ or error)
