"""Write a model, so that it loads elsewhere and nothing is lost when writing fails."""

from __future__ import annotations

import importlib.util
import io
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import safetensors.torch
import torch
from torch import Tensor, nn

from tdkit.checkpoint.description import KEY, Description
from tdkit.checkpoint.safe.archive import EXTRA
from tdkit.checkpoint.text import shown
from tdkit.errors import TdkitError, UnsupportedError, UsageError, option
from tdkit.files import atomic_write, os_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from tdkit.checkpoint.reading import LoadedModel
    from tdkit.layers.stages import Stage

FORMATS = ("module", "state-dict", "safetensors", "onnx", "pt2")
"""What ``format`` may be."""

_BY_SUFFIX: Mapping[str, str] = {".safetensors": "safetensors", ".onnx": "onnx", ".pt2": "pt2"}
_EXAMPLES = 2


def default_format(loaded: LoadedModel, output: Path | None = None) -> str:
    """The format to write: what the output's suffix says, else what the input was.

    Args:
        loaded: The input; a registered model becomes a ``module``.
        output: The output path, if it is known.
    """
    suffix = output.suffix.lower() if output is not None else ""
    if suffix in _BY_SUFFIX:
        return _BY_SUFFIX[suffix]
    if loaded.format == "safetensors" and suffix in (".pt", ".pth"):
        return "state-dict"
    return "module" if loaded.format == "registered" else loaded.format


