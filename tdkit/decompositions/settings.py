"""Settings of methods: what a constructor takes, by name and of the kind of its default."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from tdkit.decompositions.base import Decomposition
from tdkit.errors import UsageError, first_line
from tdkit.hookspecs import DecompositionRecord
from tdkit.recipes import Setting

# Where a method remembers what it was given.
_GIVEN = "_tdkit_settings"

# Where it remembers which it could have been given.
_TAKEN = "_tdkit_taken"


def settings_of(method: Decomposition) -> dict[str, Setting]:
    """What a method was created with, as far as it is plain: its defaults count as well.

    That is what :func:`create` was given, and what the method keeps under the names of its
    constructor's keywords. Of a method that :func:`create` made these are only what its record
    takes, so that whoever creates it anew can hand all of them over.
    """
    known = vars(method).get(_TAKEN, _keywords(type(method)))
    kept = {key: value for key, value in traits_of(method).items() if key in known}
    return {**vars(method).get(_GIVEN, {}), **kept}


def traits_of(method: Decomposition) -> dict[str, Setting]:
    """All plain values that a method keeps, settings and what follows from them."""
    return {
        key: value
        for key, value in vars(method).items()
        if not key.startswith("_") and isinstance(value, bool | int | float | str)
    }


def refuse_negative(**settings: float) -> None:
    """Refuse numbers below 0, and those that are none, where a constructor is handed them.

    Args:
        **settings: By the name of a setting.

    Raises:
        UsageError: Of the first that is one.
    """
    for key, value in settings.items():
        if not value >= 0:
            raise UsageError(f"the setting {key} must be at least 0, not {value:g}")


def by_method(value: object) -> dict[str, dict[str, Any]]:
    """Settings by the name of a method; none for None.

    Raises:
        UsageError: If it is no such mapping.
    """
    each = value if value is not None else {}
    if isinstance(each, Mapping) and all(isinstance(own, Mapping) for own in each.values()):
        return {str(name): dict(own) for name, own in each.items()}
    raise UsageError(f"settings are given by method, as {{'cp': {{'sweeps': 20}}}}, not {value!r}")


def create(record: DecompositionRecord, settings: Mapping[str, Setting]) -> Decomposition:
    """A method with some of its settings other than by default.

    Args:
        record: The method.
        settings: By the name of a keyword of ``create``, or of the constructor behind it.

    Raises:
        UsageError: If there is no such keyword, or its value is refused; the message names those
            that there are.
    """
    known = _taken(record)
    for key, value in settings.items():
        if key not in known:
            there = f"it has {', '.join(known)}" if known else "it has none"
            raise UsageError(f"{record.name} has no setting {key!r}", there)
        _check(record.name, key, value, known[key].default)
    made = _made(record, settings) if settings else record.create()
    if settings:
        vars(made)[_GIVEN] = dict(settings)
    vars(made)[_TAKEN] = frozenset(known).intersection(_keywords(type(made)))
    return made


def _made(record: DecompositionRecord, settings: Mapping[str, Setting]) -> Decomposition:
    try:
        return record.create(**settings)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"{record.name} does not take the settings {_listed(settings)}: {first_line(error)}"
        ) from error


def _taken(record: DecompositionRecord) -> dict[str, inspect.Parameter]:
    """What can be set: keywords of create, of the constructor where that is handed all of them."""
    parameters = inspect.signature(record.create).parameters.values()
    own = _keywords(record.create)
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return {**_keywords(type(record.create())), **own}
    return own


def _keywords(function: Callable[..., Decomposition]) -> dict[str, inspect.Parameter]:
    parameters = list(inspect.signature(function).parameters.values())
    return {p.name: p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def _check(method: str, key: str, value: object, default: Any) -> None:
    """A value must be of the kind of the default, a whole number serving as a float."""
    kind = type(default)
    if kind not in (bool, int, float, str) or type(value) is kind:
        return
    if kind is float and type(value) is int:
        return
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    raise UsageError(
        f"the setting {key} of {method} is {words[kind]}, not {value!r}",
        f"its default is {default}",
    )


def _listed(settings: Mapping[str, Setting]) -> str:
    return ", ".join(f"{key} = {value!r}" for key, value in settings.items())
