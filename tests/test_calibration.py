import pytest
import torch
from torch import nn

from tdkit.calibration import recalibrate
from tdkit.errors import UsageError


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3)
        ).double()


def images(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 1, 8, 8, generator=generator, dtype=torch.float64) * 3 + 1


def test_statistics_are_those_of_the_data() -> None:
    model, data = network().eval(), images(64)
    weights = [parameter.clone() for parameter in model.parameters()]
    assert recalibrate(model, data.split(16)) == 2
    features = model[0](data).detach()
    torch.testing.assert_close(model[1].running_mean, features.mean((0, 2, 3)))
    # An average of the batches' unbiased variances, hence a little off that of all images.
    torch.testing.assert_close(model[1].running_var, features.var((0, 2, 3)), rtol=0.05, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_modes_and_momentum_are_as_before() -> None:
    model = network().eval()
    model[0].train()
    recalibrate(model, [images(8)])
    assert [module.training for module in model] == [True, False, False, False, False]
    assert model[1].momentum == 0.1


def test_it_makes_up_for_shrunken_features() -> None:
    dense, small = network().eval(), network().eval()
    data = images(64)
    recalibrate(dense, [data])
    small.load_state_dict(dense.state_dict())
    with torch.no_grad():
        small[0].weight.mul_(0.5)
    before = (small(data) - dense(data)).norm()
    recalibrate(small, [data])
    assert (small(data) - dense(data)).norm() < 0.05 * before


def test_without_data_it_says_so() -> None:
    with pytest.raises(UsageError, match="needs data"):
        recalibrate(network(), [])
