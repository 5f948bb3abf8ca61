"""Compression without data: the factors are fitted to inputs made from the model itself."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdkit
from tdkit.api.compression import Compression
from tdkit.calibration.divergence import divergence, outputs_of
from tdkit.calibration.synthesis import STEPS
from tdkit.compression import calibrating, synthetic
from tdkit.compression.refit import Refitted
from tdkit.compression.synthetic import synthetic_inputs
from tdkit.errors import UnsupportedError
from tdkit.layers.traced import TracedModel

SHAPE = (1, 8, 8)


def images(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, *SHAPE, generator=generator).cumsum(-1) - 1


def model() -> nn.Sequential:
    """With the statistics of some images, which compression never sees."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
        )  # fmt: skip
    for seed in range(20):
        net(images(32, seed))
    return net.eval()


def compressed(net: nn.Module, budget: float = 0.4, **options: Any) -> Compression:
    if "example_inputs" not in options:
        options["input_shape"] = SHAPE
    options.setdefault("calibration", "synthetic")
    return tdkit.compress(net, budget, measure=False, methods=["svd", "tucker"], **options)


def same(one: Compression, other: Compression) -> bool:
    have, want = one.model.state_dict(), other.model.state_dict()
    return list(have) == list(want) and all(torch.equal(have[key], want[key]) for key in want)


def test_on_images_that_it_never_saw_it_is_nearer_to_the_dense_model_than_with_noise() -> None:
    net, unseen = model(), [tdkit_inputs(images(100, 99))]
    wanted = list(outputs_of(net, unseen))
    made, noise = compressed(net), compressed(net, calibration="noise")
    assert made.plan.moves == noise.plan.moves
    assert divergence(wanted, outputs_of(made.model, unseen)) < 0.7 * divergence(
        wanted, outputs_of(noise.model, unseen)
    )
    assert made.calibration == made.plan.calibration == "synthetic"
    assert made.steps[0].name == "BatchNorm"  # on the same images; the refit may win or not


def tdkit_inputs(batch: Tensor) -> Any:
    return TracedModel.of(model(), batch).read(batch)


def test_a_plan_says_so_and_is_repeated_bit_for_bit() -> None:
    net = model()
    first = compressed(net, seed=5)
    plan = type(first.plan).from_json(json.loads(json.dumps(first.plan.to_json())))
    again = tdkit.apply(plan, net, input_shape=SHAPE, measure=False)
    assert same(first, again)
    assert again.steps == first.steps
    assert not same(
        first, tdkit.apply(replace(plan, seed=6), net, input_shape=SHAPE, measure=False)
    )


def test_a_plan_that_does_not_say_means_noise() -> None:
    net = model()
    value = compressed(net).plan.to_json()
    del value["calibration"]
    old = tdkit.apply(tdkit.Plan.from_json(value), net, input_shape=SHAPE, measure=False)
    assert old.calibration == "noise"
    assert same(old, compressed(net, calibration="noise"))


@pytest.mark.parametrize("options", [{"effort": "fast"}, {"dry_run": True}])
def test_what_is_to_be_fast_makes_no_inputs(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrating, "synthetic_inputs", None)
    found = compressed(model(), **options)
    assert same(found, compressed(model(), calibration="noise"))
    assert found.plan.calibration == "synthetic"
    assert found.calibration == "noise"


def test_a_fit_that_is_worse_on_inputs_held_back_is_taken_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def spoiled(small: nn.Module, *_args: Any, **_options: Any) -> Refitted:
        with torch.no_grad():
            small[3][0].weight.neg_()
        return Refitted({})

    monkeypatch.setattr(calibrating, "refit", spoiled)
    net = model()
    found = compressed(net)
    assert any("taken back" in note for note in found.notes)
    assert found.calibration == "synthetic"
    assert [step.name for step in found.steps] == ["BatchNorm"]


def test_without_batchnorm_or_a_shape_it_is_as_with_noise() -> None:
    net = nn.Sequential(*(layer for layer in model() if not isinstance(layer, nn.BatchNorm2d)))
    found = compressed(net)
    assert found.steps == ()
    assert found.calibration == "none"
    assert same(found, compressed(net, calibration="none"))
    assert tdkit.compress(model(), 0.4, methods="svd", measure=False).steps == ()


def test_a_model_that_is_too_large_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = TracedModel.of(model(), images(2, 0))
    work = STEPS * 64 * sum(layer.macs or 0 for layer in traced.layers)
    monkeypatch.setattr(synthetic, "_WORK", work)
    batches = synthetic_inputs(traced, 0)
    assert len(batches) == 10
    for batch in batches:
        half, mirrored = batch.args[0].chunk(2)
        assert torch.equal(mirrored, half.flip(-1))
    monkeypatch.setattr(synthetic, "_WORK", work - 1)
    with pytest.raises(UnsupportedError, match="would take"):
        synthetic_inputs(traced, 0)
    net = model()
    found = compressed(net)
    assert any(
        "noise stands in for inputs made from the model: it would take" in note
        for note in found.notes
    )
    assert same(found, compressed(net, calibration="noise"))


class Words(nn.Module):
    """Two layers over the vectors of some words."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 16)
        self.first, self.second, self.head = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        """Scores."""
        x = self.second(self.first(self.words(ids)).relu()).relu()
        result: Tensor = self.head(x.mean(1))
        return result


def test_a_model_of_tokens_is_fitted_to_random_ones() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Words().eval()
    ids = torch.zeros(3, 9, dtype=torch.long)
    found = compressed(net, 0.8, example_inputs=ids, include_ends=True)
    assert [step.name for step in found.steps] == ["the factors", "refit"]
    assert found.steps[1].divergence < found.steps[0].divergence
    assert found.calibration == "synthetic"


def test_the_best_effort_without_data_makes_inputs() -> None:
    for effort, calibration in (("default", "noise"), ("best", "synthetic")):
        done = compressed(model(), calibration="auto", effort=effort)
        assert done.plan.calibration == done.calibration == calibration
