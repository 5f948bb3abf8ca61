"""Fitting all factors of a layer at once to what its inputs make of an error.

Most methods end in a mixing of channels, so that W~ = B A. Given A the best B is a linear least
squares problem: L-BFGS is left with A alone, and needs a quarter of the iterations (variable
projection, Golub and Pereyra 1973). The only product with the whole covariance is then that of A's
few rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tdkit.decompositions.base import compose
from tdkit.layers.impulses import join_groups
from tdkit.layers.spec import LayerSpec
from tdkit.layers.stages import Stage

# Added to the diagonal of a normal matrix, of its mean, the first that gives a Cholesky factor.
_RIDGES = (1e-9, 1e-7, 1e-5, 1e-3)

# The gradient of the relative error at which a start is as good as it gets, in float64.
_STATIONARY = 1e-10


def weighted_rows(rows: Tensor, covariance: Tensor) -> Tensor:
    """Weights times a covariance.

    Args:
        rows: (out, in, *kernel).
        covariance: (d, d), of the channels alone or of whole patches.

    Returns:
        (out, in, *kernel).
    """
    if covariance.shape[-1] == rows.shape[1]:
        return (rows.movedim(1, -1) @ covariance).movedim(-1, 1)
    return (rows.flatten(1) @ covariance).reshape(rows.shape)


def metric_norm(weights: Tensor, covariance: Tensor) -> float:
    """The root of tr[W S Wᵀ], summed over groups.

    Args:
        weights: (groups, out, in, *kernel).
        covariance: (groups, d, d).
    """
    energy = sum(
        float((weight * weighted_rows(weight, part)).sum())
        for weight, part in zip(weights, covariance, strict=True)
    )
    return math.sqrt(max(energy, 0.0))


def fitted_factors(
    stages: Sequence[Stage],
    start: Sequence[Tensor],
    target: Tensor,
    covariance: Tensor | None,
    group: LayerSpec,
    steps: int,
) -> list[Tensor]:
    """Factors of little tr[(T - W~) S (T - W~)ᵀ], by L-BFGS.

    What is in closed form, as a truncated SVD is where S is the unit matrix, is returned at once.

    Args:
        stages: Of one group.
        start: Their weights, in torch's layout, float64.
        target: T, (out, in, *kernel), float64.
        covariance: S, (d, d), whose precision that of the products is; None for the unit matrix.
        group: The layer that they stand in for.
        steps: Iterations, at most.

    Returns:
        In torch's layout, float64. Rounding may leave them a little worse than the start.
    """
    # Without autograd there is no gradient, whatever mode the caller is in.
    with torch.inference_mode(False), torch.enable_grad():
        aim = _Aim.of(target, covariance)
        weights = [each.detach().to(aim.target).contiguous().clone() for each in start]
        fit = _projected if _ends_in_mixing(stages, group) else _whole
        return [each.double() for each in fit(stages, weights, aim, group, steps)]


@dataclass(frozen=True, eq=False)
class _Aim:
    """What is to be approximated.

    Attributes:
        target: T, (out, in, *kernel).
        covariance: S; None for the unit matrix.
        pushed: T S, (out, in, *kernel).
        energy: tr[T S Tᵀ], or 1 where that is 0.
    """

    target: Tensor
    covariance: Tensor | None
    pushed: Tensor
    energy: float

    @classmethod
    def of(cls, target: Tensor, covariance: Tensor | None) -> _Aim:
        wanted = target.clone() if covariance is None else target.to(covariance.dtype)
        pushed = wanted if covariance is None else weighted_rows(wanted, covariance)
        return cls(wanted, covariance, pushed, float((wanted * pushed).sum()) or 1.0)

    def push(self, rows: Tensor) -> Tensor:
        """Rows (n, in, *kernel) times S."""
        return rows if self.covariance is None else weighted_rows(rows, self.covariance)


def _ends_in_mixing(stages: Sequence[Stage], group: LayerSpec) -> bool:
    """Whether the last stage does no more than mix what the others deliver."""
    last = stages[-1]
    if len(stages) < 2 or not isinstance(last, LayerSpec):
        return False
    alike = len(last.kernel_size) == len(group.kernel_size)
    whole = last.groups == 1 and last.out_channels == group.out_channels
    return alike and whole and math.prod(last.kernel_size) == 1


def _whole(
    stages: Sequence[Stage], factors: list[Tensor], aim: _Aim, group: LayerSpec, steps: int
) -> list[Tensor]:
    """All factors at once."""

    def value() -> Tensor:
        made = compose(stages, factors, group)
        with torch.no_grad():
            missed = aim.target - made
            pushed = aim.push(missed)
            error = (missed * pushed).sum() / aim.energy
        made.backward(pushed * (-2 / aim.energy))
        return error

    _minimise(factors, value, steps)
    return [factor.detach() for factor in factors]


def _projected(
    stages: Sequence[Stage], factors: list[Tensor], aim: _Aim, group: LayerSpec, steps: int
) -> list[Tensor]:
    """All factors but the last, which is the best one for them throughout."""
    last = stages[-1]
    assert isinstance(last, LayerSpec)
    inner, before = replace(group, out_channels=last.in_channels), factors[:-1]

    def value() -> Tensor:
        rows = compose(stages[:-1], before, inner)
        with torch.no_grad():
            pushed = aim.push(rows)
            mixing = _mixing(aim, rows, pushed)
            missed = aim.target.flatten(1) - mixing @ rows.flatten(1)
            # The gradient is that of A alone, since that of the best B is zero.
            beyond = aim.pushed.flatten(1) - mixing @ pushed.flatten(1)
            error = (missed * beyond).sum() / aim.energy
            gradient = mixing.T @ beyond * (-2 / aim.energy)
        rows.backward(gradient.reshape(rows.shape))
        return error

    _minimise(before, value, steps)
    with torch.no_grad():
        rows = compose(stages[:-1], before, inner)
        mixing = _mixing(aim, rows, aim.push(rows))
    shape = (1, *mixing.shape, *last.kernel_size)
    return [*(factor.detach() for factor in before), join_groups(mixing.reshape(shape), last)]


def _mixing(aim: _Aim, rows: Tensor, pushed: Tensor) -> Tensor:
    """The B of least error of B A, (out, n).

    Args:
        aim: What is to be approximated.
        rows: A, (n, in, *kernel).
        pushed: A S, likewise.
    """
    normal = (pushed.flatten(1) @ rows.flatten(1).T).double()
    right = (aim.pushed.flatten(1) @ rows.flatten(1).T).double()
    diagonal = normal.diagonal().clone()
    size = diagonal.mean().clamp(min=torch.finfo(normal.dtype).tiny)
    for ridge in _RIDGES:
        normal.diagonal().copy_(diagonal + ridge * size)
        lower, failed = torch.linalg.cholesky_ex(normal)
        if not bool(failed):
            break
    found: Tensor = torch.cholesky_solve(right.T, lower).T
    return found.to(rows.dtype)


def _minimise(factors: Sequence[Tensor], value: Callable[[], Tensor], steps: int) -> None:
    """Change factors in place; the value adds its gradient to theirs."""
    for factor in factors:
        factor.requires_grad_()
    optimizer = torch.optim.LBFGS(
        factors,
        max_iter=steps,
        history_size=10,
        tolerance_grad=_STATIONARY,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        return value()

    optimizer.step(closure)
