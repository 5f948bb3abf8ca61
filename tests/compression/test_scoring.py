"""The grid and its scores; methods that misbehave."""

import copy
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tdkit.compression import scoring
from tdkit.compression.applying import apply_plan
from tdkit.compression.compress import Goal, compress_model
from tdkit.compression.plan import Move, Plan
from tdkit.compression.scoring import (
    COMPRESSION_KEEPS,
    Grid,
    factorize,
    prepare,
    score,
    unsupported_by_all,
)
from tdkit.compression.verification import dense_weight
from tdkit.costs.base import Change
from tdkit.decompositions.base import Decomposition, Prepared, Rank
from tdkit.decompositions.cp import Cp
from tdkit.decompositions.svd import Svd
from tdkit.errors import UnsupportedError, UsageError
from tdkit.layers.counting import macs
from tdkit.layers.evidence import NO_EVIDENCE
from tdkit.layers.inventory import find_layers
from tdkit.layers.spec import LayerSpec, spec_of
from tdkit.layers.traced import TracedModel
from tdkit.layers.weights import ModuleWeights
from tdkit.metrics import features, weights
from tdkit.metrics.base import Metric
from tdkit.planners.candidate import Candidate, to_json
from tdkit.planners.greedy import greedy
from tdkit.registry import load_registry, resolve_methods

METHODS = resolve_methods(load_registry(), ["svd", "cp", "tucker", "tt"])
WEIGHTS = [weights.RELATIVE, weights.ABSOLUTE, weights.SCALED]


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 12, 3, padding=1, groups=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(12, 6, 3, stride=2, bias=False),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 10),
            nn.ReLU(),
            nn.Linear(10, 4),
        )


def example(batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, 9, 9, generator=torch.Generator().manual_seed(2))


def scored(model: nn.Module, grid: Grid, **options: Any) -> list[Candidate]:
    return score(TracedModel.of(model, example()), grid, **options)


def params(candidate: Candidate) -> Change:
    found = candidate.costs["params"]
    assert found is not None
    return found


