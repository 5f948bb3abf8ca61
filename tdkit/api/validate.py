"""``tdkit.validate``: how far can the approximation error be trusted?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from tdkit import defaults
from tdkit.api.report import Study, conclude
from tdkit.errors import UnreadableFileError, UnsupportedError, UsageError, noted, option
from tdkit.progress import Progress, listening
from tdkit.recipes import find_recipe, load_recipe
from tdkit.study.recipe import StudyRecipe, adapted, bundled_recipe, own_study

if TYPE_CHECKING:
    from torch import nn

    from tdkit.api.compress import Settings
    from tdkit.datasets.base import Dataset
    from tdkit.study.opening import Adaptation, NamedStudy, ObjectStudy
    from tdkit.study.records import Results
    from tdkit.study.running import Pool
    from tdkit.study.store import Store
    from tdkit.study.workspace import Workspace

_RUNS = Path("runs")


def validate(
    model: nn.Module | str | Path | None = None,
    data: Dataset | str | None = None,
    *,
    recipe: StudyRecipe | str | Path | None = None,
    run: str | Path | None = None,
    layers: str | Sequence[str] | None = None,
    methods: str | Sequence[str] | None = None,
    settings: Settings | None = None,
    keeps: float | Sequence[float] | None = None,
    images: int | None = None,
    runs: int | None = None,
    no_finetune: bool = False,
    fresh: bool = False,
    retry_failed: bool = False,
    workers: int = 0,
    dask: str | None = None,
    batch_size: int | None = None,
    arch: str | None = None,
    weights: str | None = None,
    allow_classes: str | Sequence[str] = (),
    unsafe_load: bool = False,
    input_shape: str | Sequence[int] | None = None,
    data_root: str | Path | None = None,
    device: str = defaults.DEVICE,
    report: bool = False,
    progress: Progress | bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> Study:
    """Measure every candidate's real performance error: how far can the proxy be trusted?

    Example::

        study = tdkit.validate(model, "image-folder:val/", run="runs/mine")
        print(study)

    Args:
        model: A trained model, which stays as it is, a model file, or a registered name; the
            recipe's if None.
        data: Images: a :class:`~tdkit.datasets.base.Dataset`, or ``NAME`` or ``NAME:PATH``; the
            recipe's if None.
        recipe: A study to follow but for what is said here: a record, a file in TOML, or the name
            of one in the folder recipes or of tdkit's own; the bundled quick one by default, with
            the methods that suit the model.
        run: The folder that measurements are kept in, where an interrupted study goes on; when
            None, one that is removed at the end, or ``auto`` for one in ``runs``.
        layers: Names or shell patterns.
        methods: Names of decompositions.
        settings: Of methods: ``{"cp": {"sweeps": 20}}``, over those of the recipe.
        keeps: Fractions of a layer's parameters.
        images: Measure the performance error on at most this many.
        runs: Repetitions of what is random.
        no_finetune: Measure before fine-tuning only; the same call without this goes on.
        fresh: Move an old run folder aside and start anew.
        retry_failed: Measure again what has failed.
        workers: Measure in so many processes of their own; in this one when 0. As always with
            processes, a script then needs ``if __name__ == "__main__":``.
        dask: Measure on a Dask cluster, such as ``tcp://host:8786``.
        batch_size: Images per forward pass; changes memory, not results.
        arch: The architecture of a state_dict; see :func:`tdkit.load`.
        weights: Weights of a registered model.
        allow_classes: Classes of yours that the file may hold.
        unsafe_load: Run whatever code the file holds.
        input_shape: The shape of one sample, where the data set's is another.
        data_root: Folder to look for data sets in first.
        device: ``cpu``, ``cuda`` or ``auto``.
        report: Write the report into the run folder.
        progress: A callback, or True for a bar.
        note: Called with what the user should know while it runs.

    Returns:
        Everything that was measured, and the conclusions.

    Raises:
        TdkitError: Of the kind that fits what is wrong with the model, the data or an option, or
            if the folder holds another study.
    """
    # The recipe first: what is wrong with its name or text is told before torch is imported.
    asked = _asked(recipe, model, data)

    from tdkit import arguments
    from tdkit.decompositions.settings import by_method
    from tdkit.study.opening import NamedStudy, ObjectStudy

    pool = _pool(workers, dask)
    wanted = adapted(
        asked.recipe,
        layers=None if layers is None else arguments.names(layers, "layers"),
        methods=None if methods is None else arguments.methods(methods),
        keeps=None if keeps is None else arguments.keeps(keeps),
        images=images,
        runs=runs,
        settings=by_method(settings),
    )
    wanted = _batched(replace(wanted, finetune=None) if no_finetune else wanted, batch_size)
    adaptation = _adaptation(asked, batch_size, methods)
    source = _source(wanted, arch, weights, allow_classes, unsafe_load, input_shape, device, model)
    root = None if data_root is None else Path(data_root)
    named = NamedStudy(wanted, _name_of_data(wanted, data), source, root, adaptation)
    objects = _is_object(model) or _is_object(data)
    study = ObjectStudy.of(named, model or wanted.model, data or wanted.data) if objects else named
    with TemporaryDirectory() as nowhere, listening(progress) as update:
        folder = _folder(run, asked.folder, nowhere)
        results, workspace = _run(
            study, folder, pool, fresh, retry_failed, model is None, update, note
        )
        kept = None if run is None else folder
        update("drawing conclusions", 0, 0)
        concluded = conclude(results, workspace.recipe, kept, write=report and kept is not None)
        update("drawing conclusions", 1, 1)
    return concluded


@dataclass(frozen=True)
class _Asked:
    """A recipe as the user named it, the name of its run folder, and what of it may be changed."""

    recipe: StudyRecipe
    folder: Path
    splits: bool = False
    batches: bool = False
    methods: bool = False


def _asked(recipe: Any, model: Any, data: Any) -> _Asked:
    """The recipe, quick by default; with a model of the user's a study of that."""
    if recipe is not None:
        return _by_recipe(recipe, model, data)
    base = bundled_recipe()
    shown = None if data is None else _shown(data)
    if model is not None:
        if shown is None:
            raise UsageError(
                f"{option('model')} needs images to measure it on",
                f"name some with {option('data', 'image-folder:PATH')}",
            )
        name = _title(model)
        own = own_study(base, _shown(model), shown, f"{name} on {shown}")
        return _Asked(own, _RUNS / name, splits=True, batches=True, methods=True)
    if shown is not None:
        named = replace(base, data=shown, title=f"{base.model} on {shown}")
        folder = _RUNS / f"quick-{shown.partition(':')[0]}"
        return _Asked(named, folder, splits=True, batches=True)
    return _Asked(base, _RUNS / "quick")


