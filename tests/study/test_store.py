"""A run folder: what is stored stays, and nothing else is let in."""

from __future__ import annotations

import json
import math
import os
import sqlite3
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_study
from hypothesis import given, settings
from hypothesis import strategies as st

from tdkit.errors import StorageError, UnreadableFileError, UsageError
from tdkit.study.records import Baseline, Measurement, Trial
from tdkit.study.store import FILE, SCHEMA, Progress, Store, read_results, set_aside

IDENTITY = {
    "model": {"weights": "a" * 64, "structure": "b" * 64},
    "data": "c" * 64,
    "recipe": {"keeps": [0.5, 0.25], "finetune": None, "evaluation": {"images": None}},
    "versions": {"tdkit": "0.1.0", "torch": "2.14"},
}
TUNED = {**IDENTITY, "recipe": {**IDENTITY["recipe"], "finetune": {"epochs": 2}}}
PLAN = (
    Trial("conv2", "cp", 0.5, 12, 0, 3),
    Trial("conv2", "cp", 0.5, 12, 1, 4),
    Trial("conv2", "tucker", 0.5, (6, 5), 0, 3),
    Trial("conv2", "tucker", 0.25, (6, 5), 0, 3),
    Trial("conv1.a", "tt", 0.1, (1, 2, 3), 0, 2**62, "after"),
)
BASELINE = Baseline(b"\xff\x00", 16, True, 1234, None, (("conv2", 100), ("fc", 5)))


def opened(folder, identity=IDENTITY, recipe="title = 'x'", plan=PLAN):
    return Store(folder, identity=identity, recipe=recipe, plan=plan)


def full(folder):
    """A run folder with everything in it, closed."""
    with opened(folder) as store:
        store.set_baseline(BASELINE)
        store.add([tiny_study.made_up(trial) for trial in PLAN])
    return folder


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


numbers = st.floats(allow_nan=False)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9)
ranks = st.one_of(
    st.integers(1, 2**40), st.lists(st.integers(1, 999), min_size=1, max_size=4).map(tuple)
)
trials = st.builds(
    Trial,
    layer=names,
    method=names,
    keep=st.floats(1e-9, 1),
    rank=ranks,
    run=st.integers(0, 99),
    seed=st.integers(0, 2**63 - 1),
    stage=st.sampled_from(["before", "after"]),
)
measurements = st.builds(
    Measurement,
    trial=trials,
    params_before=st.integers(0, 2**50),
    params_after=st.integers(0, 2**50),
    macs_before=st.none() | st.integers(0, 2**60),
    macs_after=st.none() | st.integers(0, 2**60),
    errors=st.dictionaries(names, numbers, max_size=6),
    correct=st.binary(max_size=20),
    images=st.integers(0, 10**6),
    change=st.dictionaries(names, numbers, max_size=3),
    seconds=st.floats(0, 1e6),
    failure=st.none() | st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
)


@given(st.lists(measurements, max_size=6, unique_by=lambda m: m.trial), st.randoms())
@settings(max_examples=40, deadline=None)
def test_what_is_stored_comes_back_as_it_was_in_the_order_of_the_plan(found, random) -> None:
    plan = [m.trial for m in found]
    shuffled = random.sample(found, len(found))
    with tempfile.TemporaryDirectory() as folder:
        with opened(Path(folder), plan=plan) as store:
            store.set_baseline(BASELINE)
            for m in shuffled:
                store.add([m])
            assert store.finished() == {m.trial: m for m in found}
        results = read_results(Path(folder))
    assert results.measurements == tuple(found)
    assert (results.baseline, results.identity, results.planned) == (BASELINE, IDENTITY, len(plan))


def test_results_tell_all(tmp_path) -> None:
    found = read_results(full(tmp_path))
    assert found.recipe == "title = 'x'"
    assert [m.trial for m in found.measurements] == list(PLAN)
    assert math.isinf(found.measurements[0].errors["scaled-weights"])
    with opened(tmp_path) as store:
        assert store.results() == found
        assert store.baseline == BASELINE


def test_reading_changes_nothing(tmp_path) -> None:
    before = bytes_of(full(tmp_path))
    read_results(tmp_path)
    assert bytes_of(tmp_path) == before


def test_results_of_an_unfinished_run_and_of_one_that_is_going_on(tmp_path) -> None:
    with opened(tmp_path) as store:
        with pytest.raises(UnreadableFileError, match="has measured nothing yet"):
            read_results(tmp_path)
        store.set_baseline(BASELINE)
        for number, trial in enumerate(PLAN):
            assert len(read_results(tmp_path).measurements) == number
            assert store.progress() == Progress(number, 0, len(PLAN))
            store.add([tiny_study.made_up(trial)])
    assert len(read_results(tmp_path).measurements) == len(PLAN)


