"""What callers hand to the Python functions, checked and of one form: one of a thing is a list."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from tdkit.compression.plan import Plan, read_plan
from tdkit.errors import UsageError, option
from tdkit.forward.inputs import Inputs, readings

_T = TypeVar("_T")


def names(value: object, key: str) -> tuple[str, ...]:
    """Names or shell patterns; a string is one.

    Raises:
        UsageError: If it is anything else.
    """
    if isinstance(value, str):
        return (value,)
    found = tuple(value) if isinstance(value, Iterable) else (value,)
    if not all(isinstance(name, str) for name in found):
        raise UsageError(f"{key}={_shown(value)} is no list of names", f'write {key}=["…", "…"]')
    return found


def methods(value: object) -> tuple[str, ...]:
    """Names of decompositions, at least one.

    Raises:
        UsageError: If it is anything else.
    """
    return _some(names(value, "methods"), "methods", '["svd", "tucker"]')


def keeps(value: object) -> tuple[float, ...]:
    """Fractions of a layer's parameters; see :func:`fractions`."""
    return fractions(value, "keeps")


def fractions(value: object, key: str) -> tuple[float, ...]:
    """Fractions, at least one; a number is one. Whether they are in range is for others to check.

    Raises:
        UsageError: If it is anything else.
    """
    try:
        found = tuple(map(_number, _parts(value)))
    except (TypeError, ValueError, RuntimeError):  # the last is a tensor's
        raise UsageError(
            f"{key}={_shown(value)} is no list of fractions", f"write {key}=[0.5, 0.25]"
        ) from None
    return _some(found, key, "[0.5, 0.25]")


def bounds(value: object) -> dict[str, Any]:
    """What may remain of costs, by their names. Whether it is in range is for others to check.

    Raises:
        UsageError: If it is anything else.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise UsageError(f"bounds={_shown(value)} are no bounds", 'write bounds={"macs": 0.5}')
    return dict(value)


def seed(value: object) -> int:
    """A whole number, also one of NumPy's.

    Raises:
        UsageError: If it is anything else.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise UsageError(f"the seed {value!r} is not a whole number", "write seed=0") from None


def batches(value: object) -> Sequence[Any]:
    """Batches of model inputs, tensors of any shape; a tensor is one batch, and None are none.

    Raises:
        UsageError: If it is no list, or holds what is no batch.
    """
    if value is None:
        return ()
    if isinstance(value, Tensor | Inputs):
        return (value,)
    if not isinstance(value, list | tuple):
        raise UsageError(
            f"{option('data')}{_shown(value)} is no list of batches",
            "of a DataLoader take the inputs alone: data=[images for images, labels in loader]",
        )
    for batch in value:
        if not (isinstance(batch, Tensor | Inputs | list | tuple | Mapping) or is_dataclass(batch)):
            raise UsageError(
                f"a batch of data is a {type(batch).__name__}",
                "make each a tensor, or a tuple or dict of the arguments that the model takes",
            )
    return value


def example(value: object) -> Any:
    """The arguments of a forward pass, tensors of any shape, nested in any way.

    Raises:
        UsageError: If there is no tensor among them.
    """
    if not any(inputs.tensors for inputs in readings(value)):
        raise UsageError(
            f"{option('example_inputs')}{_shown(value)} are no arguments of a forward pass",
            "make them a tensor, or a tuple or dict of the arguments that the model takes",
        )
    return value


def shape(value: object) -> tuple[int, ...]:
    """The shape of one sample; a text such as 3,224,224 or 3x224x224 is one.

    Raises:
        UsageError: If it is no list of whole numbers of at least 1.
    """
    parts: Any = value.replace("x", ",").split(",") if isinstance(value, str) else value
    try:
        found = tuple(int(n) if isinstance(n, str) else operator.index(n) for n in parts)
    except (TypeError, ValueError):
        found = ()
    if not found or min(found) < 1:
        raise UsageError(
            f"{option('input_shape', value if isinstance(value, str) else None)}"
            f"{'' if isinstance(value, str) else _shown(value)} is not a shape",
            f"write it without the batch: {option('input_shape', (3, 224, 224))}",
        )
    return found


def plan(value: object) -> Plan:
    """A plan, also from a file that is named.

    Raises:
        UnreadableFileError: If the file is missing or not JSON.
        UsageError: If it is neither a plan nor the name of a file with one.
    """
    if isinstance(value, Plan):
        return value
    if isinstance(value, str | os.PathLike):
        return read_plan(Path(value))
    raise UsageError(
        f"a {type(value).__name__} is no plan",
        "give a tdkit.Plan or the path of its file, then the model: tdkit.apply(plan, model)",
    )


def source(value: object) -> str | Path:
    """What names a model.

    Raises:
        UsageError: If it is neither a string nor a path.
    """
    if isinstance(value, str | Path):
        return value
    raise UsageError(
        f"a {type(value).__name__} does not name a model",
        "give the path of a model file, or the name of a registered model",
    )


def _parts(value: Any) -> tuple[Any, ...]:
    """The parts of a list, or the one thing that it is; scalar arrays and tensors are one."""
    if isinstance(value, str):
        return (value,)
    try:
        return tuple(value)
    except TypeError:
        return (value,)


def _number(value: Any) -> float:
    if isinstance(value, str | bytes):
        raise TypeError
    return float(value)


def _some(found: tuple[_T, ...], key: str, example: str) -> tuple[_T, ...]:
    if not found:
        raise UsageError(f"{key} is an empty list", f"write {key}={example}, or leave it out")
    return found


def _shown(value: object, most: int = 40) -> str:
    plain = isinstance(value, str | int | float | list | tuple | None)
    return text if plain and len(text := repr(value)) <= most else f"<{type(value).__name__}>"
