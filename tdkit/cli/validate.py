"""``tdkit validate``: how far can the approximation error be trusted?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from tdkit.cli import options
from tdkit.errors import UnreadableFileError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tdkit.opening import Source
    from tdkit.study.opening import Adaptation
    from tdkit.study.recipe import StudyRecipe
    from tdkit.study.records import Results
    from tdkit.study.report.conclusions import Analysis
    from tdkit.study.running import Pool
    from tdkit.study.store import Store
    from tdkit.study.workspace import Workspace


def validate(
    recipe: Annotated[
        Optional[str],  # noqa: UP045 - typer reads the annotation at run time on 3.10
        typer.Argument(
            metavar="RECIPE",
            help="A recipe file in TOML, or the name of one in recipes/ or, if that has none, "
            "of one that comes with tdkit; tdkit's quick if unset.",
        ),
    ] = None,
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="A model file or registered name, instead of the recipe's."),
    ] = None,
    data: options.Data = None,
    arch: options.Arch = None,
    weights: options.Weights = None,
    allow_class: options.AllowClass = None,
    unsafe_load: options.UnsafeLoad = False,
    input_shape: options.InputShape = None,
    layers: options.Layers = None,
    methods: options.Methods = None,
    keeps: options.Keeps = None,
    images: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Measure the performance error on at most this many images."),
    ] = None,
    runs: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Repetitions of whatever is random."),
    ] = None,
    no_finetune: Annotated[
        bool,
        typer.Option(
            "--no-finetune",
            help="Measure before fine-tuning only; the same command without this goes on.",
        ),
    ] = False,
    run: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="DIR", help="The run folder; runs/RECIPE if unset. A run goes on."),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Move an old run folder aside and start anew.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Measure again what has failed.")
    ] = False,
    workers: Annotated[
        int, typer.Option(min=0, help="Measure in so many processes; 0 is this one.")
    ] = 0,
    dask: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="ADDRESS", help="Measure on a Dask cluster, such as tcp://host:8786."),
    ] = None,
    batch_size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Images per forward pass; changes memory, not results."),
    ] = None,
    data_root: options.DataRoot = None,
    device: options.Device = "auto",
    json: options.Json = False,
    no_report: Annotated[
        bool, typer.Option("--no-report", help="Print the summary and write no report.")
    ] = False,
) -> None:
    """Measure every candidate's real error, and report how well approximation errors rank them.

    Stop it at any time: the same command goes on.

    Example: `tdkit validate --model my.pt --data image-folder:val/ --input-shape 3,224,224`
    """
    from tdkit.cli.common import Source, parse_keeps, parse_names
    from tdkit.study.recipe import adapted

    # The recipe first: what is wrong with its name or text is told before torch is imported.
    study = _study(recipe, model, data)
    pool = _pool(workers, dask)
    wanted = adapted(
        study.recipe,
        layers=layers,
        methods=parse_names(methods, "--methods"),
        keeps=parse_keeps(keeps, ()) or None,
        images=images,
        runs=runs,
    )
    source = Source(
        wanted.model,
        arch,
        weights or wanted.weights,
        tuple(allow_class or ()),
        unsafe_load,
        input_shape,
        device,
    )
    adaptation = replace(
        study.adaptation,
        batches=study.adaptation.batches and batch_size is None,
        methods=study.adaptation.methods and methods is None,
    )
    wanted = _batched(replace(wanted, finetune=None) if no_finetune else wanted, batch_size)
    settings = _Settings(
        recipe=wanted,
        source=source,
        adaptation=adaptation,
        data_root=data_root,
        folder=run or study.folder,
        fresh=fresh,
        retry_failed=retry_failed,
        named=model is None,
    )
    results, workspace = _run(settings, pool)
    _finish(results, workspace.recipe, settings.folder, json=json, no_report=no_report)


@dataclass(frozen=True)
class _Study:
    """A recipe as the user named it, its run folder, and what of it may be changed."""

    recipe: StudyRecipe
    folder: Path
    adaptation: Adaptation


@dataclass(frozen=True)
class _Settings:
    recipe: StudyRecipe
    source: Source
    adaptation: Adaptation
    data_root: Path | None
    folder: Path
    fresh: bool
    retry_failed: bool
    named: bool  # whether the recipe names the model, and not the user


def _study(text: str | None, model: str | None, data: str | None) -> _Study:
    """The recipe, quick by default; with a model of the user's a study of that."""
    from tdkit.recipes import find_recipe, load_recipe
    from tdkit.study.opening import Adaptation
    from tdkit.study.recipe import StudyRecipe, bundled_recipe, own_study

    runs = Path("runs")
    if text is not None:
        path = find_recipe(text)
        recipe = load_recipe(path, StudyRecipe)
        if model is None and data is None:
            return _Study(recipe, runs / path.stem, Adaptation())
        # Where numbers come from, and the paper's values, are about what the recipe names.
        recipe = replace(recipe, data=data or recipe.data, notes=(), published=())
        if model is not None:
            recipe = replace(recipe, model=model, weights=None)
        name = Path(recipe.model).stem
        title = f"{name} on {recipe.data}, by the recipe {path.stem}"
        folder = runs / f"{path.stem}-{name}-{recipe.data.partition(':')[0]}"
        return _Study(replace(recipe, title=title), folder, Adaptation())
    recipe = bundled_recipe()
    if model is not None:
        if data is None:
            raise UsageError(
                "--model needs images to measure it on",
                "name some with --data, such as image-folder:PATH",
            )
        name = Path(model).stem
        own = own_study(recipe, model, data, f"{name} on {data}")
        return _Study(own, runs / name, Adaptation(splits=True, batches=True, methods=True))
    if data is not None:
        title = f"{recipe.model} on {data}"
        recipe = replace(recipe, data=data, title=title)
        folder = runs / f"quick-{data.partition(':')[0]}"
        return _Study(recipe, folder, Adaptation(splits=True, batches=True))
    return _Study(recipe, runs / "quick", Adaptation())


