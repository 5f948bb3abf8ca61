"""Decompositions of the scoring that a plan uses: within their room, and to the same bits."""

from typing import Any

import pytest
import torch
from small_cnn import SHAPE, network, same
from torch import nn

import tdkit
from tdkit.compression import applying, kept, scoring
from tdkit.compression.kept import Kept
from tdkit.decompositions.svd import Svd
from tdkit.layers.spec import spec_of

OPTIONS: dict[str, Any] = {"methods": ["svd", "cp", "tucker"], "input_shape": SHAPE}


def prepared(side: int = 8) -> Any:
    layer = nn.Linear(side, side).double()
    return Svd().prepare(spec_of(layer), layer.weight.detach())


def test_what_fits_is_kept_until_it_is_taken() -> None:
    one, other, third = prepared(), prepared(), prepared(4)
    size = kept._bytes(one)
    assert size >= 2 * 8 * 64  # the weight and its basis, of eight bytes each
    room = Kept(size + 8 * 64)
    room.add("a", "svd", one)
    room.add("b", "svd", other)  # no room
    room.add("c", "svd", third)
    assert room.take("a", "tucker") is None
    assert room.take("b", "svd") is None
    assert room.take("a", "svd") is one
    assert room.take("a", "svd") is None
    assert room.take("c", "svd") is third


def test_tensors_are_counted_wherever_they_are_and_once() -> None:
    tensor = torch.zeros(100)
    found = prepared()
    before = kept._bytes(found)
    found.more = {"a": [tensor, tensor[:3]], "b": (tensor, found)}
    assert kept._bytes(found) == before + 400


@pytest.mark.parametrize("plenty", [True, False])
def test_a_layer_is_decomposed_once_where_there_is_room(monkeypatch, plenty) -> None:
    calls: list[tuple[str, str]] = []
    prepare = scoring.prepare

    def counted(layer: Any, weights: Any, name: str, *rest: Any) -> Any:
        calls.append((layer.name, name))
        return prepare(layer, weights, name, *rest)

    monkeypatch.setattr(scoring, "prepare", counted)
    monkeypatch.setattr(applying, "prepare", counted)
    monkeypatch.setattr(kept, "_SHARE", 1e-9 if plenty else 1e9)
    done = tdkit.compress(network(), 0.5, measure=False, **OPTIONS)
    moves = [(move.layer, move.method) for move in done.plan.moves]
    assert moves
    assert len(calls) == len(set(calls)) + (0 if plenty else len(moves))
    # A plan that is applied alone finds the very same factors.
    again = tdkit.apply(done.plan, network(), input_shape=SHAPE, measure=False)
    assert same(again.model, done.model)
