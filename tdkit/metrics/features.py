"""The three feature errors of Table 1 of the paper, and how they are measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tdkit.errors import UnsupportedError, first_line
from tdkit.forward.inputs import copies
from tdkit.forward.trial import trial
from tdkit.metrics.base import Metric, absolute, relative, scaled

RELATIVE = Metric("relative-features", "features", relative)
ABSOLUTE = Metric("absolute-features", "features", absolute)
SCALED = Metric("scaled-features", "features", scaled)


class NotFiniteError(UnsupportedError):
    """A layer of the dense model gives NaN or infinity."""


def feature_errors(
    model: nn.Module,
    stand_ins: Mapping[str, Sequence[nn.Module]],
    batches: Iterable[Tensor | Sequence[Any]],
    metrics: Sequence[Metric],
) -> dict[str, list[dict[str, float]]]:
    """Mean over samples of each metric on the outputs of layers, in one pass over the data.

    Every stand-in sees what its layer sees in the dense model, right after the layer has run, so
    that no features are kept.

    Args:
        model: The dense model; it runs in eval mode and stays as it is.
        stand_ins: By the name of a layer, the modules to compare with it.
        batches: Model inputs: a tensor (batch, ...), or several for a model that takes several.
        metrics: Feature metrics.

    Returns:
        By the name of a layer, for each of its stand-ins the error of every metric. A layer that
        the data never reaches is left out.

    Raises:
        UnsupportedError: If the model does not run on the data.
        NotFiniteError: If a layer's features are not finite, whatever stands in for it.
    """
    watched = {name: Watched(name, modules, metrics) for name, modules in stand_ins.items()}
    handles = [
        model.get_submodule(name).register_forward_hook(watch, with_kwargs=True)
        for name, watch in watched.items()
    ]
    try:
        for batch in batches:
            with trial(model):
                model(*copies([batch] if isinstance(batch, Tensor) else batch))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedError(
            f"the model does not run on the data: {first_line(error)}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return {name: watch.means() for name, watch in watched.items() if watch.samples}


class Watched:
    """A forward hook that compares a layer's output with those of its stand-ins.

    The norms stay on the layer's device until the means are asked for, so that a GPU need not be
    waited for in between.

    Args:
        name: Of the layer, for messages.
        modules: The stand-ins.
        metrics: Feature metrics.

    Attributes:
        samples: How many samples it has seen; none when it never had anything to compare.
    """

    def __init__(self, name: str, modules: Sequence[nn.Module], metrics: Sequence[Metric]) -> None:
        self.name = name
        self.modules = modules
        self.metrics = metrics
        self.samples = 0
        # Of each batch, float64 (1 + stand-ins, samples): the features' norms, and those of the
        # differences to each stand-in's; and how many elements the features of a sample have.
        self._norms: list[Tensor] = []
        self._sizes: list[int] = []

    def __call__(
        self, _layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
    ) -> None:
        """Compare the layer's output for one batch with that of every stand-in."""
        if len(args) + len(kwargs) > 1:
            return  # a stand-in takes the layer's input and no options
        features = output.double().flatten(1)
        norms = [torch.linalg.vector_norm(features, dim=1)]
        # One after the other, so that memory does not grow with their number.
        for module in self.modules:
            other = module(*args, **kwargs).double().flatten(1)
            norms.append(torch.linalg.vector_norm(features - other, dim=1))
        self.samples += len(features)
        self._norms.append(torch.stack(norms))
        self._sizes += [features.shape[1]] * len(features)

    def means(self) -> list[dict[str, float]]:
        """For each stand-in the mean of every metric.

        Raises:
            NotFiniteError: If the layer's features are not finite.
        """
        norms, *errors = torch.cat(self._norms, dim=1).tolist()
        if not all(map(math.isfinite, norms)):
            raise NotFiniteError(
                f"the features of {self.name!r} are not finite", "does the data hold NaN?"
            )
        return [
            {
                metric.name: sum(map(metric.value, error, norms, self._sizes)) / self.samples
                for metric in self.metrics
            }
            for error in errors
        ]
