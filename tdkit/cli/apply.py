"""``tdkit apply``: a plan from a file, on a model."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Optional

import typer

from tdkit.cli import options
from tdkit.errors import UnsupportedError


def apply(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file, as compress writes.")],
    model: options.Model,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="Where the model goes; MODEL-PLAN.pt if unset."),
    ] = None,
    format: options.Format = None,
    arch: options.Arch = None,
    weights: options.Weights = None,
    allow_class: options.AllowClass = None,
    unsafe_load: options.UnsafeLoad = False,
    input_shape: options.InputShape = None,
    data: options.Data = None,
    data_root: options.DataRoot = None,
    calibrate: options.Calibrate = "auto",
    samples: options.Samples = 512,
    finetune: options.Finetune = None,
    learning_rate: options.LearningRate = None,
    resume: options.Resume = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Batch of the latency runs.")] = 32,
    device: options.Device = "auto",
    json: options.Json = False,
    force: options.Force = False,
) -> None:
    """Apply a plan to a model, verify it, and report what it costs before and after.

    Example: `tdkit apply plan.json garipov -o small.pt`
    """
    from tdkit.cli.common import (
        Source,
        calibration_batches,
        check_test,
        open_registry,
        open_with_data,
        settle_calibration,
    )
    from tdkit.cli.finish import Destination, finish, plan_title
    from tdkit.cli.fitting import Finetuning, asked_for
    from tdkit.compression.compress import apply_plan
    from tdkit.compression.plan import read_plan
    from tdkit.registry import resolve_methods

    start = time.perf_counter()
    wishes = asked_for(finetune, learning_rate, resume)
    registry = open_registry()
    wanted = read_plan(plan)
    methods = resolve_methods(registry, sorted({move.method for move in wanted.moves}))
    classes = allow_class or ()
    # The plan's seed, so that random weights are those that the plan was made for.
    source = Source(
        model, arch, weights, classes, unsafe_load, input_shape, device, seed=wanted.seed
    )
    opened, dataset = open_with_data(source, registry, data, data_root)
    check_test(opened, dataset)
    default = f"{opened.name}-{plan_title(plan)}"
    destination = Destination.of(opened, output, default, format, force, inputs=[model, plan])
    destination.check()
    tuning = None
    if wishes is not None:
        seed = wanted.seed % 2**63
        tuning = Finetuning.of(opened, dataset, wishes, seed, resume, inputs=[model, plan])
    how = settle_calibration(calibrate, dataset, wanted.calibration)
    result = apply_plan(
        opened.model,
        replace(wanted, calibration=how),
        methods,
        inputs=opened.inputs(),
        calibration=calibration_batches(how, dataset, samples, opened.model),
    )
    if result.put_back and not result.plan.moves:
        name, reason = next(iter(result.put_back.items()))
        raise UnsupportedError(
            f"no layer of the plan can be replaced; {name}: {reason}",
            "tdkit inspect shows which layers can",
        )
    finish(opened, result, destination, dataset, tuning, batch=batch_size, start=start, json=json)
