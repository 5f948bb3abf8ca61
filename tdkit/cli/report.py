"""``tdkit report``: draw the conclusions of a study again, and print them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from tdkit.study.report.conclusions import Advice, Analysis


def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run folder of tdkit validate, finished or not.")
    ],
    output: Annotated[
        Optional[Path],  # noqa: UP045 - typer reads the annotation at run time on 3.10
        typer.Option(
            "--output", "-o", metavar="DIR", help="Where the report goes; the run folder if unset."
        ),
    ] = None,
) -> None:
    """Render the report of a study again, without measuring anything.

    Example: `tdkit report runs/quick -o report/`
    """
    import tdkit
    from tdkit.cli.display import say, waiting

    with waiting("drawing conclusions"):
        study = tdkit.report(run, output=output)
    print_summary(study.analysis)
    say(f"\nwrote {study.report}")


def print_summary(analysis: Analysis) -> None:
    """Print what the report says first: the advice, tau by error, and the verdict on each keep."""
    from tdkit.cli.display import say, show, stdout
    from tdkit.study.report.findings import caveats, findings

    console = stdout()
    console.print(f"{analysis.title}\n")
    for advice in analysis.advice:
        show(_errors(analysis, advice))
        say("")
        show(_keeps(advice))
        say("")
    for heading, sentence in findings(analysis):
        console.print(f"{heading}: {sentence}")
    for caveat in caveats(analysis):
        console.print(f"Note: {caveat}")


def _errors(analysis: Analysis, advice: Advice) -> Table:
    """Figure 2 as a table."""
    from tdkit.cli.display import table
    from tdkit.study.report.findings import between, metric_name, signed, stage_name, std_or_dash

    published = {
        both.paper.metric: both.paper
        for both in analysis.published
        if both.paper.stage == advice.stage
    }
    columns = ["error", "τ", "std", "95 % interval", "ceiling"]
    columns += ["published"] if published else []
    keeps = ", ".join(f"{keep:g}" for keep in analysis.focus)
    title = f"{stage_name(advice.stage)}: Kendall's τ-a over all choices at keep {keeps}"
    view = table(title, *columns, right=columns[1:])
    for metric in analysis.metrics:
        found = analysis.correlation(advice.stage, "all", metric)
        if found is None:
            continue
        cells = [metric_name(metric), signed(found.tau, 3), std_or_dash(found)]
        cells += [between(found, 3), signed(found.ceiling, 3)]
        if published:
            paper = published.get(metric)
            cells.append(f"{signed(paper.mean, 3)} ± {paper.std:.3f}" if paper else "–")
        view.add_row(*cells)
    return view


def _keeps(advice: Advice) -> Table:
    """Figure 1 as a table, with the verdicts."""
    from tdkit.cli.display import table
    from tdkit.study.report.findings import between, metric_name, signed, stage_name, verdict_text

    name = advice.metric or advice.best
    title = f"{stage_name(advice.stage)}: the same at each keep"
    title += f", by {metric_name(name)}" if name else ""
    columns = ("keep", "τ", "95 % interval", "ceiling", "pairs resolved", "verdict")
    view = table(title, *columns, right=columns[:-1])
    for at in advice.keeps:
        c = at.correlation
        view.add_row(
            f"{at.keep:g}",
            signed(c.tau, 3),
            between(c, 3),
            signed(c.ceiling, 3),
            f"{100 * c.resolved:.0f} %",
            verdict_text(at),
        )
    return view
