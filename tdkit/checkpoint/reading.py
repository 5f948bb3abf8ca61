"""Turn what a user names into a model: a file, a registered name, a state dict with its class."""

from __future__ import annotations

import hashlib
import http.client
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from tdkit.checkpoint.contents import Contents, read_contents
from tdkit.checkpoint.description import KEY, Description, read_description
from tdkit.checkpoint.recognition import recognise
from tdkit.checkpoint.safe.classes import allowlist
from tdkit.checkpoint.safe.imports import import_named
from tdkit.checkpoint.safe.modules import check_module
from tdkit.checkpoint.states import (
    Fit,
    Misfit,
    fill,
    find_entry,
    find_optimizer,
    fit,
    is_state,
    match,
)
from tdkit.checkpoint.text import listed, shown
from tdkit.errors import (
    TdkitError,
    UnreadableFileError,
    UsageError,
    close_names,
    command,
    option,
)
from tdkit.layers.chains import OWN_STAGES

if TYPE_CHECKING:
    from tdkit.hookspecs import ModelRecord
    from tdkit.layers.stages import Stage

Format = Literal["module", "state-dict", "safetensors", "registered"]

_SUFFIXES = frozenset({".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".pt2", ".onnx", ".tar"})


@dataclass(frozen=True)
class LoadedModel:
    """A model, and what is known about where it came from.

    Args:
        model: The model, on the CPU.
        source: What the user named.
        format: What that was; ``state-dict`` includes training checkpoints.
        arch: The registered name or ``package.module:callable`` it was made from, if known.
        input_shape: Shape of one input without the batch axis, if known.
        plan: The plan of the compression that made it, if tdkit wrote it.
        notes: What the user should be told.
        structure: Dotted name of each layer that tdkit replaced to the stages that stand there.
        arch_options: Keywords for ``arch``, other than its defaults.
        training: How the weights were trained, as far as known; see :mod:`tdkit.training.settings`.
    """

    model: nn.Module
    source: str
    format: Format
    arch: str | None = None
    input_shape: tuple[int, ...] | None = None
    plan: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    structure: Mapping[str, tuple[Stage, ...]] = field(default_factory=dict)
    arch_options: Mapping[str, int] = field(default_factory=dict)
    training: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class _Arch:
    """An architecture that the user named or that was recognised."""

    name: str
    create: Callable[..., nn.Module]
    input_shape: tuple[int, ...] | None


def load_model(
    source: str | Path,
    *,
    models: Mapping[str, ModelRecord],
    stages: Mapping[str, type[Stage]] = OWN_STAGES,
    arch: str | None = None,
    weights: str | None = None,
    allow_classes: Sequence[str] = (),
    unsafe: bool = False,
) -> LoadedModel:
    """Read a model without running code from a file.

    Args:
        source: A file (whole model, state dict, training checkpoint, safetensors, or what tdkit
            wrote) or a registered name. If a file of that name exists, it is the file.
        models: The registered models by name; hyphens and underscores are interchangeable.
        stages: The kinds of stages that what tdkit wrote may name; a file never adds to them.
        arch: What a state dict belongs to: a registered name or ``package.module:callable``, which
            is imported and called. Without it the shapes tell, where they are unique.
        weights: For registered names: the name of trained weights, or ``none`` for random ones;
            None takes the first.
        allow_classes: ``package.module:Class`` names that may stand in the file besides torch's
            and torchvision's; they are imported.
        unsafe: Unpickle without any restriction: the file can run any code.

    Raises:
        UsageError: If an option or a name is wrong, or the architecture is not known.
        UnsafeFileError: If the file would run code, or take far more memory than it holds.
        UnreadableFileError: If the file is missing, damaged, or does not fit the architecture.
        UnsupportedError: If the modules of the file are not a tree.
    """
    path = Path(source)
    name = _registered_name(str(source), models)
    if _is_file(path) or (name is None and _looks_like_path(str(source), path)):
        if weights is not None:
            raise UsageError(
                f"{option('weights', shown(weights))} belongs to a registered model, but {path} "
                "is a file",
                f"leave {option('weights')} out",
            )
        return _load_file(path, models, stages, arch, allow_classes, unsafe)
    if name is None:
        raise _unknown_name("model", str(source), models)
    if arch is not None:
        raise UsageError(
            f"{option('arch', shown(arch))} belongs to a file with a state_dict, but {name} is a "
            "registered model",
            f"leave {option('arch')} out",
        )
    return _load_registered(str(source), models[name], weights)


def load_into(
    model: nn.Module,
    source: str | Path,
    *,
    stages: Mapping[str, type[Stage]] = OWN_STAGES,
    allow_classes: Sequence[str] = (),
    unsafe: bool = False,
) -> LoadedModel:
    """Put the weights of a file into a model of one's own class.

    If tdkit compressed the model in the file, the same layers are replaced first. Nothing changes
    in ``model`` unless every name and shape fits.

    Args:
        model: The model; changed in place, and also returned.
        source: The file.
        stages: As for :func:`load_model`.
        allow_classes: As for :func:`load_model`.
        unsafe: As for :func:`load_model`.

    Raises:
        UsageError: If ``allow_classes`` is wrong.
        UnsafeFileError: If the file would run code, or take far more memory than it holds.
        UnreadableFileError: If the file is missing, damaged, or does not fit the model.
        UnsupportedError: If the modules of the file are not a tree.
    """
    path = Path(source)
    contents = read_contents(path, allowlist((), allow_classes), unsafe=unsafe)
    value, text, notes = _weights_in(contents, path)
    if isinstance(value, nn.Module):
        check_module(value, path, trusted=unsafe)
        value = {name: part for name, part in value.state_dict().items() if _is_tensor(part)}
    description = read_description(text, path, stages) if text is not None else Description()
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    found = match(model, {}, description.structure, value)
    if isinstance(found, Misfit):
        raise _does_not_fit(path, type(model).__name__, found)
    filled = fill(found, None, description.structure)
    if device.type not in ("cpu", "meta"):
        filled = filled.to(device)
    return LoadedModel(
        model=filled,
        source=str(source),
        format="safetensors" if contents.kind == "safetensors" else "state-dict",
        arch=description.arch,
        input_shape=description.input_shape,
        plan=description.plan,
        notes=(*notes, *_stripped_note(found)),
        structure=description.structure,
        arch_options=description.arch_options,
        training=description.training,
    )


def content_hash(model: nn.Module) -> str:
    """A SHA-256 of a model's names, dtypes, shapes and weights, the same on every machine.

    Args:
        model: The model.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            flat = value.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def _load_file(
    path: Path,
    models: Mapping[str, ModelRecord],
    stages: Mapping[str, type[Stage]],
    arch: str | None,
    allow_classes: Sequence[str],
    unsafe: bool,
) -> LoadedModel:
    registered = {name for record in models.values() for name in record.allowed_classes}
    contents = read_contents(path, allowlist(sorted(registered), allow_classes), unsafe=unsafe)
    value, text, notes = _weights_in(contents, path)
    if unsafe:
        notes = (*notes, "unsafe loading was asked for: the file could run any code")
    description = read_description(text, path, stages) if text is not None else Description()
    training = description.training
    if training is None and (optimizer := find_optimizer(contents.value)) is not None:
        training = {"optimizer": optimizer}
    if isinstance(value, nn.Module):
        loaded = _whole_model(value, path, description, notes, arch, unsafe)
        return replace(loaded, training=training)
    loaded = _from_state(value, path, models, arch, description)
    return replace(
        loaded,
        format="safetensors" if contents.kind == "safetensors" else "state-dict",
        notes=(*notes, *loaded.notes),
        training=training,
    )


def _weights_in(contents: Contents, path: Path) -> tuple[Any, object, tuple[str, ...]]:
    """The module or state dict of a file, tdkit's text in it, and notes."""
    value, text = contents.value, contents.text
    if isinstance(value, nn.Module) or is_state(value):
        return value, text, ()
    if not isinstance(value, Mapping):
        raise UnreadableFileError(
            f"{path} holds a {shown(type(value).__name__)}, not a model",
            "save the model or its state_dict with torch.save",
        )
    if set(value) == {"state_dict", KEY} and is_state(value["state_dict"]):
        return value["state_dict"], value[KEY], ()
    name, entry = find_entry(value, path)
    return entry, text, (f"took the entry {shown(name)!r} of a training checkpoint",)


def _whole_model(
    model: nn.Module,
    path: Path,
    description: Description,
    notes: tuple[str, ...],
    arch: str | None,
    unsafe: bool,
) -> LoadedModel:
    check_module(model, path, trusted=unsafe)
    while isinstance(model, nn.DataParallel) and model._modules.get("module") is not None:
        model = model.get_submodule("module")
        notes = (*notes, "unwrapped DataParallel")
    if arch is not None:
        notes = (
            *notes,
            f"{option('arch', shown(arch))} was not needed: the file holds a whole model",
        )
    return LoadedModel(
        model=model,
        source=str(path),
        format="module",
        arch=description.arch,
        input_shape=description.input_shape,
        plan=description.plan,
        notes=notes,
        structure=description.structure,
        arch_options=description.arch_options,
    )


def _from_state(
    state: Mapping[str, Tensor],
    path: Path,
    models: Mapping[str, ModelRecord],
    arch: str | None,
    description: Description,
) -> LoadedModel:
    named = arch if arch is not None else _stored_arch(description, models, path)
    notes: tuple[str, ...] = ()
    if named is None:
        name, found = recognise(models, description.structure, state, path)
        chosen = _arch(name, models)
        notes = (f"recognised {name} from its names and shapes",)
    else:
        chosen = _arch(named, models)
        found = _fitted(chosen, state, path, description)
    model = fill(found, chosen.create, description.structure).eval()
    return LoadedModel(
        model=model,
        source=str(path),
        format="state-dict",
        arch=chosen.name,
        input_shape=description.input_shape or _input_shape(chosen, found.options),
        plan=description.plan,
        notes=(*notes, *_stripped_note(found), *_options_note(found)),
        structure=description.structure,
        arch_options=found.options,
    )


def _stored_arch(
    description: Description, models: Mapping[str, ModelRecord], path: Path
) -> str | None:
    """The architecture that a file says it has, if that is a registered name."""
    stored = description.arch
    if stored is None or _registered_name(stored, models) is not None:
        return stored
    if ":" in stored:
        raise UsageError(
            f"{path} was made from {shown(stored)}, which tdkit does not import on a file's word",
            f"if that is your code: {option('arch', shown(stored))}",
        )
    raise UsageError(
        f"{path} was made from {shown(stored)}, which is not a registered model here",
        f"install the plugin that provides it, or give {option('arch', 'package.module:callable')}",
    )


def _fitted(
    chosen: _Arch, state: Mapping[str, Tensor], path: Path, description: Description
) -> Fit:
    options: Mapping[str, int] = {}
    if description.arch is not None and _canonical(description.arch) == _canonical(chosen.name):
        options = _bounded(description.arch_options, state, path)
    try:
        found = fit(chosen.create, options, description.structure, state)
    except TdkitError as error:
        raise type(error)(f"{path}: {error}", error.hint) from error
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"{option('arch', chosen.name)}: calling it failed: {type(error).__name__}: "
            f"{shown(error, 200)}",
            "it must return the model and work without arguments",
        ) from error
    if isinstance(found, Misfit):
        raise _does_not_fit(path, chosen.name, found)
    return found


def _bounded(
    options: Mapping[str, int], state: Mapping[str, Tensor], path: Path
) -> Mapping[str, int]:
    """A file cannot ask for more channels or classes than some tensor in it has."""
    largest = max(max(tensor.shape, default=0) for tensor in state.values())
    if any(count > largest for count in options.values()):
        raise UnreadableFileError(
            f"{path} asks for {listed(options.values())} channels or classes, but its largest "
            f"tensor has {largest:,} rows",
            "write the file again with tdkit",
        )
    return options


def _arch(name: str, models: Mapping[str, ModelRecord]) -> _Arch:
    registered = _registered_name(name, models)
    if registered is not None:
        record = models[registered]
        return _Arch(registered, record.create, record.input_shape)
    if ":" not in name:
        raise _unknown_name("architecture", name, models)
    create = import_named(name, "arch")
    if not callable(create):
        raise UsageError(
            f"{option('arch', name)} names a value of type {type(create).__name__}, not a function "
            "or class",
            "name what returns the model when it is called",
        )

    def checked(**options: int) -> nn.Module:
        model = create(**options)
        if not isinstance(model, nn.Module):
            raise UsageError(
                f"{option('arch', name)} returned a {type(model).__name__}, not a torch.nn.Module",
                "name what returns the model when it is called",
            )
        return model

    return _Arch(name, checked, None)


def _load_registered(source: str, record: ModelRecord, weights: str | None) -> LoadedModel:
    chosen = _weights_name(record, weights)
    options: Mapping[str, int] = {}
    training: Mapping[str, Any] | None = None
    if chosen is None:
        model = _created(record)
        note = f"{record.name} has random weights"
    else:
        state = _fetch(record, chosen)
        found = fit(lambda **options: _created(record, **options), {}, {}, state)
        if isinstance(found, Misfit):
            raise UnreadableFileError(
                f"the weights {chosen} do not fit {record.name}: {found.describe()}", _no_network()
            )
        model, options = fill(found, record.create, {}), found.options
        note = f"{record.name} has the weights {chosen}"
        if chosen in record.recipes:
            training = {"recipe": record.recipes[chosen]()}
    return LoadedModel(
        model=model.eval(),
        source=source,
        format="registered",
        arch=record.name,
        input_shape=record.input_shape,
        notes=(note,),
        arch_options=options,
        training=training,
    )


def _created(record: ModelRecord, **options: int) -> nn.Module:
    try:
        return record.create(**options)
    except TdkitError:
        raise
    except Exception as error:
        raise UsageError(
            f"the registered model {record.name} cannot be made: {type(error).__name__}: "
            f"{shown(error, 200)}",
            f"tell the author of the plugin; {command('plugins')} names it",
        ) from error


def _weights_name(record: ModelRecord, weights: str | None) -> str | None:
    if weights is None:
        return next(iter(record.weights), None)
    if weights.lower() == "none":
        return None
    by_name = {_canonical(name): name for name in record.weights}
    if _canonical(weights) not in by_name:
        raise UsageError(
            f"{record.name} has no weights called {shown(weights)}",
            f"choose from: {', '.join([*record.weights, 'none'])}",
        )
    return by_name[_canonical(weights)]


def _fetch(record: ModelRecord, chosen: str) -> Mapping[str, Tensor]:
    try:
        return record.weights[chosen]()
    except (OSError, http.client.HTTPException) as error:
        raise UnreadableFileError(
            f"the weights {chosen} of {record.name} cannot be fetched: there is no network, or "
            f"its server does not answer ({shown(error) or type(error).__name__})",
            _no_network(),
        ) from error
    except (RuntimeError, ValueError, EOFError) as error:
        raise UnreadableFileError(
            f"the weights {chosen} of {record.name} are damaged: {shown(error, 200)}", _no_network()
        ) from error


def _no_network() -> str:
    return f"{option('weights', 'none')} uses random weights; or give a file with the weights"


def _does_not_fit(path: Path, name: str, misfit: Misfit) -> UnreadableFileError:
    return UnreadableFileError(
        f"{path} does not fit {name}: {misfit.describe()}",
        "name the architecture that the weights come from",
    )


def _unknown_name(what: str, name: str, models: Mapping[str, ModelRecord]) -> UsageError:
    close = close_names(_canonical(name), models)
    return UsageError(
        f"{shown(name)!r} is not a registered {what}"
        + (", and there is no such file" if what == "model" else ""),
        f"did you mean {' or '.join(close)}?"
        if close
        else f"{command('plugins')} lists the models",
    )


def _registered_name(name: str, models: Mapping[str, ModelRecord]) -> str | None:
    if name in models:
        return name
    return _canonical(name) if _canonical(name) in models else None


def _canonical(name: str) -> str:
    return name.strip().lower().replace("_", "-")


def _is_file(path: Path) -> bool:
    try:
        return path.exists() and not path.is_dir()
    except (OSError, ValueError):
        return False


def _looks_like_path(text: str, path: Path) -> bool:
    if "/" in text or "\\" in text or path.suffix.lower() in _SUFFIXES:
        return True
    return text.strip() != "" and (path.is_dir() or path.is_symlink())


def _input_shape(chosen: _Arch, options: Mapping[str, int]) -> tuple[int, ...] | None:
    shape = chosen.input_shape
    if shape and "in_channels" in options:
        return (options["in_channels"], *shape[1:])
    return shape


def _stripped_note(found: Fit) -> tuple[str, ...]:
    return (f"stripped the prefix {found.stripped} from the names",) if found.stripped else ()


def _options_note(found: Fit) -> tuple[str, ...]:
    return tuple(f"the weights have {name}={count}" for name, count in found.options.items())


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)
