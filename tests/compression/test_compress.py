"""Model and budget to a verified compressed model, for models of every kind.

Numbers in test names are those of the project's list of bad inputs.
"""

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

from tdkit.compression.applying import Compressed, apply_plan
from tdkit.compression.compress import Goal, compress_model
from tdkit.compression.plan import Move, Plan
from tdkit.compression.scoring import Grid
from tdkit.compression.verification import dense_weight
from tdkit.costs.base import Cost, total_cost
from tdkit.costs.macs import MACS
from tdkit.costs.params import PARAMS
from tdkit.decompositions.cp import Cp
from tdkit.decompositions.svd import Svd
from tdkit.errors import UnsupportedError, UsageError
from tdkit.forward.copying import own_copy
from tdkit.forward.inputs import Inputs, random_inputs
from tdkit.layers.counting import model_parameters
from tdkit.layers.spec import LayerSpec
from tdkit.layers.traced import TracedModel
from tdkit.metrics.weights import RELATIVE
from tdkit.planners.greedy import greedy
from tdkit.registry import load_registry, resolve_methods

METHODS = resolve_methods(load_registry())
ALL_METHODS = resolve_methods(load_registry(), ["svd", "cp", "tucker", "tt"])
KEEPS = (0.1, 0.2, 0.35, 0.5, 0.7)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def compress(model: nn.Module, budget: float = 0.6, **options: Any) -> Compressed:
    grid = Grid(options.pop("methods", METHODS), [RELATIVE], KEEPS, seed=options.pop("seed", 0))
    how, effort = options.pop("how", "none"), options.pop("effort", "fast")
    goal = Goal(budget, options.pop("cost", PARAMS), calibration=how, effort=effort)
    looks = {key: options.pop(key) for key in ("patterns", "include_ends") if key in options}
    traced = TracedModel.of(model, options.pop("inputs", None), **looks)
    return compress_model(traced, grid, goal, greedy, **options)


def apply(
    model: nn.Module, plan: Plan, methods: Any = METHODS, inputs: Any = None, **options: Any
) -> Compressed:
    traced = TracedModel.of(model, inputs, include_ends=True)
    return apply_plan(traced, plan, methods, **options)


def check(
    model: nn.Module, inputs: Sequence[Any], budget: float = 0.6, **options: Any
) -> Compressed:
    """Compress and check what every compression promises."""
    result = compress(model, budget, inputs=inputs, **options)
    plain = own_copy(model)
    assert result.verified
    assert model_parameters(result.model) <= budget * model_parameters(plain)
    assert set(result.structure) == {move.layer for move in result.plan.moves}
    assert not set(result.put_back) & set(result.structure)
    Inputs.of(inputs).run(result.model.eval())
    changed = tuple(
        f"{name}."
        for layer in result.layers
        if layer.name in result.structure
        for name in (layer.name, *layer.aliases)
    )
    kept = {k: v for k, v in plain.state_dict().items() if not k.startswith(changed)}
    have = result.model.state_dict()
    assert kept
    assert all(torch.equal(have[key], value) for key, value in kept.items())
    return result


def convnet(*layers: nn.Module, channels: int = 8, classes: int = 4) -> nn.Sequential:
    """The layers between a convolution and a classifier, which are small."""
    return nn.Sequential(
        nn.Conv2d(3, channels, 1),
        nn.ReLU(inplace=True),
        *layers,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LazyLinear(classes),
    )


def ready(model: nn.Module, x: Tensor) -> nn.Module:
    """Run once, so that lazy layers take shape."""
    with torch.no_grad():
        model(x)
    return model


def images(batch: int = 2, size: int = 9) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def mlp(*layers: nn.Module, features: int = 12) -> nn.Sequential:
    middle = [nn.Linear(features, features), nn.ReLU(), nn.Linear(features, features), nn.ReLU()]
    return nn.Sequential(
        nn.Linear(4, features), nn.ReLU(), *(layers or middle), nn.Linear(features, 3)
    )


def rows(batch: int = 2) -> Tensor:
    return torch.randn(batch, 4, generator=torch.Generator().manual_seed(1))


