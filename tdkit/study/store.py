"""A run folder: everything that a study has measured, in one SQLite file.

The file is written in rollback-journal mode with ``synchronous=EXTRA``, which is FULL and also
flushes the folder after a commit, without which a power cut can undo the last one. At rest a run
is the one file ``results.sqlite``. Each transaction holds whole units of work, so a run that is
stopped anywhere leaves finished measurements and nothing else.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tdkit.decompositions.base import Rank
from tdkit.errors import StorageError, UnreadableFileError, UsageError, command, option
from tdkit.study.records import Baseline, Measurement, Results, Trial
from tdkit.study.trials import differences

FILE = "results.sqlite"
"""The name of the database in a run folder."""

SCHEMA = 1
"""The version of the tables below; kept in SQLite's ``user_version``."""

_LOCK = "lock"
_PATIENCE = 60.0  # seconds that a reader or writer waits for the other's transaction

_TRIAL = "layer, method, keep, rank, run, seed, stage"
_OUTCOME = (
    "params_before, params_after, macs_before, macs_after, errors, correct, images, change,"
    " seconds, failure"
)
_TABLES = (
    # One row: what the measurements depend on, and the recipe they were last asked for with.
    "CREATE TABLE study (identity TEXT NOT NULL, recipe TEXT NOT NULL)",
    "CREATE TABLE baseline (correct BLOB NOT NULL, images INTEGER NOT NULL, labelled INTEGER NOT"
    " NULL, params INTEGER NOT NULL, macs INTEGER, layers TEXT NOT NULL)",
    # The trials of the recipe in its order.
    "CREATE TABLE plan (place INTEGER PRIMARY KEY, layer TEXT NOT NULL, method TEXT NOT NULL,"
    " keep REAL NOT NULL, rank TEXT NOT NULL, run INTEGER NOT NULL, seed INTEGER NOT NULL,"
    " stage TEXT NOT NULL)",
    "CREATE TABLE measurement (layer TEXT NOT NULL, method TEXT NOT NULL, keep REAL NOT NULL,"
    " rank TEXT NOT NULL, run INTEGER NOT NULL, seed INTEGER NOT NULL, stage TEXT NOT NULL,"
    " params_before INTEGER NOT NULL, params_after INTEGER NOT NULL, macs_before INTEGER,"
    " macs_after INTEGER, errors TEXT NOT NULL, correct BLOB NOT NULL, images INTEGER NOT NULL,"
    " change TEXT NOT NULL, seconds REAL NOT NULL, failure TEXT,"
    f" PRIMARY KEY ({_TRIAL})) WITHOUT ROWID",
)
_ADD = (
    f"INSERT INTO measurement ({_TRIAL}, {_OUTCOME})"
    f" VALUES ({', '.join('?' * 17)})"
    f" ON CONFLICT ({_TRIAL}) DO UPDATE SET "
    + ", ".join(f"{c} = excluded.{c}" for c in _OUTCOME.split(", "))
    + " WHERE measurement.failure IS NOT NULL"
)
_PLANNED = (
    f"SELECT {', '.join(f'm.{c}' for c in f'{_TRIAL}, {_OUTCOME}'.split(', '))} FROM plan AS p"
    f" JOIN measurement AS m USING ({_TRIAL}) ORDER BY p.place"
)
_COUNTS = (
    "SELECT count(m.images), count(m.failure), count(*) FROM plan"
    f" LEFT JOIN measurement AS m USING ({_TRIAL})"
)


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        measured: Trials of the plan that are stored, failed ones included.
        failed: Those that failed.
        planned: Trials of the plan.
    """

    measured: int
    failed: int
    planned: int


class Store:
    """The only writer of a run folder; close it, or use it as a context manager.

    The writer holds a lock of the operating system, which a process loses when it ends in whatever
    way.

    Args:
        folder: The run folder; made where it is missing.
        identity: What the measurements depend on; see :func:`tdkit.study.trials.identity`.
        recipe: The text of the recipe. It replaces the one that is stored.
        plan: The trials that the recipe asks for, in its order.

    Raises:
        UsageError: If the folder holds measurements of another model, data set, recipe or version.
        UnreadableFileError: If its file is damaged or not of tdkit.
        StorageError: If another process writes to the folder, or it cannot be written to.
    """

    def __init__(
        self, folder: Path, *, identity: Mapping[str, Any], recipe: str, plan: Sequence[Trial]
    ) -> None:
        self.folder = folder
        self.plan = tuple(plan)
        self._lock = _acquire(folder)
        try:
            self._connection = _connect(folder / FILE)
            try:
                self._open(identity, recipe, plan)
            except BaseException:
                self._connection.close()
                raise
        except BaseException:
            os.close(self._lock)
            raise

    def _open(self, identity: Mapping[str, Any], recipe: str, plan: Sequence[Trial]) -> None:
        with _explained(self.folder):
            self._execute("PRAGMA synchronous = EXTRA")
            new = _is_new(self._connection, self.folder)
        if not new:
            identity = _merged(_identity(self._connection), identity, self.folder)
        with self._transaction():
            if new:
                for table in _TABLES:
                    self._execute(table)
                self._execute(f"PRAGMA user_version = {SCHEMA}")
            self._execute("DELETE FROM study")
            self._execute("INSERT INTO study VALUES (?, ?)", (json.dumps(identity), recipe))
            self._execute("DELETE FROM plan")
            self._connection.executemany(
                f"INSERT INTO plan VALUES ({', '.join('?' * 8)})",
                [(place, *_trial_row(trial)) for place, trial in enumerate(plan)],
            )

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and let another process write."""
        self._connection.close()
        os.close(self._lock)

    @property
    def baseline(self) -> Baseline | None:
        """The dense model; None until it has been measured."""
        return _baseline(self._connection)

    def set_baseline(self, baseline: Baseline) -> None:
        """Store what the dense model does, for good.

        Raises:
            StorageError: If the folder cannot be used, or the disk is full.
            UnreadableFileError: If its file is damaged.
        """
        b = baseline
        row = (b.correct, b.images, b.labelled, b.params, b.macs, json.dumps(b.layers))
        with self._transaction():
            self._execute("DELETE FROM baseline")
            self._execute("INSERT INTO baseline VALUES (?, ?, ?, ?, ?, ?)", row)

    def finished(self) -> dict[Trial, Measurement]:
        """The trials of the plan that have been measured, in its order, failed ones included.

        Raises:
            StorageError: If the folder cannot be used.
            UnreadableFileError: If its file is damaged.
        """
        with _explained(self.folder):
            return {m.trial: m for m in _measurements(self._connection)}

    def progress(self) -> Progress:
        """How far the run has come.

        Raises:
            StorageError: If the folder cannot be used.
            UnreadableFileError: If its file is damaged.
        """
        with _explained(self.folder):
            return _progress(self._connection)

    def add(self, measurements: Sequence[Measurement]) -> None:
        """Store measurements in one transaction: all of them or none, and on the disk when it ends.

        A measurement of the same trial that is there already stays, unless it had failed.

        Raises:
            StorageError: If the disk is full or the folder read-only; nothing stored is lost.
            UnreadableFileError: If the file in the folder is damaged.
        """
        with self._transaction():
            self._connection.executemany(_ADD, [_row(m) for m in measurements])

    def results(self) -> Results:
        """All that the folder holds.

        Raises:
            UnreadableFileError: If nothing has been measured yet.
        """
        return _results(self._connection, self.folder)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with _explained(self.folder):
            self._execute("BEGIN IMMEDIATE")
            try:
                yield
                self._commit()
            except BaseException:
                # SQLite has rolled back already where the disk is full.
                if self._connection.in_transaction:
                    self._execute("ROLLBACK")
                raise

    def _commit(self) -> None:
        self._execute("COMMIT")

    def _execute(self, statement: str, values: Sequence[Any] = ()) -> None:
        self._connection.execute(statement, values)


