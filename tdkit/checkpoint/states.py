"""State dicts: find them, match them with an architecture, put them into it.

Everything is compared by names and shapes before a single weight of the model is allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tdkit.checkpoint.text import listed, shown
from tdkit.errors import UnreadableFileError, option
from tdkit.layers.stages import Stage

State = Mapping[str, Tensor]
Structure = Mapping[str, tuple[Stage, ...]]
Shape = tuple[int, ...]

_USUAL_ENTRIES = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "module",
    "weights",
    "params",
)


# Beyond any setting of an optimizer; a whole number may be too large to be a float at all.
_MOST = 1e18


@dataclass(frozen=True)
class Misfit:
    """How a state dict differs from what a model expects.

    Args:
        missing: Names that the file lacks.
        unexpected: Names that the model lacks.
        misshapen: Name to the shape in the model and the shape in the file.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: Mapping[str, tuple[Shape, Shape]]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshapen)

    def describe(self) -> str:
        """One phrase that names the first few differences."""
        parts = []
        if self.missing:
            parts.append(f"it lacks {listed(self.missing)}")
        if self.unexpected:
            parts.append(f"it has the unexpected {listed(self.unexpected)}")
        shapes = [
            f"{name} {_times(found)} instead of {_times(expected)}"
            for name, (expected, found) in self.misshapen.items()
        ]
        if shapes:
            parts.append(f"it has {listed(shapes)}")
        return "; ".join(parts)


@dataclass(frozen=True)
class Fit:
    """A model whose names and shapes are those of a state dict.

    Args:
        model: The model, its weights not yet loaded and some on the meta device.
        options: The keywords it was made with.
        state: The state dict, its prefixes stripped as needed.
        stripped: The prefix that was stripped, or an empty text.
    """

    model: nn.Module
    options: Mapping[str, int]
    state: State
    stripped: str


def is_state(value: object) -> bool:
    """Whether a value is a state dict: a mapping of names to tensors.

    Args:
        value: Anything.
    """
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(key, str) for key in value)
        and all(isinstance(entry, Tensor) for entry in value.values())
    )


def find_entry(checkpoint: Mapping[Any, Any], source: object) -> tuple[str, Any]:
    """The entry of a training checkpoint that holds the weights, and its name.

    Args:
        checkpoint: What the file holds.
        source: The file, for messages.

    Raises:
        UnreadableFileError: If no entry does, or several do and none has a usual name.
    """
    found = {
        str(key): value
        for key, value in checkpoint.items()
        if is_state(value) or isinstance(value, nn.Module)
    }
    usual = [name for name in _USUAL_ENTRIES if name in found]
    if len(found) == 1 or usual:
        name = usual[0] if usual else next(iter(found))
        return name, found[name]
    hint = "save the part with the weights alone: torch.save(checkpoint[KEY], path)"
    if found:
        raise UnreadableFileError(f"{source} holds several state dicts: {listed(found, 8)}", hint)
    keys = listed(checkpoint, 8) if checkpoint else "nothing"
    raise UnreadableFileError(f"{source} holds no state dict, only: {keys}", hint)


def find_optimizer(checkpoint: object) -> dict[str, bool | int | float] | None:
    """The settings that an optimizer ended with, from its state dict in a training checkpoint.

    Args:
        checkpoint: What the file holds.

    Returns:
        The numbers of the parameter group with the lowest learning rate above zero, such as
        ``lr`` and ``momentum``; None when there is no such group.
    """
    entries = list(checkpoint.values()) if isinstance(checkpoint, Mapping) else []
    entries += [item for entry in entries if isinstance(entry, list) for item in entry]
    states = [entry.get("param_groups") for entry in entries if isinstance(entry, Mapping)]
    groups = [group for state in states if isinstance(state, list) for group in state]
    found = [numbers for group in groups if (numbers := _numbers(group)).get("lr", 0) > 0]
    return min(found, key=lambda numbers: numbers["lr"], default=None)


def _numbers(group: object) -> dict[str, bool | int | float]:
    """The numbers among some settings; whatever else a file puts there is left out."""
    items = group.items() if isinstance(group, Mapping) else ()
    return {
        name: value
        for name, value in items
        if isinstance(name, str) and isinstance(value, int | float) and abs(value) < _MOST
    }


