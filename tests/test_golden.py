"""Plans, errors and factors of fixed models are what they were: what moves code moves no number.

`tests/golden/record.py` wrote the expectations, before the house was rebuilt.
"""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

GOLDEN = Path(__file__).parent / "golden"

# ALS multiplies in float32, and each processor rounds in its own way there.
TOLERANCE = {"cp": 1e-6}


def recorder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_record", GOLDEN / "record.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def expected(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "name", ["garipov", "squeezenet1-1", pytest.param("resnet18", marks=pytest.mark.slow)]
)
def test_scores_and_plans(name: str) -> None:
    want, have = expected(name), json.loads(json.dumps(recorder().record(name)))
    assert [row[:5] for row in have["scores"]] == [row[:5] for row in want["scores"]]
    for old, new in zip(want["scores"], have["scores"], strict=True):
        assert new[5] == pytest.approx(old[5], rel=0, abs=TOLERANCE.get(old[1], 1e-12)), old
    for budget, moves in want["plans"].items():
        assert [move[:3] for move in have["plans"][budget]] == [move[:3] for move in moves]
        for old, new in zip(moves, have["plans"][budget], strict=True):
            close = TOLERANCE.get(old[1], 1e-12)
            assert new[3] == pytest.approx(old[3], rel=0, abs=close), (budget, old[:3])
            scale = max(map(abs, old[4]))
            assert new[4] == pytest.approx(old[4], rel=0, abs=1e-4 * scale), (budget, old[:3])


def test_a_study(tmp_path: Path) -> None:
    want = expected("study")
    have = json.loads(json.dumps(recorder().record_study(tmp_path / "run")))
    for old, new in zip(want, have, strict=True):
        trial, costs, errors, correct = old
        assert new[:2] == [trial, costs]
        close = TOLERANCE.get(trial[1], 1e-12)
        for name, error in errors.items():
            # Features are computed in float32, which each processor rounds in its own way.
            rel = 1e-6 if name.endswith("features") else 1e-9
            assert new[2][name] == pytest.approx(error, abs=close, rel=rel), (trial, name)
        assert new[3] == correct, trial
