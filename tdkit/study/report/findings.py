"""An analysis in words: what a user should do, and by which rules that was found."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from tdkit.study.records import Phase, Trial
from tdkit.study.report.conclusions import (
    ENOUGH,
    PLANNER,
    Advice,
    Analysis,
    Correlation,
    KeepVerdict,
)


def findings(analysis: Analysis) -> list[tuple[str, str]]:
    """What a user needs, as (heading, sentence): which error, from where on, at what cost."""
    if not analysis.advice:
        return [("Nothing yet", "Nothing has been measured.")]
    found = [("Which error", _which(analysis)), ("From where on", _where(analysis))]
    if analysis.mean_regrets:
        found.append(("At what cost", _cost(analysis)))
    return [(heading, unbroken(text)) for heading, text in found]


def _which(analysis: Analysis) -> str:
    advice = analysis.advice
    names = {a.metric for a in advice}
    if len(names) > 1 or None in names:
        return " ".join(_which_at(analysis, a) for a in advice)
    name = advice[0].metric
    assert name is not None
    rates = [_rate(analysis, a, name) for a in advice]
    text = (
        f"Rank by {metric_name(name)}: of two candidates it names the more accurate one in about "
        f"{' and in about '.join(rates)}."
    )
    common = set(advice[0].as_good).intersection(*(a.as_good for a in advice)) - {name}
    others = [metric_name(metric) for metric in analysis.metrics if metric in common]
    if len(others) > 2 and len(others) == len(analysis.metrics) - 1:
        return f"{text} These measurements cannot tell any other error from it."
    return f"{text} {_others(others)}" if others else text


def _which_at(analysis: Analysis, advice: Advice) -> str:
    when = stage_name(advice.stage)
    if advice.best is None:
        return f"{when} no τ is defined, so nothing can be said."
    if advice.metric is None:
        name = metric_name(advice.best)
        return (
            f"{when} no error ranks the candidates: no interval of τ lies above 0. The largest is "
            f"that of {name}: {_tau(analysis, advice, advice.best)}."
        )
    name = metric_name(advice.metric)
    rate = _rate(analysis, advice, advice.metric)
    return f"Rank by {name}, which names the more accurate of two candidates in about {rate}."


def _others(names: Sequence[str]) -> str:
    return f"{listed(names).capitalize()} may do as well: these measurements cannot tell."


def _rate(analysis: Analysis, advice: Advice, metric: str) -> str:
    found = analysis.correlation(advice.stage, "all", metric)
    assert found is not None
    right = f"{50 * (1 + found.tau):.0f} % of the cases {advice.stage} fine-tuning"
    return f"{right} ({_tau(analysis, advice, metric)})"


def _tau(analysis: Analysis, advice: Advice, metric: str) -> str:
    found = analysis.correlation(advice.stage, "all", metric)
    assert found is not None
    return f"τ {signed(found.tau)}, 95 % interval {between(found)}; ceiling {signed(found.ceiling)}"


_WHY = {
    "noise": "candidates differ by less than {images} images can show ({share} of the pairs are "
    "resolved), so that a low τ there is noise and not evidence against it",
    "not informative": "the images can tell candidates apart, and it cannot",
    "unclear": "there are too few candidates to tell",
    "undefined": "τ is undefined",
}


def _where(analysis: Analysis) -> str:
    text = "Trust it " + _by_stage({a.stage: _trusted(a) for a in analysis.advice})
    for verdict, why in _WHY.items():
        found = {a.stage: [at for at in a.keeps if at.verdict == verdict] for a in analysis.advice}
        every = [at for rows in found.values() for at in rows]
        if every:
            keeps = {stage: _at(at.keep for at in rows) for stage, rows in found.items() if rows}
            share = _span([at.correlation.resolved for at in every])
            said = why.format(images=f"{analysis.model.images:,}", share=share)
            text += f"; {_by_stage(keeps, same=len(keeps) == len(found))} {said}"
    return text + "."


def _trusted(advice: Advice) -> str:
    good = [at.keep for at in advice.keeps if at.verdict == "informative"]
    if good and len(good) == len(advice.keeps):
        return "at every keep"
    if advice.trusted is not None:
        smallest = advice.trusted == min(at.keep for at in advice.keeps)
        return f"at keep {advice.trusted:g}" + (", the smallest" if smallest else " and below")
    return f"{_at(good)} only" if good else "at no single keep by itself"


def _at(keeps: Iterable[float]) -> str:
    return f"at keep {listed([f'{keep:g}' for keep in keeps])}"


def _by_stage(texts: Mapping[Phase, str], *, same: bool = True) -> str:
    """What holds at each stage, once where it is the same."""
    if same and len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return ", ".join(f"{stage} fine-tuning {text}" for stage, text in texts.items())


def _span(shares: Sequence[float]) -> str:
    numbers = list(dict.fromkeys(f"{100 * share:.0f}" for share in sorted(shares)))
    return " to ".join(dict.fromkeys((numbers[0], numbers[-1]))) + " %"


def _cost(analysis: Analysis) -> str:
    word = "accuracy" if analysis.model.labelled else "agreement with the dense model"
    parts = [
        f"{percent(mean.regret)} points of {word} {mean.stage} fine-tuning "
        f"({percent(mean.interval.low)} to {percent(mean.interval.high)}; at worst "
        f"{percent(mean.worst.regret)})"
        for mean in analysis.mean_regrets
    ]
    return (
        "Against the best candidate that saves as much, the planner's pick for one layer loses on "
        f"average {listed(parts)}."
    )


def caveats(analysis: Analysis) -> list[str]:
    """What a reader must know before believing the numbers."""
    found = []
    missing = analysis.planned - analysis.finished
    if missing > 0:
        found.append(
            f"This study is not finished: {analysis.finished:,} of {analysis.planned:,} trials are "
            "done. Started again, it goes on."
        )
    if analysis.failures:
        found.append(
            f"{counted(len(analysis.failures), 'trial')} failed and "
            f"{'takes' if len(analysis.failures) == 1 else 'take'} part in no number; the first: "
            f"{trial_name(analysis.failures[0].trial)}: {analysis.failures[0].reason}. The report "
            "lists all reasons."
        )
    if not analysis.model.labelled:
        found.append(
            "The images have no labels: the performance error is 1 − agreement with the dense "
            "model's own predictions."
        )
    single = [stage for stage in analysis.stages if analysis.runs[stage] < 2]
    if single:
        when = listed([stage_name(stage).lower() for stage in single])
        found.append(
            f"There is one run {when}, so there is no standard deviation over runs; the intervals "
            "over images and candidates remain."
        )
    found += _undefined(analysis)
    return [unbroken(text) for text in found]


def _undefined(analysis: Analysis) -> Iterator[str]:
    """In how many groups of candidates τ is undefined; a group counts once, not by each error."""
    found = [c for c in analysis.correlations if c.undefined and c.metric in analysis.metrics]
    if not found:
        return
    counts = Counter[str]()
    for c in found:
        counts[c.metric] += c.undefined
    least, most = min(counts[metric] for metric in analysis.metrics), max(counts.values())
    reasons = listed(sorted({c.reason for c in found if c.reason}))
    yield (
        f"τ is undefined in {'up to ' if least < most else ''}{counted(most, 'comparison')} by "
        f"each error ({reasons}); they are left out of means, not counted as 0."
    )


def definitions(analysis: Analysis) -> list[tuple[str, str]]:
    """Every rule and every word of the report."""
    model = analysis.model
    truth = (
        f"The share of the {model.images:,} evaluation images that the model is wrong about"
        if model.labelled
        else f"1 − the share of the {model.images:,} evaluation images on which the model agrees "
        "with the dense one"
    )
    return [
        ("Performance error", f"{truth}, with one layer factorized and the others dense."),
        (
            "Keep",
            "The share of a layer's weight parameters that remain. The paper's text speaks of "
            "compression, which is 1 − keep: keep 0.1 is 90 % compression.",
        ),
        (
            "τ",
            "Kendall's tau-a, 2(k − d) / (m(m − 1)) for k concordant and d discordant pairs of m "
            "candidates (Eq. 1 of the paper). Pairs that tie in either error count as neither. It "
            "is undefined, and said to be so, for fewer than two candidates and where all errors "
            "or all performance errors are equal. Without ties (1 + τ) / 2 of all pairs are "
            "ordered rightly.",
        ),
        (
            "± std",
            "The standard deviation over runs (of a sample, n − 1). What is not random is measured "
            "once and stands for every run.",
        ),
        (
            "95 % interval",
            f"From {analysis.resamples:,} resamples: for each, as many images and as many "
            "candidates are drawn with replacement, the same images for all candidates, and τ is "
            "computed again (pairs of a candidate with its own copy left out). The noise of a "
            "finite test set pulls τ towards 0 and resampling pulls it once more, so that the "
            "interval spans the percentiles and their reflection at τ. In simulated studies it "
            "holds the τ that unlimited images would show in at least 95 % of the cases where two "
            "fifths of the pairs are resolved, and in 80 % where one fifth is: there the true τ "
            "may lie still further out. "
            "Performance errors and regrets resample images only, and their intervals are plain "
            "percentiles. Candidates are drawn as if they were independent of each other.",
        ),
        (
            "Ceiling",
            "The mean τ of the performance error with itself measured again on resampled images. "
            "No approximation error can be expected to do better. It is generous: where all "
            "differences are noise it is still about 0.5, which is why the share of resolved pairs "
            "stands beside it.",
        ),
        (
            "Resolved pairs",
            "Pairs of candidates that come in the same order in at least 97.5 % of the resampled "
            "test sets. The others differ by less than this test set can show: they are noise, not "
            "evidence against an error.",
        ),
        (
            "Which error to use",
            "The first in the recipe's order among those whose τ over all choices is not "
            "resolvably below the largest (the 95 % interval of the difference, on the same "
            "resamples, reaches 0), if its own interval lies above 0.",
        ),
        (
            "Trusted at a keep",
            "The interval of τ over the layers and methods of this keep lies above 0, and τ is at "
            f"least {100 * ENOUGH:.0f} % of its ceiling. Where it is not so: if fewer than half of "
            "the pairs are resolved the verdict is noise; if they are, the error is not "
            f"informative where τ is below {100 * ENOUGH:.0f} % of the ceiling, and else there are "
            "too few candidates to tell. The error is trusted from the largest keep on at which, "
            "and below which, every keep is informative.",
        ),
        (
            "Planner's ranking",
            f"The planner's first move takes the least squared {metric_name(analysis.metrics[0])} "
            "error per parameter saved. Its ranking is compared with the performance error, and "
            "with what it stands for: the accuracy lost per parameter saved.",
        ),
        (
            "Regret",
            "For each size, the candidates that save at least as many parameters by factorizing "
            f"one layer: the performance error of the one with the least "
            f"{metric_name(analysis.metrics[0])} error, which the planner picks, less that of the "
            "best one. The mean weighs every size from 0 to the largest saving alike; the interval "
            "is that of the difference between these two candidates. The best one is the best on "
            "these images, so that some of the regret is their luck.",
        ),
    ]


def unbroken(text: str) -> str:
    """Keep numbers and their units on one line."""
    return text.replace(" %", "\u00a0%").replace("τ ", "τ\u00a0")


def std_or_dash(c: Correlation) -> str:
    """The standard deviation over runs, or a dash."""
    return "–" if c.std is None else f"{c.std:.3f}"


def metric_name(metric: str) -> str:
    """Relative weights, for relative-weights."""
    return "planner's rule" if metric == PLANNER else metric.replace("-", " ")


def stage_name(stage: Phase) -> str:
    """Before fine-tuning, or After fine-tuning."""
    return f"{stage.capitalize()} fine-tuning"


def trial_name(trial: Trial) -> str:
    """A candidate in a line."""
    return f"{trial.layer} · {trial.method} · keep {trial.keep:g}"


def verdict_text(at: KeepVerdict) -> str:
    """A verdict, with the reason where τ is undefined."""
    reason = at.correlation.reason
    return f"undefined: {reason}" if at.verdict == "undefined" and reason else at.verdict


def signed(value: float, digits: int = 2) -> str:
    """0.78, with a true minus sign; a dash for NaN."""
    if math.isnan(value):
        return "–"
    text = f"{value:.{digits}f}"
    zero = text.lstrip("-").strip("0.") == ""
    return text.lstrip("-") if zero else text.replace("-", "−")


def percent(share: float) -> str:
    """A share in points, such as 12.34; a dash for NaN."""
    return signed(100 * share)


def between(c: Correlation, digits: int = 2) -> str:
    """An interval, such as 0.70 to 0.84; a dash where there is none."""
    if math.isnan(c.interval.low):
        return "–"
    return f"{signed(c.interval.low, digits)} to {signed(c.interval.high, digits)}"


def listed(names: Sequence[str]) -> str:
    """A, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def counted(count: int, noun: str) -> str:
    """1 trial, 2 trials."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
