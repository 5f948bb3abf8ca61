"""The figures of the paper, drawn from an analysis: for print (PNG, SVG) and for the page.

matplotlib without pyplot: a figure is an object, nothing is global, and the same analysis gives the
same bytes. A figure is a row of panels; the page takes them one by one, so that they read on a
narrow screen too.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib
import matplotlib.colors
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from tdkit.study.report.conclusions import Analysis, Changes, Correlation, Regret
from tdkit.study.report.findings import metric_name, percent, signed, stage_name
from tdkit.study.report.html import css

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from tdkit.study.records import Phase

# Okabe and Ito's palette, which people with any kind of colour vision can tell apart, without its
# yellow, which is hard to see on white. More layers than that get a sequence of lightness.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5f6a72")
MARKERS = "osD^vPX*"

INK, MUTED, GRID, BAR, CEILING = "#1f2328", "#59636e", "#d1d9e0", "#8fc1de", "#b3540a"
PAPER = "#9a3d86"

THEME = {
    INK: css("ink"),
    MUTED: css("muted"),
    GRID: css("grid"),
    BAR: css("bar"),
    CEILING: css("ceiling"),
    PAPER: css("paper"),
    **{colour: css(f"layer-{i}") for i, colour in enumerate(PALETTE)},
}
"""Colours of the figures, by the variable of the style sheet that replaces each in the page."""

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "none",
    "text.parse_math": False,
    "figure.constrained_layout.use": True,
}

_MOST_NUMBERS = 9  # columns of Figure 5 that leave room for numbers; else there is a scale
_MOST_NAMES = 24  # columns whose names can be read

_WIDTH = 3.5  # inches of a panel: about as wide as a phone, and half a printed page


@dataclass(frozen=True)
class Panel:
    """A part of a figure that can stand alone.

    Attributes:
        title: What it shows.
        alt: The same in words, with the numbers, for those who cannot see it.
        draw: Draws it.
        height: In inches.
    """

    title: str
    alt: str
    draw: Callable[[Axes], None]
    height: float


@dataclass(frozen=True)
class Chart:
    """A figure.

    Attributes:
        name: Of its files.
        panels: Side by side in print.
        legend: What the marks mean: handles with labels.
    """

    name: str
    panels: tuple[Panel, ...]
    legend: tuple[tuple[str, Callable[[], Any]], ...] = ()


def charts(analysis: Analysis) -> tuple[Chart, ...]:
    """All figures that the measurements allow, in the order of the report."""
    found = [
        figure_1(analysis),
        figure_2(analysis),
        figure_3(analysis),
        *(figure_4(analysis, metric) for metric in figure_4_metrics(analysis)),
        figure_5(analysis),
        regret_figure(analysis),
    ]
    return tuple(chart for chart in found if chart.panels)


def guide(analysis: Analysis) -> str:
    """The error of Figures 1 and 3: relative weights as in the paper, else the recipe's first."""
    preferred = "relative-weights"
    return preferred if preferred in analysis.metrics else analysis.metrics[0]


def figure_4_metrics(analysis: Analysis) -> tuple[str, ...]:
    """The paper's two errors of Figure 4, where they were measured, else the first two."""
    paper = tuple(m for m in ("relative-weights", "absolute-weights") if m in analysis.metrics)
    return paper or analysis.metrics[:2]


def figure_1(analysis: Analysis) -> Chart:
    """Tau over layers and methods, by keep."""
    metric = guide(analysis)

    def panel(stage: Phase) -> Panel:
        rows = [
            _Row(f"keep {keep:g}", found)
            for keep in analysis.keeps
            if (found := analysis.correlation(stage, "keep", metric, keep)) is not None
        ]
        return _forest(analysis, stage, rows)

    return Chart("figure-1-tau-by-keep", _per_stage(analysis, panel), _legend(analysis))