def test_a_reader_sees_all_of_a_transaction_or_nothing(tmp_path) -> None:
    plan = [Trial("conv2", "cp", 0.5, rank, 0, 0) for rank in range(1, 201)]
    seen = []
    with opened(tmp_path, plan=plan) as store:
        store.set_baseline(BASELINE)
        stop = threading.Event()

        def read() -> None:
            while not stop.is_set():
                seen.append(len(read_results(tmp_path).measurements))

        reader = threading.Thread(target=read)
        reader.start()
        for start in range(0, 200, 10):
            store.add([tiny_study.made_up(trial) for trial in plan[start : start + 10]])
        stop.set()
        reader.join()
    assert seen == sorted(seen)
    assert all(count % 10 == 0 for count in seen)


def test_nothing_changes_between_the_tables_that_a_reader_reads(tmp_path, monkeypatch) -> None:
    from tdkit.study import store as module

    full(tmp_path)
    real, refused = module._identity, []

    def meddling(connection):
        """Another recipe with another plan comes, half way through."""
        other = sqlite3.connect(tmp_path / FILE, timeout=0)
        try:
            with other:
                other.execute("UPDATE study SET recipe = 'another'")
                other.execute("DELETE FROM plan")
        except sqlite3.OperationalError as error:
            refused.append(str(error))
        finally:
            other.close()
        return real(connection)

    monkeypatch.setattr(module, "_identity", meddling)
    found = read_results(tmp_path)
    assert found.recipe == "title = 'x'"
    assert [m.trial for m in found.measurements] == list(PLAN)
    assert found.planned == len(PLAN)
    assert refused == ["database is locked"]


class TestNothingTwice:
    def test_a_measurement_that_is_there_stays(self, tmp_path) -> None:
        first = tiny_study.made_up(PLAN[0])
        with opened(tmp_path) as store:
            store.add([first])
            store.add([replace(first, seconds=99.0)])
            store.add([replace(first, failure="too late")])
            assert store.finished() == {PLAN[0]: first}

    def test_but_a_failed_one_makes_room(self, tmp_path) -> None:
        good = tiny_study.made_up(PLAN[0])
        with opened(tmp_path) as store:
            store.add([Measurement(PLAN[0], failure="out of memory")])
            assert store.progress() == Progress(1, 1, len(PLAN))
            store.add([Measurement(PLAN[0], failure="NaN")])
            assert store.finished()[PLAN[0]].failure == "NaN"
            store.add([good])
            assert store.finished() == {PLAN[0]: good}

    def test_trials_that_differ_in_anything_are_kept_apart(self, tmp_path) -> None:
        t = PLAN[0]
        others = [
            replace(t, layer="conv3"),
            replace(t, method="tt"),
            replace(t, keep=0.25),
            replace(t, rank=13),
            replace(t, rank=(12,)),
            replace(t, run=1),
            replace(t, seed=4),
            replace(t, stage="after"),
        ]
        with opened(tmp_path, plan=[t, *others]) as store:
            store.add([tiny_study.made_up(trial) for trial in [t, *others]])
            assert list(store.finished()) == [t, *others]


