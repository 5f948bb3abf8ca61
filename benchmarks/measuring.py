"""Performance errors of a study: one full forward pass per candidate against replayed passes.

    python benchmarks/measuring.py [--model garipov] [--images 1000] [--batch-size 50]
    python benchmarks/measuring.py --images 10000 --repeats 1 --layer conv2 [--rows FILE]

The candidates are those of the paper: its layers (Tables 2 and 4) under CP, Tucker and TT at five
keeps, proportional ranks. All ways see the same batches of the same images in the same process,
layer by layer in turn. GaripovNet has its bundled weights and Fashion-MNIST's test images;
ResNet-18 has random weights that tell images apart, and noise where CIFAR-10 is not found: the
time is the same.

Plain passes run the model as it is. A study chooses the memory layout of each convolution and
replays; full passes in those layouts tell the two apart, and a replay has to predict as they do,
to the last image. "MACs allow" is the ratio if time went by multiply-accumulates: what comes
before a layer is saved, the candidate and what comes after it is not. Both ways take the same time
for every batch, but the first of a replay comes with three more passes: few images understate the
ratio.

Ten thousand images take minutes for each layer. With ``--layer`` one is measured, and with
``--rows`` its row is kept in a file; the last line is then the sum of all layers in that file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from common import MIB, demand, header, options, plural, ratio, row, run_child, threads, timed
from torch import Tensor, nn

from tdkit.compression.scoring import PAPER_KEEPS, factorize, prepare
from tdkit.datasets.base import Split
from tdkit.decompositions.base import Decomposition
from tdkit.decompositions.cp import Cp
from tdkit.decompositions.tt import TensorTrain
from tdkit.decompositions.tucker import Tucker
from tdkit.errors import TdkitError
from tdkit.forward.inputs import Inputs
from tdkit.layers.counting import macs
from tdkit.layers.evidence import Evidence
from tdkit.layers.inventory import Layer, find_layers, replace_layer
from tdkit.layers.weights import ModuleWeights
from tdkit.metrics.features import RELATIVE, Watched
from tdkit.registry import load_registry
from tdkit.study.layouts import set_layouts, small_maps
from tdkit.study.replay import predictions, replaced_predictions

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

# How many times faster than plain passes.
ASKED = 2.5

# So many stand-ins of a layer share a pass in a study.
TOGETHER = 15
ROUNDS = (1, 2, 4, 8)


@dataclass(frozen=True)
class StandIn:
    """What replaces a layer, and its multiply-accumulates per image."""

    module: nn.Module
    macs: int


@dataclass(frozen=True)
class Compared:
    """Median seconds of three ways, and of how many images a replay predicts what they do."""

    candidates: int
    images: int
    plain: float
    full: float
    replayed: float
    allowed: float
    same: int
    same_as_plain: int


def main() -> None:
    given = arguments()
    if given.rounds:
        measure_alone(given)
        return
    model, shape = opened(given.model)
    batches, note = images(given, shape)
    print(
        f"{given.model}, {plural(sum(map(len, batches)), 'image')}{note} in batches of"
        f" {given.batch_size} on {given.device}; {threads()}, medians of"
        f" {plural(given.repeats, 'run')} in turn. The dense model predicts"
        f" {predicted_classes(model, batches)} classes. Asked: {ASKED}×.\n"
    )
    header(
        "layer", "candidates", "plain passes, s", "in a study's layouts, s", "replayed, s",
        "plain : replayed", "layouts : replayed", "MACs allow",
        "same predictions as in these layouts", "as plain",
    )  # fmt: skip
    names = [given.layer] if given.layer else LAYERS[given.model]
    found = {name: compared(model, name, batches, given.repeats) for name in names}
    if given.rows:
        found = kept(given.rows, found)
    if len(found) > 1:
        whole = total(found)
        show("all" if len(found) == len(LAYERS[given.model]) else ", ".join(found), whole)
        verdict = "is reached" if whole.plain >= ASKED * whole.replayed else "is missed"
        print(f"\n{ASKED}× the speed of plain passes {verdict}.")
    if not given.layer:
        show_memory(given)


def arguments() -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--model", choices=LAYERS, default="garipov")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layer", help="this one alone")
    parser.add_argument("--rows", type=Path, help="a file of rows, for the sum of all layers")
    parser.add_argument("--rounds", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.layer not in (None, *LAYERS[given.model]):
        parser.error(f"the layers of {given.model} are {', '.join(LAYERS[given.model])}")
    if given.quick:
        given.images, given.batch_size, given.repeats = 8, 4, 1
    return given


def kept(path: Path, found: dict[str, Compared]) -> dict[str, Compared]:
    """All rows of a file, with these in it; rows of another number of images are left out."""
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows = {name: Compared(**values) for name, values in old.items()} | found
    images = {row.images for row in found.values()}
    rows = {name: row for name, row in rows.items() if row.images in images}
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {name: asdict(row) for name, row in rows.items()}
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")
    return rows


def show(name: str, found: Compared) -> None:
    predictions = found.candidates * found.images
    row(
        name, found.candidates, f"{found.plain:.2f}", f"{found.full:.2f}", f"{found.replayed:.2f}",
        ratio(found.plain, found.replayed), ratio(found.full, found.replayed),
        f"{found.allowed:.1f}×", f"{found.same:,} of {predictions:,}",
        f"{found.same_as_plain:,}",
    )  # fmt: skip


def total(rows: Mapping[str, Compared]) -> Compared:
    parts = list(rows.values())
    full = sum(part.full for part in parts)
    return Compared(
        candidates=sum(part.candidates for part in parts),
        images=parts[0].images,
        plain=sum(part.plain for part in parts),
        full=full,
        replayed=sum(part.replayed for part in parts),
        # Of passes that take equally long, what is left of each.
        allowed=len(parts) / sum(1 / part.allowed for part in parts),
        same=sum(part.same for part in parts),
        same_as_plain=sum(part.same_as_plain for part in parts),
    )


def opened(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    record = load_registry().models[name]
    torch.manual_seed(0)
    model = record.create()
    if "fashion-mnist" in record.weights:
        model.load_state_dict(record.weights["fashion-mnist"]())
    else:
        tell_apart(model, tuple(record.input_shape))
    return model.eval(), tuple(record.input_shape)


@torch.no_grad()
def tell_apart(model: nn.Module, shape: Sequence[int]) -> None:
    """Let random weights predict many classes: as they come, all images belong to one.

    BatchNorm gets the statistics of noise, and no class of the head is ahead of the others.
    """
    noise = torch.randn(200, *shape, generator=torch.Generator().manual_seed(1))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    model.train()(noise)
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    head.bias -= model.eval()(noise).mean(0)


def images(given: argparse.Namespace, shape: tuple[int, ...]) -> tuple[list[Tensor], str]:
    """Batches on the device, and what is to be said of them."""
    split = test_split(DATA[given.model])
    if split is None:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(given.images, *shape, generator=generator)
        return list(noise.to(given.device).split(given.batch_size)), " of noise"
    batches = split.batches(given.batch_size, limit=given.images)
    return [batch.to(given.device) for batch, _ in batches], f" of {DATA[given.model]}"


def test_split(name: str) -> Split | None:
    try:
        return load_registry().datasets[name].create().test
    except TdkitError:
        return None


def stand_ins(model: nn.Module, layer: Layer) -> list[StandIn]:
    """Every method at every keep."""
    weights, found = ModuleWeights(model), []
    for name, method in METHODS.items():
        prepared = prepare(layer, weights, name, method, Evidence())
        if prepared is None:
            continue
        for keep in PAPER_KEEPS:
            rank = prepared.rank(keep, "proportional")
            built = factorize(layer, weights, prepared, rank).eval()
            found.append(StandIn(built, macs(prepared.stages(rank), layer.calls or ())))
    return found


def compared(model: nn.Module, name: str, batches: Sequence[Tensor], repeats: int) -> Compared:
    """The three ways in turn, on the candidates of one layer; prints the layer's row."""
    model.to(batches[0].device)
    layers = find_layers(model, inputs=Inputs((batches[0][:1],)))
    layer = next(layer for layer in layers if layer.name == name)
    candidates = stand_ins(model, layer)
    modules = [candidate.module for candidate in candidates]
    seconds: list[tuple[float, float, float]] = []
    for _ in range(repeats):
        model.to(memory_format=torch.contiguous_format)
        plain, plainly = timed(lambda: full_passes(model, layer, modules, batches))
        set_layouts(model, Inputs((batches[0][:1],)))
        with small_maps(model):
            full, expected = timed(lambda: full_passes(model, layer, modules, batches))
            replayed, found = timed(lambda: replaced_predictions(model, layer, modules, batches))
        seconds.append((plain, full, replayed))
    plain, full, replayed = map(median, zip(*seconds, strict=True))
    result = Compared(
        len(modules), sum(map(len, batches)), plain, full, replayed,
        allowed(layers, layer, candidates), same(expected, found), same(plainly, found),
    )  # fmt: skip
    show(name, result)
    return result


