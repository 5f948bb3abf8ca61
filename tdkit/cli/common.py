"""From what the user typed to what the library takes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdkit.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from tdkit.checkpoint import LoadedModel
    from tdkit.datasets.base import Dataset, Split
    from tdkit.registry import Registry


@dataclass(frozen=True)
class Source:
    """A model as the user named it.

    Attributes:
        model: File or registered name.
        arch: Architecture of a state_dict.
        weights: Weights of a registered model.
        allow_classes: Classes that a file may hold.
        unsafe: Whether the file may run code.
        input_shape: Shape of one sample as typed.
        device: cpu, cuda or auto.
        seed: Of random weights.
    """

    model: str
    arch: str | None = None
    weights: str | None = None
    allow_classes: Sequence[str] = ()
    unsafe: bool = False
    input_shape: str | None = None
    device: str = "auto"
    seed: int = 0


@dataclass(frozen=True)
class Opened:
    """A model that is ready to work on.

    Attributes:
        loaded: What the file held.
        model: The model on its device.
        shape: The shape of one sample; None when nothing tells it.
    """

    loaded: LoadedModel
    model: nn.Module
    shape: tuple[int, ...] | None

    @property
    def name(self) -> str:
        """A short name for files made from the model."""
        return Path(self.loaded.source).stem

    def require_shape(self, purpose: str) -> None:
        """Refuse what takes a forward pass when the shape of the input is unknown."""
        if self.shape is None:
            raise UsageError(
                f"{purpose} runs the model, and the shape of its input is unknown",
                "give it with --input-shape, such as 3,224,224",
            )

    def inputs(self, batch: int = 2) -> tuple[Tensor] | None:
        """Random inputs, or None when the shape is unknown."""
        from tdkit.compression import random_inputs

        return None if self.shape is None else random_inputs(self.model, self.shape, batch)


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


def open_model(source: Source, registry: Registry, dataset: Dataset | None = None) -> Opened:
    """Read a model and settle the shape of its input: typed, the data's, or the model's own."""
    import torch

    from tdkit.checkpoint import load_model
    from tdkit.layers import unwrap

    device = pick_device(source.device)
    typed = parse_shape(source.input_shape) if source.input_shape else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(source.seed % 2**63)
        loaded = load_model(
            source.model,
            models=registry.models,
            arch=source.arch,
            weights=source.weights,
            allow_classes=tuple(source.allow_classes),
            unsafe=source.unsafe,
        )
    shape = typed or (dataset.input_shape if dataset else None) or loaded.input_shape
    return Opened(loaded, unwrap(loaded.model).to(device), shape)


def open_dataset(
    text: str,
    registry: Registry,
    root: Path | None = None,
    image_size: tuple[int, int] | None = None,
    seed: int = 0,
) -> Dataset:
    """Open the data set that ``NAME`` or ``NAME:PATH`` names."""
    from tdkit.registry import lookup

    name, colon, path = text.partition(":")
    record = lookup(registry.datasets, name, "data set")
    if record.takes_path and not path:
        raise UsageError(f"{name} needs a folder", f"write it as {name}:PATH")
    if colon and not record.takes_path:
        raise UsageError(f"{name} takes no path", f"name a folder with --data-root: {path}")
    return record.create(root=root, path=path or None, image_size=image_size, seed=seed)


def image_size(source: Source, registry: Registry) -> tuple[int, int] | None:
    """Height and width that folders of images are brought to, where they are known beforehand."""
    if source.input_shape:
        shape: tuple[int, ...] = parse_shape(source.input_shape)
    else:
        name = (source.arch or source.model).replace("_", "-")
        if name not in registry.models:
            return None
        shape = registry.models[name].input_shape
    return (shape[-2], shape[-1]) if len(shape) == 3 else None


def pick_device(name: str) -> torch.device:
    """The device of ``cpu``, ``cuda`` or ``auto``."""
    import torch

    if name not in ("cpu", "cuda", "auto"):
        raise UsageError(f"unknown device {name!r}", "it is cpu, cuda or auto")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UsageError("this machine has no CUDA device that torch can use", "use --device cpu")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def parse_shape(text: str) -> tuple[int, ...]:
    """Read 3,224,224 (or 3x224x224)."""
    parts = text.replace("x", ",").split(",")
    try:
        shape = tuple(int(part) for part in parts)
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise UsageError(
            f"--input-shape {text!r} is not a shape", "write it without the batch: 3,224,224"
        )
    return shape


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


def calibration_batches(dataset: Dataset | None, samples: int, model: nn.Module) -> list[Tensor]:
    """Training images to measure BatchNorm's statistics on; never those that are reported on."""
    if dataset is None or dataset.train is None:
        raise UsageError(
            "--recalibrate needs training images",
            "name a data set that has some with --data, such as image-folder:PATH with PATH/train",
        )
    return _images(dataset.train, samples, model)


def _images(split: Split, samples: int, model: nn.Module) -> list[Tensor]:
    like = next(p for p in model.parameters() if p.is_floating_point())
    return [images.to(like) for images, _ in split.batches(64, limit=samples)]
