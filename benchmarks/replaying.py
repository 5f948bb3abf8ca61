"""Where the time of a replayed pass goes, beside that of a full one, operator by operator.

    python benchmarks/replaying.py [--images 200]

Candidates of one layer in the middle of each model, in a study's layouts, as in `measuring.py`. An
operator that takes as long on both sides belongs to what a replay has to run: the candidate and
what comes after it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from common import header, options, plural, ratio, row, threads
from measuring import full_passes, images, opened, stand_ins
from torch import nn
from torch.profiler import ProfilerActivity, profile

from tdkit.forward.inputs import Inputs
from tdkit.layers.inventory import find_layers
from tdkit.study.layouts import set_layouts, small_maps
from tdkit.study.replay import replaced_predictions

MIDDLE = {"garipov": "conv4", "resnet18-cifar": "layer3.0.conv2"}
SHOWN = 6


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--images", type=int, default=200)
    given = parser.parse_args()
    given.batch_size, given.device = 50, "cpu"
    if given.quick:
        given.images, given.batch_size = 4, 2
    for given.model, layer in MIDDLE.items():
        show(given, layer)


def show(given: argparse.Namespace, name: str) -> None:
    model, shape = opened(given.model)
    batches, note = images(given, shape)
    sample = Inputs((batches[0][:1],))
    layer = next(each for each in find_layers(model, inputs=sample) if each.name == name)
    modules: Sequence[nn.Module] = [each.module for each in stand_ins(model, layer)]
    set_layouts(model, sample)
    with small_maps(model):
        full = operators(lambda: full_passes(model, layer, modules, batches))
        replayed = operators(lambda: replaced_predictions(model, layer, modules, batches))
    print(
        f"\n### `{name}` of {given.model}, {plural(len(modules), 'candidate')},"
        f" {plural(given.images, 'image')}{note}, {threads()}\n"
    )
    header("operator, own time", "full passes, ms", "replayed, ms", "ratio", "share of replayed")
    total = sum(full.values()), sum(replayed.values())
    for key in sorted(replayed, key=lambda key: -replayed[key])[:SHOWN]:
        line(f"`{key}`", full.get(key, 0.0), replayed[key], total[1])
    line("all", *total, total[1])


def line(name: str, full: float, replayed: float, total: float) -> None:
    share = f"{100 * replayed / total:.0f} %"
    row(name, f"{full:.0f}", f"{replayed:.0f}", ratio(full, replayed), share)


def operators(work: Callable[[], object]) -> dict[str, float]:
    """Milliseconds that each operator takes itself, in the second of two runs."""
    work()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        work()
    return {event.key: event.self_cpu_time_total / 1000 for event in found.key_averages()}


if __name__ == "__main__":
    main()
