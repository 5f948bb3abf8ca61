"""tdkit as a library: names in, models out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tdkit.candidates import COMPRESSION_KEEPS, Grid
from tdkit.compression import Goal, apply_plan, compress_model, random_inputs
from tdkit.decompositions.base import Decomposition
from tdkit.errors import UnsupportedError
from tdkit.metrics.base import Metric
from tdkit.plans import Cost, Plan
from tdkit.registry import Registry, load_registry, lookup


def compress(
    model: nn.Module,
    budget: float = 0.5,
    *,
    cost: Cost = "params",
    methods: Sequence[str] | None = None,
    metric: str = "relative-weights",
    planner: str = "greedy",
    keeps: Sequence[float] = COMPRESSION_KEEPS,
    layers: Sequence[str] = (),
    include_ends: bool = False,
    input_shape: Sequence[int] | None = None,
    example_inputs: Tensor | Sequence[Any] | None = None,
    data: Sequence[Tensor | Sequence[Any]] = (),
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[nn.Module, Plan]:
    """Compress a trained model without touching it.

    Example::

        small, plan = tdkit.compress(model, budget=0.5, input_shape=(3, 224, 224))

    Args:
        model: A trained model.
        budget: The fraction of the whole model's cost that may remain, in (0, 1].
        cost: ``params`` or ``macs``; MACs need ``input_shape`` or ``example_inputs``.
        methods: Names of decompositions; by default all that are meant for it.
        metric: The error whose squares, summed over layers, are kept small. Feature metrics need
            ``data``.
        planner: The name of the planner.
        keeps: Fractions of a layer's parameters to consider.
        layers: Shell patterns of layer names; all by default.
        include_ends: Consider the first and the last layer too.
        input_shape: The shape of one sample, without the batch axis. With it, or with
            ``example_inputs``, the result is verified by a forward pass.
        example_inputs: Arguments of a forward pass, for models that take other things than one
            tensor of floats; a single tensor may stand for itself.
        data: Batches of model inputs for feature metrics: tensors, or sequences of arguments. The
            first one also serves where neither a shape nor example inputs are given.
        seed: Seeds every random start.
        progress: Called with the units of scoring done and all units.

    Returns:
        The compressed copy, of ordinary torch layers, and the plan that it carries. Layers that
        break the model when replaced stay dense.

    Raises:
        UsageError: If an option is wrong or the budget is out of reach.
        UnsupportedError: If the model cannot be copied, run or compressed.
    """
    registry = load_registry()
    record = lookup(registry.metrics, metric, "metric")
    grid = Grid(resolve_methods(registry, methods), [record.create()], tuple(keeps), "best", seed)
    result = compress_model(
        model,
        grid,
        Goal(budget, cost, record.name, planner),
        lookup(registry.planners, planner, "planner").create(),
        inputs=_inputs(model, input_shape, example_inputs, data),
        batches=data,
        patterns=layers,
        keep_ends=not include_ends,
        progress=progress,
    )
    return result.model, result.plan


def apply(
    plan: Plan,
    model: nn.Module,
    *,
    input_shape: Sequence[int] | None = None,
    example_inputs: Tensor | Sequence[Any] | None = None,
) -> nn.Module:
    """Apply a plan to a dense model, which stays as it is.

    Args:
        plan: From :func:`compress`, a file, or written by hand.
        model: The dense model.
        input_shape: The shape of one sample; with it the result is verified.
        example_inputs: See :func:`compress`.

    Raises:
        UsageError: If the plan does not fit the model.
        UnsupportedError: If a layer cannot be decomposed, or breaks the model when replaced.
    """
    registry = load_registry()
    methods = resolve_methods(registry, sorted({move.method for move in plan.moves}))
    inputs = _inputs(model, input_shape, example_inputs)
    result = apply_plan(model, plan, methods, inputs=inputs)
    for name, reason in result.put_back.items():
        raise UnsupportedError(
            f"the layer {name!r} cannot be replaced: {reason}", "take it out of the plan"
        )
    return result.model


def load(
    source: str | Path, *, arch: str | None = None, model: nn.Module | None = None
) -> nn.Module:
    """Read a model file safely, also one that tdkit wrote as a state_dict.

    Args:
        source: The file, or a registered name.
        arch: The architecture of a state_dict: a registered name or ``package.module:callable``.
        model: Instead of ``arch``, an instance of the dense architecture; it is changed in place.

    Raises:
        TdkitError: Of the kind that fits what is wrong with the file.
    """
    from tdkit.checkpoint import load_into, load_model

    if model is not None:
        return load_into(model, source).model
    return load_model(source, models=load_registry().models, arch=arch).model


def _inputs(
    model: nn.Module,
    shape: Sequence[int] | None,
    example: Tensor | Sequence[Any] | None,
    data: Sequence[Tensor | Sequence[Any]] = (),
) -> Sequence[Any] | None:
    """Arguments of a forward pass from whatever tells them."""
    if example is None and shape is not None:
        return random_inputs(model, shape)
    if example is None and data:
        example = data[0]
    return [example] if isinstance(example, Tensor) else example


def resolve_methods(
    registry: Registry, names: Sequence[str] | None = None
) -> dict[str, Decomposition]:
    """Decompositions by name; without names, those that are meant to be used by default.

    Raises:
        UsageError: If a name is unknown.
    """
    records = registry.decompositions
    chosen = [n for n, record in records.items() if record.default] if names is None else names
    found = [lookup(records, name, "method") for name in chosen]
    return {record.name: record.create() for record in found}


def resolve_metrics(registry: Registry, names: Sequence[str]) -> list[Metric]:
    """Metrics by name.

    Raises:
        UsageError: If a name is unknown.
    """
    return [lookup(registry.metrics, name, "metric").create() for name in names]