def build_light(create: Callable[..., nn.Module], options: Mapping[str, int]) -> nn.Module:
    """Make a model without allocating or initialising its larger weights, where that works.

    Args:
        create: Returns the model.
        options: Keywords for it.
    """
    with torch.random.fork_rng(devices=()):
        try:
            with _EmptyOnMeta():
                return create(**options)
        except Exception:
            return create(**options)


def fit(
    create: Callable[..., nn.Module],
    options: Mapping[str, int],
    structure: Structure,
    state: State,
) -> Fit | Misfit:
    """Match a state dict with an architecture, other channel and class counts included.

    Args:
        create: Returns the model; called with ``options``, and again with the ``in_channels`` and
            ``num_classes`` that the shapes in ``state`` ask for.
        options: Keywords to begin with.
        structure: What stands in the place of replaced layers.
        state: The state dict.

    Raises:
        UnreadableFileError: If ``structure`` names a layer that the architecture lacks.
    """
    first = _fit_once(create, options, structure, state)
    if isinstance(first, Fit):
        return first
    wanted = _options_for(first)
    if not wanted:
        return first
    try:
        second = _fit_once(create, {**options, **wanted}, structure, state)
    except Exception:
        return first
    return second if isinstance(second, Fit) else first


def expected_shapes(model: nn.Module, structure: Structure) -> dict[str, Shape]:
    """The names and shapes of a model's state dict after layers are replaced.

    Args:
        model: The model before that.
        structure: What stands in the place of replaced layers.

    Raises:
        UnreadableFileError: If the model lacks a layer that ``structure`` names, or nothing is to
            stand where another thing is than a BatchNorm, which may be folded.
    """
    shapes = {
        name: tuple(value.shape)
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor)
    }
    for name in sorted(structure, key=_depth):
        prefix = f"{name}." if name else ""
        replaced = [key for key in shapes if key.startswith(prefix)]
        if not replaced:
            raise UnreadableFileError(
                f"the file replaces a layer {shown(name)} that the architecture does not have",
                f"name the architecture that it was made from with {option('arch')}",
            )
        if not structure[name] and f"{prefix}running_mean" not in replaced:
            raise UnreadableFileError(
                f"the file puts nothing in the place of {shown(name)}, which is no BatchNorm",
                "write the file again with this version of tdkit, or pass the plain state_dict",
            )
        for key in replaced:
            del shapes[key]
        for position, stage in enumerate(structure[name]):
            for parameter, shape in stage.state_shapes.items():
                shapes[f"{prefix}{position}.{parameter}"] = shape
    return shapes


def compare(expected: Mapping[str, Shape], state: State) -> Misfit:
    """How a state dict differs from the expected names and shapes.

    Args:
        expected: Names and shapes of the model.
        state: The state dict.
    """
    return Misfit(
        missing=tuple(name for name in expected if name not in state),
        unexpected=tuple(name for name in state if name not in expected),
        misshapen={
            name: (shape, tuple(state[name].shape))
            for name, shape in expected.items()
            if name in state and tuple(state[name].shape) != shape
        },
    )


def fill(found: Fit, create: Callable[..., nn.Module] | None, structure: Structure) -> nn.Module:
    """Put the weights in: the file's tensors become the model's, with their dtype.

    Args:
        found: What :func:`fit` returned.
        create: Makes the model anew if some of it is still on the meta device afterwards.
        structure: What stands in the place of replaced layers.

    Raises:
        UnreadableFileError: If torch refuses the tensors.
    """
    model = _assigned(replace_layers(found.model, structure), found.state)
    if create is not None and _has_meta(model):
        model = _assigned(replace_layers(create(**found.options), structure), found.state)
    return model


def replace_layers(model: nn.Module, structure: Structure) -> nn.Module:
    """Replace layers by sequences of unallocated stages, at every place a shared layer stands.

    Args:
        model: Changed in place.
        structure: What to put where.
    """
    for name in sorted(structure, key=_depth):
        stages = nn.Sequential(*(stage.build(device="meta") for stage in structure[name]))
        if not name:
            return stages
        old = model.get_submodule(name)
        stages.train(old.training)
        for place in _places(model, old):
            parent, _, child = place.rpartition(".")
            model.get_submodule(parent)._modules[child] = stages
    return model