def save_model(
    model: nn.Module,
    path: str | Path,
    *,
    format: str,
    force: bool = False,
    inputs: Sequence[str | Path] = (),
    plan: Mapping[str, Any] | None = None,
    structure: Mapping[str, Sequence[Stage]] | None = None,
    arch: str | None = None,
    input_shape: Sequence[int] | None = None,
    arch_options: Mapping[str, int] | None = None,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write a model to a file, whole or not at all.

    ``module`` is the whole model and loads with plain torch. ``state-dict`` and ``safetensors``
    hold the weights with what :func:`load_model` needs to rebuild the compressed layers. ``onnx``
    and ``pt2`` are exported programs with a free batch axis.

    Args:
        model: The model.
        path: Where to write.
        format: One of :data:`FORMATS`.
        force: Whether an existing file may be replaced.
        inputs: Files that are never replaced.
        plan: The plan that made the model, as JSON values.
        structure: Dotted name of each replaced layer to the stages of the nn.Sequential that
            stands there.
        arch: What the model was made from: a registered name or ``package.module:callable``.
        input_shape: Shape of one input without the batch axis; ``onnx`` and ``pt2`` need it.
        arch_options: Keywords that ``arch`` was made with: in_channels, num_classes.
        training: How the weights were trained, as JSON values; see :mod:`tdkit.training.settings`.

    Raises:
        UsageError: If the format is unknown or lacks the input's shape or a package, or if the
            structure is not the model's.
        UnsupportedError: If the model cannot be written in this format.
        StorageError: If the file cannot be written.
    """
    path = Path(path)
    description = Description(
        plan=plan,
        structure=_complete(model, structure or {}),
        arch=arch,
        arch_options=dict(arch_options or {}),
        input_shape=tuple(input_shape) if input_shape is not None else None,
        training=training,
    )
    _check_request(format, description.input_shape)
    text = description.to_text()
    with atomic_write(path, force=force, inputs=inputs) as temporary:
        try:
            _write(model, temporary, format, text, description.input_shape or ())
        except TdkitError:
            raise
        except Exception as error:
            raise _write_error(error, format) from error


def _write(model: nn.Module, path: Path, format: str, text: str, shape: tuple[int, ...]) -> None:
    if format == "module":
        _write_torch(model, path)
        _add_description(path, text)
    elif format == "state-dict":
        _write_torch({"state_dict": _state(model), KEY: text}, path)
    elif format == "safetensors":
        _write_safetensors(model, path, text)
    elif format == "onnx":
        _write_onnx(model, path, shape)
    else:
        _write_pt2(model, path, shape)


def _write_error(error: Exception, format: str) -> Exception:
    """A failed write as it is, for the caller to name the path; the rest is the model's fault."""
    failed = os_error(error)
    if failed is not None:
        return failed
    reason = shown(" ".join(str(error).split()), 200)
    return UnsupportedError(
        f"the model cannot be written as {format}: {type(error).__name__}: {reason}",
        f"{option('format', 'state-dict')} writes the weights and the plan"
        if format == "module"
        else f"{option('format', 'module')} writes the whole model",
    )


def _check_request(format: str, input_shape: tuple[int, ...] | None) -> None:
    if format not in FORMATS:
        raise UsageError(f"unknown format {shown(format)}", f"choose from: {', '.join(FORMATS)}")
    if format in ("onnx", "pt2") and input_shape is None:
        raise UsageError(
            f"the format {format} needs the shape of one input",
            f"give it, such as {option('input_shape', (3, 224, 224))}",
        )
    if format == "onnx":
        lacking = [
            name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None
        ]
        if lacking:
            raise UsageError(
                f"the format onnx needs the package {' and '.join(lacking)}",
                "pip install 'tdkit[onnx]'",
            )


def _complete(
    model: nn.Module, structure: Mapping[str, Sequence[Stage]]
) -> dict[str, tuple[Stage, ...]]:
    """The structure, checked against the model, with every other name of a shared module."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, tuple[Stage, ...]] = {}
    for name, specs in structure.items():
        module = modules.get(name)
        if not isinstance(module, nn.Sequential) or not _is_built_from(module, name, structure):
            raise UsageError(
                f"the structure says that {shown(name) or 'the model'} is a sequence of "
                f"{len(specs)} layers, but the model has something else there",
                "pass the structure of this model",
            )
        found |= {other: tuple(specs) for other, same in modules.items() if same is module}
    return found


def _is_built_from(
    module: nn.Sequential, name: str, structure: Mapping[str, Sequence[Stage]]
) -> bool:
    """Whether the stages are those of the structure; one replaced again has a turn of its own."""
    specs = structure[name]
    prefix = f"{name}." if name else ""
    return len(module) == len(specs) and all(
        f"{prefix}{position}" in structure or _is_like(part, stage)
        for position, (part, stage) in enumerate(zip(module, specs, strict=True))
    )


def _is_like(module: nn.Module, stage: Stage) -> bool:
    found = stage.of(module)
    if found is None or stage.weight_shape is None:
        return found == stage
    return found.state_shapes == stage.state_shapes


def _state(model: nn.Module) -> dict[str, Any]:
    return {
        name: value.detach() if isinstance(value, Tensor) else value
        for name, value in model.state_dict().items()
    }


class _Patient(io.RawIOBase):
    """A file that keeps the first error, Ctrl-C included, until torch's writer is through.

    That writer ends the whole process if an exception passes through it.
    """

    def __init__(self, handle: BinaryIO) -> None:
        super().__init__()
        self.handle = handle
        self.error: BaseException | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.handle.seek(offset, whence)

    def tell(self) -> int:
        return self.handle.tell()

    def write(self, data: Any) -> int:
        self._attempt(lambda: self.handle.write(data))
        return memoryview(data).nbytes

    def flush(self) -> None:
        self._attempt(self.handle.flush)

    def _attempt(self, action: Callable[[], object]) -> None:
        if self.error is None:
            try:
                action()
            except BaseException as error:
                self.error = error


@contextmanager
def _patient(path: Path) -> Iterator[BinaryIO]:
    # Through a handle the archive's folder has a fixed name, so equal models are equal files.
    with path.open("wb") as handle:
        patient = _Patient(handle)
        try:
            yield cast("BinaryIO", patient)
            patient.flush()
        finally:
            if patient.error is not None:
                raise patient.error


def _write_torch(value: Any, path: Path) -> None:
    with _patient(path) as handle:
        torch.save(value, handle)


def _add_description(path: Path, text: str) -> None:
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
        root = archive.namelist()[0].partition("/")[0]
        entry = zipfile.ZipInfo(f"{root}/{EXTRA}")
        archive.writestr(entry, text)


def _write_safetensors(model: nn.Module, path: Path, text: str) -> None:
    tensors: dict[str, Tensor] = {}
    metadata = {"format": "pt", KEY: text}
    kept: dict[object, str] = {}
    for name, value in _state(model).items():
        if not isinstance(value, Tensor):
            raise UnsupportedError(
                f"{shown(name)} is not a tensor, and safetensors holds only tensors",
                option("format", "state-dict"),
            )
        view = (value.untyped_storage().data_ptr(), value.storage_offset(), value.shape)
        identity = (view, value.stride(), value.dtype) if value.numel() else name
        if identity in kept:
            metadata[name] = kept[identity]
        else:
            kept[identity] = name
            tensors[name] = value.cpu().clone(memory_format=torch.contiguous_format)
    safetensors.torch.save_file(tensors, path, metadata=metadata)


def _write_onnx(model: nn.Module, path: Path, shape: tuple[int, ...]) -> None:
    with _exportable(model) as ready:
        # From a program: given the module, the exporter may fix the batch without a word.
        program = torch.onnx.export(
            _exported(ready, shape),
            dynamo=True,
            input_names=["input"],
            output_names=["output"],
            verbose=False,
        )
    assert program is not None
    program.save(path, external_data=False)


def _write_pt2(model: nn.Module, path: Path, shape: tuple[int, ...]) -> None:
    with _exportable(model) as ready:
        program = _exported(ready, shape)
        with _patient(path) as handle:
            torch.export.save(program, handle)


def _exported(model: nn.Module, shape: tuple[int, ...]) -> torch.export.ExportedProgram:
    """The model as a program with a free batch axis."""
    example, free = (_example(model, shape),), ({0: torch.export.Dim("batch")},)
    try:
        return torch.export.export(model, example, dynamic_shapes=free)
    except Exception as error:  # whatever the tracer meets in a model
        try:
            # By its bytecode instead of its run: len(x) is then no constant.
            return torch.export.export(model, example, dynamic_shapes=free, strict=True)
        except Exception:
            raise error from None


@contextmanager
def _exportable(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode without gradients; its own modes come back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield model.eval()
    finally:
        for module, training in modes:
            module.training = training


def _example(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.zeros(_EXAMPLES, *shape, dtype=like.dtype, device=like.device)
