"""Training from scratch, fine-tuning and measuring: one loop for all of them."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import nn

from tdkit.errors import TdkitError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from tdkit.datasets.base import Dataset, Split
    from tdkit.hookspecs import ModelRecord
    from tdkit.recipes import FitRecipe, OptimizerRecipe, ScheduleRecipe

Device = torch.device | str

# The one-cycle schedule starts at this share of the highest learning rate and ends near zero.
_START = 1 / 25
_END = _START / 1e4


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
        number: Counts from 1.
        loss: Mean loss over the training images, with label smoothing.
        validation_loss: Mean cross-entropy on the validation split, in nats.
        validation_accuracy: Share of correct validation images.
        seconds: Wall time of the epoch, validation included.
    """

    number: int
    loss: float
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
    history: list[dict[str, float]]
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
    with _evaluation_mode(model), torch.inference_mode():
        for images, labels in split.batches(batch_size, limit=limit):
            logits = _logits(model, images.to(device, dtype)).to("cpu", torch.float64)
            _check_classes(logits, labels)
            correct.append(logits.argmax(1) == labels)
            loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
    flags = torch.cat(correct)
    return Evaluation(float(flags.double().mean()), flags, loss / len(flags))


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    try:
        logits: Tensor = model(images)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        shape, reason = tuple(images.shape[1:]), str(error).partition("\n")[0]
        raise UsageError(
            f"the model cannot take images of shape {shape}: {reason}",
            "Choose data of the shape that the model was trained on.",
        ) from error
    return logits


