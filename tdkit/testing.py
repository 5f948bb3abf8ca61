"""The laws that every decomposition obeys, as property tests that plugins can run on theirs.

In a plugin's tests (with ``pip install tdkit[test]``)::

    from tdkit.testing import DecompositionLaws

    class TestMyMethod(DecompositionLaws):
        method = MyMethod()
"""

from __future__ import annotations

import math
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
    as_tuple,
    check_rank,
    count,
    factorized_module,
)
from tdkit.forward.trace import Call
from tdkit.layers.counting import macs
from tdkit.layers.spec import KINDS, TRANSPOSED, LayerSpec, spec_of

CASES = 200
"""Drawn layers per method and kind of layer."""


@st.composite
def layer_specs(draw: st.DrawFn, kind: str) -> LayerSpec:
    """Small layers of one kind with every option torch has for it."""
    channels = st.integers(1, 7)
    if kind == "Linear":
        return LayerSpec(kind, draw(channels) + 1, draw(channels) + 1, bias=draw(st.booleans()))
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
def layers(draw: st.DrawFn, kind: str) -> nn.Module:
    """Layers of one kind in float64 with weights of many scales and ranks."""
    module = draw(layer_specs(kind)).build(dtype=torch.float64)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([1.0, 1.0, 1.0, 1e-23, 1e20, 0.0]))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).double() * scale)
        if draw(st.integers(0, 4)) == 0:
            _make_rank_one(module.get_parameter("weight"))
    return module


class DecompositionLaws:
    """Subclass it in a test module and set ``method``."""

    method: Decomposition

    @pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
    @pytest.mark.parametrize("kind", KINDS)
    def test_laws(self, kind: str) -> None:
        """Laws 1 to 4 and 7 of tdkit's design on drawn layers of one kind."""
        representative = KINDS[kind](4, 4) if kind == "Linear" else KINDS[kind](4, 4, 3)
        supported = self.method.supports(spec_of(representative).per_group()) is None
        examples = 0

        @settings(
            max_examples=CASES,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(layer=layers(kind), keep=st.floats(0.05, 0.95), rule=st.sampled_from(RANK_RULES))
        def laws(layer: nn.Module, keep: float, rule: str) -> None:
            nonlocal examples
            held = check_laws(self.method, layer, keep, rule)
            # A drawn layer that the method has no use for does not count.
            assume(held or not supported)
            examples += held

        laws()
        assert not supported or examples >= CASES


def check_laws(method: Decomposition, layer: nn.Module, keep: float, rule: str) -> bool:
    """Check the laws on one layer.

    Args:
        method: The decomposition.
        layer: A float64 layer.
        keep: Fraction of the weight parameters.
        rule: ``best`` or ``proportional``.

    Returns:
        Whether the method supports the layer; if not, nothing was checked.
    """
    spec = spec_of(layer)
    if method.supports(spec.per_group()) is not None:
        return False
    weight = layer.get_parameter("weight").detach()
    before = weight.clone()
    prepared = method.prepare(spec, weight, seed=3)
    rank = prepared.rank(keep, rule)
    check_rank(method, spec.per_group(), rank)
    _check_module(layer, prepared, rank, torch.float64, 1e-12)
    _check_full_rank(weight, prepared)
    _check_counts(spec, prepared, rank, keep if rule == "best" else math.inf)
    _check_error(weight, prepared, rank)
    _check_refined(weight, prepared, rank)
    _check_seed(method, spec, weight, prepared, rank)
    assert torch.equal(weight, before), "the method changed the weight it was given"
    if 1e-3 < float(weight.abs().max()) < 1e3:
        _check_module(layer.float(), prepared, rank, torch.float32, 1e-5)
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
    calls = [Call(1, tuple(inputs.shape[2:]) if spec.kernel_size else (1,))]
    assert macs(prepared.stages(rank), calls) == _counted_macs(module, inputs[:1]), "MACs"


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
    assert actual <= allowed or set(as_tuple(rank)) == {1}, "law 3: more than the keep allows"


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


def _check_seed(
    method: Decomposition, spec: LayerSpec, weight: Tensor, prepared: Prepared, rank: Any
) -> None:
    again = method.prepare(spec, weight, seed=3).factors(rank)
    same = all(torch.equal(a, b) for a, b in zip(prepared.factors(rank), again, strict=True))
    assert same, "law 7: the same seed gave another result"


def _inputs(spec: LayerSpec) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = [7 + 2 * axis for axis in range(len(spec.kernel_size))]
    return torch.randn(2, spec.in_channels, *size, generator=generator, dtype=torch.float64)


def _counted_macs(module: nn.Module, inputs: Tensor) -> int:
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
