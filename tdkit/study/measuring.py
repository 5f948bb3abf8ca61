"""The unit of a study's work, without state: some trials of one layer in, measurements out."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from tdkit.compression.scoring import blamed, candidate_of, factorize, prepare
from tdkit.costs.base import total_cost
from tdkit.costs.macs import MACS
from tdkit.datasets.base import Split
from tdkit.decompositions.base import Prepared
from tdkit.errors import UnsupportedError, UsageError, unknown_name
from tdkit.layers.counting import model_parameters
from tdkit.layers.evidence import Evidence
from tdkit.layers.inventory import Layer
from tdkit.layers.weights import ModuleWeights
from tdkit.metrics.base import Metric
from tdkit.metrics.features import NotFiniteError, Watched, feature_errors
from tdkit.planners.candidate import Candidate
from tdkit.study.finetuning import fine_tuned
from tdkit.study.layouts import small_maps
from tdkit.study.recipe import ImagesRecipe
from tdkit.study.records import Baseline, Measurement, Trial, outcome_key, pack
from tdkit.study.replay import dense_predictions, predictions, reason_of, replaced_predictions
from tdkit.study.workspace import Workspace


def baseline(workspace: Workspace) -> Baseline:
    """Measure the dense model.

    Raises:
        UnsupportedError: If the model is not deterministic in eval mode, does not run on the
            images, or gives no output of shape (batch, classes).
        UsageError: If the images of the recipe are missing.
    """
    images = _Images(workspace, workspace.recipe.evaluation)
    with small_maps(workspace.model):
        dense = dense_predictions(workspace.model, images)
    layers = workspace.layers
    unknown = any(layer.calls is None for layer in layers)
    return Baseline(
        correct=_bits(dense, images.labels) if images.labelled else pack(np.ones(len(dense), bool)),
        images=len(dense),
        labelled=images.labelled,
        params=model_parameters(workspace.model),
        macs=None if unknown else total_cost(workspace.model, layers, MACS),
        layers=tuple((layer.name, layer.parameters) for layer in layers),
    )


def measure(workspace: Workspace, trials: Sequence[Trial]) -> list[Measurement]:
    """Measure some trials of one layer and one stage.

    Before fine-tuning they share one pass over the evaluation images and, where feature errors
    are asked for on other images, one over those. After it each is fine-tuned on its own. What
    comes out depends on the trials alone, not on how they are grouped or on what ran before.

    Args:
        workspace: The model, the data and the recipe.
        trials: Their factorized layers are in memory together.

    Returns:
        In the order of the trials. One that fails has the reason, and the others go on.

    Raises:
        UnsupportedError: If the dense model cannot be measured; see :func:`baseline`.
        UsageError: If the layer, a method or the images are not there.
        ValueError: If the trials differ in their layer or stage.
    """
    if len({(trial.layer, trial.stage) for trial in trials}) > 1:
        raise ValueError("the trials of a unit have one layer and one stage")
    # Two keeps may lead to one rank: the same candidate, measured once.
    distinct = list(dict.fromkeys(map(outcome_key, trials)))
    with small_maps(workspace.model):
        measured = dict(zip(distinct, _measured(workspace, distinct), strict=True))
    return [replace(measured[outcome_key(trial)], trial=trial) for trial in trials]


# Approximation errors, or why there are none.
_Errors = Mapping[str, float] | str


@dataclass(frozen=True)
class _StandIn:
    """What a trial puts in the layer's place."""

    module: nn.Sequential
    candidate: Candidate
    seconds: float


def _measured(workspace: Workspace, trials: Sequence[Trial]) -> list[Measurement]:
    if not trials:
        return []
    layer = _layer(workspace, trials[0].layer)
    built = _built(workspace, layer, trials)
    done: dict[Trial, Measurement] = {}
    stand_ins: dict[Trial, _StandIn] = {}
    for trial in trials:
        if isinstance(found := built[trial], str):
            done[trial] = Measurement(trial, failure=found)
        else:
            stand_ins[trial] = found
    stage = _after if trials[0].stage == "after" else _before
    for measurement in stage(workspace, layer, stand_ins) if stand_ins else ():
        done[measurement.trial] = measurement
    return [done[trial] for trial in trials]


