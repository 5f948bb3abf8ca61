"""From a recipe and a model to trials: what is measured, in which order, and what it depends on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from tdkit.checkpoint import content_hash
from tdkit.compression.scoring import blamed, prepare
from tdkit.decompositions.base import (
    Decomposition,
    Prepared,
    Rank,
    check_rank,
    count,
    layer_stages,
    unsupported,
)
from tdkit.decompositions.settings import settings_of, traits_of
from tdkit.errors import UnsupportedError, UsageError, unknown_name
from tdkit.layers.evidence import Evidence
from tdkit.layers.inventory import Layer, matches
from tdkit.layers.weights import ModuleWeights
from tdkit.study.records import Trial
from tdkit.training.loop import trainable_splits
from tdkit.version import __version__

if TYPE_CHECKING:
    from torch import nn

    from tdkit.datasets.base import Dataset
    from tdkit.layers.spec import LayerSpec
    from tdkit.metrics.base import Metric
    from tdkit.study.recipe import StudyRecipe
    from tdkit.study.workspace import Workspace
from tdkit.study.records import outcome_key

# Trials that share one pass over the images. More save passes of the dense model; fewer are stored
# sooner, spread more evenly over workers and cost less when they are interrupted.
_TOGETHER = 16

# Parameters of the factorized layers that one unit holds in memory.
_PARAMETERS = 2**25

# Values of a recipe that no measurement depends on. Model and data have hashes instead of names,
# and what methods are created with stands under the methods.
_FREE = ("title", "notes", "published", "numbers", "focus", "model", "data", "weights", "options")


@dataclass(frozen=True)
class _Candidate:
    layer: str
    method: str
    keep: float
    rank: Rank


def plan_trials(workspace: Workspace) -> tuple[Trial, ...]:
    """All trials that a recipe asks for: first before fine-tuning, then after it.

    Within a stage they are ordered by layer, method, keep and run. What is not random is measured
    in run 0 only: before fine-tuning, methods without a random start. Candidates of the rank rule
    that are not smaller than their layer are left out; two keeps that lead to one rank stay two.

    Args:
        workspace: The model and the recipe.

    Raises:
        UsageError: If the recipe names a layer that is not there, a method that supports none of
            the layers or a rank that does not fit, or if nothing is left to measure.
        UnsupportedError: If a layer that is named cannot be decomposed, or no layer can.
    """
    recipe = workspace.recipe
    candidates = list(_candidates(workspace))
    if not candidates:
        raise UsageError(
            "there is nothing to measure: no candidate is smaller than its layer",
            "use smaller keeps, or the rank rule best",
        )
    before = [
        Trial(c.layer, c.method, c.keep, c.rank, run, recipe.seed + run)
        for c in candidates
        for run in range(recipe.runs if workspace.methods[c.method].random else 1)
    ]
    finetuned = recipe.finetune and (recipe.finetune.keeps or recipe.keeps)
    after = [
        Trial(c.layer, c.method, c.keep, c.rank, run, recipe.seed + run, "after")
        for c in candidates
        for run in range(recipe.runs)
        if finetuned and c.keep in finetuned
    ]
    return (*before, *after)


def units(workspace: Workspace, trials: Sequence[Trial]) -> list[tuple[Trial, ...]]:
    """What is measured at once and stored in one transaction, in the order of the work.

    Before fine-tuning, some trials of one layer, which share their passes over the images. After
    it, one trial, since it takes long; run by run, so that whole runs are there early. Trials that
    differ in nothing but the keep they were asked for are always together: see :func:`outcome_key`.

    Args:
        workspace: The model and the recipe.
        trials: What is still to be measured.
    """
    sets: dict[Trial, list[Trial]] = {}
    for trial in trials:
        sets.setdefault(outcome_key(trial), []).append(trial)
    before = [s for s in sets.values() if s[0].stage == "before"]
    after = [s for s in sets.values() if s[0].stage == "after"]
    chunks = [
        chunk
        for _, layer in groupby(before, lambda trials: trials[0].layer)
        for chunk in _chunks(list(layer), _size(workspace))
    ]
    chunks += [[s] for s in sorted(after, key=lambda trials: trials[0].run)]
    return [tuple(trial for trials in chunk for trial in trials) for chunk in chunks]


def effort(workspace: Workspace, trial: Trial) -> int:
    """About how many images pass through the model for a trial: what a progress bar counts.

    Args:
        workspace: The model and the recipe.
        trial: The trial.
    """
    recipe, dataset = workspace.recipe, workspace.dataset
    shown = _images(dataset, recipe.evaluation.split, recipe.evaluation.images)
    if trial.stage == "before" or recipe.finetune is None:
        return shown
    trained = _images(dataset, "train", recipe.finetune.images)
    checked = _images(dataset, "validation", None)
    # A step takes a forward pass, a backward pass of twice its cost, and no short cut.
    return shown + recipe.finetune.epochs * (3 * trained + checked)


def check_data(dataset: Dataset, recipe: StudyRecipe, metrics: Sequence[Metric]) -> None:
    """Refuse a data set that lacks what a recipe measures on.

    Args:
        dataset: The data.
        recipe: Which splits it asks for.
        metrics: Its metrics; those of features need images too.

    Raises:
        UsageError: Naming the split that is missing and those that are there.
    """
    wanted = {"evaluation.split": recipe.evaluation.split}
    if any(metric.target == "features" for metric in metrics):
        wanted["features.split"] = recipe.features.split
    there = [s for s in ("train", "validation", "test") if getattr(dataset, s)]
    for key, split in wanted.items():
        if split not in there:
            raise UsageError(
                f"{key} is {split!r}, and {dataset.name} has no such images",
                f"it has: {', '.join(there) or 'none at all'}",
            )
    if recipe.finetune is not None:
        trainable_splits(dataset)


def identity(workspace: Workspace) -> dict[str, Any]:
    """What the measurements depend on besides their trials, as JSON values.

    The device is not part of it: results of different devices agree up to rounding.

    Args:
        workspace: The model, the data and the recipe.
    """
    values = {key: v for key, v in asdict(workspace.recipe).items() if key not in _FREE}
    for part in ("evaluation", "features"):
        del values[part]["batch_size"]
    result: dict[str, Any] = {
        "model": {
            "weights": content_hash(workspace.model),
            "structure": _structure_hash(workspace.model),
        },
        "data": workspace.dataset.fingerprint,
        "recipe": values,
        "methods": {n: {**settings_of(m), **traits_of(m)} for n, m in workspace.methods.items()},
        "versions": {
            **workspace.versions,
            "tdkit": __version__,
            "torch": str(torch.__version__),
        },
    }
    # Not where it is the law that older runs, which do not say so, were analysed by.
    laws = {m.name: m.penalty for m in workspace.metrics if m.penalty != "squares"}
    if laws:
        result["penalties"] = laws
    normal: dict[str, Any] = json.loads(json.dumps(result))
    return normal


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Where two identities differ, a line each; empty when measurements of both can be mixed.

    A study that is not fine-tuned, or not yet, agrees with one that is: its measurements are the
    same.
    """
    before, after = dict(_flat(old, "")), dict(_flat(new, ""))
    mixed = any(part["recipe"]["finetune"] is None for part in (old, new))
    return [
        f"{key}: {_shown(before.get(key))} → {_shown(after.get(key))}"
        for key in {**before, **after}
        if before.get(key) != after.get(key)
        and not (mixed and key.startswith("recipe.finetune"))
        # Older runs have it; what it says stands under the methods as well.
        and key != "recipe.options"
        # What is concluded from measurements hangs on it, not they.
        and not key.startswith("penalties.")
    ]


