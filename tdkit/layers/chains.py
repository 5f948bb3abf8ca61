"""Stages in a row: tdkit's own kinds, their order with their weights, and what a module is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from tdkit.errors import UnsupportedError, UsageError
from tdkit.layers.spec import LayerSpec
from tdkit.layers.stages import ChannelShuffle, Flatten, Permute, Stage, Unflatten

OWN_STAGES: Mapping[str, type[Stage]] = MappingProxyType(
    {
        kind: cls
        for cls in (LayerSpec, Flatten, Unflatten, ChannelShuffle, Permute)
        for kind in cls.kinds
    }
)
"""tdkit's own kinds of stages, by what stands for them in model files."""


def weighted(
    stages: Sequence[Stage], weights: Sequence[Tensor]
) -> Iterable[tuple[Stage, Tensor | None]]:
    """Every stage with its weight, None where it has none.

    Args:
        stages: In order.
        weights: One for each stage that has a weight, in order, each of its
            :attr:`~tdkit.layers.stages.Stage.weight_shape`, such as (out, in, *kernel).

    Raises:
        UnsupportedError: If there are more or fewer weights.
    """
    places = sum(stage.weight_shape is not None for stage in stages)
    if places != len(weights):
        raise UnsupportedError(f"{len(weights)} weights for {places} stages that have one")
    rest = iter(weights)
    return [(stage, None if stage.weight_shape is None else next(rest)) for stage in stages]


def stage_of(module: nn.Module, stages: Mapping[str, type[Stage]] = OWN_STAGES) -> Stage | None:
    """The stage that a module is, of some kinds; None where it is no such.

    Args:
        module: The module.
        stages: The kinds to try.
    """
    kinds = dict.fromkeys(stages.values())
    return next((stage for cls in kinds if (stage := cls.of(module)) is not None), None)


def read_stage(value: Mapping[str, Any], stages: Mapping[str, type[Stage]] = OWN_STAGES) -> Stage:
    """The stage of a closed list of kinds that JSON values describe, checked.

    Args:
        value: What :meth:`Stage.to_json` wrote, or anything.
        stages: The kinds that may be read. A value never adds to them.

    Raises:
        UsageError: If the kind is not among them, or the description is not one of it. Its message
            ends a sentence such as "the file describes the layer ...".
    """
    try:
        stage = stages[value["kind"]].from_json(value)
        reason = stage.check()
    except Exception as error:  # a plugin's kind may fail on a hostile value in any way
        raise UsageError("in an unknown way") from error
    if reason is not None:
        raise UsageError(f"wrongly: {reason}")
    return stage
