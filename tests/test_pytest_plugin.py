"""The option --cases, as somebody else's tests meet it: with no conftest of theirs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
from tdkit.decompositions.svd import Svd
from tdkit.testing import DecompositionLaws, StageLaws, check_laws, stage_cases

drawn = []


class Counted(Svd):
    def prepare(self, layer, weight, evidence=0):
        drawn.append(layer.kind)
        return super().prepare(layer, weight, evidence)


class TestMine(DecompositionLaws):
    method = Counted()


class TestFlatten(StageLaws):
    cases = stage_cases("Flatten")


del DecompositionLaws, StageLaws


def test_count():
    # Each case is prepared twice.
    print("prepared", drawn.count("Conv1d") // 2)
"""


@pytest.mark.parametrize("cases", [7, None])
def test_so_many_cases_are_drawn(cases: int | None, tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(TESTS)
    option = ["--cases", str(cases)] if cases else []
    chosen = ["-k", "Conv1d and not Transpose or Flatten or count"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-sq", "-p", "no:cacheprovider", *option, *chosen, "."],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (count,) = re.findall(r"prepared (\d+)", done.stdout)
    assert (cases or 200) <= int(count) <= 2 * (cases or 200)
