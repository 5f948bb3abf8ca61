"""``tdkit apply``: a plan from a file, on a model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Optional

import typer

from tdkit.cli import options


def apply(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file, as compress writes.")],
    model: options.Model,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="Where the model goes; MODEL-PLAN.pt if unset."),
    ] = None,
    format: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="module, state-dict, safetensors, onnx or pt2; as the input if unset."),
    ] = None,
    arch: options.Arch = None,
    weights: options.Weights = None,
    allow_class: options.AllowClass = None,
    unsafe_load: options.UnsafeLoad = False,
    input_shape: options.InputShape = None,
    data: options.Data = None,
    data_root: options.DataRoot = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Batch of the latency runs.")] = 32,
    device: options.Device = "auto",
    json: options.Json = False,
    force: options.Force = False,
) -> None:
    """Apply a plan to a model, verify it, and report what it costs before and after.

    Example: `tdkit apply plan.json garipov -o small.pt`
    """
    from tdkit.api import resolve_methods
    from tdkit.cli.common import Source, image_size, open_dataset, open_model, open_registry
    from tdkit.cli.finish import Destination, finish
    from tdkit.compression import apply_plan
    from tdkit.plans import read_plan

    start = time.perf_counter()
    registry = open_registry()
    wanted = read_plan(plan)
    methods = resolve_methods(registry, sorted({move.method for move in wanted.moves}))
    classes = allow_class or ()
    # The plan's seed, so that random weights are those that the plan was made for.
    source = Source(
        model, arch, weights, classes, unsafe_load, input_shape, device, seed=wanted.seed
    )
    size = image_size(source, registry)
    dataset = open_dataset(data, registry, data_root, size) if data else None
    opened = open_model(source, registry, dataset)
    default = f"{opened.name}-{plan.stem.removesuffix('.plan')}"
    destination = Destination.of(opened, output, default, format, force, inputs=[model, plan])
    destination.check()
    result = apply_plan(opened.model, wanted, methods, inputs=opened.inputs())
    test = dataset.test if dataset else None
    finish(opened, result, destination, test=test, batch=batch_size, start=start, json=json)