def _by_recipe(recipe: Any, model: Any, data: Any) -> _Asked:
    if isinstance(recipe, StudyRecipe):
        found, stem = recipe, "study"
    else:
        path = find_recipe(str(recipe))
        found, stem = load_recipe(path, StudyRecipe), path.stem
    if model is None and data is None:
        return _Asked(found, _RUNS / stem)
    if isinstance(recipe, StudyRecipe):
        # A record is the caller's own: what it says of candidates is meant for this model.
        return _Asked(found, _RUNS / stem)
    # Where numbers come from, and the paper's values, are about what the recipe names.
    shown = found.data if data is None else _shown(data)
    found = replace(found, data=shown, notes=(), published=())
    if model is not None:
        found = replace(found, model=_shown(model), weights=None)
    name = Path(found.model).stem if model is None else _title(model)
    title = f"{name} on {found.data}, by the recipe {stem}"
    folder = _RUNS / f"{stem}-{name}-{found.data.partition(':')[0]}"
    return _Asked(replace(found, title=title), folder)


def _is_object(value: Any) -> bool:
    return value is not None and not isinstance(value, str | Path)


def _shown(value: Any) -> str:
    """What stands for a model or data in a recipe."""
    if isinstance(value, str | Path):
        return str(value)
    return str(getattr(value, "name", type(value).__name__))


def _title(model: Any) -> str:
    return Path(model).stem if isinstance(model, str | Path) else type(model).__name__


def _name_of_data(recipe: StudyRecipe, data: Any) -> Any:
    if data is None:
        return recipe.data
    if isinstance(data, str | Path):
        # A record, unlike a file, does not take it over.
        return str(data)
    from tdkit.datasets.base import Dataset

    return recipe.data if isinstance(data, Dataset) else data