class TestScore:
    def test_every_candidate_is_what_it_says(self) -> None:
        model = network()
        traced = TracedModel.of(model, example())
        layers = {layer.name: layer for layer in traced.layers}
        found = scored(model, Grid(METHODS, WEIGHTS, (0.15, 0.4, 0.8)))
        assert {(c.layer, c.method) for c in found} == {
            *((name, method) for name in "24" for method in METHODS),
            ("7", "svd"),
        }
        for candidate in found:
            layer, module = layers[candidate.layer], model.get_submodule(candidate.layer)
            prepared = prepare(
                layer,
                traced.weights,
                candidate.method,
                METHODS[candidate.method],
                NO_EVIDENCE,
            )
            assert prepared is not None
            assert layer.spec is not None
            assert layer.calls is not None
            stand_in = factorize(layer, traced.weights, prepared, candidate.rank)
            built = sum(p.numel() for p in stand_in.parameters())
            dense = sum(p.numel() for p in module.parameters())
            assert candidate.costs["params"] == Change(dense, built)
            assert built < dense
            kept = sum(p.numel() for n, p in stand_in.named_parameters() if n.endswith("weight"))
            assert candidate.keep == pytest.approx(kept / module.weight.numel())
            assert candidate.costs["macs"] == Change(
                macs([layer.spec], layer.calls), macs([spec_of(s) for s in stand_in], layer.calls)
            )
            assert macs([layer.spec], layer.calls) == layer.macs
            weight = module.weight.detach()
            error = float((weight - dense_weight(stand_in, layer.spec)).norm())
            norm = float(weight.norm())
            assert candidate.errors == pytest.approx(
                {
                    "absolute-weights": error,
                    "relative-weights": error / norm,
                    "scaled-weights": error / module.weight.numel(),
                },
                rel=1e-4,
            )

    def test_ranks_are_distinct_and_more_is_better(self) -> None:
        found = scored(network(), Grid({"svd": Svd()}, WEIGHTS, COMPRESSION_KEEPS))
        for name in {c.layer for c in found}:
            rows = sorted(
                (params(c).after, -c.errors["relative-weights"]) for c in found if c.layer == name
            )
            assert len({size for size, _ in rows}) == len(rows) > 1
            assert [error for _, error in rows] == sorted(error for _, error in rows)

    @pytest.mark.parametrize("rule", ["best", "proportional"])
    def test_58_none_is_larger_than_its_layer(self, rule: str) -> None:
        found = scored(network(), Grid(METHODS, WEIGHTS, (0.5, 0.9, 1.0), rule))
        assert found
        assert all(params(c).after < params(c).before for c in found)

    def test_without_inputs_macs_are_unknown(self) -> None:
        model = network()
        found = score(TracedModel.of(model), Grid({"svd": Svd()}, WEIGHTS, (0.5,)))
        assert found
        assert all(c.costs["macs"] is None for c in found)

    def test_progress_ends_at_the_total(self) -> None:
        steps: list[tuple[int, int]] = []
        scored(network(), Grid(METHODS, WEIGHTS, (0.3,)), progress=lambda *s: steps.append(s))
        assert steps == sorted(steps)
        assert len({total for _, total in steps}) == 1
        assert steps[-1][0] == steps[-1][1] > 0

    @pytest.mark.parametrize("metrics", [WEIGHTS, [features.RELATIVE]])
    def test_the_model_is_as_before(self, metrics: list[Metric]) -> None:
        model = network()
        state, seeds = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        scored(model, Grid(METHODS, metrics, (0.3,)), batches=[example(2)])
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), seeds)

    def test_the_same_seed_gives_the_same_scores(self) -> None:
        methods = {**METHODS, "random": Cp(start="uniform")}
        grids = [Grid(methods, WEIGHTS, (0.3,), seed=seed) for seed in (1, 1, 2)]
        first, again, other = (scored(network(), grid) for grid in grids)
        assert first == again
        differing = {a.method for a, b in zip(first, other, strict=True) if a != b}
        assert differing == {"random"}

    def test_candidates_are_json(self) -> None:
        for candidate in scored(network(), Grid(METHODS, WEIGHTS, (0.3,))):
            value = json.loads(json.dumps(to_json(candidate)))
            rank = value.pop("rank")
            assert (tuple(rank) if isinstance(rank, list) else rank) == candidate.rank
            costs = {
                f"{name}_{when}": getattr(found, when)
                for name, found in candidate.costs.items()
                for when in ("before", "after")
            }
            assert set(costs) == {"params_before", "params_after", "macs_before", "macs_after"}
            plain = {k: v for k, v in vars(candidate).items() if k not in ("rank", "costs")}
            assert value == {**plain, **costs}


