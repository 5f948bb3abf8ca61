"""BatchNorm that is calibrated on images made out of its statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdkit
from tdkit.calibration.divergence import divergence, outputs_of
from tdkit.compression import calibrating
from tdkit.forward.inputs import Inputs

SHAPE = (3, 12, 12)


def images(count: int, seed: int) -> Tensor:
    """Smooth and not of mean zero, as pictures are."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(count, 3, 4, 4, generator=generator)
    return nn.functional.interpolate(small, size=12, mode="bilinear") * 2


def model(norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1, bias=False), norm(16), nn.ReLU()),
            *(nn.Conv2d(16, 24, 3, padding=1, bias=False), norm(24), nn.ReLU()),
            *(nn.Conv2d(24, 24, 3, padding=1), norm(24), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 6)),
        ).train()
        for seed in range(30):
            made(images(32, seed))
    return made.eval()


def compressed(dense: nn.Module, calibration: str, **more: Any) -> tdkit.Compression:
    options = {"input_shape": SHAPE, "measure": False, "methods": ["tucker", "svd"]} | more
    return tdkit.compress(dense, 0.4, calibration=calibration, **options)


def same(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_the_outputs_come_closer_to_the_dense_ones_than_with_noise() -> None:
    dense = model()
    noise, made = compressed(dense, "noise"), compressed(dense, "synthetic")
    assert made.plan.moves == noise.plan.moves
    real = [Inputs((images(200, 99),))]
    wanted = list(outputs_of(dense, real))
    apart = [divergence(wanted, outputs_of(each.model, real)) for each in (noise, made)]
    assert apart[1] < apart[0]
    assert "calibrated on images synthesised from its statistics" in str(made)


def test_the_plan_repeats_it() -> None:
    dense = model()
    done = compressed(dense, "synthetic", seed=3)
    assert done.plan.calibration == "synthetic"
    again = tdkit.apply(done.plan, dense, input_shape=SHAPE, measure=False)
    assert again.calibration == done.calibration == "synthetic"
    assert same(done.model, again.model)


def test_the_fast_one_is_that_of_noise() -> None:
    dense = model()
    fast = compressed(dense, "synthetic", effort="fast")
    assert same(fast.model, compressed(dense, "noise").model)
    assert "BatchNorm is calibrated on noise" in str(fast)


def test_without_batchnorm_there_is_nothing_to_make_images_of() -> None:
    dense = model(nn.InstanceNorm2d)
    done = compressed(dense, "synthetic")
    assert done.calibration == "none"
    assert same(done.model, compressed(dense, "none").model)


def test_a_model_that_would_take_minutes_stays_with_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = model()
    monkeypatch.setattr(calibrating, "_PASSES", 10**6)
    done = compressed(dense, "synthetic")
    assert done.calibration == "noise"
    assert "would take minutes" in " ".join(done.notes)
    assert same(done.model, compressed(dense, "noise").model)


class Once(nn.Sequential):
    """Runs without gradients only."""

    def forward(self, x: Tensor) -> Tensor:
        """Scores."""
        result: Tensor = super().forward(x.detach())
        return result


def test_a_model_that_cannot_be_differentiated_stays_with_noise() -> None:
    dense = Once(*model())
    done = compressed(dense, "synthetic")
    assert done.calibration == "noise"
    assert "noise stands in for images synthesised" in " ".join(done.notes)
    assert same(done.model, compressed(dense, "noise").model)


def test_a_dry_run_makes_no_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrating, "synthetic_images", lambda *_, **__: pytest.fail("made some"))
    assert compressed(model(), "synthetic", dry_run=True).plan.calibration == "synthetic"


def test_the_best_effort_without_data_makes_images() -> None:
    dense = model()
    for effort, calibration in (("default", "noise"), ("best", "synthetic")):
        done = compressed(dense, "auto", effort=effort)
        assert done.plan.calibration == done.calibration == calibration
