from collections.abc import Iterable

import pytest
import torch
from batchnorm import measure_statistics
from torch import Tensor, nn

from tdkit.calibration import batchnorm
from tdkit.calibration.noise import noise_images
from tdkit.errors import UnsupportedError, UsageError
from tdkit.forward.inputs import Inputs


def match_statistics(dense: nn.Module, compressed: nn.Module, batches: Iterable[Tensor]) -> int:
    return batchnorm.match_statistics(dense, compressed, [Inputs((x,)) for x in batches])


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3)
        ).double()


def images(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 1, 8, 8, generator=generator, dtype=torch.float64) * 3 + 1


def test_on_the_data_of_the_training_the_means_are_those_of_the_features() -> None:
    dense, small, data = paired()
    weights = [parameter.clone() for parameter in small.parameters()]
    assert match_statistics(dense, small, [data]) == 1
    features = small[:4](data).detach()
    torch.testing.assert_close(small[4].running_mean, features.mean((0, 2, 3)), rtol=1e-4, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(weights, small.parameters(), strict=True))


def test_it_makes_up_for_shrunken_features() -> None:
    dense, small, data = paired()
    small.load_state_dict(dense.state_dict())
    with torch.no_grad():
        small[0].weight.mul_(0.5)
    before = (small(data) - dense(data)).norm()
    match_statistics(dense, small, [data])
    assert (small(data) - dense(data)).norm() < 0.4 * before


def test_without_data_it_says_so() -> None:
    with pytest.raises(UsageError, match="on data needs some"):
        match_statistics(network(), network(), [])


def test_a_last_batch_of_one_is_passed_over() -> None:
    dense = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).double().eval()
    small = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).double().eval()
    data = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert match_statistics(dense, small, data.split(4)) == 1
    with pytest.raises(UnsupportedError, match="does not run on the data"):
        match_statistics(dense, small, [data[:1]])


def paired() -> tuple[nn.Sequential, nn.Sequential, torch.Tensor]:
    """A trained-like network, its copy with a damaged second convolution, and real images."""
    dense, data = network().eval(), images(256)
    measure_statistics(dense, [data])
    small = network().eval()
    small.load_state_dict(dense.state_dict())
    with torch.no_grad():
        small[3].weight.mul_(torch.tensor([1.0, 0.5, 0.7]).double()[:, None, None, None])
        small[3].weight[2, 1:] = 0
    return dense, small, data


def test_matching_without_data_comes_close_to_measuring_on_data() -> None:
    dense, small, data = paired()
    measured = network().eval()
    measured.load_state_dict(small.state_dict())
    measure_statistics(measured, [data])
    before = {k: v.clone() for k, v in small.state_dict().items()}
    noise = noise_images(data, 256)
    assert match_statistics(dense, small, noise.split(64)) == 1
    for key, value in small.state_dict().items():
        touched = key in ("4.running_mean", "4.running_var")
        assert touched or torch.equal(value, before[key]), key
    want = measured[4].running_mean - before["4.running_mean"]
    have = small[4].running_mean - before["4.running_mean"]
    assert (have - want).norm() < 0.5 * want.norm()
    # The channel that is as it was keeps its statistics; of the variance of the halved filter's,
    # a quarter, three quarters of the logarithm are followed.
    ratio = small[4].running_var / before["4.running_var"]
    torch.testing.assert_close(ratio[:2], torch.tensor([1.0, 0.25**0.75]).double())
    assert ratio[2] < 0.9


def test_matching_equal_models_changes_nothing() -> None:
    dense, _, data = paired()
    same = network().eval()
    same.load_state_dict(dense.state_dict())
    assert match_statistics(dense, same, [noise_images(data)]) == 0
    assert all(
        torch.equal(a, b)
        for a, b in zip(dense.state_dict().values(), same.state_dict().values(), strict=True)
    )


def test_matching_leaves_modes_and_counters_alone() -> None:
    dense, small, data = paired()
    small[1].train()
    match_statistics(dense, small, [noise_images(data)])
    assert [module.training for module in small] == [False, True, False, False, False]
    assert int(small[4].num_batches_tracked) == int(dense[4].num_batches_tracked)


def test_a_dead_channel_keeps_its_statistics() -> None:
    dense, small, data = paired()
    with torch.no_grad():
        dense[3].weight[0] = 0
        small[3].weight[0] = 0
        dense[3].bias.zero_()
        small[3].bias.zero_()
    before = small[4].running_var.clone()
    match_statistics(dense, small, [noise_images(data)])
    assert small[4].running_var.isfinite().all()
    assert small[4].running_var[0] == before[0]


def test_noise_has_the_spectrum_of_natural_images() -> None:
    noise = noise_images(torch.empty(1, 3, 64, 64, dtype=torch.float64), 200)
    assert noise.shape == (200, 3, 64, 64)
    assert float(noise.mean()) == pytest.approx(0, abs=1e-6)
    assert float(noise.std()) == pytest.approx(1)
    amplitude = torch.fft.fft2(noise).abs().square().mean((0, 1)).sqrt()
    assert float(amplitude[0, 4] / amplitude[0, 8]) == pytest.approx(2, rel=0.1)
    assert float(amplitude[16, 0] / amplitude[8, 0]) == pytest.approx(0.5, rel=0.1)


def test_noise_without_a_size_is_white() -> None:
    noise = noise_images(torch.empty(2, 5, dtype=torch.float64), 4000)
    torch.testing.assert_close(noise.T.cov(), torch.eye(5).double(), atol=0.1, rtol=0)
