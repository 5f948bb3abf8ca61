"""Fine-tuning a model with what is known about its training: check first, then do, then tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdkit.datasets.base import Dataset
from tdkit.errors import UsageError, option
from tdkit.files import check_writable
from tdkit.forward.placement import device_of
from tdkit.training.loop import (
    Epoch,
    TrainingResult,
    TrainingState,
    evaluate,
    train,
    trainable_splits,
)
from tdkit.training.recipe import FitRecipe
from tdkit.training.resume import Resume
from tdkit.training.settings import FinetuneSettings, after_finetuning, finetune_recipe

Progress = Callable[[str, int, int], None]
"""Called with the epoch, the steps of it that are done, and all its steps."""


@dataclass(frozen=True)
class Tuned:
    """A fine-tuning that was done.

    Attributes:
        recipe: The hyperparameters.
        result: The training.
        accuracy: On the test split before it; None without labelled test images.
        images: How many test images there are.
        training: What is known about the training of the model now.
        notes: What the user should know.
    """

    recipe: FitRecipe
    result: TrainingResult
    accuracy: float | None
    images: int | None
    training: Mapping[str, Any] | None
    notes: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """The fine-tuning as JSON values."""
        before, *epochs = self.result.history
        return {
            "optimizer": self.recipe.optimizer.name,
            "learning_rate": self.recipe.optimizer.learning_rate,
            "batch_size": self.recipe.batch_size,
            "epochs": len(epochs),
            "best_epoch": self.result.best.number,
            "validation_before": before.validation_accuracy,
            "validation_after": self.result.best.validation_accuracy,
            "history": [asdict(epoch) for epoch in epochs],
        }

    def lines(self, after: float | None) -> list[str]:
        """What a person is told at the end.

        Args:
            after: The accuracy on the test split; None without labelled test images.
        """
        best, before = self.result.best, self.result.history[0].validation_accuracy
        lines = []
        if best.number > 0:
            change = f"{100 * before:.2f} % before, {100 * best.validation_accuracy:.2f} % after"
            lines = [f"kept epoch {best.number}: validation {change}"]
        if self.accuracy is not None and after is not None:
            change = f"{100 * self.accuracy:.2f} % before, {100 * after:.2f} % after"
            lines.append(f"accuracy on {self.images:,} test images: {change}")
        return lines


@dataclass(frozen=True)
class Finetuning:
    """A fine-tuning that can be done: what it needs is there.

    Attributes:
        dataset: Labelled images.
        recipe: The hyperparameters.
        reason: Where the learning rate comes from.
        device: Where to train.
        seed: Of the order and the augmentation of the images.
        resume: The file to keep the state in.
        training: What is known about the training of the model.
    """

    dataset: Dataset
    recipe: FitRecipe
    reason: str
    device: torch.device
    seed: int
    resume: Path | None
    training: Mapping[str, Any] | None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        training: Mapping[str, Any] | None,
        dataset: Dataset | None,
        settings: FinetuneSettings,
        seed: int,
        resume: Path | None,
        inputs: Sequence[str | Path],
    ) -> Finetuning:
        """Refuse, before any work, what could not be done or kept.

        Args:
            model: The model to fine-tune, or that this one is made from.
            training: What is known about its training.
            dataset: The images, where there are some.
            settings: What the user says about it.
            seed: Of the order and the augmentation of the images.
            resume: The file to keep the state in.
            inputs: Files that are never overwritten.

        Raises:
            UsageError: If images or labels are missing, or a setting is out of range.
            StorageError: If the state could not be kept.
        """
        if dataset is None:
            raise UsageError(
                "fine-tuning needs labelled images to train on and to validate on",
                f"name some with {option('data', 'image-folder:PATH')} and PATH/train and PATH/val",
            )
        trainable_splits(dataset)
        if resume is not None:
            check_writable(resume, force=True, inputs=inputs)
        recipe, reason = finetune_recipe(training, settings)
        return cls(dataset, recipe, reason, device_of(model), seed, resume, training)

    def run(
        self,
        model: nn.Module,
        progress: Progress,
        say: Callable[[str], None],
        note: Callable[[str], None] = lambda text: None,
    ) -> Tuned:
        """Fine-tune a model in place, on its device.

        Args:
            model: The model.
            progress: Called after every step.
            say: Called with the line of every epoch.
            note: Called beforehand with what the user should know.

        Raises:
            UnsupportedError: If no parameter requires a gradient.
            TdkitError: If the training diverges.
        """
        notes = [f"learning rate {self.recipe.optimizer.learning_rate:g}, {self.reason}"]
        frozen = _frozen(model)
        notes += [frozen] if frozen is not None else []
        for text in notes:
            note(text)
        accuracy = self.accuracy(model, progress)
        result = fit(
            model,
            self.dataset,
            self.recipe,
            device=self.device,
            seed=self.seed,
            resume=self._resume(model),
            keep_better=True,
            progress=progress,
            say=say,
        )
        training: Mapping[str, Any] | None = after_finetuning(self.training, self.recipe)
        if result.best.number == 0:
            kept = "no epoch validates better than the weights before, which are kept"
            note(kept)
            notes.append(kept)
            training = self.training
        images = None if accuracy is None or self.dataset.test is None else len(self.dataset.test)
        return Tuned(self.recipe, result, accuracy, images, training, tuple(notes))

    def accuracy(self, model: nn.Module, progress: Progress) -> float | None:
        """The accuracy on the test split; None without labelled test images."""
        test = self.dataset.test
        if test is None or test.labels is None:
            return None
        progress("measuring", 0, 0)
        found = evaluate(model, test, device=self.device).accuracy
        progress("measuring", 1, 1)
        return found

    def _resume(self, model: nn.Module) -> Resume | None:
        from tdkit.checkpoint import content_hash

        if self.resume is None:
            return None
        made_by = {
            "choice of options": f"{self.recipe!r}, seed {self.seed}",
            "model": content_hash(model),
            "data set": self.dataset.fingerprint,
        }
        return Resume(self.resume, made_by)


def fit(
    model: nn.Module,
    dataset: Dataset,
    recipe: FitRecipe,
    *,
    device: torch.device,
    seed: int,
    resume: Resume | None,
    keep_better: bool = False,
    progress: Progress,
    say: Callable[[str], None],
) -> TrainingResult:
    """Train a model in place with progress, keeping the state where there is a place for it.

    Args:
        model: See :func:`tdkit.training.loop.train`, as for the next three.
        dataset: The images.
        recipe: The hyperparameters.
        device: Where to train.
        seed: Of the order and the augmentation of the images.
        resume: Where the state is kept and looked for.
        keep_better: Whether the weights before are kept where no epoch validates better.
        progress: Called after every step.
        say: Called with the line of an epoch.

    Raises:
        UsageError: If images or labels are missing, or a kept state is of another training.
        UnreadableFileError: If the kept state cannot be read.
        UnsupportedError: If no parameter requires a gradient.
        TdkitError: If the training diverges.
    """

    def step(number: int, done: int, steps: int) -> None:
        progress(f"epoch {number}/{recipe.epochs}", done, steps)
        if done == steps:
            progress(f"epoch {number}/{recipe.epochs}, validating", 0, 0)

    def epoch(line: Epoch, state: TrainingState) -> None:
        if line.number:
            progress(f"epoch {line.number}/{recipe.epochs}, validating", 1, 1)
        seconds = [each["seconds"] for each in state["history"] if each["number"]]
        say(epoch_line(line, recipe.epochs, seconds))
        if resume is not None:
            resume.write(state)

    return train(
        model,
        dataset,
        recipe,
        device=device,
        generator=torch.Generator().manual_seed(seed),
        keep_better=keep_better,
        on_step=step,
        on_epoch=epoch,
        state=None if resume is None else resume.read(),
    )


def epoch_line(epoch: Epoch, epochs: int, seconds: Sequence[float]) -> str:
    """What a person is told after an epoch.

    Args:
        epoch: The one that is done.
        epochs: How many there are at most.
        seconds: What each took so far.
    """
    validation = f"validation {100 * epoch.validation_accuracy:.2f} %"
    if epoch.loss is None:
        return f"{'before':{len(str(epochs)) + 25}}{validation}"
    left = (epochs - epoch.number) * sum(seconds) / len(seconds)
    return (
        f"epoch {epoch.number:3}/{epochs}  loss {epoch.loss:.4f}  {validation}  "
        f"{epoch.seconds:.0f} s, {left / 60:.0f} min left"
    )


def _frozen(model: nn.Module) -> str | None:
    parameters = dict(model.named_parameters())
    frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
    if not frozen:
        return None
    names = ", ".join(frozen[:3]) + (", …" if len(frozen) > 3 else "")
    count = f"{len(frozen)} of {len(parameters)} parameters"
    return f"{count} require no gradient and stay as they are: {names}"