def read_results(folder: Path) -> Results:
    """Read a run folder, also while a run is going on, of an unfinished run, or read-only.

    Args:
        folder: The run folder.

    Raises:
        UnreadableFileError: If it holds no run of this version of tdkit, nothing has been measured
            yet, or its file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        raise UnreadableFileError(
            f"{folder} holds no run: it has no {FILE}",
            f"make one with {command('validate')}; {option('run', 'DIR')} says where",
        )
    try:
        return _read(path, folder)
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            raise _refused(folder, str(error)) from error
        # A writer that was killed left its journal, which takes writing to roll back.
        with tempfile.TemporaryDirectory() as copied, _explained(folder):
            for name in (FILE, f"{FILE}-journal"):
                if (folder / name).exists():
                    shutil.copyfile(folder / name, Path(copied) / name)
            return _read(Path(copied) / FILE, folder, mode="rw")


def set_aside(folder: Path) -> Path | None:
    """Rename a run folder, so that a new run can take its place.

    Args:
        folder: The run folder.

    Returns:
        Where it is now; None when there is none.

    Raises:
        StorageError: If a process is writing to it, it is not a run folder, or it cannot be
            renamed.
    """
    if not folder.exists():
        return None
    if not (folder / FILE).is_file():
        if all(entry.name == _LOCK for entry in folder.iterdir()):
            return None  # stopped before it had begun
        raise StorageError(f"{folder} is not a run folder: it has no {FILE}", "name another one")
    lock = _acquire(folder)
    try:
        number = 1
        while (target := folder.with_name(f"{folder.resolve().name}-old-{number}")).exists():
            number += 1
        with _explained(folder):
            folder.rename(target)
    finally:
        os.close(lock)
    return target


def _read(path: Path, folder: Path, mode: str = "ro") -> Results:
    uri = f"{path.resolve().as_uri()}?mode={mode}"
    with closing(sqlite3.connect(uri, uri=True, timeout=_PATIENCE)) as connection:
        try:
            if _is_new(connection, folder):
                raise _nothing_yet(folder)
            # One transaction, so that a writer's commit cannot fall between the tables.
            connection.execute("BEGIN")
            return _results(connection, folder)
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            raise _damaged(folder, error) from error


def _acquire(folder: Path) -> int:
    """Take the lock of a run folder; returns its file descriptor, which holds it."""
    with _explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(lock, 1000).decode(errors="replace").strip()
        os.close(lock)
        raise StorageError(
            f"another run writes to {folder}: {holder or 'it does not say which'}",
            f"wait for it or stop it; or name another folder with {option('run')}",
        ) from error
    try:
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        name = f"process {os.getpid()} on {socket.gethostname()}, since {since}\n"
        with _explained(folder):
            os.ftruncate(lock, 0)
            os.pwrite(lock, name.encode(), 0)
    except BaseException:
        os.close(lock)
        raise
    return lock


def _connect(path: Path) -> sqlite3.Connection:
    with _explained(path.parent):
        # isolation_level=None: transactions begin and end where the code says so.
        return sqlite3.connect(path, timeout=_PATIENCE, isolation_level=None)


def _is_new(connection: sqlite3.Connection, folder: Path) -> bool:
    """Whether nothing has been written yet; refuses what is not a run of this version."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if version == 0 and tables == 0:
        return True
    if version == 0:
        raise UnreadableFileError(
            f"{folder / FILE} was not written by tdkit", f"name another folder with {option('run')}"
        )
    if version != SCHEMA:
        raise UnreadableFileError(
            f"{folder / FILE} has version {version} of the tables; this tdkit reads {SCHEMA}",
            f"use the tdkit that wrote it, or name another folder with {option('run')}",
        )
    return False


