"""With which settings to fine-tune a model, where the user names none.

What is known about the training of a model travels with it, through files and compressions, as a
mapping of JSON values: ``recipe``, the text of the recipe for ``tdkit train``; ``optimizer``, the
numbers of a parameter group of the torch optimizer that was the last to change the weights, with
its ``name`` where that is known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from tdkit import defaults
from tdkit.errors import TdkitError, UsageError, option
from tdkit.recipes import parse_recipe
from tdkit.training.loop import NEAR_ZERO_SHARE, last_learning_rate
from tdkit.training.recipe import FitRecipe, OptimizerRecipe, TrainRecipe

OptimizerName = Literal["sgd", "adam", "adamw"]
Autocast = Literal["none", "bfloat16"]

DEFAULT_RATES: Mapping[OptimizerName, float] = {"sgd": 1e-3, "adam": 1e-4, "adamw": 1e-4}
"""Learning rates where none is known: low enough to keep what a model has learned."""

DEFAULT_BATCH_SIZE = 128
"""Images per step where the training's number is not known: the paper's."""

# Below this share of the highest learning rate a schedule has ended near zero.
_NEAR_ZERO = 1e-4


@dataclass(frozen=True)
class FinetuneSettings:
    """What a user says about a fine-tuning; None leaves it to what is known of the training.

    Attributes:
        epochs: Passes over the training images, at most.
        learning_rate: The learning rate of all steps.
        batch_size: Images per step.
        optimizer: Which optimizer.
        patience: Stop after so many epochs without a better validation accuracy.
        autocast: Precision of the forward pass.
    """

    epochs: int
    learning_rate: float | None = None
    batch_size: int | None = None
    optimizer: OptimizerName | None = None
    patience: int | None = None
    autocast: Autocast = defaults.AUTOCAST

    def __post_init__(self) -> None:
        if self.learning_rate is not None and not math.isfinite(self.learning_rate):
            raise UsageError(f"learning_rate must be a finite number, not {self.learning_rate}")
        if self.optimizer is not None and self.optimizer not in DEFAULT_RATES:
            raise UsageError(
                f"unknown optimizer {self.optimizer!r}", f"it is one of {', '.join(DEFAULT_RATES)}"
            )
        if self.autocast not in get_args(Autocast):
            names = " or ".join(get_args(Autocast))
            raise UsageError(
                f"unknown precision {self.autocast!r}", f"{option('autocast')} is {names}"
            )


def finetune_recipe(
    training: Mapping[str, Any] | None, settings: FinetuneSettings
) -> tuple[FitRecipe, str]:
    """Settle the hyperparameters of a fine-tuning: as the training ended, at a constant rate.

    The learning rate is the training's last one, as in section 4.1 of the paper (see
    :func:`tdkit.training.loop.last_learning_rate`); where an optimizer's rate was let fall near
    zero, a hundredth of its highest. It holds for that optimizer only: for another one, and where
    nothing is known, :data:`DEFAULT_RATES` has a rate.

    Args:
        training: What is known about the training of the model.
        settings: What the user says.

    Returns:
        The recipe, and a phrase that says where its learning rate comes from.

    Raises:
        UsageError: A setting is out of range.
    """
    known = _recipe(training)
    optimizer, reason = _optimizer(training, known, settings.optimizer)
    if settings.learning_rate is not None:
        optimizer, reason = replace(optimizer, learning_rate=settings.learning_rate), "as asked for"
    size = known.batch_size if known else DEFAULT_BATCH_SIZE
    recipe = FitRecipe(
        epochs=settings.epochs,
        batch_size=size if settings.batch_size is None else settings.batch_size,
        optimizer=optimizer,
        label_smoothing=known.label_smoothing if known else 0.0,
        autocast=settings.autocast,
        channels_last=known.channels_last if known else False,
        patience=settings.patience,
    )
    return recipe, reason


def after_finetuning(training: Mapping[str, Any] | None, recipe: FitRecipe) -> dict[str, Any]:
    """What is known about the training of a model once it has been fine-tuned."""
    optimizer = recipe.optimizer
    settings = {
        "name": optimizer.name,
        "lr": optimizer.learning_rate,
        "momentum": optimizer.momentum,
        "nesterov": optimizer.nesterov,
        "weight_decay": optimizer.weight_decay,
    }
    return {**(training or {}), "optimizer": settings}


def split_seed(training: Mapping[str, Any] | None, default: int) -> int:
    """The seed of the validation split that a model was trained with, or the default.

    With another split, images that the model was trained on would decide when to stop.
    """
    known = _recipe(training)
    return default if known is None else known.seed


def _recipe(training: Mapping[str, Any] | None) -> TrainRecipe | None:
    """The recipe that a model was trained by; None where it is not known, or not to be read."""
    text = (training or {}).get("recipe")
    if not isinstance(text, str):
        return None
    try:
        return parse_recipe(text, TrainRecipe, "the recipe")
    except TdkitError:
        return None


def _optimizer(
    training: Mapping[str, Any] | None, recipe: TrainRecipe | None, name: OptimizerName | None
) -> tuple[OptimizerRecipe, str]:
    """The optimizer to fine-tune with, and where its learning rate comes from."""
    found = _last(training)
    if found is None and recipe is not None:
        rate = last_learning_rate(recipe)
        found = replace(recipe.optimizer, learning_rate=rate), _why(recipe.schedule.name)
    if found is not None and name in (None, found[0].name):
        return found
    why = "nothing is known about the training of the model"
    if found is not None:
        why = f"the model was trained with {found[0].name}"
    name = name or "sgd"
    return OptimizerRecipe(name, DEFAULT_RATES[name]), f"the default for {name}: {why}"


def _why(schedule: str) -> str:
    if schedule == "one-cycle":
        return "a hundredth of the highest of its training, which ended near zero"
    return "the last one of its training"


def _last(training: Mapping[str, Any] | None) -> tuple[OptimizerRecipe, str] | None:
    """The optimizer that was the last to change the weights; None where it is not known."""
    settings = (training or {}).get("optimizer")
    if not isinstance(settings, Mapping):
        return None
    name = _name(settings)
    if name is None:
        return None
    try:
        rate = float(settings["lr"])
        peak = max(rate, *(float(settings.get(key, 0)) for key in ("initial_lr", "max_lr")))
        ended = rate < _NEAR_ZERO * peak
        optimizer = OptimizerRecipe(
            name,
            peak * NEAR_ZERO_SHARE if ended else rate,
            momentum=float(settings.get("momentum", 0)),
            nesterov=bool(settings.get("nesterov", False)),
            weight_decay=float(settings.get("weight_decay", 0)),
        )
    except (TdkitError, KeyError, TypeError, ValueError, OverflowError):
        return None  # a file may say anything
    if not math.isfinite(peak):
        return None
    return optimizer, _why("one-cycle" if ended else "")


def _name(settings: Mapping[str, Any]) -> OptimizerName | None:
    """Which optimizer has such settings: torch stores their values but not its name."""
    for name in DEFAULT_RATES:
        if settings.get("name") == name:
            return name
    if "dampening" in settings:
        return "sgd"
    if "amsgrad" in settings:
        return "adamw" if settings.get("decoupled_weight_decay") else "adam"
    return None
