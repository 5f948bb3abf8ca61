"""``tdkit train``: train a registered model by a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from tdkit.cli import options
from tdkit.errors import UnreadableFileError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import nn

    from tdkit.datasets.base import Dataset
    from tdkit.recipes import TrainRecipe
    from tdkit.training import Epoch, Evaluation, TrainingResult, TrainingState


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file in TOML.")],
    output: Annotated[
        Optional[Path],  # noqa: UP045 - typer reads the annotation at run time on 3.10
        typer.Option("--output", "-o", help="Where the weights go; as in the recipe if unset."),
    ] = None,
    resume: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Written after every epoch; where it exists, training goes on from it."),
    ] = None,
    data_root: options.DataRoot = None,
    device: options.Device = "auto",
    force: options.Force = False,
) -> None:
    """Train a model, and write its best weights with a JSON file on how they were made.

    Example: `tdkit train recipes/garipov-fashion-mnist.toml`
    """
    import torch

    from tdkit.cli.common import open_dataset, open_registry, pick_device
    from tdkit.recipes import TrainRecipe, load_recipe
    from tdkit.registry import lookup
    from tdkit.training import evaluate, initial_model
    from tdkit.training import train as fit

    settings = load_recipe(recipe, TrainRecipe)
    target = pick_device(device)
    path = _writable(output or Path(settings.output), recipe, force)
    registry = open_registry()
    record = lookup(registry.models, settings.model, "model")
    height, width = record.input_shape[-2:]
    dataset = open_dataset(settings.data, registry, data_root, (height, width), settings.seed)
    model = initial_model(record, dataset, settings.seed)
    result = fit(
        model,
        dataset,
        settings,
        device=target,
        generator=torch.Generator().manual_seed(settings.seed),
        on_epoch=_reporter(settings, resume),
        state=_read_state(resume, settings),
    )
    test = evaluate(model, dataset.test, device=target) if dataset.test else None
    provenance = _provenance(recipe, settings, dataset, target, result, test)
    _write(path, model.cpu(), record.name, dataset, provenance, recipe, force)


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
    )
    notes = path.with_suffix(".json")
    with atomic_write(notes, force=force, inputs=[recipe]) as temporary:
        temporary.write_text(file_json(provenance), encoding="utf-8")
    if provenance["test_accuracy"] is not None:
        images, accuracy = provenance["test_images"], 100 * provenance["test_accuracy"]
        stdout().print(f"accuracy on {images:,} test images: {accuracy:.2f} %")
    stdout().print(f"wrote {path} and {notes}", soft_wrap=True)


def _reporter(recipe: TrainRecipe, resume: Path | None) -> Callable[[Epoch, TrainingState], None]:
    """Print one line per epoch, and keep the state when there is a place for it."""
    import torch

    from tdkit.checkpoint import atomic_write
    from tdkit.cli.display import stdout

    def report(epoch: Epoch, state: TrainingState) -> None:
        seconds = [line["seconds"] for line in state["history"]]
        left = (recipe.epochs - epoch.number) * sum(seconds) / len(seconds)
        stdout().print(
            f"epoch {epoch.number:3}/{recipe.epochs}  loss {epoch.loss:.4f}  "
            f"validation {100 * epoch.validation_accuracy:.2f} %  "
            f"{epoch.seconds:.0f} s, {left / 60:.0f} min left"
        )
        if resume is not None:
            with atomic_write(resume, force=True, inputs=[]) as temporary:
                torch.save({"recipe": repr(recipe), "state": state}, temporary)

    return report


def _read_state(resume: Path | None, recipe: TrainRecipe) -> TrainingState | None:
    import torch

    if resume is None or not resume.exists():
        return None
    try:
        saved: dict[str, Any] = torch.load(resume, weights_only=True)
        made_by, state = saved["recipe"], saved["state"]
    except Exception as error:  # torch raises a different error for every kind of damage
        raise UnreadableFileError(
            f"{resume} is not a state that tdkit train wrote", "Remove it, or leave out --resume."
        ) from error
    if made_by != repr(recipe):
        raise UsageError(
            f"{resume} belongs to another recipe, or to an earlier version of this one",
            "Remove it, or name another file with --resume.",
        )
    result: TrainingState = state
    return result


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

    from tdkit import __version__

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
