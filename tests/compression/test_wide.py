"""Verifying without a copy in double precision: what models do that could be seen or go wrong."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tdkit.compression import verification
from tdkit.compression.scoring import factorize, prepare
from tdkit.compression.verification import verify
from tdkit.decompositions.svd import Svd
from tdkit.errors import UnsupportedError
from tdkit.forward.inputs import Inputs
from tdkit.layers.evidence import NO_EVIDENCE
from tdkit.layers.inventory import Layer, find_layers
from tdkit.layers.weights import ModuleWeights

PRECISIONS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


class Base(nn.Module):
    """A layer ``a``, something in the middle, a layer ``b``."""

    def __init__(self, middle: Callable[[], nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.a, self.middle, self.b = nn.Linear(8, 8), middle(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        return self.b(self.inside(self.a(x)))

    def inside(self, x: Tensor) -> Tensor:
        result: Tensor = self.middle(x)
        return result


def tokens() -> Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


def factorized(model: nn.Module) -> dict[Layer, nn.Sequential]:
    result, weights = {}, ModuleWeights(model)
    for layer in find_layers(model, include_ends=True):
        if layer.name in ("a", "b"):
            prepared = prepare(layer, weights, "svd", Svd(), NO_EVIDENCE)
            assert prepared is not None
            result[layer] = factorize(layer, weights, prepared, 3)
    assert len(result) == 2
    return result


def is_wide(model: nn.Module, *args: Any) -> bool:
    return verification._Comparison(model, Inputs(args), {}).wide


def broken(model: nn.Module, *args: Any) -> dict[str, str]:
    return verify(model, factorized(model), Inputs(args))


class Cached(Base):
    """Keys of a cache that is a buffer, in the ways that models write there."""

    def __init__(self, write: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self.write = write
        self.register_buffer("cache", torch.zeros(2, 7, 8))

    def inside(self, x: Tensor) -> Tensor:
        self.write(self.cache, x)
        return x + self.cache[:, :5].cumsum(1)


def _set(cache: Tensor, x: Tensor) -> None:
    cache[:, :5] = x


def _copy(cache: Tensor, x: Tensor) -> None:
    cache[:, :5].copy_(x)


def _narrow(cache: Tensor, x: Tensor) -> None:
    cache.narrow(1, 0, 5).add_(x)


def _paged(cache: Tensor, x: Tensor) -> None:
    slots = torch.tensor([0, 1, 2, 3, 4, 7, 8, 9, 10, 11])
    cache.flatten(0, 1).index_copy_(0, slots, x.flatten(0, 1))


def _index_copy(cache: Tensor, x: Tensor) -> None:
    cache.index_copy_(1, torch.arange(5), x)


def _scatter(cache: Tensor, x: Tensor) -> None:
    cache.scatter_(1, torch.arange(5)[None, :, None].expand(2, 5, 8), x)


def _index_put(cache: Tensor, x: Tensor) -> None:
    cache.index_put_((torch.arange(2)[:, None], torch.arange(5)), x)


def _data(cache: Tensor, x: Tensor) -> None:
    cache.data[:, :5] = x


def _set_data(cache: Tensor, x: Tensor) -> None:
    cache.data = torch.cat([x, cache[:, 5:]], 1)


def _out(cache: Tensor, x: Tensor) -> None:
    torch.matmul(x.mT, x, out=cache[:, :0].new_empty(2, 8, 8))
    cache[:, :5] = x


@pytest.mark.parametrize(
    "write",
    [_set, _copy, _narrow, _paged, _index_copy, _scatter, _index_put, _data, _set_data, _out],
)
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_a_cache_that_is_written_to(write: Any, dtype: torch.dtype) -> None:
    model = Cached(write).to(dtype)
    assert is_wide(model, tokens().to(dtype))
    assert broken(model, tokens().to(dtype)) == {}
    assert torch.equal(model.cache, torch.zeros(2, 7, 8, dtype=dtype))

    class Reads(Cached):
        def inside(self, x: Tensor) -> Tensor:
            return super().inside(functional.linear(x, self.held[0]))

    model = Reads(write).to(dtype)
    model.held = [model.b.weight]
    assert list(broken(model, tokens().to(dtype))) == ["b"]


def test_a_cache_that_grows() -> None:
    class Grows(Cached):
        def inside(self, x: Tensor) -> Tensor:
            self.cache = torch.cat([self.cache, x], 1)
            return x + self.cache.mean(1, keepdim=True)

    model = Grows(_set)
    before = model.cache
    assert is_wide(model, tokens())
    assert broken(model, tokens()) == {}
    assert model.cache is before
    assert torch.equal(before, torch.zeros(2, 7, 8))


def test_what_a_model_keeps_for_later_keeps_its_precision() -> None:
    """Such as the angles of rotary embeddings, which are computed at the first pass."""

    class Lazy(Base):
        angles: Tensor | None = None

        def inside(self, x: Tensor) -> Tensor:
            if self.angles is None:
                self.angles = torch.arange(5, dtype=x.dtype)[:, None].cos() * x.new_ones(8)
            return x * self.angles

    model = Lazy()
    assert is_wide(model, tokens())
    assert broken(model, tokens()) == {}
    assert model.angles is None
    assert model(tokens()).dtype == torch.float32


def test_what_a_model_shows_of_its_latest_pass_is_left_alone() -> None:
    class Shows(Base):
        latest: Tensor | None = None

        def inside(self, x: Tensor) -> Tensor:
            self.latest = x
            return x

    model = Shows()
    assert broken(model, tokens()) == {}
    assert model.latest is None


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
        result: Tensor = self.inner(x, x, x, attn_mask=mask)[0]
        return result


class Recurrent(nn.Module):
    def __init__(self, cls: Any) -> None:
        super().__init__()
        self.inner = cls(8, 8, batch_first=True, num_layers=2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x)[0]
        return result


class Packed(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]), batch_first=True)
        result, _ = nn.utils.rnn.pad_packed_sequence(self.inner(packed)[0], batch_first=True)
        return result


class Norms(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.LayerNorm(8), nn.BatchNorm1d(5), nn.GroupNorm(5, 5), nn.RMSNorm(8))


class Embeds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.bag = nn.Embedding(5, 8), nn.EmbeddingBag(5, 8)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(5)
        result: Tensor = x + self.table(places) + self.bag(places[None])
        return result


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(self.inner, x, use_reentrant=False)
        return result


class Masked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        scores = x @ x.mT
        mask = torch.full_like(scores, torch.finfo(scores.dtype).min).triu(1)
        return (scores + mask).softmax(-1, dtype=torch.float32).to(x.dtype) @ x


class Custom(nn.Module):
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
            return x * 2 * scale

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.Double.apply(x, self.scale)  # type: ignore[no-untyped-call]
        return result


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("turns", torch.polar(torch.ones(4), torch.arange(4.0)))

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (4, 2)).contiguous())
        return torch.view_as_real(pairs * self.turns).flatten(-2)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(x, inplace=True)
        x += self.shift
        x[..., 0] *= 2
        return x.mul_(self.shift).clamp_(max=3)


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.2)
    return nn.TransformerEncoder(layer, 2)


MIDDLES: dict[str, Callable[[], nn.Module]] = {
    "attention": Attention,
    "encoder": _encoder,
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "rnn": lambda: Recurrent(nn.RNN),
    "packed": lambda: Packed(nn.LSTM),
    "norms": Norms,
    "embeddings": Embeds,
    "checkpoint": Checkpointed,
    "masked": Masked,
    "autograd function": Custom,
    "in place": InPlace,
    "dropout": lambda: nn.Dropout(0.3),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", MIDDLES)
def test_modules_of_every_kind(name: str, dtype: torch.dtype, training: bool) -> None:
    model = Base(MIDDLES[name]).to(dtype).train(training)
    before = copy.deepcopy(model.state_dict())
    assert is_wide(model, tokens().to(dtype))
    assert broken(model, tokens().to(dtype)) == {}
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert {value.dtype for value in after.values() if value.is_floating_point()} == {dtype}
    # In wide precision the least thing is seen, which half precision would hide.
    stand_ins = factorized(model)
    with torch.no_grad():
        list(stand_ins.values())[1][1].bias.add_(3e-3 if dtype != torch.float32 else 3e-5)
    assert list(verify(model, stand_ins, Inputs((tokens().to(dtype),)))) == ["b"]


def test_angles_as_complex_numbers() -> None:
    model = Base(Complex)
    assert is_wide(model, tokens())
    assert broken(model, tokens()) == {}


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_the_encoders_fast_path_with_padding(dtype: torch.dtype) -> None:
    class Padded(Base):
        def forward(self, x: Tensor, padding: Tensor) -> Any:
            return self.b(self.middle(self.a(x), src_key_padding_mask=padding))

    model = Padded(_encoder).to(dtype).eval()
    padding = torch.arange(5) >= torch.tensor([[5], [3]])
    assert broken(model, tokens().to(dtype), padding) == {}

    class Reads(Padded):
        def forward(self, x: Tensor, padding: Tensor) -> Any:
            return super().forward(functional.linear(x, self.held[0]), padding)

    model = Reads(_encoder).to(dtype).eval()
    model.held = [model.b.weight]
    assert list(broken(model, tokens().to(dtype), padding)) == ["b"]


def test_autocast() -> None:
    class Mixed(Base):
        def forward(self, x: Tensor) -> Any:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x)

    assert broken(Mixed(), tokens()) == {}


def test_models_that_mode_and_dtype_do_not_fit_are_compared_as_they_are() -> None:
    class Scripted(Base):
        def inside(self, x: Tensor) -> Tensor:
            return torch.frombuffer(bytearray(x.numpy().tobytes()), dtype=torch.float32).view(
                2, 5, 8
            )

    model = Scripted()
    assert not is_wide(model, tokens())
    assert broken(model, tokens()) == {}


def test_an_attribute_that_cannot_be_copied_is_told() -> None:
    model = Base()
    model.stream = (i for i in ())
    with pytest.raises(UnsupportedError, match="cannot be copied"):
        broken(model, tokens())


def test_no_weight_but_those_that_were_replaced_is_held_twice() -> None:
    class Wide(Base):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def inside(self, x: Tensor) -> Tensor:
            seen.append(self.inner.weight.untyped_storage().data_ptr())
            return self.inner(x)

    seen: list[int] = []
    model = Wide()
    assert broken(model, tokens()) == {}
    assert set(seen) == {model.inner.weight.untyped_storage().data_ptr()}


class _Largest(TorchDispatchMode):
    """The most entries that were cast to float64 at once."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.dtype == torch.float64:
            self.entries = max(self.entries, result.numel())
        return result


