"""How a model is fitted to data, as records that TOML files are read into."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Literal

from tdkit import defaults
from tdkit.errors import UsageError

if sys.version_info >= (3, 11):
    pass
else:
    pass

from tdkit.recipes import require


@dataclass(frozen=True)
class OptimizerRecipe:
    """The table ``[optimizer]``.

    Args:
        name: Which optimizer.
        learning_rate: The highest one; the schedule multiplies it by at most 1.
        momentum: Of ``sgd``; the others ignore it.
        nesterov: Whether the momentum of ``sgd`` is Nesterov's.
        weight_decay: Factor of the squared norm added to the loss (``adamw``: decoupled).
    """

    name: Literal["sgd", "adam", "adamw"]
    learning_rate: float
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        require("learning_rate", self.learning_rate, self.learning_rate > 0, "above 0")
        require("momentum", self.momentum, 0 <= self.momentum < 1, "at least 0 and below 1")
        require("weight_decay", self.weight_decay, self.weight_decay >= 0, "at least 0")
        if self.nesterov and self.momentum == 0:
            raise UsageError("nesterov needs a momentum above 0")


@dataclass(frozen=True)
class ScheduleRecipe:
    """The table ``[schedule]``: how the learning rate changes.

    Args:
        name: ``one-cycle`` rises and falls along two half cosines (Smith and Topin, 2017),
            ``multistep`` multiplies by ``factor`` at each milestone, ``constant`` does nothing.
        warmup: Share of the steps in which ``one-cycle`` rises.
        milestones: Epochs after which ``multistep`` multiplies.
        factor: What ``multistep`` multiplies by.
    """

    name: Literal["one-cycle", "multistep", "constant"] = "constant"
    warmup: float = 0.3
    milestones: tuple[int, ...] = ()
    factor: float = 0.1

    def __post_init__(self) -> None:
        require("warmup", self.warmup, 0 < self.warmup < 1, "between 0 and 1")
        require("factor", self.factor, 0 < self.factor <= 1, "above 0 and at most 1")
        if self.name == "multistep" and not self.milestones:
            raise UsageError("milestones must not be empty for the multistep schedule")


@dataclass(frozen=True, kw_only=True)
class FitRecipe:
    """How a model is fitted to data, whether from scratch or after a compression.

    Args:
        epochs: Passes over the training images, at most.
        batch_size: Images per step.
        optimizer: The table ``[optimizer]``.
        schedule: The table ``[schedule]``.
        label_smoothing: Share of the target spread evenly over all classes.
        autocast: Precision of the forward pass, where torch considers it safe to lower it.
        channels_last: Whether the channels lie innermost in memory.
        patience: Stop after this many epochs without a better validation accuracy; never when
            left out.
    """

    epochs: int
    batch_size: int
    optimizer: OptimizerRecipe
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)
    label_smoothing: float = 0.0
    autocast: Literal["none", "bfloat16"] = defaults.AUTOCAST
    channels_last: bool = False
    patience: int | None = None

    def __post_init__(self) -> None:
        require("epochs", self.epochs, self.epochs >= 1, "at least 1")
        # BatchNorm has no deviation to divide by when a batch holds one image.
        require("batch_size", self.batch_size, self.batch_size >= 2, "at least 2")
        smoothing = self.label_smoothing
        require("label_smoothing", smoothing, 0 <= smoothing < 1, "at least 0 and below 1")
        if self.patience is not None:
            require("patience", self.patience, self.patience >= 1, "at least 1")


@dataclass(frozen=True, kw_only=True)
class TrainRecipe(FitRecipe):
    """What ``tdkit train`` reads; see :class:`FitRecipe` for the other fields.

    Args:
        model: Name of a registered model.
        data: Name of a registered data set.
        seed: Of the initial weights, the validation split, the order and the augmentation.
        output: Name of the file to write, ending in ``.safetensors``.
    """

    model: str
    data: str
    seed: int
    output: str

    def __post_init__(self) -> None:
        super().__post_init__()
        require("seed", self.seed, 0 <= self.seed < 2**63, "at least 0 and below 2**63")
        suffix = ".safetensors"
        require("output", self.output, self.output.endswith(suffix), f"a name in {suffix}")
