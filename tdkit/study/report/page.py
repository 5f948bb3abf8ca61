"""The report: one HTML file that needs nothing else, the figures and the tables beside it."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tdkit.errors import StorageError, option
from tdkit.files import atomic_write
from tdkit.study.recipe import StudyRecipe
from tdkit.study.records import Phase, Results
from tdkit.study.report.analysis import analyse
from tdkit.study.report.conclusions import (
    PLANNER,
    Advice,
    Analysis,
    Choices,
    Correlation,
    KeepVerdict,
    Point,
    Regret,
)
from tdkit.study.report.figures import (
    THEME,
    Chart,
    charts,
    colours,
    figure_4_metrics,
    guide,
    inline,
    markers,
    render,
)
from tdkit.study.report.findings import (
    between,
    caveats,
    counted,
    definitions,
    findings,
    listed,
    metric_name,
    percent,
    signed,
    stage_name,
    std_or_dash,
    trial_name,
    unbroken,
    verdict_text,
)
from tdkit.study.report.html import Markup, join, table, tag
from tdkit.study.report.tables import rank_text, tables
from tdkit.version import __version__

_ASSETS = Path(__file__).parents[2] / "assets"

_MOST_ROWS = 1000
"""Of the table of candidates in the page; the CSV has all."""


def write_report(
    results: Results, recipe: StudyRecipe, folder: Path, *, analysis: Analysis | None = None
) -> Analysis:
    """Write ``report.html``, ``figures/*.png|svg`` and ``tables/*.csv``, each whole or not at all.

    Args:
        results: What was measured, finished or not.
        recipe: The recipe that it was measured by.
        folder: Where to; made if missing. An earlier report in it is replaced.
        analysis: The conclusions; drawn here when left out, with a bootstrap seeded by the recipe,
            so that the same results make the same files.

    Returns:
        The conclusions.

    Raises:
        StorageError: If the folder cannot be written to.
    """
    for path in (folder / "figures", folder / "tables"):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"the folder {path} cannot be made: {error.strerror}",
                f"name another one with {option('output')}",
            ) from error
    if analysis is None:
        analysis = analyse(results, recipe, rng=np.random.default_rng(recipe.seed))
    drawn = charts(analysis)
    files = {f"tables/{name}.csv": text.encode() for name, text in tables(analysis).items()}
    for chart in drawn:
        for suffix, content in render(chart).items():
            files[f"figures/{chart.name}.{suffix}"] = content
    # The page comes last: where it is, everything is.
    files["report.html"] = page(analysis, drawn, results).encode()
    for name, content in files.items():
        with atomic_write(folder / name, force=True) as temporary:
            temporary.write_bytes(content)
    return analysis


def page(analysis: Analysis, drawn: Sequence[Chart], results: Results) -> str:
    """The report as HTML: no network, no fonts, and one script that its own policy names."""
    script = (_ASSETS / "report.js").read_text(encoding="utf-8")
    style = (_ASSETS / "report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", f"{analysis.title} – tdkit validate"),
        tag("style", Markup(style)),
    )
    body = tag(
        "body",
        _header(analysis),
        tag("main", *_sections(analysis, drawn, results)),
        tag("footer", tag("p", f"Written by tdkit {__version__}.")),
        _data(analysis),
        tag("script", Markup(script)),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _header(analysis: Analysis) -> Markup:
    model = analysis.model
    accuracy = f"{percent(model.accuracy)} % ({percent(model.interval.low)} to "
    accuracy += f"{percent(model.interval.high)})"
    facts = [
        counted(len(analysis.layers), "layer"),
        counted(len(analysis.methods), "method"),
        counted(len(analysis.keeps), "keep"),
        counted(max(analysis.runs.values(), default=0), "run"),
        f"{model.images:,} images",
        f"{model.params:,} parameters",
        f"accuracy of the dense model {accuracy}" if model.labelled else "no labels",
    ]
    sentences = [
        join([tag("dt", heading), tag("dd", sentence)]) for heading, sentence in findings(analysis)
    ]
    return tag(
        "header",
        tag("p", "How far can the approximation error be trusted?", class_="kicker"),
        tag("h1", analysis.title),
        tag("p", unbroken(" · ".join(facts)), class_="facts"),
        tag(
            "section",
            tag("h2", "In short", id="in-short"),
            tag("dl", *sentences),
            class_="brief",
            aria_labelledby="in-short",
        ),
        _caveats(analysis),
    )


def _caveats(analysis: Analysis) -> Markup | None:
    found = caveats(analysis)
    if not found:
        return None
    items = [tag("li", text) for text in found]
    return tag("div", tag("ul", *items), class_="caveats", role="note", aria_label="Caveats")


def _sections(analysis: Analysis, drawn: Sequence[Chart], results: Results) -> list[Markup]:
    by_name = {chart.name: chart for chart in drawn}
    sections: list[Markup | None] = []
    if analysis.stages:
        sections += [
            _trust(analysis),
            _figure_1(analysis, by_name["figure-1-tau-by-keep"]),
            _figure_2(analysis, by_name["figure-2-tau-by-error"]),
            _figure_3(analysis, by_name["figure-3-tau-by-choice"]),
            _figure_4(analysis),
            _figure_5(analysis, by_name.get("figure-5-change-by-layer")),
            _planner(analysis, by_name.get("figure-6-regret")),
        ]
    sections += [_ranks(analysis), _failures(analysis), _words(analysis)]
    sections += [_all_candidates(analysis), _origin(analysis, results)]
    return [section for section in sections if section is not None]


def _trust(analysis: Analysis) -> Markup:
    parts = [_trust_table(advice) for advice in analysis.advice]
    return tag("section", tag("h2", "From which compression on"), *parts)


def _trust_table(advice: Advice) -> Markup:
    def row(at: KeepVerdict) -> list[str]:
        c = at.correlation
        return [
            f"{at.keep:g}",
            tag("span", verdict_text(at), class_=f"verdict {at.verdict.replace(' ', '-')}"),
            signed(c.tau),
            between(c),
            signed(c.ceiling),
            f"{100 * c.resolved:.0f} %",
            signed(c.on_resolved),
        ]

    name = advice.metric or advice.best
    caption = f"{stage_name(advice.stage)}: τ over layers and methods at each keep"
    caption += f", by {metric_name(name)}" if name else ""
    head = ("keep", "verdict", "τ", "95 % interval", "ceiling", "pairs resolved", "τ on these")
    return table(caption, head, [row(at) for at in advice.keeps], words=("verdict",))


def _figure_1(analysis: Analysis, chart: Chart) -> Markup:
    name = metric_name(guide(analysis))
    caption = (
        f"Figure 1. τ of {name} over layers and methods, by keep. The paper finds that more "
        "compression gives a larger τ. Read each bar against its ceiling: where the ceiling "
        "itself is low the images cannot tell the candidates apart."
    )
    found = [
        c
        for stage in analysis.stages
        for keep in analysis.keeps
        if (c := analysis.correlation(stage, "keep", guide(analysis), keep))
    ]
    return _figure("τ by compression", caption, chart, 1, _numbers(found, analysis))


def _figure_2(analysis: Analysis, chart: Chart) -> Markup:
    focus = listed([f"{keep:g}" for keep in analysis.focus])
    caption = (
        f"Figure 2. τ of each approximation error over all choices of layer, method and keep "
        f"({focus})."
    )
    if analysis.published:
        caption += " Diamonds are the paper's values, mean ± standard deviation over its runs."
    found = _found(analysis, "all", analysis.metrics)
    extra = _published(analysis)
    return _figure("τ by approximation error", caption, chart, 2, _numbers(found, analysis), extra)


def _figure_3(analysis: Analysis, chart: Chart) -> Markup:
    caption = (
        f"Figure 3. τ of {metric_name(guide(analysis))} over all choices, over layers only (method "
        "and keep fixed, averaged over both) and over methods only (layer and keep fixed, averaged "
        "over both)."
    )
    if max(analysis.runs.values()) > 1:
        caption += " Standard deviations are over runs only, as in the paper."
    kinds: tuple[Choices, ...] = ("all", "layers", "methods")
    found = [
        c
        for stage in analysis.stages
        for kind in kinds
        if (c := analysis.correlation(stage, kind, guide(analysis)))
    ]
    return _figure("Layers or methods?", caption, chart, 3, _numbers(found, analysis))


def _found(analysis: Analysis, choices: Choices, metrics: Iterable[str]) -> list[Correlation]:
    every = [
        analysis.correlation(stage, choices, metric)
        for stage in analysis.stages
        for metric in metrics
    ]
    return [c for c in every if c is not None]


def _figure(title: str, caption: str, chart: Chart, number: int, *more: Markup | None) -> Markup:
    panels = [
        tag(
            "div",
            tag("h3", panel.title),
            tag(
                "div",
                Markup(inline(chart, panel, f"f{number}p{place}")),
                role="img",
                aria_label=panel.alt,
            ),
            class_="panel",
        )
        for place, panel in enumerate(chart.panels, start=1)
    ]
    return tag(
        "section",
        tag("h2", title),
        tag(
            "figure",
            tag("figcaption", tag("p", unbroken(caption))),
            _legend(chart),
            tag("div", *panels, class_="panels"),
            id=f"figure-{number}",
        ),
        *more,
    )


_SWATCHES = {
    "mean τ": '<rect width="22" height="12" y="2" fill="var(--bar)"/>',
    "τ": '<rect width="22" height="12" y="2" fill="var(--bar)"/>',
    "± std over runs": '<path d="M0,8H22" stroke="var(--ink)" stroke-width="5"/>',
    "95 % interval": '<path d="M0.5,4V12M0.5,8H21.5M21.5,4V12" stroke="var(--ink)" fill="none"/>',
    "ceiling": '<path d="M11,0V16" stroke="var(--ceiling)" stroke-width="2.5"/>',
    "published": '<path d="M0,8H22M11,3L16,8L11,13L6,8Z" stroke="var(--paper)" '
    'stroke-width="1.5" fill="none"/>',
    "planner's pick": '<path d="M0,8H22" stroke="var(--layer-1)" stroke-width="2.5"/>',
    "best candidate": '<path d="M0,8H22" stroke="var(--layer-0)" stroke-width="2.5" '
    'stroke-dasharray="5 3"/>',
}


def _swatch(inside: str) -> Markup:
    return Markup(f'<svg viewBox="0 0 22 16" aria-hidden="true">{inside}</svg>')


def _legend(chart: Chart) -> Markup | None:
    items = [
        tag("li", _swatch(_SWATCHES[label]), tag("span", label))
        for label, _ in chart.legend
        if label in _SWATCHES
    ]
    return tag("ul", *items, class_="legend") if items else None


def _numbers(found: Sequence[Correlation], analysis: Analysis) -> Markup:
    """The numbers of a figure, for those who want or need them as text."""

    def row(c: Correlation) -> list[str]:
        what = f"keep {c.keep:g}" if c.keep is not None else c.choices
        return [
            f"{stage_name(c.stage)}, {what}, {metric_name(c.metric)}",
            signed(c.tau, 3) if c.reason is None or not math.isnan(c.tau) else c.reason,
            std_or_dash(c),
            between(c, 3),
            signed(c.ceiling, 3),
            f"{100 * c.resolved:.1f} %",
            f"{100 * c.tied:.1f} %",
            f"{c.pairs:,}",
            str(c.undefined),
        ]

    head = ("τ of", "τ", "std", "95 % interval", "ceiling", "pairs resolved", "ties", "pairs")
    rows = [row(c) for c in found]
    inner = table("Kendall's tau-a", (*head, "undefined"), rows)
    return tag("details", tag("summary", "Numbers of this figure"), inner)


def _published(analysis: Analysis) -> Markup | None:
    if not analysis.published:
        return None
    rows = []
    for both in analysis.published:
        paper, ours = both.paper, both.measured
        name = f"{metric_name(paper.metric)}, {paper.stage}"
        beside = [f"{signed(paper.mean, 3)} ± {paper.std:.3f}"]
        if ours is None:
            rows.append([name, *beside, "not measured", "–", "–", "–"])
            continue
        std = f" ± {ours.std:.3f}" if ours.std is not None else ""
        measured = [signed(ours.tau, 3) + std, between(ours, 3), signed(ours.ceiling, 3)]
        rows.append([name, *beside, *measured, signed(ours.tau - paper.mean, 3)])
    head = ("error and stage", "published", "measured", "95 % interval", "ceiling", "difference")
    return table("Published beside measured: τ over all choices", head, rows)


def _figure_4(analysis: Analysis) -> Markup:
    caption = (
        "Figure 4. Approximation errors against the performance error; colours are layers, shapes "
        "are methods. Point at a candidate, or step through them with the arrow keys, to see what "
        "it is; the vertical line is the 95 % interval of its performance error."
    )
    if max(analysis.runs.values()) > 1:
        caption += " Every run is a point."
    first = list(figure_4_metrics(analysis))
    second = first[1] if len(first) > 1 else first[0]
    controls = [
        _select("left", "Left error", _metric_options(analysis, first[0])),
        _select("right", "Right error", _metric_options(analysis, second)),
        _select("keeps", "Keeps", _keep_options(analysis)),
    ]
    if len(analysis.stages) > 1:
        names = [(stage, stage_name(stage), False) for stage in analysis.stages]
        controls.append(_select("stage", "Stage", names))
    check = tag("input", type="checkbox", name="log")
    controls.append(tag("label", check, "logarithmic axes", class_="check"))
    panels = [tag("div", class_="panel", data_select=side) for side in ("left", "right")]
    missing = tag(
        "noscript",
        tag("p", "This figure needs JavaScript. Its numbers are in the table of all candidates."),
    )
    return tag(
        "section",
        tag("h2", "Error against performance error"),
        tag(
            "figure",
            tag("figcaption", tag("p", unbroken(caption))),
            missing,
            tag(
                "div",
                tag("div", *controls, class_="controls"),
                _scatter_legend(analysis),
                tag("div", *panels, class_="panels"),
                id="scatters",
            ),
            id="figure-4",
        ),
    )


_Option = tuple[str, str, bool]


def _select(name: str, label: str, entries: Iterable[_Option]) -> Markup:
    inner = [tag("option", text, value=value, selected=on) for value, text, on in entries]
    return tag("label", label, tag("select", *inner, name=name))


def _metric_options(analysis: Analysis, chosen: str) -> list[_Option]:
    return [(str(i), metric_name(m), m == chosen) for i, m in enumerate(analysis.metrics)]


def _keep_options(analysis: Analysis) -> list[_Option]:
    focus = ", ".join(f"{keep:g}" for keep in analysis.focus)
    if analysis.focus == analysis.keeps:
        return [("all", focus, True)]
    return [("focus", focus, True), ("all", "all", False)]


_SHAPES = {
    "o": "M4,8a4,4 0 1,0 8,0a4,4 0 1,0 -8,0Z",
    "s": "M4,4H12V12H4Z",
    "D": "M8,3L13,8L8,13L3,8Z",
    "^": "M8,3L13,12H3Z",
    "v": "M8,13L13,4H3Z",
    "P": "M6.5,3H9.5V6.5H13V9.5H9.5V13H6.5V9.5H3V6.5H6.5Z",
    "X": "M4,6L6,4L8,6L10,4L12,6L10,8L12,10L10,12L8,10L6,12L4,10L6,8Z",
    "*": "M8,2L9.5,6.3L14,6.4L10.4,9L11.7,13.4L8,10.8L4.3,13.4L5.6,9L2,6.4L6.5,6.3Z",
}


def _scatter_legend(analysis: Analysis) -> Markup:
    numbers = analysis.model.numbers
    layers = [
        tag(
            "li",
            _swatch(f'<circle cx="11" cy="8" r="6" fill="{_themed(colour)}"/>'),
            tag("span", f"{layer} (nr. {numbers[layer]})" if layer in numbers else layer),
        )
        for layer, colour in colours(analysis).items()
    ]
    methods = [
        tag(
            "li",
            _swatch(
                f'<path d="{_SHAPES[shape]}" transform="translate(3 0)" fill="none" '
                'stroke="var(--ink)" stroke-width="1.4"/>'
            ),
            tag("span", method),
        )
        for method, shape in markers(analysis).items()
    ]
    return join(
        [
            tag("ul", *layers, class_="legend", aria_label="Colours of layers"),
            tag("ul", *methods, class_="legend", aria_label="Shapes of methods"),
        ]
    )


def _themed(colour: str) -> str:
    return THEME.get(colour, colour)


def _data(analysis: Analysis) -> Markup:
    """What Figure 4 is drawn from, as JSON that no text in it can break out of."""
    value = {
        "metrics": [metric_name(metric) for metric in analysis.metrics],
        "layers": analysis.layers,
        "colours": [_themed(colour) for colour in colours(analysis).values()],
        "methods": analysis.methods,
        "markers": list(markers(analysis).values()),
        "keeps": analysis.keeps,
        "focus": analysis.focus,
        "stages": analysis.stages,
        "runs": analysis.runs,
        "tau": {stage: _taus(analysis, stage) for stage in analysis.stages},
        "points": [_json_point(analysis, point) for point in analysis.points],
    }
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return tag("script", Markup(text), type="application/json", id="candidates")


def _taus(analysis: Analysis, stage: Phase) -> list[str | None]:
    found = [analysis.correlation(stage, "all", metric) for metric in analysis.metrics]
    return [signed(c.tau) if c is not None and not math.isnan(c.tau) else None for c in found]


def _json_point(analysis: Analysis, point: Point) -> dict[str, Any]:
    trial = point.trial
    errors = [point.errors.get(metric, math.nan) for metric in analysis.metrics]
    return {
        "layer": analysis.layers.index(trial.layer),
        "method": analysis.methods.index(trial.method),
        "keep": trial.keep,
        "rank": rank_text(trial.rank),
        "run": trial.run,
        "stage": trial.stage,
        "saved": point.params_before - point.params_after,
        "errors": [float(f"{e:.6g}") if math.isfinite(e) else None for e in errors],
        "error": point.performance_error,
        "low": point.interval.low,
        "high": point.interval.high,
    }


def _figure_5(analysis: Analysis, chart: Chart | None) -> Markup | None:
    changes = analysis.changes
    if chart is None or changes is None:
        return None
    caption = (
        "Figure 5. Which layers fine-tuning changes: the base-10 logarithm of the mean relative "
        f"difference of a layer's norm, for {changes.method} at keep {changes.keep:g}. A row is "
        "the layer that was factorized, its own cell is framed; brighter is more."
    )
    rows = [
        [
            cell.factorized,
            cell.layer,
            f"{cell.change:.3g}",
            signed(math.log10(cell.change)) if cell.change > 0 else "no change",
        ]
        for cell in changes.cells
    ]
    numbers = table(
        "Mean relative change",
        ("factorized layer", "layer", "change", "log10"),
        rows,
        words=("layer",),
    )
    more = tag("details", tag("summary", "Numbers of this figure"), numbers)
    return _figure("What fine-tuning changes", caption, chart, 5, more)


def _planner(analysis: Analysis, chart: Chart | None) -> Markup | None:
    if chart is None:
        return None
    caption = (
        "Figure 6. Performance error of the candidate that the planner's rule picks, and of the "
        "best one, among all that save at least so many parameters by factorizing one layer. The "
        "area between them is the regret."
    )
    return _figure(
        "The planner against the truth",
        caption,
        chart,
        6,
        _planner_table(analysis, "all"),
        tag("details", tag("summary", "At each keep"), _planner_table(analysis, "keep")),
        *(_regret_table(analysis, stage) for stage in analysis.stages),
    )


def _planner_table(analysis: Analysis, choices: Choices) -> Markup:
    def row(c: Correlation) -> list[str]:
        what = "all choices" if c.keep is None else f"keep {c.keep:g}"
        truth = {"error": "performance error", "loss per parameter": "loss per parameter saved"}
        return [
            f"{stage_name(c.stage)}, {what}",
            truth[c.truth],
            signed(c.tau, 3),
            std_or_dash(c),
            between(c, 3),
            signed(c.ceiling, 3),
        ]

    found = [c for c in analysis.correlations if c.metric == PLANNER and c.choices == choices]
    name = metric_name(analysis.metrics[0])
    return table(
        f"τ of the planner's ranking, squared {name} error per parameter saved",
        ("among", "against", "τ", "std", "95 % interval", "ceiling"),
        [row(c) for c in found],
        words=("against",),
    )


def _regret_table(analysis: Analysis, stage: Phase) -> Markup:
    regrets = [regret for regret in analysis.regrets if regret.stage == stage]

    def row(r: Regret) -> list[str]:
        share = 100 * r.saving / analysis.model.params
        return [
            f"{r.saving:,} ({share:.1f} %)",
            str(r.candidates),
            trial_name(r.pick),
            trial_name(r.best),
            percent(r.regret),
            "–" if r.std is None else percent(r.std),
            f"{percent(r.interval.low)} to {percent(r.interval.high)}",
        ]

    head = ("save at least", "candidates", "pick", "best", "regret", "std", "95 % interval")
    caption = f"{stage_name(stage)}: regret in points, by size"
    if max(analysis.runs.values()) > 1:
        caption += "; candidates are those of the first run, numbers are means over runs"
    inner = table(caption, head, [row(r) for r in regrets], words=("pick", "best"))
    return tag("details", tag("summary", f"Every size, {stage_name(stage).lower()}"), inner)


def _ranks(analysis: Analysis) -> Markup | None:
    if not analysis.ranks:
        return None
    methods = tuple(dict.fromkeys(method for row in analysis.ranks for method in row.ranks))
    numbers = analysis.model.numbers
    rows = [
        [
            f"{row.layer} (nr. {numbers[row.layer]})" if row.layer in numbers else row.layer,
            f"{100 * row.keep:g}",
            *(rank_text(row.ranks[m]) if m in row.ranks else "–" for m in methods),
        ]
        for row in analysis.ranks
    ]
    caption = (
        "The paper's Tables 2 and 3 as computed here. Their column “Compression (%)” is the keep. "
        "Tucker ranks are those of the output and input channels, tensor-train ranks the inner "
        "ones; the paper also prints the kernel's ranks and the ones at the ends."
    )
    inner = table("Rank by layer, keep and method", ("layer", "keep (%)", *methods), rows)
    return tag("section", tag("h2", "Ranks"), tag("p", caption), inner)


def _failures(analysis: Analysis) -> Markup | None:
    if not analysis.failures:
        return None
    rows = [
        [
            f"{trial_name(f.trial)} · run {f.trial.run + 1}",
            rank_text(f.trial.rank),
            f.trial.stage,
            f.reason,
        ]
        for f in analysis.failures
    ]
    head = ("trial", "rank", "stage", "reason")
    inner = table("Trials without a result", head, rows, words=head)
    return tag("section", tag("h2", "What failed"), inner)


def _words(analysis: Analysis) -> Markup:
    entries = [
        join([tag("dt", term), tag("dd", unbroken(text))]) for term, text in definitions(analysis)
    ]
    return tag(
        "section", tag("h2", "How to read this, and how it was computed"), tag("dl", *entries)
    )


def _all_candidates(analysis: Analysis) -> Markup | None:
    if not analysis.points:
        return None

    def row(p: Point) -> list[str]:
        errors = [f"{p.errors[m]:.4g}" if m in p.errors else "–" for m in analysis.metrics]
        return [
            trial_name(p.trial),
            rank_text(p.trial.rank),
            p.trial.stage,
            str(p.trial.run + 1),
            f"{p.params_after:,}",
            *errors,
            percent(p.performance_error),
            f"{percent(p.interval.low)} to {percent(p.interval.high)}",
        ]

    names = [metric_name(metric) for metric in analysis.metrics]
    head = ("candidate", "rank", "stage", "run", "parameters", *names)
    shown = analysis.points[:_MOST_ROWS]
    title = f"All {len(analysis.points):,} measured candidates"
    if len(shown) < len(analysis.points):
        title = f"The first {len(shown):,} of {len(analysis.points):,} measured candidates"
    inner = table(
        title,
        (*head, "performance error (%)", "95 % interval"),
        [row(p) for p in shown],
        words=("rank", "stage"),
    )
    return tag(
        "section",
        tag("h2", "Every measurement"),
        tag("p", "In full, with MACs and seeds, in tables/candidates.csv beside this file."),
        tag("details", tag("summary", title), inner),
    )


def _origin(analysis: Analysis, results: Results) -> Markup:
    notes = [tag("li", note) for note in analysis.notes]
    identity = json.dumps(results.identity, indent=2, ensure_ascii=False, default=str)
    return tag(
        "section",
        tag("h2", "Where it comes from"),
        tag("ul", *notes) if notes else None,
        tag("p", f"{analysis.finished:,} of {analysis.planned:,} trials are done."),
        tag("details", tag("summary", "The recipe"), tag("pre", results.recipe, tabindex=0)),
        tag(
            "details",
            tag("summary", "What the measurements depend on: model, data, versions"),
            tag("pre", identity, tabindex=0),
        ),
        tag(
            "p",
            "The study follows Schuurmans, Batselier and Kooij, “How informative is the "
            "approximation error from tensor decomposition for neural network compression?” "
            "(ICLR 2023).",
        ),
    )
