"""What callers hand to the Python functions, checked and of one form: one of a thing is a list."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tdkit.errors import UsageError
from tdkit.plans import Plan, read_plan


def names(value: object, option: str) -> tuple[str, ...]:
    """Names or shell patterns; a string is one.

    Raises:
        UsageError: If it is anything else.
    """
    if isinstance(value, str):
        return (value,)
    found = tuple(value) if isinstance(value, Iterable) else (value,)
    if not all(isinstance(name, str) for name in found):
        raise UsageError(
            f"{option}={_shown(value)} is no list of names", f'write {option}=["…", "…"]'
        )
    return found


def fractions(value: object, option: str) -> tuple[float, ...]:
    """Fractions in a list; a number is one. Whether they are in range is for others to check.

    Raises:
        UsageError: If it is anything else.
    """
    if isinstance(value, int | float):
        return (value,)
    if isinstance(value, Iterable) and not isinstance(value, str):
        return tuple(value)
    raise UsageError(
        f"{option}={_shown(value)} is no list of fractions", f"write {option}=[0.5, 0.25]"
    )


def batches(value: object) -> Sequence[Tensor | Sequence[Any]]:
    """Batches of model inputs; a tensor is one batch.

    Raises:
        UsageError: If it is no list, or holds what is no batch.
    """
    if isinstance(value, Tensor):
        return (value,)
    if not isinstance(value, list | tuple):
        raise UsageError(
            f"data={_shown(value)} is no list of batches",
            "of a DataLoader take the inputs alone: data=[images for images, labels in loader]",
        )
    for batch in value:
        if not isinstance(batch, Tensor | list | tuple):
            raise UsageError(
                f"a batch of data is a {type(batch).__name__}",
                "make each a tensor, or a tuple of the arguments that the model takes",
            )
    return value


def example(value: object) -> Sequence[Any]:
    """The arguments of a forward pass; a tensor is the only one.

    Raises:
        UsageError: If it is neither a tensor nor a list of arguments.
    """
    if isinstance(value, Tensor):
        return (value,)
    if isinstance(value, list | tuple):
        return value
    raise UsageError(
        f"example_inputs={_shown(value)} are no arguments of a forward pass",
        "make them a tensor, or a tuple of the arguments that the model takes, in order",
    )


def shape(value: object) -> tuple[int, ...]:
    """The shape of one sample.

    Raises:
        UsageError: If it is no list of whole numbers.
    """
    try:
        return tuple(map(operator.index, value))  # type: ignore[call-overload]
    except TypeError:
        raise UsageError(
            f"input_shape={_shown(value)} is no shape",
            "write it without the batch: input_shape=(3, 224, 224)",
        ) from None


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


def _shown(value: object, most: int = 40) -> str:
    plain = isinstance(value, str | int | float | list | tuple | None)
    return text if plain and len(text := repr(value)) <= most else f"<{type(value).__name__}>"
