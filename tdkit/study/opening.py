"""Open a study that is named or made of objects, in this process or in another one."""

from __future__ import annotations

import hashlib
import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tdkit.errors import UnsupportedError
from tdkit.opening import Source, open_dataset, open_model, open_with_data, pick_device

if TYPE_CHECKING:
    from torch import nn

    from tdkit.checkpoint import LoadedModel
    from tdkit.datasets.base import Dataset
    from tdkit.decompositions.base import Decomposition
    from tdkit.hookspecs import DecompositionRecord
    from tdkit.layers.inventory import Layer
    from tdkit.registry import Registry
    from tdkit.study.recipe import StudyRecipe
    from tdkit.study.workspace import Workspace

# Input values in one batch of a study of large images, and the fewest images that are one.
_VALUES = 2**22


_SMALLEST_BATCH = 8


@dataclass(frozen=True)
class Adaptation:
    """What of a general recipe may be adapted to a model and its data.

    Attributes:
        splits: Splits that are not there give way to others.
        batches: Large images come in smaller batches, since a replay keeps what every module
            returned for a batch.
        methods: Methods that support none of the layers are left out, and where there are linear
            layers svd is added.
    """

    splits: bool = False
    batches: bool = False
    methods: bool = False


@dataclass(frozen=True)
class NamedStudy:
    """A study of what can be named; calling it opens it, in this process or in another one.

    Attributes:
        recipe: The study. What it says of its model and data is not used.
        data: The data set, ``NAME`` or ``NAME:PATH``.
        source: The model.
        data_root: Folder to look for data sets in first.
        adaptation: What of the recipe may be adapted; see :func:`make_workspace`.
        folder: Where relative paths start.

    Raises:
        UsageError: If the data are something else than a name.
    """

    recipe: StudyRecipe
    data: str
    source: Source
    data_root: Path | None = None
    adaptation: Adaptation = Adaptation()
    folder: Path = field(default_factory=Path.cwd)

    def __post_init__(self) -> None:
        from tdkit.study.recipe import require_name_of_data

        require_name_of_data(self.data)

    def __call__(self) -> Workspace:
        """Open the study.

        Raises:
            TdkitError: Of the kind that fits what is wrong with the model, the data or the recipe.
        """
        from tdkit.registry import load_registry

        return self.open(load_registry())[0]

    def open(self, registry: Registry) -> tuple[Workspace, LoadedModel]:
        """The study, and what its model file held.

        Args:
            registry: Everything that can be named.

        Raises:
            TdkitError: As for calling it.
        """
        source = replace(self.source, model=self._path(self.source.model))
        name, colon, path = self.data.partition(":")
        data = f"{name}{colon}{self._path(path)}" if path else self.data
        root = self.data_root and Path(self._path(str(self.data_root)))
        opened, dataset = open_with_data(source, registry, data, root)
        assert dataset is not None
        workspace = make_workspace(
            self.recipe,
            opened.model,
            dataset,
            registry,
            shape=opened.shape,
            adaptation=self.adaptation,
        )
        return workspace, opened.loaded

    def _path(self, text: str) -> str:
        """A path as it was meant in the folder where the study was named."""
        if Path.cwd() == self.folder or not (self.folder / text).exists():
            return text
        return str(self.folder / text)


@dataclass(frozen=True)
class ObjectStudy:
    """A study of a model or data that are objects of this process; others get a copy.

    Attributes:
        recipe: The study.
        digest: Tells one pickle from another.
        pickled: The model on its device and the data set.
        shape: The shape of one sample.
        adaptation: What of the recipe may be adapted; see :func:`make_workspace`.
    """

    recipe: StudyRecipe
    digest: str
    pickled: bytes = field(compare=False, repr=False)
    shape: tuple[int, ...] | None = None
    adaptation: Adaptation = Adaptation()

    @classmethod
    def of(
        cls, named: NamedStudy, model: nn.Module | str | Path, data: Dataset | str
    ) -> ObjectStudy:
        """Copy objects, and open what is only named.

        Args:
            named: The study, as far as it can be named.
            model: A module, or anything else where ``named`` names the model.
            data: A data set, or anything else where ``named`` names the data.

        Raises:
            UnsupportedError: If the model or the data cannot be pickled.
        """
        from torch import nn

        from tdkit.datasets.base import Dataset
        from tdkit.forward.copying import own_copy
        from tdkit.registry import load_registry

        registry, source = load_registry(), named.source
        shape = source.input_shape
        if isinstance(model, nn.Module):
            module = own_copy(model).to(pick_device(source.device))
        else:
            opened = open_model(source, registry)
            module, shape = opened.model, shape or opened.shape
        if not isinstance(data, Dataset):
            size = (shape[-2], shape[-1]) if shape is not None and len(shape) == 3 else None
            data = open_dataset(named.data, registry, named.data_root, size, source.seed)
        pickled = _pickled((module, data))
        digest = hashlib.sha256(pickled).hexdigest()
        return cls(named.recipe, digest, pickled, shape or data.input_shape, named.adaptation)

    def __call__(self) -> Workspace:
        """Open the study.

        Raises:
            UsageError: If a name is unknown, or a split or setting is not there.
            UnsupportedError: If the model does not run on the data.
        """
        from tdkit.registry import load_registry

        model, dataset = pickle.loads(self.pickled)  # what this class has pickled itself
        return make_workspace(
            self.recipe,
            model,
            dataset,
            load_registry(),
            shape=self.shape,
            adaptation=self.adaptation,
        )