def _check_classes(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 2 or logits.shape[1] <= int(labels.max()):
        raise UsageError(
            f"the model's output has shape {tuple(logits.shape)}, which is no score for each of "
            f"at least {int(labels.max()) + 1} classes",
            "Choose data with the classes that the model was trained on.",
        )


def _dtype(model: nn.Module) -> torch.dtype:
    floats = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(floats, torch.float32)


class _evaluation_mode:  # noqa: N801
    """Put every module in evaluation mode, and each back into its own mode at the end."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.training = {name: module.training for name, module in model.named_modules()}

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *exc: object) -> None:
        for name, module in self.model.named_modules():
            module.training = self.training[name]


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


def train(
    model: nn.Module,
    dataset: Dataset,
    recipe: FitRecipe,
    *,
    device: Device = "cpu",
    generator: torch.Generator,
    on_epoch: Callable[[Epoch, TrainingState], None] | None = None,
    state: TrainingState | None = None,
) -> TrainingResult:
    """Fit a model to the training split and keep the epoch that validates best.

    The order and the augmentation of the images, and what a module such as dropout draws, come
    from ``generator``; torch's global generator is left as it was.

    Args:
        model: Maps (batch, channels, height, width) to logits (batch, classes). It is trained
            in place and ends with the best weights, in the memory layout it came in.
        dataset: Needs a training and a validation split, both labelled.
        recipe: The hyperparameters.
        device: Where to train; the model is moved there.
        generator: On the CPU; the only source of randomness.
        on_epoch: Called after every epoch with its record and what is needed to resume.
        state: What ``on_epoch`` was handed in an earlier run with the same other arguments; the
            training goes on after that epoch, with the same result as without a break.

    Raises:
        UsageError: A split or its labels are missing, or there are fewer than two images.
        TdkitError: The loss is no longer finite.
    """
    training, validation = _splits(dataset)
    _to_layout(model.to(device), recipe.channels_last)
    optimizer = _optimizer(model, recipe.optimizer)
    history: list[Epoch] = []
    best = _snapshot(model)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        history = [Epoch(**line) for line in state["history"]]  # type: ignore[arg-type]
        best = dict(state["best"])
    while len(history) < recipe.epochs and not _out_of_patience(history, recipe.patience):
        start = time.perf_counter()
        loss = _epoch(model, training, optimizer, recipe, len(history), device, generator)
        measured = evaluate(model, validation, device=device)
        seconds = time.perf_counter() - start
        history.append(Epoch(len(history) + 1, loss, measured.loss, measured.accuracy, seconds))
        if _best_epoch(history) == len(history):
            best = _snapshot(model)
        if on_epoch is not None:
            on_epoch(history[-1], _state(model, optimizer, generator, history, best))
    model.load_state_dict(best)
    _to_layout(model, channels_last=False)
    return TrainingResult(best, tuple(history))


def _splits(dataset: Dataset) -> tuple[Split, Split]:
    training, validation = dataset.train, dataset.validation
    if training is None or not validation:
        missing = "training" if training is None else "validation"
        raise UsageError(f"{dataset.name} has no {missing} images")
    if training.labels is None or validation.labels is None:
        raise UsageError(f"training needs labels, and the images of {dataset.name} have none")
    if len(training) < 2:
        raise UsageError(f"training needs at least 2 images, and {dataset.name} has fewer")
    return training, validation


def _to_layout(model: nn.Module, channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=layout)


def _optimizer(model: nn.Module, recipe: OptimizerRecipe) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
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


def _epoch(
    model: nn.Module,
    split: Split,
    optimizer: torch.optim.Optimizer,
    recipe: FitRecipe,
    epoch: int,
    device: Device,
    generator: torch.Generator,
) -> float:
    """Take one pass over the training images; returns the mean loss per image."""
    steps = steps_per_epoch(len(split), recipe.batch_size)
    total, count = 0.0, 0
    model.train()
    with _own_global_generator(generator, device):
        batches = _training_batches(split, recipe, epoch, generator)
        for index, (images, labels) in enumerate(batches):
            share = learning_rate_share(
                recipe.schedule, epoch * steps + index, steps, recipe.epochs
            )
            for group in optimizer.param_groups:
                group["lr"] = recipe.optimizer.learning_rate * share
            loss = _step(model, optimizer, recipe, images.to(device), labels.to(device))
            if not math.isfinite(loss):
                raise TdkitError(
                    f"the training loss became {loss} in epoch {epoch + 1}, step {index + 1}",
                    "Lower the learning rate.",
                )
            total += loss * len(labels)
            count += len(labels)
    return total / count


def _set_learning_rate(
    optimizer: torch.optim.Optimizer, recipe: FitRecipe, step: int, steps: int
) -> None:
    share = learning_rate_share(recipe.schedule, step, steps, recipe.epochs)
    for group in optimizer.param_groups:
        group["lr"] = recipe.optimizer.learning_rate * share


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Return the number of steps; a last batch of one image is dropped, others are kept.

    BatchNorm has no deviation to divide a single image's 1×1 features by, and torch raises.
    """
    full, rest = divmod(images, batch_size)
    return full + (rest > 1)


def _training_batches(
    split: Split, recipe: FitRecipe, epoch: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    for images, labels in split.batches(recipe.batch_size, generator=generator, augment=True):
        if len(labels) < 2:
            continue
        if epoch < recipe.small_epochs:
            size = [recipe.small_size] * 2
            images = nn.functional.interpolate(images, size, mode="bilinear", antialias=True)
        yield images, labels


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: FitRecipe,
    images: Tensor,
    labels: Tensor,
) -> float:
    if recipe.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=recipe.autocast != "none"):
        logits = model(images)
    loss = nn.functional.cross_entropy(
        logits.float(), labels, label_smoothing=recipe.label_smoothing
    )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


class _own_global_generator:  # noqa: N801
    """Seed torch's global generator from another one, and put it back at the end.

    Dropout and stochastic depth take no generator.
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


def _best_epoch(history: list[Epoch]) -> int:
    """Return the number of the first epoch with the highest validation accuracy."""
    return max(history, key=lambda line: line.validation_accuracy).number


def _out_of_patience(history: list[Epoch], patience: int | None) -> bool:
    return (
        patience is not None and bool(history) and len(history) - _best_epoch(history) >= patience
    )


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
    }


def _state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    history: list[Epoch],
    best: dict[str, Tensor],
) -> TrainingState:
    return {
        "model": _snapshot(model),
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "generator": generator.get_state(),
        "history": [asdict(line) for line in history],
        "best": best,
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
