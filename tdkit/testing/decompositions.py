"""The laws that every decomposition obeys."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tdkit.decompositions.base import (
    RANK_RULES,
    Decomposition,
    Prepared,
    check_rank,
    count,
    factorized_module,
    layer_stages,
    prepared,
    unsupported,
)
from tdkit.forward.trace import Call
from tdkit.layers.counting import macs
from tdkit.layers.evidence import Evidence
from tdkit.layers.spec import KINDS, TRANSPOSED, LayerSpec, spec_of
from tdkit.pytest_plugin import CASES


@st.composite
def layer_specs(draw: st.DrawFn, kind: str) -> LayerSpec:
    """Small layers of one kind with every option torch has for it."""
    channels = st.integers(1, 7)
    if kind == "Linear":
        features, leading = st.integers(2, 8), st.integers(1, 3)
        return LayerSpec(
            kind, draw(features), draw(features), bias=draw(st.booleans()), leading=draw(leading)
        )
    axes = int(kind[-2])
    groups = draw(st.sampled_from([1, 1, 2, 3]))

    def per_axis(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(axes))

    transposed = kind in TRANSPOSED
    stride, dilation = per_axis(1, 3), per_axis(1, 2)
    padding: tuple[int, ...] | str = per_axis(0, 2)
    if not transposed and set(stride) == {1}:
        padding = draw(st.sampled_from([padding, "same", "valid"]))
    return LayerSpec(
        kind=kind,
        in_channels=groups * (1 + draw(channels)),
        out_channels=groups * draw(channels),
        kernel_size=per_axis(1, 3),
        stride=stride,
        padding=padding,
        dilation=dilation,
        output_padding=tuple(
            draw(st.integers(0, max(s, d) - 1)) if transposed else 0
            for s, d in zip(stride, dilation, strict=True)
        ),
        groups=groups,
        padding_mode="zeros"
        if transposed
        else draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        bias=draw(st.booleans()),
    )


@st.composite
def layers(draw: st.DrawFn, kind: str) -> tuple[LayerSpec, nn.Module]:
    """Layers of one kind in float64 with weights of many scales and ranks, and their records."""
    spec = draw(layer_specs(kind))
    module = spec.build(dtype=torch.float64)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([1.0, 1.0, 1.0, 1e-23, 1e20, 0.0]))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).double() * scale)
        if draw(st.integers(0, 4)) == 0:
            _make_rank_one(module.get_parameter("weight"))
    return spec, module


class DecompositionLaws:
    """Subclass it in a test module and set ``method``."""

    method: Decomposition

    @pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
    @pytest.mark.parametrize("kind", KINDS)
    def test_laws(self, kind: str, request: pytest.FixtureRequest) -> None:
        """Laws 1 to 4 and 7 of tdkit's design on drawn layers of one kind."""
        representative = KINDS[kind](4, 4) if kind == "Linear" else KINDS[kind](4, 4, 3)
        supported = self.method.supports(spec_of(representative).per_group()) is None
        cases, examples = request.config.getoption("cases", CASES), 0

        @settings(
            max_examples=cases,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(drawn=layers(kind), keep=st.floats(0.05, 0.95), rule=st.sampled_from(RANK_RULES))
        def laws(drawn: tuple[LayerSpec, nn.Module], keep: float, rule: str) -> None:
            nonlocal examples
            spec, layer = drawn
            held = check_laws(self.method, layer, keep, rule, spec.leading)
            # A drawn layer that the method has no use for does not count.
            assume(held or not supported)
            examples += held

        laws()
        assert not supported or examples >= cases


def check_laws(
    method: Decomposition, layer: nn.Module, keep: float, rule: str, leading: int = 1
) -> bool:
    """Check the laws on one layer.

    Args:
        method: The decomposition.
        layer: A float64 layer.
        keep: Fraction of the weight parameters.
        rule: ``best`` or ``proportional``.
        leading: Axes before the features of a Linear's input.

    Returns:
        Whether the method supports the layer; if not, nothing was checked.
    """
    spec = replace(spec_of(layer), leading=leading)
    if unsupported(method, spec) is not None:
        return False
    weight = layer.get_parameter("weight").detach()
    before = weight.clone()
    found = prepared(method, spec, weight, Evidence(seed=3))
    rank = found.rank(keep, rule)
    check_rank(method, spec.per_group(), rank)
    _check_module(layer, found, rank, torch.float64, 1e-12)
    _check_full_rank(weight, found)
    _check_counts(spec, found, rank, keep if rule == "best" else math.inf)
    _check_error(weight, found, rank)
    _check_refined(weight, found, rank)
    _check_seed(weight, found, rank)
    assert torch.equal(weight, before), "the method changed the weight it was given"
    if 1e-3 < float(weight.abs().max()) < 1e3:
        _check_module(layer.float(), found, rank, torch.float32, 1e-5)
    return True


def _check_module(
    layer: nn.Module, prepared: Prepared, rank: Any, dtype: torch.dtype, tolerance: float
) -> None:
    """Law 1: the factorized module equals the dense one carrying the reconstruction."""
    spec = prepared.layer
    bias = layer._parameters.get("bias")
    module = factorized_module(prepared.stages(rank), prepared.factors(rank), bias, dtype)
    dense = spec.build(dtype=dtype)
    dense.load_state_dict({**layer.state_dict(), "weight": prepared.reconstruct(rank)})
    inputs = _inputs(spec).to(dtype)
    with torch.no_grad():
        want, have = dense(inputs), module(inputs)
    assert want.shape == have.shape, "law 1: the factorized module's output has another shape"
    # Cancellation within an output is not the module's fault: compare with what was summed.
    with torch.no_grad():
        size = float(prepared.norm * inputs.norm()) + float(want.norm())
    gap = float((want - have).norm())
    assert gap <= tolerance * size, f"law 1: outputs differ by {gap} of {size}"
    calls = [Call((1, *inputs.shape[1:]))]
    assert macs(prepared.stages(rank), calls) == counted_macs(module, inputs[:1]), "MACs"


def _check_full_rank(weight: Tensor, prepared: Prepared) -> None:
    full = prepared.method.max_rank(prepared.group)
    gap = float((prepared.reconstruct(full) - weight).norm())
    assert gap <= 1e-12 * max(prepared.norm, 1e-300), f"law 2: off by {gap} at full rank {full}"


def _check_counts(spec: LayerSpec, prepared: Prepared, rank: Any, keep: float) -> None:
    stages = prepared.stages(rank)
    bias = torch.zeros(spec.out_channels) if spec.bias else None
    module = factorized_module(stages, prepared.factors(rank), bias, torch.float64)
    actual = sum(parameter.numel() for parameter in module.parameters())
    assert count(stages) == actual, "law 3: the count is not that of the built module"
    allowed = keep * spec.weight_parameters + (spec.out_channels if spec.bias else 0)
    smallest = count(layer_stages(prepared.method, spec, prepared.method.ladder(prepared.group)[0]))
    assert actual <= max(allowed, smallest), "law 3: more than the keep allows"


def _check_error(weight: Tensor, prepared: Prepared, rank: Any) -> None:
    actual = float(torch.linalg.vector_norm(weight - prepared.reconstruct(rank)))
    gap = abs(prepared.error(rank) - actual)
    assert gap <= 1e-7 * prepared.norm, f"law 4: error {prepared.error(rank)}, truly {actual}"


def _check_refined(weight: Tensor, prepared: Prepared, rank: Any) -> None:
    before = prepared.error(rank)
    refined = prepared.refined(rank)
    if refined is prepared:
        return
    _check_error(weight, refined, rank)
    assert refined.stages(rank) == prepared.stages(rank), "refining changed the stages"
    assert refined.error(rank) <= before + 1e-12 * prepared.norm, "refining raised the error"
    assert prepared.error(rank) == before, "refining changed what was prepared"


def _check_seed(weight: Tensor, found: Prepared, rank: Any) -> None:
    again = prepared(found.method, found.layer, weight, Evidence(seed=3)).factors(rank)
    same = all(torch.equal(a, b) for a, b in zip(found.factors(rank), again, strict=True))
    assert same, "law 7: the same seed gave another result"


def _inputs(spec: LayerSpec) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if spec.kind == "Linear":
        leading = [2, 3, 4][: spec.leading]
        return torch.randn(*leading, spec.in_channels, generator=generator, dtype=torch.float64)
    size = [7 + 2 * axis for axis in range(len(spec.kernel_size))]
    return torch.randn(2, spec.in_channels, *size, generator=generator, dtype=torch.float64)


def counted_macs(module: nn.Module, inputs: Tensor) -> int:
    """Multiply-accumulates of a module's call on inputs of any shape, by torch's own counter."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(inputs)
    return int(counter.get_total_flops()) // 2


def _make_rank_one(weight: Tensor) -> None:
    total = weight.clone()
    weight.fill_(1.0)
    for mode in range(weight.ndim):
        shape = [1] * weight.ndim
        shape[mode] = -1
        weight.mul_(total.movedim(mode, 0).flatten(1)[:, 0].reshape(shape))
