"""Is a compressed model the model that was meant? Models that make the answer hard."""

import copy
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tdkit.compression.scoring import factorize, prepare
from tdkit.compression.verification import dense_weight
from tdkit.compression.verification import verify as verify_inputs
from tdkit.errors import UnsupportedError
from tdkit.forward.inputs import Inputs
from tdkit.layers.evidence import NO_EVIDENCE
from tdkit.layers.inventory import Layer, find_layers
from tdkit.layers.weights import ModuleWeights
from tdkit.registry import load_registry, resolve_methods

METHODS = resolve_methods(load_registry(), ["svd", "cp", "tucker", "tt"])


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def factorized(model: nn.Module, *names: str, rank: int = 2) -> dict[Layer, nn.Sequential]:
    layers = {layer.name: layer for layer in find_layers(model, include_ends=True)}
    weights, result = ModuleWeights(model), {}
    for name in names:
        prepared = prepare(layers[name], weights, "svd", METHODS["svd"], NO_EVIDENCE)
        assert prepared is not None
        stand_in = factorize(layers[name], weights, prepared, rank)
        result[layers[name]] = stand_in.train(model.get_submodule(name).training)
    return result


def verify(
    model: nn.Module, stand_ins: Mapping[Layer, nn.Sequential], inputs: Any
) -> dict[str, str]:
    return verify_inputs(model, stand_ins, Inputs.of(inputs))


