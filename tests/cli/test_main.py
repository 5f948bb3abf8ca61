"""What all commands share: help, errors, statuses, signals and closed outputs."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import typer

from tdkit.cli import app
from tdkit.errors import (
    StorageError,
    TdkitError,
    UnreadableFileError,
    UnsafeFileError,
    UnsupportedError,
    UsageError,
)

COMMANDS = (
    "compress",
    "inspect",
    "score",
    "apply",
    "distill",
    "finetune",
    "train",
    "validate",
    "report",
    "plugins",
)
ROOT = Path(__file__).parents[2]


def test_every_command_is_known_here() -> None:
    assert {command.callback.__name__ for command in app.registered_commands} == set(COMMANDS)


def test_help_names_every_command_and_where_to_start(tdkit) -> None:
    done = tdkit("--help")
    assert done.status == 0
    for command in COMMANDS:
        assert command in done.stdout
    assert "Start with: tdkit compress garipov --budget 0.5" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_an_example_that_parses(tdkit, command) -> None:
    done = tdkit(command, "--help")
    assert done.status == 0
    examples = [line for line in done.stdout.splitlines() if "Example: " in line]
    assert len(examples) == 1
    words = shlex.split(examples[0].partition("Example: ")[2])
    assert words[:2] == ["tdkit", command]
    parser: Any = typer.main.get_command(app)
    parser.commands[command].make_context(command, words[2:])


def test_version(tdkit) -> None:
    from importlib.metadata import version

    done = tdkit("--version")
    assert (done.status, done.stdout) == (0, f"tdkit {version('tdkit')}\n")


@pytest.mark.parametrize("arguments", [("compres",), ("compress", "toy.pt", "--bugdet", "0.5")])
def test_wrong_words_get_the_close_ones(tdkit, arguments) -> None:
    done = tdkit(*arguments)
    assert done.status == 2
    assert ("compress" if len(arguments) == 1 else "--budget") in done.stderr
    assert "--help" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (TdkitError("what went wrong", "what to do"), 1),
        (UsageError("what went wrong", "what to do"), 2),
        (UnsafeFileError("what went wrong", "what to do"), 3),
        (UnreadableFileError("what went wrong", "what to do"), 4),
        (UnsupportedError("what went wrong", "what to do"), 5),
        (StorageError("what went wrong", "what to do"), 6),
    ],
)
def test_errors_have_their_status_with_and_without_debug(tdkit, monkeypatch, error, status) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("tdkit.api.plugins.load_registry", fail)
    done = tdkit("plugins")
    assert (done.status, done.stdout) == (status, "")
    assert done.stderr == "error: what went wrong\nhint: what to do\n"
    for arguments in (("plugins", "--debug"), ("--debug", "plugins")):
        done = tdkit(*arguments)
        assert done.status == status
        assert done.stderr.startswith("Traceback")
        assert "in fail" in done.stderr
        assert done.stderr.endswith("error: what went wrong\nhint: what to do\n")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError("boom\nmany more lines"), "error: unexpected RuntimeError: boom"),
        (ZeroDivisionError(), "error: unexpected ZeroDivisionError: ZeroDivisionError"),
        (MemoryError(), "error: out of memory"),
    ],
)
def test_what_nobody_expected_is_one_line_and_status_1(tdkit, monkeypatch, error, says) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("tdkit.api.plugins.load_registry", fail)
    done = tdkit("plugins")
    assert done.status == 1
    message, hint = done.stderr.splitlines()
    assert message == says
    assert hint.startswith("hint: ")
    assert ("--debug" in hint) == ("unexpected" in says)
    assert "Traceback" in tdkit("plugins", "--debug").stderr


@pytest.mark.parametrize("shape", ["1,1000000,1000000", "1,10000000000000,1000000"])
def test_out_of_memory_is_said_in_words(tdkit, toy, shape) -> None:
    done = tdkit("inspect", "toy.pt", "--input-shape", shape)
    assert done.status == 1
    message, hint = done.stderr.splitlines()
    assert message == "error: out of memory"
    assert "--input-shape" in hint


SIGNALLING = """
import os
import signal

from tdkit.hookspecs import PlannerRecord, hookimpl


def planner(options, needed):
    os.kill(os.getpid(), signal.{signal})
    raise AssertionError("the signal was ignored")