def figure_2(analysis: Analysis) -> Chart:
    """Tau of every error over all choices."""
    published = {(p.paper.stage, p.paper.metric): p.paper for p in analysis.published}

    def panel(stage: Phase) -> Panel:
        rows = []
        for metric in analysis.metrics:
            found = analysis.correlation(stage, "all", metric)
            if found is not None:
                paper = published.get((stage, metric))
                beside = (paper.mean, paper.std) if paper else None
                rows.append(_Row(metric_name(metric), found, beside))
        return _forest(analysis, stage, rows)

    legend = _legend(analysis, published=bool(published))
    return Chart("figure-2-tau-by-error", _per_stage(analysis, panel), legend)


def figure_3(analysis: Analysis) -> Chart:
    """Tau over all choices, over layers only and over methods only."""
    metric = guide(analysis)
    names = {"all": "all choices", "layers": "layers only", "methods": "methods only"}

    def panel(stage: Phase) -> Panel:
        rows = [
            _Row(name, found)
            for choices, name in names.items()
            if (found := analysis.correlation(stage, choices, metric)) is not None  # type: ignore[arg-type]
        ]
        return _forest(analysis, stage, rows)

    return Chart("figure-3-tau-by-choice", _per_stage(analysis, panel), _legend(analysis))


def _per_stage(analysis: Analysis, panel: Callable[[Phase], Panel]) -> tuple[Panel, ...]:
    return tuple(panel(stage) for stage in analysis.stages)


@dataclass(frozen=True)
class _Row:
    label: str
    correlation: Correlation
    published: tuple[float, float] | None = None


def _forest(analysis: Analysis, stage: Phase, rows: Sequence[_Row]) -> Panel:
    """Bars of tau with intervals, ceilings and published values, and the numbers beside them."""

    def draw(axes: Axes) -> None:
        low = min([0.0, *(b for row in rows for b in _extent(row))])
        axes.set_xlim(max(-1.0, math.floor(low * 5 - 0.2) / 5) if low < 0 else 0.0, 1.0)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.set_xlabel("Kendall's τ-a")
        for place, row in enumerate(rows):
            _draw_row(axes, place, row)

    title = stage_name(stage)
    alt = f"{title}. " + ". ".join(_spoken(row) for row in rows)
    # Room for the second line that a published value takes.
    high = 0.42 if any(row.published for row in rows) else 0.36
    return Panel(title, alt, draw, 0.75 + high * len(rows))


def _extent(row: _Row) -> list[float]:
    c = row.correlation
    values = [c.tau, c.interval.low, c.tau - (c.std or 0)]
    values += [row.published[0] - row.published[1]] if row.published else []
    return [value for value in values if not math.isnan(value)]


def _draw_row(axes: Axes, place: int, row: _Row) -> None:
    c = row.correlation
    beside = axes.get_yaxis_transform()
    if math.isnan(c.tau):
        axes.text(0.02, place, f"undefined: {c.reason}", va="center", color=MUTED)
    else:
        axes.barh(place, c.tau, height=0.56, color=BAR)
        axes.plot([c.interval.low, c.interval.high], [place] * 2, color=INK, linewidth=1)
        for end in (c.interval.low, c.interval.high):
            axes.plot([end] * 2, [place - 0.1, place + 0.1], color=INK, linewidth=1)
        if c.std is not None:
            ends = [c.tau - c.std, c.tau + c.std]
            axes.plot(ends, [place] * 2, color=INK, linewidth=3.5, solid_capstyle="butt")
        text = signed(c.tau, 3) + (f"±{c.std:.3f}" if c.std is not None else "")
        raised = place - (0.16 if row.published else 0)
        axes.text(1.02, raised, text, transform=beside, va="center")
    if not math.isnan(c.ceiling):
        axes.plot([c.ceiling] * 2, [place - 0.36, place + 0.36], color=CEILING, linewidth=1.6)
    if row.published:
        mean, std = row.published
        axes.plot([mean - std, mean + std], [place + 0.36] * 2, color=PAPER, linewidth=1)
        axes.plot(
            [mean], [place + 0.36], marker="D", markersize=4, color=PAPER, markerfacecolor="none"
        )
        text = f"{signed(mean, 3)}±{std:.3f}"
        axes.text(1.02, place + 0.26, text, transform=beside, va="center", color=PAPER)


