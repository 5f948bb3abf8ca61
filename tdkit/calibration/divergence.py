"""How far the outputs of one model are from those of another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tdkit.forward.inputs import Inputs
from tdkit.forward.trial import run_on_data


def outputs_of(model: nn.Module, batches: Iterable[Inputs]) -> Iterator[list[Tensor]]:
    """The floating-point tensors that a model returns, for one batch after the other.

    Args:
        model: It is afterwards as before.
        batches: Arguments of forward passes, tensors of any shape.

    Raises:
        UnsupportedError: If the model does not run on them.
    """
    for batch in batches:
        leaves = pytree.tree_leaves(run_on_data(model, batch))
        yield [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


def divergence(wanted: Sequence[Sequence[Tensor]], found: Iterable[Sequence[Tensor]]) -> float:
    """The mean of :func:`divergences`; 0 of nothing.

    Args:
        wanted: For each batch the tensors of the dense model, of any shape.
        found: Those of the other; one batch after the other is looked at.
    """
    values = divergences(wanted, found)
    return float(values.mean()) if len(values) else 0.0


def divergences(wanted: Sequence[Sequence[Tensor]], found: Iterable[Sequence[Tensor]]) -> Tensor:
    """How far outputs are from those that are wanted, in nats; 0 where they agree.

    Of scores (batch, classes) it is the Kullback-Leibler divergence of what their softmax says. Of
    anything else it is the squared error relative to the variance of what is wanted, which is that
    of all samples. Several tensors add up. Infinite where they are not of the same shapes.

    Args:
        wanted: For each batch the tensors of the dense model, of any shape.
        found: Those of the other; one batch after the other is looked at.

    Returns:
        (samples,), float64, on the CPU.
    """
    missed: dict[int, list[Tensor]] = {}
    for want, have in zip(wanted, found, strict=True):
        if [each.shape for each in want] != [each.shape for each in have]:
            return torch.full((1,), math.inf, dtype=torch.float64)
        samples = _samples(want)
        for place, (w, f) in enumerate(zip(want, have, strict=True)):
            missed.setdefault(place, []).append(_missed(w.double(), f.double(), samples))
    parts = [
        torch.cat(values) / _unit([want[place] for want in wanted], sum(map(len, values)))
        for place, values in missed.items()
    ]
    return torch.stack(parts).sum(0) if parts else torch.zeros(0, dtype=torch.float64)


def _samples(outputs: Sequence[Tensor]) -> int:
    return next((len(each) for each in outputs if each.ndim), 1)


def are_scores(wanted: Tensor) -> bool:
    """Whether an output, of any shape, is read as scores of classes: (batch, classes)."""
    return wanted.ndim == 2 and wanted.shape[1] > 1


def _missed(wanted: Tensor, found: Tensor, samples: int) -> Tensor:
    """What is missed of each sample, (samples,), on the CPU."""
    if are_scores(wanted):
        target, log = wanted.log_softmax(-1), found.log_softmax(-1)
        share = target.exp()
        # What is masked in both, by scores of minus infinity, is no difference.
        missed = torch.where(share > 0, share * (target - log), 0.0)
    else:
        missed = (wanted - found).square()
    if missed.ndim and len(missed) == samples:
        return missed.flatten(1).sum(1).cpu() if missed.ndim > 1 else missed.cpu()
    return (missed.sum() / samples).expand(samples).cpu()


def _unit(wanted: Sequence[Tensor], samples: int) -> float:
    """What the misses of each sample are divided by: the mean sum of squares, but of scores."""
    if all(are_scores(each) for each in wanted):
        return 1.0
    count = sum(each.numel() for each in wanted)
    mean = sum(float(each.double().sum()) for each in wanted) / max(1, count)
    energy = sum(float((each.double() - mean).square().sum()) for each in wanted)
    return energy / max(1, samples) or 1.0
