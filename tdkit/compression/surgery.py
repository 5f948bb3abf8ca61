"""Replacing layers in place, so that it can be undone without a second model in memory."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

import torch
from torch import Tensor, nn

from tdkit.layers.inventory import Layer, replace_layer
from tdkit.layers.traced import TracedModel
from tdkit.layers.weights import ModuleWeights


class Surgery:
    """Replaces layers of a traced model; used as a context, it undoes all when anything raises.

    A dense weight that somebody else holds, the caller's model or a dense one to measure, is taken
    from there when it is put back. Where nobody does it waits in a temporary file.

    Args:
        traced: Its model is changed in place.
    """

    def __init__(self, traced: TracedModel) -> None:
        self._traced = traced
        self._shells: dict[Layer, nn.Module] = {}
        self._stack = ExitStack()
        self._folder: Path | None = None
        if _is_last(traced):
            self._folder = Path(self._stack.enter_context(TemporaryDirectory(prefix="tdkit-")))

    def __enter__(self) -> Surgery:
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
        finally:
            self._stack.close()

    def replace(self, layer: Layer, module: nn.Module) -> None:
        """Put a module where a layer is, in the layer's mode."""
        dense = self._traced.model.get_submodule(layer.name)
        module.train(dense.training)
        shell = copy.copy(dense)
        shell._parameters = {**dense._parameters, "weight": None}
        if self._folder is not None:
            torch.save(dense.get_parameter("weight"), self._file(self._folder))
        self._shells[layer] = shell
        replace_layer(self._traced.model, layer, module)

    def undo(self) -> None:
        """Put every dense layer back, equal in value to what it was."""
        for place, (layer, shell) in enumerate(self._shells.items()):
            shell._parameters["weight"] = self._dense(layer, place)
            replace_layer(self._traced.model, layer, shell)
        self._shells.clear()

    def _dense(self, layer: Layer, place: int) -> nn.Parameter:
        if self._folder is not None:
            kept: Tensor = torch.load(self._file(self._folder, place), weights_only=True)
            return nn.Parameter(kept.detach(), kept.requires_grad)
        weight = self._traced.weights.weight(layer.name)
        return nn.Parameter(weight.detach().clone(), weight.requires_grad)

    def _file(self, folder: Path, place: int | None = None) -> Path:
        return folder / f"{len(self._shells) if place is None else place}.pt"


def _is_last(traced: TracedModel) -> bool:
    """Whether nobody but the model itself holds the dense weights."""
    weights = traced.weights
    return isinstance(weights, ModuleWeights) and weights.model is traced.model
