"""Trainings as a person sees them: a line per epoch, a bar within it, going on after a stop.

``train``, ``finetune`` and, after compressing, ``compress`` and ``apply`` share it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdkit.cli.stopping import StoppedError
from tdkit.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from tdkit.cli.common import Opened
    from tdkit.datasets.base import Dataset
    from tdkit.training.loop import Epoch, TrainingResult, TrainingState
    from tdkit.training.recipe import FitRecipe
    from tdkit.training.settings import FinetuneSettings
from tdkit.training.resume import Resume

PATIENCE = 5
"""Epochs without a better validation accuracy after which a fine-tuning stops by default."""


def fit(
    model: nn.Module,
    dataset: Dataset,
    recipe: FitRecipe,
    *,
    device: torch.device,
    seed: int,
    resume: Resume | None,
    keep_better: bool = False,
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
        say: Prints the line of an epoch.
    """
    import torch

    from tdkit.training.loop import train

    state = None if resume is None else resume.read()
    with ExitStack() as bars:
        progress = _Progress(recipe, resume, say, bars)
        try:
            return train(
                model,
                dataset,
                recipe,
                device=device,
                generator=torch.Generator().manual_seed(seed),
                keep_better=keep_better,
                on_step=progress.step,
                on_epoch=progress.epoch,
                state=state,
            )
        except StoppedError as stop:
            if resume is None:
                stop.said += "; with --resume FILE a training can go on after a stop"
            elif resume.path.exists():
                stop.said = f"the same command goes on after the last epoch, from {resume.path}"
            raise


class _Progress:
    """Shows how far a training is."""

    def __init__(
        self,
        recipe: FitRecipe,
        resume: Resume | None,
        say: Callable[[str], None],
        bars: ExitStack,
    ) -> None:
        self.epochs, self.resume, self.say, self.bars = recipe.epochs, resume, say, bars
        self.update: Callable[[int, int], None] | None = None

    def step(self, number: int, done: int, steps: int) -> None:
        from tdkit.cli.display import progress_bar

        if self.update is None:
            title = f"epoch {number}/{self.epochs}"
            self.update = self.bars.enter_context(progress_bar(title, then=f"{title}, validating"))
        self.update(done, steps)

    def epoch(self, epoch: Epoch, state: TrainingState) -> None:
        # The bar goes before the line comes: they may share a terminal.
        self.bars.close()
        self.update = None
        seconds = [line["seconds"] for line in state["history"] if line["number"]]
        self.say(_line(epoch, self.epochs, seconds))
        if self.resume is not None:
            self.resume.write(state)


def _line(epoch: Epoch, epochs: int, seconds: Sequence[float]) -> str:
    validation = f"validation {100 * epoch.validation_accuracy:.2f} %"
    if epoch.loss is None:
        return f"{'before':{len(str(epochs)) + 25}}{validation}"
    left = (epochs - epoch.number) * sum(seconds) / len(seconds)
    return (
        f"epoch {epoch.number:3}/{epochs}  loss {epoch.loss:.4f}  {validation}  "
        f"{epoch.seconds:.0f} s, {left / 60:.0f} min left"
    )


@dataclass(frozen=True)
class Tuned:
    """A fine-tuning that was done.

    Attributes:
        recipe: The hyperparameters.
        result: The training.
        accuracy: On the test split before it; None without labelled test images.
        images: How many test images there are.
        training: What is known about the training of the model now.
    """

    recipe: FitRecipe
    result: TrainingResult
    accuracy: float | None
    images: int | None
    training: Mapping[str, Any] | None

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
        opened: Opened,
        dataset: Dataset | None,
        wishes: FinetuneSettings,
        seed: int,
        resume: Path | None,
        inputs: Sequence[str | Path],
    ) -> Finetuning:
        """Refuse, before any work, what could not be done or kept.

        Args:
            opened: The model to fine-tune, or that this one is made from.
            dataset: The images, where a data set was named.
            wishes: What the user says about it.
            seed: Of the order and the augmentation of the images.
            resume: The file to keep the state in.
            inputs: Files that are never overwritten.
        """
        import torch

        from tdkit.training.loop import trainable_splits
        from tdkit.training.settings import finetune_recipe

        if dataset is None:
            raise UsageError(
                "fine-tuning needs labelled images to train on and to validate on",
                "name some with --data, such as image-folder:PATH with PATH/train and PATH/val",
            )
        trainable_splits(dataset)
        if resume is not None:
            check_place(resume, inputs)
        recipe, reason = finetune_recipe(opened.loaded.training, wishes)
        device = next((each.device for each in opened.model.parameters()), torch.device("cpu"))
        return cls(dataset, recipe, reason, device, seed, resume, opened.loaded.training)

    def run(self, model: nn.Module, *, quiet: bool) -> Tuned:
        """Fine-tune a model in place, on its device.

        Args:
            model: The model.
            quiet: Whether stdout is for JSON, so that progress goes to stderr.
        """
        from tdkit.cli.display import note, remark, say
        from tdkit.training.settings import after_finetuning

        training: Mapping[str, Any] | None
        note(f"learning rate {self.recipe.optimizer.learning_rate:g}, {self.reason}")
        _tell_frozen(model)
        accuracy = self.accuracy(model)
        result = fit(
            model,
            self.dataset,
            self.recipe,
            device=self.device,
            seed=self.seed,
            resume=self._resume(model),
            keep_better=True,
            say=remark if quiet else say,
        )
        training = after_finetuning(self.training, self.recipe)
        if result.best.number == 0:
            note("no epoch validates better than the weights before, which are kept")
            training = self.training
        images = None if accuracy is None or self.dataset.test is None else len(self.dataset.test)
        return Tuned(self.recipe, result, accuracy, images, training)

    def accuracy(self, model: nn.Module) -> float | None:
        """The accuracy on the test split; None without labelled test images."""
        from tdkit.cli.display import waiting
        from tdkit.training.loop import evaluate

        test = self.dataset.test
        if test is None or test.labels is None:
            return None
        with waiting("measuring"):
            return evaluate(model, test, device=self.device).accuracy

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


def _tell_frozen(model: nn.Module) -> None:
    from tdkit.cli.display import note

    parameters = dict(model.named_parameters())
    frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
    if frozen:
        names = ", ".join(frozen[:3]) + (", …" if len(frozen) > 3 else "")
        count = f"{len(frozen)} of {len(parameters)} parameters"
        note(f"{count} require no gradient and stay as they are: {names}")


def asked_for(
    epochs: int | None, learning_rate: float | None, resume: Path | None
) -> FinetuneSettings | None:
    """What the options of ``compress`` and ``apply`` say about a fine-tuning; None for no such."""
    from tdkit.training.settings import FinetuneSettings

    if epochs is not None:
        return FinetuneSettings(epochs, learning_rate, patience=PATIENCE)
    for option, value in (("--learning-rate", learning_rate), ("--resume", resume)):
        if value is not None:
            raise UsageError(
                f"{option} belongs to fine-tuning", "ask for it with --finetune EPOCHS"
            )
    return None


def check_place(resume: Path, inputs: Sequence[str | Path]) -> None:
    """Refuse early a place where the state could not be kept after the first epoch."""
    from tdkit.checkpoint import check_writable

    check_writable(resume, force=True, inputs=inputs)
