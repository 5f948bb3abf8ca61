"""What a decomposition or a metric may look at beside the weight."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tdkit import defaults
from tdkit.layers.impulses import split_groups

if TYPE_CHECKING:
    from tdkit.layers.spec import LayerSpec

MOMENTS = "moments"
"""The need of what looks at the moments of a layer's inputs."""

COVARIANCE = "covariance"
"""The need of what looks at the patches of a layer's inputs."""

GRADIENTS = "gradients"
"""The need of what looks at that and at what a layer's output does to the model's."""

NEEDS = frozenset({MOMENTS, COVARIANCE, GRADIENTS})
"""All that can be asked for."""


@dataclass(frozen=True, eq=False)
class Moments:
    """What a layer's inputs are like, over all samples and positions.

    Attributes:
        count: How many input vectors were seen: samples times positions.
        mean: (d,), float64, one entry per input channel (Linear: input feature) of the whole
            layer, in the unit of the inputs.
        second: (d, d), float64, the uncentred second moments: the mean of x xᵀ, in that unit
            squared.
    """

    count: int
    mean: Tensor
    second: Tensor


@dataclass(frozen=True, eq=False)
class Curvature:
    """How much an error D of a layer's weight, (out, d) in each group, changes what is made of it.

    The layer's output changes by tr[D S Dᵀ] in the mean over positions, and the model's by
    tr[G D S Dᵀ], summed over the positions of a sample as if errors there had nothing to do with
    each other: the Gauss-Newton approximation by Kronecker factors (Martens and Grosse 2015).

    Attributes:
        layer: The whole layer.
        inputs: S, (groups, d, d), float64, of the patches of the layer's inputs, or (groups,
            in, in) of its input channels alone where patches are too wide. Covariances where
            something adds a bias to the output, else second moments.
        outputs: G, (groups, out, out), float64: the sum over positions of the second moments of
            the output's gradients; None where nobody asked for it.
    """

    layer: LayerSpec
    inputs: Tensor
    outputs: Tensor | None = None

    def of_output(self, weight: Tensor) -> float:
        """The root of tr[D S Dᵀ], summed over groups, in the unit of the output.

        Args:
            weight: D in torch's layout of the layer, (out, in/groups, *kernel) or transposed.
        """
        rows = split_groups(weight.double(), self.layer)
        return _root((rows * self._pushed(rows)).sum())

    def of_model(self, weight: Tensor) -> float:
        """The root of tr[G D S Dᵀ], summed over groups, in the unit of the model's output.

        Args:
            weight: D in torch's layout of the layer, (out, in/groups, *kernel) or transposed.
        """
        assert self.outputs is not None, "whoever asks for the model's output has G collected"
        rows = split_groups(weight.double(), self.layer)
        pulled = torch.einsum("gpo,go...->gp...", self.outputs, rows)
        return _root((pulled * self._pushed(rows)).sum())

    def _pushed(self, rows: Tensor) -> Tensor:
        """D S, (groups, out, in, *kernel)."""
        if self.inputs.shape[-1] == rows.shape[2]:
            return torch.einsum("goi...,gij->goj...", rows, self.inputs)
        return (rows.flatten(2) @ self.inputs).reshape(rows.shape)


def _root(energy: Tensor) -> float:
    return math.sqrt(max(float(energy), 0.0))


@dataclass(frozen=True)
class Evidence:
    """What a layer is known by beside its weight.

    Attributes:
        seed: Seeds the randomness of methods that have any.
        moments: Of the layer's inputs; None where none were collected, or nobody asked for them.
        curvature: Of the layer's weight, likewise.
    """

    seed: int = defaults.SEED
    moments: Moments | None = None
    curvature: Curvature | None = None

    def asked(self, needs: frozenset[str]) -> Evidence:
        """No more than somebody asks for, so that the same comes of it wherever it is known.

        Args:
            needs: Of :data:`NEEDS`.
        """
        curvature = self.curvature if {COVARIANCE, GRADIENTS} & needs else None
        if curvature is not None and GRADIENTS not in needs:
            curvature = replace(curvature, outputs=None)
        return Evidence(self.seed, self.moments if MOMENTS in needs else None, curvature)


NO_EVIDENCE = Evidence()


def as_evidence(value: Evidence | int) -> Evidence:
    """Evidence as it is; a number, which it was before there was more, is the seed."""
    return value if isinstance(value, Evidence) else Evidence(seed=value)
