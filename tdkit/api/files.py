"""``tdkit.load`` and ``tdkit.save``: models from files, and into them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from tdkit import arguments
from tdkit.checkpoint import (
    FORMATS,
    atomic_write,
    check_writable,
    default_format,
    load_into,
    load_model,
    save_model,
)
from tdkit.checkpoint.reading import LoadedModel
from tdkit.errors import UsageError
from tdkit.forward.copying import plain_module, require_module
from tdkit.forward.placement import on_cpu
from tdkit.layers.stages import Stage
from tdkit.opening import Opened
from tdkit.registry import load_registry, resolve_stages

if TYPE_CHECKING:
    from tdkit.api.compression import Compression

_SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "pt2": ".pt2"}


@dataclass(frozen=True)
class Destination:
    """Where a compressed model and its plan go.

    Attributes:
        path: The model file.
        format: One of :data:`tdkit.checkpoint.FORMATS`.
        force: Whether existing files are replaced.
        inputs: Files that are never overwritten.
    """

    path: Path
    format: str
    force: bool
    inputs: tuple[str | Path, ...]

    @property
    def plan(self) -> Path:
        """The plan file beside the model, named after its whole name: formats differ at its end."""
        return self.path.with_name(self.path.name + ".plan.json")

    @property
    def has_plan(self) -> bool:
        """Whether the plan file is itself an input, which stays as it is."""
        return any(_is_same(self.plan, Path(source)) for source in self.inputs)

    @classmethod
    def of(
        cls,
        opened: Opened,
        output: Path | None,
        default: str,
        format: str | None,
        force: bool,
        inputs: Sequence[str | Path],
    ) -> Destination:
        """Settle path and format, and refuse a format that the model cannot have.

        Args:
            opened: The dense model.
            output: The path, where the user named it; a folder, or a name that ends in a slash,
                is no path.
            default: The path without its suffix, where the user did not.
            format: The format, where the user named it.
            force: Whether existing files are replaced.
            inputs: Files that are never overwritten.

        Raises:
            UsageError: If the format is unknown, or needs the shape of the input.
        """
        if format is not None and format not in FORMATS:
            raise UsageError(f"unknown format {format!r}", f"it is one of {', '.join(FORMATS)}")
        named = output if output is not None and str(output) != DEFAULT else None
        format = format or default_format(opened.loaded, named)
        if format in ("onnx", "pt2"):
            opened.require_shape(f"exporting to {format}")
        path = named or Path(default + _SUFFIXES.get(format, ".pt"))
        return cls(path, format, force, tuple(inputs))

    def check(self, *, with_plan: bool = True) -> None:
        """Refuse early what could not be written at the end.

        Raises:
            StorageError: If a file exists, is an input, or cannot be written.
        """
        check_writable(self.path, force=self.force, inputs=self.inputs)
        if with_plan and not self.has_plan:
            check_writable(self.plan, force=self.force, inputs=self.inputs)


DEFAULT = "auto"
"""As an output: a name made from the model's, in the current folder."""


def plan_title(path: Path) -> str:
    """The name of a plan file without what :attr:`Destination.plan` puts there."""
    title = Path(path.stem.removesuffix(".plan"))
    written = title.suffix in (".pt", ".pth", *_SUFFIXES.values())
    return title.stem if written else title.name


def load(
    source: str | Path,
    *,
    arch: str | None = None,
    model: nn.Module | None = None,
    weights: str | None = None,
    allow_classes: str | Sequence[str] = (),
    unsafe_load: bool = False,
) -> nn.Module:
    """Read a model file safely, also one that tdkit wrote as a state_dict.

    Args:
        source: The file, or a registered name.
        arch: The architecture of a state_dict: a registered name or ``package.module:callable``.
        model: Instead of ``arch``, an instance of the dense architecture; it is changed in place.
        weights: Weights of a registered model; ``none`` for random ones.
        allow_classes: Classes of yours that the file may hold, each ``package.module:Class``.
        unsafe_load: Run whatever code the file holds.

    Raises:
        TdkitError: Of the kind that fits what is wrong with the file.
    """
    file, allowed = arguments.source(source), arguments.names(allow_classes, "allow_classes")
    registry = load_registry()
    stages = resolve_stages(registry)
    if model is not None:
        require_module(model)
        found = load_into(model, file, stages=stages, allow_classes=allowed, unsafe=unsafe_load)
        return found.model
    found = load_model(
        file,
        models=registry.models,
        stages=stages,
        arch=arch,
        weights=weights,
        allow_classes=allowed,
        unsafe=unsafe_load,
    )
    return found.model