def chosen_layers(workspace: Workspace) -> list[Layer]:
    """The layers of a study in the order of the recipe, or of the model where it names none.

    Raises:
        UsageError: If a pattern matches no layer.
        UnsupportedError: If a layer that is named cannot be decomposed, or no layer can.
    """
    layers, patterns = workspace.layers, workspace.recipe.layers
    good = [layer for layer in layers if layer.reason is None]
    if not good:
        reasons = [f"{layer.name}: {layer.reason}" for layer in layers[:3]]
        raise UnsupportedError(
            "no layer of the model can be compressed", "; ".join(reasons) or "it has none"
        )
    if not patterns:
        return good
    for pattern in patterns:
        for layer in layers:
            if pattern == layer.name and layer.reason is not None:
                raise UnsupportedError(
                    f"the layer {pattern!r} cannot be compressed: {layer.reason}",
                    "take it out of layers",
                )
        if not any(matches(layer, pattern) for layer in good):
            raise unknown_name(pattern, [layer.name for layer in good], "layer")
    found = [layer for pattern in patterns for layer in good if matches(layer, pattern)]
    return list({layer.name: layer for layer in found}.values())


def _candidates(workspace: Workspace) -> Iterator[_Candidate]:
    layers = chosen_layers(workspace)
    by_hand = _ranks_by_hand(workspace, layers)
    for name, method in workspace.methods.items():
        _check_support(name, method, layers)
    for layer in layers:
        for name, method in workspace.methods.items():
            if unsupported(method, _spec(layer)) is not None:
                continue
            rule = _Rule(workspace, layer, name)
            for keep in workspace.recipe.keeps:
                rank = by_hand.get((layer.name, name, keep)) or rule.rank(keep)
                if rank is not None:
                    yield _Candidate(layer.name, name, keep, rank)


