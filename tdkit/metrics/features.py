"""The three feature errors of Table 1 of the paper, and how they are measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from tdkit.errors import UnsupportedError, first_line
from tdkit.forward.inputs import Inputs
from tdkit.forward.trial import trial
from tdkit.layers.evidence import NO_EVIDENCE, Evidence
from tdkit.metrics.base import Difference, Metric, absolute, relative, scaled

RELATIVE = Metric("relative-features", "features", relative)
ABSOLUTE = Metric("absolute-features", "features", absolute)
SCALED = Metric("scaled-features", "features", scaled)


class NotFiniteError(UnsupportedError):
    """A layer of the dense model gives NaN or infinity."""


def feature_errors(
    model: nn.Module,
    stand_ins: Mapping[str, Sequence[nn.Module]],
    batches: Iterable[Any],
    metrics: Sequence[Metric],
    evidence: Mapping[str, Evidence] = MappingProxyType({}),
) -> dict[str, list[dict[str, float]]]:
    """Mean over samples of each metric on the outputs of layers, in one pass over the data.

    Every stand-in sees what its layer sees in the dense model, right after the layer has run, so
    that no features are kept.

    Args:
        model: The dense model; it runs in eval mode and stays as it is.
        stand_ins: By the name of a layer, the modules to compare with it.
        batches: Model inputs: a tensor (batch, ...), or several, however nested.
        metrics: Feature metrics.
        evidence: What else is known of layers, by name, for metrics that look at it.

    Returns:
        By the name of a layer, for each of its stand-ins the error of every metric. A layer that
        the data never reaches is left out.

    Raises:
        UnsupportedError: If the model does not run on the data.
        UnlawfulError: If a metric fails, or gives a negative error or none of finite norms.
        NotFiniteError: If a layer's features are not finite, whatever stands in for it.
    """
    watched = {
        name: Watched(name, modules, metrics, evidence.get(name, NO_EVIDENCE))
        for name, modules in stand_ins.items()
    }
    handles = [
        model.get_submodule(name).register_forward_hook(watch, with_kwargs=True)
        for name, watch in watched.items()
    ]
    try:
        for batch in batches:
            with trial(model):
                Inputs.of(batch).run(model)
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
        evidence: What else is known about the layer, for metrics that look at it.

    Attributes:
        samples: How many samples it has seen; none when it never had anything to compare.
    """

    def __init__(
        self,
        name: str,
        modules: Sequence[nn.Module],
        metrics: Sequence[Metric],
        evidence: Evidence = NO_EVIDENCE,
    ) -> None:
        self.evidence = evidence
        self.name = name
        self.modules = modules
        self.metrics = metrics
        self.samples = 0
        # Of each batch, float64 (1 + stand-ins, samples): the features' norms, and those of the
        # differences to each stand-in's; and how many elements the features of a sample have.
        self._norms: list[Tensor] = []
        self._sizes: list[int] = []
        # Of metrics that look at the features themselves, the sums over samples by stand-in.
        self._comparing = [metric for metric in metrics if metric.compare is not None]
        self._sums = [dict.fromkeys((m.name for m in self._comparing), 0.0) for _ in modules]

    def __call__(
        self, _layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
    ) -> None:
        """Compare the layer's output (batch, ...) for one batch with that of every stand-in."""
        if len(args) + len(kwargs) > 1:
            return  # a stand-in takes the layer's input and no options
        features = output.double().flatten(1)
        norms = [torch.linalg.vector_norm(features, dim=1)]
        # One after the other, so that memory does not grow with their number.
        for module, sums in zip(self.modules, self._sums, strict=True):
            replaced = module(*args, **kwargs)
            other = replaced.double().flatten(1)
            norms.append(torch.linalg.vector_norm(features - other, dim=1))
            if self._comparing:
                self._compare(output, replaced, sums)
        self.samples += len(features)
        self._norms.append(torch.stack(norms))
        self._sizes += [features.shape[1]] * len(features)

    def means(self) -> list[dict[str, float]]:
        """For each stand-in the mean of every metric.

        Raises:
            NotFiniteError: If the layer's features are not finite.
            UnlawfulError: If a metric fails, or gives a negative error or none of finite norms.
        """
        norms, *errors = torch.cat(self._norms, dim=1).tolist()
        if not all(map(math.isfinite, norms)):
            raise NotFiniteError(
                f"the features of {self.name!r} are not finite", "does the data hold NaN?"
            )
        return [
            {metric.name: self._mean(metric, error, norms, sums) for metric in self.metrics}
            for error, sums in zip(errors, self._sums, strict=True)
        ]

    def _mean(
        self, metric: Metric, errors: list[float], norms: list[float], sums: Mapping[str, float]
    ) -> float:
        if metric.value is None:
            return sums[metric.name] / self.samples
        samples = map(Difference, errors, norms, self._sizes)
        return sum(_lawful(metric, sample) for sample in samples) / self.samples

    def _compare(self, features: Tensor, replaced: Tensor, sums: dict[str, float]) -> None:
        """Add up what metrics say that look at the features of each sample, (channels, ...)."""
        for one, other in zip(features.double(), replaced.double(), strict=True):
            gap, norm = float((one - other).norm()), float(one.norm())
            both = partial(_both, one, other)
            difference = Difference(gap, norm, one.numel(), self.evidence, both)
            for metric in self._comparing:
                sums[metric.name] += _lawful(metric, difference)


def _lawful(metric: Metric, sample: Difference) -> float:
    """The error of a sample; of norms that are no finite numbers it need not be one either."""
    error = metric.of(sample)
    finite = math.isfinite(sample.error) and math.isfinite(sample.norm)
    return metric.check(error) if finite or error < 0 else error


def _both(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    return one, other
