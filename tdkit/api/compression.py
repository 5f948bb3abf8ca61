"""What ``compress`` and ``apply`` share: the record that they return, and how they end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from tdkit.api.files import Destination, write
from tdkit.api.subject import Subject
from tdkit.compression.applying import Compressed, larger_than_dense
from tdkit.compression.calibrating import Step, in_tenths
from tdkit.compression.distillation import DISTILLATION, Distillation, Length, Taught
from tdkit.compression.plan import Plan
from tdkit.compression.report import Report, measure, near_chance
from tdkit.defaults import DISTILL, PATIENCE, SAMPLES
from tdkit.errors import UnsupportedError, UsageError, noted, option
from tdkit.files import check_writable
from tdkit.layers.inventory import Layer
from tdkit.layers.stages import Stage
from tdkit.layers.traced import TracedModel
from tdkit.layers.weights import ModuleWeights
from tdkit.opening import Opened
from tdkit.progress import Progress
from tdkit.tables import Table, number, percent, sizes
from tdkit.training.finetuning import Finetuning, Tuned
from tdkit.training.settings import FinetuneSettings

_CALIBRATED = {
    "data": "BatchNorm is calibrated on training images",
    "noise": "BatchNorm is calibrated on noise",
    "synthetic": "BatchNorm is calibrated on images synthesised from its statistics",
    "none": "no BatchNorm is calibrated",
}


_OF_THE_PLAN = (
    *("budget", "cost", "bounds", "metric", "penalty", "planner", "effort", "fold", "seed"),
)


@dataclass(frozen=True, eq=False)
class Compression:
    """A compressed model, and everything that is known about how it came about.

    Attributes:
        model: The compressed model, of ordinary torch layers.
        plan: The moves that it carries.
        report: Totals before and after.
        put_back: Why a layer that was to be replaced is dense after all, by name.
        notes: What the user should know.
        layers: All layers of the dense model.
        structure: The stages that stand in for each replaced layer, by name.
        errors: The relative error of each replaced layer's weight, by name.
        verified: Whether a forward pass has compared it with its dense reconstruction.
        calibration: What the compressed layers are fitted to.
        steps: What was fitted to data, one after the other, and what each made of the outputs.
        distilled: How it was distilled; None where it was not.
        compared: How many plans were built, of which this one leaves the least divergence.
        uncalibrated: Why it is not, where the plan asks for it.
        seconds: How long it took.
        written: The file that it was written to, where one was asked for.
        opened: What is known of the model that it was made from, which it does not keep.
        training: What is known about the training of the model.
    """

    model: nn.Module
    plan: Plan
    report: Report
    put_back: Mapping[str, str]
    notes: tuple[str, ...]
    layers: tuple[Layer, ...]
    structure: Mapping[str, tuple[Stage, ...]]
    errors: Mapping[str, float]
    verified: bool
    calibration: str
    steps: tuple[Step, ...]
    distilled: Taught | None
    compared: int
    uncalibrated: str | None
    seconds: float
    written: Destination | None
    opened: Opened
    training: Mapping[str, Any] | None

    def save(self, path: str | Path, *, format: str | None = None, force: bool = False) -> Path:
        """Write the model, and its plan beside it, for any machine to load.

        Args:
            path: Where to; the plan goes to ``{path}.plan.json``.
            format: ``module``, ``state-dict``, ``safetensors``, ``onnx`` or ``pt2``; by the
                suffix, else as the input was, if None.
            force: Replace existing files.

        Returns:
            The model's path.

        Raises:
            UsageError: If the format is unknown or needs the shape of the input.
            UnsupportedError: If the model cannot be written so.
            StorageError: If the files cannot be written.
        """
        destination = Destination.of(self.opened, Path(path), "", format, force, ())
        write(self, destination)
        return destination.path

    def __str__(self) -> str:
        """What ``tdkit compress`` prints."""
        parts = [str(self.moves())] if self.plan.moves else []
        parts.append(str(self.report))
        if self.plan.moves:
            parts.append(self._fitted())
        return "\n\n".join(parts)

    def _repr_html_(self) -> str:
        moves = self.moves()._repr_html_() if self.plan.moves else ""
        return moves + self.report._repr_html_()

    def moves(self) -> Table:
        """A row for each replaced layer: parameters before and after, and the relative error."""
        dense = {layer.name: layer.parameters for layer in self.layers}
        numbers = ("parameters", "after", "kept", "error")
        rows = []
        for move in self.plan.moves:
            before = dense[move.layer]
            after = sum(stage.parameters for stage in self.structure[move.layer])
            counts = (number(before), number(after), percent(after, before))
            error = f"{self.errors[move.layer]:.4f}"
            rows.append((move.layer, move.method, sizes(move.rank), *counts, error))
        return Table(("layer", "method", "rank", *numbers), tuple(rows), frozenset(numbers))

    @property
    def remark(self) -> str | None:
        """What the layers are fitted to; None where nothing was replaced."""
        return self._fitted() if self.plan.moves else None

    def _fitted(self) -> str:
        fits = [step for step in self.steps if step.name != DISTILLATION]
        told = self._refitted(fits[0], fits[-1]) if len(fits) > 1 else _CALIBRATED[self.calibration]
        return told if self.distilled is None else f"{told}\n{self.distilled.line()}"

    def _refitted(self, first: Step, last: Step) -> str:
        what = "made" if self.calibration == "synthetic" else "unlabelled"
        best = f", the best of {self.compared} plans" if self.compared > 1 else ""
        return (
            f"the factors are fitted to {what} inputs{best}: on those held back the outputs"
            f" differ by {last.divergence:.2g} where {first.name} alone left {first.divergence:.2g}"
        )

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values: the one object that ``tdkit compress --json`` prints."""
        plan = self.plan.to_json()
        moves = [{**m, "relative_error": self.errors[m["layer"]]} for m in plan["moves"]]
        file = self.written
        return {
            **{key: plan[key] for key in _OF_THE_PLAN},
            **self.report.to_json(),
            "verified": self.verified,
            "calibration": self.calibration,
            "steps": [{"name": s.name, "divergence": s.divergence} for s in self.steps],
            "distillation": None if self.distilled is None else self.distilled.summary(),
            "compared": self.compared,
            "uncalibrated": self.uncalibrated,
            "put_back": dict(self.put_back),
            "seconds": round(self.seconds, 3),
            "output": None if file is None else str(file.path),
            "output_bytes": None if file is None else file.path.stat().st_size,
            "plan": None if file is None else str(file.plan),
            "settings": plan["settings"],
            "versions": plan["versions"],
            "moves": moves,
        }


