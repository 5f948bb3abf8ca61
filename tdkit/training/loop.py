"""Training from scratch, fine-tuning and measuring: one loop for all of them."""

from __future__ import annotations

import copy
import math
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn

from tdkit.errors import TdkitError, UnsupportedError, UsageError
from tdkit.forward.trial import mode, trial

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tdkit.datasets.base import Dataset, Split
    from tdkit.hookspecs import ModelRecord
    from tdkit.training.recipe import FitRecipe, OptimizerRecipe, ScheduleRecipe

Device = torch.device | str

# The one-cycle schedule starts at this share of the highest learning rate and ends near zero.
_START = 1 / 25
_END = _START / 1e4

# What stands in for the last learning rate of a schedule that ends near zero.
NEAR_ZERO_SHARE = 1 / 100

_NEEDED = "Name a data set with labelled images to train on and to validate on."

HALVES = (torch.float16, torch.bfloat16)
"""What small steps would be lost in to rounding."""


@dataclass(frozen=True)
class Evaluation:
    """What a model does on a split.

    Args:
        accuracy: Share of correct images, from 0 to 1.
        correct: Which images are classified correctly, bool of shape (n,), in the split's order.
        loss: Mean cross-entropy, in nats.
    """

    accuracy: float
    correct: Tensor
    loss: float


@dataclass(frozen=True)
class Epoch:
    """One line of a training's history.

    Args:
        number: Counts from 1; 0 stands for the weights before the training.
        loss: Mean loss over the training images, with label smoothing; None for number 0.
        validation_loss: Mean cross-entropy on the validation split, in nats.
        validation_accuracy: Share of correct validation images.
        seconds: Wall time of the epoch, validation included.
    """

    number: int
    loss: float | None
    validation_loss: float
    validation_accuracy: float
    seconds: float