def _spoken(row: _Row) -> str:
    c = row.correlation
    if math.isnan(c.tau):
        return f"{row.label}: undefined, {c.reason}"
    text = f"{row.label}: τ {signed(c.tau)}"
    text += f" ± {c.std:.2f}" if c.std is not None else ""
    text += f", interval {signed(c.interval.low)} to {signed(c.interval.high)}"
    text += f", ceiling {signed(c.ceiling)}"
    return text + (f", published {signed(row.published[0])}" if row.published else "")


def _legend(
    analysis: Analysis, *, published: bool = False
) -> tuple[tuple[str, Callable[[], Any]], ...]:
    def line(**style: Any) -> Callable[[], Any]:
        return lambda: Line2D([], [], **style)

    several = max(analysis.runs.values(), default=0) > 1
    entries: list[tuple[str, Callable[[], Any]]] = [
        ("mean τ" if several else "τ", lambda: Rectangle((0, 0), 1, 1, facecolor=BAR)),
        *([("± std over runs", line(color=INK, linewidth=3.5))] if several else []),
        ("95 % interval", line(color=INK, linewidth=1)),
        (
            "ceiling",
            line(color=CEILING, linestyle="none", marker="|", markersize=9, markeredgewidth=1.6),
        ),
    ]
    if published:
        diamond = line(color=PAPER, linewidth=1, marker="D", markersize=4, markerfacecolor="none")
        entries.append(("published", diamond))
    return tuple(entries)


def colours(analysis: Analysis) -> dict[str, str]:
    """A colour for each layer."""
    layers = analysis.layers
    if len(layers) <= len(PALETTE):
        return dict(zip(layers, PALETTE, strict=False))
    shades = matplotlib.colormaps["viridis"](np.linspace(0.05, 0.95, len(layers)))
    return {
        layer: matplotlib.colors.to_hex(shade) for layer, shade in zip(layers, shades, strict=True)
    }


def markers(analysis: Analysis) -> dict[str, str]:
    """A marker for each method."""
    return {method: MARKERS[i % len(MARKERS)] for i, method in enumerate(analysis.methods)}


