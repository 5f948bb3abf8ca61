"""``tdkit.compress``: the main job."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tdkit import arguments, defaults
from tdkit.api.aiming import aim
from tdkit.api.compression import Compression, Ending, Ready, finish, length_of
from tdkit.api.subject import Given, Model, Subject, open_subject
from tdkit.compression.compress import compress_model
from tdkit.compression.report import state_bytes
from tdkit.compression.scoring import COMPRESSION_KEEPS, Grid, looks_at_data
from tdkit.costs.base import CALLS, unknown_cost
from tdkit.costs.uncounted import left_out, outside_macs
from tdkit.forward.copying import refuse_uncopyable, shared_copy
from tdkit.layers.traced import TracedModel
from tdkit.layers.weights import ModuleWeights
from tdkit.progress import Progress, listening
from tdkit.recipes import Setting
from tdkit.registry import (
    load_registry,
    method_limits,
    method_versions,
    resolve_methods,
)

Settings = Mapping[str, Mapping[str, Setting]]
"""By the name of a method keywords of its constructor."""


def compress(
    model: Model,
    budget: float = defaults.BUDGET,
    *,
    cost: str = defaults.COST,
    bounds: Mapping[str, float] | None = None,
    methods: str | Sequence[str] | None = None,
    settings: Settings | None = None,
    metric: str | None = None,
    penalty: str | None = None,
    planner: str | None = None,
    calibration: str = defaults.CALIBRATION,
    effort: str = defaults.EFFORT,
    fold: bool = False,
    keeps: float | Sequence[float] | None = None,
    layers: str | Sequence[str] = (),
    include_ends: bool = False,
    input_shape: str | Sequence[int] | None = None,
    example_inputs: Any = None,
    data: Any = None,
    data_root: str | Path | None = None,
    samples: int = defaults.SAMPLES,
    arch: str | None = None,
    weights: str | None = None,
    allow_classes: str | Sequence[str] = (),
    unsafe_load: bool = False,
    device: str | None = None,
    seed: int = defaults.SEED,
    distill: int | str | None = None,
    finetune: int | None = None,
    learning_rate: float | None = None,
    resume: str | Path | None = None,
    output: str | Path | None = None,
    format: str | None = None,
    force: bool = False,
    measure: bool = True,
    batch_size: int = defaults.BATCH_SIZE,
    inplace: bool = False,
    dry_run: bool = False,
    progress: Progress | bool = False,
    say: Callable[[str], None] = lambda text: None,
    note: Callable[[str], None] | None = None,
) -> Compression:
    """Compress a trained model to a budget.

    Example::

        small = tdkit.compress(model, budget=0.5, input_shape=(3, 224, 224))
        print(small.report)
        small.save("small.pt")

    Args:
        model: A trained module, which stays as it is unless ``inplace``; a model file; or a
            registered name.
        budget: The fraction of the whole model's cost that may remain, in (0, 1].
        cost: What the budget counts: ``params``, ``macs`` or a plugin's; MACs need the shape of
            the input.
        bounds: Fractions of other costs that may remain, held beside the budget:
            ``{"macs": 0.5}``.
        methods: Names of decompositions; by default each at the keeps where it is fast.
        settings: Of methods: ``{"cp": {"sweeps": 20}}``.
        metric: The error whose penalties, summed over layers, are kept small. Feature metrics
            need ``data``. If None, ``relative-weights``; where factors are fitted to data
            ``whitened-features`` of fitted candidates, and with the best effort whichever of three
            gives the model that is nearest to the dense one on them.
        penalty: By what errors add up over layers: ``logarithm``, ``squares`` or ``itself``; by
            the metric's own law if None. See :data:`tdkit.metrics.base.PENALTIES`.
        planner: The name of the planner; ``greedy``, or with ``bounds`` ``exact``, if None.
        calibration: What the compressed layers are fitted to: ``data``; ``synthetic`` inputs, made
            from the statistics that BatchNorm has stored, or random tokens; ``noise`` images, for
            BatchNorm alone; ``none``; or ``auto``: data where there are some, else noise, with the
            best effort synthetic inputs.
        effort: How hard, where it is data: ``fast`` fits BatchNorm's statistics, ``default`` the
            factors of every layer to what the compressed layers before it deliver, ``best`` those
            to the activation that follows, too, and distils for a minute.
        fold: Fold every BatchNorm into the layer before it in the end, where nothing else is given
            to it; its parameters are spent on ranks. The result has no statistics left to train.
        keeps: Fractions of a layer's parameters to consider.
        layers: Shell patterns of layer names; all by default.
        include_ends: Consider the first and the last layer too.
        input_shape: The shape of one sample, without the batch axis. With it, or with
            ``example_inputs``, the result is verified by a forward pass.
        example_inputs: Arguments of a forward pass, for models that take other things than one
            tensor of floats: a tensor, a tuple of arguments, a dict of keywords, nested in any
            way; tensors of any shape.
        data: Batches of model inputs, tensors of any shape, nested like ``example_inputs``; a
            single tensor is one batch. Or a :class:`~tdkit.datasets.base.Dataset`, or the name of
            one, ``NAME`` or ``NAME:PATH``: BatchNorm is then fitted on its training images, and
            the accuracy on its test images is in the report.
        data_root: Folder to look for data sets in first.
        samples: Images of a data set to calibrate on and to measure features on.
        arch: The architecture of a state_dict: a registered name or ``package.module:callable``.
        weights: Weights of a registered model; ``none`` for random ones.
        allow_classes: Classes of yours that the file may hold, each ``package.module:Class``.
        unsafe_load: Run whatever code the file holds.
        device: ``cpu``, ``cuda`` or ``auto``; a module stays where it is by default.
        seed: Seeds every random start.
        distill: Let the compressed model learn what the dense one makes of ``data``, which take no
            labels, for so many epochs, ``20``, or so long, ``"60s"`` or ``"2m"``; 0 is not at all,
            also with the effort ``best``. See :func:`tdkit.distill`.
        finetune: Fine-tune all layers afterwards for at most so many epochs, on ``data``.
        learning_rate: Of the fine-tuning.
        resume: Written now and then; where it exists, fine-tuning goes on from it. Distillation
            does so too; where both are asked for, from ``{resume}.distill``.
        output: Write the model there, and its plan beside it, before anything is measured;
            ``auto`` makes a name from the model's, in the current folder.
        format: Of that file; by its suffix if None.
        force: Replace an existing file.
        measure: Time the dense and the compressed model in turn, and measure their accuracy where
            there are labelled test images. Without it a model from a file is compressed in place.
        batch_size: Inputs of a timed pass.
        inplace: Compress the module itself. Above the model it then takes a quarter of its size
            and the largest layer's own work, with data also what that is fitted to; nothing is
            timed.
        dry_run: Refuse what could not be done at the end, and do none of it: nothing is
            fine-tuned, written or measured.
        progress: A callback, or True for a bar.
        say: Called with each line on the progress of a distillation or a fine-tuning.
        note: Called before a fine-tuning with what the user should know of it; it is in ``notes``
            if None.

    Returns:
        The compressed model with its plan and report. Layers that break the model when replaced
        stay dense.

    Raises:
        UsageError: If an option is wrong or the budget is out of reach.
        UnsupportedError: If the model cannot be copied, run or compressed.
        TdkitError: Of the kind that fits what is wrong with a file.
    """
    start, registry = time.perf_counter(), load_registry()
    wanted = None if methods is None else arguments.methods(methods)
    name = metric or defaults.METRIC
    goal, chooser = aim(registry, budget, cost, bounds, name, penalty, planner, effort)
    goal = replace(goal, fold=fold)
    found = resolve_methods(registry, wanted, settings)
    grid = Grid(
        found,
        [goal.metric],
        COMPRESSION_KEEPS if keeps is None else arguments.keeps(keeps),
        seed=arguments.seed(seed),
        limits=method_limits(registry, wanted),
        versions=method_versions(registry, found),
    )
    ending = Ending(
        finetune,
        learning_rate,
        resume,
        output,
        format,
        force,
        measure and not dry_run,
        batch_size,
        dry_run,
        distill=length_of(distill),
        samples=samples,
    )
    given = Given(
        arch,
        weights,
        allow_classes,
        unsafe_load,
        input_shape,
        None if example_inputs is None else arguments.example(example_inputs),
        data,
        data_root,
        device,
        seed,
        inplace,
    )
    subject = open_subject(model, registry, given)
    for counted, _ in goal.shares:
        if CALLS in counted.needs and not subject.runs:
            raise unknown_cost(counted)
    how = subject.settle(calibration, effort=effort)
    ending = ending.under(effort, how, inplace)
    ready = ending.check(subject, f"{subject.opened.name}-{goal.budget:g}", [model], grid.seed)
    patterns = arguments.names(layers, "layers")
    # Whatever mode the caller is in: fitting takes gradients.
    with torch.inference_mode(False), listening(progress) as update:
        traced = traced_subject(subject, patterns, include_ends, inplace, ready)
        before = state_bytes(traced.model)
        needed = looks_at_data(grid.methods, grid.metrics)
        batches, images = subject.looked_at(needed, how, samples)
        result = compress_model(
            traced,
            grid,
            replace(goal, calibration=how),
            chooser,
            batches=batches,
            calibration=images,
            by_data=metric is None and penalty is None,
            fit=not dry_run,
            progress=lambda done, total: _update(update, done, total),
            refitting=lambda done, total: update(REFITTING, done, total),
        )
        update(REPLACING, 1, 1)
        return finish(subject, traced, result, ready, before, start, update, say, note)


REPLACING = "replacing, verifying, calibrating"
"""What follows the scores, and is not counted."""

REFITTING = "fitting to data"
"""What follows that where there are data."""


def _update(progress: Progress, done: int, total: int) -> None:
    progress("scoring", done, total)
    if done == total:
        progress(REPLACING, 0, 0)


def traced_subject(
    subject: Subject,
    patterns: Sequence[str],
    include_ends: bool,
    inplace: bool,
    ready: Ready,
) -> TracedModel:
    """Look at a model once; the dense one stays at hand where it is to be measured.

    Args:
        subject: The model and what tells its inputs.
        patterns: Shell patterns of the layers to consider.
        include_ends: Let the first and the last layer be factorized too.
        inplace: Whether the caller gives the model away.
        ready: What is to be done at the end, for which the dense model may be needed.

    Raises:
        UnsupportedError: If the model cannot be copied or run.
    """
    own = subject.owned or inplace
    weights = None
    if own and (ready.ending.measure or ready.distillation is not None) and not inplace:
        # The dense model beside the compressed one takes no more than what is replaced, unless
        # all of that is trained on.
        refuse_uncopyable(subject.model)
        trained = list(subject.model.parameters()) if ready.trains else []
        apart = [*trained, *subject.model.buffers()]
        weights = ModuleWeights(shared_copy(subject.model, own=apart))
    traced = TracedModel.of(
        subject.model,
        subject.inputs(),
        patterns=patterns,
        include_ends=include_ends,
        inplace=own,
        weights=weights,
    )
    if traced.sample is None:
        return traced
    # While the layers are those that were counted.
    told = left_out(outside_macs(traced.model, traced.layers, traced.sample), traced.layers)
    return traced if told is None else replace(traced, notes=(*traced.notes, told))