class TrainingState(TypedDict):
    """All that a training needs to go on after an interruption.

    Tensors and plain values only, so that ``torch.load(..., weights_only=True)`` reads it.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    generator: Tensor
    history: list[dict[str, Any]]
    best: dict[str, Tensor]


@dataclass(frozen=True)
class TrainingResult:
    """What :func:`train` returns.

    Args:
        weights: The state_dict of the epoch with the best validation accuracy, on the CPU.
        history: One record per epoch.
    """

    weights: dict[str, Tensor]
    history: tuple[Epoch, ...]

    @property
    def best(self) -> Epoch:
        """The epoch whose weights are kept."""
        return _best(self.history)


def evaluate(
    model: nn.Module,
    split: Split,
    *,
    device: Device = "cpu",
    batch_size: int = 500,
    dtype: torch.dtype | None = None,
    limit: int | None = None,
) -> Evaluation:
    """Measure a model in evaluation mode; its own modes are as before afterwards.

    Args:
        model: Maps (batch, channels, height, width) to logits (batch, classes).
        split: Labelled images.
        device: Where the model is.
        batch_size: Images per batch; changes speed and memory, not the result.
        dtype: Of the images; by default that of the model's first parameter.
        limit: Measure at most this many, evenly spaced images.

    Raises:
        UsageError: There are no images, they have no labels, or the model cannot take them.
    """
    if split.labels is None:
        raise UsageError("accuracy needs labels, and these images have none")
    if len(split) == 0:
        raise UsageError("accuracy needs images, and the split is empty")
    dtype = dtype or _dtype(model)
    correct: list[Tensor] = []
    loss = 0.0
    with mode(model, training=False), torch.inference_mode():
        for images, labels in split.batches(batch_size, limit=limit):
            logits = _logits(model, images.to(device, dtype)).to("cpu", torch.float64)
            _check_classes(logits, labels)
            correct.append(logits.argmax(1) == labels)
            loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
    flags = torch.cat(correct)
    return Evaluation(float(flags.double().mean()), flags, loss / len(flags))


def check_fit(
    model: nn.Module, split: Split, classes: int, device: torch.device | str = "cpu"
) -> None:
    """Refuse, before any work, images that a model cannot be measured on; looks at one batch.

    Args:
        model: The model.
        split: Labelled images.
        classes: How many classes the data set has.
        device: Where the model is.

    Raises:
        UsageError: If the model cannot take the images, or has fewer scores than classes.
    """
    with trial(model):
        for images, _ in split.batches(2, limit=2):
            logits = _logits(model, images.to(device, _dtype(model)))
            _check_classes(logits, torch.tensor([classes - 1]))


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    try:
        output = model(images)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        shape, reason = tuple(images.shape[1:]), str(error).partition("\n")[0]
        raise UsageError(
            f"the model cannot take images of shape {shape}: {reason}",
            "choose data of the shape that the model was trained on",
        ) from error
    # Classifiers with auxiliary heads wrap their logits, torchvision's in train mode only.
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise UsageError(f"the model's output is a {type(output).__name__}, not a tensor of scores")
    return logits


def _check_classes(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 2 or logits.shape[1] <= int(labels.max()):
        raise UsageError(
            f"the model's output has shape {tuple(logits.shape)}, which is no score for each of "
            f"at least {int(labels.max()) + 1} classes",
            "choose data with the classes that the model was trained on",
        )


def _dtype(model: nn.Module) -> torch.dtype:
    floats = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(floats, torch.float32)


def learning_rate_share(
    schedule: ScheduleRecipe, step: int, steps_per_epoch: int, epochs: int
) -> float:
    """Return the share of the highest learning rate that a step uses.

    Args:
        schedule: Which schedule; ``one-cycle`` is that of ``torch.optim.lr_scheduler.OneCycleLR``
            with its defaults (rise from 1/25, fall to 1/250,000), without its changes of momentum.
        step: Counts from 0 over the whole training.
        steps_per_epoch: Steps in one epoch.
        epochs: Epochs of the whole training.
    """
    if schedule.name == "multistep":
        epoch = step // steps_per_epoch
        passed = sum(epoch >= milestone for milestone in schedule.milestones)
        return schedule.factor**passed
    if schedule.name == "one-cycle":
        last = steps_per_epoch * epochs - 1
        peak = schedule.warmup * (last + 1) - 1
        if step <= peak and peak > 0:
            return _half_cosine(_START, 1.0, step / peak)
        return _half_cosine(1.0, _END, (step - peak) / (last - peak))
    return 1.0


def _half_cosine(start: float, end: float, position: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * position)) / 2


def last_learning_rate(recipe: FitRecipe) -> float:
    """Return the learning rate that a training ended with, to fine-tune at.

    Section 4.1 of the paper fine-tunes at the last learning rate of the training. ``one-cycle``
    ends at 1/250,000 of its highest rate, at which nothing changes any more; a hundredth of the
    highest stands in for it, as after the two drops by ten of a step-wise schedule.
    """
    if recipe.schedule.name == "one-cycle":
        return recipe.optimizer.learning_rate * NEAR_ZERO_SHARE
    share = learning_rate_share(recipe.schedule, recipe.epochs - 1, 1, recipe.epochs)
    return recipe.optimizer.learning_rate * share


def train(
    model: nn.Module,
    dataset: Dataset,
    recipe: FitRecipe,
    *,
    device: Device = "cpu",
    generator: torch.Generator,
    keep_better: bool = False,
    on_step: Callable[[int, int, int], None] | None = None,
    on_epoch: Callable[[Epoch, TrainingState], None] | None = None,
    state: TrainingState | None = None,
) -> TrainingResult:
    """Fit a model to the training split and keep the epoch that validates best.

    The order and the augmentation of the images, and what a module such as dropout draws, come
    from ``generator``; torch's global generator is left as it was. Parameters that require no
    gradient stay as they are. Weights in half precision are trained in float32, since small steps
    would be lost to rounding, and rounded at the end.

    Args:
        model: Maps (batch, channels, height, width) to logits (batch, classes). It is trained
            in place and ends with the best weights, in the memory layout, precision and modes it
            came in.
        dataset: Needs a training and a validation split, both labelled.
        recipe: The hyperparameters.
        device: Where to train; the model is moved there.
        generator: On the CPU; the only source of randomness.
        keep_better: Whether the weights that the model comes with are kept where no epoch
            validates better; they are then epoch 0 of the history.
        on_step: Called after every step with the number of the epoch, the steps done in it and
            all its steps.
        on_epoch: Called after every epoch with its record and what is needed to resume.
        state: What ``on_epoch`` was handed in an earlier run with the same other arguments; the
            training goes on after that epoch, with the same result as without a break.

    Raises:
        UsageError: A split or its labels are missing, there are fewer than two images, or the
            model cannot take them.
        UnsupportedError: No parameter requires a gradient.
        TdkitError: The loss is no longer finite.
    """
    training, validation = trainable_splits(dataset)
    with mode(model.to(device), training=True), trainable_weights(model, recipe.channels_last):
        run = _Run(model, recipe, device, generator, _optimizer(model, recipe.optimizer))
        if state is not None:
            run.resume(state)
        while not run.is_over():
            start = time.perf_counter()
            number = run.history[-1].number + 1 if run.history else int(not keep_better)
            loss = run.epoch(number, training, on_step) if number > 0 else None
            measured = evaluate(model, validation, device=device)
            seconds = time.perf_counter() - start
            run.add(Epoch(number, loss, measured.loss, measured.accuracy, seconds))
            if on_epoch is not None:
                on_epoch(run.history[-1], run.state())
        model.load_state_dict(run.best)
        run.optimizer.zero_grad()
    return TrainingResult(snapshot(model), tuple(run.history))


def trainable_splits(dataset: Dataset) -> tuple[Split, Split]:
    """Return the training and the validation split of a data set that one can train on.

    Raises:
        UsageError: One of them or its labels are missing, or there are fewer than two images.
    """
    training, validation = dataset.train, dataset.validation
    if any(split is not None and split.labels is None for split in (training, validation)):
        message = f"training needs labels, and the images of {dataset.name} have none"
        raise UsageError(message, _NEEDED)
    if training is None or not validation:
        missing = "training" if training is None else "validation"
        raise UsageError(f"{dataset.name} has no {missing} images", _NEEDED)
    if len(training) < 2:
        raise UsageError(f"training needs at least 2 images, and {dataset.name} has fewer")
    return training, validation


class _Run:
    """A training under way."""

    def __init__(
        self,
        model: nn.Module,
        recipe: FitRecipe,
        device: Device,
        generator: torch.Generator,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.model, self.recipe, self.device = model, recipe, device
        self.generator, self.optimizer = generator, optimizer
        self.history: list[Epoch] = []
        self.best = snapshot(model)

    def resume(self, state: TrainingState) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.history = [Epoch(**line) for line in state["history"]]
        self.best = dict(state["best"])

    def state(self) -> TrainingState:
        return {
            "model": snapshot(self.model),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "generator": self.generator.get_state(),
            "history": [asdict(line) for line in self.history],
            "best": self.best,
        }

    def add(self, epoch: Epoch) -> None:
        self.history.append(epoch)
        if _best(self.history) is epoch:
            self.best = snapshot(self.model)

    def is_over(self) -> bool:
        if not self.history:
            return False
        last, patience = self.history[-1].number, self.recipe.patience
        idle = last - _best(self.history).number
        return last >= self.recipe.epochs or (patience is not None and idle >= patience)

    def epoch(
        self, number: int, split: Split, on_step: Callable[[int, int, int], None] | None
    ) -> float:
        """Take one pass over the training images; returns the mean loss per image."""
        steps = steps_per_epoch(len(split), self.recipe.batch_size)
        total, count = 0.0, 0
        with own_global_generator(self.generator, self.device):
            batches = _training_batches(split, self.recipe.batch_size, self.generator)
            for index, (images, labels) in enumerate(batches):
                self._set_learning_rate((number - 1) * steps + index, steps)
                loss = self._step(images, labels)
                if not math.isfinite(loss):
                    raise TdkitError(
                        f"the training loss became {loss} in epoch {number}, step {index + 1}",
                        "lower the learning rate",
                    )
                total += loss * len(labels)
                count += len(labels)
                if on_step is not None:
                    on_step(number, index + 1, steps)
        return total / count

    def _set_learning_rate(self, step: int, steps: int) -> None:
        share = learning_rate_share(self.recipe.schedule, step, steps, self.recipe.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.optimizer.learning_rate * share

    def _step(self, images: Tensor, labels: Tensor) -> float:
        images = images.to(self.device, _dtype(self.model))
        if self.recipe.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        lowered = self.recipe.autocast != "none"
        with torch.autocast(images.device.type, torch.bfloat16, enabled=lowered):
            logits = _logits(self.model, images)
        _check_classes(logits, labels)
        loss = nn.functional.cross_entropy(
            logits.float() if lowered else logits,
            labels.to(self.device),
            label_smoothing=self.recipe.label_smoothing,
        )
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


@contextmanager
def trainable_weights(model: nn.Module, channels_last: bool) -> Iterator[None]:
    """Put the weights in the memory layout and the precision to train in, and back at the end.

    Args:
        model: Weights in half precision are float32 meanwhile.
        channels_last: Whether kernels of four axes are in that layout meanwhile.
    """
    halves = {
        tensor: tensor.dtype
        for tensor in chain(model.parameters(), model.buffers())
        if tensor.dtype in HALVES
    }
    _to_layout(model, channels_last)
    for tensor in halves:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, dtype in halves.items():
            tensor.data = tensor.data.to(dtype)
        _to_layout(model, channels_last=False)


def _to_layout(model: nn.Module, channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=layout)


def _optimizer(model: nn.Module, recipe: OptimizerRecipe) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise UnsupportedError(
            "no parameter of the model requires a gradient: there is nothing to train",
            "call model.requires_grad_() before saving it",
        )
    rate, decay = recipe.learning_rate, recipe.weight_decay
    if recipe.name == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=rate,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            weight_decay=decay,
        )
    family = torch.optim.Adam if recipe.name == "adam" else torch.optim.AdamW
    return family(parameters, lr=rate, weight_decay=decay)


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Return the number of steps; a last batch of one image is dropped, others are kept.

    BatchNorm has no deviation to divide a single image's 1×1 features by, and torch raises.
    """
    full, rest = divmod(images, batch_size)
    return full + (rest > 1)