class _Rule:
    """The ranks that the rule of a recipe gives for one layer and method."""

    def __init__(self, workspace: Workspace, layer: Layer, name: str) -> None:
        self.layer = layer
        self.name = name
        self.method = workspace.methods[name]
        self.rule = workspace.recipe.rank_rule
        self.prepared: Prepared | None = None
        if self.rule == "best":
            weights, evidence = ModuleWeights(workspace.model), Evidence(workspace.recipe.seed)
            with blamed(name, layer):
                self.prepared = prepare(layer, weights, name, self.method, evidence)

    def rank(self, keep: float) -> Rank | None:
        """The rank for a keep; None where the factorization would not be smaller."""
        spec = _spec(self.layer)
        with blamed(self.name, self.layer):
            if self.prepared is not None:
                rank = self.prepared.rank(keep, self.rule)
            else:
                rank = self.method.rank(spec.per_group(), keep)
            size = count(layer_stages(self.method, spec, rank))
        return rank if size < self.layer.parameters else None


def _ranks_by_hand(
    workspace: Workspace, layers: Sequence[Layer]
) -> dict[tuple[str, str, float], Rank]:
    known = {layer.name: layer for layer in layers}
    result: dict[tuple[str, str, float], Rank] = {}
    for given in workspace.recipe.ranks:
        if given.layer not in known:
            raise unknown_name(given.layer, list(known), "layer of the study")
        method, spec = workspace.methods[given.method], _spec(known[given.layer])
        group = spec.per_group()
        what = f"ranks of {given.layer} under {given.method}"
        if (reason := unsupported(method, spec)) is not None:
            raise UsageError(f"{what}: {reason}", "take them out of the recipe")
        one = isinstance(method.max_rank(group), int) and len(given.rank) == 1
        rank = given.rank[0] if one else given.rank
        try:
            check_rank(method, group, rank)
        except UsageError as error:
            raise UsageError(f"{what}: {error}", error.hint) from error
        result[given.layer, given.method, given.keep] = rank
    return result


def _check_support(name: str, method: Decomposition, layers: Sequence[Layer]) -> None:
    reasons = [unsupported(method, _spec(layer)) for layer in layers]
    if None not in reasons:
        raise UsageError(
            f"{name} supports none of the layers: {reasons[0]}", "leave it out of methods"
        )


def _spec(layer: Layer) -> LayerSpec:
    assert layer.spec is not None, "layers without a spec have a reason to be kept dense"
    return layer.spec


def _size(workspace: Workspace) -> Callable[[Trial], int]:
    """Parameters of the factorization of a trial."""
    layers = {layer.name: layer for layer in workspace.layers}

    def size(trial: Trial) -> int:
        spec = _spec(layers[trial.layer])
        return count(layer_stages(workspace.methods[trial.method], spec, trial.rank))

    return size


def _chunks(sets: list[list[Trial]], size: Callable[[Trial], int]) -> Iterator[list[list[Trial]]]:
    """Runs of about equal length, none too long or, on average, too large."""
    parameters = sum(size(trials[0]) for trials in sets)
    number = max(math.ceil(len(sets) / _TOGETHER), math.ceil(parameters / _PARAMETERS))
    number = min(number, len(sets))
    for part in range(number):
        yield sets[part * len(sets) // number : (part + 1) * len(sets) // number]


def _images(dataset: Dataset, split: str, limit: int | None) -> int:
    part = getattr(dataset, split)
    size = len(part) if part is not None else 0
    return size if limit is None else min(limit, size)


def _structure_hash(model: nn.Module) -> str:
    """Of the names, classes and settings of all modules: what a state_dict does not tell."""
    digest = hashlib.sha256()
    for name, module in model.named_modules(remove_duplicate=False):
        digest.update(f"{name} {type(module).__qualname__} {module.extra_repr()}\n".encode())
    return digest.hexdigest()


def _flat(value: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, part in value.items():
        if isinstance(part, Mapping):
            yield from _flat(part, f"{prefix}{key}.")
        else:
            yield prefix + key, part


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, list):
        return ", ".join(map(_shown, value)) or "nothing"
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{k} {_shown(v)}" for k, v in value.items() if v is not None) + ")"
    is_hash = isinstance(value, str) and len(value) == 64
    return f"{value[:12]}…" if is_hash else str(value)
