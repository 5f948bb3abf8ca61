"""What the MACs of layers leave out, worked out by hand."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tdkit.costs.uncounted import left_out, outside_macs
from tdkit.forward.inputs import Inputs
from tdkit.layers.inventory import find_layers


class Attention(nn.Module):
    """Four heads of four features over the positions of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        heads = (
            layer(x).unflatten(-1, (4, 4)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(*heads)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Products(nn.Module):
    """A weight that is read directly, and a product of features."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        rows = functional.linear(x, self.read.weight)
        return rows @ self.called(x).transpose(1, 2)


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, dilation=2, padding=2, groups=2),
        nn.BatchNorm2d(8),
        nn.ConvTranspose2d(8, 4, 3, stride=2, groups=2),
        nn.Conv2d(4, 4, 2, padding="same", padding_mode="circular"),
    )


SEQUENCE = torch.ones(1, 10, 16)


@pytest.mark.parametrize(
    ("model", "value", "macs"),
    [
        (Attention(), SEQUENCE, 2 * 10 * 10 * 16),
        # The four matrices of its attention are one parameter and a layer that is not called.
        (nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), SEQUENCE, 13440),
        (Products(), torch.ones(1, 7, 8), 7 * 8 * 8 + 7 * 7 * 8),
        (convolutions(), torch.ones(1, 4, 9, 9), 0),
        # Four gates of 6 rows, each over 8 inputs and 6 states, at each of 5 places.
        (nn.Sequential(nn.Linear(4, 8), nn.LSTM(8, 6)), torch.ones(5, 4), 5 * 4 * 6 * (8 + 6)),
        # Three gates, two layers in two directions: the second sees both states of the first.
        (
            nn.Sequential(nn.GRU(8, 6, num_layers=2, bidirectional=True)),
            torch.ones(5, 8),
            5 * 2 * 3 * 6 * ((8 + 6) + (12 + 6)),
        ),
    ],
)
def test_macs_outside_of_layers(model: nn.Module, value: Tensor, macs: int) -> None:
    before = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    layers = find_layers(model, inputs=Inputs((value,)))
    assert outside_macs(model, layers, Inputs((value,))) == macs
    after = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    assert after == before


def test_they_are_told_with_the_layers_that_are_read_directly() -> None:
    value = torch.ones(1, 7, 8)
    layers = find_layers(Products(), inputs=Inputs((value,)))
    text = str(left_out(840, layers))
    assert text.startswith("MACs leave out 840 per input ")
    assert text.endswith("; not called as layers: read")
    assert "not called" not in str(
        left_out(840, find_layers(Attention(), inputs=Inputs((SEQUENCE,))))
    )
    assert left_out(0, layers) is None


def test_that_they_are_unknown_is_told_too() -> None:
    text = str(left_out(None, find_layers(Products(), inputs=Inputs((torch.ones(1, 7, 8),)))))
    assert text.startswith("MACs outside of convolutional and linear layers, as in ")
    assert text.endswith(", are unknown; not called as layers: read")


def test_a_model_that_does_not_run_so_is_left_alone() -> None:
    class Fails(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("never")

    assert outside_macs(Fails(nn.Linear(2, 2)), [], Inputs((torch.ones(1, 2),))) is None
