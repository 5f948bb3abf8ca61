"""A study as a TOML file: which model and data, what to measure, and how."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

from tdkit import defaults
from tdkit.errors import UsageError, option
from tdkit.recipes import BUNDLED, Setting, load_recipe, require
from tdkit.training.recipe import FitRecipe

SplitName = Literal["train", "validation", "test"]

METRICS = (
    "relative-weights",
    "scaled-weights",
    "absolute-weights",
    "relative-features",
    "scaled-features",
    "absolute-features",
)


@dataclass(frozen=True)
class ImagesRecipe:
    """The tables ``[evaluation]`` and ``[features]``: which images to measure on.

    Args:
        split: Which split.
        images: At most this many, evenly spaced; all when left out.
        batch_size: Images per batch on a CPU, where more are slower; a GPU gets eight times as
            many. It changes speed and memory, not the result.
    """

    split: SplitName
    images: int | None = None
    batch_size: int = 50

    def __post_init__(self) -> None:
        if self.images is not None:
            require("images", self.images, self.images >= 1, "at least 1")
        require("batch_size", self.batch_size, self.batch_size >= 1, "at least 1")


@dataclass(frozen=True)
class RankRecipe:
    """A table ``[[ranks]]``: a rank given by hand instead of by the rule.

    Args:
        layer: The layer's name.
        method: The method's name.
        keep: The keep it stands for.
        rank: One number (cp, svd) or several (tucker: out, in; tt: the inner ranks).
    """

    layer: str
    method: str
    keep: float
    rank: tuple[int, ...]

    def __post_init__(self) -> None:
        _require_fractions("keep", (self.keep,))
        good = bool(self.rank) and min(self.rank) >= 1
        require("rank", list(self.rank), good, "one or more numbers of at least 1")


@dataclass(frozen=True, init=False)
class MethodRecipe:
    """A table ``[[options]]``: settings of a method, for studies of the method itself.

    Which settings there are is the method's to say: they are keywords of its constructor, and are
    checked when the study is opened.

    Args:
        method: The method's name.
        settings: Whatever its constructor takes, such as ``sweeps`` of cp and tucker.
    """

    method: str
    given: tuple[tuple[str, Setting], ...]

    def __init__(self, method: str, **settings: Setting) -> None:
        object.__setattr__(self, "method", method)
        # In one order, so that two tables that say the same are the same.
        object.__setattr__(self, "given", tuple(sorted(settings.items())))

    @property
    def settings(self) -> dict[str, Setting]:
        """By the name of a setting its value."""
        return dict(self.given)

    @classmethod
    def from_table(cls, table: Mapping[str, Any], key: str) -> MethodRecipe:
        """Read the table of a recipe.

        Raises:
            UsageError: If the method's name is missing, or a value is no plain one.
        """
        if not isinstance(table.get("method"), str):
            raise UsageError(f"the key {key}.method is missing", "Add it: a string.")
        for name, value in table.items():
            if not isinstance(value, bool | int | float | str):
                raise UsageError(f"{key}.{name} must be a number, a string, true or false")
        return cls(**table)

    def to_table(self) -> dict[str, Setting]:
        """What :meth:`from_table` reads."""
        return {"method": self.method, **self.settings}


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe(FitRecipe):
    """The table ``[finetune]``; see :class:`FitRecipe` for the other fields.

    Args:
        images: Train on this many, a fixed choice by seed; all when left out.
        keeps: Fine-tune the candidates of these keeps only; all when left out.
    """

    images: int | None = None
    keeps: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images is not None:
            require("images", self.images, self.images >= 2, "at least 2")
        if self.keeps is not None:
            _require_some("keeps", self.keeps)
            _require_fractions("keeps", self.keeps)


@dataclass(frozen=True)
class PublishedRecipe:
    """A table ``[[published]]``: a correlation of the paper's Figure 2.

    Args:
        stage: Before or after fine-tuning.
        metric: The approximation error.
        mean: Kendall's tau-a, mean over runs.
        std: Its standard deviation over runs.
    """

    stage: Literal["before", "after"]
    metric: str
    mean: float
    std: float

    def __post_init__(self) -> None:
        require("mean", self.mean, -1 <= self.mean <= 1, "from -1 to 1")
        require("std", self.std, self.std >= 0, "at least 0")


@dataclass(frozen=True, kw_only=True)
class StudyRecipe:
    """A study.

    Args:
        title: What the report is headed with.
        model: A registered name or a model file.
        data: A registered data set, ``NAME`` or ``NAME:PATH``.
        weights: Weights of a registered model; its default ones when left out.
        layers: Names or shell patterns, which may name the first and the last layer too; all
            compressible layers but these two when empty.
        numbers: For each of ``layers`` its number in the paper's tables, for the report.
        methods: Names of decompositions.
        keeps: Fractions of a layer's weight parameters.
        focus: The keeps that Figures 2 and 3 are about; all when left out.
        rank_rule: ``proportional`` (the paper's) or ``best``.
        metrics: Approximation errors to correlate; the first one guides the planner.
        runs: Repetitions of whatever is random.
        seed: Of the first run; the next run has the next seed. The validation split is that of
            ``tdkit train`` with seed 0, whatever this is.
        evaluation: Images that the performance error is measured on.
        features: Images that feature errors are measured on.
        ranks: Ranks given by hand.
        options: Settings of methods.
        finetune: How p* is measured; left out, only p is.
        published: Values to show beside the measured ones.
        notes: Sentences for the report, such as where the recipe differs from the paper.
    """

    title: str
    model: str
    data: str
    methods: tuple[str, ...]
    keeps: tuple[float, ...]
    weights: str | None = None
    layers: tuple[str, ...] = ()
    numbers: tuple[int, ...] = ()
    focus: tuple[float, ...] = ()
    rank_rule: Literal["proportional", "best"] = "proportional"
    metrics: tuple[str, ...] = METRICS
    runs: int = 1
    seed: int = defaults.SEED
    evaluation: ImagesRecipe = field(default_factory=lambda: ImagesRecipe("test"))
    features: ImagesRecipe = field(default_factory=lambda: ImagesRecipe("train", 1000))
    ranks: tuple[RankRecipe, ...] = ()
    options: tuple[MethodRecipe, ...] = ()
    finetune: FinetuneRecipe | None = None
    published: tuple[PublishedRecipe, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key in ("title", "model", "data"):
            require(key, getattr(self, key), bool(getattr(self, key).strip()), "not empty")
        for key in ("methods", "keeps", "metrics"):
            _require_some(key, getattr(self, key))
        _require_unique("layers", self.layers)
        _require_fractions("keeps", self.keeps)
        require("runs", self.runs, self.runs >= 1, "at least 1")
        most = 2**63 - self.runs
        require("seed", self.seed, 0 <= self.seed <= most, "at least 0 and below 2**63")
        if self.numbers:
            count = len(self.layers)
            rule = f"one for each of the {count} layers"
            require("numbers", list(self.numbers), len(self.numbers) == count, rule)
            for name in self.layers:
                plain = not set("*?[") & set(name)
                require("layers", name, plain, "full names where there are numbers")
        self._check_references()

    def _check_references(self) -> None:
        """What one part of the recipe says of another must be there."""
        _require_unique("focus", self.focus)
        for keep in self.focus:
            self._require_keep("focus", keep)
        for keep in (self.finetune and self.finetune.keeps) or ():
            self._require_keep("finetune.keeps", keep)
        for rank in self.ranks:
            self._require_keep("ranks.keep", rank.keep)
            _require_known("ranks.method", rank.method, self.methods)
        _require_unique("ranks", [(rank.layer, rank.method, rank.keep) for rank in self.ranks])
        for settings in self.options:
            _require_known("options.method", settings.method, self.methods)
        _require_unique("options.method", [option.method for option in self.options])
        for value in self.published:
            _require_known("published.metric", value.metric, self.metrics)
        _require_unique("published", [(value.stage, value.metric) for value in self.published])

    def _require_keep(self, key: str, keep: float) -> None:
        require(key, keep, keep in self.keeps, f"one of the keeps {_listed(self.keeps)}")


def bundled_recipe(name: str = "quick") -> StudyRecipe:
    """A recipe that comes with tdkit.

    Args:
        name: Of its file, without the suffix.

    Raises:
        UnreadableFileError: If there is none of that name.
    """
    return load_recipe(BUNDLED / f"{name}.toml", StudyRecipe)


def require_name_of_data(data: object) -> None:
    """Refuse data that are no name: a data set is handed over as an object, or is named.

    Args:
        data: What should be ``NAME`` or ``NAME:PATH``.

    Raises:
        UsageError: If it is anything but text.
    """
    if not isinstance(data, str):
        raise UsageError(
            f"the data are of type {type(data).__name__}, which is neither a Dataset nor the name "
            "of one",
            f"for images in folders give {option('data', 'image-folder:PATH')}; of tensors make "
            "one with tdkit.datasets.base.in_memory_dataset",
        )


def own_study(base: StudyRecipe, model: str, data: str, title: str) -> StudyRecipe:
    """The study of a model of one's own, with what another recipe says of everything else.

    Its methods are as ``compress`` scores with them, whatever settings the recipe has.

    Args:
        base: A recipe; what it says of its own model, such as layers, is left out.
        model: A registered name or a model file.
        data: A registered data set, ``NAME`` or ``NAME:PATH``.
        title: What the report is headed with.

    Raises:
        UsageError: If the data are no name.
    """
    require_name_of_data(data)
    return replace(
        base,
        title=title,
        model=model,
        data=data,
        weights=None,
        layers=(),
        numbers=(),
        ranks=(),
        options=(),
        published=(),
        notes=(),
    )


def adapted(
    recipe: StudyRecipe,
    *,
    layers: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    keeps: Sequence[float] | None = None,
    images: int | None = None,
    runs: int | None = None,
    settings: Mapping[str, Mapping[str, Setting]] | None = None,
) -> StudyRecipe:
    """A recipe with some values replaced; None leaves one as it is.

    What it says of layers, methods and keeps that are gone goes with them. Published values go
    with every choice of candidates or settings but their own.

    Args:
        recipe: The recipe.
        layers: Names or shell patterns.
        methods: Names of decompositions.
        keeps: Fractions of a layer's parameters.
        images: Images that the performance error is measured on, at most.
        runs: Repetitions of whatever is random.
        settings: Of methods, over those of the recipe.

    Raises:
        UsageError: If a value is wrong.
    """
    kept, used = tuple(keeps or recipe.keeps), tuple(methods or recipe.methods)
    named = tuple(layers or recipe.layers)
    same = (named, used, kept) == (recipe.layers, recipe.methods, recipe.keeps) and not settings
    finetune = recipe.finetune
    if finetune is not None and finetune.keeps is not None:
        left = tuple(keep for keep in finetune.keeps if keep in kept)
        finetune = replace(finetune, keeps=left) if left else None
    ranks = (r for r in recipe.ranks if r.keep in kept and r.method in used)
    return replace(
        recipe,
        layers=named,
        numbers=recipe.numbers if named == recipe.layers else (),
        methods=used,
        keeps=kept,
        focus=tuple(keep for keep in recipe.focus if keep in kept),
        runs=recipe.runs if runs is None else runs,
        evaluation=replace(recipe.evaluation, images=images or recipe.evaluation.images),
        ranks=tuple(r for r in ranks if named == recipe.layers or r.layer in named),
        options=_over(recipe.options, used, settings or {}),
        finetune=finetune,
        published=recipe.published if same else (),
    )


def _over(
    options: Sequence[MethodRecipe],
    used: Sequence[str],
    settings: Mapping[str, Mapping[str, Setting]],
) -> tuple[MethodRecipe, ...]:
    """Settings of the methods that are left, with some given anew."""
    before = {option.method: option.settings for option in options if option.method in used}
    names = dict.fromkeys([*before, *settings])
    both = {name: {**before.get(name, {}), **settings.get(name, {})} for name in names}
    return tuple(MethodRecipe.from_table({**both[name], "method": name}, name) for name in names)


def to_toml(recipe: Any) -> str:
    """Write a recipe as TOML; reading it gives an equal one. Values left out stay so.

    Args:
        recipe: A dataclass as :func:`tdkit.recipes.load_recipe` reads it.
    """
    return "\n".join(_toml(recipe, "")).lstrip("\n") + "\n"


def _toml(record: Any, prefix: str) -> Iterator[str]:
    if isinstance(record, MethodRecipe):
        values: dict[str, Any] = dict(record.to_table())
    else:
        values = {entry.name: getattr(record, entry.name) for entry in fields(record)}
    values = {key: value for key, value in values.items() if value is not None}
    nested = {key: value for key, value in values.items() if _is_nested(value)}
    for key, value in values.items():
        if key not in nested:
            yield f"{key} = {_toml_value(value)}"
    for key, value in nested.items():
        name = f"{prefix}{key}"
        several = isinstance(value, tuple)
        for part in value if several else (value,):
            yield f"\n[[{name}]]" if several else f"\n[{name}]"
            yield from _toml(part, f"{name}.")


def _is_nested(value: Any) -> bool:
    return is_dataclass(value) or (
        isinstance(value, tuple) and bool(value) and is_dataclass(value[0])
    )


def _toml_value(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    # JSON's strings, escapes included, its integers and its booleans are TOML's; DEL is not.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _require_some(key: str, values: Sequence[Any]) -> None:
    require(key, list(values), bool(values), "at least one value")
    _require_unique(key, values)


def _require_unique(key: str, values: Sequence[Any]) -> None:
    twice = next((value for place, value in enumerate(values) if value in values[:place]), None)
    if twice is not None:
        raise UsageError(f"{key} names {twice!r} twice", "leave one of them out")


def _require_fractions(key: str, values: Sequence[float]) -> None:
    for value in values:
        require(key, value, 0 < value <= 1, "above 0 and at most 1")


def _require_known(key: str, name: str, known: Sequence[str]) -> None:
    require(key, name, name in known, f"one of {_listed(known)}")


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))