class TestGoingOn:
    def test_the_same_study_goes_on(self, tmp_path) -> None:
        with opened(tmp_path) as store:
            store.set_baseline(BASELINE)
            store.add([tiny_study.made_up(PLAN[1])])
        with opened(tmp_path, recipe="title = 'y'") as store:
            assert list(store.finished()) == [PLAN[1]]
            assert store.baseline == BASELINE
            assert store.results().recipe == "title = 'y'"

    @pytest.mark.parametrize(
        ("path", "value", "line"),
        [
            (("model", "weights"), "d" * 64, "model.weights: aaaaaaaaaaaa… → dddddddddddd…"),
            (("data",), "d" * 64, "data: cccccccccccc… → dddddddddddd…"),
            (("recipe", "keeps"), [0.5], "recipe.keeps: 0.5, 0.25 → 0.5"),
            (("recipe", "evaluation", "images"), 7, "recipe.evaluation.images: nothing → 7"),
            (("versions", "torch"), "2.15", "versions.torch: 2.14 → 2.15"),
        ],
    )
    def test_another_one_is_refused_with_the_difference(self, tmp_path, path, value, line) -> None:
        before = bytes_of(full(tmp_path))
        changed = replaced(IDENTITY, path, value)
        with pytest.raises(UsageError, match="measurements of another study") as caught:
            opened(tmp_path, changed, plan=PLAN[:1])
        assert str(caught.value).splitlines()[1:] == [f"  {line}"]
        assert "run=" in caught.value.hint
        assert "fresh=True" in caught.value.hint
        assert bytes_of(tmp_path) == before
        opened(tmp_path).close()  # the lock is free again

    def test_fine_tuning_may_be_added_left_out_and_taken_up_again(self, tmp_path) -> None:
        before, after = PLAN[:4], PLAN[4:]
        with opened(tmp_path, plan=before) as store:
            store.add([tiny_study.made_up(trial) for trial in before])
        with opened(tmp_path, TUNED, plan=PLAN) as store:
            assert list(store.finished()) == list(before)
            store.add([tiny_study.made_up(trial) for trial in after])
        with opened(tmp_path, plan=before) as store:
            assert list(store.finished()) == list(before)
            assert store.progress() == Progress(4, 0, 4)
        other = replaced(TUNED, ("recipe", "finetune", "epochs"), 3)
        with pytest.raises(UsageError, match=r"recipe\.finetune\.epochs: 2 → 3"):
            opened(tmp_path, other)
        with opened(tmp_path, TUNED) as store:
            assert list(store.finished()) == list(PLAN)


def replaced(value, path, new):
    if not path:
        return new
    return {**value, path[0]: replaced(value[path[0]], path[1:], new)}


HOLDER = """
import json, sys, time
from pathlib import Path
from tdkit.study.store import Store
store = Store(Path(sys.argv[1]), identity=json.loads(sys.argv[2]), recipe="", plan=())
print("held", flush=True)
time.sleep(60)
"""


class TestOneWriter:
    def test_a_second_writer_is_refused_by_name(self, tmp_path) -> None:
        with opened(tmp_path) as store:
            with pytest.raises(
                StorageError, match=f"process {os.getpid()} on .*, since "
            ) as caught:
                opened(tmp_path)
            assert "run=" in caught.value.hint
            store.add([tiny_study.made_up(PLAN[0])])
        with opened(tmp_path) as store:
            assert list(store.finished()) == [PLAN[0]]

    def test_a_killed_writer_holds_nothing(self, tmp_path) -> None:
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path), json.dumps(IDENTITY)],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(StorageError, match=f"process {holder.pid} on "):
                opened(tmp_path)
        finally:
            holder.kill()
            holder.communicate()
        opened(tmp_path).close()

    def test_the_lock_is_let_go_when_opening_fails(self, tmp_path) -> None:
        (tmp_path / FILE).write_text("not a database, but long enough to look at")
        for _ in range(2):
            with pytest.raises(UnreadableFileError, match="is damaged or no SQLite file"):
                opened(tmp_path)


