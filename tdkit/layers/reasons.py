"""Why a layer is kept dense."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from tdkit.layers.chains import stage_of
from tdkit.layers.spec import KINDS, LayerSpec, spec_of
from tdkit.layers.stages import Flatten
from tdkit.layers.weights import Weights, is_finite

_OWNERS_THAT_READ_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def parameter_users(model: nn.Module) -> Counter[int]:
    """How many modules hold each parameter, by its identity."""
    return Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )


def reason(
    model: nn.Module,
    module: nn.Module,
    paths: Sequence[str],
    users: Mapping[int, int],
    weights: Weights | None = None,
) -> str | None:
    """Why a layer is kept dense; None when it can be decomposed.

    Args:
        model: The model.
        module: The layer.
        paths: All names of the layer.
        users: From :func:`parameter_users`.
        weights: Where its weight is, if not in the model.
    """
    weight: Tensor | None = module._parameters.get("weight")
    shared = weight is not None and users[id(weight)] > 1
    stored = weight if weights is None or weight is None else weights.weight(paths[0])
    return (
        _reason_of_owner(model, paths)
        or _reason_of_class(module)
        or _reason_of_weight(stored, shared)
        or _reason_of_instance(module)
        or _reason_of_geometry(spec_of(module))
    )


def _reason_of_class(module: nn.Module) -> str | None:
    if not isinstance(module, tuple(KINDS.values())):
        return "a quantized layer: its weight is packed integers"
    if type(module) in KINDS.values() or isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return None
    if parametrize.is_parametrized(module):
        return "its weight is computed by a parametrization: remove that first"
    return f"a {type(module).__name__} is more than the layer it derives from"


def _reason_of_instance(module: nn.Module) -> str | None:
    hooked = any(getattr(module, hooks) for hooks in _HOOKS)
    if hooked or any(p._backward_hooks for p in module.parameters(recurse=False)):
        return "it has hooks, which a replacement would lose"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    return None


def _reason_of_owner(model: nn.Module, paths: Sequence[str]) -> str | None:
    for path in paths:
        owner = model.get_submodule(path.rpartition(".")[0])
        if isinstance(owner, _OWNERS_THAT_READ_WEIGHTS):
            return f"the {type(owner).__name__} around it reads its weight directly"
        if owner is not model and type(owner) is nn.Sequential and is_factorization(owner):
            return "part of a layer that is already factorized"
    return None


def is_factorization(module: nn.Sequential) -> bool:
    """Whether a Sequential is nothing but linear maps in a row, as a factorized layer is.

    One whose first weight is a depthwise convolution's is not: no method puts it there, but models
    of depthwise-separable convolutions do. Nor is one that starts by flattening, as heads do, or
    that mixes features here and channels there, as decoders do.
    """
    stages = [stage_of(each) for each in module]
    layers = [stage for stage in stages if isinstance(stage, LayerSpec)]
    if None in stages or len(layers) < 2 or isinstance(stages[0], Flatten):
        return False
    mixing = {layer.kind == "Linear" for layer in layers if layer.groups == 1}
    return len(mixing) == 1 and _reason_of_geometry(layers[0]) is None


def _reason_of_weight(weight: Tensor | None, shared: bool) -> str | None:
    if weight is None:
        return "its weight is computed from other parameters (weight_norm?): remove that first"
    if isinstance(weight, UninitializedParameter):
        return "lazy: run one batch through the model first"
    checks = (
        (weight.is_meta, "on the meta device: it has no data"),
        (weight.layout != torch.strided, "its weight is sparse"),
        (weight.is_complex(), "its weight is complex"),
        (weight.dtype not in _DTYPES, f"its weight is {weight.dtype}"),
        (weight.numel() == 0, "its weight is empty"),
        (shared, "its weight is tied to another layer's"),
    )
    found = next((reason for failed, reason in checks if failed), None)
    if found is None and not is_finite(weight):
        found = "its weight has NaN or infinite entries"
    return found


def _reason_of_geometry(spec: LayerSpec) -> str | None:
    if spec.groups > 1 and spec.groups == spec.in_channels:
        return "depthwise: one input channel per group leaves nothing to factorize"
    return None
