"""Running a study: in this process, in others and on Dask, whatever happens to a worker."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tiny_study
import torch

from tdkit.cli.spelling import ShellSpelling
from tdkit.errors import TdkitError, UsageError, spelled
from tdkit.opening import Source
from tdkit.study.opening import NamedStudy, ObjectStudy
from tdkit.study.recipe import FinetuneRecipe, RankRecipe, to_toml
from tdkit.study.records import Measurement
from tdkit.study.running import Pool, dask, processes, run
from tdkit.study.store import Store, read_results
from tdkit.study.trials import identity, plan_trials, units
from tdkit.training.recipe import OptimizerRecipe

RECIPE = tiny_study.RECIPE
FINETUNE = FinetuneRecipe(
    epochs=1, batch_size=8, optimizer=OptimizerRecipe("sgd", 0.01), images=16, keeps=(0.5,)
)


@pytest.fixture(scope="module")
def workspace():
    return tiny_study.workspace()


def stored(folder, workspace):
    return Store(
        folder,
        identity=identity(workspace),
        recipe=to_toml(workspace.recipe),
        plan=plan_trials(workspace),
    )


def pretended(folder, workspace, measure=tiny_study.pretend, **options):
    """Run a study whose measurements are made up."""
    with stored(folder, workspace) as store:
        return run(workspace, store, measure=measure, baseline=tiny_study.dense, **options)


def untimed(results):
    return [replace(m, seconds=0.0) for m in results.measurements]


class TestInline:
    def test_everything_is_measured_once_and_stored_in_the_order_of_the_plan(
        self, workspace, tmp_path
    ) -> None:
        asked: list[object] = []

        def measure(given, trials):
            assert given is workspace
            asked.extend(trials)
            return tiny_study.pretend(given, trials)

        steps: list[tuple[int, int]] = []
        progress = lambda *step: steps.append(step)  # noqa: E731
        results = pretended(tmp_path, workspace, measure, progress=progress)
        plan = plan_trials(workspace)
        assert results.measurements == tuple(map(tiny_study.made_up, plan))
        assert Counter(asked) == Counter(plan)
        assert results == read_results(tmp_path)
        assert results.baseline == tiny_study.dense(workspace)
        total = 60 * len(plan)
        assert steps[0] == (0, total)
        assert steps[-1] == (total, total)
        assert [done for done, _ in steps] == sorted({done for done, _ in steps})

    def test_real_measurements_do_not_depend_on_how_they_are_cut(
        self, workspace, tmp_path, monkeypatch
    ) -> None:
        with stored(tmp_path / "a", workspace) as store:
            together = run(workspace, store)
        monkeypatch.setattr("tdkit.study.trials._PARAMETERS", 1)
        with stored(tmp_path / "b", workspace) as store:
            alone = run(workspace, store)
        assert untimed(together) == untimed(alone)
        assert not [m.failure for m in together.measurements if m.failure]

    def test_it_goes_on_where_it_stopped(self, workspace, tmp_path) -> None:
        chunks = units(workspace, plan_trials(workspace))

        class Stopped(BaseException):
            pass

        asked: list[object] = []

        def stopping(after, given, trials):
            if len(asked) >= sum(map(len, chunks[:after])):
                raise Stopped
            asked.extend(trials)
            return tiny_study.pretend(given, trials)

        for after in (1, 2, len(chunks) - 1):
            with pytest.raises(Stopped):
                pretended(tmp_path, workspace, partial(stopping, after))
            assert len(read_results(tmp_path).measurements) == len(asked)
        results = pretended(tmp_path, workspace, partial(stopping, 99))
        assert Counter(asked) == Counter(plan_trials(workspace))
        assert len(results.measurements) == results.planned

    def test_failures_are_results_until_they_are_asked_for_again(self, workspace, tmp_path) -> None:
        def failing(given, trials):
            return [
                Measurement(t, failure="out of memory")
                if t.method == "tt"
                else tiny_study.made_up(t)
                for t in trials
            ]

        def never(given, trials):
            raise AssertionError("measured again")

        results = pretended(tmp_path, workspace, failing)
        failed = [m for m in results.measurements if m.failure]
        assert {m.trial.method for m in failed} == {"tt"}
        assert pretended(tmp_path, workspace, never) == results
        asked: list[object] = []

        def again(given, trials):
            asked.extend(trials)
            return tiny_study.pretend(given, trials)

        results = pretended(tmp_path, workspace, again, retry_failed=True)
        assert asked == [m.trial for m in failed]
        assert results.measurements == tuple(map(tiny_study.made_up, plan_trials(workspace)))

    def test_keeps_of_one_rank_are_measured_together(self, tmp_path) -> None:
        ranks = tuple(RankRecipe("2", "tucker", keep, (4, 4)) for keep in RECIPE.keeps)
        workspace = tiny_study.workspace(replace(RECIPE, ranks=ranks, keeps=RECIPE.keeps))
        with stored(tmp_path, workspace) as store:
            results = run(workspace, store)
        found = [
            m for m in results.measurements if (m.trial.layer, m.trial.method) == ("2", "tucker")
        ]
        assert [m.trial.keep for m in found] == list(RECIPE.keeps)
        assert len({(m.correct, m.seconds, *m.errors.values()) for m in found}) == 1

    def test_what_cannot_be_measured_at_all_is_raised(self, tmp_path) -> None:
        workspace = tiny_study.workspace()
        with (
            stored(tmp_path, workspace) as store,
            pytest.raises(UsageError, match="need a way to open"),
        ):
            run(workspace, store, pool=Pool(lambda: nullcontext(ThreadPoolExecutor(1))))


class TestProcesses:
    def test_the_table_is_that_of_the_inline_run_also_after_fine_tuning(self, tmp_path) -> None:
        recipe = replace(RECIPE, finetune=FINETUNE, methods=("cp", "tt"))
        workspace = tiny_study.workspace(recipe)
        with stored(tmp_path / "inline", workspace) as store:
            inline = run(workspace, store)
        threads = torch.get_num_threads()
        with stored(tmp_path / "workers", workspace) as store:
            spread = run(workspace, store, pool=processes(2), open=copied(recipe))
        assert untimed(spread) == untimed(inline)
        assert {m.trial.stage for m in inline.measurements} == {"before", "after"}
        assert not [m.failure for m in inline.measurements if m.failure]
        assert torch.get_num_threads() == threads

    def test_a_worker_that_dies_is_reported_and_its_trials_are_measured_again(
        self, workspace, tmp_path, monkeypatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        said: list[str] = []
        results = pretended(
            tmp_path / "run",
            workspace,
            tiny_study.fail_once,
            pool=processes(1),
            open=tiny_study.workspace,
            note=said.append,
        )
        assert results.measurements == tuple(map(tiny_study.made_up, plan_trials(workspace)))
        assert len(said) == 1
        assert "a worker process died" in said[0]
        assert "trials under way are measured again" in said[0]


def test_ctrl_c_does_not_reach_what_a_worker_measures() -> None:
    """A terminal sends it to the whole group; the first process stops the others."""
    # Whoever started these tests may ignore it, and children would take that over.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with processes(1).executors() as executor:
            assert executor.submit(signal.raise_signal, signal.SIGINT).exception() is None
    finally:
        signal.signal(signal.SIGINT, before)


def copied(recipe):
    """Opens the tiny study from a pickle of its objects."""
    named = NamedStudy(recipe, "noise", Source("tiny"))
    return ObjectStudy.of(named, tiny_study.network(), tiny_study.noise())


STOPPED = """
import sys
sys.path.insert(0, sys.argv[1])
import signal
import tiny_study
from pathlib import Path
from tdkit.cli.stopping import StoppedError
from tdkit.study.running import processes, run
from tdkit.study.store import Store
from tdkit.study.trials import identity, plan_trials