def _identity(connection: sqlite3.Connection) -> dict[str, Any]:
    text = connection.execute("SELECT identity FROM study").fetchone()[0]
    value: dict[str, Any] = json.loads(text)
    return value


def _merged(
    stored: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path
) -> Mapping[str, Any]:
    """The identity of measurements of both; refuses those that cannot be mixed."""
    found = differences(stored, wanted)
    if found:
        lines = "\n".join(f"  {line}" for line in found)
        raise UsageError(
            f"{folder} holds measurements of another study:\n{lines}",
            f"name another folder with {option('run')}, or move the old one aside with "
            f"{option('fresh', True)}",
        )
    # Measurements after fine-tuning may be there even where this recipe asks for none.
    return stored if wanted["recipe"]["finetune"] is None else wanted


def _baseline(connection: sqlite3.Connection) -> Baseline | None:
    row = connection.execute("SELECT * FROM baseline").fetchone()
    if row is None:
        return None
    correct, images, labelled, params, macs, layers = row
    pairs = tuple((name, size) for name, size in json.loads(layers))
    return Baseline(correct, images, bool(labelled), params, macs, pairs)


def _measurements(connection: sqlite3.Connection) -> Iterable[Measurement]:
    return (_measurement(row) for row in connection.execute(_PLANNED))


