"""BatchNorm folded into the layer before it, exactly; what that saves can be spent on ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tdkit.calibration.divergence import outputs_of
from tdkit.calibration.following import affine, following
from tdkit.calibration.pairs import removed
from tdkit.compression.surgery import Surgery
from tdkit.costs.base import Cost, total_cost
from tdkit.decompositions.base import Decomposition, Rank, bias_stages
from tdkit.errors import UnsupportedError, UsageError, option
from tdkit.forward.copying import shared_copy
from tdkit.layers.impulses import join_groups, split_groups
from tdkit.layers.inventory import Layer, find_layers
from tdkit.layers.spec import LayerSpec
from tdkit.layers.stages import Stage
from tdkit.layers.traced import TracedModel


@dataclass(frozen=True)
class Folding:
    """The BatchNorms of a model that are given one layer's output and nothing else.

    In eval mode such a norm is a factor and a summand for each channel, which the layer, or the
    last stage of what stands in for it, can take in.

    Attributes:
        norms: By layer the name of its norm.
        savings: By the name of a cost what folding each of them takes off; below 0 where it adds.
    """

    norms: Mapping[Layer, str] = field(default_factory=dict)
    savings: Mapping[str, Mapping[Layer, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, traced: TracedModel, costs: Sequence[Cost]) -> Folding:
        """Look which norms can be folded.

        Args:
            traced: The dense model.
            costs: What is counted.

        Raises:
            UsageError: If it was not run, and nobody knows what follows what.
            UnsupportedError: If it does not run.
        """
        if traced.sample is None:
            raise UsageError(
                "folding takes a forward pass, to see which BatchNorm follows which layer",
                f"give the shape of the input with {option('input_shape', (3, 224, 224))}",
            )
        # The ends, and what nobody selected, are dense for other reasons than that they cannot be
        # changed.
        free = {
            layer.name
            for layer in find_layers(traced.model, include_ends=True, weights=traced.weights)
            if layer.reason is None
        }
        layers = [layer for layer in traced.layers if layer.name in free and layer.calls]
        after = following(traced.model, [layer.name for layer in layers], traced.sample)
        found = {layer: after[layer.name].norm for layer in layers}
        norms = _alone(traced, {layer: norm for layer, norm in found.items() if norm is not None})
        return cls(norms, {cost.name: _savings(traced, norms, cost) for cost in costs})

    def saving(self, cost: str) -> int:
        """What folding all of them takes off a cost; 0 of one that is not counted."""
        return sum(self.savings.get(cost, {}).values())

    def takes(self, name: str, method: Decomposition, rank: Rank) -> bool:
        """Whether a norm can be folded into what a method puts in the place of a layer.

        Args:
            name: The layer.
            method: The decomposition.
            rank: Its rank.
        """
        layer = next((layer for layer in self.norms if layer.name == name), None)
        if layer is None or layer.spec is None:
            return True
        stages = method.stages(layer.spec.per_group(), rank)
        appended = bias_stages(method, layer.spec.with_bias(True), rank)
        last = appended[-1] if appended and layer.spec.bias else stages[-1]
        return isinstance(last, LayerSpec) and last.repeated(layer.spec.groups).carries_bias(
            layer.spec.out_channels
        )

    def fold(
        self, traced: TracedModel, structure: Mapping[str, tuple[Stage, ...]], surgery: Surgery
    ) -> tuple[dict[str, tuple[Stage, ...]], list[Layer]]:
        """Fold in a compressed model, in place; what cannot take its norm in keeps it.

        Args:
            traced: The model.
            structure: The stages that stand in for each replaced layer, by name.
            surgery: Of the model.

        Returns:
            The structure afterwards: layers that were dense are in it as sequences of one stage,
            norms as empty ones. And the layers that took theirs in.
        """
        result, folded, model = dict(structure), [], traced.model
        for layer, norm in self.norms.items():
            assert layer.spec is not None
            module, batch_norm = model.get_submodule(layer.name), model.get_submodule(norm)
            assert isinstance(batch_norm, _BatchNorm)
            stages = structure.get(layer.name, (layer.spec,))
            last = stages[-1]
            if not isinstance(last, LayerSpec) or not last.carries_bias(layer.spec.out_channels):
                continue
            parts = [*module] if isinstance(module, nn.Sequential) else [module]
            parts[-1] = _folded(parts[-1], last, batch_norm)
            surgery.swap(layer.name, nn.Sequential(*parts).train(module.training))
            surgery.swap(norm, nn.Sequential().train(batch_norm.training))
            result[layer.name] = (*stages[:-1], last.with_bias(True))
            result[norm] = ()
            folded.append(layer)
        return result, folded


def _alone(traced: TracedModel, norms: Mapping[Layer, str]) -> Mapping[Layer, str]:
    """Those norms without which nobody sees what their layer returns."""
    assert traced.sample is not None
    wanted = list(outputs_of(traced.model, [traced.sample]))
    if _is_unseen(traced, norms, wanted):
        return norms
    return {x: norm for x, norm in norms.items() if _is_unseen(traced, {x: norm}, wanted)}


def _is_unseen(
    traced: TracedModel, norms: Mapping[Layer, str], wanted: Sequence[Sequence[Tensor]]
) -> bool:
    """Whether the model returns the same where NaN is what all but the norms are given."""
    assert traced.sample is not None
    made: dict[str, Tensor] = {}

    def spoil(norm: str, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        made[norm] = output
        return torch.full_like(output, torch.nan)

    def mend(norm: str, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (made[norm], *args[1:])

    handles: list[Any] = []
    for layer, norm in norms.items():
        module, other = (traced.model.get_submodule(name) for name in (layer.name, norm))
        handles.append(module.register_forward_hook(partial(spoil, norm)))
        handles.append(other.register_forward_pre_hook(partial(mend, norm)))
    with removed(handles):
        try:
            found = list(outputs_of(traced.model, [traced.sample]))
        except UnsupportedError:  # somebody looked at what was NaN
            return False
    return len(found) == len(wanted) and all(
        a.shape == b.shape
        and torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.nan_to_num(), b.nan_to_num())
        for one, other in zip(found, wanted, strict=True)
        for a, b in zip(one, other, strict=True)
    )


def _savings(traced: TracedModel, norms: Mapping[Layer, str], cost: Cost) -> dict[Layer, int]:
    """What each takes off, one after the other in a copy that shares all weights."""
    model, layers = shared_copy(traced.model), list(traced.layers)
    before, found = total_cost(model, layers, cost), {}
    for layer, norm in norms.items():
        assert layer.spec is not None
        out = layer.spec.out_channels
        if not layer.spec.bias:
            model.get_submodule(layer.name).bias = nn.Parameter(torch.empty(out, device="meta"))
            spec, parameters = layer.spec.with_bias(True), layer.parameters + out
            layers[layers.index(layer)] = replace(layer, spec=spec, parameters=parameters)
        _put(model, norm, nn.Identity())
        after = total_cost(model, layers, cost)
        found[layer], before = before - after, after
    return found


def _folded(module: nn.Module, stage: LayerSpec, norm: _BatchNorm) -> nn.Module:
    """A layer as it is with a norm behind it in eval mode."""
    weight, bias = module.get_parameter("weight"), module._parameters.get("bias")
    scale, shift = affine(norm)
    result = stage.with_bias(True).build(dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        parts = split_groups(weight.detach().double(), stage)
        factors = scale.reshape(stage.groups, -1, *(1 for _ in parts.shape[2:]))
        result.get_parameter("weight").copy_(join_groups(parts * factors, stage))
        summand = shift if bias is None else shift + bias.detach().double() * scale
        result.get_parameter("bias").copy_(summand)
    for name, parameter in result.named_parameters():
        own = norm._parameters.get("bias") if name == "bias" else weight
        parameter.requires_grad_(weight.requires_grad if own is None else own.requires_grad)
    return result.train(module.training)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, attribute = name.rpartition(".")
    model.get_submodule(owner)._modules[attribute] = module