class TestFullAndReadOnly:
    def test_a_full_disk_loses_nothing(self, tmp_path) -> None:
        with opened(tmp_path) as store:
            store.set_baseline(BASELINE)
            store.add([tiny_study.made_up(PLAN[0])])
            pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
            store._connection.execute(f"PRAGMA max_page_count = {pages}")
            large = replace(tiny_study.made_up(PLAN[1]), correct=bytes(10**6))
            with pytest.raises(StorageError, match="there is no room left") as caught:
                store.add([tiny_study.made_up(PLAN[2]), large])
            assert "started again, it goes on" in caught.value.hint
            assert list(store.finished()) == [PLAN[0]]
            store._connection.execute("PRAGMA max_page_count = 1000000")
            store.add([large])
        assert [m.trial for m in read_results(tmp_path).measurements] == list(PLAN[:2])

    def test_a_read_only_file(self, tmp_path) -> None:
        full(tmp_path)
        with opened(tmp_path) as store:
            store._connection.execute("PRAGMA query_only = 1")
            with pytest.raises(StorageError, match="cannot be used: attempt to write a readonly"):
                store.add([Measurement(PLAN[0], failure="x")])
        assert len(read_results(tmp_path).measurements) == len(PLAN)

    def test_a_folder_that_cannot_be_made(self, tmp_path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(StorageError, match="Not a directory"):
            opened(tmp_path / "file" / "run")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_a_read_only_folder(self, tmp_path) -> None:
        full(tmp_path)
        tmp_path.chmod(0o500)
        try:
            with pytest.raises(StorageError, match="Permission denied"):
                opened(tmp_path / "new")
            assert len(read_results(tmp_path).measurements) == len(PLAN)
        finally:
            tmp_path.chmod(0o700)

    def test_a_stop_in_the_middle_of_a_transaction_undoes_it(self, tmp_path) -> None:
        class Stopped(BaseException):
            pass

        class Stopping(Store):
            def _commit(self) -> None:
                raise Stopped

        full(tmp_path)
        with pytest.raises(Stopped):
            Stopping(tmp_path, identity=IDENTITY, recipe="new", plan=())
        assert read_results(tmp_path).recipe == "title = 'x'"


class TestReading:
    def test_a_journal_that_a_killed_writer_left_is_rolled_back_in_a_copy(self, tmp_path) -> None:
        full(tmp_path)
        hot_journal(tmp_path)
        before = bytes_of(tmp_path)
        assert f"{FILE}-journal" in before
        assert [m.trial for m in read_results(tmp_path).measurements] == list(PLAN)
        assert bytes_of(tmp_path) == before
        with opened(tmp_path) as store:  # a writer rolls it back in place
            assert list(store.finished()) == list(PLAN)

    def test_no_folder_no_run_no_database(self, tmp_path) -> None:
        with pytest.raises(UnreadableFileError, match="holds no run"):
            read_results(tmp_path / "none")
        with pytest.raises(UnreadableFileError, match="holds no run"):
            read_results(tmp_path)
        (tmp_path / FILE).write_bytes(os.urandom(5000))
        with pytest.raises(UnreadableFileError, match="is damaged or no SQLite file"):
            read_results(tmp_path)

    def test_an_empty_file_is_a_run_that_has_not_begun(self, tmp_path) -> None:
        (tmp_path / FILE).touch()
        with pytest.raises(UnreadableFileError, match="has measured nothing yet"):
            read_results(tmp_path)
        opened(tmp_path).close()

    def test_a_truncated_database(self, tmp_path) -> None:
        full(tmp_path)
        content = (tmp_path / FILE).read_bytes()
        (tmp_path / FILE).write_bytes(content[: len(content) // 2])
        with pytest.raises(UnreadableFileError, match="is damaged"):
            read_results(tmp_path)

    def test_another_version_and_another_program(self, tmp_path) -> None:
        full(tmp_path)
        with sqlite3.connect(tmp_path / FILE) as connection:
            connection.execute(f"PRAGMA user_version = {SCHEMA + 1}")
        connection.close()
        for use in (read_results, opened):
            with pytest.raises(UnreadableFileError, match=f"has version {SCHEMA + 1} of the"):
                use(tmp_path)
        other = tmp_path / "other"
        other.mkdir()
        with sqlite3.connect(other / FILE) as connection:
            connection.execute("CREATE TABLE mine (x)")
        connection.close()
        for use in (read_results, opened):
            with pytest.raises(UnreadableFileError, match="was not written by tdkit"):
                use(other)


def hot_journal(folder):
    """Leave a run folder as a writer does that is killed while its changes go to the file."""
    source, journal = folder / FILE, folder / f"{FILE}-journal"
    connection = sqlite3.connect(source, isolation_level=None)
    connection.execute("PRAGMA cache_size = 1")  # so that changes reach the file before the end
    connection.execute("BEGIN")
    connection.execute("DELETE FROM plan")
    rows = [(place, "x" * 500, "cp", 0.5, "1", 0, 0, "before") for place in range(200)]
    connection.executemany("INSERT INTO plan VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
    torn, written = source.read_bytes(), journal.read_bytes()
    connection.execute("ROLLBACK")
    connection.close()
    assert torn != source.read_bytes()
    source.write_bytes(torn)
    journal.write_bytes(written)


class TestSetAside:
    def test_the_old_run_is_moved_to_a_free_name(self, tmp_path) -> None:
        run = tmp_path / "mine"
        assert set_aside(run) is None
        for number in (1, 2):
            full(run)
            moved = set_aside(run)
            assert moved == tmp_path / f"mine-old-{number}"
            assert len(read_results(moved).measurements) == len(PLAN)
            assert not run.exists()

    def test_a_run_that_is_going_on_stays(self, tmp_path) -> None:
        with opened(tmp_path / "mine"), pytest.raises(StorageError, match="another run writes to"):
            set_aside(tmp_path / "mine")
        assert (tmp_path / "mine").exists()

    def test_a_folder_that_is_no_run_stays(self, tmp_path) -> None:
        (tmp_path / "thesis.txt").touch()
        with pytest.raises(StorageError, match="is not a run folder"):
            set_aside(tmp_path)
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "lock").touch()
        assert set_aside(tmp_path / "run") is None
