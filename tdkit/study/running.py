"""Run a study: hand units of work to this process or to others, and store what comes back."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import torch

from tdkit.errors import Spelling, TdkitError, UsageError, option, spelled, spelling
from tdkit.study import measuring
from tdkit.study.records import Baseline, Measurement, Results, Trial, outcome_key
from tdkit.study.trials import differences, effort, identity, units

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from tdkit.study.store import Store
    from tdkit.study.workspace import Workspace

Measure = Callable[["Workspace", Sequence[Trial]], list[Measurement]]
Unit = tuple[Trial, ...]
_Note = Callable[[str], None]

_DIED = "the worker process died twice while it measured nothing but this: out of memory?"

# A worker may serve several threads; the model that it measures with is one.
_BUSY = threading.Lock()


@dataclass(frozen=True)
class Pool:
    """Other processes that measure.

    Attributes:
        executors: Gives an executor for as long as its context lasts; asked for a new one when
            the workers of the last one have died.
        width: How many units are handed out at once; all when None.
    """

    executors: Callable[[], AbstractContextManager[Executor]]
    width: int | None = None


def run(
    workspace: Workspace,
    store: Store,
    *,
    pool: Pool | None = None,
    open: Callable[[], Workspace] | None = None,
    retry_failed: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    note: Callable[[str], None] = lambda text: None,
    measure: Measure = measuring.measure,
    baseline: Callable[[Workspace], Baseline] = measuring.baseline,
) -> Results:
    """Measure what the plan of a store lacks; everything is stored as soon as it is there.

    The results do not depend on where or in which order the units are measured.

    Args:
        workspace: The model, the data and the recipe.
        store: Where results are kept, and which of them are there already.
        pool: Where to measure; in this process when None.
        open: Opens the same workspace in another process; needed with a pool. It is pickled, and
            a worker keeps the workspace of one that is equal to the last one.
        retry_failed: Measure again what has failed.
        progress: Called with the effort done and that of the whole plan.
        note: Called with what the user should know, such as that a worker has died.
        measure: Measures the trials of one unit, in their order.
        baseline: Measures the dense model.

    Returns:
        All results, in the order of the plan.

    Raises:
        UsageError: If a worker opens another model, other data or another recipe.
        StorageError: If results cannot be stored.
        TdkitError: If the workers keep dying, or whatever measuring raises.
    """
    if store.baseline is None:
        store.set_baseline(baseline(workspace))
    done = store.finished()
    again = {t for t, m in done.items() if retry_failed and m.failure is not None}
    left = [trial for trial in store.plan if trial not in done or trial in again]
    efforts = {trial: effort(workspace, trial) for trial in store.plan}
    total = sum(efforts.values())
    missing = sum(efforts[trial] for trial in left)
    progress(total - missing, total)
    chunks = units(workspace, left)
    if pool is None:
        results = _inline(workspace, measure, chunks)
    else:
        if open is None:
            raise UsageError("other processes need a way to open the study")
        job = partial(work, measure, open, json.dumps(identity(workspace)), spelling())
        results = _spread(pool, job, chunks, note)
    with closing(results):
        for measurements in results:
            store.add(measurements)
            missing -= sum(efforts[m.trial] for m in measurements)
            progress(total - missing, total)
    return store.results()


def _inline(
    workspace: Workspace, measure: Measure, chunks: Sequence[Unit]
) -> Generator[list[Measurement], None, None]:
    for chunk in chunks:
        yield measure(workspace, chunk)


def work(
    measure: Measure,
    open: Callable[[], Workspace],
    expected: str,
    spelling: Spelling,
    trials: Unit,
) -> list[Measurement]:
    """What a worker does: open the study, unless it is open, and measure a unit.

    Args:
        measure: Measures trials.
        open: Opens the study.
        expected: The identity that it must have, as JSON.
        spelling: How the process that hands out the work speaks to its user.
        trials: One unit, or nothing, to see that a worker can open the study.

    Raises:
        UsageError: If the study that opens here is another one.
    """
    with _BUSY, spelled(spelling):
        workspace = _opened(open, expected)
        return measure(workspace, trials) if trials else []


@lru_cache(maxsize=1)
def _opened(open: Callable[[], Workspace], expected: str) -> Workspace:
    workspace = open()
    found = differences(json.loads(expected), identity(workspace))
    if found:
        lines = "\n".join(f"  {line}" for line in found)
        raise UsageError(
            f"a worker opened another study than this process:\n{lines}",
            "give it the same files, data and versions",
        )
    return workspace


def processes(count: int) -> Pool:
    """Worker processes on this machine, which share its threads among them.

    They end with this process, in whatever way it ends.

    Args:
        count: How many.
    """
    threads = max(1, torch.get_num_threads() // count)
    return Pool(partial(_processes, count, threads), width=count)


def dask(address: str, patience: float = 10) -> Pool:
    """The workers of a Dask cluster.

    Args:
        address: Of its scheduler, such as ``tcp://10.0.0.1:8786``.
        patience: How long to wait for it to answer, in seconds.

    Raises:
        UsageError: If Dask is not installed.
    """
    try:
        import distributed  # noqa: F401
    except ImportError as error:
        raise UsageError("Dask is not installed", "pip install 'tdkit[dask]'") from error
    return Pool(partial(_dask, address, patience))


@contextmanager
def _processes(count: int, threads: int) -> Iterator[Executor]:
    # spawn: a fork of a process with torch's threads in it can hang.
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe(duplex=False)
    executor = ProcessPoolExecutor(count, context, _start, (mine, threads))
    try:
        yield executor
    except BaseException:
        theirs.close()  # ends the workers at once: what they are at takes minutes
        raise
    finally:
        executor.shutdown(cancel_futures=True)
        theirs.close()
        mine.close()


def _start(pipe: Connection, threads: int) -> None:
    """Set up a worker process."""
    # Ctrl-C reaches the whole group; only the first process answers it, and ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # the first process has shown them
    torch.set_num_threads(threads)
    threading.Thread(target=_follow, args=(pipe,), daemon=True).start()


def _follow(pipe: Connection) -> None:
    """End this process when the other end of a pipe is closed, be it by kill -9."""
    with suppress(EOFError, OSError):
        pipe.recv()
    os._exit(1)


@contextmanager
def _dask(address: str, patience: float) -> Iterator[Executor]:
    from distributed import Client

    try:
        client = Client(address, timeout=patience, set_as_default=False)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"no Dask scheduler answers at {address}", "start one: dask scheduler; dask worker"
        ) from error
    with client:
        # pure=False: a unit that is handed out again is not the old, failed task.
        yield client.get_executor(pure=False)


@dataclass(frozen=True)
class _Suspect:
    """A unit that was under way when a worker died, and how often it died while alone."""

    unit: Unit
    deaths: int = 0


def _spread(
    pool: Pool, job: Callable[[Unit], list[Measurement]], chunks: Sequence[Unit], note: _Note
) -> Generator[list[Measurement], None, None]:
    """Measure units side by side, and those under way when a worker died again, one by one."""
    waiting, suspects = deque(chunks), deque[_Suspect]()
    renewed = False
    while waiting or suspects:
        with pool.executors() as executor:
            if renewed:
                _probe(executor, job)
            if suspects:
                yield from _alone(executor, job, suspects, note)
            else:
                yield from _side_by_side(executor, job, pool.width, waiting, suspects)
                if suspects:
                    count = sum(len(suspect.unit) for suspect in suspects)
                    note(f"a worker process died; {count} trials under way are measured again")
        renewed = True


def _side_by_side(
    executor: Executor,
    job: Callable[[Unit], list[Measurement]],
    width: int | None,
    waiting: deque[Unit],
    suspects: deque[_Suspect],
) -> Iterator[list[Measurement]]:
    running: dict[Future[list[Measurement]], Unit] = {}
    broken = False
    try:
        while running or (waiting and not broken):
            while waiting and not broken and (width is None or len(running) < width):
                try:
                    running[executor.submit(job, waiting[0])] = waiting[0]
                    waiting.popleft()
                except BrokenExecutor:
                    broken = True
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                unit = running.pop(future)
                error = _error(future)
                if error is None:
                    yield future.result()
                    continue
                suspects.append(_Suspect(unit))
                broken = broken or isinstance(error, BrokenExecutor)
    finally:
        for future in running:
            future.cancel()


def _alone(
    executor: Executor,
    job: Callable[[Unit], list[Measurement]],
    suspects: deque[_Suspect],
    note: _Note,
) -> Iterator[list[Measurement]]:
    """Measure suspects with nothing beside them, until one takes its worker with it again."""
    while suspects:
        suspect = suspects[0]
        try:
            future = executor.submit(job, suspect.unit)
        except BrokenExecutor:
            return
        try:
            error = _error(future)
        finally:
            future.cancel()
        suspects.popleft()
        if error is None:
            yield future.result()
            continue
        parts = _parts(suspect.unit)
        if len(parts) > 1:
            suspects.extendleft(_Suspect(part) for part in reversed(parts))
        elif suspect.deaths == 0:
            suspects.appendleft(replace(suspect, deaths=1))
        else:
            t = suspect.unit[0]
            note(f"{t.layer}, {t.method}, rank {t.rank}: the worker process died over it, twice")
            yield [Measurement(trial, failure=_DIED) for trial in suspect.unit]
        if isinstance(error, BrokenExecutor):
            return


def _parts(unit: Unit) -> list[Unit]:
    """The smallest units that a unit is made of."""
    sets: dict[Trial, list[Trial]] = {}
    for trial in unit:
        sets.setdefault(outcome_key(trial), []).append(trial)
    return [tuple(trials) for trials in sets.values()]


def _probe(executor: Executor, job: Callable[[Unit], list[Measurement]]) -> None:
    """Make sure that it is not the workers themselves that cannot live."""
    try:
        error = _error(executor.submit(job, ()))
    except BrokenExecutor as broken:
        error = broken
    if error is not None:
        raise TdkitError(
            f"the worker processes cannot work: {error}",
            f"run it with a smaller {option('workers')}, or without; what was measured is safe",
        ) from error


def _error(future: Future[list[Measurement]]) -> BaseException | None:
    """How a worker died over a task; None when there is a result.

    Raises whatever else went wrong.
    """
    try:
        error = future.exception()
    except CancelledError as cancelled:
        raise TdkitError(
            "the workers are gone: the executor gave up a task",
            "what was measured is safe: started again, it goes on",
        ) from cancelled
    # Dask's KilledWorker: the same task was there when several workers died.
    if error is None or isinstance(error, BrokenExecutor) or type(error).__name__ == "KilledWorker":
        return error
    raise error
