"""Find a model's compressible layers, and why the others are not; replace one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import UninitializedParameter

from tdkit.errors import UnsupportedError, unknown_name
from tdkit.forward.inputs import Inputs
from tdkit.forward.trace import Call, Calls, trace
from tdkit.layers.counting import macs
from tdkit.layers.reasons import parameter_users, reason
from tdkit.layers.spec import KINDS, LayerSpec, spec_of
from tdkit.layers.weights import Weights


@dataclass(frozen=True)
class Layer:
    """A convolutional or linear layer of a model.

    Attributes:
        name: Its dotted path.
        aliases: The other paths under which the same module is registered.
        kind: The name of its class.
        spec: Its hyperparameters; None where the class is not one tdkit knows.
        parameters: Its own parameters, bias included.
        calls: How one sample passes through it; None when the model was not run.
        reason: Why it is kept dense; None when it can be decomposed.
        bytes_per_parameter: Of its weight's dtype.
    """

    name: str
    aliases: tuple[str, ...]
    kind: str
    spec: LayerSpec | None
    parameters: int
    calls: tuple[Call, ...] | None = None
    reason: str | None = None
    bytes_per_parameter: int = 4

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates per sample; None when the model was not run."""
        if self.calls is None or self.spec is None:
            return None
        return macs([self.spec], self.calls)


def find_layers(
    model: nn.Module,
    *,
    inputs: Inputs | None = None,
    calls: Calls | None = None,
    patterns: Sequence[str] = (),
    include_ends: bool = False,
    weights: Weights | None = None,
) -> list[Layer]:
    """Every convolutional and linear layer in order, with the reason where one is kept dense.

    Args:
        model: Any module.
        inputs: Arguments of one forward pass over a single sample; without them or ``calls`` MACs
            stay unknown and the order is that of registration, not that of the calls.
        calls: What such a pass has told already.
        patterns: Shell patterns; layers that match none under any of their names are kept dense.
        include_ends: Let the first and the last layer be factorized too; the paper keeps
            them dense.
        weights: Where the layers' weights are, if not in the model.

    Raises:
        UsageError: If a pattern matches no layer.
        UnsupportedError: If the model has no parameters, is a single layer, contains itself, or
            does not run on the inputs.
    """
    if next(model.parameters(), None) is None and next(model.buffers(), None) is None:
        raise UnsupportedError(
            "the model has no parameters: there is nothing to compress", "give it its weights first"
        )
    names = weight_layers(model)
    if calls is None and inputs is not None:
        calls = trace(model, list(names), inputs)
    users = parameter_users(model)
    called = {m: tuple(calls.get(m, ())) if calls is not None else None for m in names}
    layers = [
        Layer(
            name=paths[0],
            aliases=tuple(paths[1:]),
            kind=type(module).__name__,
            spec=_spec(module, called[module] or ()),
            parameters=_own_parameters(module),
            calls=called[module],
            reason=reason(model, module, paths, users, weights),
            bytes_per_parameter=_itemsize(module),
        )
        for module, paths in names.items()
    ]
    if calls is not None:
        order = {names[module][0]: place for place, module in enumerate(calls)}
        layers.sort(key=lambda layer: order.get(layer.name, len(order)))
    layers = _select(layers, patterns)
    return layers if include_ends else _keep_ends(layers)


def replace_layer(model: nn.Module, layer: Layer, module: nn.Module) -> None:
    """Put a module where the layer is, under every name it has. Changes the model in place."""
    for path in (layer.name, *layer.aliases):
        owner, _, attribute = path.rpartition(".")
        model.get_submodule(owner)._modules[attribute] = module


def weight_layers(model: nn.Module) -> dict[nn.Module, list[str]]:
    """The convolutional and linear layers of a model, each with all its names.

    Raises:
        UnsupportedError: If the model is a single layer, or contains itself.
    """
    names: dict[nn.Module, list[str]] = {}
    try:
        for name, module in model.named_modules(remove_duplicate=False):
            if name and _is_weight_layer(module):
                names.setdefault(module, []).append(name)
    except RecursionError as error:
        raise UnsupportedError(
            "the model's modules contain themselves", "break the circle: modules form a tree"
        ) from error
    if not names and _is_weight_layer(model):
        raise UnsupportedError(
            f"the model is itself a single {type(model).__name__}",
            "wrap it: torch.nn.Sequential(layer)",
        )
    return names


def _is_weight_layer(module: nn.Module) -> bool:
    return isinstance(module, tuple(KINDS.values())) or (
        ".quantized" in type(module).__module__ and hasattr(module, "weight")
    )


def _itemsize(module: nn.Module) -> int:
    weight = module._parameters.get("weight")
    # Not its element_size, which a lazy one has none of.
    return 4 if weight is None else weight.dtype.itemsize


def _spec(module: nn.Module, calls: Sequence[Call]) -> LayerSpec | None:
    """What a layer is, with the leading axes of a Linear's input where all calls agree on them."""
    if not isinstance(module, tuple(KINDS.values())):
        return None
    spec, leading = spec_of(module), {len(call.shape) - 1 for call in calls}
    alike = spec.kind == "Linear" and len(leading) == 1
    return replace(spec, leading=leading.pop()) if alike else spec


def _own_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if not isinstance(p, UninitializedParameter))


def _select(layers: list[Layer], patterns: Sequence[str]) -> list[Layer]:
    chosen = {layer for layer in layers if not patterns}
    for pattern in patterns:
        found = {layer for layer in layers if matches(layer, pattern)}
        if not found:
            raise unknown_name(pattern, [layer.name for layer in layers], "layer")
        chosen |= found
    return [
        layer if layer in chosen else replace(layer, reason=layer.reason or "not selected")
        for layer in layers
    ]


def matches(layer: Layer, pattern: str) -> bool:
    """Whether a shell pattern fits one of the names of a layer."""
    return any(fnmatchcase(name, pattern) for name in (layer.name, *layer.aliases))


def _keep_ends(layers: list[Layer]) -> list[Layer]:
    # A layer that is never called, such as one that only serves training, is at no end.
    called = [place for place, layer in enumerate(layers) if layer.calls != ()]
    if not called:
        return layers
    ends = {called[0]: "the first layer is kept dense", called[-1]: "the last layer is kept dense"}
    return [
        replace(layer, reason=layer.reason or ends[i]) if i in ends else layer
        for i, layer in enumerate(layers)
    ]
