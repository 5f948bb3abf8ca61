"""The tables of the report as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

from tdkit.decompositions.base import Rank
from tdkit.study.report.conclusions import Analysis, Regret


def tables(analysis: Analysis) -> dict[str, str]:
    """All tables that have rows: CSV text by the name of the file without its suffix."""
    found = {
        "correlations": _correlations(analysis),
        "candidates": _candidates(analysis),
        "ranks": _ranks(analysis),
        "keeps": _keeps(analysis),
        "regret": _regret(analysis),
        "published": _published(analysis),
        "changes": _changes(analysis),
        "failures": _failures(analysis),
    }
    return {name: to_csv(rows) for name, rows in found.items() if len(rows) > 1}


def to_csv(rows: Iterable[Sequence[Any]]) -> str:
    """Rows as CSV: numbers in full, nothing for None and NaN."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([_cell(v) for v in row] for row in rows)
    return stream.getvalue()


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        text = value.replace("\r\n", "\n").replace("\r", "\n")
        # Names and reasons are text: no spreadsheet shall run them.
        return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\n")) else text
    return repr(value) if isinstance(value, float) else value


def rank_text(rank: Rank) -> str:
    """A rank as the paper prints it: 28, or (14, 14)."""
    return str(rank) if isinstance(rank, int) else f"({', '.join(map(str, rank))})"


def _correlations(analysis: Analysis) -> list[Sequence[Any]]:
    head = (
        "stage", "truth", "choices", "keep", "metric", "tau", "std", "low", "high", "ceiling",
        "runs", "groups", "undefined", "reason", "candidates", "pairs", "tied", "resolved",
        "tau_on_resolved",
    )  # fmt: skip
    rows = [
        (
            c.stage, c.truth, c.choices, c.keep, c.metric, c.tau, c.std, c.interval.low,
            c.interval.high, c.ceiling, c.runs, c.groups, c.undefined, c.reason, c.candidates,
            c.pairs, c.tied, c.resolved, c.on_resolved,
        )
        for c in analysis.correlations
    ]  # fmt: skip
    return [head, *rows]


def _candidates(analysis: Analysis) -> list[Sequence[Any]]:
    head = (
        "layer", "number", "method", "keep", "rank", "stage", "run", "seed", "params_before",
        "params_after", "macs_before", "macs_after", *analysis.metrics, "performance_error", "low",
        "high", "seconds",
    )  # fmt: skip
    rows = [
        (
            p.trial.layer, analysis.model.numbers.get(p.trial.layer), p.trial.method, p.trial.keep,
            rank_text(p.trial.rank), p.trial.stage, p.trial.run, p.trial.seed, p.params_before,
            p.params_after, p.macs_before, p.macs_after,
            *(p.errors.get(metric) for metric in analysis.metrics), p.performance_error,
            p.interval.low, p.interval.high, p.seconds,
        )
        for p in analysis.points
    ]  # fmt: skip
    return [head, *rows]


def _ranks(analysis: Analysis) -> list[Sequence[Any]]:
    methods = tuple(dict.fromkeys(method for row in analysis.ranks for method in row.ranks))
    rows = [
        (
            row.layer,
            analysis.model.numbers.get(row.layer),
            row.keep,
            *(rank_text(row.ranks[m]) if m in row.ranks else None for m in methods),
        )
        for row in analysis.ranks
    ]
    return [("layer", "number", "keep", *methods), *rows]


def _keeps(analysis: Analysis) -> list[Sequence[Any]]:
    head = (
        "stage", "keep", "metric", "verdict", "tau", "low", "high", "ceiling", "pairs", "resolved",
        "unresolved",
    )  # fmt: skip
    rows = [
        (
            advice.stage, at.keep, at.correlation.metric, at.verdict, at.correlation.tau,
            at.correlation.interval.low, at.correlation.interval.high, at.correlation.ceiling,
            at.correlation.pairs, at.correlation.resolved, 1 - at.correlation.resolved,
        )
        for advice in analysis.advice
        for at in advice.keeps
    ]  # fmt: skip
    return [head, *rows]


def _regret(analysis: Analysis) -> list[Sequence[Any]]:
    head = (
        "stage", "saving", "candidates", "pick_layer", "pick_method", "pick_keep", "best_layer",
        "best_method", "best_keep", "pick_error", "best_error", "regret", "std", "low", "high",
    )  # fmt: skip

    def row(r: Regret) -> Sequence[Any]:
        pick = (r.pick.layer, r.pick.method, r.pick.keep)
        best = (r.best.layer, r.best.method, r.best.keep)
        errors = (r.pick_error, r.best_error, r.regret, r.std, r.interval.low, r.interval.high)
        return (r.stage, r.saving, r.candidates, *pick, *best, *errors)

    return [head, *map(row, analysis.regrets)]


def _published(analysis: Analysis) -> list[Sequence[Any]]:
    head = ("stage", "metric", "published", "published_std", "tau", "std", "low", "high", "ceiling")
    rows: list[Sequence[Any]] = []
    for both in analysis.published:
        paper, ours = both.paper, both.measured
        values = (paper.stage, paper.metric, paper.mean, paper.std)
        measured: Sequence[Any] = (None,) * 5
        if ours is not None:
            measured = (ours.tau, ours.std, ours.interval.low, ours.interval.high, ours.ceiling)
        rows.append((*values, *measured))
    return [head, *rows]


def _changes(analysis: Analysis) -> list[Sequence[Any]]:
    head = ("method", "keep", "factorized", "layer", "mean_relative_change", "log10")
    changes = analysis.changes
    rows = [
        (
            changes.method, changes.keep, cell.factorized, cell.layer, cell.change,
            math.log10(cell.change) if cell.change > 0 else None,
        )
        for cell in (changes.cells if changes else ())
        if changes is not None
    ]  # fmt: skip
    return [head, *rows]


def _failures(analysis: Analysis) -> list[Sequence[Any]]:
    head = ("layer", "method", "keep", "rank", "stage", "run", "seed", "reason")
    rows = [
        (t.layer, t.method, t.keep, rank_text(t.rank), t.stage, t.run, t.seed, failure.reason)
        for failure in analysis.failures
        for t in [failure.trial]
    ]
    return [head, *rows]
