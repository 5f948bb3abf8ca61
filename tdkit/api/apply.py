"""``tdkit.apply``: a plan, on a model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tdkit import arguments, defaults
from tdkit.api.compress import REFITTING, REPLACING, Settings, traced_subject
from tdkit.api.compression import Compression, Ending, finish, length_of
from tdkit.api.files import plan_title
from tdkit.api.subject import Given, Model, open_subject
from tdkit.compression.applying import apply_plan
from tdkit.compression.plan import Plan
from tdkit.compression.report import state_bytes
from tdkit.compression.scoring import looks_at_data
from tdkit.costs.base import Cost
from tdkit.costs.macs import MACS
from tdkit.costs.params import PARAMS
from tdkit.decompositions.base import Decomposition
from tdkit.decompositions.settings import settings_of
from tdkit.errors import UnsupportedError, command
from tdkit.progress import Progress, listening
from tdkit.registry import Registry, load_registry, method_versions, resolve_methods


def apply(
    plan: Plan | str | Path,
    model: Model,
    *,
    settings: Settings | None = None,
    calibration: str = defaults.CALIBRATION,
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
    progress: Progress | bool = False,
    say: Callable[[str], None] = lambda text: None,
    note: Callable[[str], None] | None = None,
) -> Compression:
    """Apply a plan to a dense model.

    Methods get the settings that the plan was made with; where those or the versions of tdkit and
    its plugins are others now, a note says so.

    Args:
        plan: From :func:`compress`, written by hand, or the path of a plan file.
        model: The dense model: a module, a file or a registered name.
        settings: Of methods, other than the plan's.
        calibration: What the layers are fitted to; ``auto`` is what the plan says.
        input_shape: See :func:`compress`, as for all that follows.
        example_inputs: Arguments of a forward pass, tensors of any shape.
        data: Batches of model inputs, or a data set.
        data_root: Folder to look for data sets in first.
        samples: Images to calibrate on.
        arch: The architecture of a state_dict.
        weights: Weights of a registered model.
        allow_classes: Classes of yours that the file may hold.
        unsafe_load: Run whatever code the file holds.
        device: Where to work.
        distill: How long to distil; by default a minute with data and a plan of effort ``best``.
        finetune: Epochs of a fine-tuning afterwards.
        learning_rate: Of the fine-tuning.
        resume: Where its state is kept.
        output: Write the model there.
        format: Of that file.
        force: Replace an existing file.
        measure: Time and evaluate both models.
        batch_size: Inputs of a timed pass.
        inplace: Change the module itself.
        progress: A callback, or True for a bar.
        say: Called with each line of a fine-tuning.
        note: Called with what the user should know of it beforehand.

    Returns:
        The compressed model. Layers that break it when replaced stay dense, and ``put_back`` says
        why.

    Raises:
        UnreadableFileError: If a file is missing or damaged.
        UsageError: If the plan does not fit the model, or an option is wrong.
        UnsupportedError: If a layer cannot be decomposed, or none of the plan can be replaced.
    """
    start, registry, wanted = time.perf_counter(), load_registry(), arguments.plan(plan)
    names = sorted({move.method for move in wanted.moves})
    methods = resolve_methods(registry, names, settings, wanted.settings)
    versions = method_versions(registry, methods)
    title = plan_title(Path(plan)) if isinstance(plan, str | Path) else "planned"
    ending = Ending(
        finetune,
        learning_rate,
        resume,
        output,
        format,
        force,
        measure,
        batch_size,
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
        # The plan's seed, so that random weights are those that the plan was made for.
        wanted.seed,
        inplace,
    )
    subject = open_subject(model, registry, given)
    default = f"{subject.opened.name}-{title}"
    how = subject.settle(calibration, wanted.calibration)
    ending = ending.under(wanted.effort, how, inplace)
    ready = ending.check(subject, default, [model, plan], wanted.seed)
    # Whatever mode the caller is in: fitting takes gradients.
    with torch.inference_mode(False), listening(progress) as update:
        traced = traced_subject(subject, (), True, inplace, ready)
        before = state_bytes(traced.model)
        batches, images = subject.looked_at(looks_at_data(methods, ()), how, samples)
        update(REPLACING, 0, 0)
        result = apply_plan(
            traced,
            replace(wanted, calibration=how),
            methods,
            batches=batches,
            calibration=images,
            costs=_costs(wanted, registry),
            progress=lambda done, total: update(REFITTING, done, total),
        )
        update(REPLACING, 1, 1)
        if result.put_back and not result.plan.moves:
            name, reason = next(iter(result.put_back.items()))
            raise UnsupportedError(
                f"no layer of the plan can be replaced; {name}: {reason}",
                f"{command('inspect')} shows which layers can",
            )
        now = replace(result.plan, settings=_settings(methods), versions=versions)
        result = replace(result, plan=now)
        done = finish(subject, traced, result, ready, before, start, update, say, note)
    return replace(done, notes=(*done.notes, *differences(wanted, methods, versions)))


def differences(
    plan: Plan, methods: Mapping[str, Decomposition], versions: Mapping[str, str]
) -> list[str]:
    """Where a plan is applied under other settings or versions than it was made with."""
    notes = []
    for name, settings in _settings(methods).items():
        made = plan.settings.get(name, {})
        changed = [key for key in made if made[key] != settings.get(key)]
        notes += [
            f"the plan was made with {name}.{key}={made[key]}, and is applied with"
            f" {settings.get(key)}"
            for key in changed
        ]
    for name, version in plan.versions.items():
        now = versions.get(name, "none")
        if version != now:
            notes.append(f"the plan was made with {name} {version}, and is applied with {now}")
    return notes


def _costs(plan: Plan, registry: Registry) -> list[Cost]:
    """What is reported: the usual costs, and those that the plan holds, if they are there."""
    known: dict[str, Cost] = {cost.name: cost for cost in (PARAMS, MACS)}
    for name in (plan.cost, *plan.bounds):
        if name in registry.costs:
            known.setdefault(name, registry.costs[name].create())
    return list(known.values())


def _settings(methods: Mapping[str, Decomposition]) -> dict[str, Mapping[str, Any]]:
    return {name: settings_of(method) for name, method in methods.items()}
