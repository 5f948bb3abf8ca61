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
    """How far outputs are from those that are wanted, in nats per sample; 0 where they agree.

    Of scores (batch, classes) it is the Kullback-Leibler divergence of what their softmax says. Of
    anything else it is the squared error relative to the variance of what is wanted. Several
    tensors add up. Infinite where they are not of the same shapes.

    Args:
        wanted: For each batch the tensors of the dense model, of any shape.
        found: Those of the other; one batch after the other is looked at.
    """
    missed: dict[int, float] = {}
    for want, have in zip(wanted, found, strict=True):
        if [each.shape for each in want] != [each.shape for each in have]:
            return math.inf
        for place, (w, f) in enumerate(zip(want, have, strict=True)):
            missed[place] = missed.get(place, 0.0) + _missed(w.double(), f.double())
    return sum(value / _unit([want[place] for want in wanted]) for place, value in missed.items())


def _are_scores(wanted: Tensor) -> bool:
    return wanted.ndim == 2 and wanted.shape[1] > 1


def _missed(wanted: Tensor, found: Tensor) -> float:
    if not _are_scores(wanted):
        return float((wanted - found).square().sum())
    target, log = wanted.log_softmax(-1), found.log_softmax(-1)
    share = target.exp()
    # What is masked in both, by scores of minus infinity, is no difference.
    return float(torch.where(share > 0, share * (target - log), 0.0).sum())


def _unit(wanted: Sequence[Tensor]) -> float:
    """What the misses of all batches are divided by: samples, or the sum of squares."""
    if all(_are_scores(each) for each in wanted):
        return float(sum(map(len, wanted)))
    count = sum(each.numel() for each in wanted)
    mean = sum(float(each.double().sum()) for each in wanted) / max(1, count)
    return sum(float((each.double() - mean).square().sum()) for each in wanted) or 1.0
