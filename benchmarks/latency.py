"""Latency of compressed models against dense and tensorly-torch, and of each method alone.

    python benchmarks/latency.py [--methods svd,tucker,tt] [--runs 7]

tensorly-torch has Tucker at one keep for all the layers that tdkit may compress, the largest keep
with no more parameters than tdkit's model, in both of its implementations. Its factors are random,
as the time depends on the sizes only. Models run in turn, so that a drifting machine hits all
alike. ResNet-18 has random weights, GaripovNet its bundled ones.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import tensorly
import torch
from common import header, options, row, threads, timed
from measuring import opened
from tltorch import FactorizedConv
from torch import Tensor, nn

import tdkit
from tdkit.compression.scoring import factorize, prepare
from tdkit.costs.latency import measure_latency
from tdkit.decompositions.base import Decomposition
from tdkit.decompositions.cp import Cp
from tdkit.decompositions.svd import Svd
from tdkit.decompositions.tt import TensorTrain
from tdkit.decompositions.tucker import Tucker
from tdkit.forward.inputs import Inputs
from tdkit.layers.counting import model_parameters
from tdkit.layers.evidence import Evidence
from tdkit.layers.inventory import Layer, find_layers
from tdkit.layers.weights import ModuleWeights

BUDGETS = (0.5, 0.25, 0.1)
KEEPS = (0.5, 0.25, 0.1)
BATCHES = (1, 32)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
IMPLEMENTATIONS = ("factorized", "reconstructed")

# Their quality is of no interest here.
METHODS: dict[str, Decomposition] = {
    "svd": Svd(),
    "tucker": Tucker(),
    "tt": TensorTrain(),
    "cp": Cp(sweeps=1),
}


@dataclass(frozen=True)
class Contender:
    """A model that is timed, and what the table says of it."""

    name: str
    budget: str
    model: nn.Module


@dataclass(frozen=True)
class Single:
    """One convolution, and the sizes at which it is timed."""

    channels: int
    pixels: int

    @property
    def name(self) -> str:
        """Shape and pixels."""
        return f"{self.channels}×{self.channels}×3×3 at {self.pixels}×{self.pixels}"


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--methods", default="svd,tucker,tt", help="for ResNet-18")
    parser.add_argument("--runs", type=int, default=7)
    given = parser.parse_args()
    tensorly.set_backend("pytorch")
    runs = 3 if given.quick else given.runs
    print(
        f"Milliseconds of one forward pass in eval mode, medians of up to {runs} runs in turn,"
        f" {threads()}; beside them the speed relative to the dense model,"
        " and “slower” where it is below 1.\n"
    )
    show_model("garipov", None, given, runs)
    show_model(
        "resnet18-cifar" if given.quick else "resnet18", given.methods.split(","), given, runs
    )
    show_methods((Single(32, 8),) if given.quick else (Single(128, 28), Single(256, 14)), runs)


def show_model(
    name: str, methods: Sequence[str] | None, given: argparse.Namespace, runs: int
) -> None:
    dense, shape = opened(name)
    dense.eval()
    budgets = BUDGETS[:1] if given.quick else BUDGETS
    seconds, contenders = timed(lambda: contenders_of(dense, shape, budgets, methods))
    chosen = ", ".join(methods) if methods else "the default methods"
    print(f"### {name}, {'×'.join(map(str, shape))}\n")
    print(f"tdkit with {chosen}. Building all models took {seconds:.0f} s.\n")
    cases = [(batch, layout) for batch in BATCHES for layout in LAYOUTS]
    header("model", "budget", "parameters", *(f"batch {b}, {layout}" for b, layout in cases))
    models = [contender.model for contender in contenders]
    times = [milliseconds(models, (batch, *shape), layout, runs) for batch, layout in cases]
    for place, contender in enumerate(contenders):
        cells = [f"{taken[place]:.2f} ({speed(taken, place)})" for taken in times]
        row(contender.name, contender.budget, f"{parameters(contender.model):,}", *cells)
    print()


def contenders_of(
    dense: nn.Module,
    shape: Sequence[int],
    budgets: Sequence[float],
    methods: Sequence[str] | None,
) -> list[Contender]:
    found = [Contender("dense", "", copy.deepcopy(dense))]
    for budget in budgets:
        options = {"methods": methods, "input_shape": shape, "measure": False}
        small = tdkit.compress(dense, budget, **options).model
        found.append(Contender("tdkit", str(budget), small))
        for implementation in IMPLEMENTATIONS:
            theirs = uniform(dense, parameters(small), implementation)
            found.append(Contender(f"tensorly-torch, {implementation}", str(budget), theirs))
    return found


def uniform(dense: nn.Module, most: int, implementation: str) -> nn.Module:
    """A copy of a model with tensorly-torch's Tucker at the largest common keep that fits."""
    model = copy.deepcopy(dense)
    layers = [layer for layer in find_layers(model) if is_candidate(model, layer)]
    keep = largest_keep(layers, model_parameters(model) - most)
    for layer in layers:
        conv = model.get_submodule(layer.name)
        built = FactorizedConv.from_conv(
            conv,
            rank=(*rank(layer, keep), *conv.kernel_size),
            factorization="tucker",
            implementation=implementation,
            decompose_weights=False,
        )
        model.set_submodule(layer.name, built)
    return model.eval()


