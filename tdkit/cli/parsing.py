"""From what the user typed to what the library takes, and back to JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from tdkit.errors import UsageError


def parse_fraction(text: str, option: str) -> float:
    """Read 0.5 or 50%.

    Raises:
        UsageError: If it is no fraction above 0 and at most 1.
    """
    number = text.strip()
    try:
        value = float(number.removesuffix("%")) / (100 if number.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise UsageError(
            f"{option} {text!r} is not a fraction above 0 and at most 1",
            f"it is what may remain: {option} 0.5 or {option} 50% keeps at most half",
        )
    return value


def parse_names(text: str | None, option: str) -> list[str] | None:
    """Read a comma-separated list; None stays None.

    Raises:
        UsageError: If it names nothing.
    """
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError(f"{option} {text!r} names nothing", "separate names by commas")
    return names


def parse_keeps(text: str | None) -> list[float] | None:
    """Read keeps such as 0.5,0.25; None stays None.

    Raises:
        UsageError: If one is no fraction.
    """
    names = parse_names(text, "--keeps")
    return None if names is None else [parse_fraction(keep, "--keeps") for keep in names]


def parse_bounds(texts: Sequence[str] | None) -> dict[str, float]:
    """Read bounds such as macs=0.5.

    Raises:
        UsageError: If one has another form, is no fraction, or is given twice.
    """
    found: dict[str, float] = {}
    for text in texts or ():
        name, equals, value = (part.strip() for part in text.partition("="))
        if not (equals and name):
            raise UsageError(
                f"--bound {text!r} is no bound", "write COST=FRACTION: --bound macs=0.5"
            )
        if name in found:
            raise UsageError(f"--bound bounds {name} twice", "leave one of them out")
        found[name] = parse_fraction(value, f"--bound {name}")
    return found


def parse_settings(texts: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    """Read settings such as cp.sweeps=20.

    Raises:
        UsageError: If one has another form, or a setting is given twice.
    """
    found: dict[str, dict[str, Any]] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        method, dot, key = name.strip().partition(".")
        if not (equals and dot and method and key and value.strip()):
            raise UsageError(
                f"--set {text!r} is no setting", "write METHOD.SETTING=VALUE: --set cp.sweeps=20"
            )
        key = key.replace("-", "_")
        if key in found.setdefault(method, {}):
            raise UsageError(f"--set gives {method}.{key} twice", "leave one of them out")
        found[method][key] = _value(value.strip())
    return found


def _value(text: str) -> bool | int | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def file_json(value: Any) -> str:
    """JSON as it goes into files that people read."""
    return json.dumps(value, indent=2) + "\n"
