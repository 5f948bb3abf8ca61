"""How far the outputs of one model are from those of another."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from tdkit.forward.inputs import Inputs
from tdkit.forward.trial import trial


def outputs_of(model: nn.Module, batches: Sequence[Inputs]) -> list[list[Tensor]]:
    """The floating-point tensors that a model returns, for each batch.

    Args:
        model: It is afterwards as before.
        batches: Arguments of forward passes, tensors of any shape.
    """
    found = []
    for batch in batches:
        with trial(model):
            leaves = pytree.tree_leaves(batch.run(model))
        found.append([x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()])
    return found


def divergence(wanted: Sequence[Sequence[Tensor]], found: Sequence[Sequence[Tensor]]) -> float:
    """How far outputs are from those that are wanted, in nats per sample; 0 where they agree.

    Of scores (batch, classes) it is the Kullback-Leibler divergence of what their softmax says. Of
    anything else it is the squared error relative to the variance of what is wanted. Several
    tensors add up.

    Args:
        wanted: For each batch the tensors of the dense model, of any shape.
        found: Those of the other.
    """
    total = 0.0
    for place in range(len(wanted[0]) if wanted else 0):
        pairs = [(w[place].double(), f[place].double()) for w, f in zip(wanted, found, strict=True)]
        samples = sum(len(w) if w.ndim else 1 for w, _ in pairs)
        if all(w.ndim == 2 and w.shape[1] > 1 for w, _ in pairs):
            total += sum(_relative_entropy(w, f) for w, f in pairs) / samples
        else:
            total += _squared_error(pairs)
    return total


def _relative_entropy(wanted: Tensor, found: Tensor) -> float:
    target, log = wanted.log_softmax(-1), found.log_softmax(-1)
    return float(functional.kl_div(log, target, reduction="sum", log_target=True))


def _squared_error(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    count = sum(w.numel() for w, _ in pairs)
    mean = sum(float(w.sum()) for w, _ in pairs) / max(1, count)
    missed = sum(float((w - f).square().sum()) for w, f in pairs)
    spread = sum(float((w - mean).square().sum()) for w, _ in pairs)
    return missed / spread if spread > 0 else missed