def _built(
    workspace: Workspace, layer: Layer, trials: Sequence[Trial]
) -> dict[Trial, _StandIn | str]:
    """For each trial what stands in for the layer, or why nothing can."""
    result: dict[Trial, _StandIn | str] = {}
    for trial in trials:
        if trial.method not in workspace.methods:
            raise unknown_name(trial.method, list(workspace.methods), "method")
    # What ranks share is done once; one method's at a time is held.
    for method, seed in dict.fromkeys((trial.method, trial.seed) for trial in trials):
        prepared: Prepared | str | None = None
        for trial in trials:
            if (trial.method, trial.seed) != (method, seed):
                continue
            start = time.perf_counter()
            if prepared is None:
                prepared = _prepared(workspace, layer, trial)
            if isinstance(prepared, str):
                result[trial] = prepared
            else:
                result[trial] = _stand_in(workspace, layer, trial, prepared, start)
    return result


def _prepared(workspace: Workspace, layer: Layer, trial: Trial) -> Prepared | str:
    weights, method = ModuleWeights(workspace.model), workspace.methods[trial.method]
    try:
        with blamed(trial.method, layer):
            found = prepare(layer, weights, trial.method, method, Evidence(trial.seed))
    except Exception as error:  # a method may fail in any way
        return reason_of(error)
    return found or f"{trial.method} does not support the layer {layer.name!r}"


def _stand_in(
    workspace: Workspace, layer: Layer, trial: Trial, prepared: Prepared, start: float
) -> _StandIn | str:
    weights = ModuleWeights(workspace.model)
    try:
        with blamed(trial.method, layer):
            factorized = factorize(layer, weights, prepared, trial.rank).eval()
            candidate = candidate_of(layer, trial.method, prepared, trial.rank, workspace.metrics)
    except Exception as error:  # a method may fail in any way
        return reason_of(error)
    return _StandIn(factorized, candidate, time.perf_counter() - start)


def _before(
    workspace: Workspace, layer: Layer, stand_ins: Mapping[Trial, _StandIn]
) -> Iterator[Measurement]:
    """Measure the model with each stand-in, as it is."""
    start = time.perf_counter()
    images = _Images(workspace, workspace.recipe.evaluation)
    modules = [stand_in.module for stand_in in stand_ins.values()]
    expected, found, errors = _passes(workspace, layer, modules, images)
    shared = (time.perf_counter() - start) / len(stand_ins)
    for (trial, stand_in), predicted, error in zip(stand_ins.items(), found, errors, strict=True):
        yield _measurement(
            trial, stand_in, error, predicted, expected, seconds=stand_in.seconds + shared
        )


def _after(
    workspace: Workspace, layer: Layer, stand_ins: Mapping[Trial, _StandIn]
) -> Iterator[Measurement]:
    """Fine-tune and measure the model with each stand-in."""
    modules = [stand_in.module for stand_in in stand_ins.values()]
    errors = _feature_errors(workspace, layer, modules)
    images = _Images(workspace, workspace.recipe.evaluation)
    dense = None if images.labelled else dense_predictions(workspace.model, images)
    for (trial, stand_in), error in zip(stand_ins.items(), errors, strict=True):
        start = time.perf_counter()
        predicted: Tensor | str
        change: Mapping[str, float] = {}
        try:
            model, change = fine_tuned(workspace, trial, layer, stand_in.module)
            predicted = dense_predictions(model, images)
        except Exception as error_of_trial:  # a training may fail in any way
            predicted = reason_of(error_of_trial)
        seconds = stand_in.seconds + time.perf_counter() - start
        expected = images.labels if dense is None else dense
        yield _measurement(trial, stand_in, error, predicted, expected, seconds, change)


def _measurement(
    trial: Trial,
    stand_in: _StandIn,
    errors: _Errors,
    predicted: Tensor | str,
    expected: Tensor,
    seconds: float,
    change: Mapping[str, float] | None = None,
) -> Measurement:
    for outcome in (predicted, errors):
        if isinstance(outcome, str):
            return Measurement(trial, failure=outcome, seconds=seconds)
    assert isinstance(predicted, Tensor)
    assert isinstance(errors, Mapping)
    candidate = stand_in.candidate
    params, macs = candidate.costs["params"], candidate.costs["macs"]
    assert params is not None
    return Measurement(
        trial=trial,
        params_before=params.before,
        params_after=params.after,
        macs_before=None if macs is None else macs.before,
        macs_after=None if macs is None else macs.after,
        errors={**candidate.errors, **errors},
        correct=_bits(predicted, expected),
        images=len(predicted),
        change=change or {},
        seconds=seconds,
    )


