"""Which layers are found, why others are kept dense, and how one is replaced.

The numbers are those of the cases "Layers and weights" in the project's list of bad inputs.
"""

import copy
import random
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from tdkit.errors import UnsupportedError, UsageError
from tdkit.forward.copying import unwrap
from tdkit.forward.inputs import Inputs
from tdkit.forward.trace import Call, trace
from tdkit.forward.trial import mode, trial
from tdkit.layers.counting import macs
from tdkit.layers.inventory import Layer, find_layers, replace_layer
from tdkit.layers.spec import spec_of


def middle(layer: nn.Module, features: int = 6) -> nn.Sequential:
    """A model in which the layer is neither the first nor the last."""
    return nn.Sequential(nn.Linear(4, features), nn.ReLU(), layer, nn.ReLU(), nn.Linear(6, 3))


def table(model: nn.Module, **options: Any) -> dict[str, Layer]:
    return {layer.name: layer for layer in find_layers(model, **options)}


def reason(model: nn.Module, name: str, **options: Any) -> str | None:
    return table(model, **options)[name].reason


def with_weight(change: Callable[[Tensor], Tensor]) -> nn.Sequential:
    model = middle(nn.Linear(6, 6))
    weight = change(model[2].weight.detach())
    floating = weight.is_floating_point() or weight.is_complex()
    model[2].weight = nn.Parameter(weight, requires_grad=floating)
    return model


def fill_one(weight: Tensor, value: float) -> Tensor:
    weight[1, 2] = value
    return weight


@pytest.mark.parametrize(
    ("case", "change", "expected"),
    [
        (24, lambda w: fill_one(w, float("nan")), "NaN or infinite"),
        (25, lambda w: fill_one(w, float("-inf")), "NaN or infinite"),
        (31, lambda w: w.to(torch.complex64), "complex"),
        (32, lambda w: w.to(torch.int8), r"torch\.int8"),
        (32, lambda w: w.to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (40, lambda w: w[:, :0], "empty"),
        (51, lambda w: w.to("meta"), "meta device"),
        (52, lambda w: w.to_sparse(), "sparse"),
        (52, lambda w: w.to_sparse_csr(), "sparse"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_weights_that_cannot_be_decomposed(
    case: int, change: Callable[[Tensor], Tensor], expected: str
) -> None:
    found = reason(with_weight(change), "2")
    assert found is not None, case
    assert re.search(expected, found), case


@pytest.mark.parametrize(
    "change",
    [
        torch.zeros_like,  # 26
        lambda w: w[:, :1] @ w[:1],  # 27
        lambda w: w * 1e-23,  # 28
        lambda w: w * 1e20,  # 28
        torch.Tensor.half,  # 29
        torch.Tensor.bfloat16,  # 29
        torch.Tensor.double,  # 30
    ],
)
def test_26_to_30_odd_weights_are_taken(change: Callable[[Tensor], Tensor]) -> None:
    assert reason(with_weight(change), "2") is None


@pytest.mark.filterwarnings("ignore")  # torch would rather have it done elsewhere
def test_32_a_quantized_layer_is_named_as_one() -> None:
    inner = nn.Sequential(nn.Linear(6, 6))
    quantized = torch.ao.quantization.quantize_dynamic(inner, {nn.Linear})
    assert "quantized" in str(reason(middle(quantized), "2.0"))


def test_33_tied_weights_are_kept() -> None:
    model = middle(nn.Linear(6, 6))
    model.append(nn.Linear(6, 6))
    model.append(nn.Linear(6, 2))
    model[5].weight = model[2].weight
    embedding = nn.Embedding(6, 6)
    model.append(embedding)
    assert "tied" in str(reason(model, "2"))
    assert "tied" in str(reason(model, "5"))
    model[2] = nn.Linear(6, 6)
    assert reason(model, "5") is None
    model[5].weight = embedding.weight
    assert "tied" in str(reason(model, "5"))


def old_style(name: str) -> Callable[[nn.Module], nn.Module]:
    def change(layer: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            result: nn.Module = getattr(nn.utils, name)(layer)
        return result

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (parametrizations.weight_norm, "parametrization"),
        (parametrizations.spectral_norm, "parametrization"),
        (parametrizations.orthogonal, "parametrization"),
        (old_style("weight_norm"), "computed from other parameters"),
        (old_style("spectral_norm"), "computed from other parameters"),
        (lambda layer: prune.random_unstructured(layer, "weight", 0.5), "computed from other"),
    ],
)
def test_34_computed_weights_are_kept(
    change: Callable[[nn.Module], nn.Module], expected: str
) -> None:
    assert expected in str(reason(middle(change(nn.Linear(6, 6))), "2"))


def test_35_depthwise_is_kept_and_grouped_is_not() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.ReLU(),
        nn.Conv2d(6, 12, 3, groups=6),
        nn.ReLU(),
        nn.ConvTranspose2d(12, 12, 3, groups=12),
        nn.ReLU(),
        nn.Conv2d(12, 6, 3, groups=3),
        nn.ReLU(),
        nn.Conv2d(6, 2, 1),
    )
    layers = table(model)
    assert [name for name, layer in layers.items() if "depthwise" in str(layer.reason)] == [
        "2",
        "4",
        "6",
    ]
    assert layers["8"].reason is None


def test_a_depthwise_separable_pair_is_not_taken_for_a_factorization() -> None:
    pair = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 1))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), pair, nn.ReLU(), nn.Conv2d(16, 2, 1))
    assert reason(model, "1.1") is None
    assert "depthwise" in str(reason(model, "1.0"))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_40_layers_without_channels_are_kept() -> None:
    assert "empty" in str(reason(middle(nn.Linear(0, 6)), "2"))