@dataclass(frozen=True)
class Ending:
    """What is to be done with a compressed model; see :func:`tdkit.compress`."""

    finetune: int | None
    learning_rate: float | None
    resume: str | Path | None
    output: str | Path | None
    format: str | None
    force: bool
    measure: bool
    batch_size: int
    dry_run: bool = False
    distill: Length | None = None
    samples: int = SAMPLES
    usual: bool = False
    notes: tuple[str, ...] = ()

    def under(self, effort: str, how: str, inplace: bool) -> Ending:
        """The same with what an effort means where nobody says how long to distil.

        Args:
            effort: Of the plan.
            how: What the compressed layers are fitted to.
            inplace: Whether the dense model is given up.

        Raises:
            UsageError: If it is, and somebody says so.
        """
        usual = self.distill is None and effort == "best" and how == "data"
        asked = Length.read(DISTILL) if usual else self.distill
        if asked is None or asked.is_nothing:
            return replace(self, distill=None)
        if not inplace:
            return replace(self, distill=asked, usual=usual)
        why = f"the dense model is no longer there with {option('inplace', True)}"
        if not usual:
            raise UsageError(f"nothing can be distilled: {why}", "leave one of them out")
        return replace(self, notes=(f"not distilled: {why}",))

    def check(self, subject: Subject, default: str, inputs: Sequence[Any], seed: int) -> Ready:
        """Refuse, before any work, what could not be done at the end.

        Args:
            subject: The model and its data.
            default: The name of the output without its suffix, where it has none.
            inputs: Files that are never overwritten, and whatever else was handed in.
            seed: Of the distillation and the fine-tuning.

        Raises:
            UsageError: If an option is wrong, or the data do not fit the model.
            StorageError: If an output could not be written.
        """
        files = [value for value in inputs if isinstance(value, str | Path)]
        settings = self._settings()
        subject.check_test()
        destination = None
        if self.output is not None:
            path = Path(self.output)
            destination = Destination.of(
                subject.opened, path, default, self.format, self.force, files
            )
            destination.check()
        elif self.format is not None:
            Destination.of(subject.opened, None, default, self.format, self.force, files)
        tuning = None
        if settings is not None:
            resume = None if self.resume is None else Path(self.resume)
            tuning = Finetuning.of(
                subject.model,
                subject.opened.loaded.training,
                subject.dataset,
                settings,
                seed % 2**63,
                resume,
                files,
            )
        return Ready(self, destination, tuning, self._distillation(subject, seed, files))

    def _distillation(
        self, subject: Subject, seed: int, inputs: Sequence[str | Path]
    ) -> Distillation | None:
        if self.distill is None:
            return None
        resume = None if self.resume is None else Path(self.resume)
        if resume is not None and self.finetune is not None:
            resume = resume.with_name(f"{resume.name}.distill")
        return ready_to_distill(subject, self.distill, None, seed, resume, inputs)

    def _settings(self) -> FinetuneSettings | None:
        if self.finetune is not None:
            return FinetuneSettings(self.finetune, self.learning_rate, patience=PATIENCE)
        kept = self.resume if self.distill is None else None
        for key, value in (("learning_rate", self.learning_rate), ("resume", kept)):
            if value is not None:
                raise UsageError(
                    f"{option(key)} belongs to fine-tuning",
                    f"ask for it with {option('finetune', 1)}",
                )
        return None


