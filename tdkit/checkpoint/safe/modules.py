"""Look over a whole model that came out of a file, before anything calls it.

Reading cannot run code, but a file can still put together a model that misbehaves later: a method
replaced by an attribute, a hook, a module inside itself, a "submodule" that is not one.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from tdkit.checkpoint.text import shown
from tdkit.errors import TdkitError, UnreadableFileError, UnsafeFileError, UnsupportedError
from tdkit.layers.spec import KINDS, spec_of

if TYPE_CHECKING:
    from collections.abc import Mapping

_DEEPEST = 100
_MOST_MODULES = 100_000
_TABLES = ("_parameters", "_buffers", "_modules")
_BLANK: Mapping[str, Any] = vars(nn.Module())
_LAYERS = frozenset(KINDS.values())


def check_module(model: nn.Module, source: object, *, trusted: bool = False) -> None:
    """Check a model read from a file, without calling any of it.

    Args:
        model: The model.
        source: The file, for messages.
        trusted: Whether hooks and replaced methods are accepted.

    Raises:
        UnsafeFileError: If it carries hooks, or attributes in the place of methods.
        UnsupportedError: If a module contains itself, or modules nest too deep.
        UnreadableFileError: If it is not put together as torch does it.
    """
    pending: list[tuple[str, nn.Module, int]] = [("", model, 0)]
    seen: set[int] = set()
    visits = 0
    while pending:
        name, module, depth = pending.pop()
        visits += 1
        # Shared modules are visited once per path: a file can describe 2**100 paths in a few lines.
        if depth > _DEEPEST or visits > _MOST_MODULES:
            raise UnsupportedError(
                f"{source}: module {shown(name) or 'at the top'} contains itself, nests more than "
                f"{_DEEPEST} deep or stands in more than {_MOST_MODULES:,} places",
                "a model that tdkit can compress is a tree of modules",
            )
        if id(module) not in seen:
            seen.add(id(module))
            _check_one(shown(name) or "at the top", module, source, trusted)
        for child_name, child in module._modules.items():
            if child is not None:
                path = f"{name}.{child_name}" if name else child_name
                pending.append((path, child, depth + 1))
    if not trusted:
        _check_hidden(model, source, seen)


def _check_hidden(model: nn.Module, source: object, seen: set[int]) -> None:
    """Check modules that are reached through attributes, lists and the like alone."""
    pending: list[Any] = [model]
    visited: set[int] = set()
    while pending:
        value = pending.pop()
        if id(value) in visited or isinstance(value, type | torch.Tensor):
            continue
        visited.add(id(value))
        if isinstance(value, nn.Module) and id(value) not in seen:
            _check_one("in an attribute", value, source, trusted=False)
        if isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list | tuple | set):
            pending += value
        elif isinstance(value, functools.partial):
            pending += (value.func, *value.args, *value.keywords.values())
        elif not callable(value) or isinstance(value, nn.Module):
            pending += getattr(value, "__dict__", {}).values()


def _check_one(name: str, module: nn.Module, source: object, trusted: bool) -> None:
    where = f"{source}: module {name} ({shown(type(module).__name__)})"
    state = vars(module)
    _check_tables(where, state)
    if not trusted:
        _check_methods(where, module, state)
        for table in ("_parameters", "_buffers"):
            for tensor in state[table].values():
                _check_tensor(where, tensor)
        if type(module) in _LAYERS:
            _check_layer(where, module)


def _check_tables(where: str, state: dict[str, Any]) -> None:
    for key, blank in _BLANK.items():
        if key not in state or (blank is not None and type(state[key]) not in _kinds(blank)):
            _forged(where, f"it lacks the {key} that every module has")
    tables = [state[table] for table in _TABLES]
    for table in tables:
        if not all(isinstance(key, str) and "." not in key and key for key in table):
            _forged(where, "the names in it are not names")
    parameters, buffers, modules = (list(table.values()) for table in tables)
    if not all(value is None or isinstance(value, nn.Parameter) for value in parameters):
        _forged(where, "one of its parameters is not a parameter")
    if not all(value is None or isinstance(value, torch.Tensor) for value in buffers):
        _forged(where, "one of its buffers is not a tensor")
    if not all(value is None or isinstance(value, nn.Module) for value in modules):
        _forged(where, "one of its submodules is not a module")


def _kinds(blank: object) -> tuple[type, ...]:
    return (dict, OrderedDict) if isinstance(blank, dict) else (type(blank),)


def _check_methods(where: str, module: nn.Module, state: dict[str, Any]) -> None:
    cls = type(module)
    for key, value in state.items():
        if ((key.startswith("_") and "hooks" in key) or key == "_compiled_call_impl") and value:
            raise UnsafeFileError(
                f"{where} carries hooks ({shown(key)}), which are code stored in the file",
                "save the model without hooks, or its state_dict",
            )
        inherited = getattr(cls, key, None)
        if isinstance(inherited, property) or (
            callable(inherited) and not isinstance(inherited, type)
        ):
            raise UnsafeFileError(
                f"{where} replaces its method {shown(key)} by something stored in the file",
                "save the model without changed methods, or its state_dict",
            )


def _check_tensor(where: str, tensor: Any) -> None:
    if tensor is not None and getattr(tensor, "_backward_hooks", None):
        raise UnsafeFileError(
            f"{where} has a weight with hooks, which are code stored in the file",
            "save the model's state_dict",
        )


def _check_layer(where: str, module: nn.Module) -> None:
    try:
        spec = spec_of(module)
        reason = spec.check()
        weight, bias = (module._parameters[name] for name in ("weight", "bias"))
    except (TdkitError, AttributeError, TypeError, KeyError, ValueError) as error:
        _forged(where, "it lacks what such a layer has", error)
    if reason is not None:
        _forged(where, reason)
    if weight is not None and tuple(weight.shape) != spec.weight_shape:
        _forged(
            where,
            f"its weight has the shape {tuple(weight.shape)}, not {spec.weight_shape}",
        )
    if bias is not None and tuple(bias.shape) != (spec.out_channels,):
        _forged(where, f"its bias has the shape {tuple(bias.shape)}, not ({spec.out_channels},)")


def _forged(where: str, reason: str, cause: Exception | None = None) -> NoReturn:
    raise UnreadableFileError(
        f"{where} is damaged or forged: {reason}", "save the model again where it was made"
    ) from cause