@pytest.mark.parametrize("lazy", [nn.LazyLinear(6), nn.LazyConv2d(6, 3)])
def test_41_lazy_layers_are_kept_and_stay_lazy(lazy: nn.Module) -> None:
    model = middle(lazy)
    assert "lazy" in str(reason(model, "2"))
    assert table(model)["2"].parameters == 0
    with pytest.raises(UnsupportedError, match="lazy"):
        find_layers(model, inputs=Inputs((torch.randn(1, 4),)))
    assert "lazy" in str(reason(model, "2"))


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_42_hooked_layers_are_kept(register: str) -> None:
    model = middle(nn.Linear(6, 6))
    handle = getattr(model[2], register)(lambda *_: None)
    assert "hooks" in str(reason(model, "2"))
    handle.remove()
    assert reason(model, "2") is None


def test_a_forward_replaced_on_the_instance_is_kept() -> None:
    model = middle(nn.Linear(6, 6))
    model[2].forward = lambda x: x + 1
    assert "forward" in str(reason(model, "2"))


def test_subclasses_are_kept() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    assert "Scaled" in str(reason(middle(Scaled(6, 6)), "2"))


def test_43_and_44_layers_that_transformers_read_directly_are_kept() -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.Linear(4, 8), encoder, nn.Linear(8, 2))
    layers = table(model, inputs=Inputs((torch.randn(1, 5, 4),)))
    assert "MultiheadAttention" in str(layers["1.self_attn.out_proj"].reason)
    assert "TransformerEncoderLayer" in str(layers["1.linear1"].reason)
    assert "TransformerEncoderLayer" in str(layers["1.linear2"].reason)


def test_46_one_module_under_three_names_is_one_layer() -> None:
    shared = nn.Linear(6, 6)
    model = nn.Sequential(nn.Linear(4, 6), shared, nn.ReLU(), shared, nn.ReLU(), shared)
    model.append(nn.Linear(6, 2))
    layer = table(model, inputs=Inputs((torch.randn(1, 4),)))["1"]
    assert (layer.aliases, layer.reason) == (("3", "5"), None)
    assert layer.calls == (Call((1, 6)),) * 3
    assert layer.macs == 3 * 36
    assert table(model, patterns=["5"])["1"].reason is None
    replace_layer(model, layer, stand_in := nn.Identity())
    assert model[1] is model[3] is model[5] is stand_in


def test_replacing_reaches_a_layer_in_a_shared_block() -> None:
    block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model = nn.ModuleDict({"a": block, "b": nn.Sequential(block)})
    replace_layer(model, table(model)["a.0"], stand_in := nn.Identity())
    assert model["a"][0] is model["b"][0][0] is stand_in


