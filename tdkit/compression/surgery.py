"""Replacing layers in place, so that it can be undone without a second model in memory."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

import torch
from torch import Tensor, nn

from tdkit.compression.calibrating import State, kept_state, restore
from tdkit.errors import StorageError, first_line
from tdkit.files import os_error
from tdkit.layers.inventory import Layer, replace_layer
from tdkit.layers.traced import TracedModel
from tdkit.layers.weights import FileWeights, ModuleWeights


class Surgery:
    """Replaces layers of a traced model; used as a context, it undoes all when anything raises.

    The modules and parameters that are put back are the same objects as before, since an optimizer
    may hold them. In between a dense weight has no data: where somebody else holds it, the caller's
    model or a dense one to measure, it is taken from there; where nobody does it waits in a
    temporary file.

    Args:
        traced: Its model is changed in place.

    Raises:
        StorageError: If there can be no temporary file.
    """

    def __init__(self, traced: TracedModel) -> None:
        self._traced = traced
        self._replaced: dict[Layer, nn.Module] = {}
        self._swapped: list[tuple[nn.Module, str, nn.Module]] = []
        self._stack = ExitStack()
        self._folder: Path | None = None
        self._norms: State = {}
        if _is_last(traced):
            try:
                made = self._stack.enter_context(TemporaryDirectory(prefix="tdkit-"))
            except OSError as error:
                raise _not_kept(error) from error
            self._folder = Path(made)

    def __enter__(self) -> Surgery:
        self._norms = kept_state(self._traced.model)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is not None:
                self.undo()
            else:
                self._let_go()
        finally:
            self._stack.close()

    def replace(self, layer: Layer, module: nn.Module) -> None:
        """Put a module where a layer is, in the layer's mode.

        Raises:
            StorageError: If there is no room for the dense weight's temporary file.
        """
        dense = self._traced.model.get_submodule(layer.name)
        module.train(dense.training)
        weight = dense.get_parameter("weight")
        if self._folder is not None:
            _save(weight.detach(), self._file(self._folder, len(self._replaced)))
        self._replaced[layer] = dense
        replace_layer(self._traced.model, layer, module)
        if self._can_refill(layer, weight):
            weight.data = weight.data.new_empty(0)

    def swap(self, name: str, module: nn.Module) -> None:
        """Put a module in the place of any other, under all its names.

        Args:
            name: Of the one that is there.
            module: What stands there until it is undone.
        """
        old = self._traced.model.get_submodule(name)
        for owner in list(self._traced.model.modules()):
            for attribute, child in list(owner._modules.items()):
                if child is old:
                    self._swapped.append((owner, attribute, old))
                    owner._modules[attribute] = module

    def weight(self, layer: Layer) -> Tensor:
        """The weight that a replaced layer had, (out, in/groups, *kernel) as torch has it."""
        dense = self._replaced[layer].get_parameter("weight")
        if not self._can_refill(layer, dense):
            return dense
        return self._kept(layer, list(self._replaced).index(layer))

    def undo(self) -> None:
        """Put every dense layer back: the module that it was, with the parameters that it had.

        BatchNorm has its statistics again, too.
        """
        for owner, attribute, old in reversed(self._swapped):
            owner._modules[attribute] = old
        self._swapped.clear()
        restore(self._norms)
        for place, (layer, dense) in enumerate(self._replaced.items()):
            self._refill(dense.get_parameter("weight"), layer, place)
            replace_layer(self._traced.model, layer, dense)
        self._replaced.clear()

    def take_off(self) -> dict[Layer, nn.Module]:
        """Undo all, and give what stood in for the layers."""
        modules = {layer: self._traced.model.get_submodule(layer.name) for layer in self._replaced}
        self.undo()
        return modules

    def _let_go(self) -> None:
        """Give those dense weights their data back that somebody holds, such as an optimizer."""
        held = [
            (layer, weakref.ref(dense.get_parameter("weight")))
            for layer, dense in self._replaced.items()
        ]
        self._replaced.clear()
        for place, (layer, reference) in enumerate(held):
            weight = reference()
            if weight is not None:
                self._refill(weight, layer, place)

    def _refill(self, weight: nn.Parameter, layer: Layer, place: int) -> None:
        if not self._can_refill(layer, weight):
            return
        weight.data = self._kept(layer, place).clone().to(weight.device, weight.dtype)

    def _kept(self, layer: Layer, place: int) -> Tensor:
        """The dense weight of a layer, from wherever it can be had."""
        if self._folder is None:
            return self._traced.weights.weight(layer.name).detach()
        kept: Tensor = torch.load(self._file(self._folder, place), weights_only=True)
        return kept

    def _can_refill(self, layer: Layer, weight: nn.Parameter) -> bool:
        """Whether its data can be had anew, and there are any to do without."""
        if weight.is_meta:
            return False
        weights = self._traced.weights
        if self._folder is not None or isinstance(weights, FileWeights):
            return True
        return weights.weight(layer.name) is not weight

    def _file(self, folder: Path, place: int) -> Path:
        return folder / f"{place}.pt"


def _save(weight: Tensor, path: Path) -> None:
    try:
        # Through a file of Python's, which says why it cannot be written to.
        with path.open("wb") as file:
            torch.save(weight, file)
    except (OSError, RuntimeError) as error:
        failed = os_error(error)
        if failed is None:
            raise
        raise _not_kept(failed) from error


def _not_kept(error: OSError) -> StorageError:
    return StorageError(
        f"dense weights cannot be kept in a temporary file meanwhile: {first_line(error)}",
        "free some space there, or set TMPDIR to a folder on another disk",
    )


def _is_last(traced: TracedModel) -> bool:
    """Whether nobody but the model itself holds the dense weights."""
    weights = traced.weights
    return isinstance(weights, ModuleWeights) and weights.model is traced.model
