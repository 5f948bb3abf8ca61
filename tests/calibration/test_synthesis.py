"""Inputs made from what BatchNorm has stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tdkit.calibration.noise import noise_images
from tdkit.calibration.synthesis import mismatch, random_tokens, synthetic_images
from tdkit.errors import UnsupportedError
from tdkit.forward.inputs import Inputs

LIKE = torch.zeros(1, 1, 8, 8)


def network() -> nn.Sequential:
    """With statistics of bright, correlated images, which noise has not."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
            nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3),
        )  # fmt: skip
        for _ in range(40):
            net(torch.rand(64, 1, 8, 8).cumsum(-1) - 1)
    return net.eval()


def test_their_statistics_are_nearer_to_the_stored_ones_than_those_of_noise() -> None:
    net = network()
    made = synthetic_images(net, LIKE)
    noise = noise_images(LIKE, len(made))
    assert made.shape == noise.shape
    assert mismatch(net, made) < 0.1 * mismatch(net, noise)


def test_the_mismatch_is_that_of_normal_distributions() -> None:
    norm = nn.BatchNorm2d(2, eps=0).double().eval()
    norm.running_mean = torch.tensor([1.0, -2.0]).double()
    norm.running_var = torch.tensor([4.0, 0.25]).double()
    given = torch.randn(50, 2, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    features = given.transpose(0, 1).flatten(1)
    normal = torch.distributions.Normal
    had = normal(features.mean(1), features.std(1, correction=0))
    kept = normal(norm.running_mean, norm.running_var.sqrt())
    wanted = float(torch.distributions.kl_divergence(had, kept).mean())
    assert mismatch(norm, given) == pytest.approx(wanted, rel=1e-12)


def test_the_seed_decides() -> None:
    first, again, other = (synthetic_images(network(), LIKE, seed, 3) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def state(net: nn.Module) -> dict[str, Any]:
    numbers = {key: value.clone() for key, value in net.state_dict().items()}
    return {
        "numbers": {key: value.tolist() for key, value in numbers.items()},
        "modes": [module.training for module in net.modules()],
        "grads": [None if p.grad is None else p.grad.tolist() for p in net.parameters()],
        "required": [p.requires_grad for p in net.parameters()],
        "hooks": [len(module._forward_pre_hooks) for module in net.modules()],
        "random": torch.get_rng_state().tolist(),
    }


def test_the_model_stays_as_it_is() -> None:
    net = network()
    net.train()
    net[0].weight.requires_grad_(False)
    net[3].weight.grad = torch.ones_like(net[3].weight)
    before = state(net)
    synthetic_images(net, LIKE, steps=2)
    assert state(net) == before


class Breaking(nn.Module):
    """Runs only so many times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.inner, self.times = network(), times

    def forward(self, x: Tensor) -> Tensor:
        """Scores."""
        self.times -= 1
        if self.times < 0:
            raise ValueError("enough\nof that")
        result: Tensor = self.inner(x)
        return result


def test_a_model_that_breaks_stays_as_it_is_and_says_why() -> None:
    net = Breaking(2)
    before = state(net)
    with pytest.raises(UnsupportedError, match=r"no inputs can be made: enough$"):
        synthetic_images(net, LIKE)
    assert state(net) == before


def test_a_model_that_has_no_gradient_says_so() -> None:
    net = network()
    net[0].register_forward_pre_hook(lambda _module, args: (args[0].detach(),))
    with pytest.raises(UnsupportedError, match="no inputs can be made"):
        synthetic_images(net, LIKE, steps=2)


def test_features_that_are_not_finite_say_so() -> None:
    net = network()
    net[1].running_var.fill_(torch.nan)
    with pytest.raises(UnsupportedError, match="not finite"):
        synthetic_images(net, LIKE, steps=2)


class Words(nn.Module):
    """A vocabulary, and fewer kinds of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.kinds = nn.Embedding(50, 4), nn.Embedding(2, 4)

    def forward(self, ids: Tensor, kinds: Tensor, scale: float = 1.0) -> Tensor:
        """Their vectors."""
        result: Tensor = self.words(ids) + scale * self.kinds(kinds)
        return result


def test_tokens_come_from_all_the_vocabulary_and_the_rest_is_repeated() -> None:
    net, ids, kinds = Words(), torch.zeros(1, 7, dtype=torch.long), torch.ones(1, 7).long()
    found = random_tokens(net, Inputs((ids,), {"kinds": kinds, "scale": 2.0}), [40, 60])
    assert [each.batch for each in found] == [40, 60]
    tokens = torch.cat([each.args[0] for each in found])
    assert tokens.dtype == torch.long
    assert tokens.unique().tolist() == list(range(50))
    assert all(bool((each.kwargs["kinds"] == 1).all()) for each in found)
    assert all(each.run(net).shape == (len(each.args[0]), 7, 4) for each in found)
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_without_tokens_there_are_none() -> None:
    assert random_tokens(nn.Linear(3, 2), Inputs((torch.ones(1, 3),)), [4]) == ()
