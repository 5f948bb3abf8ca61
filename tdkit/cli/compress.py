"""``tdkit compress``: the main job."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Optional

import typer

from tdkit.cli import options


def compress(
    model: options.Model,
    budget: Annotated[
        str,
        typer.Option("--budget", "-b", help="Fraction of the model that may remain: 0.5 or 50%."),
    ] = "0.5",
    cost: Annotated[str, typer.Option(help="What the budget counts: params or macs.")] = "params",
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="Where the model goes; MODEL-BUDGET.pt if unset."),
    ] = None,
    format: options.Format = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan as JSON and write nothing.")
    ] = False,
    methods: options.Methods = None,
    metric: Annotated[
        str, typer.Option(help="Approximation error that guides the planner; see tdkit plugins.")
    ] = "relative-weights",
    planner: Annotated[str, typer.Option(help="How to choose among candidates.")] = "greedy",
    keeps: options.Keeps = None,
    calibrate: options.Calibrate = "auto",
    samples: options.Samples = 512,
    finetune: options.Finetune = None,
    learning_rate: options.LearningRate = None,
    resume: options.Resume = None,
    layers: options.Layers = None,
    include_ends: options.IncludeEnds = False,
    arch: options.Arch = None,
    weights: options.Weights = None,
    allow_class: options.AllowClass = None,
    unsafe_load: options.UnsafeLoad = False,
    input_shape: options.InputShape = None,
    data: options.Data = None,
    data_root: options.DataRoot = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Batch of the latency runs.")] = 32,
    device: options.Device = "auto",
    seed: options.Seed = 0,
    json: options.Json = False,
    force: options.Force = False,
) -> None:
    """Compress a model to a budget, verify it, and report what it costs before and after.

    Example: `tdkit compress model.pt --budget 0.5 --input-shape 3,224,224 -o small.pt`
    """
    from tdkit.cli.common import (
        Source,
        calibration_batches,
        check_test,
        feature_batches,
        file_json,
        open_registry,
        open_with_data,
        parse_fraction,
        parse_keeps,
        parse_names,
        settle_calibration,
    )
    from tdkit.cli.display import progress_bar, stdout
    from tdkit.cli.finish import Destination, finish, print_notes
    from tdkit.cli.fitting import Finetuning, asked_for
    from tdkit.compression.compress import Goal, compress_model
    from tdkit.compression.scoring import COMPRESSION_KEEPS, Grid
    from tdkit.registry import lookup, method_limits, resolve_methods, resolve_metrics

    start = time.perf_counter()
    fraction = parse_fraction(budget, "--budget")
    wishes = asked_for(finetune, learning_rate, resume)
    registry = open_registry()
    metrics = resolve_metrics(registry, [metric])
    chooser = lookup(registry.planners, planner, "planner")
    goal = Goal(fraction, cost, metrics[0].name, chooser.name)  # type: ignore[arg-type]
    source = Source(model, arch, weights, allow_class or (), unsafe_load, input_shape, device, seed)
    names = parse_names(methods, "--methods")
    grid = Grid(
        resolve_methods(registry, names),
        metrics,
        parse_keeps(keeps, COMPRESSION_KEEPS),
        "best",
        seed,
        method_limits(registry, names),
    )
    opened, dataset = open_with_data(source, registry, data, data_root)
    check_test(opened, dataset)
    goal = replace(goal, calibration=settle_calibration(calibrate, dataset))
    if cost == "macs":
        opened.require_shape("counting MACs")
    default = f"{opened.name}-{goal.budget:g}"
    destination = Destination.of(opened, output, default, format, force, inputs=[model])
    if not dry_run:
        destination.check()
    tuning = Finetuning.of(opened, dataset, wishes, seed, resume, [model]) if wishes else None
    needs_data = any(m.target == "features" for m in metrics)
    with progress_bar("scoring", then="replacing, verifying, calibrating") as progress:
        result = compress_model(
            opened.model,
            grid,
            goal,
            chooser.create(),
            inputs=opened.inputs(),
            batches=feature_batches(dataset, samples, opened.model) if needs_data else [],
            calibration=calibration_batches(goal.calibration, dataset, samples, opened.model),
            patterns=layers or (),
            keep_ends=not include_ends,
            progress=progress,
        )
    if dry_run:
        stdout().out(file_json(result.plan.to_json()), end="")
        print_notes(opened, result)
        return
    finish(opened, result, destination, dataset, tuning, batch=batch_size, start=start, json=json)