def _passes(
    workspace: Workspace, layer: Layer, modules: Sequence[nn.Module], images: _Images
) -> tuple[Tensor, list[Tensor | str], Sequence[_Errors]]:
    """The right classes, and of each stand-in the predicted ones and the feature errors."""
    model, metrics = workspace.model, _feature_metrics(workspace)
    if metrics and _shares_images(workspace):
        watched = Watched(layer.name, modules, metrics)
        try:
            dense, found = predictions(model, layer, modules, images, watch=watched)
            return images.labels if images.labelled else dense, found, _means(watched, layer)
        except Exception:  # of a stand-in that does not fit, or of the model: see below
            pass
    errors = _feature_errors(workspace, layer, modules)
    if images.labelled:
        found = replaced_predictions(model, layer, modules, images)
        return images.labels, found, errors
    dense, found = predictions(model, layer, modules, images)
    return dense, found, errors


def _feature_errors(
    workspace: Workspace, layer: Layer, modules: Sequence[nn.Module]
) -> Sequence[_Errors]:
    """The feature errors of each stand-in, in a pass of their own."""
    metrics = _feature_metrics(workspace)
    if not metrics:
        return [{} for _ in modules]
    recipe = workspace.recipe
    images = _Images(workspace, recipe.evaluation if _shares_images(workspace) else recipe.features)
    try:
        found = feature_errors(workspace.model, {layer.name: modules}, images, metrics)
    except NotFiniteError as error:
        return [reason_of(error)] * len(modules)
    except Exception as error:  # a stand-in may fail in any way
        if len(modules) == 1:
            return [reason_of(error)]
        return [e for module in modules for e in _feature_errors(workspace, layer, [module])]
    if layer.name not in found:
        return [_unreached(layer)] * len(modules)
    return list(map(_ranked, found[layer.name]))


def _shares_images(workspace: Workspace) -> bool:
    """Whether features are measured on the evaluation images."""
    recipe = workspace.recipe
    split: Split | None = getattr(workspace.dataset, recipe.features.split)
    size = len(split) if split is not None else 0
    counts = {min(part.images or size, size) for part in (recipe.features, recipe.evaluation)}
    return recipe.features.split == recipe.evaluation.split and len(counts) == 1


def _means(watched: Watched, layer: Layer) -> Sequence[_Errors]:
    if not watched.samples:
        return [_unreached(layer)] * len(watched.modules)
    try:
        return list(map(_ranked, watched.means()))
    except NotFiniteError as error:
        return [reason_of(error)] * len(watched.modules)


def _unreached(layer: Layer) -> str:
    return f"no image reaches the layer {layer.name!r} in a way that features can be compared"


def _ranked(errors: Mapping[str, float]) -> dict[str, float]:
    """An output that overflows is infinitely far off, which can be ranked; NaN cannot."""
    return {name: math.inf if math.isnan(error) else error for name, error in errors.items()}


def _feature_metrics(workspace: Workspace) -> list[Metric]:
    return [metric for metric in workspace.metrics if metric.target == "features"]


# A GPU takes so many batches of a CPU at once.
_GPU_BATCHES = 8


class _Images(Iterable[Tensor]):
    """Images as the model takes them; their labels are known once they have gone by."""

    def __init__(self, workspace: Workspace, wanted: ImagesRecipe) -> None:
        split: Split | None = getattr(workspace.dataset, wanted.split)
        if split is None or len(split) == 0:
            raise UsageError(f"{workspace.dataset.name} has no {wanted.split} images")
        self.labelled = split.labels is not None
        self._split, self._wanted = split, wanted
        self._device = workspace.device
        self._batch_size = wanted.batch_size * (_GPU_BATCHES if self._device.type == "cuda" else 1)
        dtypes = (p.dtype for p in workspace.model.parameters() if p.is_floating_point())
        self._dtype = next(dtypes, torch.float32)
        self._labels: list[Tensor] = []

    def __iter__(self) -> Iterator[Tensor]:
        self._labels = []
        for images, labels in self._split.batches(self._batch_size, limit=self._wanted.images):
            self._labels.append(labels)
            yield images.to(self._device, self._dtype)

    @property
    def labels(self) -> Tensor:
        """Class of every image that has gone by, int64 (n,)."""
        return torch.cat([torch.empty(0, dtype=torch.int64), *self._labels])


def _layer(workspace: Workspace, name: str) -> Layer:
    found = {layer.name: layer for layer in workspace.layers}
    if name not in found:
        raise unknown_name(name, list(found), "layer")
    layer = found[name]
    if layer.reason is not None:
        raise UnsupportedError(f"the layer {name!r} stays dense: {layer.reason}")
    return layer


def _bits(predicted: Tensor, expected: Tensor) -> bytes:
    """For each image whether the prediction is right; a NaN among the logits is not."""
    return pack(((predicted == expected) & (predicted >= 0)).numpy())
