"""Is the compressed model the model we meant? Compare it with its dense reconstruction.

Layer-wise scores can look fine while the whole model is broken: a layer whose weight is read from
outside, a replacement that the forward pass never calls. So the compressed model and the original
carrying the reconstructed dense weights run on the same input, in eval and in train mode.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tdkit.decompositions.base import compose
from tdkit.errors import UnsupportedError, first_line
from tdkit.forward.inputs import copies
from tdkit.forward.trial import trial
from tdkit.layers.chains import stage_of
from tdkit.layers.impulses import join_groups
from tdkit.layers.inventory import Layer, replace_layer
from tdkit.layers.spec import LayerSpec
from tdkit.layers.stages import Stage

# By the precision of the model; in half precision rounding alone adds up to percents.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_HALF_TOLERANCE = 0.1

_BLIND = "without the shape of its input it is compressed unverified"


def verify(
    dense: nn.Module,
    factorized: Mapping[Layer, nn.Sequential],
    inputs: Sequence[Any],
    stages: Mapping[Layer, Sequence[Stage]] | None = None,
) -> dict[str, str]:
    """Which factorized layers break the model, and how.

    Everything runs in float64 where the model allows it, on copies, so that rounding does not
    hide or fake a difference.

    Args:
        dense: The original model; it is not changed.
        factorized: What stands in for which layer.
        inputs: Arguments of one forward pass, with a batch of at least two for BatchNorm.
        stages: What each stand-in is built from, where that is more than tdkit's own kinds.

    Returns:
        A reason for every layer that has to be put back; empty when the model is right.

    Raises:
        UnsupportedError: If the dense model does not run on the inputs, or gives another output
            each time.
    """
    if not factorized:
        return {}
    comparison = _Comparison(dense, inputs, stages or {})
    if comparison.difference(factorized) is None:
        return {}
    kept: dict[Layer, nn.Sequential] = {}
    broken = {}
    for layer, module in factorized.items():
        reason = comparison.difference({**kept, layer: module})
        if reason is None:
            kept[layer] = module
        else:
            broken[layer.name] = reason
    return broken


def dense_weight(
    module: nn.Sequential, spec: LayerSpec, stages: Sequence[Stage] | None = None
) -> Tensor:
    """The weight, in torch's layout and float64, that a factorized layer amounts to.

    Args:
        module: The modules of the stages.
        spec: The layer that they stand in for.
        stages: The stages; None reads them off the modules, of tdkit's own kinds.

    Raises:
        UnsupportedError: If a module is none of tdkit's own stages.
    """
    stages = _stages_of(module) if stages is None else stages
    ungrouped = [stage.ungrouped(spec.groups) for stage in stages]
    weights = [
        part.get_parameter("weight").detach().double().chunk(spec.groups)
        for part, stage in zip(module, stages, strict=True)
        if stage.weight_shape is not None
    ]
    group = spec.per_group()
    parts = [compose(ungrouped, part, group) for part in zip(*weights, strict=True)]
    return join_groups(torch.stack(parts), spec)


def _stages_of(module: nn.Sequential) -> list[Stage]:
    stages = []
    for part in module:
        stage = stage_of(part)
        if stage is None:
            raise UnsupportedError(f"a {type(part).__name__} is no stage of a factorized layer")
        stages.append(stage)
    return stages


class _Comparison:
    """A dense model in the widest precision that it runs in, and inputs for it."""

    def __init__(
        self, dense: nn.Module, inputs: Sequence[Any], stages: Mapping[Layer, Sequence[Stage]]
    ) -> None:
        self.stages = stages
        self.model, self.inputs = copy.deepcopy(dense).double(), [_widened(x) for x in inputs]
        self.tolerance = _TOLERANCE[torch.float64]
        outputs = _outputs(self.model, self.inputs)
        if isinstance(outputs, list):
            _refuse_broken(dense, inputs, outputs)
            return
        # A model that insists on its own precision is compared in it.
        self.model, self.inputs = copy.deepcopy(dense), list(inputs)
        dtype = next(p.dtype for p in dense.parameters() if p.is_floating_point())
        self.tolerance = _TOLERANCE.get(dtype, _HALF_TOLERANCE)
        outputs = _outputs(self.model, self.inputs)
        if isinstance(outputs, str):
            raise UnsupportedError(
                f"the model cannot be verified on a batch of samples: {outputs}", _BLIND
            )
        _refuse_broken(dense, inputs, outputs)

    def difference(self, factorized: Mapping[Layer, nn.Sequential]) -> str | None:
        """What is different with these layers replaced; None when nothing is."""
        reference, compressed = self._pair(factorized)
        for training in (False, True):
            expected = _outputs(reference, self.inputs, training)
            if isinstance(expected, str):
                continue  # only ever in train mode
            actual = _outputs(compressed, self.inputs, training)
            reason = _gap(expected, actual, self.tolerance)
            if reason is None:
                continue
            again = _outputs(reference, self.inputs, training)
            if _gap(expected, again, self.tolerance) is None:
                return f"{reason} in {'train' if training else 'eval'} mode"
            if not training:
                raise UnsupportedError(
                    "the model cannot be verified, as it is not deterministic: the same input"
                    " gives different outputs",
                    _BLIND,
                )
        return None

    def _pair(self, factorized: Mapping[Layer, nn.Sequential]) -> tuple[nn.Module, nn.Module]:
        """The model with reconstructed dense weights, and the model with the stand-ins."""
        weights = {
            layer: self.model.get_submodule(layer.name).get_parameter("weight")
            for layer in factorized
        }
        # Two copies in all but the parameters that stay as they are.
        own = {id(weight) for weight in weights.values()}
        shared = {id(p): p for p in self.model.parameters() if id(p) not in own}
        reference = copy.deepcopy(self.model, {**shared})
        compressed = copy.deepcopy(self.model, {**shared})
        for layer, module in factorized.items():
            assert layer.spec is not None
            weight = reference.get_submodule(layer.name).get_parameter("weight")
            with torch.no_grad():
                weight.copy_(dense_weight(module, layer.spec, self.stages.get(layer)))
            replace_layer(compressed, layer, copy.deepcopy(module).to(weight.dtype))
        return reference, compressed


def _refuse_broken(dense: nn.Module, inputs: Sequence[Any], outputs: Sequence[Tensor]) -> None:
    """Refuse a model that is broken before anything is replaced: nothing could be compared."""
    if any(bool(output.isfinite().any()) or output.numel() == 0 for output in outputs):
        return
    if any(isinstance(x, Tensor) and not bool(x.isfinite().all()) for x in inputs):
        raise UnsupportedError(
            "the model cannot be verified on inputs that hold NaN or infinite values",
            "take those samples out",
        )
    state = dense.state_dict(keep_vars=True).items()
    broken = [name for name, value in state if not bool(value.isfinite().all())]
    where = f"; so are entries of {', '.join(broken[:3])}" if broken else ""
    raise UnsupportedError(
        f"the model's output is NaN or infinite before anything is replaced{where}",
        "restore its weights from an earlier checkpoint" if broken else _BLIND,
    )


def _gap(expected: list[Tensor], actual: list[Tensor] | str, tolerance: float) -> str | None:
    """How outputs differ; None when they do not."""
    if isinstance(actual, str):
        return f"the model does not run with it replaced, perhaps it reads its weight: {actual}"
    shapes = [[tuple(output.shape) for output in outputs] for outputs in (expected, actual)]
    if shapes[0] != shapes[1]:
        wanted, given = ("shape " + " and ".join(map(str, each)) for each in shapes)
        return f"the output has {given} instead of {wanted.removeprefix('shape ')}"
    for want, have in zip(expected, actual, strict=True):
        finite = want.isfinite()
        if not torch.equal(finite, have.isfinite()):
            return "the output is NaN or infinite in other places than the dense reconstruction's"
        gap = float(torch.linalg.vector_norm((have - want)[finite]))
        if not gap <= tolerance * float(torch.linalg.vector_norm(want[finite])):
            return f"the output differs from the dense reconstruction by {gap:.1e}"
    return None


def _outputs(model: nn.Module, inputs: Sequence[Any], training: bool = False) -> list[Tensor] | str:
    """All tensors among the outputs, in double precision, or why there are none."""
    try:
        with trial(model, training):
            found = _tensors(model(*copies(inputs)))
    except Exception as error:  # a model may fail in any way
        return first_line(error)
    return found or "there is no tensor among its outputs"


def _tensors(outputs: Any) -> list[Tensor]:
    found = []
    for leaf in pytree.tree_leaves(outputs):
        if isinstance(leaf, Tensor):
            found.append(leaf.to(torch.complex128 if leaf.is_complex() else torch.float64))
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            found += _tensors([getattr(leaf, field.name) for field in fields(leaf)])
    return found


def _widened(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
