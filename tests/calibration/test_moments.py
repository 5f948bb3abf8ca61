"""Moments of the inputs of layers, against rows stacked by hand."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tdkit.calibration.moments import input_moments
from tdkit.errors import UnsupportedError
from tdkit.forward.inputs import Inputs
from tdkit.layers.evidence import Moments


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def by_hand(rows: Tensor) -> Moments:
    return Moments(len(rows), rows.mean(0), rows.mT @ rows / len(rows))


def check(found: Moments, rows: Tensor) -> None:
    want = by_hand(rows)
    assert found.count == want.count
    torch.testing.assert_close(found.mean, want.mean)
    torch.testing.assert_close(found.second, want.second)


# A layer, an input for it, and the same as rows (positions, channels).
CASES: dict[str, tuple[nn.Module, Tensor, Tensor]] = {
    "linear": (nn.Linear(4, 2), (x := noise(5, 4)), x),
    "tokens": (nn.Linear(4, 2), (x := noise(2, 3, 4)), x.reshape(6, 4)),
    "windows": (nn.Linear(4, 2), (x := noise(2, 3, 5, 4)), x.reshape(30, 4)),
    "one row": (nn.Linear(4, 2), (x := noise(4)), x[None]),
    "conv1d": (nn.Conv1d(4, 2, 3), (x := noise(2, 4, 5)), x.permute(0, 2, 1).reshape(10, 4)),
    "conv2d": (
        nn.Conv2d(4, 2, 3, stride=2),
        (x := noise(2, 4, 5, 6)),
        x.permute(0, 2, 3, 1).reshape(60, 4),
    ),
    "no batch": (nn.Conv2d(4, 2, 3), (x := noise(4, 5, 6)), x.permute(1, 2, 0).reshape(30, 4)),
    "conv3d": (
        nn.Conv3d(4, 2, 2),
        (x := noise(2, 4, 3, 2, 2)),
        x.permute(0, 2, 3, 4, 1).reshape(24, 4),
    ),
    "grouped": (
        nn.Conv2d(4, 6, 3, groups=2),
        (x := noise(2, 4, 5, 6)),
        x.permute(0, 2, 3, 1).reshape(60, 4),
    ),
    "transposed": (
        nn.ConvTranspose2d(4, 2, 3, stride=2),
        (x := noise(2, 4, 5, 6)),
        x.permute(0, 2, 3, 1).reshape(60, 4),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_by_hand(case: str) -> None:
    layer, x, rows = CASES[case]
    model = nn.Sequential(layer.double())
    found = input_moments(model, ["0"], [Inputs((x,)), Inputs((2 * x + 1,))])
    check(found["0"], torch.cat([rows, 2 * rows + 1]))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.twice, self.named = nn.Linear(4, 4), nn.Linear(4, 4)
        self.unused, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Any:
        x = self.norm(self.drop(x))
        return self.named(input=self.twice(self.twice(x))).mul_(0)


def model() -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Model().double()


def test_all_calls_count_and_what_is_never_reached_is_left_out() -> None:
    dense, x = model(), noise(6, 4)
    found = input_moments(dense, ["twice", "named", "unused"], [Inputs((x,))])
    assert set(found) == {"twice", "named"}
    seen = copy.deepcopy(dense).eval()
    with torch.no_grad():
        first = seen.norm(x)
        second = seen.twice(first)
        check(found["twice"], torch.cat([first, second]))
        check(found["named"], seen.twice(second))


def test_nothing_changes() -> None:
    dense, x = model(), noise(6, 4)
    state, given = copy.deepcopy(dense.state_dict()), x.clone()
    input_moments(dense, ["twice"], [Inputs((x,))])
    assert all(torch.equal(value, state[key]) for key, value in dense.state_dict().items())
    assert torch.equal(x, given)
    assert dense.training
    assert not any(m._forward_pre_hooks for m in dense.modules())


def test_a_model_that_does_not_run_on_them_is_told() -> None:
    dense = model()
    with pytest.raises(UnsupportedError, match="the model does not run on the data: "):
        input_moments(dense, ["twice"], [Inputs((noise(6, 5),))])
    assert not dense.twice._forward_pre_hooks


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_of_many_batches_are_in_double(dtype: torch.dtype) -> None:
    """In half precision a sum of thousands would stand still."""
    dense = nn.Sequential(nn.Linear(2, 2)).to(dtype)
    x = torch.ones(8, 2, dtype=dtype)
    found = input_moments(dense, ["0"], [Inputs((x,))] * 600)["0"]
    assert found.count == 4800
    assert found.mean.tolist() == [1.0, 1.0]
    assert found.second.tolist() == [[1.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_nor_does_one_large_batch_overflow_half_precision(dtype: torch.dtype) -> None:
    dense = nn.Sequential(nn.Linear(2, 2)).to(dtype)
    found = input_moments(dense, ["0"], [Inputs((torch.full((70_001, 2), 3.0, dtype=dtype),))])["0"]
    assert found.mean.tolist() == pytest.approx([3.0, 3.0], rel=1e-6)
    assert found.second.flatten().tolist() == pytest.approx([9.0] * 4, rel=1e-6)
