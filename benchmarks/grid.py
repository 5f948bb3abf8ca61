"""The default grid of ``tdkit score resnet18``, and how scoring grows with layers and keeps.

    python benchmarks/grid.py [--repeats 3]

The command runs as a child process, as a user would start it. Both curves are measured in this
process, with ranks by the default rule and the error of every rank.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from common import (
    MIB,
    demand,
    header,
    median_seconds,
    options,
    plural,
    row,
    run_child,
    show_profile,
    timed,
)
from torch import nn

from tdkit.compression.scoring import COMPRESSION_KEEPS, PAPER_KEEPS, Grid, score
from tdkit.decompositions.base import Decomposition
from tdkit.decompositions.cp import Cp
from tdkit.decompositions.svd import Svd
from tdkit.decompositions.tt import TensorTrain
from tdkit.decompositions.tucker import Tucker
from tdkit.layers.traced import TracedModel
from tdkit.metrics.weights import RELATIVE

COMMAND = ("score", "resnet18", "--weights", "none")
QUICK = ("--layers", "layer1.*", "--methods", "svd,tucker,tt")
LAYERS = (1, 2, 4, 8)
KEEPS = (1, 2, 5, 10, 20)
DIRECT: dict[str, Decomposition] = {"svd": Svd(), "tucker": Tucker(), "tt": TensorTrain()}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    repeats = 1 if given.quick else given.repeats
    show_command([*COMMAND, *(QUICK if given.quick else ())])
    show_layers(32 if given.quick else 128, repeats)
    show_keeps(64 if given.quick else 256, repeats)


def show_command(arguments: Sequence[str]) -> None:
    shown = " ".join(["tdkit", *arguments])
    print(f"The whole default grid by `{shown}`, start of Python included.\n")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "scores.json"
        command = [sys.executable, "-m", "tdkit", *arguments, "--output", str(path)]
        usage = demand(run_child(command, limit=400), shown)
        scores = json.loads(path.read_text(encoding="utf-8"))["candidates"]
    layers = len({candidate["layer"] for candidate in scores})
    header("", "measured", "asked")
    row("candidates", f"{len(scores):,} of {plural(layers, 'layer')}", "")
    row("wall time", f"{usage.seconds:.1f} s", "under 120 s")
    row("processor time", f"{usage.cpu_seconds:.1f} s", "")
    row("peak memory", f"{usage.peak_bytes / MIB:,.0f} MiB", "under 2,048 MiB")


def show_layers(channels: int, repeats: int) -> None:
    shape = f"{channels}×{channels}×3×3"
    print(f"\n### Seconds by the number of layers ({shape}, {len(PAPER_KEEPS)} keeps)\n")
    print(
        f"Asked: linear, so that the seconds per layer stay the same. Medians of"
        f" {plural(repeats, 'run')}; cp once.\n"
    )
    header("layers", "svd, tucker and tt, s", "per layer", "cp, s", "per layer")
    scored(convolutions(1, 8), {"cp": Cp()}, PAPER_KEEPS)  # the first call loads code
    for count in LAYERS:
        model = convolutions(count, channels)
        direct = median_seconds(lambda model=model: scored(model, DIRECT, PAPER_KEEPS), repeats)
        als, _ = timed(lambda model=model: scored(model, {"cp": Cp()}, PAPER_KEEPS))
        row(count, f"{direct:.3f}", f"{direct / count:.3f}", f"{als:.2f}", f"{als / count:.2f}")


def show_keeps(channels: int, repeats: int) -> None:
    print(f"\n### Seconds by the number of keeps (one {channels}×{channels}×3×3 layer)\n")
    print(
        f"Asked: flat for svd, tucker and tt. Medians of {plural(repeats, 'run')}; the keeps are"
        " evenly spread over tdkit's default ones. tt takes the spectrum of a small matrix for"
        " every new pair of ranks at its ends, so it is not flat: below are the profiles of its"
        " first and last row. The others choose a rank and write a record for each keep.\n"
    )
    header("keeps", *(f"{name}, s" for name in DIRECT))
    model = convolutions(1, channels)
    found = {
        (name, count): median_seconds(
            lambda name=name, count=count: scored(model, {name: DIRECT[name]}, spread(count)),
            repeats,
        )
        for count in KEEPS
        for name in DIRECT
    }
    for count in KEEPS:
        row(count, *(f"{found[name, count]:.3f}" for name in DIRECT))
    growth = [found[name, KEEPS[-1]] / found[name, KEEPS[0]] for name in DIRECT]
    row(f"{KEEPS[-1]} keeps : {KEEPS[0]}", *(f"{value:.2f}×" for value in growth))
    tt = {"tt": DIRECT["tt"]}
    for count in (KEEPS[0], KEEPS[-1]):
        name = f"tt at {plural(count, 'keep')}"
        show_profile(name, lambda count=count: scored(model, tt, spread(count)), most=5)


def spread(count: int) -> tuple[float, ...]:
    """So many of the default keeps, the largest included."""
    total = len(COMPRESSION_KEEPS)
    return tuple(COMPRESSION_KEEPS[(place + 1) * total // count - 1] for place in range(count))


def convolutions(count: int, channels: int) -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(count))
    return nn.Sequential(nn.Identity(), *layers)


def scored(
    model: nn.Module, methods: dict[str, Decomposition], keeps: Sequence[float]
) -> list[object]:
    traced = TracedModel.of(model, include_ends=True)
    return list(score(traced, Grid(methods, [RELATIVE], tuple(keeps))))


if __name__ == "__main__":
    main()
