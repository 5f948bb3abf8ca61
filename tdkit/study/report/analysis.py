"""From measurements to conclusions: every number of the report, as frozen records."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from tdkit.decompositions.base import Rank
from tdkit.metrics.base import penalties
from tdkit.study.recipe import PublishedRecipe, StudyRecipe
from tdkit.study.records import Measurement, Phase, Results, Trial
from tdkit.study.report.conclusions import (
    ENOUGH,
    FIGURE_5,
    LEVEL,
    PLANNER,
    Advice,
    Analysis,
    Change,
    Changes,
    Choices,
    Correlation,
    Failure,
    Interval,
    KeepVerdict,
    MeanRegret,
    Model,
    Point,
    Published,
    RankRow,
    Regret,
    Truth,
    Verdict,
)
from tdkit.study.report.correlation import (
    Floats,
    compare,
    draw_weights,
    interval,
    measured_again,
    tau_interval,
)

_T = TypeVar("_T", str, float)


def analyse(
    results: Results, recipe: StudyRecipe, *, resamples: int = 1000, rng: np.random.Generator
) -> Analysis:
    """Draw the conclusions.

    Args:
        results: What was measured, finished or not.
        recipe: The recipe that it was measured by.
        resamples: How many test sets the bootstrap draws. All candidates of both stages are
            measured on the same ones, so that differences between them are paired.
        rng: The only source of randomness.
    """
    good = [m for m in results.measurements if m.failure is None]
    again = _again(results, good, resamples, rng)
    stages: tuple[Phase, ...] = ("before", "after")
    law = results.identity.get("penalties", {}).get(recipe.metrics[0], "squares")
    every = [_tabulate(stage, good, again, recipe.metrics, law) for stage in stages]
    tables = [table for table in every if table is not None]
    keeps = _ordered({m.trial.keep for m in good}, sorted(recipe.keeps, reverse=True))
    focus = tuple(k for k in keeps if k in recipe.focus) or keeps
    dense = again.counts[:, -1]
    estimates = {table.stage: _correlations(table, keeps, focus, dense, rng) for table in tables}
    correlations = tuple(e.correlation for found in estimates.values() for e in found)
    regrets = {table.stage: _regrets(table) for table in tables}
    return Analysis(
        title=recipe.title,
        model=_model(results, recipe, dense),
        metrics=recipe.metrics,
        methods=_ordered({m.trial.method for m in good}, recipe.methods),
        layers=_ordered({m.trial.layer for m in good}, [n for n, _ in results.baseline.layers]),
        keeps=keeps,
        focus=focus,
        stages=tuple(table.stage for table in tables),
        runs={table.stage: table.runs for table in tables},
        resamples=resamples,
        points=tuple(_point(m, again.counts[:, i]) for i, m in enumerate(good)),
        correlations=correlations,
        advice=tuple(_advice(table.stage, estimates[table.stage], recipe) for table in tables),
        regrets=tuple(regret for found, _ in regrets.values() for regret in found),
        mean_regrets=tuple(mean for _, mean in regrets.values() if mean is not None),
        ranks=_ranks(results.measurements, recipe, keeps),
        changes=_changes(good),
        published=tuple(_beside(paper, correlations) for paper in recipe.published),
        failures=tuple(
            Failure(m.trial, m.failure) for m in results.measurements if m.failure is not None
        ),
        finished=len(results.measurements),
        planned=results.planned,
        notes=recipe.notes,
    )


@dataclass(frozen=True)
class _Again:
    """Wrong answers of each measurement, the dense model last: now, and on resampled images."""

    wrong: NDArray[np.int64]  # (models,)
    counts: NDArray[np.float32]  # (resamples, models)
    images: int


def _again(
    results: Results, good: Sequence[Measurement], resamples: int, rng: np.random.Generator
) -> _Again:
    wrong = ~np.stack([*(m.bits for m in good), results.baseline.bits])
    counts = measured_again(wrong, resamples, rng)
    return _Again(wrong.sum(1), counts, results.baseline.images)


@dataclass(frozen=True)
class _Table:
    """One stage as arrays: runs x candidates, NaN where a trial failed or is not done yet."""

    stage: Phase
    trials: tuple[Trial, ...]  # a candidate each: its first trial
    errors: Floats  # (metrics, runs, n)
    truth: Floats  # wrong answers, (runs, n)
    again: NDArray[np.float32]  # the same on resampled images, (resamples, runs, n)
    saved: NDArray[np.int64]  # parameters, (n,)
    metrics: tuple[str, ...]
    law: str  # by what the first error adds up over layers
    images: int
    dense: int  # wrong answers of the dense model

    @property
    def runs(self) -> int:
        return len(self.truth)

    @property
    def priority(self) -> Floats:
        """The order of the planner's first move: penalty per parameter saved, (runs, n)."""
        added = penalties(self.errors[0], self.law)
        # Planners pass over what saves nothing or has no finite error.
        return np.where(self.saved > 0, added / np.maximum(self.saved, 1), np.nan)