def _pickled(value: object) -> bytes:
    from tdkit.errors import first_line

    try:
        return pickle.dumps(value)
    except Exception as error:  # a module may hold anything
        raise UnsupportedError(
            f"the model or the data cannot be copied: {first_line(error)}",
            "define its classes and functions in a module, not in a function or as a lambda",
        ) from error


def make_workspace(
    recipe: StudyRecipe,
    model: nn.Module,
    dataset: Dataset,
    registry: Registry,
    *,
    shape: Sequence[int] | None = None,
    adaptation: Adaptation = Adaptation(),
) -> Workspace:
    """Look up what a study names, and see that model, data and recipe fit each other.

    Args:
        recipe: The study.
        model: The plain model on its device; it is put in eval mode.
        dataset: The images.
        registry: Everything that can be named.
        shape: The shape of one sample; the data set's when None.
        adaptation: What of the recipe may be adapted.

    Raises:
        UsageError: If a name is unknown, or a split or setting is not there.
        UnsupportedError: If the model does not run on such samples.
    """
    from tdkit.datasets.base import kept_on
    from tdkit.forward.inputs import random_inputs
    from tdkit.forward.placement import device_of
    from tdkit.layers.inventory import find_layers
    from tdkit.registry import lookup
    from tdkit.study.layouts import set_layouts
    from tdkit.study.trials import check_data
    from tdkit.study.workspace import Workspace

    inputs = random_inputs(model, shape or dataset.input_shape).first_sample()
    layers = find_layers(
        model.eval(), inputs=inputs, patterns=recipe.layers, include_ends=bool(recipe.layers)
    )
    set_layouts(model, inputs)
    if adaptation.splits:
        recipe = _with_splits(recipe, dataset)
    if adaptation.batches:
        recipe = _with_batches(recipe, dataset)
    if adaptation.methods:
        recipe = _with_methods(recipe, layers, registry)
    device = device_of(model)
    if device.type != "cpu":
        dataset = kept_on(dataset, device)
    found = [lookup(registry.metrics, name, "metric") for name in recipe.metrics]
    metrics = tuple(record.create() for record in found)
    check_data(dataset, recipe, metrics)
    return Workspace(
        model=model,
        layers=tuple(layers),
        methods=_methods(recipe, registry),
        metrics=metrics,
        dataset=dataset,
        recipe=recipe,
        device=device,
        versions=registry.versions([*_method_records(recipe, registry).values(), *found]),
    )


def _method_records(recipe: StudyRecipe, registry: Registry) -> Mapping[str, DecompositionRecord]:
    from tdkit.registry import lookup

    return {name: lookup(registry.decompositions, name, "method") for name in recipe.methods}


def _methods(recipe: StudyRecipe, registry: Registry) -> Mapping[str, Decomposition]:
    """The methods by the name that the recipe gives them, with its settings."""
    from tdkit.decompositions.settings import create

    settings = {option.method: option.settings for option in recipe.options}
    return {
        name: create(record, settings.get(name, {}))
        for name, record in _method_records(recipe, registry).items()
    }


def _with_splits(recipe: StudyRecipe, dataset: Dataset) -> StudyRecipe:
    """Where a split is missing, the one that comes nearest to its purpose."""
    there = {name: getattr(dataset, name) for name in ("test", "validation", "train")}
    evaluation, features = recipe.evaluation, recipe.features
    if not there[evaluation.split]:
        first = next((name for name, split in there.items() if split), evaluation.split)
        evaluation = replace(evaluation, split=first)  # type: ignore[arg-type]
    if not there[features.split]:
        features = replace(features, split=evaluation.split)
    return replace(recipe, evaluation=evaluation, features=features)


def _with_batches(recipe: StudyRecipe, dataset: Dataset) -> StudyRecipe:
    most = max(_SMALLEST_BATCH, _VALUES // math.prod(dataset.input_shape))
    evaluation, features = (
        replace(images, batch_size=min(images.batch_size, most))
        for images in (recipe.evaluation, recipe.features)
    )
    return replace(recipe, evaluation=evaluation, features=features)


def _with_methods(recipe: StudyRecipe, layers: Sequence[Layer], registry: Registry) -> StudyRecipe:
    specs = [layer.spec for layer in layers if layer.reason is None and layer.spec is not None]
    linear = any(spec.kind == "Linear" for spec in specs)
    names = list(dict.fromkeys([*recipe.methods, *(["svd"] if linear else [])]))
    from tdkit.decompositions.base import unsupported

    methods = _methods(replace(recipe, methods=tuple(names)), registry)
    useful = tuple(
        name
        for name, method in methods.items()
        if any(unsupported(method, spec) is None for spec in specs)
    )
    # With no useful method the study refuses the layers or the methods in its own words.
    return replace(recipe, methods=useful or recipe.methods)
