"""``tdkit.train``: train a registered model by a recipe."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdkit import defaults
from tdkit.errors import UsageError
from tdkit.files import atomic_write, check_writable
from tdkit.progress import Progress, listening
from tdkit.recipes import find_recipe, load_recipe
from tdkit.tables import Table, number
from tdkit.training.recipe import TrainRecipe

if TYPE_CHECKING:
    import torch
    from torch import nn

    from tdkit.datasets.base import Dataset
    from tdkit.training.loop import Evaluation, TrainingResult


@dataclass(frozen=True, eq=False)
class Trained:
    """A model that was trained.

    Attributes:
        model: The model, with the weights that validated best.
        weights: The file that they were written to.
        provenance: How they were made, as JSON values, written beside them.
    """

    model: nn.Module
    weights: Path
    provenance: Mapping[str, Any]

    @property
    def notes_file(self) -> Path:
        """The JSON file beside the weights."""
        return self.weights.with_suffix(".json")

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def table(self) -> Table:
        """The best validation accuracy, and that on the test split where it is known."""
        rows = [("validation", _percent(max(self.provenance["validation_accuracy"])))]
        if self.provenance["test_accuracy"] is not None:
            name = f"test ({number(self.provenance['test_images'])} images)"
            rows.append((name, _percent(self.provenance["test_accuracy"])))
        return Table(("", "accuracy"), tuple(rows), frozenset(["accuracy"]))

    def lines(self) -> list[str]:
        """What ``tdkit train`` prints."""
        lines = [f"wrote {self.weights} and {self.notes_file}"]
        if self.provenance["test_accuracy"] is not None:
            images = f"{self.provenance['test_images']:,} test images"
            accuracy = _percent(self.provenance["test_accuracy"])
            lines.insert(0, f"accuracy on {images}: {accuracy}")
        return lines


def train(
    recipe: str | Path,
    *,
    output: str | Path | None = None,
    resume: str | Path | None = None,
    data_root: str | Path | None = None,
    device: str = defaults.DEVICE,
    force: bool = False,
    progress: Progress | bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Trained:
    """Train a model, and write its best weights with a JSON file on how they were made.

    Args:
        recipe: A recipe file in TOML, or the name of one in the folder recipes or, if that has
            none, of one that comes with tdkit.
        output: Where the weights go, ending in ``.safetensors``; as in the recipe if None.
        resume: Written after every epoch; where it exists, training goes on from it.
        data_root: Folder to look for data sets in first.
        device: ``cpu``, ``cuda`` or ``auto``.
        force: Replace existing files.
        progress: A callback, or True for a bar.
        say: Called with the line of every epoch.

    Raises:
        UsageError: If the recipe or an option is wrong.
        StorageError: If a file cannot be written.
        TdkitError: If the training diverges, or of the kind that fits what is wrong with a file.
    """
    # What is wrong with the recipe's name or text is told before torch is imported.
    file = find_recipe(str(recipe))
    settings = load_recipe(file, TrainRecipe)

    from tdkit.forward.placement import on_cpu
    from tdkit.opening import open_dataset, pick_device
    from tdkit.registry import load_registry, lookup
    from tdkit.training.finetuning import fit
    from tdkit.training.loop import evaluate, initial_model
    from tdkit.training.resume import Resume

    target = pick_device(device)
    path = _writable(Path(output or settings.output), file, force)
    if resume is not None:
        check_writable(Path(resume), force=True, inputs=[file])
    registry = load_registry()
    record = lookup(registry.models, settings.model, "model")
    height, width = record.input_shape[-2:]
    root = None if data_root is None else Path(data_root)
    dataset = open_dataset(settings.data, registry, root, (height, width), settings.seed)
    model = initial_model(record, dataset, settings.seed)
    made_by = {"recipe": repr(settings), "data set": dataset.fingerprint}
    with listening(progress) as update:
        result = fit(
            model,
            dataset,
            settings,
            device=target,
            seed=settings.seed,
            resume=None if resume is None else Resume(Path(resume), made_by),
            progress=update,
            say=say,
        )
    test = evaluate(model, dataset.test, device=target) if dataset.test else None
    provenance = _provenance(file, settings, dataset, target, result, test)
    with on_cpu(model):
        _write(path, model, record.name, dataset, provenance, file, force)
    return Trained(model, path, provenance)


def _writable(path: Path, recipe: Path, force: bool) -> Path:
    """Refuse before the training what could not be written after it."""
    if path.suffix != ".safetensors":
        raise UsageError(f"{path} does not end in .safetensors", "Weights are written as such.")
    for file in (path, path.with_suffix(".json")):
        check_writable(file, force=force, inputs=[recipe])
    return path


def _write(
    path: Path,
    model: nn.Module,
    arch: str,
    dataset: Dataset,
    provenance: Mapping[str, Any],
    recipe: Path,
    force: bool,
) -> None:
    from tdkit.checkpoint import save_model

    classes = {"in_channels": dataset.input_shape[0], "num_classes": len(dataset.classes)}
    save_model(
        model,
        path,
        format="safetensors",
        force=force,
        inputs=[recipe],
        arch=arch,
        input_shape=dataset.input_shape,
        arch_options=classes,
        training={"recipe": provenance["recipe"]},
    )
    with atomic_write(path.with_suffix(".json"), force=force, inputs=[recipe]) as temporary:
        temporary.write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")


def _provenance(
    recipe_file: Path,
    recipe: TrainRecipe,
    dataset: Dataset,
    device: torch.device,
    result: TrainingResult,
    test: Evaluation | None,
) -> dict[str, Any]:
    import platform

    import torch

    from tdkit.version import __version__

    return {
        "recipe": recipe_file.read_text(encoding="utf-8"),
        "model": recipe.model,
        "data": recipe.data,
        "data_fingerprint": dataset.fingerprint,
        "mean": dataset.mean,
        "std": dataset.std,
        "seed": recipe.seed,
        "tdkit": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "seconds": round(sum(epoch.seconds for epoch in result.history), 1),
        "validation_accuracy": [epoch.validation_accuracy for epoch in result.history],
        "test_accuracy": None if test is None else test.accuracy,
        "test_images": None if test is None else len(test.correct),
    }


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