class TestGoal:
    @pytest.mark.parametrize(
        "budget", [0, -0.5, 1.5, math.nan, math.inf, "50%", None, True, torch.ones(1)]
    )
    def test_55_budgets_that_are_no_fraction_are_refused(self, budget: Any) -> None:
        with pytest.raises(UsageError, match="not a fraction above 0 and at most 1") as caught:
            Goal(budget)
        assert "0.5" in str(caught.value.hint)

    def test_unknown_calibrations_are_refused(self) -> None:
        with pytest.raises(UsageError, match="unknown calibration 'magic'") as caught:
            Goal(0.5, calibration="magic")  # type: ignore[arg-type]
        assert "none, noise, synthetic, data" in str(caught.value.hint)

    def test_one_is_a_budget(self) -> None:
        assert Goal(1).budget == 1


class TestWeights:
    def test_26_zeros_have_error_zero(self) -> None:
        model = mlp()
        nn.init.zeros_(model[2].weight)
        result = check(model, [rows()], 0.7)
        zero = next(c for c in result.plan.candidates if c.layer == "2")
        assert zero.errors == {"relative-weights": 0.0}

    def test_27_rank_one_is_found(self) -> None:
        model = mlp()
        with torch.no_grad():
            model[2].weight.copy_(torch.outer(torch.arange(12.0), torch.ones(12)))
        result = check(model, [rows()], 0.75)
        assert result.plan.moves == (Move("2", "svd", 1),)
        x = rows(5)
        assert torch.allclose(result.model(x), model(x), atol=1e-5)

    @pytest.mark.parametrize("scale", [1e-23, 1e-30, 1e20])
    def test_28_tiny_and_huge_weights_are_no_different(self, scale: float) -> None:
        model = mlp()
        expected = check(model, [rows()])
        scaled = copy.deepcopy(model)
        with torch.no_grad():
            scaled[2].weight.mul_(scale)
        result = check(scaled, [rows()])
        assert [m.layer for m in result.plan.moves] == [m.layer for m in expected.plan.moves]
        for a, b in zip(result.plan.candidates, expected.plan.candidates, strict=True):
            assert a.rank == b.rank
            assert a.errors == pytest.approx(b.errors, rel=1e-4)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("methods", [["svd"], ["tucker"], ["tt"], ["cp"]])
    def test_29_and_30_precision_is_kept(self, dtype: torch.dtype, methods: list[str]) -> None:
        model = convnet(nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3))
        model = ready(model, images()).to(dtype)
        inputs = random_inputs(model, (3, 9, 9))
        assert inputs.args[0].dtype == dtype
        result = check(model, inputs, methods=resolve_methods(load_registry(), methods))
        assert not result.put_back
        assert {p.dtype for p in result.model.parameters()} == {dtype}
        assert inputs.run(result.model).dtype == dtype

    def test_33_tied_weights_never_grow_the_model(self) -> None:
        model = mlp()
        model[4].weight = model[2].weight
        with pytest.raises(UnsupportedError, match="tied"):
            compress(model)
        model = nn.Sequential(*model[:-1], nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3))
        result = check(model, [rows()], 0.8)
        assert {move.layer for move in result.plan.moves} == {"6"}
        assert result.model[4].weight is result.model[2].weight

    def test_34_parametrized_layers_stay_parametrized(self) -> None:
        model = mlp()
        parametrizations.weight_norm(model[2])
        result = check(model, [rows()], 0.8)
        assert {move.layer for move in result.plan.moves} == {"4"}
        assert torch.equal(result.model[2].weight, model[2].weight)

    def test_34_old_weight_norm_is_refused_with_the_reason(self) -> None:
        model = mlp()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            nn.utils.weight_norm(model[2])
        with pytest.raises(UnsupportedError, match="cannot be copied") as caught:
            compress(model)
        assert "weight_norm" in str(caught.value.hint)

    def test_41_lazy_models_are_refused(self) -> None:
        with pytest.raises(UnsupportedError, match="lazy"):
            compress(convnet(nn.Conv2d(8, 8, 3)))

    def test_51_meta_models_are_refused(self) -> None:
        model = mlp().to("meta")
        for inputs in (None, random_inputs(model, (4,))):
            with pytest.raises(UnsupportedError, match="meta device"):
                compress(model, inputs=inputs)

    def test_52_sparse_weights_are_refused(self) -> None:
        model = mlp()
        model[2].weight = nn.Parameter(model[2].weight.detach().to_sparse())
        with pytest.raises(UnsupportedError, match="cannot be copied"):
            compress(model)


