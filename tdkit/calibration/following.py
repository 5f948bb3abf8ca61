"""Which operations of a model follow a layer at once: its BatchNorm, its activation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tdkit.forward.inputs import Inputs
from tdkit.forward.trial import run_on_data

ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.CELU, nn.SELU),
    *(nn.Hardswish, nn.Hardtanh, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Softplus),
)
"""Each of what they are given entry by entry, without parameters."""


@dataclass(frozen=True)
class Following:
    """What is done to a layer's output at once, by the names of the modules.

    Attributes:
        norm: The BatchNorm with running statistics that is given it; None where there is none.
        activation: The activation that is given that; None where there is none.
    """

    norm: str | None = None
    activation: str | None = None

    def functions(self, dense: nn.Module, groups: int) -> list[Callable[[Tensor], Tensor]]:
        """Norm and activation in eval mode, of rows (n, channels) of each group of the layer.

        None at all without an activation.

        Args:
            dense: The dense model, whose numbers are copied.
            groups: Into which the layer's output falls.
        """
        if self.activation is None:
            return []
        activation = dense.get_submodule(self.activation)
        apply = partial(_applied, type(activation), _settings(activation))
        if self.norm is None:
            return [partial(apply, None, None)] * groups
        norm = dense.get_submodule(self.norm)
        assert isinstance(norm, _BatchNorm)
        parts = zip(*(each.float().chunk(groups) for each in affine(norm)), strict=True)
        return [partial(apply, scale, shift) for scale, shift in parts]


def following(model: nn.Module, layers: Sequence[str], inputs: Inputs) -> Mapping[str, Following]:
    """What follows layers, by their names.

    Args:
        model: It is afterwards as before.
        layers: Names of layers.
        inputs: Arguments of one forward pass, tensors of any shape.

    Raises:
        UnsupportedError: If the model does not run on them.
    """
    at_hand: list[tuple[str, Tensor, int]] = []
    calls: Counter[str] = Counter()
    met: Counter[tuple[str, str]] = Counter()

    def hand_on(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and not output.is_inference():
            at_hand.append((name, output, output._version))

    def returned(name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        calls[name] += 1
        hand_on(name, output)

    def giving(args: tuple[Any, ...]) -> list[str]:
        """Whose output it is; not if it was changed in place since."""
        return [
            layer
            for layer, output, version in at_hand
            if args and args[0] is output and output._version == version
        ]

    def normed(name: str, _module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls[name] += 1
        for layer in giving(args):
            # Of (batch, tokens, features) BatchNorm1d takes the tokens for channels.
            if args[0].ndim == 2 or not isinstance(model.get_submodule(layer), nn.Linear):
                met[layer, name] += 1
                hand_on(layer, output)

    def activated(name: str, _module: nn.Module, args: tuple[Any, ...]) -> None:
        for layer in giving(args):
            met[layer, name] += 1

    handles: list[Any] = [
        model.get_submodule(n).register_forward_hook(partial(returned, n)) for n in layers
    ]
    norms, activations = [], []
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            norms.append(name)
            handles.append(module.register_forward_hook(partial(normed, name)))
        elif type(module) in ACTIVATIONS:
            activations.append(name)
            handles.append(module.register_forward_pre_hook(partial(activated, name)))
    try:
        with torch.inference_mode(False):  # in which no version is counted
            run_on_data(model, inputs)
    finally:
        for handle in handles:
            handle.remove()

    def always(layer: str, name: str) -> bool:
        return 0 < met[layer, name] == calls[layer]

    found = {}
    for layer in layers:
        # A norm that others share, or that is of another axis, is not the layer's own.
        own = [n for n in norms if always(layer, n) and calls[n] == calls[layer]]
        norm = next((n for n in own if _fits(model, layer, n)), None)
        after = next((n for n in activations if always(layer, n)), None)
        known = norm is not None or not any(met[layer, n] for n in norms)
        found[layer] = Following(norm, after if known else None)
    return found


def _fits(model: nn.Module, layer: str, norm: str) -> bool:
    module, other = model.get_submodule(layer), model.get_submodule(norm)
    axes = len(getattr(module, "kernel_size", ()))
    kinds = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
    channels = getattr(module, "out_channels", None) or getattr(module, "out_features", None)
    return isinstance(other, kinds[axes] | nn.SyncBatchNorm) and other.num_features == channels


def affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """A BatchNorm in eval mode as a factor and a summand, (channels,), float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    return scale, shift + norm.bias.detach().double() if norm.affine else shift


def _settings(activation: nn.Module) -> dict[str, Any]:
    """What an activation was made with; in place it would spoil what it is given."""
    known = {name: value for name, value in vars(activation).items() if not name.startswith("_")}
    return {name: value for name, value in known.items() if name not in ("training", "inplace")}


def _applied(
    kind: type[nn.Module],
    settings: Mapping[str, Any],
    scale: Tensor | None,
    shift: Tensor | None,
    rows: Tensor,
) -> Tensor:
    module = kind()
    vars(module).update(settings)
    if scale is not None and shift is not None:
        rows = torch.addcmul(shift, rows, scale)
    result: Tensor = module(rows)
    return result
