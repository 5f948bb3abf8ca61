"""What tdkit keeps beside the weights: the plan, and how to rebuild the compressed layers."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tdkit.checkpoint.text import shown
from tdkit.errors import UnreadableFileError, UsageError
from tdkit.layers.chains import OWN_STAGES, read_stage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tdkit.layers.stages import Stage

KEY = "tdkit"
"""The entry of a state-dict file, and of safetensors metadata, that holds the description."""

_VERSION = 1
_MOST_INPUT_ELEMENTS = 2**27
_MOST_STAGES = 64
_MOST_TEXT = 2**24


@dataclass(frozen=True)
class Description:
    """What a file that tdkit wrote says about itself.

    Args:
        plan: The plan that made the model, as JSON values, or None.
        structure: Dotted name of each replaced layer to the stages that stand there in sequence.
        arch: What the model was made from: a registered name, ``package.module:callable`` or None.
        arch_options: Keywords for it: ``in_channels`` and ``num_classes``.
        input_shape: Shape of one input without the batch axis, or None.
        training: How the weights were trained, as far as known; see :mod:`tdkit.training.settings`.
    """

    plan: Mapping[str, Any] | None = None
    structure: Mapping[str, tuple[Stage, ...]] = field(default_factory=dict)
    arch: str | None = None
    arch_options: Mapping[str, int] = field(default_factory=dict)
    input_shape: tuple[int, ...] | None = None
    training: Mapping[str, Any] | None = None

    def to_text(self) -> str:
        """The description as JSON text, read back by :func:`read_description`.

        Raises:
            UsageError: If the plan holds something that JSON does not know.
        """
        structure = {
            name: [spec.to_json() for spec in specs] for name, specs in self.structure.items()
        }
        value = {
            "version": _VERSION,
            "arch": self.arch,
            "arch_options": dict(self.arch_options),
            "input_shape": self.input_shape,
            "structure": structure,
            "plan": self.plan,
            "training": self.training,
        }
        try:
            return json.dumps(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"the plan cannot be stored as JSON: {error}") from error


def read_description(
    text: object, source: object, stages: Mapping[str, type[Stage]] = OWN_STAGES
) -> Description:
    """Read what :meth:`Description.to_text` wrote, believing none of it unchecked.

    Args:
        text: The text from the file.
        source: The file, for messages.
        stages: The kinds of stages that it may name. The file never adds to them.

    Raises:
        UnreadableFileError: If it is not such a text, or names another kind.
    """
    if isinstance(text, str | bytes) and len(text) > _MOST_TEXT:
        raise _wrong(source, f"has {len(text):,} characters")
    try:
        value = json.loads(text) if isinstance(text, str | bytes) else None
    except (ValueError, RecursionError) as error:
        raise _wrong(source, "is not JSON") from error
    if not isinstance(value, dict):
        raise _wrong(source, "is not a JSON object")
    if value.get("version") != _VERSION:
        raise _wrong(source, f"has the version {shown(value.get('version'))}, not {_VERSION}")
    plan, arch, training = (value.get(key) for key in ("plan", "arch", "training"))
    if not all(part is None or isinstance(part, dict) for part in (plan, training)) or not (
        arch is None or isinstance(arch, str)
    ):
        raise _wrong(source, "has a plan, a training or an architecture of the wrong kind")
    return Description(
        plan=plan,
        structure=_structure(value.get("structure"), source, stages),
        arch=arch,
        arch_options=_options(value.get("arch_options"), source),
        input_shape=_shape(value.get("input_shape"), source),
        training=training,
    )


def _structure(
    value: Any, source: object, stages: Mapping[str, type[Stage]]
) -> dict[str, tuple[Stage, ...]]:
    if not isinstance(value, dict) or not all(isinstance(specs, list) for specs in value.values()):
        raise _wrong(source, "describes no layers")
    return {name: _stages(name, specs, source, stages) for name, specs in value.items()}


def _stages(
    name: str, values: list[Any], source: object, stages: Mapping[str, type[Stage]]
) -> tuple[Stage, ...]:
    # None at all stand for a BatchNorm that was folded.
    if len(values) > _MOST_STAGES:
        raise _wrong(source, f"puts {len(values)} layers in the place of {shown(name)}")
    unknown = [kind for kind in map(_kind, values) if kind is not None and kind not in stages]
    if unknown:
        raise UnreadableFileError(
            f"{source}: what tdkit stored in it describes {shown(name)} by stages of the kind "
            f"{shown(unknown[0])}, which nothing here provides",
            "install the plugin that wrote it; tdkit plugins lists what there is",
        )
    try:
        return tuple(read_stage(value, stages) for value in values)
    except UsageError as error:
        raise _wrong(source, f"describes {shown(name)} {error}") from error


def _kind(value: Any) -> str | None:
    kind = value.get("kind") if isinstance(value, dict) else None
    return kind if isinstance(kind, str) else None


def _options(value: Any, source: object) -> dict[str, int]:
    known = {"in_channels", "num_classes"}
    if not isinstance(value, dict) or not set(value) <= known or not _are_counts(value.values()):
        raise _wrong(source, "has options that no architecture takes")
    return dict(value)


def _shape(value: Any, source: object) -> tuple[int, ...] | None:
    if value is None:
        return None
    if (
        not isinstance(value, list)
        or not 1 <= len(value) <= 8
        or not _are_counts(value)
        or math.prod(value) > _MOST_INPUT_ELEMENTS
    ):
        raise _wrong(source, "has an input shape that no model takes")
    return tuple(value)


def _are_counts(values: Any) -> bool:
    return all(type(value) is int and 1 <= value < 2**31 for value in values)


def _wrong(source: object, reason: str) -> UnreadableFileError:
    return UnreadableFileError(
        f"{source}: what tdkit stored in it {reason}",
        "write the file again with this version of tdkit, or pass the plain state_dict",
    )