_Key = tuple[str, str, float]


def _key(trial: Trial) -> _Key:
    return (trial.layer, trial.method, trial.keep)


def _tabulate(
    stage: Phase,
    good: Sequence[Measurement],
    again: _Again,
    metrics: tuple[str, ...],
    law: str,
) -> _Table | None:
    rows = {(_key(m.trial), m.trial.run): i for i, m in enumerate(good) if m.trial.stage == stage}
    if not rows:
        return None
    first = {key: rows[key, run] for key, run in sorted(rows, key=lambda k: -k[1])}
    keys = sorted(first, key=lambda key: first[key])
    runs = sorted({run for _, run in rows})
    # What was measured in run 0 only stands for every run: nothing about it is random.
    once = {method for _, method, _ in keys} - {method for (_, method, _), run in rows if run > 0}
    places = np.array(
        [[rows.get((key, 0 if key[1] in once else run), -1) for key in keys] for run in runs]
    )
    nothing = places < 0
    errors = np.array([[m.errors.get(name, math.nan) for m in good] for name in metrics])
    return _Table(
        stage=stage,
        trials=tuple(good[first[key]].trial for key in keys),
        errors=np.where(nothing, np.nan, errors[:, places]),
        truth=np.where(nothing, np.nan, again.wrong[places]),
        again=np.where(nothing, np.float32(np.nan), again.counts[:, places]),
        saved=np.array([_saved(good[first[key]]) for key in keys]),
        metrics=metrics,
        law=law,
        images=again.images,
        dense=int(again.wrong[-1]),
    )


def _saved(measurement: Measurement) -> int:
    return measurement.params_before - measurement.params_after


@dataclass(frozen=True)
class _Question:
    """A tau to compute: which candidates are compared within which groups."""

    choices: Choices
    keep: float | None
    groups: tuple[NDArray[np.intp], ...]


def _questions(
    table: _Table, keeps: Sequence[float], focus: Sequence[float]
) -> tuple[_Question, ...]:
    """Figures 1, 2 and 3 of the paper as groups of candidates."""
    chosen = [i for i, trial in enumerate(table.trials) if trial.keep in focus]
    if not chosen:
        # Fine-tuning may have been asked for at other keeps.
        chosen = list(range(len(table.trials)))
    per_keep = [
        _Question("keep", keep, (group,))
        for keep in keeps
        if len(group := np.array([i for i, t in enumerate(table.trials) if t.keep == keep], int))
    ]
    by_choice = (
        [(t.method, t.keep) for t in table.trials],
        [(t.layer, t.keep) for t in table.trials],
    )
    return (
        *per_keep,
        _Question("all", None, (np.array(chosen),)),
        _Question("layers", None, _grouped(chosen, by_choice[0])),
        _Question("methods", None, _grouped(chosen, by_choice[1])),
    )


def _grouped(
    members: Iterable[int], labels: Sequence[tuple[str, float]]
) -> tuple[NDArray[np.intp], ...]:
    groups: dict[tuple[str, float], list[int]] = {}
    for i in members:
        groups.setdefault(labels[i], []).append(i)
    return tuple(np.array(group) for group in groups.values())


