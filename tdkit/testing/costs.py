"""The laws that every cost obeys."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tdkit.costs.base import CALLS, NEEDS, Cost, change, is_known, total_cost
from tdkit.decompositions.base import prepared
from tdkit.decompositions.svd import Svd
from tdkit.errors import UsageError
from tdkit.layers.inventory import Layer, find_layers, replace_layer
from tdkit.layers.spec import KINDS
from tdkit.layers.traced import TracedModel
from tdkit.pytest_plugin import CASES
from tdkit.testing.decompositions import drawn_inputs, layers


class Calls(nn.Module):
    """A layer that is called so many times, between parameters of other modules.

    Args:
        layer: The layer.
        times: How often a pass calls it.
    """

    def __init__(self, layer: nn.Module, times: int) -> None:
        super().__init__()
        self.layer, self.times = layer, times
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        """The sum of what the layer gives each time, for inputs (batch, ...)."""
        result: Tensor = sum(self.layer(x) for _ in range(self.times)) * self.scale[0]
        return result


class CostLaws:
    """Subclass it in a test module and set ``cost``."""

    cost: Cost

    @pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
    def test_laws(self, request: pytest.FixtureRequest) -> None:
        """What :func:`check_cost` checks, on models of a drawn layer."""

        @settings(
            max_examples=request.config.getoption("cases", CASES),
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(
            drawn=st.sampled_from(sorted(KINDS)).flatmap(layers),
            times=st.integers(1, 2),
            dtype=st.sampled_from([torch.float32, torch.float64]),
            keep=st.floats(0.05, 1),
        )
        def laws(drawn: Any, times: int, dtype: torch.dtype, keep: float) -> None:
            spec, layer = drawn
            model = Calls(layer, times).to(dtype)
            check_cost(self.cost, model, drawn_inputs(spec).to(dtype), keep)

        laws()


def check_cost(cost: Cost, model: nn.Module, inputs: Tensor, keep: float = 0.5) -> None:
    """Check the laws on one model.

    Costs are whole numbers of at least 0, the model's at least those of its layers; what replacing
    a layer changes is what the model then costs less; and a cost that needs to know how layers are
    called is refused where the model was not run.

    Args:
        model: The model, which has convolutional or linear layers.
        cost: The cost.
        inputs: The argument of a forward pass, (batch, ...).
        keep: The fraction of each layer that remains when it is replaced.
    """
    assert cost.name
    assert cost.unit
    assert cost.needs <= NEEDS, "it needs what nobody has"
    traced = TracedModel.of(model, inputs, include_ends=True)
    before = total_cost(traced.model, traced.layers, cost)
    assert type(before) is int, f"{before!r} is no whole number"
    known = [layer for layer in traced.layers if layer.spec is not None]
    costs = [cost.of([layer.spec], layer) for layer in known if layer.spec]
    for layer, found in zip(known, costs, strict=True):
        assert type(found) is int, f"{found!r} is no whole number"
        assert found >= 0, f"the layer {layer.name!r} costs {found}"
    assert before >= sum(costs), f"the model costs {before}, and its layers {sum(costs)}"
    for layer in known:
        if layer.reason is None:
            _check_change(cost, traced, layer, before, keep)
    _check_unknown(cost, model)


def _check_change(cost: Cost, traced: TracedModel, layer: Layer, before: int, keep: float) -> None:
    """What a layer's replacement saves is what the model then costs less."""
    assert layer.spec is not None
    weight, bias = traced.weights.weight(layer.name), traced.weights.bias(layer.name)
    found = prepared(Svd(), layer.spec, weight)
    stages = found.stages(found.rank(keep))
    changed = change(cost, stages, layer)
    assert changed is not None, "it is unknown although the model was run"
    assert changed.after >= 0, f"a negative cost of {changed.after}"
    small = copy.deepcopy(traced.model)
    modules = [stage.build(weight.dtype) for stage in stages]
    for part in (p for module in modules for p in module.parameters()):
        nn.init.ones_(part)
    assert (bias is None) == (modules[-1]._parameters.get("bias") is None)
    replace_layer(small, layer, nn.Sequential(*modules))
    after = total_cost(small, find_layers(small, inputs=traced.sample, include_ends=True), cost)
    expected = before - changed.saving
    assert after == expected, f"{layer.name!r} replaced, the model costs {after}, not {expected}"


def _check_unknown(cost: Cost, model: nn.Module) -> None:
    blind = find_layers(model, include_ends=True)
    if CALLS not in cost.needs:
        assert type(total_cost(model, blind, cost)) is int
        return
    assert not any(is_known(cost, layer) for layer in blind)
    assert all(change(cost, [replace(x.spec)], x) is None for x in blind if x.spec)
    with pytest.raises(UsageError, match="unknown"):
        total_cost(model, blind, cost)