def allowed(layers: Sequence[Layer], layer: Layer, candidates: Sequence[StandIn]) -> float:
    """Multiply-accumulates of full passes over those of replays."""
    costs = [each.macs or 0 for each in layers]
    place = [each.name for each in layers].index(layer.name)
    after, others = sum(costs[place + 1 :]), sum(costs) - costs[place]
    own = sum(candidate.macs for candidate in candidates)
    count = len(candidates)
    return (count * others + own) / (count * after + own)


@torch.no_grad()
def predicted_classes(model: nn.Module, batches: Sequence[Tensor]) -> int:
    """How many classes there are among the predictions of some batches."""
    model.to(batches[0].device)
    return len(torch.cat([model(batch).argmax(1) for batch in batches[:10]]).unique())


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


def same(expected: Sequence[Tensor], found: Sequence[Tensor | str]) -> int:
    pairs = zip(expected, found, strict=True)
    return sum(int((one == other).sum()) for one, other in pairs if isinstance(other, Tensor))


def show_memory(given: argparse.Namespace) -> None:
    """Peak memory of a process that measures more and more candidates of one layer."""
    print("\n### Peak memory by the number of candidates\n")
    print(
        f"A process that measures predictions and feature errors of the candidates of"
        f" `{LAYERS[given.model][0]}`, {TOGETHER} at a time as a study does. Asked: independent of"
        " their number.\n"
    )
    header("candidates", "peak memory, MiB")
    for rounds in ROUNDS[:2] if given.quick else ROUNDS:
        command = [
            sys.executable, __file__, "--model", given.model, "--device", given.device,
            "--images", "100", "--batch-size", str(given.batch_size), "--rounds", str(rounds),
        ]  # fmt: skip
        usage = demand(run_child(command), "measuring alone")
        row(rounds * TOGETHER, f"{usage.peak_bytes / MIB:,.0f}")


def measure_alone(given: argparse.Namespace) -> None:
    """The child process: round after round of a layer's candidates, each built anew."""
    model, shape = opened(given.model)
    batches, _ = images(given, shape)
    set_layouts(model.to(given.device), Inputs((batches[0][:1],)))
    layers = find_layers(model, inputs=Inputs((batches[0][:1],)))
    layer = next(layer for layer in layers if layer.name == LAYERS[given.model][0])
    for _ in range(given.rounds):
        modules = [candidate.module for candidate in stand_ins(model, layer)]
        watch = Watched(layer.name, modules, [RELATIVE])
        with small_maps(model):
            predictions(model, layer, modules, batches, watch=watch)


if __name__ == "__main__":
    main()