@dataclass(frozen=True)
class _Estimate:
    correlation: Correlation
    resampled: Floats  # (resamples,)


def _correlations(
    table: _Table,
    keeps: Sequence[float],
    focus: Sequence[float],
    dense: NDArray[np.float32],
    rng: np.random.Generator,
) -> list[_Estimate]:
    """Every tau of a stage: all metrics and the planner's order against the performance error,
    and the planner's order against what it stands for, the accuracy lost per parameter saved.
    """  # noqa: D205
    names = (*table.metrics, PLANNER)
    errors = np.concatenate([table.errors, table.priority[None]])
    # Only what saves something can lose accuracy per parameter saved.
    saved = np.where(table.saved > 0, table.saved, np.nan)
    loss = (table.truth - table.dense) / saved
    loss_again = (table.again - dense[:, None, None].astype(np.float64)) / saved
    found: list[_Estimate] = []
    for question in _questions(table, keeps, focus):
        data = _Data(table, names, errors, "error", table.truth, table.again)
        found += _answer(data, question, rng)
        if question.choices in ("all", "keep"):
            planner = _Data(table, (PLANNER,), errors[-1:], "loss per parameter", loss, loss_again)
            found += _answer(planner, question, rng)
    return found


@dataclass(frozen=True)
class _Data:
    table: _Table
    names: tuple[str, ...]
    errors: Floats  # (names, runs, n)
    truth: Truth
    values: Floats  # (runs, n)
    again: NDArray[np.floating]  # (resamples, runs, n)


def _answer(data: _Data, question: _Question, rng: np.random.Generator) -> list[_Estimate]:
    """Tau of every error for one question: mean over groups, then over runs."""
    members = np.concatenate(question.groups)
    weights = np.zeros((len(data.again), len(data.table.trials)), np.int64)
    weights[:, members] = draw_weights(len(members), len(data.again), rng)
    runs = range(data.table.runs)
    compared = [
        [
            compare(
                data.errors[:, run, group],
                data.values[run, group],
                data.again[:, run, group],
                weights[:, group],
                LEVEL,
            )
            for group in question.groups
        ]
        for run in runs
    ]
    flat = [one for row in compared for one in row]
    per_run = np.stack([_mean([one.taus for one in row]) for row in compared])
    resampled = _mean([_mean([one.resampled for one in row]) for row in compared])
    tau, tied = _mean(per_run), _mean([one.tied for one in flat])
    on_resolved = _mean([_mean([one.on_resolved for one in row]) for row in compared])
    estimates = []
    for k, name in enumerate(data.names):
        reasons = [one.reasons[k] for one in flat if one.reasons[k]]
        # The ceiling is that of the groups that tau is a mean of.
        counted = [one for one in flat if not np.isnan(one.taus[k])] or flat
        known = per_run[:, k][~np.isnan(per_run[:, k])]
        low, high = tau_interval(float(tau[k]), resampled[:, k], LEVEL)
        correlation = Correlation(
            stage=data.table.stage,
            truth=data.truth,
            choices=question.choices,
            keep=question.keep,
            metric=name,
            tau=float(tau[k]),
            std=float(known.std(ddof=1)) if len(known) > 1 else None,
            interval=Interval(max(low, -1.0), min(high, 1.0)),
            ceiling=float(_mean(np.array([one.ceiling for one in counted]))),
            runs=data.table.runs,
            groups=len(question.groups),
            undefined=len(reasons),
            reason=Counter(reasons).most_common(1)[0][0] if reasons else None,
            candidates=len(members),
            pairs=sum(one.pairs for one in compared[0]),
            tied=float(tied[k]),
            resolved=float(_mean(np.array([one.resolved for one in counted]))),
            on_resolved=float(on_resolved[k]),
        )
        estimates.append(_Estimate(correlation, resampled[:, k]))
    return estimates