class TestUnwrap:
    plain = middle(nn.Linear(6, 6))

    def test_47_compiled(self) -> None:
        assert unwrap(torch.compile(self.plain)) is self.plain

    def test_48_data_parallel_also_around_compiled(self) -> None:
        assert unwrap(nn.DataParallel(torch.compile(self.plain))) is self.plain

    @pytest.mark.filterwarnings("ignore:.torch.jit.*deprecated")
    @pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel])
    def test_49_scripted_is_refused(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        scripted = torch.jit.script(self.plain)
        with pytest.raises(UnsupportedError, match="TorchScript") as caught:
            unwrap(wrap(scripted))
        assert "Python model" in str(caught.value.hint)

    @pytest.mark.filterwarnings("ignore:.torch.jit.*deprecated")
    def test_49_traced_is_refused(self) -> None:
        with pytest.raises(UnsupportedError, match="TorchScript"):
            unwrap(torch.jit.trace(self.plain, torch.randn(1, 4)))


@pytest.mark.parametrize("model", [nn.Sequential(), nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))])
def test_50_a_model_without_parameters_is_refused(model: nn.Module) -> None:
    with pytest.raises(UnsupportedError, match="no parameters"):
        find_layers(model)


def test_a_model_that_is_one_layer_is_refused_with_the_way_out() -> None:
    with pytest.raises(UnsupportedError, match="single Linear") as caught:
        find_layers(nn.Linear(3, 4))
    assert "Sequential" in str(caught.value.hint)


def test_a_model_without_layers_has_an_empty_table() -> None:
    assert find_layers(nn.Sequential(nn.BatchNorm1d(3))) == []


def test_53_a_pattern_that_matches_nothing_suggests_close_names() -> None:
    model = nn.ModuleDict({"encoder": middle(nn.Linear(6, 6)), "head": nn.Linear(3, 3)})
    with pytest.raises(UsageError, match=r"no layer named 'encodr\.2'") as caught:
        find_layers(model, patterns=["head", "encodr.2"])
    assert "encoder.2" in str(caught.value.hint)


def test_patterns_select() -> None:
    model = middle(nn.Linear(6, 6))
    layers = table(model, patterns=["[02]"], include_ends=True)
    assert [layer.reason for layer in layers.values()] == [None, None, "not selected"]


def test_54_the_stages_of_a_factorized_layer_are_kept() -> None:
    layer = nn.Sequential(nn.Conv2d(4, 2, 1), nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 6, 1))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), layer, nn.ReLU(), nn.Conv2d(6, 2, 1))
    for name in ("2.0", "2.1", "2.2"):
        assert "already factorized" in str(reason(model, name))


def test_54_a_whole_model_is_not_taken_for_a_factorized_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2))
    assert reason(model, "1") is None
    assert "already factorized" in str(reason(nn.Sequential(nn.Linear(4, 4), model), "1.1"))


def test_cyclic_modules_are_refused() -> None:
    model = middle(nn.Linear(6, 6))
    model[1].parent = model
    with pytest.raises(UnsupportedError, match="contain themselves"):
        find_layers(model)