class Base(nn.Module):
    """Two hidden layers; subclasses differ in how they use them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.a = nn.Linear(6, 6)
        self.b = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Any:
        x = self.norm(self.a(self.stem(x)).relu())
        return self.b(self.drop(x))


def example() -> list[Tensor]:
    return [torch.randn(2, 4, generator=torch.Generator().manual_seed(1))]


def broken(model: nn.Module, inputs: list[Any] | None = None) -> dict[str, str]:
    return verify(model, factorized(model, "a", "b"), example() if inputs is None else inputs)


class TestRightModels:
    def test_dropout_and_batch_norm(self) -> None:
        assert broken(Base()) == {}

    def test_nothing_to_check(self) -> None:
        assert verify(Base(), {}, example()) == {}

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_precisions(self, dtype: torch.dtype) -> None:
        assert broken(Base().to(dtype), [example()[0].to(dtype)]) == {}

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_model_that_insists_on_its_precision(self, dtype: torch.dtype) -> None:
        class Insists(Base):
            def forward(self, x: Tensor) -> Any:
                return super().forward(x.to(dtype))

        assert broken(Insists().to(dtype)) == {}

    def test_a_deep_model_in_half_precision(self) -> None:
        class Deep(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.blocks = nn.Sequential(
                    *(
                        nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.ReLU())
                        for _ in range(30)
                    )
                )

            def forward(self, x: Tensor) -> Tensor:
                for block in self.blocks:
                    x = x + block(x.bfloat16())
                return x

        model = Deep().bfloat16()
        layers = factorized(model, *(f"blocks.{i}.0" for i in range(30)), rank=12)
        x = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
        assert verify(model, layers, [x]) == {}

    def test_random_numbers_from_everywhere(self) -> None:
        class Random(Base):
            def forward(self, x: Tensor) -> Any:
                noise = torch.randn(()) + random.random() + np.random.rand()
                return super().forward(x) + noise

        model = Random()
        seeds = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
        assert broken(model) == {}
        assert torch.equal(torch.get_rng_state(), seeds[0])
        assert random.getstate() == seeds[1]
        assert np.array_equal(np.random.get_state()[1], seeds[2])

    def test_a_model_that_only_runs_in_eval_mode(self) -> None:
        class EvalOnly(Base):
            def forward(self, x: Tensor) -> Any:
                assert not self.training, "inference only"
                return super().forward(x)

        assert broken(EvalOnly()) == {}

    def test_a_model_that_is_only_random_in_train_mode(self) -> None:
        class Noisy(Base):
            calls = 0

            def forward(self, x: Tensor) -> Any:
                type(self).calls += 1
                return super().forward(x) + (type(self).calls if self.training else 0)

        assert broken(Noisy()) == {}

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_outputs_that_are_masked_with_infinity(self, value: float) -> None:
        class Masked(Base):
            def forward(self, x: Tensor) -> Any:
                mask = torch.tensor([True, False] * 3)
                return super().forward(x).masked_fill(mask, value)

        assert broken(Masked()) == {}

    def test_24_a_model_that_is_broken_beforehand_is_refused_with_what_is_wrong(self) -> None:
        model = Base().eval()
        with torch.no_grad():
            model.stem.weight[1, 2] = float("nan")
        layers = factorized(model, "b")
        with pytest.raises(UnsupportedError, match=r"NaN or infinite .*; so .* of stem\.weight"):
            verify(model, layers, example())

    def test_25_a_replacement_that_overflows_is_put_back(self) -> None:
        class Overflowing(Base):
            def forward(self, x: Tensor) -> Any:
                stages = isinstance(self.b, nn.Sequential)
                mask = torch.tensor([stages, False, False, False, False, False])
                return super().forward(x).masked_fill(mask, float("inf"))

        assert "NaN or infinite in other places" in broken(Overflowing())["b"]


@dataclass
class Output:
    logits: Tensor
    hidden: tuple[Tensor, ...] = ()


PACKINGS: Mapping[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "tuple": lambda x: (torch.ones(2), x),
    "dict": lambda x: {"fixed": torch.ones(2), "logits": x, "text": "none"},
    "ordered dict": lambda x: OrderedDict(logits=x),
    "nested": lambda x: [{"logits": (None, [x])}],
    "dataclass": lambda x: Output(x),
    "in a dataclass": lambda x: [Output(torch.ones(2), (x,))],
    "complex": lambda x: torch.complex(torch.ones_like(x), x),
    "int": lambda x: (1e4 * x).long(),
}


class TestOutputs:
    @pytest.mark.parametrize("packing", PACKINGS)
    def test_a_difference_is_seen_in_every_packing(self, packing: str) -> None:
        class Packed(Base):
            def forward(self, x: Tensor) -> Any:
                return PACKINGS[packing](self.head(super().forward(x)))

            def head(self, x: Tensor) -> Tensor:
                return x

        assert broken(Packed()) == {}

        class Outside(Packed):
            def __init__(self) -> None:
                super().__init__()
                self.hidden = [self.b]  # a list keeps the layer out of the surgeon's sight

            def head(self, x: Tensor) -> Tensor:
                return self.hidden[0](x)

        found = broken(Outside())
        assert list(found) == ["b"]
        assert "eval mode" in found["b"]

    def test_train_mode_outputs_count(self) -> None:
        class Auxiliary(Base):
            def forward(self, x: Tensor) -> Any:
                out = super().forward(x)
                if self.training:
                    return out, functional.linear(out, self.a.weight)
                return out

        found = broken(Auxiliary())
        assert list(found) == ["a"]
        assert "train mode" in found["a"]

    def test_an_output_that_depends_on_what_the_layer_is(self) -> None:
        class Curious(Base):
            def forward(self, x: Tensor) -> Any:
                x = super().forward(x)
                return (x, x) if isinstance(self.a, nn.Linear) else x

        assert list(broken(Curious())) == ["a"]


class TestWrongModels:
    def test_45_a_weight_read_from_outside(self) -> None:
        class Reads(Base):
            def forward(self, x: Tensor) -> Any:
                return functional.linear(self.a(self.stem(x)), self.b.weight, self.b.bias)

        found = broken(Reads())
        assert list(found) == ["b"]
        assert "weight" in found["b"]

    def test_a_stand_in_that_forgets_the_padding_mode(self) -> None:
        circular = nn.Conv2d(2, 6, 3, padding=1, padding_mode="circular")
        model = nn.Sequential(circular, nn.ReLU(), nn.Conv2d(6, 6, 3))
        stand_ins = factorized(model, "0", "2")
        next(iter(stand_ins.values()))[0].padding_mode = "zeros"
        x = [torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(0))]
        found = verify(model, stand_ins, x)
        assert list(found) == ["0"]
        assert "differs from the dense reconstruction" in found["0"]

    def test_a_stand_in_of_another_stride(self) -> None:
        model = nn.Sequential(nn.Conv1d(2, 6, 3), nn.ReLU(), nn.Conv1d(6, 6, 3), nn.ReLU())
        stand_ins = factorized(model, "0", "2")
        list(stand_ins.values())[1][0].stride = (2,)
        found = verify(model, stand_ins, [torch.randn(2, 2, 9)])
        assert list(found) == ["2"]
        assert "shape (2, 6, 3) instead of (2, 6, 5)" in found["2"]

    @pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
    @pytest.mark.parametrize("replaced", [True, False])
    def test_a_lack_of_memory_is_not_the_layers(
        self, error: type[Exception], replaced: bool
    ) -> None:
        class Hungry(Base):
            def forward(self, x: Tensor) -> Tensor:
                if not replaced or not isinstance(self.b, nn.Linear):
                    raise error("no room")
                return super().forward(x)

        with pytest.raises(error, match="no room"):
            broken(Hungry())

    def test_layers_that_are_only_wrong_together(self) -> None:
        class Fussy(Base):
            def forward(self, x: Tensor) -> Any:
                assert isinstance(self.a, nn.Linear) or isinstance(self.b, nn.Linear), (
                    "one is enough"
                )
                return super().forward(x)

        found = broken(Fussy())
        assert list(found) == ["b"]
        assert "one is enough" in found["b"]

    def test_a_model_that_is_not_deterministic_is_refused(self) -> None:
        class Clock(Base):
            calls = 0

            def forward(self, x: Tensor) -> Any:
                type(self).calls += 1
                return super().forward(x) + type(self).calls

        with pytest.raises(UnsupportedError, match="not deterministic") as caught:
            broken(Clock())
        assert caught.value.hint is not None

    def test_outputs_without_tensors_are_refused(self) -> None:
        class Talks(Base):
            def forward(self, x: Tensor) -> Any:
                return {"text": str(super().forward(x))}

        with pytest.raises(UnsupportedError, match="no tensor among its outputs"):
            broken(Talks())

    def test_a_dense_model_that_does_not_run_is_refused(self) -> None:
        with pytest.raises(UnsupportedError, match=r"cannot be verified.*mat1 and mat2"):
            broken(Base(), [torch.zeros(2, 5)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_model_and_inputs_stay_as_they_are(dtype: torch.dtype) -> None:
    class Greedy(Base):
        def forward(self, x: Tensor) -> Any:
            x.add_(1)
            self.norm.running_mean += 1
            return super().forward(x)

    model, inputs = Greedy().to(dtype), [example()[0].to(dtype)]
    model.a.eval()
    state, given = copy.deepcopy(model.state_dict()), inputs[0].clone()
    assert broken(model, inputs) == {}
    assert torch.equal(inputs[0], given)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert (model.training, model.a.training) == (True, False)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(6, 5),
        nn.Conv1d(6, 4, 3),
        nn.Conv2d(6, 4, (3, 2), stride=2, groups=2),
        nn.Conv3d(4, 4, 2),
        nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_the_dense_weight_is_the_reconstruction(module: nn.Module, method: str) -> None:
    weights = ModuleWeights(model := nn.Sequential(module))
    layer = find_layers(model, include_ends=True)[0]
    assert layer.spec is not None
    prepared = prepare(layer, weights, method, METHODS[method], NO_EVIDENCE)
    if prepared is None:
        pytest.skip(f"{method} does not support it")
    rank = prepared.rank(0.5)
    weight = dense_weight(factorize(layer, weights, prepared, rank), layer.spec)
    assert weight.dtype == torch.float64
    assert torch.allclose(weight, prepared.reconstruct(rank), atol=1e-6)
