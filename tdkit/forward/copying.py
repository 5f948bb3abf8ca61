"""A copy of a model to work on, and which models there can be none of."""

from __future__ import annotations

import copy
from collections.abc import Collection
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from tdkit.errors import UnsupportedError, UsageError, first_line


def require_module(model: object) -> None:
    """Refuse what is no module.

    Raises:
        UsageError: Saying what it is.
    """
    if not isinstance(model, nn.Module):
        found = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise UsageError(
            f"a model is a torch.nn.Module, not {found}",
            "load a file with tdkit.load; a state_dict goes into its architecture first",
        )


def plain_module(model: nn.Module) -> nn.Module:
    """The plain model inside any wrapper.

    Raises:
        UsageError: If it is no module.
        UnsupportedError: If it is a TorchScript module.
    """
    require_module(model)
    return unwrap(model)


def refuse_uncopyable(model: nn.Module) -> None:
    """Refuse a plain model of which a copy would be another model, or none.

    Raises:
        UnsupportedError: If it is lazy or half on the meta device, or a part of it is compiled,
            scripted or has a forward that a copy would share.
    """
    refuse_lazy(model)
    for name, module in model.named_modules():
        _refuse_part(name, module)
    _refuse_half_empty(model)


def own_copy(model: nn.Module) -> nn.Module:
    """A copy of the plain model inside any wrapper, so that the caller's stays as it is.

    Raises:
        UsageError: If it is no module.
        UnsupportedError: If the model cannot be copied, or is lazy.
    """
    plain = plain_module(model)
    refuse_uncopyable(plain)
    return _copied(plain, {})


def shared_copy(model: nn.Module, own: Collection[Tensor] = ()) -> nn.Module:
    """A copy of a model's modules that shares the parameters and buffers, all but some.

    It costs next to nothing. Running it changes the original's buffers, outside of a trial.

    Args:
        model: A plain model, which stays as it is.
        own: Parameters or buffers of any shape that the copy has for itself.

    Raises:
        UnsupportedError: If the model cannot be copied.
    """
    apart = {id(tensor) for tensor in own}
    tensors = (*model.parameters(), *model.buffers())
    return _copied(model, {id(t): t for t in tensors if id(t) not in apart})


def _copied(plain: nn.Module, memo: dict[int, Any]) -> nn.Module:
    try:
        return copy.deepcopy(plain, memo)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a module may hold anything
        where = f", probably because of {culprit}" if (culprit := _uncopyable(plain)) else ""
        raise UnsupportedError(
            f"the model cannot be copied{where}: {first_line(error)}",
            "remove weight_norm, pruning and the like, sparse weights, and tensors kept from a"
            " forward pass, first",
        ) from error


def _refuse_part(name: str, module: nn.Module) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise UnsupportedError(
            f"{name} is a TorchScript module, which cannot be copied or run on trial",
            "put the Python module there that it was made from",
        )
    if name and isinstance(module._modules.get("_orig_mod"), nn.Module):
        raise UnsupportedError(
            f"{name} is a compiled module", f"put its original there: {name}._orig_mod"
        )
    if isinstance(vars(module).get("forward"), FunctionType):
        raise UnsupportedError(
            f"the forward of {name or 'the model'} was replaced by a function, which would"
            " still run the original in a copy",
            "give the module its class's forward back: del module.forward",
        )


def _refuse_half_empty(model: nn.Module) -> None:
    parameters = dict(model.named_parameters())
    meta = [key for key, value in parameters.items() if value.is_meta]
    if meta and len(meta) < len(parameters):
        raise UnsupportedError(
            f"{meta[0]} is on the meta device: it has no data", "load its weights first"
        )


def _uncopyable(model: nn.Module) -> str | None:
    """The name of a tensor that cannot be copied as it is."""
    for name, module in model.named_modules():
        own = {**vars(module), **module._parameters, **module._buffers}
        for key, value in own.items():
            if isinstance(value, Tensor) and (value.layout != torch.strided or not value.is_leaf):
                return f"{name}.{key}".removeprefix(".")
    return None


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
