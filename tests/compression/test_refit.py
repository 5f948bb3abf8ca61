"""Factors that are fitted to what the compressed layers before them deliver."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdkit
from tdkit.calibration.activations import Rows, fitted_to_activations
from tdkit.calibration.divergence import are_scores, divergence, divergences, outputs_of
from tdkit.calibration.following import Following, following
from tdkit.compression import calibrating, drafts
from tdkit.compression.applying import Applying, Compressed
from tdkit.compression.refit import Divergences, Refitted
from tdkit.decompositions.base import prepared
from tdkit.decompositions.svd import Svd
from tdkit.errors import UsageError
from tdkit.forward.inputs import Inputs
from tdkit.layers.spec import spec_of


class Residual(nn.Module):
    """Two branches that meet, one layer that is called twice, and a matrix over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.a = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm_a, self.act = nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        self.b = nn.Conv2d(16, 16, 3, padding=1)
        self.twice = nn.Conv2d(16, 16, 3, padding=1)
        self.tokens, self.head = nn.Linear(16, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Scores."""
        x = self.act(self.norm(self.first(x)))
        x = self.act(x + self.b(self.act(self.norm_a(self.a(x)))))
        x = self.twice(torch.tanh(self.twice(x)))
        tokens = self.tokens(x.flatten(2).mT).relu()
        result: Tensor = self.head(tokens.mean(1))
        return result


def model() -> Residual:
    """With statistics that were learned, so that BatchNorm does something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = Residual().train()
        for _ in range(20):
            made(images(32, torch.randint(1000, ()).item()))
    return made.eval()


def images(count: int, seed: int = 0) -> Tensor:
    """Smooth noise: neighbouring pixels are alike, as in pictures."""
    generator = torch.Generator().manual_seed(int(seed))
    small = torch.randn(count, 3, 4, 4, generator=generator)
    return nn.functional.interpolate(small, size=12, mode="bilinear") + 0.5


def compressed(dense: nn.Module, effort: str, **more: Any) -> tdkit.Compression:
    options = {"data": list(images(160).split(16)), "measure": False, "distill": 0} | more
    options.setdefault("metric", "relative-weights")  # of which there is one plan
    return tdkit.compress(dense, 0.4, effort=effort, **options)


def apart(dense: nn.Module, small: nn.Module) -> float:
    batch = [Inputs((images(200, seed=9),))]
    return divergence(list(outputs_of(dense, batch)), outputs_of(small, batch))


@pytest.mark.parametrize("methods", [None, "svd", "tucker", "tt", "cp", "kronecker", "spatial-svd"])
def test_every_method_gains_on_inputs_that_nothing_was_fitted_to(methods: str | None) -> None:
    dense = model()
    names = methods if methods in (None, "svd") else [methods, "svd"]
    fast, default, best = (compressed(dense, e, methods=names) for e in ("fast", "default", "best"))
    assert fast.plan.moves == default.plan.moves == best.plan.moves
    assert {move.layer for move in default.plan.moves} >= {"a", "twice"}
    assert apart(dense, default.model) < 0.6 * apart(dense, fast.model)
    assert apart(dense, best.model) < 0.6 * apart(dense, fast.model)
    assert [step.name for step in default.steps] == ["BatchNorm", "refit"]
    assert default.steps[1].divergence < default.steps[0].divergence
    assert fast.steps == ()


def test_the_dense_model_and_the_structure_stay_as_they_are() -> None:
    dense = model()
    before = copy.deepcopy(dense.state_dict())
    fast, default = compressed(dense, "fast"), compressed(dense, "default")
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())
    shapes = [{k: v.shape for k, v in each.model.state_dict().items()} for each in (fast, default)]
    assert shapes[0] == shapes[1]
    untouched = [k for k in before if k in default.model.state_dict() and "running_mean" not in k]
    assert untouched
    assert all(torch.equal(default.model.state_dict()[key], before[key]) for key in untouched)


