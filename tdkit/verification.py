"""Is the compressed model the model we meant? Compare it with its dense reconstruction.

Layer-wise scores can look fine while the whole model is broken: a layer whose weight is read from
outside, a replacement that the forward pass never calls. So the compressed model and the original
carrying the reconstructed dense weights run on the same input, in eval and in train mode.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tdkit.decompositions.base import compose, join_groups
from tdkit.errors import UnsupportedError
from tdkit.layers import Layer, mode, replace_layer
from tdkit.specs import LayerSpec, spec_of

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}


def verify(
    dense: nn.Module, factorized: Mapping[Layer, nn.Sequential], inputs: Sequence[Any]
) -> dict[str, str]:
    """Which factorized layers break the model, and how.

    Everything runs in float64 where the model allows it, on copies, so that rounding does not
    hide or fake a difference.

    Args:
        dense: The original model; it is not changed.
        factorized: What stands in for which layer.
        inputs: Arguments of one forward pass, with a batch of at least two for BatchNorm.

    Returns:
        A reason for every layer that has to be put back; empty when the model is right.

    Raises:
        UnsupportedError: If the model is wrong as a whole but right with each single layer.
    """
    if not factorized or _difference(dense, factorized, inputs) is None:
        return {}
    single = {layer: _difference(dense, {layer: m}, inputs) for layer, m in factorized.items()}
    broken = {layer.name: reason for layer, reason in single.items() if reason is not None}
    if not broken:
        raise UnsupportedError(
            "the compressed model differs from its dense reconstruction, though each layer alone"
            " does not: is the model deterministic?"
        )
    return broken


def dense_weight(module: nn.Sequential, spec: LayerSpec) -> Tensor:
    """The weight, in torch's layout and float64, that a factorized layer amounts to.

    Args:
        module: The stages.
        spec: The layer that they stand in for.
    """
    group = spec.per_group()
    stages = [spec_of(stage) for stage in module]
    weights = [stage.get_parameter("weight").detach().double() for stage in module]
    ungrouped = [_ungrouped(stage, spec.groups) for stage in stages]
    parts = zip(*(weight.chunk(spec.groups) for weight in weights), strict=True)
    return join_groups(torch.stack([compose(ungrouped, part, group) for part in parts]), spec)


def _ungrouped(stage: LayerSpec, groups: int) -> LayerSpec:
    per_group = stage.groups // groups
    return LayerSpec(
        **vars(stage)
        | {
            "in_channels": stage.in_channels // groups,
            "out_channels": stage.out_channels // groups,
            "groups": per_group,
        }
    )


def _difference(
    dense: nn.Module, factorized: Mapping[Layer, nn.Sequential], inputs: Sequence[Any]
) -> str | None:
    reference, compressed = copy.deepcopy(dense).double(), copy.deepcopy(dense).double()
    for layer, module in factorized.items():
        assert layer.spec is not None
        weight = reference.get_submodule(layer.name).get_parameter("weight")
        with torch.no_grad():
            weight.copy_(dense_weight(module, layer.spec))
        replace_layer(compressed, layer, copy.deepcopy(module).double())
    dtype = torch.float64
    if _outputs(reference, inputs, dtype, training=False)[1] is not None:
        # A model that insists on its own precision is compared in it.
        dtype = next(p.dtype for p in dense.parameters() if p.is_floating_point())
        reference, compressed = reference.to(dtype), compressed.to(dtype)
    for training in (False, True):
        reason = _compare(reference, compressed, inputs, dtype, training)
        if reason is not None:
            return f"{reason} in {'train' if training else 'eval'} mode"
    return None


def _compare(
    reference: nn.Module,
    compressed: nn.Module,
    inputs: Sequence[Any],
    dtype: torch.dtype,
    training: bool,
) -> str | None:
    expected, failure = _outputs(reference, inputs, dtype, training)
    if failure is not None:
        return None if training else f"the dense model fails: {failure}"
    actual, failure = _outputs(compressed, inputs, dtype, training)
    if failure is not None:
        return f"its weight is read from outside: {failure}"
    tolerance = _TOLERANCE.get(dtype, 3e-2)
    for want, have in zip(expected, actual, strict=True):
        if want.shape != have.shape:
            return f"the output has shape {tuple(have.shape)} instead of {tuple(want.shape)}"
        finite = want.isfinite()
        gap = float(torch.linalg.vector_norm((have - want)[finite].double()))
        if not gap <= tolerance * float(torch.linalg.vector_norm(want[finite].double())):
            return f"the output differs from the dense reconstruction by {gap:.1e}"
    return None


def _outputs(
    model: nn.Module, inputs: Sequence[Any], dtype: torch.dtype, training: bool
) -> tuple[list[Tensor], str | None]:
    cast = [x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    devices = sorted({t.device.index or 0 for t in model.parameters() if t.is_cuda})
    try:
        with mode(model, training), torch.no_grad(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)  # the same dropout in both models
            leaves = pytree.tree_leaves(model(*cast))
    except Exception as error:
        return [], (str(error) or type(error).__name__).strip().splitlines()[0]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()], None
