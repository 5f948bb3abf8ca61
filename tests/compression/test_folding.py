"""BatchNorm folded into layers: the same function, fewer parameters, the budget held."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdkit
from tdkit.compression.folding import Folding
from tdkit.compression.plan import Move, Plan
from tdkit.costs.params import PARAMS
from tdkit.decompositions.svd import Svd
from tdkit.errors import UsageError
from tdkit.layers.counting import model_parameters
from tdkit.layers.spec import spec_of
from tdkit.layers.traced import TracedModel
from tdkit.registry import load_registry, resolve_methods


class Net(nn.Module):
    """Pairs with and without a bias, grouped and transposed; a norm of two layers; one of a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(2, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.a, self.norm_a = nn.Conv2d(16, 24, 3, bias=False), nn.BatchNorm2d(24)
        self.b, self.norm_b = nn.Conv2d(24, 24, 3, groups=2), nn.BatchNorm2d(24, affine=False)
        self.up, self.norm_up = nn.ConvTranspose2d(24, 20, 2, bias=False), nn.BatchNorm2d(20)
        self.c, self.d = nn.Conv2d(20, 20, 1), nn.Conv2d(20, 20, 1)
        self.shared, self.norm_sum = nn.BatchNorm2d(20), nn.BatchNorm2d(20)
        self.head = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Scores."""
        x = self.norm0(self.stem(x)).relu()
        x = self.norm_b(self.b(self.norm_a(self.a(x)).relu())).relu()
        x = self.norm_up(self.up(x)).relu()
        x = self.norm_sum(self.shared(self.c(x)) + self.shared(self.d(x)))
        result: Tensor = self.head(x.mean((2, 3)))
        return result


def net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net().double()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                for parameter in module.parameters():
                    nn.init.normal_(parameter)
    return model.eval()


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 2, 9, 9, generator=torch.Generator().manual_seed(1)).double()


PLAN = Plan(
    (Move("a", "tucker", (6, 7)), Move("b", "svd", 4), Move("up", "svd", 9)), calibration="none"
)
GONE = {"norm0", "norm_a", "norm_b", "norm_up"}


def applied(fold: bool, model: nn.Module | None = None, **more: Any) -> tdkit.Compression:
    plan = Plan(PLAN.moves, calibration="none", fold=fold)
    options = {"example_inputs": images(), "measure": False} | more
    return tdkit.apply(plan, model or net(), **options)


def test_it_is_the_same_function_of_fewer_parameters() -> None:
    plain, folded = applied(False), applied(True)
    with torch.no_grad():
        torch.testing.assert_close(
            folded.model(images()), plain.model(images()), rtol=1e-12, atol=0
        )
    left = {n for n, m in folded.model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert left == {"shared", "norm_sum"}
    # A layer without a bias gets one of as many parameters as the norm has summands.
    saved = (2 * 16) + (2 * 24 - 24) + 0 + (2 * 20 - 20)
    assert model_parameters(plain.model) - model_parameters(folded.model) == saved
    for done in (plain, folded):
        found = done.report.costs["params"]
        assert found is not None
        assert found.after == model_parameters(done.model)
    assert folded.plan.fold
    assert not plain.plan.fold


def test_what_was_calibrated_before_is_told() -> None:
    dense = net().float()
    done = tdkit.compress(dense, 0.5, fold=True, input_shape=(2, 9, 9), measure=False)
    assert done.calibration == "noise"
    with torch.no_grad():
        unfolded = tdkit.apply(replace(done.plan, fold=False), dense, input_shape=(2, 9, 9))
        torch.testing.assert_close(
            done.model(images().float()), unfolded.model(images().float()), rtol=1e-4, atol=1e-5
        )


def test_the_dense_model_stays_as_it_is_and_comes_back_where_something_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense = net()
    before = copy.deepcopy(dense.state_dict())
    applied(True, dense)
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())
    fold, modules = Folding.fold, dict(dense.named_modules())

    def fail(*args: Any) -> Any:
        fold(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(Folding, "fold", fail)
    with pytest.raises(KeyboardInterrupt):
        applied(True, dense, inplace=True)
    assert dict(dense.named_modules()) == modules
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())


def test_its_parameters_are_spent_on_ranks() -> None:
    dense = net().float()
    options: dict[str, Any] = {"data": images(64).float(), "measure": False}
    plain, folded = (tdkit.compress(dense, 0.4, fold=fold, **options) for fold in (False, True))
    allowed = int(0.4 * model_parameters(dense))
    assert model_parameters(plain.model) <= allowed
    assert model_parameters(folded.model) <= allowed
    stages = [
        sum(
            stage.weight_parameters
            for move in done.plan.moves
            for stage in done.structure[move.layer]
        )
        for done in (plain, folded)
    ]
    assert stages[1] > stages[0]
    again = tdkit.apply(folded.plan, dense, **options)
    for key, value in folded.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_it_is_written_and_read(suffix: str, tmp_path: Path) -> None:
    folded = applied(True, net().float(), example_inputs=images().float())
    path = folded.save(tmp_path / f"small.{suffix}")
    how: dict[str, Any] = {"arch": f"{__name__}:Net"} if suffix != "pt" else {"unsafe_load": True}
    model = tdkit.load(path, **how)
    with torch.no_grad():
        torch.testing.assert_close(model(images().float()), folded.model(images().float()))


def test_what_cannot_take_it_in_is_no_candidate_and_keeps_its_norm_in_a_plan() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dense = nn.Sequential(
            nn.Linear(12, 16), nn.Linear(16, 24, bias=False), nn.BatchNorm1d(24), nn.Linear(24, 3)
        )
    dense = dense.double().eval()
    rows = torch.randn(5, 12, generator=torch.Generator().manual_seed(1)).double()
    folding = Folding.of(TracedModel.of(dense, rows, include_ends=True), [PARAMS])
    assert list(folding.norms.values()) == ["2"]
    assert folding.saving("params") == 24
    (method,) = resolve_methods(load_registry(), ["tensorized-linear"]).values()
    spec = spec_of(dense[1])
    assert spec is not None
    rank = method.max_rank(spec)
    assert not folding.takes("1", method, rank)
    assert folding.takes("1", Svd(), 4)
    plan = Plan((Move("1", "tensorized-linear", rank),), calibration="none", fold=True)
    done = tdkit.apply(plan, dense, example_inputs=rows, measure=False)
    assert isinstance(done.model[2], nn.BatchNorm1d)
    torch.testing.assert_close(done.model(rows), dense(rows))
    found = done.report.costs["params"]
    assert found is not None
    assert found.after == model_parameters(done.model)


class TwoReaders(nn.Module):
    """What the stem returns goes into a norm, and around it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 6, 1), nn.BatchNorm2d(6)
        self.body, self.norm_body = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Scores."""
        x = self.stem(x)
        x = x + self.norm_body(self.body(self.norm(x).relu()))
        result: Tensor = self.head(x.mean((2, 3)))
        return result


def test_a_norm_stays_where_others_see_what_is_in_front_of_it() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dense = TwoReaders().double()
        dense.norm.running_mean += 1
        dense.norm_body.running_mean -= 1
    dense.eval()
    traced = TracedModel.of(dense, images(), include_ends=True)
    assert list(Folding.of(traced, [PARAMS]).norms.values()) == ["norm_body"]
    plan = Plan((), calibration="none", fold=True)
    done = tdkit.apply(plan, dense, example_inputs=images(), measure=False)
    torch.testing.assert_close(done.model(images()), dense(images()))
    assert isinstance(done.model.norm, nn.BatchNorm2d)


def test_statistics_come_back_where_folding_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Folding, "fold", fail)
    dense = net().float()
    before = copy.deepcopy(dense.state_dict())
    with pytest.raises(KeyboardInterrupt):
        tdkit.compress(dense, 0.5, fold=True, data=images(32).float(), inplace=True, measure=False)
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())


def test_without_a_forward_pass_nobody_knows_what_follows_what() -> None:
    with pytest.raises(UsageError, match="folding takes a forward pass"):
        tdkit.compress(net(), 0.5, fold=True)
