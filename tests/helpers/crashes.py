"""Kill a study with SIGKILL again and again, and go on: ``python crashes.py FOLDER KILLS SEED``.

Importing torch takes seconds and the study a fraction of one, so every attempt is a fork of this
process, which has everything in memory. Prints what it did as JSON; fails where a measurement was
lost, doubled, changed or made again.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import tiny_study
import torch

from tdkit.study import measuring, trials
from tdkit.study.recipe import FinetuneRecipe, to_toml
from tdkit.study.records import Measurement, Results, Trial
from tdkit.study.running import run
from tdkit.study.store import FILE, Store, read_results
from tdkit.training.recipe import OptimizerRecipe

if TYPE_CHECKING:
    from tdkit.study.workspace import Workspace

RECIPE = replace(
    tiny_study.RECIPE,
    layers=("2", "4"),
    methods=("cp",),
    keeps=(0.5, 0.25),
    finetune=FinetuneRecipe(
        epochs=1, batch_size=8, optimizer=OptimizerRecipe("sgd", 0.01), images=8, keeps=(0.5,)
    ),
)


class Mortal(Store):
    """A store that kills its process before or after a commit.

    Args:
        number: Which commit of its life, from 0.
        before: Whether it dies before that commit or after it.
    """

    number: int | None = None
    before: bool = False
    commits: int = 0

    def _commit(self) -> None:
        die = self.commits == type(self).number
        if die and type(self).before:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._commit()
        if die:
            os.kill(os.getpid(), signal.SIGKILL)
        self.commits += 1


@dataclass(frozen=True)
class Study:
    """A study that is run in forks of this process."""

    workspace: Workspace
    plan: tuple[Trial, ...]

    def run(self, folder: Path, store: type[Store] = Store) -> int:
        """Measure what is missing; returns the number of commits."""
        asked = trials.identity(self.workspace)
        text = to_toml(self.workspace.recipe)
        with store(folder, identity=asked, recipe=text, plan=self.plan) as opened:
            run(self.workspace, opened, measure=logging(folder))
            return getattr(opened, "commits", 0)

    def attempt(self, folder: Path, store: type[Store], delay: float | None = None) -> bool:
        """Run in a fork, which is killed after a delay; whether it got to the end."""
        stored = {m.trial: m for m in measurements(folder)}
        log = folder.with_suffix(".log")
        logged = len(log.read_text().splitlines()) if log.exists() else 0
        pid = os.fork()
        if pid == 0:
            self._child(folder, store)
        if delay is not None:
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert status in (0, signal.SIGKILL), f"the study failed: status {status}"
        again = set(log.read_text().splitlines()[logged:]) if log.exists() else set()
        twice = again & {repr(trial) for trial in stored}
        assert not twice, f"measured although it was stored: {twice}"
        now = {m.trial: m for m in measurements(folder)}
        lost = {trial for trial, m in stored.items() if now.get(trial) != m}
        assert not lost, f"lost or changed: {lost}"
        return status == 0

    def _child(self, folder: Path, store: type[Store]) -> None:
        try:
            self.run(folder, store)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)


def logging(folder: Path) -> Callable[[Workspace, Sequence[Trial]], list[Measurement]]:
    """Measures, and writes down what, before it begins."""
    log = folder.with_suffix(".log")

    def measure(workspace: Workspace, chunk: Sequence[Trial]) -> list[Measurement]:
        with log.open("a") as file:
            file.writelines(f"{trial!r}\n" for trial in chunk)
        return measuring.measure(workspace, chunk)

    return measure


def measurements(folder: Path) -> Sequence[Measurement]:
    """What is stored so far, as a reader sees it who comes by now."""
    if not (folder / FILE).exists():
        return ()
    with closing(sqlite3.connect(folder / FILE)) as connection:
        if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            return ()
        if not connection.execute("SELECT count(*) FROM baseline").fetchone()[0]:
            return ()
    return read_results(folder).measurements


def check(folder: Path, reference: Results) -> None:
    """The table is that of the run that nobody interrupted."""
    found = read_results(folder)
    assert untimed(found) == untimed(reference)
    assert (found.identity, found.baseline) == (reference.identity, reference.baseline)
    with closing(sqlite3.connect(folder / FILE)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        rows = connection.execute("SELECT count(*) FROM measurement").fetchone()[0]
    assert rows == found.planned == len(found.measurements)


def untimed(results: Results) -> list[Measurement]:
    """Measurements without what differs from run to run."""
    return [replace(m, seconds=0.0) for m in results.measurements]


def random_points(
    study: Study, folder: Path, reference: Results, kills: int, seed: int, seconds: float
) -> int:
    """Kill runs at random times until there were enough kills; returns how many runs it took."""
    rng = random.Random(seed)
    runs = 0
    while kills > 0:
        run_folder = folder / f"random-{runs}"
        # What is left to do gets shorter with every kill, so that a run takes several.
        while not study.attempt(run_folder, Store, rng.uniform(0, seconds / 2) if kills else None):
            kills -= 1
        check(run_folder, reference)
        runs += 1
    return runs


def boundaries(study: Study, folder: Path, reference: Results, commits: int) -> int:
    """Kill runs before and after each commit; returns how many were killed."""
    killed = 0
    for number in range(commits):
        for before in (True, False):
            Mortal.number, Mortal.before = number, before
            run_folder = folder / f"commit-{number}-{before}"
            assert not study.attempt(run_folder, Mortal)
            assert study.attempt(run_folder, Store)
            check(run_folder, reference)
            killed += 1
    return killed


def main(folder: Path, kills: int, seed: int) -> None:
    """Interrupt a study in every way, and print what was done."""
    torch.set_num_threads(1)
    trials._TOGETHER = 2  # many small units, so that there is much to interrupt
    workspace = tiny_study.workspace(RECIPE)
    study = Study(workspace, trials.plan_trials(workspace))
    study.run(folder / "warm")  # the first run imports what the others find
    start = time.monotonic()
    commits = study.run(folder / "reference", Mortal)
    seconds = time.monotonic() - start
    reference = read_results(folder / "reference")
    assert not [m.failure for m in reference.measurements if m.failure]
    runs = random_points(study, folder, reference, kills, seed, seconds)
    killed = boundaries(study, folder, reference, commits)
    print(json.dumps({"seconds": seconds, "commits": commits, "runs": runs, "boundaries": killed}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
