"""A residual network of BasicBlocks for Fashion-MNIST, trained when it is first asked for.

    python benchmarks/residual.py

2.8 million parameters, about ten minutes on two cores. It goes to build/residual.pt, which is not
part of the project.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from tdkit.opening import open_dataset
from tdkit.registry import load_registry
from tdkit.training.loop import evaluate, train
from tdkit.training.recipe import FitRecipe, OptimizerRecipe, ScheduleRecipe

WIDTHS = (32, 64, 128, 256)
FILE = Path("build") / "residual.pt"


class Residual(nn.Sequential):
    """A stem that halves the image, two blocks of each width, and a head."""

    def __init__(self) -> None:
        blocks: list[nn.Module] = []
        before = WIDTHS[0]
        for width in WIDTHS:
            blocks += [block(before, width, 1 if width == before else 2), block(width, width, 1)]
            before = width
        super().__init__(
            nn.Conv2d(1, WIDTHS[0], 5, stride=2, padding=2, bias=False),
            nn.BatchNorm2d(WIDTHS[0]),
            nn.ReLU(),
            *blocks,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(before, 10),
        )


def block(before: int, width: int, stride: int) -> BasicBlock:
    """A BasicBlock with a projection where the shape changes."""
    same = before == width and stride == 1
    projection = nn.Sequential(
        nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width)
    )
    return BasicBlock(before, width, stride, None if same else projection)


def dense_residual() -> nn.Module:
    """The trained network, from the file or anew."""
    model = Residual()
    if not FILE.exists():
        FILE.parent.mkdir(exist_ok=True)
        torch.save(trained(model), FILE)
    model.load_state_dict(torch.load(FILE, weights_only=True))
    return model.eval()


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Train it, and say how it went."""
    data = open_dataset("fashion-mnist", load_registry())
    torch.manual_seed(0)
    recipe = FitRecipe(
        epochs=6,
        batch_size=128,
        optimizer=OptimizerRecipe("sgd", 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
        schedule=ScheduleRecipe("one-cycle"),
        channels_last=True,
    )
    generator = torch.Generator().manual_seed(0)
    result = train(
        model, data, recipe, generator=generator,
        on_epoch=lambda line, _: print(line, flush=True),
    )  # fmt: skip
    model.load_state_dict(result.weights)
    print(f"{evaluate(model, data.test).accuracy:.2%} on the test images")
    return result.weights


if __name__ == "__main__":
    dense_residual()
