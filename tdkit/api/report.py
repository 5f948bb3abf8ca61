"""``tdkit.report``: the conclusions of a study."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tdkit.study.recipe import StudyRecipe
    from tdkit.study.records import Results
    from tdkit.study.report.conclusions import Analysis
    from tdkit.tables import Table


@dataclass(frozen=True, eq=False)
class Study:
    """What was measured, and what it says.

    Attributes:
        results: Every measurement.
        analysis: The conclusions.
        recipe: The study that was measured.
        folder: Where the measurements are kept; None where they are not.
        report: The page; None where none was written.
    """

    results: Results
    analysis: Analysis
    recipe: StudyRecipe
    folder: Path | None
    report: Path | None

    def __str__(self) -> str:
        """What ``tdkit validate`` prints."""
        tables = (f"{title}\n{table}\n" for title, table in self.tables())
        return "\n".join([self.analysis.title, "", *tables, *self.sentences()])

    def _repr_html_(self) -> str:
        tables = (f"<p>{escape(title)}</p>{t._repr_html_()}" for title, t in self.tables())
        sentences = (f"<p>{escape(sentence)}</p>" for sentence in self.sentences())
        return "".join([f"<h3>{escape(self.analysis.title)}</h3>", *tables, *sentences])

    def tables(self) -> tuple[tuple[str, Table], ...]:
        """For each stage τ by error and the verdict on each keep, as (title, table)."""
        from tdkit.study.report.summary import summary_tables

        return summary_tables(self.analysis)

    def sentences(self) -> tuple[str, ...]:
        """The findings, and what limits them."""
        from tdkit.study.report.summary import summary_sentences

        return summary_sentences(self.analysis)

    @property
    def failed(self) -> int:
        """How many trials have no result."""
        return sum(m.failure is not None for m in self.results.measurements)

    def to_json(self) -> dict[str, Any]:
        """Everything that was concluded, as JSON values."""
        return {
            "run": None if self.folder is None else str(self.folder),
            "report": None if self.report is None else str(self.report),
            "planned": self.results.planned,
            "measured": len(self.results.measurements),
            "failed": self.failed,
            "analysis": _plain(self.analysis),
        }


def report(run: str | Path, *, output: str | Path | None = None) -> Study:
    """Render the report of a study again, without measuring anything.

    Args:
        run: A run folder of :func:`validate`, finished or not.
        output: Where the report goes; the run folder if None.

    Raises:
        UsageError: If it is no run folder.
        UnreadableFileError: If its files are damaged.
        StorageError: If the report cannot be written.
    """
    from tdkit.recipes import parse_recipe
    from tdkit.study.recipe import StudyRecipe
    from tdkit.study.store import read_results

    folder = Path(run)
    results = read_results(folder)
    recipe = parse_recipe(results.recipe, StudyRecipe, f"the recipe in {folder}")
    return conclude(results, recipe, folder if output is None else Path(output), write=True)


def conclude(results: Results, recipe: StudyRecipe, folder: Path | None, *, write: bool) -> Study:
    """Draw the conclusions, and write the report where that is asked for.

    Args:
        results: What was measured.
        recipe: The study.
        folder: Where measurements and report are.
        write: Whether to write the report.

    Raises:
        StorageError: If the report cannot be written.
    """
    import numpy as np

    from tdkit.study.report.analysis import analyse
    from tdkit.study.report.page import write_report

    if write and folder is not None:
        return Study(
            results, write_report(results, recipe, folder), recipe, folder, folder / "report.html"
        )
    analysis = analyse(results, recipe, rng=np.random.default_rng(recipe.seed))
    return Study(results, analysis, recipe, folder, None)


def _plain(value: Any) -> Any:
    """Records as JSON values; what is no number, such as an undefined tau, is null."""
    if is_dataclass(value):
        return {entry.name: _plain(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