def _source(
    recipe: StudyRecipe,
    arch: str | None,
    weights: str | None,
    allow_classes: str | Sequence[str],
    unsafe_load: bool,
    input_shape: str | Sequence[int] | None,
    device: str,
    model: Any,
) -> Any:
    from tdkit import arguments
    from tdkit.opening import Source

    return Source(
        str(model) if isinstance(model, str | Path) else recipe.model,
        arch,
        weights or recipe.weights,
        arguments.names(allow_classes, "allow_classes"),
        unsafe_load,
        None if input_shape is None else arguments.shape(input_shape),
        device,
    )


def _adaptation(asked: _Asked, batch_size: int | None, methods: object) -> Adaptation:
    from tdkit.study.opening import Adaptation

    return Adaptation(
        splits=asked.splits,
        batches=asked.batches and batch_size is None,
        methods=asked.methods and methods is None,
    )


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
            raise UsageError(
                f"{option('workers')} and {option('dask')} exclude each other",
                "leave one of them out",
            )
        return dask(address)
    return processes(workers) if workers else None


def _folder(run: str | Path | None, default: Path, nowhere: str) -> Path:
    if run is None:
        return Path(nowhere) / "run"
    return default if str(run) == "auto" else Path(run)


def _run(
    study: NamedStudy | ObjectStudy,
    folder: Path,
    pool: Pool | None,
    fresh: bool,
    retry_failed: bool,
    made: bool,
    update: Progress,
    note: Callable[[str], None],
) -> tuple[Results, Workspace]:
    """Open the study, and measure what its run folder lacks."""
    from tdkit.study.opening import NamedStudy
    from tdkit.study.recipe import to_toml
    from tdkit.study.store import Store, set_aside
    from tdkit.study.trials import identity, plan_trials

    update("opening the model and the data", 0, 0)
    if isinstance(study, NamedStudy):
        from tdkit.registry import load_registry

        with _told_how_to_make(study.recipe.model, made):
            workspace, loaded = study.open(load_registry())
        notes = (*loaded.notes, *workspace.dataset.notes)
    else:
        workspace = study()
        notes = workspace.dataset.notes
    asked, plan = identity(workspace), plan_trials(workspace)
    update("opening the model and the data", 1, 1)
    for text in notes:
        note(text)
    moved = set_aside(folder) if fresh else None
    if moved is not None:
        note(f"the old run is now in {moved}")
    text = to_toml(workspace.recipe)
    with Store(folder, identity=asked, recipe=text, plan=plan) as store:
        results = _measure(workspace, store, pool, study, retry_failed, update, note)
    failed = [m for m in results.measurements if m.failure is not None]
    if results.measurements and len(failed) == len(results.measurements):
        again = option("retry_failed", True)
        raise UnsupportedError(
            f"every candidate failed; the first one: {failed[0].failure}",
            f"when that is mended: the same again with {again}",
        )
    return results, workspace


def _measure(
    workspace: Workspace,
    store: Store,
    pool: Pool | None,
    open: Callable[[], Workspace],
    retry_failed: bool,
    update: Progress,
    note: Callable[[str], None],
) -> Results:
    from tdkit.study.running import run

    before = store.progress()
    if before.measured:
        note(f"going on: {before.measured} of {before.planned} were measured before")
    title = f"measuring {before.planned} candidates"
    try:
        return run(
            workspace,
            store,
            pool=pool,
            open=open,
            retry_failed=retry_failed,
            progress=lambda done, total: update(title, done, total),
            note=note,
        )
    except BaseException as stop:
        now = store.progress()
        noted(stop, f"{now.measured} of {now.planned} measured")
        raise


@contextmanager
def _told_how_to_make(model: str, made: bool) -> Iterator[None]:
    """Say of a model file that a recipe names and that is not there how it is made."""
    try:
        yield
    except UnreadableFileError as error:
        if Path(model).suffix == "" or Path(model).exists() or not made:
            raise
        hint = "the head of the recipe says how to make it; or name another file with"
        raise UnreadableFileError(str(error), f"{hint} {option('model')}") from error
