"""Convolutions in both memory layouts: where channels last is the slower one, which a study avoids.

    python benchmarks/layouts.py [--batch-size 50]

The rule in `tdkit/study/layouts.py` comes from this table: a study runs a convolution contiguous
where its weights have at least 2^19 entries, its kernel more than one and its map at most 100
pixels. "last" and "first" say which layout that is, for square maps; a ratio above 1 means that
channels last is faster.
"""

from __future__ import annotations

import torch
from common import header, median_seconds, options, row, threads
from torch import Tensor, nn

from tdkit.forward.inputs import Inputs
from tdkit.study.layouts import set_layouts

SIDES = (1, 2, 4, 7, 8, 10, 14, 28)
CONVOLUTIONS = {
    "64→64, 3×3": (64, 64, 3),
    "128→128, 3×3": (128, 128, 3),
    "256→256, 3×3": (256, 256, 3),
    "512→512, 3×3": (512, 512, 3),
    "512→512, 1×1": (512, 512, 1),
    "1024→1024, 1×1": (1024, 1024, 1),
}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    sides = SIDES[1:3] if given.quick else SIDES
    print(
        f"Seconds contiguous over seconds with channels last, and the layout that a study takes;"
        f" batches of {given.batch_size}, {threads()}, medians of {given.repeats} runs.\n"
    )
    header("convolution", *(f"{side}×{side}" for side in sides))
    for name, (channels, out, kernel) in CONVOLUTIONS.items():
        convolution = nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False)
        cells = []
        for side in sides:
            features = torch.randn(given.batch_size, channels, side, side)
            found = advantage(convolution, features, given.repeats)
            cells.append(f"{found:.2f} {chosen(convolution, features)}")
        row(name, *cells)


@torch.no_grad()
def advantage(convolution: nn.Conv2d, features: Tensor, repeats: int) -> float:
    """How many times faster it is with channels last."""
    seconds = []
    for layout in (torch.contiguous_format, torch.channels_last):
        convolution.to(memory_format=layout)
        given = features.contiguous(memory_format=layout)
        seconds.append(median_seconds(lambda given=given: convolution(given), repeats))
    return seconds[0] / seconds[1]


@torch.no_grad()
def chosen(convolution: nn.Conv2d, features: Tensor) -> str:
    """Which layout the convolution gets in a study, behind another with channels last."""
    channels = features.shape[1]
    before = nn.Conv2d(channels, channels, 3, padding=1, groups=channels // 2)
    set_layouts(nn.Sequential(before, convolution), Inputs((features[:1],)))
    last = convolution.weight.is_contiguous(memory_format=torch.channels_last)
    return "last" if last else "first"


if __name__ == "__main__":
    main()