def test_the_same_twice_in_place_and_by_its_plan() -> None:
    dense = model()
    once = compressed(dense, "best")
    given = copy.deepcopy(dense)
    inplace = compressed(given, "best", inplace=True)
    assert inplace.model is given
    options: dict[str, Any] = {"data": list(images(160).split(16)), "measure": False, "distill": 0}
    applied = tdkit.apply(once.plan, dense, **options)
    for other in (compressed(dense, "best"), inplace, applied):
        for key, value in once.model.state_dict().items():
            assert torch.equal(value, other.model.state_dict()[key]), key
    assert applied.plan.effort == "best"


@pytest.mark.parametrize("effort", ["default", "best"])
def test_a_caller_in_inference_mode_gets_the_same(effort: str) -> None:
    dense = model()
    once = compressed(dense, effort)
    with torch.inference_mode():
        again = compressed(dense, effort)
    assert [step.name for step in again.steps] == ["BatchNorm", "refit"]
    for key, value in once.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key


def test_what_makes_it_worse_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(small: nn.Module, parts: Any, seen: Any, **_: Any) -> Refitted:
        with torch.no_grad():
            for name in parts:
                for parameter in small.get_submodule(name).parameters():
                    parameter.zero_()
        return Refitted({})

    dense = model()
    monkeypatch.setattr(calibrating, "refit", spoil)
    done = compressed(dense, "default")
    fast = compressed(dense, "fast")
    for key, value in fast.model.state_dict().items():
        assert torch.equal(value, done.model.state_dict()[key])
    assert [step.name for step in done.steps] == ["BatchNorm"]
    assert any("taken back" in note for note in done.notes)


def test_of_several_plans_the_one_is_kept_whose_model_is_nearest() -> None:
    dense = model()
    by_metric = {
        metric: compressed(dense, "best", metric=metric)
        for metric in ("relative-weights", "whitened-features", "output-gauss-newton")
    }
    several = compressed(dense, "best", metric=None)
    data = [Inputs((batch,)) for batch in images(160).split(16)]

    def gap(each: tdkit.Compression) -> float:
        return divergence(list(outputs_of(dense, data)), outputs_of(each.model, data))

    assert several.compared > 1
    assert gap(several) <= gap(by_metric["relative-weights"]) * (1 + 1e-6)
    assert several.plan.metric in by_metric
    data_of: dict[str, Any] = {"data": list(images(160).split(16)), "distill": 0}
    again = tdkit.apply(several.plan, dense, measure=False, **data_of)
    for key, value in several.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key
    assert {key: c.after for key, c in several.report.costs.items() if c} == {
        key: c.after for key, c in again.report.costs.items() if c
    }


