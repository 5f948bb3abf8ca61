"""The target of a refit, against least squares."""

import math

import pytest
import torch
from torch import Tensor, nn

from tdkit.calibration.pairs import Pairs, given_rows, wanted_outputs
from tdkit.calibration.passes import Passes
from tdkit.calibration.regression import RIDGES, regressed
from tdkit.forward.inputs import Inputs
from tdkit.layers.impulses import split_groups
from tdkit.layers.inventory import find_layers
from tdkit.layers.spec import spec_of


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shared = nn.Conv2d(4, 4, 3, padding=1)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.ReLU(),
            shared,
            nn.Tanh(),
            shared,
            nn.Flatten(),
            nn.Linear(196, 5),
        ).eval()


def batches(count: int = 3, size: int = 4) -> list[Inputs]:
    generator = torch.Generator().manual_seed(1)
    return [Inputs((torch.randn(size, 2, 9, 9, generator=generator),)) for _ in range(count)]


def pairs_of(model: nn.Module, dense: nn.Module, name: str, rows: int = 10_000) -> Pairs:
    layers = [x for x in find_layers(dense, inputs=batches()[0]) if x.name == name]
    wanted = wanted_outputs(dense, layers, batches(), rows, 0)[name]
    pairs = Pairs(wanted.spec)
    with Passes(model, [name], batches()) as passes:
        for _, inputs, outputs in given_rows(passes, name, wanted):
            pairs.add(inputs, outputs)
    return pairs


def weight_of(model: nn.Module, name: str) -> Tensor:
    module = model.get_submodule(name)
    spec = spec_of(module)
    return split_groups(module.get_parameter("weight").detach().double(), spec).flatten(2)


@pytest.mark.parametrize("name", ["0", "2", "6"])
def test_with_the_inputs_of_the_dense_model_the_target_is_the_weight(name: str) -> None:
    model = network()
    pairs = pairs_of(model, model, name)
    weight = weight_of(model, name)
    torch.testing.assert_close(pairs.cross, weight @ pairs.covariance, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(regressed(weight, pairs, None).weight, weight, rtol=0, atol=1e-3)


def test_every_call_of_a_layer_counts() -> None:
    model = network()
    assert pairs_of(model, model, "2").count == 2 * 12 * 49
    assert pairs_of(model, model, "2", rows=60).count == 60


def test_it_is_ridge_regression_towards_the_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 6, generator=generator).double(), torch.randn(50, 3).double()
    spec = spec_of(nn.Linear(6, 3))
    pairs = Pairs(spec)
    pairs.add(x[None, :20], y[None, :20])
    pairs.add(x[None, 20:], y[None, 20:])
    weight = torch.randn(1, 3, 6, generator=generator).double()
    found = regressed(weight, pairs, None)
    assert found.ridge == RIDGES[0]
    xc, yc = x - x.mean(0), y - y.mean(0)
    extra = math.sqrt(50 * RIDGES[0] * float(pairs.covariance[0].diagonal().mean()))
    left = torch.cat([xc, extra * torch.eye(6).double()])
    right = torch.cat([yc, extra * weight[0].T])
    oracle = torch.linalg.lstsq(left, right).solution.T
    torch.testing.assert_close(found.weight[0], oracle)


def test_what_is_held_back_chooses_how_far_to_trust_few_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1, 3, 40, generator=generator).double()
    x = torch.randn(1, 30, 40, generator=generator).double()
    noisy = x @ weight.mT + 5 * torch.randn(1, 30, 3, generator=generator).double()
    pairs = Pairs(spec_of(nn.Linear(40, 3)))
    pairs.add(x, noisy)
    apart = torch.randn(1, 200, 40, generator=generator).double()
    # The pairs are noise around the weight: what is held back says so.
    assert regressed(weight, pairs, (apart, apart @ weight.mT)).ridge == math.inf
    other = weight + torch.randn(1, 3, 40, generator=generator).double()
    many = torch.randn(1, 4000, 40, generator=generator).double()
    good = Pairs(spec_of(nn.Linear(40, 3)))
    good.add(many, many @ other.mT)
    assert regressed(weight, good, (apart, apart @ other.mT)).ridge == RIDGES[0]


def test_nothing_beyond_the_layer_is_run() -> None:
    model, ran = network(), []
    layers = [x for x in find_layers(model, inputs=batches()[0]) if x.name == "0"]
    wanted = wanted_outputs(model, layers, batches(), 100, 0)["0"]
    handle = model[1].register_forward_hook(lambda *_: ran.append(1))
    with Passes(model, ["0"], batches()) as passes:
        assert len(list(given_rows(passes, "0", wanted))) == 3
    handle.remove()
    assert ran == []