def _training_batches(
    split: Split, batch_size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    for images, labels in split.batches(batch_size, generator=generator, augment=True):
        if len(labels) >= 2:
            yield images, labels


class own_global_generator:  # noqa: N801
    """Seed torch's global generator from another one, and put it back at the end.

    Dropout and stochastic depth take no generator.

    Args:
        generator: On the CPU.
        device: Where the model is.
    """

    def __init__(self, generator: torch.Generator, device: Device) -> None:
        target = torch.device(device)
        self.seed = int(torch.randint(2**63 - 1, (), generator=generator))
        self.fork = torch.random.fork_rng([] if target.type == "cpu" else [target])

    def __enter__(self) -> None:
        self.fork.__enter__()
        torch.manual_seed(self.seed)

    def __exit__(self, *exc: Any) -> None:
        self.fork.__exit__(*exc)


def _best(history: Sequence[Epoch]) -> Epoch:
    """Return the first epoch with the highest validation accuracy."""
    return max(history, key=lambda line: line.validation_accuracy)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's state_dict on the CPU: tensors of any shape, laid out plainly."""
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
    }


def initial_model(record: ModelRecord, dataset: Dataset, seed: int) -> nn.Module:
    """Build a model for a data set with random weights, leaving torch's global generator alone.

    Args:
        record: The architecture.
        dataset: Gives the number of input channels and of classes.
        seed: Of the weights.

    Raises:
        UsageError: The data set has no classes.
    """
    if not dataset.classes:
        raise UsageError(f"training needs labels, and the images of {dataset.name} have none")
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return record.create(in_channels=dataset.input_shape[0], num_classes=len(dataset.classes))
