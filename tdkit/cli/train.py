"""``tdkit train``: train a registered model by a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from tdkit.cli import options
from tdkit.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from tdkit.datasets.base import Dataset
    from tdkit.training.loop import Evaluation, TrainingResult
    from tdkit.training.recipe import TrainRecipe


def train(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="A recipe file in TOML, or the name of one in recipes/ or, if that has none, "
            "of one that comes with tdkit.",
        ),
    ],
    output: Annotated[
        Optional[Path],  # noqa: UP045 - typer reads the annotation at run time on 3.10
        typer.Option("--output", "-o", help="Where the weights go; as in the recipe if unset."),
    ] = None,
    resume: options.Resume = None,
    data_root: options.DataRoot = None,
    device: options.Device = "auto",
    force: options.Force = False,
) -> None:
    """Train a model, and write its best weights with a JSON file on how they were made.

    Example: `tdkit train garipov-fashion-mnist`
    """
    from tdkit.recipes import find_recipe, load_recipe
    from tdkit.training.recipe import TrainRecipe

    # What is wrong with the recipe's name or text is told before torch is imported.
    file = find_recipe(recipe)
    settings = load_recipe(file, TrainRecipe)

    from tdkit.cli.common import open_dataset, open_registry, pick_device
    from tdkit.cli.display import say
    from tdkit.cli.fitting import check_place, fit
    from tdkit.registry import lookup
    from tdkit.training.loop import evaluate, initial_model
    from tdkit.training.resume import Resume

    target = pick_device(device)
    path = _writable(output or Path(settings.output), file, force)
    if resume is not None:
        check_place(resume, inputs=[file])
    registry = open_registry()
    record = lookup(registry.models, settings.model, "model")
    height, width = record.input_shape[-2:]
    dataset = open_dataset(settings.data, registry, data_root, (height, width), settings.seed)
    model = initial_model(record, dataset, settings.seed)
    made_by = {"recipe": repr(settings), "data set": dataset.fingerprint}
    result = fit(
        model,
        dataset,
        settings,
        device=target,
        seed=settings.seed,
        resume=None if resume is None else Resume(resume, made_by),
        say=say,
    )
    test = evaluate(model, dataset.test, device=target) if dataset.test else None
    provenance = _provenance(file, settings, dataset, target, result, test)
    _write(path, model.cpu(), record.name, dataset, provenance, file, force)


def _writable(path: Path, recipe: Path, force: bool) -> Path:
    """Refuse before the training what could not be written after it."""
    from tdkit.checkpoint import check_writable

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
    provenance: dict[str, Any],
    recipe: Path,
    force: bool,
) -> None:
    from tdkit.checkpoint import atomic_write, save_model
    from tdkit.cli.common import file_json
    from tdkit.cli.display import stdout

    options = {"in_channels": dataset.input_shape[0], "num_classes": len(dataset.classes)}
    save_model(
        model,
        path,
        format="safetensors",
        force=force,
        inputs=[recipe],
        arch=arch,
        input_shape=dataset.input_shape,
        arch_options=options,
        training={"recipe": provenance["recipe"]},
    )
    notes = path.with_suffix(".json")
    with atomic_write(notes, force=force, inputs=[recipe]) as temporary:
        temporary.write_text(file_json(provenance), encoding="utf-8")
    if provenance["test_accuracy"] is not None:
        images, accuracy = provenance["test_images"], 100 * provenance["test_accuracy"]
        stdout().print(f"accuracy on {images:,} test images: {accuracy:.2f} %")
    stdout().print(f"wrote {path} and {notes}", soft_wrap=True)


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
