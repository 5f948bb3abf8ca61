"""kill -9 anywhere: no finished measurement is lost, doubled, changed or made again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import crashes
import pytest

KILLS = 50


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where possible: a kill leaves the same there, and flushes cost nothing."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks of a process")
def test_a_run_that_is_killed_anywhere_ends_like_one_that_is_not(folder) -> None:
    done = subprocess.run(
        [sys.executable, crashes.__file__, str(folder), str(KILLS), "0"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    folders = [path.name for path in folder.iterdir() if path.is_dir()]
    assert told["runs"] == sum(name.startswith("random-") for name in folders)
    # The folder is made, the dense model measured, and each unit stored: before and after each.
    assert told["commits"] > 8
    assert told["boundaries"] == 2 * told["commits"]
    assert told["boundaries"] == sum(name.startswith("commit-") for name in folders)
