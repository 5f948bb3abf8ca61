"""Scored candidates, and the metrics that choose among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tdkit.calibration.curvature import ROWS, NoGradientsError
from tdkit.compression.scoring import COMPRESSION_KEEPS, Grid, score
from tdkit.decompositions.whitening import DataAware
from tdkit.layers.traced import TracedModel
from tdkit.metrics.base import Metric, relative
from tdkit.metrics.curvature import GAUSS_NEWTON, WHITENED
from tdkit.metrics.weights import RELATIVE
from tdkit.planners.candidate import Candidate

# Errors and norms are in the metric of the inputs already.
_IN_METRIC = replace(WHITENED, compare=None, value=relative)

# Multiply-accumulates beyond which the default effort makes one plan: about a quarter of a minute.
_MOST = 5 * 10**11

# Fractions of a layer that are scored with fitted factors, and the steps of the fit.
_KEEPS = (0.02, 0.03, 0.045, 0.06, 0.08, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7)
_STEPS = 5


@dataclass(frozen=True, eq=False)
class Draft:
    """What a plan can be made of.

    Attributes:
        metric: The error whose penalties, summed over layers, are kept small.
        candidates: What there is to choose from.
    """

    metric: Metric
    candidates: Sequence[Candidate]


def drafts_from_data(
    traced: TracedModel,
    grid: Grid,
    effort: str,
    share: float | None,
    plain: Sequence[Candidate],
    batches: Sequence[Any],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[Draft], tuple[str, ...]]:
    """The same candidates as they are once their factors are fitted to data, by what these say.

    None where that takes too long for an effort that is not the best.

    Args:
        traced: The dense model.
        grid: The methods, and what else is scored.
        effort: One of :data:`tdkit.defaults.EFFORTS`; ``best`` looks at the model's output, too.
        share: The fraction of the layers that may remain, where one bound says: candidates of a
            quarter to four times of it are scored, unless the grid has keeps of its own.
        plain: Candidates scored by their weights, for layers of which data say nothing.
        batches: Model inputs, tensors of any shape.
        progress: See :func:`tdkit.compression.scoring.score`.

    Returns:
        The drafts, and what the user should know.

    Raises:
        UnsupportedError: If a method fails on a layer, or the model on the data.
    """
    if effort != "best" and _work(traced) > _MOST:
        return [], ()
    fitted = replace(
        grid,
        methods={name: DataAware(method, _STEPS) for name, method in grid.methods.items()},
        metrics=[_IN_METRIC, GAUSS_NEWTON] if effort == "best" else [_IN_METRIC],
        keeps=_keeps(grid, share),
    )
    notes: tuple[str, ...] = ()
    try:
        candidates = score(traced, fitted, batches=batches, progress=progress)
    except NoGradientsError as error:
        notes = (f"no plan is made by {GAUSS_NEWTON.name}: {error}",)
        fitted = replace(fitted, metrics=[_IN_METRIC])
        candidates = score(traced, fitted, batches=batches, progress=progress)
    drafts = [Draft(metric, candidates) for metric in fitted.metrics]
    drafts[0] = Draft(_IN_METRIC, [*candidates, *_unseen(candidates, plain)])
    return drafts, notes


def _unseen(candidates: Sequence[Candidate], plain: Sequence[Candidate]) -> list[Candidate]:
    """Those of layers of which data say nothing, by what their weights say."""
    seen = {candidate.layer for candidate in candidates}
    return [
        replace(c, errors={**c.errors, _IN_METRIC.name: c.errors[RELATIVE.name]})
        for c in plain
        if c.layer not in seen and RELATIVE.name in c.errors
    ]


def _keeps(grid: Grid, share: float | None) -> Sequence[float]:
    """The user's own, or of tdkit's those around what may remain."""
    if grid.keeps is not COMPRESSION_KEEPS:
        return grid.keeps
    near = [k for k in _KEEPS if share is None or share / 4 <= k <= 4 * share]
    return near or _KEEPS


def _work(traced: TracedModel) -> int:
    """Multiply-accumulates of the covariances of all layers."""
    widths = [
        layer.spec.per_group().weight_parameters // layer.spec.per_group().out_channels
        for layer in traced.layers
        if layer.spec is not None and layer.reason is None
    ]
    return ROWS * sum(width**2 for width in widths)