def save(
    model: nn.Module | Compression,
    path: str | Path,
    *,
    like: Compression | None = None,
    format: str | None = None,
    input_shape: str | Sequence[int] | None = None,
    force: bool = False,
) -> Path:
    """Write a model, for any machine to load.

    Args:
        model: What :func:`compress` or :func:`apply` returned, or a module.
        path: Where to.
        like: Of a module, the compression that it was trained on from: its plan and structure are
            written with the weights.
        format: ``module``, ``state-dict``, ``safetensors``, ``onnx`` or ``pt2``; by the suffix if
            None, else a whole module.
        input_shape: Of one sample, which ``onnx`` and ``pt2`` need.
        force: Replace an existing file.

    Returns:
        The model's path.

    Raises:
        UsageError: If the format is unknown or needs the shape of the input, or the structure is
            not that of the model.
        UnsupportedError: If the model cannot be written so.
        StorageError: If the file cannot be written.
    """
    if not isinstance(model, nn.Module):
        return model.save(path, format=format, force=force)
    shape = None if input_shape is None else arguments.shape(input_shape)
    plain = plain_module(model)
    opened = like.opened if like is not None else _opened(plain, shape)
    destination = Destination.of(opened, Path(path), "", format, force, ())
    write_model(
        opened,
        plain,
        destination,
        plan=None if like is None else like.plan.to_json(),
        structure={} if like is None else like.structure,
        training=None if like is None else like.training,
    )
    return destination.path


def _opened(model: nn.Module, shape: tuple[int, ...] | None) -> Opened:
    loaded = LoadedModel(model=model, source=type(model).__name__, format="module")
    return Opened(loaded, model, shape, ())


def write(compression: Compression, destination: Destination) -> None:
    """Write a compressed model and its plan, both or neither.

    Raises:
        UnsupportedError: If the model cannot be written in this format.
        StorageError: If a file cannot be written.
    """
    plan = compression.plan.to_json()

    def write_it() -> None:
        write_model(
            compression.opened,
            compression.model,
            destination,
            plan=plan,
            structure=compression.structure,
            training=compression.training,
        )

    if destination.has_plan:
        write_it()
        return
    # The plan takes its name last, when the model is safe; a full disk leaves neither.
    force, inputs = destination.force, destination.inputs
    with atomic_write(destination.plan, force=force, inputs=inputs) as temporary:
        temporary.write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")
        write_it()


def write_model(
    opened: Opened,
    model: nn.Module,
    destination: Destination,
    *,
    plan: Mapping[str, Any] | None,
    structure: Mapping[str, Sequence[Stage]],
    training: Mapping[str, Any] | None,
) -> None:
    """Write a model that was made from an opened one, from whatever device it is on.

    Args:
        opened: What it was made from.
        model: The model, which stays where it is.
        destination: Where it goes.
        plan: The plan that it carries.
        structure: The stages of its replaced layers, besides those that it came with.
        training: What is known about its training.

    Raises:
        UnsupportedError: If the model cannot be written in this format.
        StorageError: If the file cannot be written.
    """
    with on_cpu(model):
        save_model(
            model,
            destination.path,
            format=destination.format,
            force=destination.force,
            inputs=destination.inputs,
            plan=plan,
            structure={**opened.loaded.structure, **structure},
            arch=opened.loaded.arch,
            input_shape=opened.shape,
            arch_options=opened.loaded.arch_options,
            training=training,
        )


def _is_same(path: Path, source: Path) -> bool:
    return path.exists() and source.exists() and path.samefile(source)
