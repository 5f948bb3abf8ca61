"""Arguments of a forward pass in every nesting that models take."""

from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from tdkit.errors import UnsupportedError, UsageError
from tdkit.forward.inputs import Inputs, map_tensors, readings
from tdkit.layers.traced import TracedModel


@dataclass(frozen=True)
class Batch:
    x: Tensor
    scale: float = 2.0


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


class Base(nn.Module):
    """Two layers; ``take`` finds the rows (batch, 4) among the arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def rows(self, x: Tensor) -> Tensor:
        assert isinstance(x, Tensor)
        assert x.ndim == 2
        seen.append(len(x))
        result: Tensor = self.head(self.body(self.stem(x).relu()).relu())
        return result


seen: list[int] = []


class One(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.rows(x)


class Two(Base):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.rows(x + y)


class ListOf(Base):
    def forward(self, parts: list[Tensor]) -> Tensor:
        assert isinstance(parts, list)
        return self.rows(parts[0] + parts[1])


class KeywordOnly(Base):
    def forward(self, *, x: Tensor, mask: Tensor | None = None) -> Tensor:
        assert mask is not None
        return self.rows(x * mask)


class Mapping(Base):
    def forward(self, batch: dict[str, Any]) -> Tensor:
        assert type(batch) in (dict, OrderedDict)
        return self.rows(batch["x"])


class Nested(Base):
    def forward(self, batch: dict[str, Any], flag: bool = True) -> Tensor:
        assert flag
        return self.rows(batch["inner"]["parts"][1][0] * batch["scale"])


class Classed(Base):
    def forward(self, batch: Batch) -> Tensor:
        assert isinstance(batch, Batch)
        return self.rows(batch.x * batch.scale)


class Named(Base):
    def forward(self, pair: Pair) -> Tensor:
        assert isinstance(pair, Pair)
        return self.rows(pair.x + pair.y)


class Recurrent(Base):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4)

    def forward(self, packed: PackedSequence) -> Tensor:
        assert isinstance(packed, PackedSequence)
        return self.rows(self.lstm(packed)[1][0][-1])


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def packed(lengths: list[int]) -> PackedSequence:
    padded = noise(max(lengths), len(lengths), 4)
    return pack_padded_sequence(padded, torch.tensor(lengths), enforce_sorted=False)


# By name: the model, an example of so many samples, and whether one of them runs alone.
CASES: dict[str, tuple[type[Base], Callable[[int], Any], bool]] = {
    "a tensor": (One, lambda n: noise(n, 4), True),
    "a tuple of one": (One, lambda n: (noise(n, 4),), True),
    "several tensors": (Two, lambda n: (noise(n, 4), noise(n, 4)), True),
    "several in a list": (Two, lambda n: [noise(n, 4), noise(n, 4)], True),
    "a list that is one": (ListOf, lambda n: [noise(n, 4), noise(n, 4)], True),
    "a list in a tuple": (ListOf, lambda n: ([noise(n, 4), noise(n, 4)],), True),
    "keywords": (Two, lambda n: {"y": noise(n, 4), "x": noise(n, 4)}, True),
    "keywords only": (KeywordOnly, lambda n: {"x": noise(n, 4), "mask": noise(n, 4)}, True),
    "a mapping that is one": (Mapping, lambda n: {"x": noise(n, 4)}, True),
    "a mapping in a tuple": (Mapping, lambda n: ({"x": noise(n, 4)},), True),
    "an ordered one": (Mapping, lambda n: (OrderedDict(x=noise(n, 4)),), True),
    "nested": (
        Nested,
        lambda n: {"inner": {"parts": [None, (noise(n, 4), "text")]}, "scale": torch.tensor(2.0)},
        True,
    ),
    "nested beside another": (
        Nested,
        lambda n: ({"inner": {"parts": [1, (noise(n, 4),)]}, "scale": 2.0}, True),
        True,
    ),
    "a dataclass": (Classed, lambda n: Batch(noise(n, 4)), True),
    "a named tuple": (Named, lambda n: Pair(noise(n, 4), noise(n, 4)), True),
    "inputs": (Two, lambda n: Inputs((noise(n, 4),), {"y": noise(n, 4)}), True),
    "a packed sequence": (Recurrent, lambda n: packed([3, 5, 2, 4, 1][:n]), False),
}


@pytest.mark.parametrize("case", CASES)
def test_every_nesting_runs_and_is_cut_to_a_sample_where_that_runs(case: str) -> None:
    cls, example, alone = CASES[case]
    seen.clear()
    traced = TracedModel.of(cls(), example(3))
    assert traced.inputs is not None
    assert traced.sample is not None
    assert seen[-1] == (1 if alone else 3)
    body = next(layer for layer in traced.layers if layer.name == "body")
    assert body.macs == 36 * seen[-1]
    assert body.calls is not None
    assert [call.shape for call in body.calls] == [(seen[-1], 6)]
    assert bool(traced.notes) is not alone
    # The inputs are all of it.
    seen.clear()
    traced.inputs.run(traced.model)
    assert seen == [3]


@pytest.mark.parametrize("case", CASES)
def test_later_batches_are_read_in_the_form_of_the_example(case: str) -> None:
    cls, example, _ = CASES[case]
    traced = TracedModel.of(cls(), example(2))
    for size in (1, 2, 5):
        seen.clear()
        traced.read(example(size)).run(traced.model)
        assert seen == [size]


def test_a_single_tensor_is_read_whatever_the_form_of_the_example() -> None:
    traced = TracedModel.of(ListOf(), [noise(2, 4), noise(2, 4)])
    assert traced.form == 1
    x = noise(3, 4)
    assert traced.read(x).args == (x,)
    assert traced.read(Inputs((x,), {"y": 1})) == Inputs((x,), {"y": 1})


class Folds(Base):
    """Frames (batch, 2, 4) folded in pairs: a batch of one does not run."""

    def forward(self, x: Tensor) -> Tensor:
        return self.rows(x.reshape(-1, 2, 4).flatten(0, 1))


def test_what_does_not_run_on_one_sample_runs_on_all_and_says_so() -> None:
    traced = TracedModel.of(Folds(), noise(4, 4))
    assert traced.sample is not None
    assert traced.sample.batch == 4
    (note,) = traced.notes
    assert (
        note == "the model does not run on one sample of its inputs alone: MACs are those of all 4"
    )
    body = next(layer for layer in traced.layers if layer.name == "body")
    assert body.macs == 4 * 36
    assert TracedModel.of(One(), noise(4, 4)).notes == ()
    assert TracedModel.of(One(), noise(1, 4)).notes == ()
    assert TracedModel.of(One()).notes == ()


def test_what_runs_in_no_reading_says_what_was_wrong_with_the_first() -> None:
    with pytest.raises(UnsupportedError, match="missing 1 required positional argument: 'y'"):
        TracedModel.of(Two(), (noise(2, 4),))
    with pytest.raises(UnsupportedError, match=r"shape \(1, 4\), \(1, 4\)"):
        TracedModel.of(One(), [noise(2, 4), noise(2, 4)])


def test_readings() -> None:
    x, y = noise(2, 4), noise(2, 4)
    assert [r.args for r in readings(x)] == [(x,)]
    assert [r.args for r in readings([x, y])] == [(x, y), ([x, y],)]
    assert [(r.args, dict(r.kwargs)) for r in readings({"x": x})] == [
        ((), {"x": x}),
        (({"x": x},), {}),
    ]
    assert [r.args for r in readings({0: x})] == [({0: x},)]
    assert [r.args for r in readings(Pair(x, y))] == [(Pair(x, y),)]
    assert [r.args for r in readings(None)] == [(None,)]


def test_tensors_that_the_model_changes_are_copies() -> None:
    class Changes(Base):
        def forward(self, batch: dict[str, Any]) -> Tensor:
            batch["parts"][0].add_(1)
            batch["parts"].append(None)
            return self.rows(batch["parts"][0])

    x = noise(2, 4)
    before, value = x.clone(), {"parts": [x]}
    TracedModel.of(Changes(), (value,))
    assert torch.equal(x, before)
    assert len(value["parts"]) == 1


def test_what_has_no_batch_axis_is_handed_on_as_it_is() -> None:
    x, mask, scale = noise(3, 4), noise(5, 5), torch.tensor(2.0)
    given = Inputs(([x, scale], {"mask": mask, "deep": (x, "text")}), {"k": Batch(x)})
    assert given.batch == 3
    one = given.first_sample()
    (first, same), rest = one.args
    assert first.shape == (1, 4)
    assert same is scale
    assert rest["mask"] is mask
    assert rest["deep"][0].shape == (1, 4)
    assert rest["deep"][1] == "text"
    assert one.kwargs["k"].x.shape == (1, 4)
    assert [len(t) for t in one.two_samples().tensors if t.ndim] == [2, 5, 2, 2]
    assert given.shapes() == "(3, 4), (), (5, 5), (3, 4), (3, 4)"
    assert given.is_finite
    assert not Inputs((Batch(x / 0),)).is_finite
    assert Inputs(("text",)).batch is None


def test_the_batch_is_that_of_the_first_positional_tensor() -> None:
    given = Inputs((noise(3, 4),), {"mask": noise(5, 5)})
    assert [tuple(t.shape) for t in given.tensors] == [(3, 4), (5, 5)]
    assert given.batch == 3
    assert given.first_sample().kwargs["mask"].shape == (5, 5)
    assert Inputs((), {"mask": noise(5, 5), "x": noise(3, 4)}).batch == 5


def test_containers_keep_their_kind() -> None:
    x = noise(2)
    value = [OrderedDict(a=x), Pair(x, x), Batch(x), (x,), {"k": [x]}, {1, 2}, None]
    changed = map_tensors(value, lambda t: t + 1)
    assert [type(part) for part in changed] == [type(part) for part in value]
    assert torch.equal(changed[1].y, x + 1)
    assert torch.equal(changed[2].x, x + 1)
    assert changed[5] is value[5]


@dataclass(frozen=True)
class Counted:
    x: Tensor
    count: int = field(init=False, default=0)
    late: Tensor = field(init=False)


@dataclass
class Scaled:
    x: Tensor
    by: InitVar[float]

    def __post_init__(self, by: float) -> None:
        self.x = self.x * by


class Row(list):  # type: ignore[type-arg]
    def __init__(self, first: Any, *rest: Any) -> None:
        if isinstance(first, list):
            raise TypeError("one after the other")
        super().__init__([first, *rest])


class Both(tuple):  # type: ignore[type-arg]
    def __new__(cls, x: Any, y: Any) -> Any:
        return super().__new__(cls, (x, y))


def test_containers_whose_constructor_takes_something_else() -> None:
    x = noise(2)
    counted = Counted(x)
    object.__setattr__(counted, "count", 3)
    value = [defaultdict(list, x=x), Row(x, x), Scaled(x, 2.0), counted]
    lists, row, scaled, other = map_tensors(value, lambda t: t + 1)
    assert torch.equal(lists["x"], x + 1)
    assert lists["new"] == []
    assert set(value[0]) == {"x"}
    assert isinstance(row, Row)
    assert torch.equal(row[1], x + 1)
    assert torch.equal(scaled.x, 2 * x + 1)
    assert torch.equal(value[2].x, 2 * x)
    assert torch.equal(other.x, x + 1)
    assert other.count == 3
    assert not hasattr(other, "late")
    object.__setattr__(counted, "late", x)
    assert torch.equal(map_tensors(counted, lambda t: t + 1).late, x + 1)
    assert torch.equal(counted.late, x)


def test_what_cannot_be_made_again_is_refused() -> None:
    with pytest.raises(UsageError, match="the inputs hold a Both, of which no other") as caught:
        map_tensors(Both(noise(2), noise(2)), torch.clone)
    assert "a dict, a list" in str(caught.value.hint)


def test_a_lack_of_memory_is_told_as_such() -> None:
    class Large(dict):  # type: ignore[type-arg]
        def __init__(self, *_: Any) -> None:
            raise MemoryError

    with pytest.raises(MemoryError):
        map_tensors(Large.__new__(Large), torch.clone)
