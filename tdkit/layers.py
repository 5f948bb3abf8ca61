"""Find a model's compressible layers, and why the others are not; replace one."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from tdkit.costs import Call, macs
from tdkit.errors import UnsupportedError, unknown_name
from tdkit.specs import KINDS, LayerSpec, spec_of

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
    """

    name: str
    aliases: tuple[str, ...]
    kind: str
    spec: LayerSpec | None
    parameters: int
    calls: tuple[Call, ...] | None = None
    reason: str | None = None

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates per sample; None when the model was not run."""
        if self.calls is None or self.spec is None:
            return None
        return macs([self.spec], self.calls)


def unwrap(model: nn.Module) -> nn.Module:
    """The plain module inside DataParallel, DistributedDataParallel or torch.compile.

    Raises:
        UnsupportedError: If the model is a TorchScript module.
    """
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(model, torch.jit.ScriptModule):
            raise UnsupportedError(
                "the model is a TorchScript module, whose layers cannot be replaced",
                "compress the Python model it was made from",
            )
        if isinstance(model, wrappers):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def find_layers(
    model: nn.Module,
    *,
    inputs: Sequence[Any] | None = None,
    patterns: Sequence[str] = (),
    keep_ends: bool = True,
) -> list[Layer]:
    """Every convolutional and linear layer in order, with the reason where one is kept dense.

    Args:
        model: Any module.
        inputs: Arguments of one forward pass over a single sample; without them MACs stay unknown
            and the order is that of registration, not that of the calls.
        patterns: Shell patterns; layers that match none under any of their names are kept dense.
        keep_ends: Keep the first and the last layer dense, as the paper does.

    Raises:
        UsageError: If a pattern matches no layer.
        UnsupportedError: If the model has no parameters, is a single layer, contains itself, or
            does not run on the inputs.
    """
    if next(model.parameters(), None) is None and next(model.buffers(), None) is None:
        raise UnsupportedError(
            "the model has no parameters: there is nothing to compress", "give it its weights first"
        )
    names = _names(model)
    calls = trace(model, list(names), inputs) if inputs is not None else None
    users = _parameter_users(model)
    layers = [
        Layer(
            name=paths[0],
            aliases=tuple(paths[1:]),
            kind=type(module).__name__,
            spec=spec_of(module) if isinstance(module, tuple(KINDS.values())) else None,
            parameters=_own_parameters(module),
            calls=tuple(calls.get(module, ())) if calls is not None else None,
            reason=_reason(model, module, paths, users),
        )
        for module, paths in names.items()
    ]
    if calls is not None:
        order = {names[module][0]: place for place, module in enumerate(calls)}
        layers.sort(key=lambda layer: order.get(layer.name, len(order)))
    layers = _select(layers, patterns)
    return _keep_ends(layers) if keep_ends else layers


def replace_layer(model: nn.Module, layer: Layer, module: nn.Module) -> None:
    """Put a module where the layer is, under every name it has. Changes the model in place."""
    for path in (layer.name, *layer.aliases):
        owner, _, attribute = path.rpartition(".")
        model.get_submodule(owner)._modules[attribute] = module


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Run a block in train or eval mode, then restore every module's own mode."""
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, value in before.items():
            module.training = value


@contextmanager
def trial(model: nn.Module, training: bool = False) -> Iterator[None]:
    """Run a block in eval or train mode, without gradients and with fixed random numbers.

    Modes, buffers and the random state of Python, NumPy and torch are afterwards as before.
    """
    with _kept_buffers(model), _fixed_randomness(model), mode(model, training), torch.no_grad():
        yield