LAYERS: dict[str, list[nn.Module]] = {
    "35 grouped": [nn.Conv2d(8, 12, 3, groups=2), nn.ReLU(), nn.Conv2d(12, 12, 3, groups=3)],
    "35 depthwise": [nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 24, 3)],
    "36 stride": [nn.Conv2d(8, 24, (3, 2), stride=(2, 1))],
    "36 dilation": [nn.Conv2d(8, 24, 3, dilation=(1, 2), padding=(0, 2))],
    "37 transposed": [nn.ConvTranspose2d(8, 24, 3, stride=2, output_padding=1, padding=1)],
    "37 transposed groups": [nn.ConvTranspose2d(8, 24, 3, groups=2, dilation=2)],
    "38 circular": [nn.Conv2d(8, 24, 3, padding=(1, 2), padding_mode="circular")],
    "38 reflect": [nn.Conv2d(8, 24, 3, padding=2, padding_mode="reflect", stride=2)],
    "38 replicate": [nn.Conv2d(8, 24, 3, padding=1, padding_mode="replicate")],
    "39 same, even kernel": [nn.Conv2d(8, 24, (4, 2), padding="same", dilation=(1, 3))],
    "39 same, circular": [nn.Conv2d(8, 24, (2, 3), padding="same", padding_mode="circular")],
    "valid": [nn.Conv2d(8, 24, 3, padding="valid", bias=False)],
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("method", ALL_METHODS)
@pytest.mark.parametrize("name", LAYERS)
def test_35_to_39_layers_of_every_kind(name: str, method: str) -> None:
    model = ready(convnet(*copy.deepcopy(LAYERS[name])), images())
    if "transposed" in name and method in ("cp", "tt"):
        with pytest.raises(UsageError, match=r"smallest reachable is 1$"):
            compress(model, methods={method: ALL_METHODS[method]})
        return
    result = check(model, [images()], methods={method: ALL_METHODS[method]})
    assert not result.put_back
    assert {move.method for move in result.plan.moves} == {method}
    # Against the model whose dense weights are those of the factors.
    dense = copy.deepcopy(model)
    for move in result.plan.moves:
        layer = next(layer for layer in result.layers if layer.name == move.layer)
        assert layer.spec is not None
        module = dense.get_submodule(move.layer)
        prepared = ALL_METHODS[method].prepare(layer.spec, module.weight, 0)
        if method == "cp":
            continue  # its start depends on the layer's name; the verification compared it
        with torch.no_grad():
            module.weight.copy_(prepared.refined(move.rank).reconstruct(move.rank))
    if method != "cp":
        x = images(3)
        assert torch.allclose(result.model(x), dense(x), atol=1e-5)


