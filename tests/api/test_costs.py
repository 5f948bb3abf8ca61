"""A plugin's cost, as a budget's in Python; the shell's is in tests/cli/test_settings.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from small_cnn import SHAPE

import tdkit
from tdkit.costs.base import Cost
from tdkit.errors import UsageError
from tdkit.hookspecs import CostRecord
from tdkit.registry import load_registry


class Bytes(Cost):
    """What the parameters take, of stages four bytes each."""

    name = "bytes"
    unit = "bytes"

    def of(self, stages, layer) -> int:
        return 4 * sum(stage.parameters for stage in stages)

    def total(self, model, layers) -> int:
        return sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.fixture
def with_bytes(monkeypatch) -> None:
    registry = load_registry()
    costs = {**registry.costs, "bytes": CostRecord("bytes", "of the parameters", Bytes)}
    more = replace(registry, costs=costs)
    for job in ("compress", "score"):
        monkeypatch.setattr(f"tdkit.api.{job}.load_registry", lambda: more)


@pytest.mark.usefixtures("with_bytes")
def test_it_bounds_what_a_model_may_take(model) -> None:
    options: dict[str, Any] = {"methods": ["svd", "tucker"], "input_shape": SHAPE}
    done = tdkit.compress(model, 0.5, cost="bytes", measure=False, **options)
    before, after = (4 * sum(p.numel() for p in each.parameters()) for each in (model, done.model))
    change = done.report.costs["bytes"]
    assert change is not None
    assert (change.before, change.after) == (before, after)
    assert after <= before / 2
    assert done.plan.cost == "bytes"
    assert any(line.startswith("bytes ") for line in str(done.report).splitlines())
    # Of parameters of one size it is what parameters are.
    assert done.plan.moves == tdkit.plan(model, 0.5, **options).moves
    scores = tdkit.score(model, keeps=[0.5, 0.3, 0.2], **options)
    assert scores.totals["bytes"] == before
    planned = tdkit.plan(scores, 0.5, cost="bytes")
    assert planned.cost == "bytes"
    assert planned == tdkit.plan(model, 0.5, cost="bytes", keeps=[0.5, 0.3, 0.2], **options)


def test_without_the_plugin_it_is_unknown(model) -> None:
    with pytest.raises(UsageError, match="no cost named 'bytes'"):
        tdkit.compress(model, 0.5, cost="bytes")
