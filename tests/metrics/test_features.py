"""The feature errors of Table 1 of the paper against a sample-by-sample computation."""

import copy
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tdkit.errors import UnsupportedError
from tdkit.metrics.features import ABSOLUTE, RELATIVE, SCALED, feature_errors

METRICS = [RELATIVE, ABSOLUTE, SCALED]


class Model(nn.Module):
    """A layer between in-place operations, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 3)
        self.conv = nn.Conv2d(3, 4, 3, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.twice = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu_()
        x = self.conv(x).mul_(2).relu_()
        x = self.drop(self.norm(x)).mean((2, 3))
        return self.twice(self.twice(x).relu_())


@pytest.fixture
def model() -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Model()


@pytest.fixture
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 2, 9, 9, generator=generator) for size in (3, 1, 2)]


def perturbed(layer: nn.Module, by: float) -> nn.Module:
    result = copy.deepcopy(layer)
    with torch.no_grad():
        result.get_parameter("weight").mul_(1 + by).add_(by)
    return result


def by_hand(wanted: list[Tensor], got: list[Tensor]) -> dict[str, float]:
    absolute, relative, scaled = [], [], []
    for want, have in zip(wanted, got, strict=True):
        error = math.sqrt(sum(float(d) ** 2 for d in (want - have).double().flatten()))
        norm = math.sqrt(sum(float(d) ** 2 for d in want.double().flatten()))
        absolute.append(error)
        relative.append(error / norm)
        scaled.append(error / want.numel())
    samples = len(wanted)
    return {
        "absolute-features": sum(absolute) / samples,
        "relative-features": sum(relative) / samples,
        "scaled-features": sum(scaled) / samples,
    }


@torch.no_grad()
def test_against_one_sample_at_a_time(model: Model, batches: list[Tensor]) -> None:
    conv = [perturbed(model.conv, by) for by in (0.1, 0.01)]
    linear = perturbed(model.twice, 0.05)
    errors = feature_errors(model, {"conv": conv, "twice": [linear]}, batches, METRICS)
    dense = copy.deepcopy(model).eval()
    seen: dict[str, list[Tensor]] = {"conv": [], "twice": []}
    for sample in torch.cat(batches):
        seen["conv"].append(dense.stem(sample[None]).relu())
        x = dense.norm((2 * dense.conv(seen["conv"][-1])).relu()).mean((2, 3))
        seen["twice"] += [x, dense.twice(x).relu()]
    for stand_in, have in zip(conv, errors["conv"], strict=True):
        want = by_hand([dense.conv(x) for x in seen["conv"]], [stand_in(x) for x in seen["conv"]])
        assert have == pytest.approx(want, rel=1e-5)
    want = by_hand([dense.twice(x) for x in seen["twice"]], [linear(x) for x in seen["twice"]])
    assert errors["twice"] == [pytest.approx(want, rel=1e-5)]


def test_one_difference_is_held_at_a_time(
    model: Model, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[Tensor]] = []
    norm = torch.linalg.vector_norm

    def counting(vector: Tensor, **options: Any) -> Tensor:
        assert sum(other() is not None for other in held[1:]) == 0
        held.append(weakref.ref(vector))
        return norm(vector, **options)

    monkeypatch.setattr(torch.linalg, "vector_norm", counting)
    stand_ins = [perturbed(model.conv, by) for by in (0.1, 0.2, 0.3)]
    feature_errors(model, {"conv": stand_ins}, batches[:1], METRICS)
    assert len(held) == 4


def test_the_layer_itself_has_no_error(model: Model, batches: list[Tensor]) -> None:
    errors = feature_errors(model, {"conv": [copy.deepcopy(model.conv)]}, batches, METRICS)
    assert errors == {"conv": [dict.fromkeys((m.name for m in METRICS), 0.0)]}


def test_a_blank_sample_has_relative_error_zero() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
    data = [torch.tensor([[0.0, 0.0], [3.0, 4.0]])]
    errors = feature_errors(model, {"0": [perturbed(model[0], 1.0)]}, data, [RELATIVE])
    expected = math.hypot(3 + 7, 4 + 7) / 5  # weight 1 + w: x is off by x and by its sum
    assert errors["0"][0]["relative-features"] == pytest.approx(expected / 2)


def test_nothing_changes(model: Model, batches: list[Tensor]) -> None:
    model.norm.eval()
    state, data = copy.deepcopy(model.state_dict()), [batch.clone() for batch in batches]
    feature_errors(model, {"conv": [perturbed(model.conv, 0.1)]}, batches, METRICS)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(data, batches, strict=True))
    assert model.training
    assert not model.norm.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_hooks_go_even_when_the_model_fails(model: Model) -> None:
    with pytest.raises(UnsupportedError, match=r"does not run on the data: .*expected input"):
        feature_errors(
            model, {"conv": [copy.deepcopy(model.conv)]}, [torch.zeros(1, 5, 9, 9)], METRICS
        )
    assert not model.conv._forward_hooks


def test_a_layer_that_the_data_never_reaches_has_no_error(
    model: Model, batches: list[Tensor]
) -> None:
    assert feature_errors(model, {"unused": [model.unused]}, batches, METRICS) == {}


def test_data_that_is_not_finite_is_refused(model: Model, batches: list[Tensor]) -> None:
    batches[1][0, 0, 0, 0] = float("nan")
    with pytest.raises(UnsupportedError, match="features of 'conv' are not finite"):
        feature_errors(model, {"conv": [copy.deepcopy(model.conv)]}, batches, METRICS)


def test_half_precision_features_are_compared_in_double(
    model: Model, batches: list[Tensor]
) -> None:
    half = copy.deepcopy(model).half()
    with torch.no_grad():
        half.conv.bias.fill_(20_000)
    data = [batch.half() for batch in batches]
    stand_in = copy.deepcopy(half.conv)
    with torch.no_grad():
        stand_in.bias.zero_()
    errors = feature_errors(half, {"conv": [stand_in]}, data, METRICS)
    # 36 features of 20,000 each: norm and error are beyond 65,504, the largest float16.
    assert errors["conv"][0] == pytest.approx(
        {"absolute-features": 6 * 20e3, "relative-features": 1, "scaled-features": 20e3 / 6},
        rel=0.01,
    )


def test_models_of_several_inputs() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.Linear(2, 3)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.left(a) + b

    model = Sum()
    data = [(torch.ones(2, 2), torch.zeros(2, 3))]
    errors = feature_errors(model, {"left": [perturbed(model.left, 0.1)]}, data, METRICS)
    assert errors["left"][0]["absolute-features"] > 0


def test_a_layer_called_with_options_is_left_out() -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose1d(2, 2, 2, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x, output_size=[9])

    model = Up()
    stand_in = nn.Sequential(copy.deepcopy(model.up))
    assert feature_errors(model, {"up": [stand_in]}, [torch.ones(1, 2, 4)], METRICS) == {}