def stop(number, frame):
    raise StoppedError(number)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, stop)
    workspace = tiny_study.workspace()
    plan = plan_trials(workspace)
    with Store(Path("run"), identity=identity(workspace), recipe="", plan=plan) as store:
        try:
            run(workspace, store, pool=processes(1), open=tiny_study.workspace,
                measure=tiny_study.sleep, baseline=tiny_study.dense)
        except StoppedError as stopped:
            print("stopped", stopped.number)
"""


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def until(condition, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return bool(condition())


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_workers_end_with_the_first_process(tmp_path, name) -> None:
    (tmp_path / "study.py").write_text(STOPPED)
    helpers = str(Path(tiny_study.__file__).parent)
    first = subprocess.Popen(
        [sys.executable, "study.py", helpers],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert until(lambda: any(tmp_path.glob("worker-*")))
        (worker,) = (int(path.name.partition("-")[2]) for path in tmp_path.glob("worker-*"))
        number = getattr(signal, name)
        # As Ctrl-C does: to the whole group.
        os.killpg(first.pid, number) if name == "SIGINT" else first.send_signal(number)
        out, err = first.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(first.pid, signal.SIGKILL)
    assert until(lambda: not alive(worker), 10)
    if name != "SIGKILL":
        assert (out, err) == (f"stopped {int(number)}\n", "")


class Unreliable(Executor):
    """Runs tasks at once; the ones that are told to break it do."""

    def __init__(self, breaks) -> None:
        self.breaks = breaks
        self.broken = False

    def submit(self, fn, /, *args, **kwargs):
        if self.broken:
            raise BrokenExecutor("broken before")
        future: Future = Future()
        try:
            if self.breaks(args[-1]):
                raise self.breaks.error
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            self.broken = isinstance(error, BrokenExecutor)
            future.set_exception(error)
        return future


class KilledWorker(Exception):  # noqa: N818
    """What Dask raises when workers died over a task."""


class Breaks:
    """Which units break the executor, and how often."""

    def __init__(self, error, times, culprit) -> None:
        self.error, self.left, self.culprit = error, times, culprit

    def __call__(self, unit) -> bool:
        if self.left and any(map(self.culprit, unit)):
            self.left -= 1
            return True
        return False


class TestAnyExecutor:
    def run(self, folder, workspace, executors, **options):
        return pretended(
            folder, workspace, pool=Pool(executors, **options), open=tiny_study.workspace
        )

    @pytest.mark.parametrize("width", [None, 1, 3])
    def test_threads_give_the_same_table(self, workspace, tmp_path, width) -> None:
        executor = partial(ThreadPoolExecutor, 4)
        results = self.run(tmp_path, workspace, executor, width=width)
        assert results.measurements == tuple(map(tiny_study.made_up, plan_trials(workspace)))

    @pytest.mark.parametrize("error", [BrokenExecutor("gone"), KilledWorker("gone")])
    @pytest.mark.parametrize(("times", "fails"), [(0, 0), (1, 0), (2, 0), (3, 0), (4, 1), (99, 1)])
    def test_deaths_are_forgiven_twice_to_a_trial_that_is_alone(
        self, workspace, tmp_path, error, times, fails
    ) -> None:
        def culprit(trial):
            return (trial.layer, trial.method, trial.keep) == ("4", "tt", 0.5)

        breaks = Breaks(error, times, culprit)
        executors = lambda: nullcontext(Unreliable(breaks))  # noqa: E731
        results = self.run(tmp_path, workspace, executors)
        failed = [m.trial for m in results.measurements if m.failure]
        assert len(failed) == fails
        assert all(map(culprit, failed))
        good = [m for m in results.measurements if not m.failure]
        assert good == [tiny_study.made_up(m.trial) for m in good]
        assert len(results.measurements) == results.planned

    def test_workers_that_cannot_live_end_the_run(self, workspace, tmp_path) -> None:
        broken = Unreliable(Breaks(BrokenExecutor("gone"), 1, lambda trial: True))
        with pytest.raises(TdkitError, match="worker processes cannot work: broken before"):
            self.run(tmp_path, workspace, lambda: nullcontext(broken))
        assert read_results(tmp_path).measurements == ()

    def test_an_executor_that_gives_up_ends_the_run_and_keeps_what_is_there(
        self, workspace, tmp_path
    ) -> None:
        class GivingUp(Unreliable):
            def submit(self, fn, /, *args, **kwargs):
                future = super().submit(fn, *args, **kwargs)
                if any(trial.layer == "6" for trial in args[-1]):
                    future = Future()
                    future.cancel()
                    future.set_running_or_notify_cancel()
                return future

        executors = lambda: nullcontext(GivingUp(lambda unit: False))  # noqa: E731
        with pytest.raises(TdkitError, match="the workers are gone"):
            self.run(tmp_path, workspace, executors, width=1)
        kept = read_results(tmp_path).measurements
        assert {m.trial.layer for m in kept} == {"2", "4"}

    def test_any_other_error_of_a_worker_is_raised_as_it_is(self, workspace, tmp_path) -> None:
        @contextmanager
        def executors():
            with ThreadPoolExecutor(2) as executor:
                yield executor

        def failing(given, trials):
            raise UsageError("what went wrong", "what to do")

        with pytest.raises(UsageError, match="what went wrong") as caught:
            pretended(tmp_path, workspace, failing, pool=Pool(executors), open=tiny_study.workspace)
        assert caught.value.hint == "what to do"

    def test_a_worker_speaks_to_the_user_of_the_first_process(self, workspace, tmp_path) -> None:
        options = {"pool": processes(1), "open": tiny_study.workspace}
        with (
            spelled(ShellSpelling()),
            pytest.raises(UsageError, match=r"refused: --keeps 0\.5") as caught,
        ):
            pretended(tmp_path / "shell", workspace, tiny_study.refuse, **options)
        assert caught.value.hint == "tdkit inspect"
        with pytest.raises(UsageError, match=r"refused: keeps=\[0.5\]") as caught:
            pretended(tmp_path / "python", workspace, tiny_study.refuse, **options)
        assert caught.value.hint == "tdkit.inspect"

    def test_another_model_on_the_other_side_is_refused(self, workspace, tmp_path) -> None:
        pool = Pool(partial(ThreadPoolExecutor, 1))
        with pytest.raises(UsageError, match=r"a worker opened another study.*\n  model\.weights"):
            pretended(tmp_path, workspace, pool=pool, open=tiny_study.other_workspace)
        assert read_results(tmp_path).measurements == ()

    def test_units_are_stored_as_they_arrive(self, workspace, tmp_path) -> None:
        counts: list[int] = []

        def watching(given, trials):
            counts.append(len(read_results(tmp_path).measurements))
            return tiny_study.pretend(given, trials)

        pretended(
            tmp_path,
            workspace,
            watching,
            pool=Pool(partial(ThreadPoolExecutor, 1), width=1),
            open=tiny_study.workspace,
        )
        chunks = units(workspace, plan_trials(workspace))
        assert counts == [sum(map(len, chunks[:n])) for n in range(len(chunks))]


# Dask's own threads and sockets are not all closed when a cluster is.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
class TestDask:
    def test_a_cluster_of_two_processes_gives_the_same_table(self, workspace, tmp_path) -> None:
        distributed = pytest.importorskip("distributed")
        with stored(tmp_path / "inline", workspace) as store:
            inline = run(workspace, store)
        options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
        with distributed.LocalCluster(**options, processes=True) as cluster:
            pool = dask(cluster.scheduler_address)
            with stored(tmp_path / "dask", workspace) as store:
                spread = run(workspace, store, pool=pool, open=copied(RECIPE))
        assert untimed(spread) == untimed(inline)

    def test_no_scheduler_there(self, workspace, tmp_path) -> None:
        pytest.importorskip("distributed")
        with pytest.raises(UsageError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:1"):
            pretended(
                tmp_path, workspace, pool=dask("tcp://127.0.0.1:1", 0.2), open=tiny_study.workspace
            )

    def test_dask_that_is_not_installed(self, monkeypatch) -> None:
        monkeypatch.setitem(sys.modules, "distributed", None)
        with pytest.raises(UsageError, match="Dask is not installed") as caught:
            dask("tcp://127.0.0.1:1")
        assert "tdkit[dask]" in caught.value.hint


def test_what_crosses_to_a_worker_is_equal_to_itself_there() -> None:
    """Or each task would open the study anew."""
    for opener in (copied(RECIPE), NamedStudy(RECIPE, "noise", Source("tiny"))):
        again = pickle.loads(pickle.dumps(opener))
        assert again == opener
        assert hash(again) == hash(opener)
    assert copied(RECIPE) != copied(replace(RECIPE, seed=9))
    other = ObjectStudy.of(
        NamedStudy(RECIPE, "noise", Source("tiny")), tiny_study.network(1), tiny_study.noise()
    )
    assert other != copied(RECIPE)
