"""How far the outputs of one model are from those of another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tdkit.forward.inputs import Inputs
from tdkit.forward.trial import run_on_data

# Relative to the first, within which lengths of rows are the same.
_ALIKE = 1e-3


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
    places = range(len(wanted[0])) if wanted else ()
    scores = [all(are_scores(each[place]) for each in wanted) for place in places]
    missed: list[list[Tensor]] = [[] for _ in places]
    for want, have in zip(wanted, found, strict=True):
        if [each.shape for each in want] != [each.shape for each in have]:
            return torch.full((1,), math.inf, dtype=torch.float64)
        samples = samples_of(want)
        for place, (w, f) in enumerate(zip(want, have, strict=True)):
            missed[place].append(_missed(w.double(), f.double(), samples, scores[place]))
    parts = [
        torch.cat(values) / (1.0 if known else _spread([w[place] for w in wanted], values))
        for place, (values, known) in enumerate(zip(missed, scores, strict=True))
    ]
    return torch.stack(parts).sum(0) if parts else torch.zeros(0, dtype=torch.float64)


def samples_of(outputs: Sequence[Tensor]) -> int:
    """How many samples a model returned something of: the first axis of the first tensor with any.

    Args:
        outputs: Tensors of any shape.
    """
    return next((len(each) for each in outputs if each.ndim), 1)


def are_scores(wanted: Tensor) -> bool:
    """Whether an output is read as scores of classes.

    That is one of (batch, classes), unless its rows are all of one length, as embeddings are that
    were normalised, or nothing in it is outside of 0 to 1, as with probabilities.

    Args:
        wanted: Of the dense model, of any shape.
    """
    if wanted.ndim != 2 or wanted.shape[1] < 2 or not len(wanted):
        return False
    values = wanted.double()
    if bool(((values >= 0) & (values <= 1)).all()):
        return False
    lengths = torch.linalg.vector_norm(values, dim=1)
    alike = float((lengths - lengths[0]).abs().max()) <= _ALIKE * float(lengths[0])
    return not alike or (len(values) == 1 and abs(float(lengths[0]) - 1) > _ALIKE)


def _missed(wanted: Tensor, found: Tensor, samples: int, scores: bool) -> Tensor:
    """What is missed of each sample, (samples,), on the CPU."""
    if scores:
        target, log = wanted.log_softmax(-1), found.log_softmax(-1)
        share = target.exp()
        # What is masked in both, by scores of minus infinity, is no difference.
        missed = torch.where(share > 0, share * (target - log), 0.0)
    else:
        missed = (wanted - found).square()
    if missed.ndim and len(missed) == samples:
        return missed.flatten(1).sum(1).cpu() if missed.ndim > 1 else missed.cpu()
    return (missed.sum() / samples).expand(samples).cpu()


def _spread(wanted: Sequence[Tensor], missed: Sequence[Tensor]) -> float:
    """The mean over samples of the sum of squares, less the mean."""
    count = sum(each.numel() for each in wanted)
    mean = sum(float(each.double().sum()) for each in wanted) / max(1, count)
    energy = sum(float((each.double() - mean).square().sum()) for each in wanted)
    return energy / max(1, sum(map(len, missed))) or 1.0
