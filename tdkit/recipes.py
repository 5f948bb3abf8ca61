"""Recipes: TOML files read into frozen dataclasses, where an unknown key is an error."""

from __future__ import annotations

import math
import sys
import types
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from tdkit.errors import UnreadableFileError, UsageError, close_names, unknown_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")

Setting = bool | int | float | str
"""The plain values that a setting of a method, or an option of a recipe, may have."""

BUNDLED = Path(__file__).parent / "assets" / "recipes"
"""The recipes that come with tdkit: studies, and the trainings of the models that they are about.

In the repository it is a link to the folder ``recipes``, of which a package holds copies.
"""


def find_recipe(text: str) -> Path:
    """A recipe file, or a bare name of one in the folder recipes or, after that, of tdkit's own.

    Args:
        text: The path or the name.

    Raises:
        UsageError: If a bare name is unknown; the message has the close ones.
    """
    path = Path(text)
    if path.suffix == ".toml" or path.name != text or path.is_file():
        return path
    folders = (BUNDLED, Path("recipes"))
    known = {p.stem: p for folder in folders for p in sorted(folder.glob("*.toml"))}
    if text not in known:
        raise unknown_name(text, list(known), "recipe, and no file,")
    return known[text]


def load_recipe(path: Path, cls: type[T]) -> T:
    """Read a TOML file into a dataclass.

    Args:
        path: The file.
        cls: A dataclass whose fields are str, int, float, bool, Literal, tuples of one type,
            other such dataclasses, classes with a ``from_table``, or one of these or None.

    Returns:
        An instance of ``cls``.

    Raises:
        UnreadableFileError: The file cannot be read.
        UsageError: It is not TOML; or a key is unknown, missing, or has a wrong type or value.
            The message names the file and the key, the hint the close names.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableFileError(f"the recipe {path} cannot be read: {error}") from error
    return parse_recipe(text, cls, str(path))


def parse_recipe(text: str, cls: type[T], source: str) -> T:
    """Do what :func:`load_recipe` does with the text of a file.

    Args:
        text: The TOML.
        cls: See :func:`load_recipe`.
        source: What the text is called in messages.

    Raises:
        UsageError: As for :func:`load_recipe`.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{source} is not valid TOML: {error}") from error
    try:
        return _record(cls, table, "")
    except UsageError as error:
        raise UsageError(f"{source}: {error}", error.hint) from error


def _record(cls: type[T], table: dict[str, Any], prefix: str) -> T:
    types_of = get_type_hints(cls)
    known = {entry.name: entry for entry in fields(cls)}  # type: ignore[arg-type]
    for key in table:
        if key not in known:
            raise UsageError(f"unknown key {prefix}{key}", _suggestion(key, list(known)))
    for key, entry in known.items():
        required = entry.default is MISSING and entry.default_factory is MISSING
        if required and key not in table:
            raise UsageError(
                f"the key {prefix}{key} is missing", f"Add it: {_wanted(types_of[key])}."
            )
    values = {key: _value(types_of[key], value, prefix + key) for key, value in table.items()}
    try:
        return cls(**values)
    except UsageError as error:
        raise UsageError(f"{prefix}{error}", error.hint) from error


def _value(wanted: Any, value: Any, key: str) -> Any:
    if get_origin(wanted) in (Union, types.UnionType):
        wanted = next(part for part in get_args(wanted) if part is not type(None))
    if hasattr(wanted, "from_table") and isinstance(value, dict):
        return wanted.from_table(value, key)
    if is_dataclass(wanted) and isinstance(value, dict):
        return _record(wanted, value, f"{key}.")  # type: ignore[arg-type]
    if get_origin(wanted) is tuple and isinstance(value, list):
        return tuple(_value(get_args(wanted)[0], item, key) for item in value)
    if get_origin(wanted) is Literal:
        return _choice(get_args(wanted), value, key)
    # A TOML integer serves where a float is wanted; type() keeps True from passing as 1.
    if wanted is float and type(value) is int:
        return float(value)
    if wanted is float and isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{key} must be a finite number, not {value!r}")
    if type(value) is not wanted:
        raise UsageError(f"{key} must be {_wanted(wanted)}, not {value!r}")
    return value


def _choice(choices: tuple[Any, ...], value: object, key: str) -> object:
    if value not in choices:
        names = ", ".join(map(str, choices))
        raise UsageError(
            f"{key} must be one of {names}, not {value!r}", _suggestion(value, choices)
        )
    return value


def _wanted(wanted: Any) -> str:
    words = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
    if get_origin(wanted) is Literal:
        return "one of " + ", ".join(map(str, get_args(wanted)))
    if get_origin(wanted) is tuple:
        return "a list"
    return words.get(wanted, "a table")


def _suggestion(name: object, known: Any) -> str:
    close = close_names(str(name), [str(item) for item in known])
    if close:
        return "Did you mean " + " or ".join(close) + "?"
    return "Possible: " + ", ".join(map(str, known)) + "."


def require(key: str, value: object, good: bool, rule: str) -> None:
    """Refuse a value of a recipe that breaks a rule.

    Raises:
        UsageError: Naming the key, the rule and the value.
    """
    if not good:
        raise UsageError(f"{key} must be {rule}, not {value!r}")