class Two(nn.Module):
    """Two hidden layers of 12 x 12 for subclasses to use in their ways."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 12)
        self.a = nn.Linear(12, 12)
        self.b = nn.Linear(12, 12)
        self.c = nn.Linear(12, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.c(self.b(self.a(self.stem(x)).relu()).relu()).relu())


class TestModels:
    def test_42_hooks_still_fire(self) -> None:
        model, log = mlp(), []
        model[2].register_forward_hook(lambda *_: log.append("layer"))
        model.register_forward_hook(lambda *_: log.append("model"))
        result = check(model, [rows()], 0.8)
        assert {move.layer for move in result.plan.moves} == {"4"}
        log.clear()
        result.model(rows())
        assert log == ["layer", "model"]

    @pytest.mark.parametrize("inputs", [None, [torch.zeros(2, 5, 16)]])
    def test_43_and_44_transformers_work_in_both_modes(self, inputs: Any) -> None:
        encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        model = nn.Sequential(
            nn.Linear(16, 16),
            encoder,
            nn.Linear(16, 64),
            nn.ReLU(),
            nn.Linear(64, 64),
            nn.Linear(64, 2),
        )
        result = compress(model, 0.8, inputs=inputs)
        assert result.plan.moves
        x = torch.randn(3, 5, 16)
        for training in (False, True):
            result.model.train(training)
            result.model(x).sum().backward()
        assert not result.put_back

    def test_43_attention_of_torchvision(self) -> None:
        model = VisionTransformer(16, 8, 2, 2, 32, 96, num_classes=5).eval()
        result = check(model, [images(2, 16)], 0.8)
        assert not result.put_back
        assert {
            layer.name for layer in result.layers if layer.reason and "last" in layer.reason
        } == {"heads.head"}

    def test_45_weights_read_from_outside_are_put_back_and_planned_around(self) -> None:
        class Reads(Two):
            def forward(self, x: Tensor) -> Any:
                x = functional.linear(self.stem(x), self.b.weight, self.b.bias)
                return self.head(self.c(self.a(x).relu()).relu())

        model = Reads()
        result = check(model, [rows()], 0.6)
        assert list(result.put_back) == ["b"]
        assert {move.layer for move in result.plan.moves} == {"a", "c"}
        assert isinstance(result.model.b, nn.Linear)
        result.model.train()(rows()).sum().backward()

    def test_45_a_budget_that_is_then_out_of_reach_says_what_was_put_back(self) -> None:
        class Reads(Two):
            def forward(self, x: Tensor) -> Any:
                return self.head(functional.linear(self.c(self.a(self.stem(x))), self.b.weight))

        with pytest.raises(UsageError, match="out of reach") as caught:
            compress(Reads(), 0.45, inputs=[rows()])
        assert "b was put back" in str(caught.value)

    def test_45_swin_reads_its_attention(self) -> None:
        model = SwinTransformer([8, 8], 16, [1, 1], [2, 2], [4, 4], num_classes=5)
        result = check(model, [images(2, 32)], 0.8)
        assert all(".attn." in name for name in result.put_back)
        assert not any(".attn." in move.layer for move in result.plan.moves)

    def test_46_a_module_under_three_names_is_replaced_under_all(self) -> None:
        shared = nn.Linear(12, 12)
        model = nn.Sequential(
            nn.Linear(4, 12), shared, nn.ReLU(), shared, nn.ReLU(), shared, nn.Linear(12, 3)
        )
        result = check(model, [rows()], 0.8)
        assert isinstance(result.model[1], nn.Sequential)
        assert result.model[1] is result.model[3] is result.model[5]
        assert [move.layer for move in result.plan.moves] == ["1"]

    @pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
    def test_47_and_48_wrappers_come_off(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        model = mlp()
        result = check(wrap(model), [rows()])
        assert type(result.model) is nn.Sequential
        expected = compress(model).model.state_dict()
        assert all(
            torch.equal(value, expected[k]) for k, value in result.model.state_dict().items()
        )

    @pytest.mark.filterwarnings("ignore:.torch.jit.*deprecated")
    def test_49_scripted_models_are_refused(self) -> None:
        with pytest.raises(UnsupportedError, match="TorchScript"):
            compress(torch.jit.script(mlp()))

    def test_50_models_without_parameters_are_refused(self) -> None:
        with pytest.raises(UnsupportedError, match="no parameters"):
            compress(nn.Sequential(nn.ReLU()))

    def test_a_model_with_nothing_to_compress_says_why(self) -> None:
        model = nn.Sequential(nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 9))
        with pytest.raises(
            UnsupportedError, match=r"first layer is kept.*last layer is kept"
        ) as caught:
            compress(model)
        assert "include_ends=True" in str(caught.value.hint)
        assert compress(model, include_ends=True).plan.moves
        with pytest.raises(UnsupportedError, match="no convolutional or linear layer"):
            compress(nn.Sequential(nn.BatchNorm1d(3)))

    def test_54_a_compressed_model_is_not_compressed_again(self) -> None:
        first = check(mlp(), [rows()], 0.8, patterns=["2"])
        second = check(first.model, [rows()], 0.9)
        assert not {move.layer for move in second.plan.moves} & set(first.structure)
        rest = compress(mlp(), 0.6)
        with pytest.raises(UnsupportedError, match="already factorized"):
            compress(rest.model, 0.5)

    def test_models_of_several_inputs(self) -> None:
        class Several(Two):
            def forward(
                self, x: Tensor, mask: Tensor, scale: Tensor, flag: bool, extra: Any
            ) -> Any:
                assert mask.shape == (5, 5)
                assert flag
                return super().forward((mask @ x.unflatten(1, (5, 4))).sum(1) * scale + extra[0])

        inputs = [torch.randn(3, 20), torch.eye(5), torch.tensor(2.0), True, [torch.ones(4)]]
        assert not check(Several(), inputs).put_back

    def test_models_of_token_indices(self) -> None:
        model = nn.Sequential(nn.Embedding(9, 4), *mlp())
        for batch in (1, 3):
            assert not check(model, [torch.zeros(batch, 6, dtype=torch.long)], 0.7).put_back

    def test_dict_outputs_and_train_mode_tuples(self) -> None:
        class Auxiliary(Two):
            def __init__(self) -> None:
                super().__init__()
                self.aux = nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Linear(12, 3))

            def forward(self, x: Tensor) -> Any:
                hidden = self.stem(x)
                if self.training:
                    return {"out": super().forward(x)}, self.aux(hidden)
                return {"out": super().forward(x)}

        result = check(Auxiliary(), [rows()], 0.5)
        assert not result.put_back
        assert "aux.0" in result.structure
        assert isinstance(result.model.head, nn.Linear)

    def test_random_models(self) -> None:
        class Noisy(Two):
            def forward(self, x: Tensor) -> Any:
                return super().forward(x + torch.randn_like(x))

        assert not check(nn.Sequential(nn.Dropout(0.5), Noisy()), [rows()]).put_back

    def test_models_that_are_not_deterministic_can_still_be_compressed_blindly(self) -> None:
        class Clock(Two):
            calls = 0

            def forward(self, x: Tensor) -> Any:
                type(self).calls += 1
                return super().forward(x) + type(self).calls

        with pytest.raises(UnsupportedError, match="not deterministic"):
            compress(Clock(), inputs=[rows()])
        result = compress(Clock())
        assert result.plan.moves
        assert not result.verified

    def test_a_forward_that_a_copy_would_share_is_refused(self) -> None:
        model = mlp()
        bound = model.forward
        model.forward = lambda x: bound(x)
        with pytest.raises(UnsupportedError, match="forward of the model was replaced"):
            compress(model)
        model.forward = bound
        assert not check(model, [rows()]).put_back
        model[2].forward = torch.compile(model[2].forward)
        with pytest.raises(UnsupportedError, match="forward of 2 was replaced"):
            compress(model)

    def test_models_that_cannot_be_copied_are_refused(self) -> None:
        model = mlp()
        model[0].lock = (i for i in ())
        with pytest.raises(UnsupportedError, match="cannot be copied: cannot pickle"):
            compress(model)


class TestBudget:
    def test_one_does_nothing(self) -> None:
        model = mlp()
        result = compress(model, 1.0, inputs=[rows()])
        assert result.plan.moves == ()
        assert result.structure == {}
        state = result.model.state_dict()
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
        assert compress(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), 1.0).plan.moves == ()

    @pytest.mark.parametrize("budget", [0.9, 0.75, 0.6, 0.5])
    @pytest.mark.parametrize("cost", [PARAMS, MACS])
    def test_it_holds(self, budget: float, cost: Cost) -> None:
        layers = [nn.Conv2d(8, 12, 3, stride=2), nn.ReLU(), nn.Conv2d(12, 16, 3)]
        model = ready(convnet(*layers), images())
        result = compress(model, budget, cost=cost, inputs=[images()])
        before = total_cost(model, result.layers, cost)
        found = result.costs[cost.name]
        assert found is not None
        assert found.before == before
        after = model_parameters(result.model) if cost is PARAMS else found.after
        assert found.after == after
        assert after is not None
        assert after <= budget * before

    def test_macs_without_inputs_are_refused(self) -> None:
        with pytest.raises(UsageError, match="MACs are unknown") as caught:
            compress(mlp(), cost=MACS)
        assert "input_shape=" in str(caught.value.hint)

    def test_56_out_of_reach_names_one_that_is_in_reach(self) -> None:
        model = mlp()
        with pytest.raises(UsageError, match="smallest reachable is") as caught:
            compress(model, 0.05)
        smallest = float(str(caught.value).rpartition(" ")[2])
        assert compress(model, smallest).plan.moves
        with pytest.raises(UsageError, match="smallest reachable"):
            compress(model, smallest - 0.001)

    def test_58_a_factorization_larger_than_the_layer_is_never_chosen(self) -> None:
        model = mlp(nn.Linear(12, 2), nn.ReLU(), nn.Linear(2, 12), nn.ReLU(), nn.Linear(12, 12))
        result = compress(model, 0.93)
        sizes = {layer.name: layer.parameters for layer in result.layers}
        assert result.structure
        for name, stages in result.structure.items():
            assert sum(stage.parameters for stage in stages) < sizes[name]


class TestLaws:
    def test_6_the_input_stays_as_it_is(self) -> None:
        model = ready(convnet(nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.Dropout(0.2)), images())
        model[2].weight.requires_grad_(False)
        model[3].eval()
        model.register_forward_hook(lambda *_: None)
        model(images()).sum().backward()
        objects = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
        grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
        state = {name: value.clone() for name, value in model.state_dict().items()}
        modes = [(name, type(m), m.training) for name, m in model.named_modules()]
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        seeds, x = torch.get_rng_state(), images()
        result = compress(model, 0.7, inputs=[x], methods=ALL_METHODS)
        assert result.plan.moves
        assert torch.equal(torch.get_rng_state(), seeds)
        assert torch.equal(x, images())
        assert [(n, id(p), p.requires_grad) for n, p in model.named_parameters()] == objects
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert [(name, type(m), m.training) for name, m in model.named_modules()] == modes
        assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
        for name, p in model.named_parameters():
            grad = grads[name]
            assert p.grad is None if grad is None else torch.equal(p.grad, grad)

    def test_6_so_do_untouched_layers(self) -> None:
        model = ready(convnet(nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.Dropout(0.2)), images())
        model[0].weight.requires_grad_(False)
        model[2].bias.requires_grad_(False)
        model[3].eval()
        check(model, [images()], 0.7)
        small = compress(model, 0.7, inputs=[images()]).model
        assert [m.training for m in small] == [m.training for m in model]
        frozen = [name for name, p in small.named_parameters() if not p.requires_grad]
        assert frozen == ["0.weight", f"2.{len(small[2]) - 1}.bias"]
        before = {id(p) for p in model.parameters()}
        assert not before & {id(p) for p in small.parameters()}

    def test_6_calibrating_changes_the_statistics_behind_replaced_layers_only(self) -> None:
        middle = (nn.BatchNorm2d(8), nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12))
        model = ready(convnet(*middle), images()).eval()
        plain, noisy = (
            compress(model, 0.7, inputs=[images()], how=how).model.state_dict()
            for how in ("none", "noise")
        )
        different = {key for key, value in plain.items() if not torch.equal(value, noisy[key])}
        assert different == {"4.running_mean", "4.running_var"}

    def test_7_the_same_seed_gives_the_same_plan_and_weights(self) -> None:
        model = ready(convnet(nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Conv2d(12, 12, 3)), images())
        cp = {"cp": Cp(start="uniform")}
        first, again, other = (
            compress(model, methods=cp, seed=seed, inputs=[images()]) for seed in (3, 3, 4)
        )
        assert first.plan == again.plan
        assert first.plan.candidates == again.plan.candidates
        states = [r.model.state_dict() for r in (first, again, other)]
        assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
        assert any(
            value.shape != states[2][key].shape or not torch.equal(value, states[2][key])
            for key, value in states[0].items()
            if key in states[2]
        )

    def test_7_a_plan_applied_later_gives_the_same_weights(self) -> None:
        model = ready(convnet(nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Conv2d(12, 12, 3)), images())
        result = compress(model, methods=ALL_METHODS, seed=5, inputs=[images()])
        plan = Plan.from_json(result.plan.to_json())
        applied = apply(model, plan, ALL_METHODS)
        state = applied.model.state_dict()
        assert list(state) == list(result.model.state_dict())
        assert all(torch.equal(v, state[key]) for key, v in result.model.state_dict().items())
        assert applied.structure == result.structure


class TestApplyPlan:
    @pytest.mark.parametrize(
        ("moves", "reason", "hint"),
        [
            ([Move("22", "svd", 2)], "no layer named '22'", "close names: 2"),
            ([Move("2", "svd", 2), Move("2", "svd", 3)], "the layer '2' twice", None),
            ([Move("2", "sdv", 2)], "no method named 'sdv'", "svd"),
            (
                [Move("2", "svd", (2, 2))],
                r"layer '2', svd: rank \(2, 2\) .* one whole number,",
                None,
            ),
            ([Move("2", "svd", 0)], "layer '2', svd: rank 0 .* from 1 to 12", None),
            ([Move("2", "svd", 13)], "rank 13 .* from 1 to 12", None),
        ],
    )
    def test_57_plans_that_do_not_fit_are_refused(
        self, moves: list[Move], reason: str, hint: str | None
    ) -> None:
        with pytest.raises(UsageError, match=reason) as caught:
            apply(mlp(), Plan(tuple(moves)), METHODS)
        assert hint is None or hint in str(caught.value.hint)

    @pytest.mark.parametrize("rank", [2, (2,), (2, 2, 2), (0, 3), (3, 99)])
    def test_57_tucker_ranks_that_do_not_fit_are_refused(self, rank: Any) -> None:
        model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU())
        ranges = "2 whole numbers, from 1 to 6 and from 1 to 4"
        with pytest.raises(UsageError, match=f"layer '0', tucker: rank .* must be {ranges}"):
            apply(model, Plan((Move("0", "tucker", rank),)), METHODS)

    def test_methods_that_do_not_support_a_layer_are_refused(self) -> None:
        with pytest.raises(UnsupportedError, match=r"tucker cannot decompose the layer '2': .*svd"):
            apply(mlp(), Plan((Move("2", "tucker", (2, 2)),)), METHODS)

    def test_layers_that_stay_dense_are_refused(self) -> None:
        model = mlp()
        model[2].register_forward_hook(lambda *_: None)
        with pytest.raises(UnsupportedError, match="the layer '2' stays dense: it has hooks"):
            apply(model, Plan((Move("2", "svd", 2),)), METHODS)

    def test_written_by_hand_also_for_the_ends(self) -> None:
        plan = Plan((Move("6", "svd", 1), Move("0", "svd", 2), Move("2", "svd", 12)))
        model = mlp()
        result = apply(model, plan, METHODS, inputs=[rows()])
        assert result.plan == plan
        assert result.verified
        assert [len(result.model[i]) for i in (0, 2, 6)] == [2, 2, 2]
        assert isinstance(model[0], nn.Linear)

    def test_a_layer_may_go_by_any_of_its_names(self) -> None:
        shared = nn.Linear(12, 12)
        model = mlp(shared, nn.ReLU(), shared)
        result = apply(model, Plan((Move("4", "svd", 2),)), METHODS)
        assert result.model[2] is result.model[4]
        assert list(result.structure) == ["2"]
        assert result.plan.moves == (Move("2", "svd", 2),)
        with pytest.raises(UsageError, match="twice"):
            apply(model, Plan((Move("4", "svd", 2), Move("2", "svd", 2))), METHODS)

    def test_an_empty_plan_changes_nothing(self) -> None:
        model = mlp()
        result = apply(model, Plan(()), METHODS, inputs=[rows()])
        assert torch.equal(result.model(rows()), model(rows()))

    def test_layers_that_break_the_model_are_put_back(self) -> None:
        class Reads(Two):
            def forward(self, x: Tensor) -> Any:
                return self.head(functional.linear(self.a(self.stem(x)), self.b.weight))

        plan = compress(Reads(), 0.6).plan  # blindly
        assert {move.layer for move in plan.moves} == {"a", "b", "c"}
        result = apply(Reads(), plan, METHODS, inputs=[rows()])
        assert list(result.put_back) == ["b"]
        assert {move.layer for move in result.plan.moves} == {"a", "c"} == set(result.structure)
        assert [c.layer for c in result.plan.candidates] == [m.layer for m in result.plan.moves]


class TestMethodsThatMisbehave:
    def test_stages_that_compute_something_else_are_put_back(self) -> None:
        class ForgetsStride(Svd):
            def stages(self, layer: LayerSpec, rank: Any) -> Any:
                first, second = super().stages(layer, rank)
                return LayerSpec(**{**vars(first), "stride": (1, 1)}), second

        model = ready(convnet(nn.Conv2d(8, 12, 3, stride=2), nn.ReLU()), images())
        with pytest.raises(UsageError, match="smallest reachable is 1;") as caught:
            compress(model, methods={"bad": ForgetsStride()}, inputs=[images()])
        assert "2 was put back" in str(caught.value)


class TestInputs:
    def test_random_inputs_fit_the_model(self) -> None:
        (x,) = random_inputs(mlp().double(), (4,), batch=3).args
        assert (x.shape, x.dtype) == ((3, 4), torch.float64)
        assert torch.equal(x, random_inputs(mlp().double(), (4,), batch=3).args[0])
        assert not torch.equal(x, random_inputs(mlp().double(), (4,), batch=3, seed=1).args[0])

    @pytest.mark.parametrize("shape", [(3, 0), (-1,), (-3, -4)])
    def test_shapes_without_elements_are_refused(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(UsageError, match="shape"):
            random_inputs(mlp(), shape)

    def test_one_and_two_samples(self) -> None:
        x, mask, scale = torch.arange(12.0).reshape(3, 4), torch.eye(5), torch.tensor(1.0)
        one = Inputs((x, mask, scale, "text")).first_sample().args
        assert torch.equal(one[0], x[:1])
        assert one[1] is mask
        assert one[2:] == (scale, "text")
        two = Inputs((x[:1], mask, scale, None)).two_samples().args
        assert two[0].shape == (2, 4)
        assert two[1:] == (mask, scale, None)
        assert Inputs((x,)).two_samples().args[0] is x


class TestCalibration:
    def model(self) -> nn.Module:
        return ready(convnet(nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12)), images()).eval()

    def test_on_data_the_means_move_as_far_as_those_of_the_features(self) -> None:
        dense, data = self.model(), images(32)
        small = compress(dense, 0.7, inputs=[images()], how="data", calibration=[data]).model
        with torch.no_grad():
            before, after = dense[:3](data), small.eval()[:3](data)
        unit = (dense[3].running_var / before.var((0, 2, 3), correction=0)).sqrt()
        moved = (after.mean((0, 2, 3)) - before.mean((0, 2, 3))) * unit
        assert float(moved.abs().max()) > 0.01
        torch.testing.assert_close(small[3].running_mean, dense[3].running_mean + moved)

    def test_a_plan_that_needs_data_says_so(self) -> None:
        with pytest.raises(UsageError, match="needs some"):
            compress(self.model(), 0.7, inputs=[images()], how="data")

    def test_a_plan_applied_again_gives_the_same_statistics(self) -> None:
        model = self.model()
        first = compress(model, 0.7, inputs=[images()], how="noise")
        assert first.plan.calibration == "noise"
        again = apply(
            model, Plan.from_json(first.plan.to_json()), METHODS, inputs=[images()]
        ).model.state_dict()
        state = first.model.state_dict()
        assert all(torch.equal(value, again[key]) for key, value in state.items())

    def test_a_model_that_takes_one_batch_size_only_is_compressed_all_the_same(self) -> None:
        class Two(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner = inner
                self.register_buffer("rows", torch.zeros(2, 1, 1, 1))

            def forward(self, x: Tensor) -> Tensor:
                return self.inner(x if len(x) == 1 else x + self.rows)

        result = compress(Two(self.model()).eval(), 0.7, inputs=[images()], how="noise")
        assert result.plan.calibration == "noise"
        assert result.uncalibrated is not None
        assert result.uncalibrated.startswith("on noise, the model does not run")

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_62_data_that_are_not_finite_are_refused(self, value: float) -> None:
        data = images(32)
        data[3, 0, 0, 0] = value
        with pytest.raises(UnsupportedError, match="NaN or infinite"):
            compress(self.model(), 0.7, inputs=[images()], how="data", calibration=[data])

    def test_60_data_of_another_shape_are_refused(self) -> None:
        data = torch.zeros(4, 7, 9, 9)
        with pytest.raises(UnsupportedError, match="does not run on the data to calibrate on"):
            compress(self.model(), 0.7, inputs=[images()], how="data", calibration=[data])

    def test_a_model_without_batchnorm_needs_no_calibration(self) -> None:
        model = ready(convnet(nn.Conv2d(8, 12, 3)), images())
        result = compress(model, 0.7, how="noise")
        assert result.uncalibrated is None
        assert result.plan.moves

    def test_without_a_shape_it_is_said_to_be_undone(self) -> None:
        model = self.model()
        result = compress(model, 0.7, how="noise")
        assert result.uncalibrated == "the shape of the model's input is unknown"
        # The plan keeps what was asked for: where the shape is known, it is done.
        again = apply(model, result.plan, METHODS, inputs=[images()])
        assert again.uncalibrated is None
        assert not torch.equal(again.model[3].running_var, result.model[3].running_var)

    def test_inputs_that_are_no_images_are_left_to_the_verification(self) -> None:
        class Tokens(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed = nn.Embedding(10, 12)
                self.a, self.b, self.c = (nn.Linear(12, 12) for _ in range(3))
                self.norm = nn.BatchNorm1d(12)

            def forward(self, ids: Tensor) -> Tensor:
                x = self.norm(self.b(self.a(self.embed(ids)).mean(1)))
                return self.c(x)

        ids = torch.randint(10, (4, 5), generator=torch.Generator().manual_seed(0))
        result = compress(Tokens().eval(), 0.9, inputs=[ids], how="noise")
        assert result.verified
        assert result.plan.moves


class TestRefinement:
    def test_the_reported_error_is_that_of_the_module_and_at_most_what_was_scored(self) -> None:
        model = ready(convnet(nn.Conv2d(8, 12, 3)), images())
        result = compress(model, 0.7, methods={"tucker": ALL_METHODS["tucker"]})
        (move,), (candidate,) = result.plan.moves, result.plan.candidates
        layer = next(layer for layer in result.layers if layer.name == move.layer)
        assert layer.spec is not None
        weight = model[2].weight.detach().double()
        gap = weight - dense_weight(result.model[2], layer.spec)
        assert result.errors == {"2": pytest.approx(float(gap.norm() / weight.norm()), rel=1e-5)}
        assert result.errors["2"] < candidate.errors["relative-weights"]
