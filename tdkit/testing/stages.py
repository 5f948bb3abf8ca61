"""The laws that every kind of stage obeys."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tdkit.layers.chains import OWN_STAGES, read_stage, stage_of
from tdkit.layers.spec import LayerSpec
from tdkit.layers.stages import ChannelShuffle, Flatten, Permute, Shape, Stage, Unflatten
from tdkit.pytest_plugin import CASES
from tdkit.testing.decompositions import counted_macs, layer_specs

Case = tuple[Stage, Shape]
"""A stage, and the full shape of an input that it takes."""

_SIZES = st.lists(st.integers(1, 4), min_size=2, max_size=5)


@st.composite
def stage_cases(draw: st.DrawFn, kind: str) -> Case:
    """Stages of one of tdkit's own kinds, each with the shape of an input."""
    if OWN_STAGES[kind] is LayerSpec:
        spec = draw(layer_specs(kind))
        if kind == "Linear":
            return spec, (*[2, 3, 4][: spec.leading], spec.in_channels)
        return spec, (2, spec.in_channels, *(7 + axis for axis in range(len(spec.kernel_size))))
    shape = tuple(draw(_SIZES))
    first = draw(st.integers(0, len(shape) - 1))
    if kind == "Flatten":
        last = draw(st.integers(first, len(shape) - 1))
        return draw(
            st.sampled_from([Flatten(first, last), Flatten(first, last - len(shape))])
        ), shape
    if kind == "Unflatten":
        sizes = tuple(draw(_SIZES))
        whole = (*shape[:first], math.prod(sizes), *shape[first + 1 :])
        return draw(
            st.sampled_from([Unflatten(first, sizes), Unflatten(first - len(shape), sizes)])
        ), whole
    if kind == "ChannelShuffle":
        groups = draw(st.integers(1, 4))
        return ChannelShuffle(groups), (shape[0], groups * shape[1], *shape[2:], 3)
    return Permute(tuple(draw(st.permutations(range(len(shape)))))), shape


class StageLaws:
    """Subclass it in a test module and set ``cases``.

    Attributes:
        cases: A strategy for stages, each with the full shape of an input that it takes.
    """

    cases: st.SearchStrategy[Case]

    @pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
    def test_laws(self, request: pytest.FixtureRequest) -> None:
        """What :func:`check_stage` checks, on drawn stages."""

        @settings(
            max_examples=request.config.getoption("cases", CASES),
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=self.cases)
        def laws(case: Case) -> None:
            check_stage(*case)

        laws()


def check_stage(stage: Stage, shape: Shape) -> None:
    """Check the laws on one stage.

    It comes back from JSON and from its module; its counts are torch's; and :meth:`Stage.compose`
    is what its module does, freed of bias, stride, padding and dilation.

    Args:
        stage: The stage.
        shape: The full shape of an input that it takes.
    """
    assert stage.kind in stage.kinds
    kinds = {stage.kind: type(stage)}
    assert read_stage(json.loads(json.dumps(stage.to_json())), kinds) == stage, "JSON"
    module = _filled(stage)
    found = stage_of(module, kinds)
    assert found is not None, "it does not know its own module"
    assert found.state_shapes == stage.state_shapes
    parameters = {name: tuple(value.shape) for name, value in module.named_parameters()}
    assert parameters == stage.state_shapes, "parameters"
    assert sum(map(math.prod, parameters.values())) == stage.parameters
    inputs = torch.randn(shape, generator=_generator(), dtype=torch.float64)
    with torch.no_grad():
        assert tuple(module(inputs).shape) == stage.output_shape(shape), "shape of the output"
    assert stage.macs(shape) == counted_macs(module, inputs), "MACs"
    _check_compose(stage, inputs)


def _check_compose(stage: Stage, inputs: Tensor) -> None:
    if isinstance(stage, LayerSpec):
        stage = _stripped(stage)
        for axis in range(len(stage.kernel_size)):
            inputs = inputs.narrow(2 + axis, 0, 1)
    module = _filled(stage)
    weight = None if stage.weight_shape is None else module.get_parameter("weight").detach()
    with torch.no_grad():
        have, want = stage.compose(weight, inputs), module(inputs)
    if isinstance(stage, LayerSpec) and not stage.transposed and stage.kernel_size:
        # torch's convolution correlates: an impulse comes out as the flipped kernel.
        want = want.flip(tuple(range(2, want.ndim)))
    torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-12)


def _stripped(spec: LayerSpec) -> LayerSpec:
    """Without what compose leaves out; padded so that all of an impulse comes through."""
    ones = (1,) * len(spec.kernel_size)
    return replace(
        spec,
        bias=False,
        stride=ones,
        dilation=ones,
        output_padding=tuple(0 for _ in ones),
        padding=tuple(0 if spec.transposed else size - 1 for size in spec.kernel_size),
        padding_mode="zeros",
    )


def _filled(stage: Stage) -> nn.Module:
    module, generator = stage.build(dtype=torch.float64), _generator()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
