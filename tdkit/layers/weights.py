"""A layer's weight by name, from a module or from a file: no live model is needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import safetensors
import torch
from torch import Tensor, nn

from tdkit.errors import UnreadableFileError, UsageError, first_line


class Weights(Protocol):
    """Where the weights of layers come from."""

    def weight(self, layer: str) -> Tensor:
        """The weight of a layer by its dotted name, not to be changed.

        In torch's layout: (out, in/groups, *kernel) but for transposed convolutions.
        """

    def bias(self, layer: str) -> Tensor | None:
        """Its bias (out,), or None."""


@dataclass(frozen=True)
class ModuleWeights:
    """The weights of a live model."""

    model: nn.Module

    def weight(self, layer: str) -> Tensor:
        """The layer's parameter, (out, in/groups, *kernel) as torch has it."""
        return self.model.get_submodule(layer).get_parameter("weight")

    def bias(self, layer: str) -> Tensor | None:
        """The layer's parameter (out,), or None."""
        return self.model.get_submodule(layer)._parameters.get("bias")


@dataclass(frozen=True)
class StateWeights:
    """The weights of a state_dict, its names those of the model's parameters."""

    state: Mapping[str, Tensor]

    def weight(self, layer: str) -> Tensor:
        """The layer's entry, (out, in/groups, *kernel) as torch has it.

        Raises:
            UsageError: If there is none.
        """
        found = self.state.get(f"{layer}.weight")
        if found is None:
            raise UsageError(f"the state_dict has no weight of the layer {layer!r}")
        return found

    def bias(self, layer: str) -> Tensor | None:
        """The layer's entry (out,), or None."""
        return self.state.get(f"{layer}.bias")


@dataclass(frozen=True)
class FileWeights:
    """The weights of a safetensors file, each read when it is asked for."""

    path: Path

    def weight(self, layer: str) -> Tensor:
        """The layer's entry, (out, in/groups, *kernel) as torch has it.

        Raises:
            UnreadableFileError: If the file or the entry cannot be read.
        """
        found = self._read(f"{layer}.weight")
        if found is None:
            raise UnreadableFileError(f"{self.path} has no weight of the layer {layer!r}")
        return found

    def bias(self, layer: str) -> Tensor | None:
        """The layer's entry (out,), or None.

        Raises:
            UnreadableFileError: If the file cannot be read.
        """
        return self._read(f"{layer}.bias")

    def _read(self, name: str) -> Tensor | None:
        try:
            with safetensors.safe_open(str(self.path), framework="pt", device="cpu") as file:
                if name not in file.keys():  # noqa: SIM118 - it is no mapping
                    return None
                tensor: Tensor = file.get_tensor(name)
                return tensor
        except Exception as error:  # safetensors raises one of its own for every kind of damage
            raise UnreadableFileError(f"{self.path} cannot be read: {first_line(error)}") from error


def is_finite(weight: Tensor) -> bool:
    """Whether a tensor of any shape has no NaN and no infinite entry; it takes no memory."""
    if not torch.numel(weight):
        return True
    # NaN is passed on.
    lowest, highest = torch.aminmax(weight.detach())
    return bool(lowest.isfinite() and highest.isfinite())
