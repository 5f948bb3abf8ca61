"""What a report says, as frozen records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tdkit.decompositions.base import Rank
from tdkit.study.recipe import PublishedRecipe
from tdkit.study.records import Phase, Trial

LEVEL = 0.95
"""Of every interval."""


ENOUGH = 0.5
"""Where an error is informative its tau is at least this share of the ceiling."""


PLANNER = "planner"
"""Stands for the planner's ranking where a metric's name would stand."""


FIGURE_5 = ("tucker", 0.5)
"""The method and the keep of the paper's Figure 5."""


Choices = Literal["all", "layers", "methods", "keep"]
"""What is compared: everything, layers only, methods only, or layers and methods at one keep."""


Truth = Literal["error", "loss per parameter"]
"""What errors are compared with: the performance error, or what it costs to save a parameter."""


Verdict = Literal["informative", "noise", "not informative", "unclear", "undefined"]


@dataclass(frozen=True)
class Interval:
    """A 95 % bootstrap interval; NaN where there is none."""

    low: float
    high: float


@dataclass(frozen=True)
class Model:
    """The dense model, and what was measured on it.

    Attributes:
        images: How many evaluation images there are.
        labelled: Whether they have labels; if not, accuracy is agreement with this model.
        accuracy: Of the dense model.
        interval: Of the accuracy, over images.
        params: Parameters of the whole model.
        layers: All layers in the order of the forward pass.
        numbers: By a layer's name its number in the paper's tables, where the recipe has them.
    """

    images: int
    labelled: bool
    accuracy: float
    interval: Interval
    params: int
    layers: tuple[str, ...]
    numbers: Mapping[str, int]


@dataclass(frozen=True)
class Point:
    """A measured candidate.

    Attributes:
        trial: Which one.
        params_before: The layer's parameters.
        params_after: Those of its factorization.
        macs_before: The layer's multiply-accumulates per sample; None when unknown.
        macs_after: Those of its factorization.
        errors: Approximation errors by metric.
        performance_error: The share of images that the model is wrong about.
        interval: Of the performance error, over images.
        seconds: How long it took.
    """

    trial: Trial
    params_before: int
    params_after: int
    macs_before: int | None
    macs_after: int | None
    errors: Mapping[str, float]
    performance_error: float
    interval: Interval
    seconds: float


@dataclass(frozen=True)
class Correlation:
    """Kendall's tau-a between an approximation error and the truth, averaged as in the paper.

    Attributes:
        stage: Before or after fine-tuning.
        truth: What the error is compared with.
        choices: Which candidates are compared with each other.
        keep: The keep that they share; None where ``choices`` is not ``keep``.
        metric: The approximation error, or :data:`PLANNER`.
        tau: Mean over runs of the mean over groups; NaN where undefined.
        std: Standard deviation over runs (of a sample); None with fewer than two.
        interval: Over images and candidates together.
        ceiling: The tau that the truth reaches against itself when measured again on resampled
            images.
        runs: How many there are.
        groups: How many sets of candidates are compared within: 1 for ``all`` and ``keep``.
        undefined: In how many of runs x groups tau is undefined; they are left out of the mean.
        reason: Why, for most of these; None when there are none.
        candidates: How many there are in all groups together.
        pairs: Of candidates that are compared with each other, per run.
        tied: Share of them that tie in the error or in the truth.
        resolved: Share of them whose order the test set resolves.
        on_resolved: tau over these pairs only.
    """

    stage: Phase
    truth: Truth
    choices: Choices
    keep: float | None
    metric: str
    tau: float
    std: float | None
    interval: Interval
    ceiling: float
    runs: int
    groups: int
    undefined: int
    reason: str | None
    candidates: int
    pairs: int
    tied: float
    resolved: float
    on_resolved: float


@dataclass(frozen=True)
class KeepVerdict:
    """How far the recommended error can be trusted at one keep."""

    keep: float
    verdict: Verdict
    correlation: Correlation


@dataclass(frozen=True)
class Advice:
    """What a user should do, by rules that the report states.

    Attributes:
        stage: Before or after fine-tuning.
        metric: The error to use; None when no error's interval lies above 0.
        best: The error of the largest tau; None when no tau is defined.
        as_good: The errors whose tau is not resolvably below the largest, in the recipe's order.
        keeps: A verdict on ``metric`` (else ``best``) for each keep, from large to small.
        trusted: The largest keep from which on down every keep is informative; None when the
            smallest one is not.
    """

    stage: Phase
    metric: str | None
    best: str | None
    as_good: tuple[str, ...]
    keeps: tuple[KeepVerdict, ...]
    trusted: float | None