@hookimpl
def tdkit_planners():
    return [PlannerRecord("signalling", "stops itself", lambda: planner)]
"""


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_stops_with_its_status(tdkit, toy, install, tmp_path, name, status) -> None:
    install("tdkit-signalling", SIGNALLING.format(signal=name))
    before = {path.name for path in tmp_path.iterdir()}
    done = tdkit("compress", "toy.pt", "--methods", "svd", "--planner", "signalling")
    assert done.status == status
    assert done.stderr == "\nstopped; no half-written file is left\n"
    assert done.stdout == ""
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("format", ["module", "safetensors"])
def test_a_signal_while_writing_loses_nothing(tdkit, toy, tmp_path, monkeypatch, format) -> None:
    (tmp_path / "small.pt").write_text("a good model")
    (tmp_path / "small.pt.plan.json").write_text("its plan")
    seen = []

    def slow_disk(descriptor: int) -> None:
        seen.extend(path.name for path in tmp_path.glob(".tdkit-*.pt"))
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(os, "fsync", slow_disk)
    output = ("-o", "small.pt", "--force", "--format", format)
    done = tdkit("compress", "toy.pt", "--methods", "svd", *output)
    assert done.status == 143
    assert len(seen) == 1, "the signal came before the model was written"
    assert (tmp_path / "small.pt").read_text() == "a good model"
    assert (tmp_path / "small.pt.plan.json").read_text() == "its plan"


SLEEPING = """
import os
import time
from pathlib import Path

from tdkit.hookspecs import PlannerRecord, hookimpl


def planner(options, needed):
    Path("ready").touch()
    time.sleep(60)


def slow_disk(descriptor):
    Path("ready").touch()
    time.sleep(60)


if Path("slow-disk").exists():
    os.fsync = slow_disk


@hookimpl
def tdkit_planners():
    return [PlannerRecord("sleeping", "takes a minute", lambda: planner)]
"""


@contextmanager
def compressing(folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A process at work in a folder; it is gone afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tdkit", "compress", "toy.pt", "--methods", "svd", *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder.parent), str(ROOT)])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def interrupt(process: subprocess.Popen[str], folder: Path, number: int) -> tuple[str, str]:
    """Wait until the process is in the middle of its work, and send it a signal."""
    deadline = time.monotonic() + 120
    while not (folder / "ready").exists() and time.monotonic() < deadline:
        if process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(number)
    try:
        return process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        raise


@pytest.mark.usefixtures("toy")
def test_a_real_process_that_is_interrupted_leaves_nothing(install, tmp_path) -> None:
    site = install("tdkit-sleeping", SLEEPING)
    thinking, writing = site / "thinking", site / "writing"
    for folder in (thinking, writing):
        folder.mkdir()
        (folder / "toy.pt").write_bytes((tmp_path / "toy.pt").read_bytes())
    (writing / "slow-disk").touch()
    with (
        compressing(thinking, "--planner", "sleeping") as one,
        compressing(writing, "--format", "state-dict") as other,
    ):
        said = interrupt(one, thinking, signal.SIGINT), interrupt(other, writing, signal.SIGTERM)
    assert (one.returncode, other.returncode) == (130, 143)
    assert said == (("", "\nstopped; no half-written file is left\n"),) * 2
    assert {path.name for path in thinking.iterdir()} == {"toy.pt", "ready"}
    assert {path.name for path in writing.iterdir()} == {"toy.pt", "ready", "slow-disk"}


def run_plugins(stdout: int | None, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tdkit", "plugins"],
        cwd=ROOT,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        **options,
    )


def test_a_reader_that_is_gone_gets_no_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = run_plugins(writing)
    os.close(writing)
    assert done.stderr == ""
    assert done.returncode == 1


def test_a_closed_output_gets_no_traceback() -> None:
    done = run_plugins(None, preexec_fn=lambda: os.close(1))
    assert done.stderr == ""


def test_a_full_disk_behind_the_output_is_status_6() -> None:
    with Path("/dev/full").open("w") as full:
        done = run_plugins(full.fileno())
    assert done.stderr == (
        "error: standard output cannot be written: there is no room left\n"
        "hint: free some space where it goes to\n"
    )
    assert done.returncode == 6