def figure_4(analysis: Analysis, metric: str) -> Chart:
    """An error against the performance error, at the keeps in focus, coloured by layer."""
    colour, marker = colours(analysis), markers(analysis)

    def panel(stage: Phase) -> Panel:
        groups: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for p in analysis.points:
            t = p.trial
            if t.stage == stage and t.keep in analysis.focus and metric in p.errors:
                place = (p.errors[metric], 100 * p.performance_error)
                groups.setdefault((t.layer, t.method), []).append(place)

        def draw(axes: Axes) -> None:
            for (layer, method), places in groups.items():
                axes.plot(
                    *zip(*places, strict=True),
                    linestyle="none",
                    marker=marker[method],
                    color=colour[layer],
                    markersize=5,
                    markeredgecolor=INK,
                    markeredgewidth=0.3,
                    alpha=0.85,
                )
            axes.grid()
            axes.set_xlabel(f"{metric_name(metric)} error")
            axes.set_ylabel("performance error (%)")

        found = analysis.correlation(stage, "all", metric)
        tau = f", τ {signed(found.tau)}" if found and not math.isnan(found.tau) else ""
        title = f"{stage_name(stage)}{tau}"
        count = sum(len(places) for places in groups.values())
        alt = f"Scatter of {count} candidates by {metric_name(metric)}: {title}."
        return Panel(title, alt, draw, 2.9)

    def dot(**style: Any) -> Callable[[], Any]:
        return lambda: Line2D([], [], linestyle="none", markersize=5, **style)

    many = len(analysis.layers) > 12
    shown = analysis.layers[:: max(1, len(analysis.layers) // 8)] if many else analysis.layers
    legend = [(layer, dot(marker="o", color=colour[layer])) for layer in shown]
    legend += [
        (method, dot(marker=shape, color=MUTED, markerfacecolor="none"))
        for method, shape in marker.items()
    ]
    return Chart(f"figure-4-{metric}", _per_stage(analysis, panel), tuple(legend))


def figure_5(analysis: Analysis) -> Chart:
    """Which layers fine-tuning changes, by the layer that was factorized."""
    changes = analysis.changes
    if changes is None:
        return Chart("figure-5-change-by-layer", ())

    def draw(axes: Axes) -> None:
        _draw_changes(axes, changes)

    most = sum(_changed_most(changes, row) for row in _rows(changes))
    alt = (
        f"Table of colours: the factorized layer changed the most in {most} of "
        f"{len(_rows(changes))} rows."
    )
    title = f"{changes.method}, keep {changes.keep:g}"
    panel = Panel(title, alt, draw, 1.4 + 0.33 * len(_rows(changes)))
    return Chart("figure-5-change-by-layer", (panel,))


def _rows(changes: Changes) -> tuple[str, ...]:
    return tuple(dict.fromkeys(cell.factorized for cell in changes.cells))


def _changed_most(changes: Changes, factorized: str) -> bool:
    row = {c.layer: c.change for c in changes.cells if c.factorized == factorized}
    return factorized in row and row[factorized] == max(row.values())


def _draw_changes(axes: Axes, changes: Changes) -> None:
    rows = _rows(changes)
    columns = tuple(dict.fromkeys(cell.layer for cell in changes.cells))
    logs = {
        (cell.factorized, cell.layer): math.log10(cell.change)
        for cell in changes.cells
        if cell.change > 0 and math.isfinite(cell.change)
    }
    scale = matplotlib.colors.Normalize(
        min(logs.values(), default=-1), max(logs.values(), default=0)
    )
    shades = matplotlib.colormaps["cividis"]
    for (factorized, layer), value in logs.items():
        x, y = columns.index(layer), rows.index(factorized)
        own = factorized == layer
        axes.add_patch(
            Rectangle(
                (x - 0.5, y - 0.5),
                1,
                1,
                facecolor=shades(scale(value)),
                edgecolor=INK if own else "white",
                linewidth=1.8 if own else 0.5,
                zorder=3 if own else 2,
            )
        )
        if len(columns) <= _MOST_NUMBERS:
            ink = "black" if scale(value) > 0.5 else "white"
            text = f"{value:.1f}".replace("-", "−")
            axes.text(x, y, text, ha="center", va="center", color=ink, fontsize=7, zorder=4)
    for cell in changes.cells:
        if cell.change == 0 and len(columns) <= _MOST_NUMBERS:
            place = columns.index(cell.layer), rows.index(cell.factorized)
            axes.text(*place, "0", ha="center", va="center", color=MUTED, fontsize=7)
    if len(columns) > _MOST_NUMBERS:
        colours = ScalarMappable(scale, shades)
        axes.figure.colorbar(colours, ax=axes, location="top", shrink=0.6, pad=0.02, aspect=30)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    step = math.ceil(len(columns) / _MOST_NAMES)
    places = range(0, len(columns), step)
    axes.set_xticks(places, columns[::step], rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    axes.set_xlabel("layer that is looked at\nlog10 of its mean relative change")
    axes.set_ylabel("factorized layer")
    for side in axes.spines.values():
        side.set_visible(False)


def regret_figure(analysis: Analysis) -> Chart:
    """What the planner would pick against the best candidate of the same size."""

    def panel(stage: Phase) -> Panel:
        regrets = [regret for regret in analysis.regrets if regret.stage == stage]
        mean = next((m for m in analysis.mean_regrets if m.stage == stage), None)
        text = f", mean regret {percent(mean.regret)} points" if mean else ""
        title = stage_name(stage) + text
        return Panel(
            title,
            f"{title}. Two step lines over the parameters to save: performance error of the "
            "planner's pick, and of the best candidate.",
            lambda axes: _draw_regret(axes, regrets, analysis.model.params),
            2.7,
        )

    stages = [s for s in analysis.stages if any(r.stage == s for r in analysis.regrets)]

    def line(**style: Any) -> Callable[[], Any]:
        return lambda: Line2D([], [], **style)

    legend = (
        ("planner's pick", line(color=PALETTE[1], linewidth=1.6)),
        ("best candidate", line(color=PALETTE[0], linewidth=1.6, linestyle="dashed")),
    )
    return Chart("figure-6-regret", tuple(panel(stage) for stage in stages), legend)


def _draw_regret(axes: Axes, regrets: Sequence[Regret], params: int) -> None:
    edges = [0.0, *(100 * regret.saving / params for regret in regrets)]
    pick = [100 * regret.pick_error for regret in regrets]
    best = [100 * regret.best_error for regret in regrets]
    axes.stairs(pick, edges, baseline=best, fill=True, color=PALETTE[1], alpha=0.2, linewidth=0)
    axes.stairs(pick, edges, baseline=None, color=PALETTE[1], linewidth=1.6)
    axes.stairs(best, edges, baseline=None, color=PALETTE[0], linewidth=1.6, linestyle="dashed")
    axes.grid()
    axes.set_xlim(0, edges[-1])
    room = 0.06 * (max(pick) - min(best)) or 1.0
    axes.set_ylim(max(0.0, min(best) - room), max(pick) + room)
    axes.set_xlabel("save at least (% of the model's parameters)")
    axes.set_ylabel("performance error (%)")


def print_figure(chart: Chart) -> Figure:
    """All panels side by side, with the legend below."""
    columns = 3 if len(chart.panels) == 1 else 8
    height = max(panel.height for panel in chart.panels)
    height += 0.15 + 0.2 * math.ceil(len(chart.legend) / columns)
    figure = Figure(figsize=(_WIDTH * max(len(chart.panels), 1), height))
    for place, panel in enumerate(chart.panels, start=1):
        axes = figure.add_subplot(1, len(chart.panels), place)
        panel.draw(axes)
        axes.set_title(panel.title)
    if chart.legend:
        figure.legend(
            [make() for _, make in chart.legend],
            [label for label, _ in chart.legend],
            loc="outside lower center",
            ncols=min(len(chart.legend), columns),
            handlelength=1.4,
            columnspacing=1.2,
        )
    return figure


def render(chart: Chart) -> dict[str, bytes]:
    """A chart's files: PNG (300 dpi) and SVG, by suffix; the same bytes for the same analysis."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": chart.name, "svg.fonttype": "path"}):
        figure = print_figure(chart)
        return {
            "svg": _saved(figure, "svg", metadata={"Date": None, "Creator": None}),
            "png": _saved(figure, "png", dpi=300, metadata={"Software": None}),
        }


def inline(chart: Chart, panel: Panel, name: str) -> str:
    """A panel as an SVG element for the page: text as text, colours as CSS variables.

    Args:
        chart: The chart it belongs to; its legend goes into the page.
        panel: What to draw.
        name: Goes before every id, so that ids are unique in the page.
    """
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(_WIDTH, panel.height))
        panel.draw(figure.add_subplot())
        options = {"transparent": True, "metadata": {"Date": None, "Creator": None}}
        text = _saved(figure, "svg", **options).decode()
    text = text[text.index("<svg") :]
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # it would reach the whole page
    text = text.replace("'DejaVu Sans'", css("font"))
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for colour, variable in THEME.items():
        text = text.replace(colour, variable)
    return text


def _saved(figure: Figure, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format=kind, **options)
    return stream.getvalue()
