"""Open what is named: models, data sets, and studies of both, in this process or another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tdkit import defaults
from tdkit.errors import UsageError, option

if TYPE_CHECKING:
    import torch
    from torch import nn

    from tdkit.checkpoint import LoadedModel
    from tdkit.datasets.base import Dataset
    from tdkit.forward.inputs import Inputs
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
        input_shape: Shape of one sample, where the user says it.
        device: cpu, cuda or auto.
        seed: Of random weights.
    """

    model: str
    arch: str | None = None
    weights: str | None = None
    allow_classes: Sequence[str] = ()
    unsafe: bool = False
    input_shape: tuple[int, ...] | None = None
    device: str = defaults.DEVICE
    seed: int = defaults.SEED


@dataclass(frozen=True)
class Opened:
    """A model that is ready to work on.

    Attributes:
        loaded: What the file held.
        model: The model on its device.
        shape: The shape of one sample; None when nothing tells it.
        notes: What the user should know about the file and the data.
    """

    loaded: LoadedModel
    model: nn.Module
    shape: tuple[int, ...] | None
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        """A short name for files made from the model."""
        return Path(self.loaded.source).stem

    def of(self, model: nn.Module) -> Opened:
        """The same, of a model that was made from this one, which is then not kept."""
        return replace(self, loaded=replace(self.loaded, model=model), model=model)

    def require_shape(self, purpose: str) -> None:
        """Refuse what takes a forward pass when the shape of the input is unknown.

        Raises:
            UsageError: If it is.
        """
        if self.shape is None:
            raise UsageError(
                f"{purpose} runs the model, and the shape of its input is unknown",
                f"give it with {option('input_shape', (3, 224, 224))}",
            )

    def inputs(self, batch: int = 2) -> Inputs | None:
        """Random inputs, or None when the shape is unknown."""
        from tdkit.forward.inputs import random_inputs

        return None if self.shape is None else random_inputs(self.model, self.shape, batch)


def open_model(source: Source, registry: Registry, dataset: Dataset | None = None) -> Opened:
    """Read a model and settle the shape of its input: typed, the data's, or the model's own."""
    import torch

    from tdkit.checkpoint import load_model
    from tdkit.forward.copying import unwrap
    from tdkit.registry import resolve_stages

    device = pick_device(source.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(source.seed % 2**63)
        loaded = load_model(
            source.model,
            models=registry.models,
            stages=resolve_stages(registry),
            arch=source.arch,
            weights=source.weights,
            allow_classes=tuple(source.allow_classes),
            unsafe=source.unsafe,
        )
    shape = source.input_shape or (dataset.input_shape if dataset else None) or loaded.input_shape
    notes = (*loaded.notes, *(dataset.notes if dataset else ()))
    return Opened(loaded, unwrap(loaded.model).to(device), shape, notes)


def open_module(
    model: nn.Module, source: Source, device: str | None = None, *, inplace: bool = False
) -> Opened:
    """A model that is handed over, as it is; a copy of it where it has to move.

    Args:
        model: Any module.
        source: What the caller says of it.
        device: Where to work; None is where the model is.
        inplace: Move the module itself.

    Raises:
        UsageError: If it is no module, or the device is not there.
        UnsupportedError: If it is a TorchScript module, or has to move and cannot be copied.
    """
    from tdkit.checkpoint import LoadedModel
    from tdkit.forward.copying import own_copy, plain_module

    plain = plain_module(model)
    if device is not None:
        target = pick_device(device)
        if any(each.device.type != target.type for each in (*plain.parameters(), *plain.buffers())):
            plain = (plain if inplace else own_copy(plain)).to(target)
    loaded = LoadedModel(model=plain, source=type(plain).__name__, format="module")
    return Opened(loaded, plain, source.input_shape, ())


def open_dataset(
    text: str,
    registry: Registry,
    root: Path | None = None,
    image_size: tuple[int, int] | None = None,
    seed: int = defaults.SEED,
) -> Dataset:
    """Open the data set that ``NAME`` or ``NAME:PATH`` names.

    Raises:
        UsageError: If the name is unknown, or takes no path, or lacks one.
        UnreadableFileError: If its files are missing or damaged.
    """
    from tdkit.registry import lookup

    name, colon, path = text.partition(":")
    if name not in registry.datasets and Path(text).is_dir():
        raise UsageError(
            f"{option('data', text)} is a folder, not the name of a data set",
            f"for images in folders write {option('data', f'image-folder:{text}')}",
        )
    record = lookup(registry.datasets, name, "data set")
    if record.takes_path and not path:
        raise UsageError(f"{name} needs a folder", f"write it as {name}:PATH")
    if colon and not record.takes_path:
        raise UsageError(f"{name} takes no path", f"name a folder with {option('data_root', path)}")
    return record.create(root=root, path=path or None, image_size=image_size, seed=seed)


def open_with_data(
    source: Source,
    registry: Registry,
    data: str | None,
    root: Path | None = None,
    *,
    opened: Opened | None = None,
) -> tuple[Opened, Dataset | None]:
    """Open a model and, where one is named, a data set whose validation split is the model's.

    Args:
        source: The model.
        registry: Everything that can be named.
        data: ``NAME`` or ``NAME:PATH``.
        root: Folder to look for data sets in first.
        opened: The model where it is open already.

    Raises:
        TdkitError: Of the kind that fits what is wrong with the model or the data.
    """
    from tdkit.training.settings import split_seed

    opened = opened or open_model(source, registry)
    if data is None:
        return opened, None
    size = image_size(source, registry)
    if size is None and opened.shape is not None and len(opened.shape) == 3:
        size = (opened.shape[-2], opened.shape[-1])
    seed = split_seed(opened.loaded.training, source.seed % 2**63)
    dataset = open_dataset(data, registry, root, size, seed)
    shape = opened.shape if source.input_shape else dataset.input_shape
    return replace(opened, shape=shape, notes=(*opened.notes, *dataset.notes)), dataset


def image_size(source: Source, registry: Registry) -> tuple[int, int] | None:
    """Height and width that folders of images are brought to, where they are known beforehand."""
    if source.input_shape:
        shape: tuple[int, ...] = source.input_shape
    else:
        name = (source.arch or source.model).replace("_", "-")
        if name not in registry.models:
            return None
        shape = registry.models[name].input_shape
    return (shape[-2], shape[-1]) if len(shape) == 3 else None


def pick_device(name: str) -> torch.device:
    """The device of ``cpu``, ``cuda`` or ``auto``.

    Raises:
        UsageError: If it is none of them, or not there.
    """
    import torch

    if name not in ("cpu", "cuda", "auto"):
        raise UsageError(f"unknown device {name!r}", "it is cpu, cuda or auto")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UsageError(
            "this machine has no CUDA device that torch can use",
            f"use {option('device', 'cpu')}",
        )
    return torch.device("cuda" if available and name != "cpu" else "cpu")
