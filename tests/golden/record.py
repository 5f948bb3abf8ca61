"""What tdkit plans and computes for fixed models, to be compared with what it did before.

    python tests/golden/record.py

writes the files beside this one anew. That is for a change that is meant to change plans, errors
or factors, and the commit says why.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdkit.compression.applying import apply_plan
from tdkit.compression.compress import Goal, make_plan
from tdkit.compression.scoring import Grid, score
from tdkit.compression.verification import dense_weight
from tdkit.costs.base import total_cost
from tdkit.costs.params import PARAMS
from tdkit.forward.inputs import random_inputs
from tdkit.layers.traced import TracedModel
from tdkit.registry import load_registry, lookup, method_limits, resolve_methods, resolve_metrics
from tdkit.study.store import Store
from tdkit.study.trials import identity, plan_trials

FOLDER = Path(__file__).parent
BUDGETS = {
    "garipov": (0.5, 0.25, 0.1),
    "squeezenet1-1": (0.75, 0.6, 0.45),
    "resnet18": (0.5, 0.25, 0.1),
}


def record(name: str) -> dict[str, Any]:
    """The scores of all candidates, and at three budgets the plan, its errors and its factors."""
    registry = load_registry()
    model, shape = _model(name, registry)
    traced = TracedModel.of(model, random_inputs(model, shape))
    methods = resolve_methods(registry)
    # By squares, as planners added up when the expectations were written.
    (metric,) = resolve_metrics(registry, ["relative-weights"])
    metrics = [metric.adding_up_by("squares")]
    grid = Grid(methods, metrics, limits=method_limits(registry))
    planner = lookup(registry.planners, "greedy", "planner").create()
    candidates = score(traced, grid)
    totals = {"params": total_cost(model, traced.layers, PARAMS)}
    specs = {layer.name: layer.spec for layer in traced.layers}
    plans = {}
    for budget in BUDGETS[name]:
        goal = Goal(budget, metric=metrics[0], calibration="none")
        plan = make_plan(totals, candidates, goal, planner, grid)
        result = apply_plan(TracedModel.of(model), plan, methods)
        plans[str(budget)] = [
            [
                move.layer,
                move.method,
                move.rank,
                result.errors[move.layer],
                _probes(result.model.get_submodule(move.layer), specs[move.layer]),
            ]
            for move in result.plan.moves
        ]
    scores = [
        [
            *(c.layer, c.method, c.rank),
            *(change and change.after for change in c.costs.values()),
            c.errors["relative-weights"],
        ]
        for c in candidates
    ]
    return {"plans": plans, "scores": scores}


def record_study(folder: Path) -> list[list[Any]]:
    """All measurements of a small study."""
    sys.path.insert(0, str(FOLDER.parent / "helpers"))
    from tiny_study import workspace

    from tdkit.study.recipe import to_toml
    from tdkit.study.running import run

    space = workspace()
    plan = plan_trials(space)
    with Store(folder, identity=identity(space), recipe=to_toml(space.recipe), plan=plan) as store:
        results = run(space, store)
    return [
        [
            [m.trial.layer, m.trial.method, m.trial.keep, m.trial.rank, m.trial.run],
            [m.params_before, m.params_after, m.macs_before, m.macs_after],
            dict(sorted(m.errors.items())),
            hashlib.sha256(m.correct).hexdigest()[:16],
        ]
        for m in results.measurements
    ]


def _model(name: str, registry: Any) -> tuple[nn.Module, tuple[int, ...]]:
    entry = registry.models[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = entry.create()
    if name == "garipov":
        model.load_state_dict(entry.weights["fashion-mnist"]())
    return model.eval(), entry.input_shape


def _probes(module: nn.Module, spec: Any) -> list[float]:
    """The weight that factors amount to, seen from a few fixed directions; signs do not matter."""
    assert isinstance(module, nn.Sequential)
    weight: Tensor = dense_weight(module, spec)
    generator = torch.Generator().manual_seed(1)
    probe = torch.randn(4, weight.numel(), generator=generator, dtype=torch.float64)
    return [round(value, 9) for value in (probe @ weight.flatten()).tolist()]


def main() -> None:
    """Write every file anew."""
    from tempfile import TemporaryDirectory

    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        _write("study", record_study(Path(folder)))
    for name in BUDGETS:
        _write(name, record(name))


def _write(name: str, value: Any) -> None:
    (FOLDER / f"{name}.json").write_text(json.dumps(value) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
