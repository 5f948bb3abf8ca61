"""``tdkit.finetune``: train a model further."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tdkit import defaults
from tdkit.api.files import Destination, write_model
from tdkit.api.subject import Given, Model, open_subject
from tdkit.errors import UsageError, option
from tdkit.forward.copying import own_copy
from tdkit.progress import Progress, listening
from tdkit.registry import load_registry
from tdkit.tables import Table, number
from tdkit.training.finetuning import Finetuning, Tuned
from tdkit.training.settings import FinetuneSettings


@dataclass(frozen=True, eq=False)
class Finetuned:
    """A model that was fine-tuned.

    Attributes:
        model: The model, with the weights that validated best.
        tuned: How it went.
        accuracy: On the test split before and after; None without labelled test images.
        seed: Of the order and the augmentation of the images.
        seconds: How long it took.
        written: The file that it was written to, where one was asked for.
        notes: What the user should know.
    """

    model: nn.Module
    tuned: Tuned
    accuracy: tuple[float | None, float | None]
    seed: int
    seconds: float
    written: Destination | None
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def table(self) -> Table:
        """Accuracies before and after, as far as they are known."""
        history, best = self.tuned.result.history, self.tuned.result.best
        before, after = history[0].validation_accuracy, best.validation_accuracy
        rows = [(f"accuracy, validation (epoch {best.number} kept)", *_percents(before, after))]
        before_test, after_test = self.accuracy
        if before_test is not None and after_test is not None:
            name = f"accuracy, test ({number(self.tuned.images)} images)"
            rows.append((name, *_percents(before_test, after_test)))
        columns = ("", "before", "after")
        return Table(columns, tuple(rows), frozenset(columns[1:]))

    def lines(self) -> list[str]:
        """What ``tdkit finetune`` prints."""
        return self.tuned.lines(self.accuracy[1])

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            **self.tuned.summary(),
            "seed": self.seed,
            "accuracy_before": self.accuracy[0],
            "accuracy_after": self.accuracy[1],
            "accuracy_images": self.tuned.images,
            "seconds": round(self.seconds, 3),
            "output": None if self.written is None else str(self.written.path),
            "format": None if self.written is None else self.written.format,
        }


def finetune(
    model: Model,
    data: Any,
    *,
    epochs: int = defaults.EPOCHS,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    optimizer: str | None = None,
    patience: int = defaults.PATIENCE,
    autocast: str = defaults.AUTOCAST,
    resume: str | Path | None = None,
    data_root: str | Path | None = None,
    arch: str | None = None,
    weights: str | None = None,
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
    note: Callable[[str], None] | None = None,
) -> Finetuned:
    """Train all layers further, and keep the weights that validate best.

    Goes on at the last learning rate of the training, where that is known.

    Args:
        model: A module, of which a copy is trained; a model file; or a registered name.
        data: Labelled images: a :class:`~tdkit.datasets.base.Dataset`, or ``NAME`` or
            ``NAME:PATH``.
        epochs: Passes over the training images, at most.
        learning_rate: Of all steps; the last one of the training if None.
        batch_size: Images per step; as in the training if None.
        optimizer: ``sgd``, ``adam`` or ``adamw``; as in the training if None.
        patience: Stop after so many epochs that validate no better.
        autocast: Precision of the forward pass: ``none`` (float32) or ``bfloat16``.
        resume: Written after every epoch; where it exists, training goes on from it.
        data_root: Folder to look for data sets in first.
        arch: The architecture of a state_dict; see :func:`tdkit.compress`, as for the next five.
        weights: Weights of a registered model.
        allow_classes: Classes of yours that the file may hold.
        unsafe_load: Run whatever code the file holds.
        input_shape: The shape of one sample.
        device: Where to train.
        seed: Of the order and the augmentation of the images.
        output: Write the model there.
        format: Of that file.
        force: Replace an existing file.
        progress: A callback, or True for a bar.
        say: Called with the line of every epoch.
        note: Called beforehand with what the user should know; it is in ``notes`` if None.

    Raises:
        UsageError: If images or labels are missing, or an option is wrong.
        UnsupportedError: If the model cannot be copied or trained.
        TdkitError: If the training diverges, or of the kind that fits what is wrong with a file.
    """
    start = time.perf_counter()
    settings = FinetuneSettings(
        epochs,
        learning_rate,
        batch_size,
        optimizer,  # type: ignore[arg-type]
        patience,
        autocast,  # type: ignore[arg-type]
    )
    given = Given(
        arch,
        weights,
        allow_classes,
        unsafe_load,
        input_shape,
        None,
        data,
        data_root,
        device,
        seed,
    )
    subject = open_subject(model, load_registry(), given)
    if subject.batches:
        raise UsageError(
            "fine-tuning needs labelled images, and these are model inputs alone",
            f"hand over a data set or name one: {option('data', 'image-folder:PATH')}",
        )
    files = [] if isinstance(model, nn.Module) else [model]
    destination = None
    if output is not None:
        default = f"{subject.opened.name}-finetuned"
        destination = Destination.of(subject.opened, Path(output), default, format, force, files)
        destination.check(with_plan=False)
    known = subject.opened.loaded.training
    place = None if resume is None else Path(resume)
    tuning = Finetuning.of(
        subject.model, known, subject.dataset, settings, seed % 2**63, place, files
    )
    own = subject.model if subject.owned else own_copy(subject.model)
    with listening(progress) as update:
        notes = list(subject.opened.notes)
        tuned = tuning.run(own, update, say, note or notes.append)
        after = tuning.accuracy(own, update)
    if destination is not None:
        plan, training = subject.opened.loaded.plan, tuned.training
        write_model(subject.opened, own, destination, plan=plan, structure={}, training=training)
    return Finetuned(
        model=own,
        tuned=tuned,
        accuracy=(tuned.accuracy, after),
        seed=seed,
        seconds=time.perf_counter() - start,
        written=destination,
        notes=tuple(notes),
    )


def _percents(before: float, after: float) -> tuple[str, str]:
    return f"{100 * before:.2f} %", f"{100 * after:.2f} %"
