"""Accuracy of the bundled GaripovNet at several budgets, without data and without fine-tuning.

    python benchmarks/accuracy.py [--data fashion-mnist-sample]

Beside tdkit's plan it shows what the same budget gives with one keep for all layers and Tucker
ranks in tensorly's proportion, the way most papers compress; and tdkit's plan with BatchNorm as it
was, matched without data, and matched on 512 training images without their labels.
"""

from __future__ import annotations

import argparse

from torch import nn

import tdkit
from tdkit.calibration.batchnorm import CALIBRATIONS
from tdkit.compression.compress import apply_plan
from tdkit.compression.plan import Move, Plan
from tdkit.datasets.base import Split
from tdkit.decompositions.base import layer_stages
from tdkit.decompositions.tucker import Tucker
from tdkit.layers.counting import model_parameters
from tdkit.layers.inventory import Layer
from tdkit.layers.traced import TracedModel
from tdkit.opening import open_dataset
from tdkit.registry import load_registry
from tdkit.training.loop import evaluate

BUDGETS = (0.5, 0.25, 0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="fashion-mnist")
    registry = load_registry()
    data = open_dataset(parser.parse_args().data, registry)
    test, train = data.test, data.train
    record = registry.models["garipov"]
    dense = record.create()
    dense.load_state_dict(record.weights["fashion-mnist"]())
    assert test is not None
    assert train is not None
    images = [batch for batch, _ in train.batches(64, limit=512)]
    print(f"dense: {accuracy(dense, test):.2f} % on {len(test):,} images\n")
    print("| budget | parameters | uniform Tucker | uncalibrated | no data | 512 images |")
    print("|---|---|---|---|---|---|")
    for budget in BUDGETS:
        row = [accuracy(uniform_tucker(dense, budget), test)]
        for how in CALIBRATIONS:
            options = {"input_shape": record.input_shape, "data": images, "measure": False}
            small = tdkit.compress(dense, budget, calibration=how, **options).model
            row.append(accuracy(small, test))
        cells = " | ".join(f"{value:.2f} %" for value in row)
        print(f"| {budget} | {model_parameters(small):,} | {cells} |", flush=True)


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