def is_candidate(model: nn.Module, layer: Layer) -> bool:
    return layer.reason is None and isinstance(model.get_submodule(layer.name), nn.Conv2d)


def largest_keep(layers: Sequence[Layer], to_save: int) -> float:
    """The largest keep, in thousandths, that saves so many parameters."""
    for thousandths in range(1000, 0, -1):
        keep = thousandths / 1000
        if sum(layer.parameters - size(layer, keep) for layer in layers) >= to_save:
            return keep
    raise SystemExit("tensorly-torch's Tucker cannot reach this budget")


def rank(layer: Layer, keep: float) -> tuple[int, int]:
    assert layer.spec is not None
    return Tucker().rank(layer.spec, keep)


def size(layer: Layer, keep: float) -> int:
    """Parameters of tensorly-torch's Tucker, which also has small factors for the kernel."""
    assert layer.spec is not None
    ranks = (*rank(layer, keep), *layer.spec.kernel_size)
    modes = (layer.spec.out_channels, layer.spec.in_channels, *layer.spec.kernel_size)
    bias = layer.spec.out_channels if layer.spec.bias else 0
    factors = sum(n * r for n, r in zip(modes, ranks, strict=True))
    return math.prod(ranks) + factors + bias


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def milliseconds(
    models: Sequence[nn.Module], shape: Sequence[int], layout: str, runs: int, limit: float = 45.0
) -> tuple[float, ...]:
    """The median of every model on noise, all of them in a memory layout."""
    for model in models:
        model.to(memory_format=LAYOUTS[layout])
    inputs = noise(shape).to(memory_format=LAYOUTS[layout])
    return measure_latency(models, Inputs((inputs,)), runs=runs, seconds=limit).milliseconds


def noise(shape: Sequence[int]) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def speed(taken: Sequence[float], place: int) -> str:
    """Relative to the first, which is dense."""
    relative = taken[0] / taken[place]
    slower = ", slower" if round(relative, 2) < 1 else ""
    return f"{relative:.2f}×{slower}"


def show_methods(singles: Sequence[Single], runs: int) -> None:
    print("### One convolution under each method\n")
    print("Speed relative to the dense convolution; keeps by tdkit's default rule.\n")
    cases = [(batch, layout) for batch in BATCHES for layout in LAYOUTS]
    header("convolution", "method", "keep", *(f"batch {b}, {layout}" for b, layout in cases))
    for single in singles:
        dense = nn.Sequential(nn.Conv2d(single.channels, single.channels, 3, padding=1)).eval()
        stand_ins = {
            (name, keep): stand_in(dense, name, keep) for name in METHODS for keep in KEEPS
        }
        shape = (single.channels, single.pixels, single.pixels)
        models = [dense, *stand_ins.values()]
        times = [
            milliseconds(models, (batch, *shape), layout, 3 * runs, 12) for batch, layout in cases
        ]
        row(single.name, "dense", "", *(f"{taken[0]:.2f} ms" for taken in times))
        for place, (name, keep) in enumerate(stand_ins, start=1):
            row(single.name, name, keep, *(speed(taken, place) for taken in times))


def stand_in(dense: nn.Sequential, name: str, keep: float) -> nn.Module:
    layer = find_layers(dense, include_ends=True)[0]
    weights = ModuleWeights(dense)
    prepared = prepare(layer, weights, name, METHODS[name], Evidence())
    assert prepared is not None
    return factorize(layer, weights, prepared, prepared.rank(keep)).eval()


if __name__ == "__main__":
    main()
