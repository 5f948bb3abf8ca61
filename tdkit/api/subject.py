"""What a job is about: a model, and the data that come with it, opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tdkit import arguments
from tdkit.calibration.batchnorm import CALIBRATIONS, Calibration
from tdkit.datasets.base import Dataset, Split
from tdkit.defaults import (
    BEST_NO_DATA_CALIBRATION,
    DEVICE,
    EFFORT,
    NO_DATA_CALIBRATION,
    SEED,
)
from tdkit.errors import UsageError, option
from tdkit.forward.copying import plain_module
from tdkit.forward.inputs import Inputs, first_float, random_inputs
from tdkit.forward.placement import device_of
from tdkit.opening import Opened, Source, open_module, open_with_data
from tdkit.registry import Registry
from tdkit.training.loop import check_fit

Model = nn.Module | str | Path
"""A module, a model file, or the name of a registered model."""


@dataclass(frozen=True)
class Given:
    """What a caller says of a model and its data; see :func:`tdkit.compress`."""

    arch: str | None = None
    weights: str | None = None
    allow_classes: str | Sequence[str] = ()
    unsafe_load: bool = False
    input_shape: str | Sequence[int] | None = None
    example_inputs: Any = None
    data: Any = None
    data_root: str | Path | None = None
    device: str | None = None
    seed: int = SEED
    inplace: bool = False


@dataclass(frozen=True)
class Subject:
    """A model and its data, ready to work on.

    Attributes:
        opened: The model.
        dataset: A data set with splits, where one was named or handed over.
        batches: Batches of model inputs that were handed over, tensors of any shape.
        example: Arguments of a forward pass that were handed over.
        owned: Whether nobody but tdkit holds the model.
    """

    opened: Opened
    dataset: Dataset | None
    batches: tuple[Any, ...]
    example: Any
    owned: bool

    @property
    def model(self) -> nn.Module:
        """The plain model."""
        return self.opened.model

    @property
    def runs(self) -> bool:
        """Whether anything tells what the model takes."""
        return self.example is not None or self.opened.shape is not None or bool(self.batches)

    def inputs(self, batch: int = 2) -> Any:
        """Arguments of a forward pass from whatever tells them; None where nothing does."""
        if self.example is not None:
            return self.example
        if self.opened.shape is not None:
            return random_inputs(self.model, self.opened.shape, batch)
        return self.batches[0] if self.batches else None

    def timed(self, traced: Inputs | None, batch: int) -> Inputs | None:
        """What to time: so many random samples where the shape is known, else what was traced."""
        if self.example is None and self.opened.shape is not None:
            return random_inputs(self.model, self.opened.shape, batch)
        return traced

    def looked_at(
        self, needed: bool, how: Calibration, samples: int
    ) -> tuple[Sequence[Any], Sequence[Any]]:
        """Inputs for what looks at data, and those to calibrate on; each image is read once.

        Args:
            needed: Whether anything looks at data.
            how: What BatchNorm is calibrated on.
            samples: Images of a data set.

        Raises:
            UsageError: If there are none to calibrate on.
        """
        calibration = self.calibration(how, samples)
        if not needed or self.dataset is None:
            return self.batches, calibration
        same = how == "data" and self.dataset.train is not None
        return calibration if same else self.features(samples), calibration

    def features(self, samples: int) -> Sequence[Any]:
        """Inputs for what looks at data: training images, as in the paper, else test images."""
        split = None if self.dataset is None else self.dataset.train or self.dataset.test
        return self.batches if split is None else self._images(split, samples)

    def calibration(self, how: Calibration, samples: int) -> Sequence[Any]:
        """Inputs to match BatchNorm's statistics on; never images that are reported on.

        Raises:
            UsageError: If there are none.
        """
        if how != "data" or self.batches:
            return self.batches
        if self.dataset is None or self.dataset.train is None:
            raise UsageError(
                "calibrating BatchNorm on data needs training images",
                f"name a data set that has some with {option('data', 'image-folder:PATH')} and"
                f" PATH/train, or use {option('calibration', 'noise')}",
            )
        return self._images(self.dataset.train, samples)

    def settle(
        self, how: str, planned: Calibration | None = None, effort: str = EFFORT
    ) -> Calibration:
        """Read a calibration; ``auto`` is what a plan says, else data where there are some.

        Without any, the best effort makes images.

        Raises:
            UsageError: If it is unknown.
        """
        there = self.batches or (self.dataset is not None and self.dataset.train)
        if planned is None and there:
            planned = "data"
        elif planned is None:
            planned = BEST_NO_DATA_CALIBRATION if effort == "best" else NO_DATA_CALIBRATION
        return settled(how, planned)

    def check_test(self) -> None:
        """Refuse, before any work, test images that the model cannot be measured on.

        Raises:
            UsageError: If it cannot take them, or has fewer scores than classes.
        """
        test = None if self.dataset is None else self.dataset.test
        if self.dataset is not None and test is not None and test.labels is not None:
            check_fit(self.model, test, len(self.dataset.classes), device_of(self.model))

    def _images(self, split: Split, samples: int) -> list[Tensor]:
        like = first_float(self.model)
        return [images.to(like) for images, _ in split.batches(64, limit=samples)]


def settled(how: str, otherwise: Calibration) -> Calibration:
    """Read a calibration, or what ``auto`` stands for.

    Raises:
        UsageError: If it is unknown.
    """
    if how == "auto":
        return otherwise
    for calibration in CALIBRATIONS:
        if how == calibration:
            return calibration
    raise UsageError(f"unknown calibration {how!r}", f"it is auto, {', '.join(CALIBRATIONS)}")


def open_subject(model: Model, registry: Registry, given: Given) -> Subject:
    """Open a model, and the data where some are named.

    Args:
        model: What the job is about.
        registry: Everything that can be named.
        given: What the caller says of it.

    Raises:
        TdkitError: Of the kind that fits what is wrong with the model or the data.
    """
    named = isinstance(given.data, str)
    dataset = given.data if isinstance(given.data, Dataset) else None
    batches = () if named or dataset is not None else tuple(arguments.batches(given.data))
    shape = None if given.input_shape is None else arguments.shape(given.input_shape)
    source = Source(
        model="" if isinstance(model, nn.Module) else str(arguments.source(model)),
        arch=given.arch,
        weights=given.weights,
        allow_classes=arguments.names(given.allow_classes, "allow_classes"),
        unsafe=given.unsafe_load,
        input_shape=shape,
        device=given.device or DEVICE,
        seed=arguments.seed(given.seed),
    )
    opened = None
    if isinstance(model, nn.Module):
        opened = open_module(model, source, given.device, inplace=given.inplace)
    root = None if given.data_root is None else Path(given.data_root)
    found, opened_data = open_with_data(
        source, registry, given.data if named else None, root, opened=opened
    )
    if dataset is not None:
        shape_of = found.shape if shape is not None else dataset.input_shape
        found = replace(found, shape=shape_of, notes=(*found.notes, *dataset.notes))
    lent = isinstance(model, nn.Module) and found.model is plain_module(model)
    return Subject(found, dataset or opened_data, batches, given.example_inputs, not lent)
