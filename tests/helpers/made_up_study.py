"""Results of studies that never ran: each candidate has a true error, and bits drawn from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from tdkit.recipes import parse_recipe
from tdkit.study.recipe import METRICS, StudyRecipe
from tdkit.study.records import Baseline, Measurement, Phase, Results, Trial, pack

LAYERS = {"conv2": 36864, "conv3": 73728, "conv4": 147456, "conv5": 147456, "conv6": 147584}
SENSITIVITY = dict(zip(LAYERS, (1.6, 1.3, 1.0, 0.7, 0.45), strict=True))
QUALITY = {"cp": 0.75, "tucker": 1.0, "tt": 1.12}

RECIPE = """
title = "A made-up study"
model = "garipov"
data = "fashion-mnist"
layers = ["conv2", "conv3", "conv4", "conv5", "conv6"]
numbers = [2, 4, 6, 8, 10]
methods = ["cp", "tucker", "tt"]
keeps = [0.9, 0.75, 0.5, 0.25, 0.1]
focus = [0.5, 0.25, 0.1]
runs = 5
notes = ["Nothing was measured: every number is made up."]

[[published]]
stage = "before"
metric = "relative-weights"
mean = 0.775
std = 0.023

[[published]]
stage = "after"
metric = "relative-weights"
mean = 0.65
std = 0.028
"""


@dataclass(frozen=True)
class World:
    """What the made-up candidates are like.

    Args:
        images: Evaluation images.
        runs: Repetitions; only cp differs between them before fine-tuning.
        stages: The measured ones.
        spread: Standard deviation of the logarithm of what the error does not explain.
        shared: How much the same images are hard for all candidates, from 0 to 1.
        layers: Names and parameters.
        methods: Names and how large their errors are.
        keeps: Keeps.
    """

    images: int = 2000
    runs: int = 1
    stages: tuple[Phase, ...] = ("before",)
    spread: float = 0.25
    shared: float = 0.9
    layers: tuple[tuple[str, int], ...] = tuple(LAYERS.items())
    methods: tuple[tuple[str, float], ...] = tuple(QUALITY.items())
    keeps: tuple[float, ...] = (0.9, 0.75, 0.5, 0.25, 0.1)


def synthetic(world: World, rng: np.random.Generator, text: str = RECIPE) -> Results:
    """Make a study up."""
    hard = rng.normal(size=world.images)
    measurements = [
        _measurement(world, trial, params, quality, hard, rng)
        for stage in world.stages
        for layer, params in world.layers
        for method, quality in world.methods
        for keep in world.keeps
        for run in range(world.runs)
        if run == 0 or stage == "after" or method == "cp"
        for trial in [Trial(layer, method, keep, _rank(method, keep), run, run, stage)]
    ]
    dense = draw_bits(0.07, hard, world.shared, rng)
    layers = (("conv1", 576), *world.layers, ("fc", 1290))
    baseline = Baseline(pack(dense), world.images, True, 555_000, 10**8, layers)
    return Results(text, {"model": "made up"}, baseline, tuple(measurements), len(measurements))


def draw_bits(
    error: float, hard: NDArray[np.float64], shared: float, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Which images a model of this true error is right about."""
    own = rng.normal(size=hard.shape)
    return np.asarray(np.sqrt(shared) * hard + np.sqrt(1 - shared) * own > ndtri(error))


def _rank(method: str, keep: float) -> int | tuple[int, ...]:
    size = max(1, round(100 * keep))
    return {"cp": size, "tucker": (size, size // 2 + 1)}.get(method, (size, size // 3 + 1, size))


def _measurement(
    world: World,
    trial: Trial,
    params: int,
    quality: float,
    hard: NDArray[np.float64],
    rng: np.random.Generator,
) -> Measurement:
    # What a candidate is like does not depend on the order in which candidates are made.
    random = 0 if trial.method != "cp" else trial.run
    own = np.random.default_rng(
        [hash_of(trial.layer), hash_of(trial.method), round(1000 * trial.keep), random]
    )
    relative = min(0.99, quality * (1 - trial.keep) ** 1.5 * np.exp(0.08 * own.normal()))
    lost = (
        0.8 * SENSITIVITY.get(trial.layer, 1.0) * relative**4 * np.exp(world.spread * own.normal())
    )
    if trial.stage == "after":
        lost = 0.15 * lost * np.exp(0.3 * rng.normal())
    norm = 4 + params / 20000
    weights = {
        "relative": relative,
        "scaled": relative * norm / params,
        "absolute": relative * norm,
    }
    errors = {f"{name}-weights": float(value) for name, value in weights.items()}
    wobble = np.exp(0.25 * own.normal())
    errors |= {f"{name}-features": float(value * wobble) for name, value in weights.items()}
    bits = draw_bits(min(0.9, 0.07 + lost), hard, world.shared, rng)
    change = {}
    if trial.stage == "after":
        change = {name: float(0.002 * np.exp(own.normal())) for name, _ in world.layers}
        change[trial.layer] *= 12
    return Measurement(
        trial=trial,
        params_before=params,
        params_after=round(params * trial.keep),
        macs_before=params * 196,
        macs_after=round(params * trial.keep) * 196,
        errors={name: errors[name] for name in METRICS},
        correct=pack(bits),
        images=world.images,
        change=change,
        seconds=0.5,
    )


def hash_of(name: str) -> int:
    return int.from_bytes(name.encode(), "big") % 2**32


def make_results(seed: int = 0, text: str = RECIPE, **world: Any) -> tuple[Results, StudyRecipe]:
    """A study and its recipe: ``make_results(images=500, runs=3)``, see :class:`World`."""
    results = synthetic(World(**world), np.random.default_rng(seed), text)
    return results, parse_recipe(text, StudyRecipe, "the recipe")
