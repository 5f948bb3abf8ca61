"""All that measuring needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from tdkit.datasets.base import Dataset
from tdkit.decompositions.base import Decomposition
from tdkit.layers.inventory import Layer
from tdkit.metrics.base import Metric
from tdkit.study.recipe import StudyRecipe


@dataclass(frozen=True)
class Workspace:
    """All that measuring needs.

    Attributes:
        model: Dense, in eval mode, on its device; measuring leaves it as it is.
        layers: Its layers with their MACs, from :func:`tdkit.layers.inventory.find_layers`.
        methods: Decompositions by name, with the options of the recipe.
        metrics: The approximation errors.
        dataset: The images.
        recipe: What is asked for.
        device: Where the model is.
        versions: Of the plugins that methods and metrics come from, by distribution.
    """

    model: nn.Module
    layers: tuple[Layer, ...]
    methods: Mapping[str, Decomposition]
    metrics: tuple[Metric, ...]
    dataset: Dataset
    recipe: StudyRecipe
    device: torch.device
    versions: Mapping[str, str] = field(default_factory=dict)
