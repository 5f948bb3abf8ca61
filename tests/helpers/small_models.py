"""Small models of linear layers and convolutions, compressed, saved and loaded again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from tdkit.checkpoint import load_into, load_model, save_model
from tdkit.compression.applying import Compressed
from tdkit.compression.compress import Goal, compress_model
from tdkit.compression.scoring import Grid
from tdkit.decompositions.base import Decomposition
from tdkit.layers.inventory import find_layers
from tdkit.layers.reasons import is_factorization
from tdkit.layers.traced import TracedModel
from tdkit.metrics.weights import RELATIVE
from tdkit.planners.greedy import greedy


class Mlp(nn.Module):
    """Its inputs have one axis before the features."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(24, 32), nn.Linear(32, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Probabilities before the softmax."""
        hidden = self.second(torch.relu(self.first(x)))
        result: Tensor = self.third(torch.relu(hidden))
        return result


class Block(nn.Module):
    """A transformer's block, its attention made of plain layers: two axes before the features."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(24, 24, bias=False) for _ in range(3))
        self.up, self.down, self.norm = nn.Linear(24, 48), nn.Linear(48, 24), nn.LayerNorm(24)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens to tokens."""
        mixed = torch.softmax(self.q(x) @ self.k(x).mT, -1) @ self.v(x)
        result: Tensor = self.norm(x + self.down(torch.relu(self.up(mixed))))
        return result


class Convolutions(nn.Sequential):
    """With a stride, a padding mode, no bias, and a kernel that is not square."""

    def __init__(self) -> None:
        first = nn.Conv2d(3, 12, 3, padding=1)
        second = nn.Conv2d(12, 16, 3, stride=2, padding=1, padding_mode="circular")
        third = nn.Conv2d(16, 16, (3, 1), padding="same", bias=False)
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
        super().__init__(first, nn.ReLU(), second, nn.ReLU(), third, nn.BatchNorm2d(16), *head)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (Mlp, (24,)),
    "block": (Block, (7, 24)),
    "convolutions": (Convolutions, (3, 8, 8)),
}


def compressed(name: str, key: str, method: Decomposition) -> tuple[Compressed, Tensor]:
    """A model under one method at 0.6, verified, and inputs for it."""
    create, shape = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create().eval()
    inputs = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    grid, goal = Grid({key: method}, [RELATIVE]), Goal(0.6, calibration="none")
    result = compress_model(TracedModel.of(model, inputs, include_ends=True), grid, goal, greedy)
    assert result.verified
    assert not result.put_back
    assert result.plan.moves
    return result, inputs


def check_saved(result: Compressed, inputs: Tensor, file: Path, format: str) -> None:
    """It loads again, gives the same output, and shows its layers as factorized."""
    cls = type(result.model)
    save_model(result.model, file, format=format, structure=result.structure)
    if format == "module":
        own = [f"{cls.__module__}:{cls.__name__}"]
        loaded = load_model(file, models={}, allow_classes=own).model
    else:
        loaded = load_into(cls(), file).model.eval()
    assert torch.equal(loaded(inputs), result.model(inputs))
    reasons = {layer.name: layer.reason for layer in find_layers(loaded, include_ends=True)}
    for move in result.plan.moves:
        module = loaded.get_submodule(move.layer)
        assert isinstance(module, nn.Sequential)
        assert is_factorization(module)
        inner = [why for name, why in reasons.items() if name.startswith(f"{move.layer}.")]
        assert inner
        assert all("already factorized" in str(why) for why in inner)


def check_exported(result: Compressed, inputs: Tensor, file: Path) -> None:
    """onnxruntime gives the same output, at another batch size too."""
    import onnxruntime

    save_model(result.model, file, format="onnx", input_shape=inputs.shape[1:])
    session = onnxruntime.InferenceSession(str(file))
    for batch in (inputs, inputs[:1].repeat(5, *(1 for _ in inputs.shape[1:]))):
        (output,) = session.run(None, {"input": batch.numpy()})
        want = result.model(batch)
        torch.testing.assert_close(torch.from_numpy(output), want, rtol=1e-4, atol=1e-5)
