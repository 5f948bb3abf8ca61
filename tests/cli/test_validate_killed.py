"""``tdkit validate`` as its users stop it: kill -9, Ctrl-C, and the same command again."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tdkit.errors import UnreadableFileError
from tdkit.study.records import Measurement
from tdkit.study.store import read_results

# Slow without work: there is time to stop it, and none of a processor's is wasted.
PLUGIN = """
from tdkit.hookspecs import DatasetRecord, ModelRecord, hookimpl


def model(in_channels=1, num_classes=10):
    import time

    from torch import nn

    class Slow(nn.Module):
        def forward(self, x):
            time.sleep(0.015)
            return x

    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        Slow(),
        nn.Linear(16, num_classes),
    )


def data(root=None, path=None, image_size=None, seed=0):
    import torch

    from tdkit.datasets.base import in_memory_dataset

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (60, 1, 8, 8), generator=generator, dtype=torch.uint8)
    part = images, torch.arange(60) % 10
    return in_memory_dataset("slow-data", tuple("abcdefghij"), part, part, seed)


@hookimpl
def tdkit_models():
    return [ModelRecord("slow-net", "four convolutions", model, (1, 8, 8), 10)]


@hookimpl
def tdkit_datasets():
    return [DatasetRecord("slow-data", "sixty images of noise", data)]
"""

RECIPE = """
title = "A slow study"
model = "slow-net"
data = "slow-data"
layers = ["2", "4", "6"]
methods = ["cp", "tucker"]
keeps = [0.75, 0.5, 0.25]
runs = 12

[evaluation]
split = "test"
batch_size = 20

[features]
split = "train"
images = 20

[[options]]
method = "cp"
start = "uniform"
sweeps = 5
"""
PLANNED = 3 * 3 * (12 + 1)  # three layers and keeps; cp in twelve runs and tucker in one

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path, install: Callable[..., Path]) -> Iterator[Start]:
    """Start ``tdkit validate slow.toml`` in a process group of its own."""
    started: list[subprocess.Popen[str]] = []
    site = install("tdkit-slow", PLUGIN)
    (tmp_path / "slow.toml").write_text(RECIPE)
    path = os.pathsep.join([str(site), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}

    def start(*options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tdkit", "validate", "slow.toml", "--no-report"]
        process = subprocess.Popen(
            [*command, *options],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def measured(folder: Path) -> list[Measurement]:
    """What is stored so far, without the time that it took."""
    try:
        return [replace(m, seconds=0.0) for m in read_results(folder).measurements]
    except UnreadableFileError:
        return []


def stop(process: subprocess.Popen[str], folder: Path, delay: float, number: int) -> str:
    """Send a signal to its group, as a terminal does, some seconds after it stored something."""
    before = len(measured(folder))
    end = time.monotonic() + 120
    while len(measured(folder)) == before and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(delay)
    os.killpg(process.pid, number)
    return process.communicate(timeout=60)[1]


def test_killed_twice_stopped_and_ended_by_two_workers(start: Start, tmp_path: Path) -> None:
    whole, broken = start("--run", "whole"), tmp_path / "broken"
    rng = random.Random(0)
    for _ in range(2):
        process = start("--run", "broken")
        stored = measured(broken)
        stop(process, broken, rng.uniform(0, 0.5), signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL, "it had ended before"
        assert len(stored) < len(measured(broken)) < PLANNED
        assert not [m for m in stored if m not in measured(broken)]
    process = start("--run", "broken")
    told = stop(process, broken, rng.uniform(0, 0.5), signal.SIGINT)
    count = len(measured(broken))
    assert process.returncode == 128 + signal.SIGINT
    last = f"stopped; {count} of {PLANNED} measured; the same command goes on"
    assert told.splitlines()[-1] == last
    assert "Traceback" not in told
    stored = measured(broken)
    process = start("--run", "broken", "--workers", "2")
    out, told = process.communicate(timeout=240)
    assert process.returncode == 0, told
    assert f"going on: {count} of {PLANNED} were measured before" in told
    reference, _ = whole.communicate(timeout=240)
    assert whole.returncode == 0
    assert measured(broken) == measured(tmp_path / "whole")
    assert len(measured(broken)) == PLANNED
    assert not [m for m in stored if m not in measured(broken)]
    assert out.replace("broken", "whole") == reference
