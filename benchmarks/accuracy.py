"""Accuracy at several budgets, without labels, beside what others would make of the same.

    python benchmarks/accuracy.py [--network residual] [--budgets 0.25 0.1] [--cost macs]
                                  [--ways peers none fast default best distill] [--sets 3]

Every row is a way to compress, every column a budget: the fraction of the network's parameters, or
of its MACs, that remains. The accuracy is on all test images, on which nothing was chosen. What
takes images is given 512 training images without their labels, and is the mean over three disjoint
sets of them. The others' ways get BatchNorm matched on the same images.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean

import peers
import torch
from residual import dense_residual
from torch import Tensor, nn

import tdkit
from tdkit.calibration.batchnorm import match_statistics
from tdkit.costs.base import Cost
from tdkit.datasets.base import Split
from tdkit.forward.inputs import Inputs
from tdkit.layers.counting import model_parameters
from tdkit.layers.traced import TracedModel
from tdkit.opening import open_dataset
from tdkit.registry import load_registry
from tdkit.training.loop import evaluate

BUDGETS = (0.25, 0.1, 0.05, 0.03)
SIZE = 512
SHAPE = (1, 28, 28)

Images = list[Tensor]
"""A set of them, in batches."""


@dataclass(frozen=True)
class Way:
    """A way to compress: a model and a budget, and images where it takes any, to a model."""

    title: str
    make: Callable[[nn.Module, float, Images], nn.Module]
    images: bool = True


def ways(cost: Cost, fold: bool) -> dict[str, list[Way]]:
    """By what selects them on the command line."""
    ours = partial(tdkit.compress, cost=cost.name, fold=fold, measure=False)

    def peer(title: str, make: Callable[[TracedModel, Images, float, Cost], nn.Module]) -> Way:
        def made(dense: nn.Module, budget: float, images: Images) -> nn.Module:
            small = make(TracedModel.of(dense, images[0][:2]), images, budget, cost)
            match_statistics(dense, small, [Inputs((batch,)) for batch in images])
            return small

        return Way(title, made)

    def fitted(title: str, **options: object) -> Way:
        return Way(
            title,
            lambda dense, budget, images: ours(dense, budget, data=images, **options).model,
        )

    return {
        "peers": [
            peer("one keep for all, Tucker", partial(peers.uniform, "tucker")),
            peer("one keep for all, CP", partial(peers.uniform, "cp")),
            peer("ALDS's allocation, SVD", peers.alds),
            peer("AIMET's spatial SVD", peers.aimet),
        ],
        "none": [
            Way(
                "tdkit, no data",
                lambda dense, budget, _: ours(dense, budget, input_shape=SHAPE).model,
                images=False,
            )
        ],
        "fast": [fitted("tdkit, 512 images, fast", effort="fast")],
        "default": [fitted("tdkit, 512 images, default", effort="default")],
        "best": [fitted("tdkit, 512 images, best, no training", effort="best", distill=0)],
        "distill": [fitted("tdkit, 512 images, best: a minute of distillation", effort="best")],
    }


def main() -> None:
    given = options()
    registry = load_registry()
    data, cost = open_dataset("fashion-mnist", registry), registry.costs[given.cost].create()
    assert data.test is not None
    assert data.train is not None
    sets = image_sets(data.train, given.sets)
    dense = dense_residual() if given.network == "residual" else dense_garipov()
    print(f"{given.network}: {model_parameters(dense):,} parameters, ", end="")
    print(f"{accuracy(dense, data.test):.2f} % on {len(data.test):,} images")
    print(f"budgets of {cost.unit}; {len(sets)} sets of {SIZE} unlabelled images\n")
    print("| way | " + " | ".join(map(str, given.budgets)) + " |")
    print("|---|" + "---|" * len(given.budgets), flush=True)
    known = ways(cost, given.fold)
    for way in (way for name in given.ways for way in known[name]):
        start = time.perf_counter()
        found = [measured(way, dense, budget, sets, data.test) for budget in given.budgets]
        print(f"| {way.title} | " + " | ".join(found) + " |", flush=True)
        print(f"{way.title}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=("garipov", "residual"), default="garipov")
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--cost", default="params")
    names = ("peers", "none", "fast", "default", "best", "distill")
    parser.add_argument("--ways", nargs="+", choices=names, default=names)
    parser.add_argument("--sets", type=int, default=3)
    parser.add_argument("--fold", action="store_true", help="BatchNorm into layers, for tdkit")
    return parser.parse_args()


def measured(way: Way, dense: nn.Module, budget: float, sets: Sequence[Images], test: Split) -> str:
    try:
        used = sets if way.images else sets[:1]
        found = [accuracy(way.make(dense, budget, images), test) for images in used]
    except peers.UnreachableError:
        return "–"
    return f"{mean(found):.2f}"


def dense_garipov() -> nn.Module:
    record = load_registry().models["garipov"]
    model = record.create()
    model.load_state_dict(record.weights["fashion-mnist"]())
    return model.eval()


def image_sets(train: Split, count: int) -> list[Images]:
    """Disjoint sets of training images; fewer where there are not as many."""
    images = torch.cat([batch for batch, _ in train.batches(500, limit=count * SIZE)])
    return [list(part.split(-(-SIZE // 10))) for part in images.split(SIZE) if len(part) == SIZE]


def accuracy(model: nn.Module, test: Split) -> float:
    return 100 * evaluate(model, test).accuracy


if __name__ == "__main__":
    main()