class Backwards(nn.Module):
    """Registered in another order than called; one layer only serves training."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 2)
        self.body = nn.Linear(6, 6)
        self.stem = nn.Linear(4, 6)
        self.auxiliary = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Any:
        x = self.body(self.stem(x).relu()).relu()
        return (self.head(x), self.auxiliary(x)) if self.training else self.head(x)


class TestEnds:
    def test_the_first_and_last_called_are_kept(self) -> None:
        layers = table(Backwards(), inputs=Inputs((torch.randn(1, 4),)))
        assert list(layers) == ["stem", "body", "head", "auxiliary"]
        assert layers["stem"].reason == "the first layer is kept dense"
        assert layers["head"].reason == "the last layer is kept dense"
        assert layers["body"].reason is layers["auxiliary"].reason is None
        assert layers["auxiliary"].calls == ()
        assert layers["auxiliary"].macs == 0

    def test_without_inputs_the_order_is_that_of_registration(self) -> None:
        layers = table(Backwards())
        assert list(layers) == ["head", "body", "stem", "auxiliary"]
        assert layers["head"].reason == "the first layer is kept dense"
        assert layers["auxiliary"].reason == "the last layer is kept dense"
        assert layers["body"].calls is layers["body"].macs is None

    def test_they_can_be_let_in(self) -> None:
        layers = find_layers(Backwards(), inputs=Inputs((torch.randn(1, 4),)), include_ends=True)
        assert [layer.reason for layer in layers] == [None] * 4

    def test_another_reason_comes_first(self) -> None:
        model = Backwards()
        model.stem.register_forward_hook(lambda *_: None)
        assert "hooks" in str(reason(model, "stem", inputs=Inputs((torch.randn(1, 4),))))


class Restless(nn.Module):
    """Changes its input, its buffers and the random state in every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = middle(nn.Linear(6, 6))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("latest", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.latest = x.sum(0)
        x += torch.rand(()) + random.random() + np.random.rand()
        return self.layers(x)


class TestTrace:
    def test_nothing_is_left_behind(self) -> None:
        model = Restless()
        model.layers[1].eval()
        state, inputs = copy.deepcopy(model.state_dict()), torch.ones(1, 4)
        seeds = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1])
        calls = trace(model, [model.layers[0]], Inputs((inputs,)))
        assert calls == {model.layers[0]: [Call((1, 4))]}
        assert torch.equal(inputs, torch.ones(1, 4))
        assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
        assert torch.equal(torch.get_rng_state(), seeds[0])
        assert random.getstate() == seeds[1]
        assert np.array_equal(np.random.get_state()[1], seeds[2])
        assert model.layers.training
        assert not model.layers[1].training
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
        assert not any(module._forward_pre_hooks for module in model.modules())

    def test_it_runs_in_eval_mode(self) -> None:
        model = Backwards()
        assert model.auxiliary not in trace(
            model, [model.auxiliary, model.body], Inputs((torch.ones(1, 4),))
        )

    def test_a_failure_names_the_shape_and_leaves_no_hooks(self) -> None:
        model = Backwards()
        with pytest.raises(UnsupportedError, match=r"\(1, 5\): mat1 and mat2") as caught:
            trace(model, [model.stem], Inputs((torch.ones(1, 5),)))
        assert "input_shape=(3, 224, 224)" in str(caught.value.hint)
        assert not model.stem._forward_pre_hooks
        assert model.training

    def test_calls_have_the_full_shape_of_the_input(self) -> None:
        class Windows(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(3, 3)
                self.conv = nn.Conv2d(3, 3, 1)

            def forward(self, x: Tensor) -> Tensor:
                windows = self.conv(
                    input=x.unflatten(3, (2, -1)).permute(0, 3, 1, 2, 4).flatten(0, 1)
                )
                self.conv(windows[0])
                return self.linear(windows.movedim(1, -1))

        model = Windows()
        calls = trace(model, [model.linear, model.conv], Inputs((torch.ones(1, 3, 4, 6),)))
        assert calls[model.conv] == [Call((2, 3, 4, 3)), Call((1, 3, 4, 3))]
        assert calls[model.linear] == [Call((2, 4, 3, 3))]
        assert macs([spec_of(model.linear)], calls[model.linear]) == 2 * 4 * 3 * 9
        assert macs([spec_of(model.conv)], calls[model.conv]) == 3 * 4 * 3 * 9
        assert list(calls) == [model.conv, model.linear]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_trial_restores_statistics_that_torch_changes_unseen(dtype: torch.dtype) -> None:
    # BatchNorm's kernel does not count its change of the running statistics as a new version.
    norm = nn.BatchNorm2d(3).to(dtype)
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    with trial(norm, training=True):
        norm(torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)).to(dtype) + 1)
        assert not torch.equal(norm.running_mean, before["running_mean"])
    for name, buffer in norm.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_a_trial_leaves_versions_and_expanded_buffers_alone() -> None:
    """What autograd has saved of a buffer stays valid."""
    norm = nn.BatchNorm2d(3)
    norm.register_buffer("expanded", torch.ones(1).expand(5))
    versions = [buffer._version for buffer in norm.buffers()]
    with trial(norm):
        norm(torch.zeros(1, 3, 2, 2))
    assert [buffer._version for buffer in norm.buffers()] == versions


def test_a_trial_restores_after_an_error() -> None:
    model = Restless()
    with pytest.raises(ZeroDivisionError), trial(model, training=True):  # noqa: PT012
        model(torch.zeros(2, 4))
        raise ZeroDivisionError
    assert float(model.calls) == 0
    assert torch.is_grad_enabled()


def test_mode_restores_every_module() -> None:
    model = middle(nn.Dropout())
    model[2].eval()
    with mode(model, training=False):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model] == [True, True, False, True, True]