class TestFeatures:
    def test_without_data_they_are_refused(self) -> None:
        metrics = [weights.RELATIVE, features.RELATIVE, features.SCALED]
        with pytest.raises(UsageError, match="relative-features, scaled-features need") as caught:
            scored(network(), Grid(METHODS, metrics))
        assert "data=" in str(caught.value.hint)

    @torch.no_grad()
    def test_they_are_those_of_the_factorized_layers(self) -> None:
        model, data = network(), [example(3), example(2)]
        metrics = [weights.RELATIVE, features.ABSOLUTE]
        found = scored(model, Grid(METHODS, metrics, (0.2, 0.5)), batches=iter(data))
        layers = {layer.name: layer for layer in find_layers(model)}
        held = ModuleWeights(model)
        for candidate in found:
            place = int(candidate.layer)
            prepared = prepare(
                layers[candidate.layer],
                held,
                candidate.method,
                METHODS[candidate.method],
                NO_EVIDENCE,
            )
            assert prepared is not None
            stand_in = factorize(layers[candidate.layer], held, prepared, candidate.rank)
            x = copy.deepcopy(model)[:place](torch.cat(data))
            error = (stand_in(x) - model[place](x)).flatten(1).norm(dim=1).mean()
            assert candidate.errors["absolute-features"] == pytest.approx(float(error), rel=1e-4)

    @pytest.mark.parametrize("together", [0, 100, 10**9])
    def test_how_many_are_measured_together_does_not_matter(
        self, together: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        grid = Grid(METHODS, [features.RELATIVE], (0.2, 0.5))
        expected = scored(network(), grid, batches=[example(2)])
        monkeypatch.setattr(scoring, "_TOGETHER", together)
        assert scored(network(), grid, batches=[example(2)]) == expected

    def test_the_model_runs_as_rarely_as_memory_allows(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = network()
        traced, grid = TracedModel.of(model, inplace=True), Grid(METHODS, [features.RELATIVE])
        runs: list[int] = []
        model.register_forward_pre_hook(lambda *_: runs.append(1))
        found = score(traced, grid, batches=[example()])
        assert len(runs) == 1
        monkeypatch.setattr(scoring, "_TOGETHER", sum(params(c).after for c in found) // 2)
        assert score(traced, grid, batches=[example()]) == found
        assert len(runs) in (1 + 2, 1 + 3)

    def test_layers_that_the_data_never_reaches_have_no_candidates(self) -> None:
        class Partly(nn.ModuleDict):
            def forward(self, x: Tensor) -> Tensor:
                return self["used"](x)

        model = Partly({"used": network(), "unused": nn.Linear(8, 8), "last": nn.Linear(2, 2)})
        grid = Grid(METHODS, [features.RELATIVE], (0.3,))
        names = {c.layer for c in score(TracedModel.of(model), grid, batches=[example()])}
        assert "used.2" in names
        assert "unused" not in names


class TestFactorize:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("training", [True, False])
    def test_options_carry_over(self, dtype: torch.dtype, training: bool) -> None:
        model = network().to(dtype).train(training)
        held = ModuleWeights(model)
        model[2].weight.requires_grad_(False)
        layer = find_layers(model)[1]
        prepared = prepare(layer, held, "svd", Svd(), NO_EVIDENCE)
        assert prepared is not None
        stand_in = factorize(layer, held, prepared, 2)
        assert {p.dtype for p in stand_in.parameters()} == {dtype}
        frozen = {name: p.requires_grad for name, p in stand_in.named_parameters()}
        assert frozen == {"0.weight": False, "1.weight": False, "1.bias": True}
        assert torch.equal(stand_in[1].bias, model[2].bias)
        assert stand_in[1].bias is not model[2].bias
        # The mode is the surgeon's to carry over.
        plan = Plan((Move("2", "svd", 2),), calibration="none")
        result = apply_plan(TracedModel.of(model), plan, {"svd": Svd()})
        assert isinstance(result.model[2], nn.Sequential)
        assert all(module.training == training for module in result.model.modules())

    def test_factors_that_overflow_are_refused(self) -> None:
        class Lopsided(Svd):
            def prepare(self, layer: LayerSpec, weight: Tensor, seed: int = 0) -> Prepared:  # type: ignore[override]
                prepared = super().prepare(layer, weight, seed)
                factors = prepared.group_factors
                prepared.group_factors = lambda r: [(a * 1e6, b / 1e6) for a, b in factors(r)]  # type: ignore[method-assign]
                return prepared

        model = network().half()
        layer, held = find_layers(model)[1], ModuleWeights(model)
        prepared = prepare(layer, held, "lopsided", Lopsided(), NO_EVIDENCE)
        assert prepared is not None
        with pytest.raises(UnsupportedError, match="the factors overflow"):
            factorize(layer, held, prepared, 2)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"keeps": (0.5, 0.0)}, "keep"),
        ({"keeps": (-0.5,)}, "keep"),
        ({"keeps": (math.nan,)}, "keep"),
        ({"keeps": (1.5,)}, "keep"),
        ({"keeps": ("50%",)}, "keep"),
        ({"rule": "bset"}, "unknown rank rule 'bset'"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        Grid(METHODS, WEIGHTS, **options)


def test_why_no_method_takes_a_layer() -> None:
    linear = find_layers(network())[-1]
    assert unsupported_by_all(linear, METHODS) is None
    some = {name: METHODS[name] for name in ("tucker", "cp")}
    reason = str(unsupported_by_all(linear, some))
    assert "tucker: " in reason
    assert "cp: " in reason


class Slow(Svd):
    """The SVD again, through `decompose` alone."""

    def prepare(self, layer: LayerSpec, weight: Tensor, seed: int = 0) -> Prepared:  # type: ignore[override]
        return Decomposition.prepare(self, layer, weight, seed)

    def decompose(
        self, layer: LayerSpec, weight: Tensor, rank: Rank, generator: torch.Generator
    ) -> Sequence[Tensor]:
        assert isinstance(rank, int)
        u, s, v = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        first, second = self.stages(layer, rank)
        return (
            (s[:rank, None] * v[:rank]).reshape(first.weight_shape),
            u[:, :rank].reshape(second.weight_shape),
        )


def failing(change: Callable[[Sequence[Tensor]], Any]) -> Slow:
    class Failing(Slow):
        def decompose(self, *args: Any) -> Any:
            return change(super().decompose(*args))

    return Failing()


def raising(error: Exception) -> Slow:
    def change(_: Any) -> Any:
        raise error

    return failing(change)


class ListRank(Slow):
    def rank(self, layer: LayerSpec, keep: float) -> Any:
        return [super().rank(layer, keep)]


class HugeRank(Slow):
    def rank(self, layer: LayerSpec, keep: float) -> Any:
        return 10_000


class FewerOutputs(Slow):
    """Stages that fit each other, but not the layer."""

    def stages(self, layer: LayerSpec, rank: Rank) -> Sequence[LayerSpec]:
        first, second = super().stages(layer, rank)
        return first, layer.pointwise(second.in_channels, 1)

    def decompose(self, *args: Any) -> Any:
        first, second = Slow.decompose(Slow(), *args)
        return first, second[:1]


class TestMisbehavingMethods:
    @pytest.mark.parametrize(
        ("method", "reason"),
        [
            (failing(lambda f: [x.transpose(0, 1) for x in f]), "factors of shapes"),
            (failing(lambda f: f[:1]), "factors of shapes"),
            (failing(lambda f: [x * math.nan for x in f]), "NaN or infinite factors"),
            (failing(lambda f: [x / 0 for x in f]), "NaN or infinite factors"),
            (failing(lambda f: [np.asarray(x) for x in f]), "TypeError"),
            (failing(lambda f: None), "TypeError"),
            (raising(torch.linalg.LinAlgError("did not converge")), "did not converge"),
            (raising(ZeroDivisionError()), "ZeroDivisionError"),
            (raising(UnsupportedError("no such luck")), "no such luck"),
            (ListRank(), "AssertionError"),
            (HugeRank(), "rank"),
            (FewerOutputs(), "shape"),
        ],
    )
    def test_66_it_is_named_with_the_layer(self, method: Decomposition, reason: str) -> None:
        with pytest.raises(UnsupportedError, match=rf"(?s)my-method.*layer '2'.*{reason}"):
            scored(network(), Grid({"my-method": method}, WEIGHTS, (0.3,)))

    @pytest.mark.parametrize(
        "error", [MemoryError(), torch.OutOfMemoryError(), KeyboardInterrupt()]
    )
    def test_running_out_of_memory_is_not_its_fault(self, error: Any) -> None:
        with pytest.raises(type(error)):
            scored(network(), Grid({"my-method": raising(error)}, WEIGHTS, (0.3,)))

    def test_67_a_weight_changed_in_place_is_its_own_copy(self) -> None:
        class Grabby(Slow):
            def prepare(self, layer: LayerSpec, weight: Tensor, seed: int = 0) -> Prepared:  # type: ignore[override]
                prepared = super().prepare(layer, weight, seed)
                with torch.no_grad():
                    weight.zero_()
                return prepared

            def decompose(self, layer: LayerSpec, weight: Tensor, *args: Any) -> Any:
                result = super().decompose(layer, weight, *args)
                weight.zero_()
                return result

        model = network()
        state = copy.deepcopy(model.state_dict())
        grid = Grid({"slow": Slow(), "svd": Svd()}, WEIGHTS, (0.3, 0.5))
        expected = scored(model, grid)
        grid = Grid({"slow": Grabby(), "svd": Svd()}, WEIGHTS, (0.3, 0.5))
        assert scored(model, grid) == expected
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())

    @pytest.mark.parametrize("lie", [math.nan, math.inf, -math.inf])
    def test_errors_that_are_not_numbers_are_never_chosen(self, lie: float) -> None:
        class Liar(Svd):
            def prepare(self, layer: LayerSpec, weight: Tensor, seed: int = 0) -> Prepared:  # type: ignore[override]
                prepared = super().prepare(layer, weight, seed)
                prepared.unit_error = lambda rank: lie  # type: ignore[method-assign]
                return prepared

        grid = Grid({"a-liar": Liar(), "svd": Svd()}, WEIGHTS, (0.2, 0.5))
        result = compress_model(TracedModel.of(network(), example()), grid, Goal(0.7), greedy)
        assert {move.method for move in result.plan.moves} == {"svd"}