@dataclass(frozen=True)
class Regret:
    """What choosing by the planner's rule costs at one size.

    Attributes:
        stage: Before or after fine-tuning.
        saving: How many parameters must be saved at least.
        candidates: How many save as much, in the first run.
        pick: What the planner picks among them, in the first run.
        best: The one of least performance error, in the first run.
        pick_error: Performance error of the pick, mean over runs.
        best_error: That of the best one.
        regret: Their difference.
        std: Its standard deviation over runs; None with fewer than two.
        interval: Of the difference between these candidates, over images.
    """

    stage: Phase
    saving: int
    candidates: int
    pick: Trial
    best: Trial
    pick_error: float
    best_error: float
    regret: float
    std: float | None
    interval: Interval


@dataclass(frozen=True)
class MeanRegret:
    """The regret averaged over all sizes up to the largest saving, each parameter weighing alike.

    Attributes:
        stage: Before or after fine-tuning.
        regret: The mean.
        interval: Of the mean, over images.
        worst: The size of the largest regret.
    """

    stage: Phase
    regret: float
    interval: Interval
    worst: Regret


@dataclass(frozen=True)
class RankRow:
    """A row of the paper's Tables 2 and 3: the ranks of a layer at a keep, by method."""

    layer: str
    keep: float
    ranks: Mapping[str, Rank]


@dataclass(frozen=True)
class Change:
    """How much fine-tuning changed a layer: a cell of the paper's Figure 5.

    Attributes:
        factorized: The layer that was factorized.
        layer: The layer that is looked at.
        change: Mean over runs of the relative difference of its norm.
    """

    factorized: str
    layer: str
    change: float


@dataclass(frozen=True)
class Changes:
    """Figure 5 of the paper for one method and keep."""

    method: str
    keep: float
    cells: tuple[Change, ...]


@dataclass(frozen=True)
class Published:
    """A value of the paper beside ours; None where ours was not measured."""

    paper: PublishedRecipe
    measured: Correlation | None


@dataclass(frozen=True)
class Failure:
    """A trial without a result, and why."""

    trial: Trial
    reason: str


@dataclass(frozen=True)
class Analysis:
    """Everything that the report says.

    Attributes:
        title: Of the study.
        model: The dense model.
        metrics: Approximation errors, the one that guides the planner first.
        methods: Decompositions that were measured.
        layers: Layers that were factorized, in the order of the forward pass.
        keeps: From large to small.
        focus: Those that Figures 2 and 3 are about.
        stages: The measured ones.
        runs: By stage, how many runs there are.
        resamples: Of the bootstrap.
        points: Every measured candidate.
        correlations: Every tau.
        advice: For each stage.
        regrets: For each stage and size.
        mean_regrets: For each stage.
        ranks: Tables 2 and 3.
        changes: Figure 5; None before anything was fine-tuned.
        published: Values of the paper.
        failures: Trials without a result.
        finished: How many trials are done, failed ones included.
        planned: How many there are.
        notes: Sentences of the recipe.
    """

    title: str
    model: Model
    metrics: tuple[str, ...]
    methods: tuple[str, ...]
    layers: tuple[str, ...]
    keeps: tuple[float, ...]
    focus: tuple[float, ...]
    stages: tuple[Phase, ...]
    runs: Mapping[Phase, int]
    resamples: int
    points: tuple[Point, ...]
    correlations: tuple[Correlation, ...]
    advice: tuple[Advice, ...]
    regrets: tuple[Regret, ...]
    mean_regrets: tuple[MeanRegret, ...]
    ranks: tuple[RankRow, ...]
    changes: Changes | None
    published: tuple[Published, ...]
    failures: tuple[Failure, ...]
    finished: int
    planned: int
    notes: tuple[str, ...]

    def correlation(
        self,
        stage: Phase,
        choices: Choices,
        metric: str,
        keep: float | None = None,
        truth: Truth = "error",
    ) -> Correlation | None:
        """Look one tau up; None when it was not computed."""
        wanted = (stage, choices, metric, keep, truth)
        for c in self.correlations:
            if (c.stage, c.choices, c.metric, c.keep, c.truth) == wanted:
                return c
        return None
