"""Fitting the factors of a layer to what its activation makes of the output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tdkit.decompositions.base import compose
from tdkit.layers.spec import LayerSpec
from tdkit.layers.stages import Stage

# Steps of Adam, rows in each, and the largest change of a step relative to a factor's entries.
_STEPS, _ROWS, _RATE = 300, 1000, 2e-2


@dataclass(frozen=True, eq=False)
class Rows:
    """Pairs of one group of a layer.

    Attributes:
        inputs: (n, d), see :func:`tdkit.layers.patches.input_rows`.
        outputs: (n, out), what the dense layer returned.
    """

    inputs: Tensor
    outputs: Tensor


@torch.inference_mode(False)
def fitted_to_activations(
    stages: Sequence[Stage],
    start: Sequence[Tensor],
    bias: Tensor,
    rows: Rows,
    held: Rows,
    after: Callable[[Tensor], Tensor],
    group: LayerSpec,
    generator: torch.Generator,
) -> tuple[list[Tensor], Tensor]:
    """Factors and bias of least squared error behind the activation, by Adam.

    What a ReLU sets to zero may be anything below: an error there costs nothing, and the factors
    have more left for the rest (Zhang et al. 2016, nonlinear reconstruction).

    Args:
        stages: Of one group.
        start: Their weights, in torch's layout.
        bias: What is added to the output, (out,).
        rows: What to fit to.
        held: What was held back; where the fit is no better on it, the start is returned.
        after: What is done to outputs (n, out) at once.
        group: The layer that they stand in for.
        generator: Draws the rows of each step.

    Returns:
        The factors, in torch's layout, and the bias (out,).
    """
    factors = [f.detach().float().contiguous().clone().requires_grad_() for f in start]
    summand = bias.detach().float().clone().requires_grad_()
    wanted, aim = after(rows.outputs), after(held.outputs)

    def error(inputs: Tensor, target: Tensor) -> Tensor:
        made = inputs @ compose(stages, factors, group).flatten(1).T + summand
        return (after(made) - target).square().mean()

    with torch.no_grad():
        before = float(error(held.inputs, aim))
    scale = float(wanted.var(0).mean()) or 1.0
    optimizer = torch.optim.Adam(
        [{"params": [each], "lr": _RATE * _size(each)} for each in (*factors, summand)]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    with torch.enable_grad():
        for _ in range(_STEPS):
            chosen = torch.randint(len(wanted), (_ROWS,), generator=generator).to(wanted.device)
            optimizer.zero_grad()
            (error(rows.inputs[chosen], wanted[chosen]) / scale).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        after_all = float(error(held.inputs, aim))
    if not after_all < before:
        return list(start), bias
    return [f.detach().to(bias.dtype) for f in factors], summand.detach().to(bias.dtype)


def _size(tensor: Tensor) -> float:
    return float(tensor.detach().square().mean().sqrt()) or 1e-3
