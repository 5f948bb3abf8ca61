"""Images made out of what BatchNorm remembers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tdkit.calibration import synthesis
from tdkit.calibration.noise import noise_images
from tdkit.calibration.synthesis import mismatch, synthetic_images
from tdkit.errors import UnsupportedError

LIKE = torch.zeros(1, 3, 12, 12)


class Net(nn.Module):
    """Convolutions that learned the statistics of pictures unlike noise."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.act, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.5)
        self.head: nn.Module = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Scores."""
        x = self.act(self.last(self.second(self.act(self.norm(self.first(x))))))
        result: Tensor = self.head(self.drop(x.mean((2, 3))))
        return result


def model() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = Net().train()
        for _ in range(30):
            made(nn.functional.interpolate(torch.rand(32, 3, 3, 3), size=12) * 2)
    return made.eval()


def test_every_batchnorm_is_given_what_it_remembers() -> None:
    dense = model()
    start = mismatch(dense, noise_images(LIKE, 64))
    few, more = (mismatch(dense, synthetic_images(dense, LIKE, 64, n)) for n in (5, 60))
    assert more < 0.05 * start
    assert more < few < start


def test_the_mismatch_is_the_divergence_of_normal_distributions() -> None:
    norm = nn.BatchNorm2d(3).eval()
    given = torch.randn(50, 3, 9, 9) * torch.tensor([1.0, 2.0, 0.5])[:, None, None] + 0.3
    assert norm.running_mean is not None
    norm.running_mean.copy_(torch.tensor([0.0, 1.0, -1.0]))
    mean, variance = given.mean((0, 2, 3)), given.var((0, 2, 3), correction=0)
    stored = torch.distributions.Normal(norm.running_mean, (1 + norm.eps) ** 0.5)
    seen = torch.distributions.Normal(mean, (variance + norm.eps).sqrt())
    wanted = torch.distributions.kl_divergence(seen, stored).mean()
    assert mismatch(norm, given) == pytest.approx(float(wanted), rel=1e-4)


def test_images_look_like_the_classes_that_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = model()
    with torch.no_grad():
        dense.head.get_parameter("weight").mul_(20)
    drawn = torch.rand(32, generator=torch.Generator().manual_seed(0))
    classes = (drawn * 4).long()
    missed = []
    for weight in (0, synthesis._CLASS):
        monkeypatch.setattr(synthesis, "_CLASS", weight)
        with torch.no_grad():
            scores = dense(synthetic_images(dense, LIKE, 32))
        missed.append(float(nn.functional.cross_entropy(scores, classes)))
    assert missed[1] < 0.9 * missed[0]


def test_a_seed_makes_one_set_of_images() -> None:
    dense = model()
    one, same, other = (synthetic_images(dense, LIKE, 8, 3, seed) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_images_are_of_the_models_type(dtype: torch.dtype) -> None:
    dense = model().to(dtype)
    like = LIKE.to(dtype)
    found = synthetic_images(dense, like, 16)
    assert found.dtype == dtype
    assert mismatch(dense, found) < 0.5 * mismatch(dense, noise_images(like, 16))


class Failing(nn.Module):
    """Fails in its second pass."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        """Nothing after the first pass."""
        self.passes += 1
        if self.passes > 1:
            raise RuntimeError("enough")
        return x


@pytest.mark.parametrize("head", [None, Failing()])
def test_the_model_stays_as_it_is(head: nn.Module | None) -> None:
    dense = model()
    dense.head = (head or dense.head).eval()
    dense.drop.train()
    dense.first.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    wanted = [p.requires_grad for p in dense.parameters()]
    randomness = torch.get_rng_state()
    if head is None:
        synthetic_images(dense, LIKE, 8, 3)
    else:
        with pytest.raises(UnsupportedError, match=r"no inputs can be synthesised: .*enough"):
            synthetic_images(dense, LIKE, 8, 3)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert [p.requires_grad for p in dense.parameters()] == wanted
    assert all(p.grad is None for p in dense.parameters())
    assert [name for name, module in dense.named_modules() if module.training] == ["drop"]
    assert not any(module._forward_pre_hooks for module in dense.modules())
    assert torch.equal(torch.get_rng_state(), randomness)


def test_what_gives_no_images_is_told() -> None:
    with pytest.raises(UnsupportedError, match="no BatchNorm with statistics"):
        synthetic_images(nn.Conv2d(3, 4, 3), LIKE, 8, 2)
    broken = model()
    with torch.no_grad():
        broken.second.weight.fill_(torch.nan)
    with pytest.raises(UnsupportedError, match="not finite"):
        synthetic_images(broken, LIKE, 8, 2)
