"""Fine-tuning one candidate, for the performance error p* (section 4.1 of the paper)."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tdkit.compression.verification import dense_weight
from tdkit.datasets.base import Dataset, stratified_split
from tdkit.decompositions.base import layer_stages
from tdkit.errors import UsageError
from tdkit.layers.inventory import Layer, replace_layer
from tdkit.training.loop import train, trainable_splits

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tdkit.layers.stages import Stage
    from tdkit.study.recipe import FinetuneRecipe
    from tdkit.study.records import Trial
    from tdkit.study.workspace import Workspace


def fine_tuned(
    workspace: Workspace, trial: Trial, layer: Layer, stand_in: nn.Sequential
) -> tuple[nn.Module, dict[str, float]]:
    """Fine-tune all layers of the model with one layer factorized.

    Of the epochs the one that validates best is kept, as in the paper; the factorized model as it
    was before is not among them, since that is what the performance error p is measured on.

    Args:
        workspace: The dense model, the images and the recipe; the model stays as it is.
        trial: Its seed and candidate alone decide what is random: the order and the augmentation
            of the images, dropout.
        layer: The layer that is replaced.
        stand_in: Its factorization, which stays as it is.

    Returns:
        The fine-tuned model, and for each layer with a weight the relative difference that
        fine-tuning made to the norm of that weight; see
        :attr:`tdkit.study.records.Measurement.change`.

    Raises:
        UsageError: The recipe asks for no fine-tuning, or training or validation images or their
            labels are missing.
        TdkitError: The training diverges.
    """
    recipe = workspace.recipe.finetune
    if recipe is None:
        raise UsageError("the recipe asks for no fine-tuning", "add a table [finetune]")
    model = copy.deepcopy(workspace.model)
    replace_layer(model, layer, copy.deepcopy(stand_in))
    assert layer.spec is not None
    stages = layer_stages(workspace.methods[trial.method], layer.spec, trial.rank)
    before = weight_norms(model, workspace.layers, {layer.name: stages})
    train(
        model,
        training_images(workspace.dataset, recipe, workspace.recipe.seed),
        recipe,
        device=workspace.device,
        generator=torch.Generator().manual_seed(_seed(trial)),
    )
    after = weight_norms(model, workspace.layers, {layer.name: stages})
    return model, {name: _difference(norm, after[name]) for name, norm in before.items()}


def training_images(dataset: Dataset, recipe: FinetuneRecipe, seed: int) -> Dataset:
    """The data set with the training images of a recipe, the same ones for every trial.

    Args:
        dataset: Labelled images.
        recipe: Says how many; they have the class shares of all training images.
        seed: Of the choice.

    Raises:
        UsageError: If the data set has no labelled images to train and to validate on.
    """
    split, _ = trainable_splits(dataset)
    if recipe.images is None or recipe.images >= len(split):
        return dataset
    assert split.labels is not None
    generator = torch.Generator().manual_seed(seed)
    _, chosen = stratified_split(split.labels, recipe.images, generator)
    return replace(dataset, train=split.subset(chosen))


def weight_norms(
    model: nn.Module, layers: Sequence[Layer], stages: Mapping[str, Sequence[Stage]] | None = None
) -> dict[str, float]:
    """The Frobenius norm of each layer's weight, a factorized one expanded to its dense weight.

    Args:
        model: The model, some of its layers replaced by their factorizations.
        layers: The layers of the dense model.
        stages: What factorizations are built from, by the layer's name, where that is more than
            tdkit's own kinds of stages.
    """
    weights = {
        layer.name: _weight(model.get_submodule(layer.name), layer, (stages or {}).get(layer.name))
        for layer in layers
    }
    return {
        name: float(torch.linalg.vector_norm(weight.detach().double()))
        for name, weight in weights.items()
        if weight is not None
    }


def _weight(module: nn.Module, layer: Layer, stages: Sequence[Stage] | None) -> Tensor | None:
    if isinstance(module, nn.Sequential) and layer.spec is not None:
        return dense_weight(module, layer.spec, stages)
    weight = getattr(module, "weight", None)
    # A quantized layer has a method of that name.
    return weight if isinstance(weight, Tensor) else None


def _difference(before: float, after: float) -> float:
    """The relative difference; nothing is relative to a weight of zeros."""
    return abs(after - before) / before if before else 0.0


def _seed(trial: Trial) -> int:
    """A seed that no other candidate or run shares, whatever is trained before or beside it."""
    text = f"{trial.seed}/{trial.layer}/{trial.method}/{trial.rank}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