@contextmanager
def _kept_buffers(model: nn.Module) -> Iterator[None]:
    tables = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    values = [(buffer, _version(buffer), buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for table, before in tables:
            table.clear()
            table.update(before)
        for buffer, version, value in values:
            if _version(buffer) != version:
                buffer.copy_(value)
            elif _can_change_unseen(buffer):
                # Writing through .data does not count as a version either. To look whether it is
                # needed would be to wait for a GPU.
                buffer.data.copy_(value)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _can_change_unseen(buffer: Tensor) -> bool:
    # BatchNorm's kernels write running statistics without counting it as a new version.
    plain = buffer.is_floating_point() and buffer.layout == torch.strided and not buffer.is_meta
    if not plain or buffer.is_inference():
        return False
    # Nothing can be written to an expanded buffer.
    return all(step or size < 2 for step, size in zip(buffer.stride(), buffer.shape, strict=True))


@contextmanager
def _fixed_randomness(model: nn.Module) -> Iterator[None]:
    python, arrays = random.getstate(), np.random.get_state()
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    try:
        with torch.random.fork_rng(devices=devices):
            # Not torch.manual_seed, which reaches devices whose state is not kept here.
            torch.default_generator.manual_seed(0)
            for device in devices:
                torch.cuda.default_generators[device].manual_seed(0)
            random.seed(0)
            np.random.seed(0)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


def trace(
    model: nn.Module, modules: Sequence[nn.Module], inputs: Sequence[Any]
) -> dict[nn.Module, list[Call]]:
    """How one eval-mode forward pass calls some modules, in order of the first call.

    Raises:
        UnsupportedError: If the model is lazy, or does not run on the inputs.
    """
    refuse_lazy(model)
    seen: dict[nn.Module, list[Call]] = {}

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = args[0] if args else next(iter(kwargs.values()))
        seen.setdefault(module, []).append(_call(module, value))

    handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in modules]
    try:
        with trial(model):
            model(*copies(inputs))
    except Exception as error:
        shapes = ", ".join(str(tuple(i.shape)) for i in inputs if isinstance(i, Tensor))
        raise UnsupportedError(
            f"the model does not run on an input of shape {shapes}: {first_line(error)}",
            "name the shape that it takes with --input-shape, such as 3,224,224, or data that fit;"
            " a model of several inputs or of integers goes without, or with example_inputs in"
            " Python",
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return seen


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def copies(inputs: Sequence[Any]) -> list[Any]:
    """Arguments of a forward pass that the model may change in place."""
    return [value.clone() if isinstance(value, Tensor) else value for value in inputs]


def refuse_lazy(model: nn.Module) -> None:
    """Refuse a model some of whose parameters have no shape yet.

    Raises:
        UnsupportedError: Naming the first of them.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise UnsupportedError(
                f"the model is lazy: {name} has no shape yet", "run one batch through it first"
            )


def _names(model: nn.Module) -> dict[nn.Module, list[str]]:
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


def _own_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if not isinstance(p, UninitializedParameter))


def _parameter_users(model: nn.Module) -> Counter[int]:
    return Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )


def _reason(
    model: nn.Module, module: nn.Module, paths: Sequence[str], users: Mapping[int, int]
) -> str | None:
    return (
        _reason_of_owner(model, paths)
        or _reason_of_class(module)
        or _reason_of_weight(module, users)
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

    One that starts with a depthwise convolution is not: no method puts it there, but models of
    depthwise-separable convolutions do.
    """
    if len(module) < 2 or any(type(stage) not in KINDS.values() for stage in module):
        return False
    return _reason_of_geometry(spec_of(module[0])) is None


def _reason_of_weight(module: nn.Module, users: Mapping[int, int]) -> str | None:
    weight = module._parameters.get("weight")
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
        (users[id(weight)] > 1, "its weight is tied to another layer's"),
    )
    found = next((reason for failed, reason in checks if failed), None)
    if found is None and not bool(torch.isfinite(weight).all()):
        found = "its weight has NaN or infinite entries"
    return found


def _reason_of_geometry(spec: LayerSpec) -> str | None:
    if spec.groups > 1 and spec.groups == spec.in_channels:
        return "depthwise: one input channel per group leaves nothing to factorize"
    return None


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


def _call(module: nn.Module, value: Tensor) -> Call:
    axes = len(getattr(module, "kernel_size", ()))
    if axes == 0:
        return Call(1, (value[..., 0].numel(),))
    return Call(value.shape[0] if value.ndim > axes + 1 else 1, tuple(value.shape[-axes:]))
