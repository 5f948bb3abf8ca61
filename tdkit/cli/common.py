"""From what the user typed to what the library takes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tdkit.errors import UsageError
from tdkit.opening import (
    Opened,
    Source,
    image_size,
    open_dataset,
    open_model,
    open_with_data,
    parse_shape,
    pick_device,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tdkit.calibration.batchnorm import Calibration
    from tdkit.datasets.base import Dataset, Split
    from tdkit.registry import Registry

__all__ = [
    "Opened",
    "Source",
    "calibration_batches",
    "feature_batches",
    "file_json",
    "image_size",
    "open_dataset",
    "open_model",
    "open_registry",
    "open_with_data",
    "parse_fraction",
    "parse_keeps",
    "parse_names",
    "parse_shape",
    "pick_device",
]


def open_registry(*, tell: bool = True) -> Registry:
    """Everything that can be named; unless told not to, report plugins that are not used."""
    from tdkit.cli.display import note
    from tdkit.registry import load_registry

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        registry = load_registry()
    for provider in registry.providers:
        if tell and provider.failure:
            title = f"the plugin {provider.name} {provider.version}"
            note(f"{title} is not used: {provider.failure}")
    return registry


def parse_fraction(text: str, option: str) -> float:
    """Read 0.5 or 50%."""
    number = text.strip()
    try:
        value = float(number.removesuffix("%")) / (100 if number.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise UsageError(
            f"{option} {text!r} is not a fraction above 0 and at most 1",
            f"it is what may remain: {option} 0.5 or {option} 50% keeps at most half",
        )
    return value


def parse_names(text: str | None, option: str) -> list[str] | None:
    """Read a comma-separated list; None stays None."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError(f"{option} {text!r} names nothing", "separate names by commas")
    return names


def parse_keeps(text: str | None, default: Sequence[float]) -> tuple[float, ...]:
    """Read keeps such as 0.5,0.25."""
    names = parse_names(text, "--keeps")
    return tuple(default) if names is None else tuple(parse_fraction(k, "--keeps") for k in names)


def file_json(value: Any) -> str:
    """JSON as it goes into files that people read."""
    import json

    return json.dumps(value, indent=2) + "\n"


def feature_batches(dataset: Dataset | None, samples: int, model: nn.Module) -> list[Tensor]:
    """Images for feature metrics: training images, as in the paper, else test images."""
    split = None if dataset is None else dataset.train or dataset.test
    return [] if split is None else _images(split, samples, model)


def calibration_batches(
    how: Calibration, dataset: Dataset | None, samples: int, model: nn.Module
) -> list[Tensor]:
    """Training images to match BatchNorm's statistics on; never those that are reported on."""
    if how != "data":
        return []
    if dataset is None or dataset.train is None:
        raise UsageError(
            "calibrating BatchNorm on data needs training images",
            "name a data set that has some with --data, such as image-folder:PATH with"
            " PATH/train, or use --calibrate noise",
        )
    return _images(dataset.train, samples, model)


def check_test(opened: Opened, dataset: Dataset | None) -> None:
    """Refuse, before any work, test images that the model cannot be measured on."""
    from tdkit.training.loop import check_fit

    if dataset is not None and dataset.test is not None and dataset.test.labels is not None:
        device = next(p.device for p in opened.model.parameters())
        check_fit(opened.model, dataset.test, len(dataset.classes), device)


def settle_calibration(
    text: str, dataset: Dataset | None, planned: Calibration | None = None
) -> Calibration:
    """Read --calibrate; ``auto`` is what a plan says, else data where there are some."""
    from tdkit.calibration.batchnorm import CALIBRATIONS

    if text == "auto":
        return planned or ("data" if dataset is not None and dataset.train else "noise")
    for calibration in CALIBRATIONS:
        if text == calibration:
            return calibration
    raise UsageError(
        f"unknown calibration {text!r}", f"--calibrate is auto, {', '.join(CALIBRATIONS)}"
    )


def _images(split: Split, samples: int, model: nn.Module) -> list[Tensor]:
    like = next(p for p in model.parameters() if p.is_floating_point())
    return [images.to(like) for images, _ in split.batches(64, limit=samples)]
