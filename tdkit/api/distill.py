"""``tdkit.distill``: a compressed model learns what the dense one makes of inputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdkit import arguments, defaults
from tdkit.api.compression import after_distillation, ready_to_distill, teach
from tdkit.api.files import Destination, write_model
from tdkit.api.subject import Given, Model, Subject, open_subject
from tdkit.compression.distillation import Length, Taught
from tdkit.errors import UsageError, option
from tdkit.forward.copying import own_copy
from tdkit.layers.traced import TracedModel
from tdkit.progress import Progress, listening
from tdkit.registry import load_registry
from tdkit.tables import Table


@dataclass(frozen=True, eq=False)
class Distilled:
    """A model that was distilled.

    Attributes:
        model: The model, with the weights whose outputs were the nearest to the dense ones.
        distilled: How it went.
        seed: Of the order and the versions of the inputs.
        seconds: How long it took.
        written: The file that it was written to, where one was asked for.
        notes: What the user should know.
    """

    model: nn.Module
    distilled: Taught
    seed: int
    seconds: float
    written: Destination | None
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def table(self) -> Table:
        """How far the outputs are from the dense ones, before and after."""
        values = f"{self.distilled.before:.4g}", f"{self.distilled.after:.4g}"
        columns = ("", "before", "after")
        row = ("divergence, inputs held back", *values)
        return Table(columns, (row,), frozenset(columns[1:]))

    def lines(self) -> list[str]:
        """What ``tdkit distill`` prints."""
        return [self.distilled.line()]

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            **self.distilled.summary(),
            "seed": self.seed,
            "elapsed_seconds": round(self.seconds, 3),
            "output": None if self.written is None else str(self.written.path),
            "format": None if self.written is None else self.written.format,
        }


def distill(
    model: Model,
    dense: Model,
    data: Any,
    *,
    distill: int | str = defaults.DISTILL,
    learning_rate: float | None = None,
    samples: int = defaults.SAMPLES,
    example_inputs: Any = None,
    resume: str | Path | None = None,
    data_root: str | Path | None = None,
    arch: str | None = None,
    allow_classes: str | Sequence[str] = (),
    unsafe_load: bool = False,
    input_shape: str | Sequence[int] | None = None,
    device: str | None = None,
    seed: int = defaults.SEED,
    output: str | Path | None = None,
    format: str | None = None,
    force: bool = False,
    progress: Progress | bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Distilled:
    """Let a compressed model learn what the dense one makes of inputs, which take no labels.

    Its weights are never worse than before on the tenth of the inputs that is held back.

    Args:
        model: The compressed model: a module, of which a copy is trained; a file; or a registered
            name.
        dense: The model that it was made from, which stays as it is.
        data: Batches of inputs, or a data set; see :func:`tdkit.compress`.
        distill: For so many epochs, ``20``, or so long, ``"60s"`` or ``"2m"``. With a number of
            epochs the same arguments give the same weights; with a time they do not.
        learning_rate: The highest, which falls to zero by a half cosine; if None, in proportion to
            the relative error of the outputs at the start.
        samples: Images of a data set.
        example_inputs: Arguments of a forward pass, tensors of any shape, nested in any way.
        resume: Written now and then; where it exists, distillation goes on from it.
        data_root: Folder to look for data sets in first.
        arch: The architecture of a state_dict, of both; see :func:`tdkit.compress`, as for the
            next four.
        allow_classes: Classes of yours that the files may hold.
        unsafe_load: Run whatever code the files hold.
        input_shape: The shape of one sample.
        device: Where to train.
        seed: Of the order and the versions of the inputs.
        output: Write the model there.
        format: Of that file.
        force: Replace an existing file.
        progress: A callback, or True for a bar.
        say: Called with a line now and then.

    Raises:
        UsageError: If there are too few inputs, or an option is wrong.
        UnsupportedError: If a model cannot be copied or run, or has nothing to train.
        TdkitError: Of the kind that fits what is wrong with a file.
    """
    start, registry = time.perf_counter(), load_registry()
    length, rounds = Length.read(distill), arguments.seed(seed)
    if length.is_nothing:
        raise UsageError("there is nothing to do", f"write {option('distill', defaults.DISTILL)}")
    example = None if example_inputs is None else arguments.example(example_inputs)
    read = (arch, None, allow_classes, unsafe_load, input_shape, example)
    place = None if resume is None else Path(resume)
    files = [each for each in (model, dense) if isinstance(each, str | Path)]
    taught = open_subject(model, registry, Given(*read, None, None, device, rounds))
    subject = open_subject(dense, registry, Given(*read, data, data_root, device, rounds))
    how = ready_to_distill(subject, length, learning_rate, rounds, place, files)
    destination = None
    if output is not None:
        default = f"{taught.opened.name}-distilled"
        destination = Destination.of(taught.opened, Path(output), default, format, force, files)
        destination.check(with_plan=False)
    traced = TracedModel.of(subject.model, subject.inputs(), readonly=True)
    inputs = subject.calibration("data", samples)
    # Whatever mode the caller is in: learning takes gradients.
    with torch.inference_mode(False), listening(progress) as update:
        own = taught.model if taught.owned else own_copy(taught.model)
        done = teach(how, own, subject.model, traced, inputs, update, say)
    if destination is not None:
        _write(taught, own, done, destination)
    return Distilled(
        model=own,
        distilled=done,
        seed=rounds,
        seconds=time.perf_counter() - start,
        written=destination,
        notes=(*taught.opened.notes, *subject.opened.notes, *done.notes),
    )


def _write(taught: Subject, model: nn.Module, done: Taught, destination: Destination) -> None:
    known = taught.opened.loaded
    training = after_distillation(known.training, done)
    opened = taught.opened
    write_model(opened, model, destination, plan=known.plan, structure={}, training=training)
