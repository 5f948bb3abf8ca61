"""What errors of weights do to a layer's output and to the model's, against running them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdkit
from tdkit.calibration import curvature
from tdkit.calibration.curvature import curvatures
from tdkit.errors import UsageError
from tdkit.forward.inputs import Inputs
from tdkit.layers.evidence import Curvature
from tdkit.layers.traced import TracedModel


class Net(nn.Module):
    """A convolution with a bias, a grouped one that BatchNorm follows, one of neither, a head."""

    def __init__(self, scores: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.grouped, self.norm = nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6)
        self.plain, self.never = nn.Conv2d(6, 5, 1, bias=False), nn.Conv2d(6, 5, 1)
        self.head = nn.Linear(5, 3)
        self.scores = scores

    def forward(self, x: Tensor) -> Any:
        """Scores (batch, 3), or something else in a dict."""
        x = self.norm(self.grouped(self.first(x).relu())).relu_()
        x = self.head(self.plain(x).mean((2, 3)))
        return x if self.scores else {"here": x[:, :, None]}


def net(scores: bool = True) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net(scores).eval()


def images(count: int = 40) -> Tensor:
    return torch.randn(count, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def found(model: nn.Module, outputs: bool = False, count: int = 40) -> dict[str, Curvature]:
    batches = [Inputs((x,)) for x in images(count).split(17)]
    traced = TracedModel.of(model, images(2), include_ends=True)
    return curvatures(traced.model, traced.layers, batches, batches[0], 0, outputs=outputs)


def given(model: nn.Module, name: str) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.extend(args))
    with torch.no_grad():
        model(images())
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(
    ("name", "centred"), [("first", True), ("grouped", True), ("plain", False)]
)
def test_an_error_of_the_output_is_that_of_running_it(name: str, centred: bool) -> None:
    model = net()
    wrong = copy.deepcopy(model.get_submodule(name)).double()
    with torch.no_grad():
        wrong.weight.copy_(torch.randn(wrong.weight.shape))
        if wrong.bias is not None:
            wrong.bias.zero_()
        rows = wrong(given(model, name).double()).movedim(1, -1).flatten(0, -2)
    if centred:
        rows = rows - rows.mean(0)
    by_hand = float(rows.square().sum(1).mean().sqrt())
    assert found(model)[name].of_output(wrong.weight.detach()) == pytest.approx(by_hand, rel=1e-5)


def test_wide_patches_count_by_their_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curvature, "_LARGEST", 8 * 4**2)
    model = net()
    some = found(model)
    assert "head" not in some  # its inputs are too many whatever one does
    assert some["grouped"].inputs.shape == (2, 2, 2)
    patches = nn.functional.unfold(given(model, "grouped"), 3).unflatten(1, (2, 2, 9))
    for group in range(2):
        rows = patches[:, group].movedim(1, -1).flatten(0, -2)
        torch.testing.assert_close(
            some["grouped"].inputs[group].float(), torch.cov(rows.T, correction=0)
        )


@pytest.mark.parametrize("scores", [True, False])
def test_an_error_of_the_model_is_that_of_running_it_on_average(scores: bool) -> None:
    """Of a layer whose output is used once; projections are random, so it is so in the mean."""
    model = net(scores)
    gained = found(model, outputs=True, count=3000)["head"]
    assert gained.outputs is not None
    with torch.no_grad():
        outputs = model(images(3000)) if scores else model(images(3000))["here"][..., 0]
    if scores:
        share = outputs.softmax(1)
        exact = torch.diag(share.mean(0)) - share.T @ share / len(share)
    else:
        exact = torch.eye(3) / ((outputs - outputs.mean()).square().sum() / len(outputs))
    size = float(exact.diagonal().mean())
    torch.testing.assert_close(gained.outputs[0].float() / size, exact / size, rtol=0, atol=0.08)


def test_positions_add_up() -> None:
    """A mean over places passes a share of the gradient to each of them."""
    model = net(scores=False)
    some = found(model, outputs=True, count=3000)
    pulled, outputs = some["plain"].outputs, some["head"].outputs
    assert pulled is not None
    assert outputs is not None
    weight = model.head.weight.detach().double()
    through = weight.T @ outputs[0] @ weight / 16  # of 4 x 4 places each has a 16th
    torch.testing.assert_close(pulled[0], through, rtol=1e-4, atol=1e-8)


def test_it_leaves_no_trace_and_passes_over_what_it_cannot_see() -> None:
    model = net()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    some = found(model, outputs=True)
    assert set(some) == {"first", "grouped", "plain", "head"}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    again = found(model, outputs=True)
    assert all(torch.equal(some[name].inputs, again[name].inputs) for name in some)


def test_as_metrics_they_are_scored_from_python() -> None:
    names = ("whitened-features", "output-gauss-newton", "relative-weights")
    options: dict[str, Any] = {"include_ends": True, "methods": "svd", "keeps": 0.3}
    scores = tdkit.score(net(), metrics=names, data=images(), **options)
    assert all(set(c.errors) == set(names) for c in scores.candidates)
    assert "never" not in {c.layer for c in scores.candidates}
    assert all(0 < c.errors["whitened-features"] < 1 for c in scores.candidates)
    assert scores.candidates[0].errors["output-gauss-newton"] > 0
    with pytest.raises(UsageError, match="whitened-features needs data"):
        tdkit.score(net(), metrics="whitened-features", **options)