def _mean(values: Sequence[Floats] | Floats) -> Floats:
    """The mean along the first axis of what is not NaN; NaN where there is nothing."""
    total = np.zeros(np.shape(values[0]))
    count = np.zeros(np.shape(values[0]), int)
    for value in values:
        known = ~np.isnan(value)
        total += np.where(known, value, 0)
        count += known
    return np.asarray(np.where(count > 0, total / np.maximum(count, 1), np.nan))


def _advice(stage: Phase, estimates: Sequence[_Estimate], recipe: StudyRecipe) -> Advice:
    """Which error to use, and from which keep on; the rules are in the report's words too."""
    found = {
        e.correlation.metric: e
        for e in estimates
        if e.correlation.choices == "all" and e.correlation.metric in recipe.metrics
    }
    defined = [name for name in recipe.metrics if not math.isnan(found[name].correlation.tau)]
    best = max(defined, key=lambda name: found[name].correlation.tau, default=None)
    as_good: tuple[str, ...] = ()
    if best is not None:
        as_good = tuple(n for n in defined if n == best or not _worse(found[n], found[best]))
    metric = next((name for name in as_good if found[name].correlation.interval.low > 0), None)
    keeps = tuple(
        KeepVerdict(e.correlation.keep, _verdict(e.correlation), e.correlation)
        for e in estimates
        if e.correlation.keep is not None
        and e.correlation.truth == "error"
        and e.correlation.metric == (metric or best or recipe.metrics[0])
    )
    return Advice(stage, metric, best, as_good, keeps, _trusted(keeps))


def _worse(one: _Estimate, best: _Estimate) -> bool:
    """Whether the interval of the difference, on the same resamples, leaves out 0."""
    lead = best.correlation.tau - one.correlation.tau
    return tau_interval(lead, best.resampled - one.resampled, LEVEL)[0] > 0


def _verdict(c: Correlation) -> Verdict:
    if math.isnan(c.tau):
        return "undefined"
    if c.interval.low > 0 and c.tau >= ENOUGH * c.ceiling:
        return "informative"
    if c.resolved < 0.5:
        return "noise"
    return "not informative" if c.tau < ENOUGH * c.ceiling else "unclear"


def _trusted(keeps: Iterable[KeepVerdict]) -> float | None:
    trusted = None
    for at in sorted(keeps, key=lambda at: at.keep):
        if at.verdict != "informative":
            break
        trusted = at.keep
    return trusted


def _regrets(table: _Table) -> tuple[list[Regret], MeanRegret | None]:
    usable = ~np.isnan(table.priority) & ~np.isnan(table.truth)  # (runs, n)
    sizes = np.unique(table.saved[usable.any(0)])
    regrets, samples = [], []
    for size in sizes:
        feasible = usable & (table.saved >= size)
        runs = [run for run in range(table.runs) if feasible[run].any()]
        picks = [_least(table.errors[0, run], table.saved, feasible[run]) for run in runs]
        bests = [_least(table.truth[run], table.saved, feasible[run]) for run in runs]
        lost = np.array([table.truth[r, i] for r, i in zip(runs, picks, strict=True)])
        least = np.array([table.truth[r, i] for r, i in zip(runs, bests, strict=True)])
        again = np.mean(
            [
                table.again[:, r, pick].astype(np.float64) - table.again[:, r, best]
                for r, pick, best in zip(runs, picks, bests, strict=True)
            ],
            axis=0,
        )
        samples.append(again / table.images)
        differences = (lost - least) / table.images
        regrets.append(
            Regret(
                stage=table.stage,
                saving=int(size),
                candidates=int(feasible[runs[0]].sum()),
                pick=table.trials[picks[0]],
                best=table.trials[bests[0]],
                pick_error=float(lost.mean()) / table.images,
                best_error=float(least.mean()) / table.images,
                regret=float(differences.mean()),
                std=float(differences.std(ddof=1)) if len(runs) > 1 else None,
                interval=Interval(*interval(samples[-1], LEVEL)),
            )
        )
    return regrets, _mean_regret(regrets, samples)


