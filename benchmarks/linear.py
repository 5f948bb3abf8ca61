"""A large Linear scored for svd over the default keeps: seconds, peak memory and exactness.

    python benchmarks/linear.py [--inputs 4096] [--outputs 11008]

Scoring runs in a child process of its own, so that the peak is that of scoring with the layer and
torch. A second one rebuilds W̃ from the factors of a few ranks, in float64, and compares.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from common import MIB, demand, header, options, row, run_child

CHECKED_KEEPS = (0.1, 0.5, 0.9)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--outputs", type=int, default=11008)
    parser.add_argument("--part", choices=("score", "check"), help="for the child processes")
    given = parser.parse_args()
    if given.quick:
        given.inputs, given.outputs = 256, 688
    if given.part:
        part = scored(given) if given.part == "score" else deviations(given)
        print(json.dumps(part))
        return
    show(given)


def show(given: argparse.Namespace) -> None:
    print(
        f"`nn.Linear({given.inputs}, {given.outputs})` with random weights in float32, svd over"
        " tdkit's default keeps. The peak is that of the whole process, torch included.\n"
    )
    score, check = (child(given, part) for part in ("score", "check"))
    found = json.loads(score.output.splitlines()[-1])
    worst = max(json.loads(check.output.splitlines()[-1]).values())
    keeps = ", ".join(map(str, CHECKED_KEEPS))
    header("", "measured", "asked")
    row("scoring", f"{found['seconds']:.1f} s", "under 60 s")
    row("peak memory", f"{score.peak_bytes / MIB:,.0f} MiB", "under 3,072 MiB")
    row("candidates", found["candidates"], "")
    row("whole process", f"{score.seconds:.1f} s", "")
    row("threads", found["threads"], "")
    row(f"largest relative deviation from ‖W − W̃‖ (keeps {keeps})", f"{worst:.1e}", "1e-6")


def child(given: argparse.Namespace, part: str) -> Any:
    sizes = ["--inputs", str(given.inputs), "--outputs", str(given.outputs)]
    command = [sys.executable, str(Path(__file__)), "--part", part, *sizes]
    return demand(run_child(command, limit=280), f"the part {part!r}")


def scored(given: argparse.Namespace) -> dict[str, float]:
    import torch
    from common import timed

    from tdkit.compression.scoring import Grid, score
    from tdkit.decompositions.svd import Svd
    from tdkit.layers.traced import TracedModel
    from tdkit.metrics.weights import RELATIVE

    model = torch.nn.Sequential(layer(given))
    traced = TracedModel.of(model, include_ends=True, readonly=True)
    seconds, found = timed(lambda: score(traced, Grid({"svd": Svd()}, [RELATIVE])))
    return {
        "seconds": seconds,
        "candidates": len(found),
        "threads": torch.get_num_threads(),
    }


def deviations(given: argparse.Namespace) -> dict[str, float]:
    """By keep, how far the reported error is off, relative to it."""
    import torch

    from tdkit.decompositions.svd import Svd
    from tdkit.layers.spec import spec_of

    linear = layer(given)
    weight = linear.weight.detach()
    prepared = Svd().prepare(spec_of(linear), weight)
    found = {}
    for keep in CHECKED_KEEPS:
        rank = prepared.rank(keep)
        first, second = prepared.factors(rank)
        truth = float(torch.linalg.vector_norm(weight.double() - second @ first))
        found[str(keep)] = abs(prepared.error(rank) - truth) / truth
    return found


def layer(given: argparse.Namespace) -> Any:
    import torch

    torch.manual_seed(0)
    return torch.nn.Linear(given.inputs, given.outputs)


if __name__ == "__main__":
    main()