@pytest.mark.parametrize(
    "better", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
def test_whichever_draft_is_best_is_what_the_model_then_is(
    better: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it was not the last, and was taken off meanwhile."""
    built: list[Compressed] = []
    of = Applying.of

    def counted(self: Applying, *args: Any, **options: Any) -> Compressed:
        result = replace(of(self, *args, **options), divergence=float(len(built) != better))
        built.append(replace(result, model=copy.deepcopy(result.model)))
        return result

    monkeypatch.setattr(Applying, "of", counted)
    done = compressed(model(), "best", metric=None, inplace=True)
    assert done.compared == len(built) == 3
    assert done.plan == built[better].plan
    for key, value in built[better].model.state_dict().items():
        assert torch.equal(value, done.model.state_dict()[key]), key


def test_layers_of_which_data_say_nothing_are_planned_by_their_weights() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dense = Routed().eval()
    options: dict[str, Any] = {"data": list(rows().split(100)), "example_inputs": rows(4)}
    done = tdkit.compress(dense, 0.4, measure=False, **options)
    assert done.plan.metric == "whitened-features"
    assert "never" in done.structure
    with pytest.raises(UsageError, match="out of reach"):
        tdkit.compress(dense, 0.01, measure=False, **options)


def test_one_batch_is_cut_so_that_some_of_it_can_be_held_back() -> None:
    dense = model()
    together = compressed(dense, "default", data=images(160))
    assert [step.name for step in together.steps] == ["BatchNorm", "refit"]
    assert apart(dense, together.model) < apart(dense, compressed(dense, "fast").model)


def test_too_few_inputs_are_told_and_spoil_nothing() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dense = nn.Sequential(
            nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)
        )
    few = torch.randn(20, 40, generator=torch.Generator().manual_seed(0))
    done = tdkit.compress(dense, 0.6, data=[few[:10], few[10:]], measure=False)
    assert any("fewer places were looked at than some layers are wide" in n for n in done.notes)
    fast = tdkit.compress(dense, 0.6, data=[few[:10], few[10:]], effort="fast", measure=False)
    many = [Inputs((torch.randn(500, 40, generator=torch.Generator().manual_seed(1)),))]
    want = list(outputs_of(dense, many))
    assert divergence(want, outputs_of(done.model, many)) <= 1.1 * divergence(
        want, outputs_of(fast.model, many)
    )


class Plain(nn.Module):
    """Matrices without bias behind ReLUs, whose inputs have a large mean."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mid = nn.Linear(24, 48), nn.Linear(48, 48, bias=False)
        self.down, self.head = nn.Linear(48, 48, bias=False), nn.Linear(48, 4)
        self.register_buffer("mask", torch.full((4,), -torch.inf))
        self.register_buffer("table", torch.ones(3, dtype=torch.complex64))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Scores in a dict."""
        x = (self.up(x) + 3).relu()
        return {"scores": self.head(input=self.down(input=self.mid(x).relu()).relu())}


def plain_model() -> Plain:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Plain().eval()


def rows(count: int = 1000, seed: int = 0) -> Tensor:
    few = torch.randn(6, 24, generator=torch.Generator().manual_seed(99))
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)) @ few


def test_without_any_bias_the_mean_is_part_of_the_metric() -> None:
    dense, batch = plain_model(), [Inputs((rows(500, seed=1),))]
    models = {
        effort: tdkit.compress(dense, 0.5, data=rows(), effort=effort, distill=0, measure=False)
        for effort in ("fast", "default", "best")
    }
    assert {move.layer for move in models["fast"].plan.moves} & {"mid", "down"}
    want = list(outputs_of(dense, batch))
    fast, *fitted = (divergence(want, outputs_of(each.model, batch)) for each in models.values())
    assert max(fitted) < 0.3 * fast
    assert all(each.steps[-1].name == "refit" for each in list(models.values())[1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_of_any_type(dtype: torch.dtype) -> None:
    dense = plain_model()
    del dense.table
    dense.to(dtype)
    done = tdkit.compress(dense, 0.5, data=rows().to(dtype), measure=False)
    assert done.steps[-1].name == "refit"
    assert {p.dtype for p in done.model.parameters()} == {dtype}


@pytest.mark.parametrize("when", ["progress", "refit"])
def test_a_model_that_was_given_away_comes_back_as_it_was(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if when == "progress" and stage.startswith("fitting") and done == 1:
            raise KeyboardInterrupt

    def fail(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    if when == "refit":
        monkeypatch.setattr(calibrating, "refit", fail)
    dense = model()
    before = copy.deepcopy(dense.state_dict())
    with pytest.raises(KeyboardInterrupt):
        compressed(dense, "default", inplace=True, progress=stop)
    assert list(before) == list(dense.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())


class Routed(nn.Module):
    """The second layer is given those rows alone whose first feature is large."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate = nn.Linear(24, 48), nn.Linear(48, 48)
        self.expert, self.never = nn.Linear(48, 48), nn.Linear(48, 48)
        self.head = nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Scores."""
        x = self.gate(self.first(x).relu())
        chosen = x[:, 0] > 0.3
        x = x.index_put((chosen,), self.expert(x[chosen]))
        if len(x) == 1:
            x = self.never(x)
        result: Tensor = self.head(x)
        return result


def test_layers_that_are_given_other_rows_are_left_and_told() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dense = Routed().eval()
    done = tdkit.compress(
        dense, 0.4, data=list(rows().split(100)), example_inputs=rows(4), measure=False
    )
    told = " ".join(done.notes)
    assert done.steps
    assert "expert" not in done.structure or "expert is not fitted" in told or done.steps[1:]
    assert "never is not fitted to the data: the data never reach it" in told


def test_without_data_and_on_request_nothing_is_fitted() -> None:
    dense = model()
    assert tdkit.compress(dense, 0.4, input_shape=(3, 12, 12), measure=False).steps == ()
    for how in ("noise", "none"):
        assert compressed(dense, "default", calibration=how).steps == ()
    with pytest.raises(UsageError, match="unknown effort 'hard'") as caught:
        compressed(dense, "hard")
    assert caught.value.hint == "it is one of fast, default, best"


def test_what_follows_a_layer() -> None:
    dense = model()
    names = ["first", "a", "b", "twice"]
    assert following(dense, names, Inputs((images(1),))) == {
        "first": Following("norm", "act"),
        "a": Following("norm_a", "act"),
        "b": Following(),
        "twice": Following(),
    }
    (act,) = following(dense, ["a"], Inputs((images(1),)))["a"].functions(dense, 1)
    rows = torch.randn(7, 16)
    torch.testing.assert_close(act(rows), dense.norm_a(rows[:, :, None, None]).relu()[..., 0, 0])
    halves = following(dense, ["a"], Inputs((images(1),)))["a"].functions(dense, 2)
    torch.testing.assert_close(
        torch.cat([f(part) for f, part in zip(halves, rows.chunk(2, 1), strict=True)], 1), act(rows)
    )
    assert Following("norm").functions(dense, 1) == []


class Deceiving(nn.Module):
    """Nothing here is what follows a layer at once, or its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(4, 4, 1, bias=False) for _ in range(4))
        self.norm, self.shared, self.late = (nn.BatchNorm2d(4) for _ in range(3))
        self.act, self.inplace = nn.ReLU(), nn.ReLU(inplace=True)
        self.tokens, self.norm1d = nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        """Whatever."""
        out = self.norm(self.a(x))
        out += x
        out = self.act(out)
        out = self.shared(self.b(out)) + self.shared(self.c(out))
        out = self.late(self.inplace(self.d(out)))
        result: Tensor = self.norm1d(self.tokens(out.mean(3)))
        return result


def test_what_does_not_follow_a_layer_though_it_looks_so() -> None:
    dense = Deceiving().eval()
    names = ["a", "b", "c", "d", "tokens"]
    assert following(dense, names, Inputs((torch.randn(2, 4, 4, 4),))) == {
        "a": Following("norm"),
        "b": Following(),
        "c": Following(),
        "d": Following(None, "inplace"),
        "tokens": Following(),
    }


def test_behind_the_activation_the_error_is_less() -> None:
    generator = torch.Generator().manual_seed(0)
    spec = spec_of(nn.Linear(20, 16))
    assert spec is not None
    weight = torch.randn(16, 20, generator=generator).double()
    x = torch.randn(2000, 20, generator=generator)
    bias = -torch.ones(16)
    pairs = Rows(x[:1500], x[:1500] @ weight.float().T + bias)
    held = Rows(x[1500:], x[1500:] @ weight.float().T + bias)
    ready = prepared(Svd(), spec, weight)
    start = ready.factors(4)
    stages = Svd().stages(spec.per_group(), 4)
    found, summand = fitted_to_activations(
        stages, start, bias, pairs, held, torch.relu, spec.per_group(), generator
    )

    def error(factors: Any, add: Tensor) -> float:
        made = x[1500:] @ (factors[1] @ factors[0]).float().T + add
        return float((made.relu() - held.outputs.relu()).square().mean())

    assert error(found, summand) < 0.9 * error(start, bias)


def test_embeddings_and_probabilities_are_no_scores() -> None:
    values = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    unit = nn.functional.normalize(values, dim=1)
    assert are_scores(values)
    assert are_scores(values[:1])
    for other in (unit, unit[:1], nn.functional.layer_norm(values, (7,)), values.sigmoid()):
        assert not are_scores(other)
    other = nn.functional.normalize(unit + 0.1 * values, dim=1)
    by_hand = (unit - other).square().sum() / (unit - unit.mean()).square().sum()
    assert divergence([[unit]], [[other]]) == pytest.approx(float(by_hand), rel=1e-5)
    halves = divergences([[unit[:2]], [unit[2:]]], [[other[:2]], [other[2:]]])
    assert halves.shape == (5,)
    assert float(halves.mean()) == pytest.approx(float(by_hand), rel=1e-5)


def test_divergence_is_in_nats_for_scores_and_relative_for_the_rest() -> None:
    a, b = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    p = a.double().softmax(1)
    by_hand = float((p * (p.log() - torch.tensor(0.5).double().log())).sum()) / 2
    assert divergence([[a]], [[b]]) == pytest.approx(by_hand)
    assert divergence([[a]], [[a]]) == 0
    tokens = torch.randn(3, 4, 5)
    assert divergence([[tokens]], [[tokens]]) == 0
    mean = torch.full_like(tokens, float(tokens.mean()))
    assert divergence([[tokens]], [[mean]]) == pytest.approx(1, rel=1e-5)
    masked = torch.tensor([[1.0, -torch.inf, 0.0]])
    assert divergence([[masked]], [[masked]]) == 0
    assert divergence([[tokens]], [[tokens[:2]]]) == float("inf")


def test_where_covariances_take_long_the_plan_is_by_weights_unless_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert compressed(model(), "default", metric=None).plan.metric == "whitened-features"
    monkeypatch.setattr(drafts, "_MOST", 10)
    assert compressed(model(), "default", metric=None).plan.metric == "relative-weights"
    assert compressed(model(), "best", metric=None).compared > 1


@pytest.mark.parametrize("effort", ["default", "best"])
def test_a_dry_run_plans_by_data_too_and_fits_nothing(effort: str) -> None:
    dry = compressed(model(), effort, metric=None, dry_run=True)
    assert dry.plan.metric == "whitened-features"
    assert dry.plan.effort == effort
    assert dry.steps == ()
    if effort == "default":
        assert dry.plan.moves == compressed(model(), effort, metric=None).plan.moves


class Opaque(Residual):
    """Of what happens inside there is no gradient."""

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Scores."""
        result: Tensor = super().forward(x)
        return result


def test_without_gradients_the_other_plans_are_made_and_a_note_says_so() -> None:
    dense = model()
    dense.__class__ = Opaque
    done = compressed(dense, "best", metric=None)
    assert done.compared == 2
    assert any("no plan is made by output-gauss-newton" in note for note in done.notes)


@pytest.mark.parametrize("options", [{}, {"distill": 1}])
def test_a_caller_in_inference_mode_is_served_with_the_best_effort(options: Any) -> None:
    dense = model()
    with torch.inference_mode():
        done = compressed(dense, "best", metric=None, **options)
    assert done.steps[1].name == "refit"


def test_keeps_of_ones_own_are_all_looked_at() -> None:
    done = compressed(model(), "default", metric=None, keeps=[0.05, 0.35, 0.5])
    assert done.plan.metric == "whitened-features"


def test_outputs_that_are_no_numbers_are_never_better() -> None:
    good, nan = (Divergences(torch.full((40,), value), 30) for value in (1.0, torch.nan))
    assert nan.mean == nan.held_back == float("inf")
    assert nan.is_worse(good)
    assert not good.is_worse(nan)