@dataclass(frozen=True)
class Ready:
    """An ending that can be done: what it needs is there."""

    ending: Ending
    destination: Destination | None
    tuning: Finetuning | None
    distillation: Distillation | None = None

    @property
    def trains(self) -> bool:
        """Whether all parameters change."""
        return self.tuning is not None or self.distillation is not None


def length_of(value: int | str | None) -> Length | None:
    """How long to distil; None where nobody says.

    Raises:
        UsageError: If it is neither a number of epochs nor a time.
    """
    return None if value is None else Length.read(value)


def ready_to_distill(
    subject: Subject,
    length: Length,
    learning_rate: float | None,
    seed: int,
    resume: Path | None,
    inputs: Sequence[str | Path],
) -> Distillation:
    """Refuse, before any work, a distillation that could not be done or kept.

    Args:
        subject: The dense model and its data.
        length: How long.
        learning_rate: The highest; None is found from what it starts with.
        seed: Of the order and the versions of the inputs.
        resume: The file to keep the state in.
        inputs: Files that are never overwritten.

    Raises:
        UsageError: If there are no inputs, or the learning rate is out of range.
        StorageError: If the state could not be kept.
    """
    if not subject.batches and (subject.dataset is None or subject.dataset.train is None):
        raise UsageError(
            "distillation needs inputs, without labels",
            f"name some with {option('data', 'image-folder:PATH')} and PATH/train",
        )
    if learning_rate is not None and not 0 < learning_rate < math.inf:
        raise UsageError(f"learning_rate must be a number above 0, not {learning_rate}")
    if resume is not None:
        check_writable(resume, force=True, inputs=inputs)
    return Distillation(length, learning_rate, seed % 2**63, resume)


def finish(
    subject: Subject,
    traced: TracedModel,
    result: Compressed,
    ready: Ready,
    bytes_before: int,
    start: float,
    progress: Progress,
    say: Callable[[str], None],
    note: Callable[[str], None] | None,
) -> Compression:
    """Distil and fine-tune a compressed model if asked to, write it, and measure it.

    It is written first: whatever fails afterwards, a second Ctrl-C say, loses a table.

    Args:
        subject: The dense model and its data.
        traced: What was compressed.
        result: Its compression.
        ready: What is to be done with it.
        bytes_before: Of the dense model's state_dict.
        start: When the job started, in seconds.
        progress: Called with the progress.
        say: Called with each line of a distillation or a fine-tuning.
        note: Called beforehand with what the user should know of it; it is in the notes if None.
    """
    ending, tuned, notes = ready.ending, None, list(_notes(subject, traced, result))
    notes += ending.notes
    destination = None if ending.dry_run else ready.destination
    distilled = None
    try:
        distilled = _distilled(subject, traced, result, ready, progress, say)
        notes += () if distilled is None else distilled.notes
    except (UsageError, UnsupportedError) as error:
        if not ending.usual:
            raise
        notes.append(f"not distilled: {error}")
    if ready.tuning is not None and not ending.dry_run:
        tuned = ready.tuning.run(result.model, progress, say, note or notes.append)
    compression = Compression(
        model=result.model,
        plan=result.plan,
        report=Report(result.costs, (bytes_before, bytes_before)),
        put_back=result.put_back,
        notes=(),
        layers=result.layers,
        structure=result.structure,
        errors=result.errors,
        verified=result.verified,
        calibration=result.calibrated,
        steps=result.steps if distilled is None else _with(result.steps, distilled),
        distilled=distilled,
        compared=result.compared,
        uncalibrated=result.uncalibrated,
        seconds=0.0,
        written=destination,
        opened=subject.opened.of(result.model),
        training=_training(subject, tuned, distilled),
    )
    if destination is not None:
        write(compression, destination)
    with _told_where(destination):
        report, doubts = _measured(
            subject, traced, compression, bytes_before, ending, progress, tuned
        )
    return replace(
        compression,
        report=report,
        notes=(*doubts, *notes),
        seconds=time.perf_counter() - start,
    )


