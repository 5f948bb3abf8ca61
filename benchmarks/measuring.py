"""Performance errors of a study: one full forward pass per candidate against replayed passes.

    python benchmarks/measuring.py [--model garipov] [--images 1000] [--batch-size 50]

The candidates are those of the paper: its layers (Tables 2 and 4) under CP, Tucker and TT at five
keeps, proportional ranks. Both ways see the same batches of the same images in the same process,
layer by layer in turn, and have to predict the same classes to the last image. GaripovNet has its
bundled weights and Fashion-MNIST's test images; ResNet-18 has random weights, and noise where
CIFAR-10 is not found: the time is the same.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor, nn

from tdkit.candidates import PAPER_KEEPS, factorize, prepare
from tdkit.datasets.base import Split
from tdkit.decompositions.base import Decomposition
from tdkit.decompositions.cp import Cp
from tdkit.decompositions.tt import TensorTrain
from tdkit.decompositions.tucker import Tucker
from tdkit.errors import TdkitError
from tdkit.layers import Layer, find_layers, replace_layer
from tdkit.registry import load_registry
from tdkit.study.replay import replaced_predictions

T = TypeVar("T")

LAYERS = {
    "garipov": ("conv2", "conv3", "conv4", "conv5", "conv6"),
    "resnet18-cifar": (
        "layer1.1.conv2",
        "layer2.0.conv1",
        "layer2.1.conv1",
        "layer3.0.conv2",
        "layer3.0.downsample.0",
        "layer3.1.conv1",
        "layer4.1.conv1",
        "layer4.1.conv2",
    ),
}
DATA = {"garipov": "fashion-mnist", "resnet18-cifar": "cifar10"}

# Their quality is of no interest here.
METHODS: dict[str, Decomposition] = {"cp": Cp(sweeps=1), "tucker": Tucker(), "tt": TensorTrain()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=LAYERS, default="garipov")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--channels-last", action="store_true", help="the layout of both ways")
    options = parser.parse_args()
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    model, shape = opened(options.model)
    model = model.eval().to(options.device).to(memory_format=layout)
    batches = [x.to(options.device, memory_format=layout) for x in images(options, shape)]
    layers = {layer.name: layer for layer in find_layers(model)}
    count = sum(map(len, batches))
    print(f"{options.model}, {count:,} images in batches of {options.batch_size}")
    print(f"{options.device}, {torch.get_num_threads()} threads, medians of {options.repeats}\n")
    print("| layer | candidates | full passes, s | replayed, s | ratio | same predictions |")
    print("|---|---|---|---|---|---|")
    full = replayed = total = 0.0
    candidates = 0
    for name in LAYERS[options.model]:
        modules = stand_ins(model, layers[name])
        seconds = compared(model, layers[name], modules, batches, options.repeats)
        row(name, len(modules), *seconds[:2], f"{seconds[2]:,} of {len(modules) * count:,}")
        full, replayed, total = full + seconds[0], replayed + seconds[1], total + seconds[2]
        candidates += len(modules)
    row("all", candidates, full, replayed, f"{total:,.0f} of {candidates * count:,}")


def row(name: str, candidates: int, full: float, replayed: float, same: str) -> None:
    ratio = full / replayed
    cells = (name, candidates, f"{full:.2f}", f"{replayed:.2f}", f"{ratio:.2f}", same)
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def opened(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    record = load_registry().models[name]
    torch.manual_seed(0)
    model = record.create()
    if "fashion-mnist" in record.weights:
        model.load_state_dict(record.weights["fashion-mnist"]())
    return model, tuple(record.input_shape)


def images(options: argparse.Namespace, shape: tuple[int, ...]) -> list[Tensor]:
    split = test_split(DATA[options.model])
    if split is not None:
        return [x for x, _ in split.batches(options.batch_size, limit=options.images)]
    print(f"{DATA[options.model]} is not there: random images\n")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(options.images, *shape, generator=generator)
    return list(noise.split(options.batch_size))


def test_split(name: str) -> Split | None:
    try:
        return load_registry().datasets[name].create().test
    except TdkitError:
        return None


def stand_ins(model: nn.Module, layer: Layer) -> list[nn.Module]:
    """Every method at every keep."""
    module = model.get_submodule(layer.name)
    found: list[nn.Module] = []
    for name, method in METHODS.items():
        prepared = prepare(layer, module, name, method, seed=0)
        if prepared is None:
            continue
        for keep in PAPER_KEEPS:
            rank = prepared.rank(keep, "proportional")
            found.append(factorize(layer, module, prepared, rank))
    return found


@torch.no_grad()
def full_passes(
    model: nn.Module, layer: Layer, modules: Sequence[nn.Module], batches: Sequence[Tensor]
) -> list[Tensor]:
    """One forward pass of the whole model per candidate and batch."""
    dense = model.get_submodule(layer.name)
    found = []
    for module in modules:
        replace_layer(model, layer, module)
        found.append(torch.cat([model(batch).argmax(1) for batch in batches]).cpu())
    replace_layer(model, layer, dense)
    return found


def compared(
    model: nn.Module,
    layer: Layer,
    modules: Sequence[nn.Module],
    batches: Sequence[Tensor],
    repeats: int,
) -> tuple[float, float, int]:
    """Median seconds of both ways, and how many predictions are the same."""
    full, replayed = [], []
    expected: list[Tensor] = []
    found: list[Tensor | str] = []
    for _ in range(repeats):
        seconds, expected = timed(lambda: full_passes(model, layer, modules, batches))
        full.append(seconds)
        seconds, found = timed(lambda: replaced_predictions(model, layer, modules, batches))
        replayed.append(seconds)
    pairs = zip(expected, found, strict=True)
    same = sum(int((one == other).sum()) for one, other in pairs if isinstance(other, Tensor))
    return median(full), median(replayed), same


def timed(work: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    main()
