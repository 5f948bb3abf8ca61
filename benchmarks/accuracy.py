"""Accuracy of the bundled GaripovNet at several budgets, without labels and without training.

    python benchmarks/accuracy.py [--data fashion-mnist-sample] [--budgets 0.25 0.1]

Beside tdkit's plan it shows what the same budget gives with one keep for all layers and Tucker
ranks in tensorly's proportion, the way most papers compress, with BatchNorm on the same images as
the others. The images are three disjoint sets of 512 training images without their labels; what
depends on them is the mean over the three.
"""

from __future__ import annotations

import argparse
from statistics import mean

import torch
from torch import Tensor, nn

import tdkit
from tdkit.calibration.batchnorm import match_statistics
from tdkit.compression.applying import apply_plan
from tdkit.compression.plan import Move, Plan
from tdkit.datasets.base import Split
from tdkit.decompositions.base import layer_stages
from tdkit.decompositions.tucker import Tucker
from tdkit.defaults import EFFORTS
from tdkit.forward.inputs import Inputs
from tdkit.layers.counting import model_parameters
from tdkit.layers.inventory import Layer
from tdkit.layers.traced import TracedModel
from tdkit.opening import open_dataset
from tdkit.registry import load_registry
from tdkit.training.loop import evaluate

BUDGETS = (0.25, 0.1, 0.05, 0.03)
SETS = 3
SIZE = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    arguments = parser.parse_args()
    registry = load_registry()
    data = open_dataset(arguments.data, registry)
    test, train = data.test, data.train
    record = registry.models["garipov"]
    dense = record.create()
    dense.load_state_dict(record.weights["fashion-mnist"]())
    assert test is not None
    assert train is not None
    sets = image_sets(train)
    print(f"dense: {accuracy(dense, test):.2f} % on {len(test):,} images")
    print(f"with data: the mean over {len(sets)} sets of {SIZE} unlabelled images\n")
    print(
        "| budget | parameters | uniform Tucker, BatchNorm on data | no data | "
        + " | ".join(f"data, {effort}" for effort in EFFORTS)
        + " |"
    )
    print("|---|---|---|---|" + "---|" * len(EFFORTS))
    for budget in arguments.budgets:
        small = tdkit.compress(dense, budget, input_shape=record.input_shape, measure=False).model
        row = [uniform(dense, budget, sets, test), accuracy(small, test)]
        for effort in EFFORTS:
            models = (compressed(dense, budget, images, effort) for images in sets)
            row.append(mean(accuracy(model, test) for model in models))
        cells = " | ".join(f"{value:.2f} %" for value in row)
        print(f"| {budget} | {model_parameters(small):,} | {cells} |", flush=True)


def image_sets(train: Split) -> list[list[Tensor]]:
    """Disjoint sets of training images, each in batches; fewer where there are not as many."""
    images = torch.cat([batch for batch, _ in train.batches(500, limit=SETS * SIZE)])
    return [list(part.split(-(-SIZE // 10))) for part in images.split(SIZE) if len(part) == SIZE]


def compressed(dense: nn.Module, budget: float, images: list[Tensor], effort: str) -> nn.Module:
    return tdkit.compress(dense, budget, data=images, effort=effort, distill=0, measure=False).model


def uniform(dense: nn.Module, budget: float, sets: list[list[Tensor]], test: Split) -> float:
    found = []
    for images in sets:
        small = uniform_tucker(dense, budget)
        match_statistics(dense, small, [Inputs((batch,)) for batch in images])
        found.append(accuracy(small, test))
    return mean(found)


def accuracy(model: nn.Module, test: Split) -> float:
    return 100 * evaluate(model, test).accuracy


def uniform_tucker(model: nn.Module, budget: float) -> nn.Module:
    """Every layer at the largest common keep that holds the budget."""
    traced = TracedModel.of(model)
    layers = [layer for layer in traced.layers if layer.reason is None]
    total = model_parameters(model)
    for percent in range(100, 0, -1):
        moves = [Move(layer.name, "tucker", rank(layer, percent / 100)) for layer in layers]
        saved = sum(saving(layer, move) for layer, move in zip(layers, moves, strict=True))
        if total - saved <= budget * total:
            plan = Plan(tuple(moves), calibration="none")
            return apply_plan(traced, plan, {"tucker": Tucker()}).model
    raise SystemExit(f"uniform ranks cannot reach {budget}")


def rank(layer: Layer, keep: float) -> tuple[int, int]:
    assert layer.spec is not None
    return Tucker().rank(layer.spec.per_group(), keep)


def saving(layer: Layer, move: Move) -> int:
    assert layer.spec is not None
    stages = layer_stages(Tucker(), layer.spec, move.rank)
    return layer.parameters - sum(stage.parameters for stage in stages)


if __name__ == "__main__":
    main()