class Large(nn.Module):
    """One weight that is large beside all else, used in some way."""

    def __init__(self, shape: tuple[int, ...], use: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weight, self.use = nn.Parameter(torch.randn(shape)), use
        self.bias = nn.Parameter(torch.randn(shape[0]))
        self.shift = nn.Parameter(torch.randn(shape[-1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


def _conv(dim: int) -> Callable[..., Tensor]:
    function = getattr(functional, f"conv{dim}d")
    return lambda m, x: function(x, m.weight, m.bias, 1, padding=1)


# By shape of the weight, what is done with it, and shape of the input.
LARGE: dict[str, tuple[tuple[int, ...], Callable[..., Tensor], tuple[int, ...]]] = {
    "linear": ((303, 8), lambda m, x: functional.linear(x, m.weight), (2, 3, 8)),
    "bias": ((303, 8), lambda m, x: functional.linear(x, m.weight, m.bias), (2, 3, 8)),
    "keywords": (
        (303, 8),
        lambda m, x: functional.linear(input=x, weight=m.weight, bias=m.bias),
        (8,),
    ),
    "lookup": (
        (303, 8),
        lambda m, x: functional.embedding(torch.arange(5), m.weight) + x,
        (5, 8),
    ),
    "@ transposed": ((303, 8), lambda m, x: x @ m.weight.T, (2, 3, 8)),
    "@": ((8, 303), lambda m, x: x @ m.weight, (2, 3, 8)),
    "vector @": ((8, 303), lambda m, x: x @ m.weight, (8,)),
    "@ on the left": ((303, 8), lambda m, x: m.weight @ x, (2, 8, 3)),
    "@ vector": ((303, 8), lambda m, x: m.weight @ x, (8,)),
    "matmul": ((8, 303), lambda m, x: torch.matmul(input=x, other=m.weight), (2, 3, 8)),
    "mm": ((8, 303), lambda m, x: torch.mm(x, mat2=m.weight), (3, 8)),
    "addmm": ((8, 303), lambda m, x: torch.addmm(m.shift, x, m.weight), (3, 8)),
    "addmm, scaled": (
        (8, 303),
        lambda m, x: torch.addmm(x[:, :1], x, m.weight, beta=0.5, alpha=2),
        (3, 8),
    ),
    "conv1d": ((303, 8, 1), _conv(1), (2, 8, 5)),
    "conv2d": ((303, 4, 2, 1), _conv(2), (2, 4, 3, 3)),
    "conv2d of no batch": ((303, 4, 2, 1), _conv(2), (4, 3, 3)),
    "conv3d": ((303, 2, 2, 2, 1), _conv(3), (2, 2, 1, 2, 2)),
}


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_weight_is_widened_in_parts(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "_BLOCK_BYTES", 8 * 100)
    shape, use, given = LARGE[name]
    model = Large(shape, use).to(dtype)
    x = torch.randn(given).to(dtype)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())
        with _Largest() as seen, verification._Wide():
            found = model(x)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert 0 < seen.entries < 100 + 8  # a block, and the rest of its last row


def test_a_sparse_matrix_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "_BLOCK_BYTES", 8)
    x, matrix = torch.randn(3, 8), torch.eye(8).to_sparse()
    with verification._Wide():
        assert torch.equal(torch.mm(x, matrix), x.double())


def test_grouped_convolutions_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "_BLOCK_BYTES", 8)
    x = torch.randn(2, 8, 5)
    for model in (nn.Conv1d(8, 12, 3, groups=4), nn.ConvTranspose1d(8, 12, 3)):
        with torch.no_grad():
            expected = copy.deepcopy(model).double()(x.double())
            with verification._Wide():
                found = model(x)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