def _progress(connection: sqlite3.Connection) -> Progress:
    return Progress(*connection.execute(_COUNTS).fetchone())


def _results(connection: sqlite3.Connection, folder: Path) -> Results:
    baseline = _baseline(connection)
    if baseline is None:
        raise _nothing_yet(folder)
    recipe = connection.execute("SELECT recipe FROM study").fetchone()[0]
    return Results(
        recipe=recipe,
        identity=_identity(connection),
        baseline=baseline,
        measurements=tuple(_measurements(connection)),
        planned=_progress(connection).planned,
    )


def _nothing_yet(folder: Path) -> UnreadableFileError:
    return UnreadableFileError(
        f"the run in {folder} has measured nothing yet", "start it again: it goes on"
    )


def _trial_row(trial: Trial) -> tuple[Any, ...]:
    t = trial
    return (t.layer, t.method, float(t.keep), json.dumps(t.rank), t.run, t.seed, t.stage)


def _row(measurement: Measurement) -> tuple[Any, ...]:
    m = measurement
    return (
        *_trial_row(m.trial),
        m.params_before,
        m.params_after,
        m.macs_before,
        m.macs_after,
        json.dumps(dict(m.errors)),
        m.correct,
        m.images,
        json.dumps(dict(m.change)),
        m.seconds,
        m.failure,
    )


def _measurement(row: tuple[Any, ...]) -> Measurement:
    layer, method, keep, rank, run, seed, stage = row[:7]
    params_before, params_after, macs_before, macs_after, errors = row[7:12]
    correct, images, change, seconds, failure = row[12:]
    return Measurement(
        trial=Trial(layer, method, keep, _rank(rank), run, seed, stage),
        params_before=params_before,
        params_after=params_after,
        macs_before=macs_before,
        macs_after=macs_after,
        errors=json.loads(errors),
        correct=correct,
        images=images,
        change=json.loads(change),
        seconds=seconds,
        failure=failure,
    )


def _rank(text: str) -> Rank:
    value = json.loads(text)
    return tuple(value) if isinstance(value, list) else int(value)


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Say in the house's words what the disk or SQLite refuses."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise _refused(folder, str(error)) from error
    except sqlite3.DatabaseError as error:
        raise _damaged(folder, error) from error
    except OSError as error:
        raise _refused(folder, error.strerror or str(error)) from error


def _refused(folder: Path, reason: str) -> StorageError:
    kept = "what was measured before is safe"
    if "full" in reason or "No space" in reason:
        return StorageError(
            f"there is no room left in {folder}; {kept}",
            "free some space: started again, it goes on",
        )
    return StorageError(
        f"the run folder {folder} cannot be used: {reason}; {kept}",
        f"make it writable, or name another folder with {option('run')}",
    )


def _damaged(folder: Path, error: sqlite3.Error) -> UnreadableFileError:
    return UnreadableFileError(
        f"{folder / FILE} is damaged or no SQLite file: {error}",
        f"restore it from a copy, or move it aside with {option('fresh', True)}",
    )