def _least(values: Floats, saved: NDArray[np.int64], among: NDArray[np.bool_]) -> int:
    """The place of the least value; of equal ones the largest saving."""
    places = np.flatnonzero(among)
    return int(places[np.lexsort((-saved[places], values[places]))[0]])


def _mean_regret(regrets: Sequence[Regret], samples: Sequence[Floats]) -> MeanRegret | None:
    if not regrets:
        return None
    # Regret is constant from one candidate's saving to the next one's.
    widths = np.diff([0, *(regret.saving for regret in regrets)])
    shares = widths / widths.sum()
    return MeanRegret(
        stage=regrets[0].stage,
        regret=float(shares @ np.array([regret.regret for regret in regrets])),
        interval=Interval(*interval(shares @ np.stack(samples), LEVEL)),
        worst=max(regrets, key=lambda regret: regret.regret),
    )


def _model(results: Results, recipe: StudyRecipe, dense: NDArray[np.float32]) -> Model:
    baseline = results.baseline
    return Model(
        images=baseline.images,
        labelled=baseline.labelled,
        accuracy=float(baseline.bits.mean()),
        interval=Interval(*interval(1 - dense.astype(np.float64) / baseline.images, LEVEL)),
        params=baseline.params,
        layers=tuple(name for name, _ in baseline.layers),
        numbers=dict(zip(recipe.layers, recipe.numbers, strict=False)),
    )


def _point(m: Measurement, counts: NDArray[np.float32]) -> Point:
    return Point(
        trial=m.trial,
        params_before=m.params_before,
        params_after=m.params_after,
        macs_before=m.macs_before,
        macs_after=m.macs_after,
        errors=m.errors,
        performance_error=m.performance_error,
        interval=Interval(*interval(counts.astype(np.float64) / m.images, LEVEL)),
        seconds=m.seconds,
    )


def _ranks(
    measurements: Iterable[Measurement], recipe: StudyRecipe, keeps: Sequence[float]
) -> tuple[RankRow, ...]:
    rows: dict[tuple[str, float], dict[str, Rank]] = {}
    for m in measurements:
        rows.setdefault((m.trial.layer, m.trial.keep), {})[m.trial.method] = m.trial.rank
    order = {layer: i for i, layer in enumerate(dict.fromkeys(layer for layer, _ in rows))}
    return tuple(
        RankRow(layer, keep, ranks)
        for (layer, keep), ranks in sorted(rows.items(), key=lambda r: (order[r[0][0]], r[0][1]))
    )


def _changes(good: Iterable[Measurement]) -> Changes | None:
    """Figure 5, for Tucker at keep 0.5 or, where that was not measured, what comes closest."""
    tuned = [m for m in good if m.trial.stage == "after" and m.change]
    if not tuned:
        return None
    method, keep = min(
        dict.fromkeys((m.trial.method, m.trial.keep) for m in tuned),
        key=lambda pair: (pair[0] != FIGURE_5[0], abs(pair[1] - FIGURE_5[1])),
    )
    found: dict[tuple[str, str], list[float]] = {}
    for m in tuned:
        if (m.trial.method, m.trial.keep) == (method, keep):
            for layer, change in m.change.items():
                found.setdefault((m.trial.layer, layer), []).append(change)
    cells = tuple(Change(*key, float(np.mean(values))) for key, values in found.items())
    return Changes(method, keep, cells)


def _beside(paper: PublishedRecipe, correlations: Iterable[Correlation]) -> Published:
    wanted = (paper.stage, "all", paper.metric, "error")
    ours = [c for c in correlations if (c.stage, c.choices, c.metric, c.truth) == wanted]
    return Published(paper, ours[0] if ours else None)


def _ordered(found: set[_T], order: Iterable[_T]) -> tuple[_T, ...]:
    """What was found, in the given order; what the order does not name comes last."""
    first = {item: place for place, item in enumerate(reversed(list(order)))}
    return tuple(sorted(found, key=lambda item: (-first.get(item, -1), item)))
