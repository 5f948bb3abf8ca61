"""tdkit as a library: names in, models out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tdkit import arguments
from tdkit.calibration.batchnorm import Calibration
from tdkit.compression.compress import Goal, apply_plan, compress_model
from tdkit.compression.plan import Plan
from tdkit.compression.scoring import COMPRESSION_KEEPS, Grid
from tdkit.costs.base import Cost
from tdkit.datasets.base import Dataset
from tdkit.errors import UnsupportedError
from tdkit.forward.copying import require_module
from tdkit.forward.inputs import random_inputs
from tdkit.opening import Source
from tdkit.registry import load_registry, lookup
from tdkit.study.opening import NamedStudy, ObjectStudy, Suit

if TYPE_CHECKING:
    from tdkit.study.recipe import StudyRecipe
    from tdkit.study.records import Results
from tdkit.registry import method_limits, resolve_methods, resolve_stages


def compress(
    model: nn.Module,
    budget: float = 0.5,
    *,
    cost: Cost = "params",
    methods: str | Sequence[str] | None = None,
    metric: str = "relative-weights",
    planner: str = "greedy",
    calibration: Calibration = "noise",
    keeps: float | Sequence[float] = COMPRESSION_KEEPS,
    layers: str | Sequence[str] = (),
    include_ends: bool = False,
    input_shape: Sequence[int] | None = None,
    example_inputs: Tensor | Sequence[Any] | None = None,
    data: Tensor | Sequence[Tensor | Sequence[Any]] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[nn.Module, Plan]:
    """Compress a trained model without touching it.

    Example::

        small, plan = tdkit.compress(model, budget=0.5, input_shape=(3, 224, 224))

    Args:
        model: A trained model.
        budget: The fraction of the whole model's cost that may remain, in (0, 1].
        cost: ``params`` or ``macs``; MACs need ``input_shape`` or ``example_inputs``.
        methods: Names of decompositions; by default each at the keeps where it is fast.
        metric: The error whose squares, summed over layers, are kept small. Feature metrics need
            ``data``.
        planner: The name of the planner.
        calibration: What BatchNorm is fitted to the compressed layers on: ``noise`` images,
            ``data``, or ``none``.
        keeps: Fractions of a layer's parameters to consider.
        layers: Shell patterns of layer names; all by default.
        include_ends: Consider the first and the last layer too.
        input_shape: The shape of one sample, without the batch axis. With it, or with
            ``example_inputs``, the result is verified by a forward pass.
        example_inputs: Arguments of a forward pass, for models that take other things than one
            tensor of floats; a single tensor may stand for itself.
        data: Batches of model inputs, for feature metrics and to calibrate on: tensors, or
            sequences of arguments; a single tensor is one batch. The first one also serves where
            neither a shape nor example inputs are given.
        seed: Seeds every random start.
        progress: Called with the units of scoring done and all units.

    Returns:
        The compressed copy, of ordinary torch layers, and the plan that it carries. Layers that
        break the model when replaced stay dense.

    Raises:
        UsageError: If an option is wrong or the budget is out of reach.
        UnsupportedError: If the model cannot be copied, run or compressed.
    """
    require_module(model)
    batches = arguments.batches(data)
    wanted = None if methods is None else arguments.methods(methods)
    registry = load_registry()
    record = lookup(registry.metrics, metric, "metric")
    grid = Grid(
        resolve_methods(registry, wanted),
        [record.create()],
        arguments.keeps(keeps),
        "best",
        arguments.seed(seed),
        method_limits(registry, wanted),
    )
    result = compress_model(
        model,
        grid,
        Goal(budget, cost, record.name, planner, calibration),
        lookup(registry.planners, planner, "planner").create(),
        inputs=_inputs(model, input_shape, example_inputs, batches),
        batches=batches,
        calibration=batches,
        patterns=arguments.names(layers, "layers"),
        keep_ends=not include_ends,
        progress=progress,
    )
    return result.model, result.plan


def apply(
    plan: Plan | str | Path,
    model: nn.Module,
    *,
    input_shape: Sequence[int] | None = None,
    example_inputs: Tensor | Sequence[Any] | None = None,
    data: Tensor | Sequence[Tensor | Sequence[Any]] | None = None,
) -> nn.Module:
    """Apply a plan to a dense model, which stays as it is.

    Args:
        plan: From :func:`compress`, written by hand, or the path of a plan file.
        model: The dense model.
        input_shape: The shape of one sample; with it the result is verified.
        example_inputs: See :func:`compress`.
        data: Batches of model inputs, for a plan that is calibrated on data.

    Raises:
        UnreadableFileError: If the plan file is missing or not JSON.
        UsageError: If the plan does not fit the model.
        UnsupportedError: If a layer cannot be decomposed, or breaks the model when replaced.
    """
    wanted, batches = arguments.plan(plan), arguments.batches(data)
    require_module(model)
    methods = resolve_methods(load_registry(), sorted({move.method for move in wanted.moves}))
    inputs = _inputs(model, input_shape, example_inputs, batches)
    result = apply_plan(model, wanted, methods, inputs=inputs, calibration=batches)
    for name, reason in result.put_back.items():
        raise UnsupportedError(
            f"the layer {name!r} cannot be replaced: {reason}", "take it out of the plan"
        )
    return result.model


def load(
    source: str | Path,
    *,
    arch: str | None = None,
    model: nn.Module | None = None,
    allow_classes: str | Sequence[str] = (),
) -> nn.Module:
    """Read a model file safely, also one that tdkit wrote as a state_dict.

    Args:
        source: The file, or a registered name.
        arch: The architecture of a state_dict: a registered name or ``package.module:callable``.
        model: Instead of ``arch``, an instance of the dense architecture; it is changed in place.
        allow_classes: Classes of yours that the file may hold, each ``package.module:Class``.

    Raises:
        TdkitError: Of the kind that fits what is wrong with the file.
    """
    from tdkit.checkpoint import load_into, load_model

    file, allowed = arguments.source(source), arguments.names(allow_classes, "allow_classes")
    registry = load_registry()
    stages = resolve_stages(registry)
    if model is not None:
        require_module(model)
        return load_into(model, file, stages=stages).model
    models = registry.models
    return load_model(file, models=models, stages=stages, arch=arch, allow_classes=allowed).model


def validate(
    model: nn.Module | str | Path,
    data: Dataset | str,
    *,
    recipe: StudyRecipe | None = None,
    run: str | Path | None = None,
    layers: str | Sequence[str] | None = None,
    methods: str | Sequence[str] | None = None,
    keeps: float | Sequence[float] | None = None,
    images: int | None = None,
    runs: int | None = None,
    arch: str | None = None,
    input_shape: Sequence[int] | None = None,
    device: str = "auto",
    workers: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Results:
    """Measure every candidate's real performance error: how far can the proxy be trusted?

    Example::

        results = tdkit.validate(model, "image-folder:val/", run="runs/mine")

    Args:
        model: A trained model, which stays as it is, a model file, or a registered name.
        data: Images: a :class:`~tdkit.datasets.base.Dataset`, or ``NAME`` or ``NAME:PATH``.
        recipe: A study to follow but for what is said here; the bundled quick one by default,
            with the methods that suit the model.
        run: The folder that measurements are kept in, where an interrupted study goes on; when
            None, one that is removed at the end.
        layers: Names or shell patterns.
        methods: Names of decompositions.
        keeps: Fractions of a layer's parameters.
        images: Measure the performance error on at most this many.
        runs: Repetitions of what is random.
        arch: The architecture of a state_dict; see :func:`load`.
        input_shape: The shape of one sample, where the data set's is another.
        device: ``cpu``, ``cuda`` or ``auto``.
        workers: Measure in so many processes of their own; in this one when 0. As always with
            processes, a script then needs ``if __name__ == "__main__":``.
        progress: Called with the effort done and the whole effort.

    Returns:
        Everything that was measured, for :func:`tdkit.study.report.analysis.analyse` and
        :func:`tdkit.study.report.page.write_report`.

    Raises:
        TdkitError: Of the kind that fits what is wrong with the model, the data or an option, or
            if the folder holds another study.
    """
    from tdkit.study.recipe import adapted, bundled_recipe, own_study, to_toml
    from tdkit.study.running import processes
    from tdkit.study.running import run as run_study
    from tdkit.study.store import Store
    from tdkit.study.trials import identity, plan_trials

    name = type(model).__name__ if isinstance(model, nn.Module) else str(model)
    shown = data.name if isinstance(data, Dataset) else data
    base = recipe or own_study(bundled_recipe(), name, shown, f"{name} on {shown}")
    wanted = adapted(
        base,
        layers=None if layers is None else arguments.names(layers, "layers"),
        methods=None if methods is None else arguments.methods(methods),
        keeps=None if keeps is None else arguments.keeps(keeps),
        images=images,
        runs=runs,
    )
    own = recipe is None
    suit = Suit(splits=own, batches=own, methods=own and methods is None)
    shape = None if input_shape is None else ",".join(map(str, arguments.shape(input_shape)))
    source = Source(name, arch=arch, input_shape=shape, device=device)
    named = NamedStudy(wanted, shown, source, suit=suit)
    objects = isinstance(model, nn.Module) or isinstance(data, Dataset)
    study = ObjectStudy.of(named, model, data) if objects else named
    workspace = study()
    with TemporaryDirectory() as nowhere:
        folder = Path(nowhere if run is None else run)
        asked, plan = identity(workspace), plan_trials(workspace)
        with Store(folder, identity=asked, recipe=to_toml(workspace.recipe), plan=plan) as store:
            pool = processes(workers) if workers else None
            return run_study(workspace, store, pool=pool, open=study, progress=progress)


def _inputs(
    model: nn.Module,
    shape: Sequence[int] | None,
    example: Tensor | Sequence[Any] | None,
    batches: Sequence[Tensor | Sequence[Any]],
) -> Sequence[Any] | None:
    """Arguments of a forward pass from whatever tells them."""
    if example is not None:
        return arguments.example(example)
    if shape is not None:
        return random_inputs(model, arguments.shape(shape))
    return arguments.example(batches[0]) if batches else None