def _distilled(
    subject: Subject,
    traced: TracedModel,
    result: Compressed,
    ready: Ready,
    progress: Progress,
    say: Callable[[str], None],
) -> Taught | None:
    """Distil a compressed model in place where that is asked for and something is replaced."""
    dense = _dense(traced)
    if ready.distillation is None or ready.ending.dry_run or not result.plan.moves:
        return None
    assert dense is not None, "the dense model was not kept"
    data = subject.calibration("data", ready.ending.samples)
    return teach(ready.distillation, result.model, dense, traced, data, progress, say)


def teach(
    how: Distillation,
    model: nn.Module,
    dense: nn.Module,
    traced: TracedModel,
    data: Sequence[Any],
    progress: Progress,
    say: Callable[[str], None],
) -> Taught:
    """Distil a model in place.

    Args:
        how: What is to be done.
        model: The compressed model.
        dense: The dense one.
        traced: Tells how they take their inputs.
        data: Batches of them, tensors of any shape.
        progress: Called after every step.
        say: Called with a line now and then.

    Raises:
        UsageError: If no part of the inputs can be held back.
        UnsupportedError: If a model does not run on them or cannot learn.
    """
    batches = in_tenths(traced, [traced.read(batch) for batch in data], how.seed)
    divisible = traced.sample is not None and traced.sample.batch == 1
    return how.run(model, dense, batches, divisible, progress, say)


def _with(steps: tuple[Step, ...], distilled: Taught) -> tuple[Step, ...]:
    """The steps before, of which there may be none, and the distillation."""
    return (*(steps or (Step("the factors", distilled.before),)), distilled.step)


def _training(
    subject: Subject, tuned: Tuned | None, distilled: Taught | None
) -> Mapping[str, Any] | None:
    """What is known about the training of the compressed model."""
    training = subject.opened.loaded.training if tuned is None else tuned.training
    return training if distilled is None else after_distillation(training, distilled)


def after_distillation(training: Mapping[str, Any] | None, done: Taught) -> dict[str, Any]:
    """What is known about the training of a model once it has been distilled.

    With which settings to fine-tune it, the training still says.

    Args:
        training: What was known before.
        done: The distillation.
    """
    summary = done.summary()
    del summary["history"]
    return {**(training or {}), "distillation": summary}


@contextmanager
def _told_where(written: Destination | None) -> Iterator[None]:
    """Note on whatever is raised meanwhile that the model is written all the same."""
    try:
        yield
    except BaseException as stop:
        if written is not None:
            noted(stop, f"the model is written to {written.path} all the same")
        raise


def _measured(
    subject: Subject,
    traced: TracedModel,
    compression: Compression,
    bytes_before: int,
    ending: Ending,
    progress: Progress,
    tuned: Tuned | None,
) -> tuple[Report, list[str]]:
    """The report, and what makes one doubt it."""
    test = None if subject.dataset is None else subject.dataset.test
    dense, inputs = _dense(traced), subject.timed(traced.inputs, ending.batch_size)
    progress("measuring", 0, 0)
    report = measure(
        dense if ending.measure else None,
        compression.model,
        compression.report.costs,
        bytes_before,
        inputs=inputs if ending.measure else None,
        test=test if ending.measure else None,
    )
    progress("measuring", 1, 1)
    if tuned is not None:
        report = replace(report, compressed=tuned.accuracy, finetuning=tuned.summary())
    doubts = [report.untimed] if report.untimed is not None else []
    if subject.dataset is not None and ending.measure:
        if report.accuracy is None and dense is not None:
            doubts.append(f"no accuracy: {subject.dataset.name} has no labelled test images")
        doubt = near_chance(report, len(subject.dataset.classes))
        doubts += [doubt] if doubt is not None else []
    return report, doubts


def _dense(traced: TracedModel) -> nn.Module | None:
    """The dense model, where it is still there."""
    held = traced.weights.model if isinstance(traced.weights, ModuleWeights) else None
    return None if held is traced.model else held


def _notes(subject: Subject, traced: TracedModel, result: Compressed) -> Sequence[str]:
    """What the user should know about the model and its compression."""
    notes = [*subject.opened.notes, *traced.notes]
    notes += [f"{name} was put back: {reason}" for name, reason in result.put_back.items()]
    notes += result.notes
    if not result.plan.moves:
        notes.append("nothing was replaced")
    notes += [f"the plan makes the layer {name} larger" for name in larger_than_dense(result)]
    if not result.verified:
        undone = "verified, calibrated" if result.uncalibrated else "verified"
        shape = option("input_shape", (3, 224, 224))
        notes.append(f"not {undone} or timed: that takes {shape}")
    elif result.uncalibrated is not None:
        notes.append(f"BatchNorm is not calibrated: {result.uncalibrated}")
    return notes
