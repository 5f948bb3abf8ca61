"""A study that takes less than a second: a small network on random images."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from tdkit.datasets.base import Dataset, in_memory_dataset
from tdkit.errors import UsageError, command, option
from tdkit.registry import load_registry
from tdkit.study.opening import make_workspace
from tdkit.study.recipe import ImagesRecipe, MethodRecipe, StudyRecipe
from tdkit.study.records import Baseline, Measurement, pack

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tdkit.study.records import Trial
    from tdkit.study.workspace import Workspace

RECIPE = StudyRecipe(
    title="A tiny study",
    model="tiny",
    data="noise",
    methods=("cp", "tucker", "tt"),
    keeps=(0.75, 0.5, 0.25),
    runs=2,
    seed=3,
    evaluation=ImagesRecipe("test", batch_size=16),
    features=ImagesRecipe("train", 20, batch_size=16),
    options=(MethodRecipe("cp", start="uniform"),),
)


def network(seed: int = 0) -> nn.Sequential:
    """Four convolutions, of which the inner three can be compressed, and a linear layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 10, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(10, 12, 3, stride=2),
            nn.ReLU(),
            nn.Conv2d(12, 12, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(12, 4),
        ).eval()


def noise(seed: int = 0, labelled: bool = True, channels: int = 1) -> Dataset:
    """Sixty images for training and sixty for testing, 8 x 8 pixels, in four classes."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (60, channels, 8, 8), generator=generator, dtype=torch.uint8)
    part = images, torch.arange(60) % 4
    found = in_memory_dataset("noise", tuple("abcd"), part, part, 0)
    return found if labelled else replace(found, test=replace(found.test, labels=None))  # type: ignore[type-var]


def workspace(recipe: StudyRecipe = RECIPE, seed: int = 0, labelled: bool = True) -> Workspace:
    """Everything that a study needs."""
    return make_workspace(recipe, network(seed), noise(labelled=labelled), load_registry())


def other_workspace() -> Workspace:
    """The same study of another model."""
    return workspace(seed=1)


def made_up(trial: Trial) -> Measurement:
    """A measurement that depends on the trial alone."""
    number = sum(map(ord, repr(replace(trial, keep=0.0)))) % 997
    bits = torch.arange(40) % (2 + number % 7) == 0
    return Measurement(
        trial,
        params_before=100,
        params_after=number,
        macs_before=None,
        macs_after=number,
        errors={"relative-weights": number / 997, "scaled-weights": float("inf")},
        correct=pack(bits.numpy()),
        images=40,
        change={"0": 0.1} if trial.stage == "after" else {},
        seconds=0.25,
    )


def dense(_workspace: Workspace) -> Baseline:
    """A made-up baseline."""
    return Baseline(pack((torch.arange(40) > 3).numpy()), 40, True, 1000, None, (("0", 80),))


def pretend(_workspace: Workspace, trials: Sequence[Trial]) -> list[Measurement]:
    """Measure nothing."""
    return [made_up(trial) for trial in trials]


def fail_once(_workspace: Workspace, trials: Sequence[Trial]) -> list[Measurement]:
    """Take the worker process along the first time that it is called in the current folder."""
    if not (marker := Path("died")).exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return pretend(_workspace, trials)


def refuse(_workspace: Workspace, trials: Sequence[Trial]) -> list[Measurement]:
    """Raise an error that speaks of an option and a command."""
    raise UsageError(f"refused: {option('keeps', [0.5])}", command("inspect"))


def sleep(_workspace: Workspace, trials: Sequence[Trial]) -> list[Measurement]:
    """Measure for ever, and leave a file with the number of the process."""
    Path(f"worker-{os.getpid()}").touch()
    signal.pause()
    return pretend(_workspace, trials)
