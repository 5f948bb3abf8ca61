"""An analysis on one screen: Figures 1 and 2 of the report as tables, and the findings."""

from __future__ import annotations

from tdkit.study.report.conclusions import Advice, Analysis
from tdkit.study.report.findings import (
    between,
    caveats,
    findings,
    metric_name,
    signed,
    stage_name,
    std_or_dash,
    verdict_text,
)
from tdkit.tables import Table


def summary_tables(analysis: Analysis) -> tuple[tuple[str, Table], ...]:
    """For each stage τ by error and the verdict on each keep, as (title, table)."""
    return tuple(
        titled
        for advice in analysis.advice
        for titled in (_errors(analysis, advice), _keeps(advice))
    )


def summary_sentences(analysis: Analysis) -> tuple[str, ...]:
    """The findings, and what limits them."""
    found = (f"{heading}: {sentence}" for heading, sentence in findings(analysis))
    return (*found, *(f"Note: {caveat}" for caveat in caveats(analysis)))


def _errors(analysis: Analysis, advice: Advice) -> tuple[str, Table]:
    """Figure 2 as a table."""
    published = {
        both.paper.metric: both.paper
        for both in analysis.published
        if both.paper.stage == advice.stage
    }
    columns = ["error", "τ", "std", "95 % interval", "ceiling"]
    columns += ["published"] if published else []
    keeps = ", ".join(f"{keep:g}" for keep in analysis.focus)
    title = f"{stage_name(advice.stage)}: Kendall's τ-a over all choices at keep {keeps}"
    rows = []
    for metric in analysis.metrics:
        found = analysis.correlation(advice.stage, "all", metric)
        if found is None:
            continue
        cells = [metric_name(metric), signed(found.tau, 3), std_or_dash(found)]
        cells += [between(found, 3), signed(found.ceiling, 3)]
        if published:
            paper = published.get(metric)
            cells.append(f"{signed(paper.mean, 3)} ± {paper.std:.3f}" if paper else "–")
        rows.append(tuple(cells))
    return title, Table(tuple(columns), tuple(rows), frozenset(columns[1:]))


def _keeps(advice: Advice) -> tuple[str, Table]:
    """Figure 1 as a table, with the verdicts."""
    name = advice.metric or advice.best
    title = f"{stage_name(advice.stage)}: the same at each keep"
    title += f", by {metric_name(name)}" if name else ""
    columns = ("keep", "τ", "95 % interval", "ceiling", "pairs resolved", "verdict")
    rows = []
    for at in advice.keeps:
        c = at.correlation
        resolved = f"{100 * c.resolved:.0f} %"
        taus = (signed(c.tau, 3), between(c, 3), signed(c.ceiling, 3))
        rows.append((f"{at.keep:g}", *taus, resolved, verdict_text(at)))
    return title, Table(columns, tuple(rows), frozenset(columns[:-1]))