class _EmptyOnMeta(TorchFunctionMode):
    """Send ``torch.empty``, with which torch's layers make their weights, to the meta device."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _fit_once(
    create: Callable[..., nn.Module],
    options: Mapping[str, int],
    structure: Structure,
    state: State,
) -> Fit | Misfit:
    model = build_light(create, options)
    return match(model, options, structure, state)


def match(
    model: nn.Module, options: Mapping[str, int], structure: Structure, state: State
) -> Fit | Misfit:
    """Compare a state dict with a model, with and without the prefixes that wrappers add.

    Args:
        model: The model.
        options: The keywords it was made with.
        structure: What stands in the place of replaced layers.
        state: The state dict.

    Raises:
        UnreadableFileError: If ``structure`` names a layer that the model lacks.
    """
    expected = expected_shapes(model, structure)
    misfits = []
    for stripped, variant in _variants(state):
        variant = {**_old_counters(expected, variant), **variant}
        misfit = compare(expected, variant)
        if not misfit:
            return Fit(model, options, variant, stripped)
        misfits.append(misfit)
    return min(misfits, key=lambda misfit: len(misfit.missing) + len(misfit.unexpected))


def _variants(state: State) -> list[tuple[str, State]]:
    """The state dict as it is, and without the prefixes that wrappers put before every name.

    These are DataParallel's, torch.compile's and those of averaged models; then any other that all
    names share, such as the ``model.`` of training frameworks.
    """
    variants = [("", state)]
    current = {name: value for name, value in state.items() if name != "n_averaged"}
    stripped = []
    renamed = {name.replace("_orig_mod.", ""): value for name, value in current.items()}
    if len(renamed) == len(current) and renamed.keys() != current.keys():
        current = renamed
        stripped.append("_orig_mod.")
    while current and all(name.startswith("module.") for name in current):
        current = {name[len("module.") :]: value for name, value in current.items()}
        stripped.append("module.")
    if stripped:
        variants.append((" and ".join(dict.fromkeys(stripped)), current))
    first = next(iter(current), "").partition(".")[0] + "."
    if all(name.startswith(first) and name != first for name in current):
        shorter = {name[len(first) :]: value for name, value in current.items()}
        variants.append((" and ".join([*dict.fromkeys(stripped), first]), shorter))
    return variants


def _old_counters(expected: Mapping[str, Shape], state: State) -> State:
    """The batch counters that BatchNorm did not store before torch 0.4.1."""
    return {
        name: torch.tensor(0)
        for name, shape in expected.items()
        if name.endswith(".num_batches_tracked") and shape == () and name not in state
    }


def _options_for(misfit: Misfit) -> dict[str, int]:
    """The class and channel counts that would explain every difference in shape."""
    if misfit.missing or misfit.unexpected:
        return {}
    wanted: dict[str, set[int]] = {"num_classes": set(), "in_channels": set()}
    for expected, found in misfit.misshapen.values():
        if len(expected) != len(found) or not found:
            return {}
        if expected[1:] == found[1:]:
            wanted["num_classes"].add(found[0])
        elif expected[:1] + expected[2:] == found[:1] + found[2:]:
            wanted["in_channels"].add(found[1])
        else:
            return {}
    if any(len(counts) > 1 for counts in wanted.values()):
        return {}
    return {name: counts.pop() for name, counts in wanted.items() if counts}


def _assigned(model: nn.Module, state: State) -> nn.Module:
    ties = _ties(model)
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except Exception as error:
        raise UnreadableFileError(
            f"torch refuses the weights: {shown(error, 200)}", f"check {option('arch')}"
        ) from error
    for names in ties:
        _tie(model, names)
    return model


def _ties(model: nn.Module) -> list[list[str]]:
    """Names of parameters that are one object."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _tie(model: nn.Module, names: list[str]) -> None:
    first = model.get_parameter(names[0])
    for name in names[1:]:
        other = model.get_parameter(name)
        if other is first:
            continue
        if other.data_ptr() != first.data_ptr() and not torch.equal(other, first):
            raise UnreadableFileError(
                f"the architecture shares {shown(names[0])} and {shown(name)}, but the file holds "
                "two different weights",
                f"check {option('arch')}",
            )
        module, _, attribute = name.rpartition(".")
        model.get_submodule(module)._parameters[attribute] = first


def _has_meta(model: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def _places(model: nn.Module, module: nn.Module) -> list[str]:
    return [name for name, found in model.named_modules(remove_duplicate=False) if found is module]


def _depth(name: str) -> tuple[int, str]:
    return (name.count(".") + 1 if name else 0, name)


def _times(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "()"