def _batched(recipe: StudyRecipe, batch_size: int | None) -> StudyRecipe:
    if batch_size is None:
        return recipe
    return replace(
        recipe,
        evaluation=replace(recipe.evaluation, batch_size=batch_size),
        features=replace(recipe.features, batch_size=batch_size),
    )


def _pool(workers: int, address: str | None) -> Pool | None:
    from tdkit.study.running import dask, processes

    if address is not None:
        if workers:
            raise UsageError("--workers and --dask exclude each other", "leave one of them out")
        return dask(address)
    return processes(workers) if workers else None


def _run(settings: _Settings, pool: Pool | None) -> tuple[Results, Workspace]:
    """Open the study, and measure what its run folder lacks."""
    from tdkit.cli.common import open_registry
    from tdkit.cli.display import note, waiting
    from tdkit.study.opening import NamedStudy
    from tdkit.study.recipe import to_toml
    from tdkit.study.store import Store, set_aside
    from tdkit.study.trials import identity, plan_trials

    s = settings
    study = NamedStudy(s.recipe, s.recipe.data, s.source, s.data_root, s.adaptation)
    with waiting("opening the model and the data"), _told_how_to_make(s.recipe.model, s.named):
        workspace, loaded = study.open(open_registry())
        asked, plan = identity(workspace), plan_trials(workspace)
    for text in (*loaded.notes, *workspace.dataset.notes):
        note(text)
    moved = set_aside(s.folder) if s.fresh else None
    if moved is not None:
        note(f"the old run is now in {moved}")
    text = to_toml(workspace.recipe)
    with Store(s.folder, identity=asked, recipe=text, plan=plan) as store:
        results = _measure(workspace, store, pool, study, s.retry_failed)
    return results, workspace


@contextmanager
def _told_how_to_make(model: str, made: bool) -> Iterator[None]:
    """Say of a model file that a recipe names and that is not there how it is made."""
    try:
        yield
    except UnreadableFileError as error:
        if Path(model).suffix == "" or Path(model).exists() or not made:
            raise
        hint = "the head of the recipe says how to make it; or name another file with --model"
        raise UnreadableFileError(str(error), hint) from error


def _measure(
    workspace: Workspace,
    store: Store,
    pool: Pool | None,
    open: Callable[[], Workspace],
    retry_failed: bool,
) -> Results:
    from tdkit.cli.display import note, progress_bar
    from tdkit.cli.stopping import StoppedError
    from tdkit.study.running import run

    before = store.progress()
    if before.measured:
        note(f"going on: {before.measured} of {before.planned} were measured before")
    try:
        with progress_bar(f"measuring {before.planned} candidates", then="done") as progress:
            return run(
                workspace,
                store,
                pool=pool,
                open=open,
                retry_failed=retry_failed,
                progress=progress,
                note=note,
            )
    except StoppedError as stop:
        now = store.progress()
        stop.said = f"{now.measured} of {now.planned} measured; the same command goes on"
        raise


def _finish(
    results: Results, recipe: StudyRecipe, folder: Path, *, json: bool, no_report: bool
) -> None:
    """Draw the conclusions, write the report, and print the summary."""
    import numpy as np

    from tdkit.cli.common import file_json
    from tdkit.cli.display import note, say, stdout, waiting
    from tdkit.cli.report import print_summary
    from tdkit.study.report.analysis import analyse
    from tdkit.study.report.page import write_report

    failed = [m for m in results.measurements if m.failure is not None]
    if len(failed) == len(results.measurements):
        raise UnsupportedError(
            f"every candidate failed; the first one: {failed[0].failure}",
            "when that is mended: the same command with --retry-failed",
        )
    with waiting("drawing conclusions"):
        if no_report:
            analysis = analyse(results, recipe, rng=np.random.default_rng(recipe.seed))
        else:
            analysis = write_report(results, recipe, folder)
    report = None if no_report else folder / "report.html"
    if json:
        stdout().out(file_json(_summary(results, analysis, folder, report)), end="")
    else:
        print_summary(analysis)
        say(f"\nwrote {report}" if report else f"\nmeasurements are in {folder}")
    if failed:
        note(f"{len(failed)} of {results.planned} failed; --retry-failed measures them again")


def _summary(
    results: Results, analysis: Analysis, folder: Path, report: Path | None
) -> dict[str, Any]:
    return {
        "run": str(folder),
        "report": None if report is None else str(report),
        "planned": results.planned,
        "measured": len(results.measurements),
        "failed": sum(m.failure is not None for m in results.measurements),
        "analysis": _plain(analysis),
    }


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
