"""Replayed predictions against plain full forward passes of the model with the layer replaced."""

import copy
import random
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from batchnorm import measure_statistics
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from tdkit.errors import UnsupportedError, UsageError
from tdkit.layers.inventory import Layer, replace_layer
from tdkit.metrics.features import ABSOLUTE, RELATIVE, Watched, feature_errors
from tdkit.study.replay import dense_predictions, predictions, replaced_predictions, session
from tdkit.study.replay.playing import Player


@pytest.fixture(autouse=True)
def _own_randomness() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def layer_of(model: nn.Module, name: str) -> Layer:
    target = model.get_submodule(name)
    paths = [n for n, m in model.named_modules(remove_duplicate=False) if m is target]
    aliases = tuple(path for path in paths if path != name)
    return Layer(name, aliases, type(target).__name__, None, target.get_parameter("weight").numel())


def perturbed(module: nn.Module, by: float) -> nn.Module:
    result = copy.deepcopy(module)
    with torch.no_grad():
        weight = result.get_parameter("weight")
        weight += by * weight.std() * torch.randn_like(weight)
    return result


def stand_ins(model: nn.Module, layer: Layer, number: int = 2) -> list[nn.Module]:
    target = model.get_submodule(layer.name)
    return [nn.Sequential(perturbed(target, 0.2 * (n + 1))) for n in range(number)]


def first_tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict | tuple):
        values = list(output.values()) if isinstance(output, dict) else list(output)
        return next(v for v in values if isinstance(v, Tensor) and v.ndim == 2)
    return first_tensor(vars(output))


@torch.no_grad()
def by_full_passes(
    model: nn.Module, layer: Layer, stand_in: nn.Module, batches: Sequence[Tensor]
) -> Tensor:
    """The logits, by the simplest code there is."""
    model = copy.deepcopy(model)
    replace_layer(model, layer, copy.deepcopy(stand_in))
    model.eval()
    return torch.cat([first_tensor(model(batch.clone())) for batch in batches])


def logits(
    model: nn.Module, layer: Layer, modules: Sequence[nn.Module], batches: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor | str]]:
    """What predictions() takes its classes from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "classes", lambda logits: logits)
        dense, found = predictions(model, layer, modules, batches)
        again = replaced_predictions(model, layer, modules, batches)
    for one, other in zip(found, again, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other
    return dense, found


def check(
    model: nn.Module,
    layer: Layer,
    modules: Sequence[nn.Module],
    batches: Sequence[Tensor],
    tolerance: float = 1e-5,
) -> None:
    """The logits of the dense model and of stand-ins, and so the classes."""
    dense, found = logits(model, layer, modules, batches)
    expected = by_full_passes(model, layer, model.get_submodule(layer.name), batches)
    assert torch.equal(dense.argmax(1), expected.argmax(1))
    for module, have in zip(modules, found, strict=True):
        want = by_full_passes(model, layer, module, batches)
        assert not torch.allclose(want, expected, rtol=1e-3), "this stand-in shows nothing"
        assert isinstance(have, Tensor)
        torch.testing.assert_close(have, want, rtol=tolerance, atol=tolerance * float(want.std()))
        assert torch.equal(have.argmax(1), want.argmax(1))


def images(*sizes: int, shape: Sequence[int] = (3, 32, 32)) -> list[Tensor]:
    return [torch.randn(size, *shape) for size in sizes]


@pytest.fixture
def convolutions(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The convolutions that were computed, in order."""
    calls: list[nn.Module] = []
    forward = nn.Conv2d.forward

    def counted(self: nn.Conv2d, x: Tensor) -> Tensor:
        calls.append(self)
        return forward(self, x)

    monkeypatch.setattr(nn.Conv2d, "forward", counted)
    return calls


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {}),
        ("mobilenet_v3_small", {}),
        ("densenet121", {}),
        ("googlenet", {"aux_logits": False, "init_weights": False, "transform_input": True}),
        ("shufflenet_v2_x0_5", {}),
    ],
)
def test_families_of_torchvision(
    name: str, options: dict[str, Any], convolutions: list[nn.Module]
) -> None:
    """Equal to full passes, and every convolution before the layer runs in dense passes only."""
    model = getattr(torchvision.models, name)(weights=None, num_classes=10, **options)
    batches = images(3, 2)
    # With random weights alone all images look alike at the end.
    measure_statistics(model, images(8))
    convolutions.clear()
    model.eval()(batches[0])
    order = list(convolutions)
    names = {module: name for name, module in model.named_modules()}
    before = len(order) // 2
    layer = layer_of(model, names[order[before]])
    modules = stand_ins(model, layer)
    convolutions.clear()
    predictions(model, layer, modules, batches)
    dense, checked = 1 + 1 + len(batches), 1
    replayed = len(modules) * len(batches) * (len(order) - before)
    assert len(convolutions) == (dense + checked) * len(order) + replayed
    check(model, layer, modules, batches)
    last = layer_of(model, names[order[-1]])
    check(model, last, stand_ins(model, last), batches)


def test_vision_transformer() -> None:
    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32,
        num_classes=10,
    )  # fmt: skip
    nn.init.normal_(model.heads.head.weight)
    for name in ("conv_proj", "encoder.layers.encoder_layer_1.mlp.0", "heads.head"):
        layer = layer_of(model, name)
        check(model, layer, stand_ins(model, layer), images(3, 2))


class Counted(nn.Linear):
    """Counts how often it is computed."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Residual(nn.Module):
    """As in a ResNet: a ReLU that works in place and is used twice, and an addition in place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = Counted(width, width), Counted(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.norm(self.one(x)))
        out = self.two(out)
        out += identity
        return self.relu(out)


@pytest.fixture
def stack() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), *(Residual(6) for _ in range(4)), nn.Linear(6, 5))


@pytest.mark.parametrize("name", ["0", "1.two", "3.one", "3.two", "5"])
def test_residual_blocks(stack: nn.Sequential, name: str) -> None:
    layer = layer_of(stack, name)
    check(stack, layer, stand_ins(stack, layer), images(4, 1, 3, shape=[4]))


@pytest.mark.parametrize("dense", [True, False])
def test_what_ran_before_the_layer_is_not_computed_again(stack: nn.Sequential, dense: bool) -> None:
    target = stack[3].two
    batches = images(4, 4, 4, shape=[4])
    modules = [nn.Sequential(perturbed(nn.Linear(6, 6), 1)) for _ in range(7)]
    measure = predictions if dense else replaced_predictions
    measure(stack, layer_of(stack, "3.two"), modules, batches)
    # The model runs once per batch; for the first one also to scout, to see whether it is
    # deterministic and to see whether replays are right.
    once = len(batches) + 3
    assert [stack[i].one.calls for i in (1, 2, 3)] == [once] * 3
    assert [stack[i].two.calls for i in (1, 2)] == [once] * 2
    # What comes after it runs for every stand-in; the dense model does once where it is wanted.
    saved = 0 if dense else len(batches) - 1
    assert stack[4].one.calls == once + 7 * len(batches) - saved
    assert target.calls == once - 1 - saved


class Model(nn.Module):
    """A stem, a layer, a head, and a forward of one's own."""

    def __init__(self, forward: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.stem, self.layer, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 5)
        self.counted = Counted(6, 6)
        self.relu = nn.ReLU(inplace=True)
        self.norm = nn.LayerNorm(6)
        for name, module in modules.items():
            self.add_module(name, module)
        self._forward = forward

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, x)


def shared_relu(m: Model, x: Tensor) -> Tensor:
    x = m.relu(m.norm(m.stem(x)))
    return m.head(m.relu(m.layer(m.relu(m.counted(x)))))


def shared_layer(m: Model, x: Tensor) -> Tensor:
    x = m.counted(m.stem(x))
    return m.head(m.layer(m.relu(m.counted(m.layer(m.counted(x))))))


def inputs_changed(m: Model, x: Tensor) -> Tensor:
    x *= 2
    y = m.stem(x)
    x.relu_()
    y[:, :2] += 1
    return m.head(m.layer(m.counted(y) + y) + y.mul_(m.stem(x)))


def changed_after(m: Model, x: Tensor) -> Tensor:
    y = m.stem(x)
    z = m.counted(y)
    out = m.layer(z.clone())
    z.add_(out)
    y += z
    return m.head(y)


def views_changed(m: Model, x: Tensor) -> Tensor:
    y = m.stem(x)
    z = m.identity(y)
    kept = m.flatten(y.view(-1, 2, 3))
    kept[:, 0] = 1
    z.relu_()
    return m.head(m.layer(m.counted(y) + z) + kept)


def branches(m: Model, x: Tensor) -> Tensor:
    a, b = m.stem(x), m.stem(x.flip(0)).flip(0)
    c = torch.cat([m.counted(a)[:, :3], m.norm(b)[:, 3:]], 1)
    return m.head(m.layer(c) * a.sigmoid() + functional.relu(b, inplace=True))


def containers(m: Model, x: Tensor) -> dict[str, Any]:
    values, table = m.pair(m.stem(x))
    values.append(m.counted(values[0]))
    table["sum"] = values[0] + values[2]
    table["b"].mul_(2)
    out = m.layer(table["sum"] + table["b"] + len(values))
    return {"loss": None, "features": out[..., None], "logits": m.head(out)}


def appended(m: Model, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    x = m.remember(seen, m.stem(x))
    x = m.remember(seen, m.counted(x))
    return m.head(m.layer(x) + sum(seen))


def by_attribute(m: Model, x: Tensor) -> Tensor:
    m.kept = None
    y = m.keep(m.stem(x), m)
    return m.head(m.layer(y) + m.kept)


def weight_read_before(m: Model, x: Tensor) -> Tensor:
    x = m.tied(m.stem(x))
    return m.head(m.layer(x))


def untracked_change(m: Model, x: Tensor) -> Tensor:
    y = m.stem(x)
    z = m.layer(y)
    y.data.add_(1)
    return m.head(z + y)


def depends_on_data(m: Model, x: Tensor) -> Tensor:
    y = m.stem(x)
    if x.mean() > 0:
        y = m.counted(m.norm(y))
    elif x.mean() < -2:
        y.mul_(2)
    z = m.layer(y)
    if x.mean() > 2:
        y += z
    return m.head(y * z)


def depends_on_stand_in(m: Model, x: Tensor) -> Tensor:
    y = m.stem(x)
    z = m.layer(m.norm(y))
    if z.std() > 1:
        y.mul_(2)
    return m.head(y + z)


def returns_nothing(m: Model, x: Tensor) -> Tensor:
    m.notes.last = None
    y = m.stem(x)
    m.notes(y)
    return m.head(m.layer(y) + m.notes.last)


def objects(m: Model, x: Tensor) -> Tensor:
    box = m.box(m.stem(x))
    box.value = box.value * 2
    return m.head(m.layer(box.value))


def odd_tensors(m: Model, x: Tensor) -> Tensor:
    y = m.stem(x)
    sparse, inference = m.to_sparse(y), m.inference(y)
    return m.head(m.layer(torch.sparse.mm(sparse, m.counted.weight)) + inference.clone())


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
        return [x * 2, x + 1], {"b": x - 1}


def order_changes(m: Model, x: Tensor) -> Tensor:
    m.passes = getattr(m, "passes", 0) + 1
    x = m.stem(x)
    if m.passes < 5:
        a, b = m.norm(x), m.counted(x)
    else:
        b, a = m.counted(x), m.norm(x)
    return m.head(m.layer(a - b))


@dataclass
class Box:
    value: Tensor


class Boxing(nn.Module):
    def forward(self, x: Tensor) -> Box:
        return Box(x * 2)


class ToSparse(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.to_sparse()


class Inference(nn.Module):
    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class Notes(nn.Module):
    last: Tensor | None

    def forward(self, x: Tensor) -> None:
        self.last = x * 2


class Remember(nn.Module):
    def forward(self, seen: list[Tensor], x: Tensor) -> Tensor:
        seen.append(x.tanh())
        return x * 2


class Keep(nn.Module):
    def forward(self, x: Tensor, model: nn.Module) -> Tensor:
        model.kept = x * 3
        return x * 2


class Tied(nn.Module):
    """Reads a layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.others: list[nn.Module] = []

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.others[0].layer.weight)


@pytest.fixture
def _planned_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison with a full pass is never what saves a prediction."""
    confirmed = session._Session._confirmed

    def checked(*args: Any) -> bool:
        assert confirmed(*args), "a replay differs from a full pass"
        return True

    monkeypatch.setattr(session._Session, "_confirmed", checked)


@pytest.fixture
def _no_fallback(_planned_right: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is it that a replay fails."""
    replayed = session._Session._replay

    def checked(self: Any, batch: Any, *args: Any) -> Tensor | None:
        could = batch.memory is not None
        logits = replayed(self, batch, *args)
        assert logits is not None or not could, "a replay failed"
        return logits

    monkeypatch.setattr(session._Session, "_replay", checked)


def model_of(forward: Callable[..., Any]) -> Model:
    model = Model(
        forward,
        identity=nn.Identity(),
        flatten=nn.Flatten(),
        pair=Pair(),
        remember=Remember(),
        keep=Keep(),
        box=Boxing(),
        to_sparse=ToSparse(),
        inference=Inference(),
        notes=Notes(),
        tied=(tied := Tied()),
    )
    tied.others.append(model)
    return model


def check_own(forward: Callable[..., Any], name: str) -> None:
    model = model_of(forward)
    batches = images(4, 3, 4, 2, 3, 4, shape=[4])
    for batch, shift in zip(batches, (-1, -3, 1, 3, 1, -1), strict=True):
        batch += shift - batch.mean()
    # Linear ones, so that the weight can be read.
    modules = [perturbed(model.get_submodule(name), by) for by in (0.5, 8, 1, 0.01)]
    check_all(model, layer_of(model, name), modules, batches)


@pytest.mark.usefixtures("_no_fallback")
@pytest.mark.parametrize(
    "forward",
    [
        shared_relu,
        shared_layer,
        inputs_changed,
        changed_after,
        views_changed,
        branches,
        containers,
        appended,
        by_attribute,
        depends_on_data,
        depends_on_stand_in,
        returns_nothing,
        objects,
        odd_tensors,
    ],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("name", ["layer", "head"])
def test_forwards_of_ones_own(forward: Callable[..., Any], name: str) -> None:
    check_own(forward, name)


@pytest.mark.usefixtures("_planned_right")
@pytest.mark.parametrize("name", ["layer", "head"])
def test_another_order_is_noticed(name: str) -> None:
    check_own(order_changes, name)


@pytest.mark.parametrize("forward", [weight_read_before, untracked_change])
@pytest.mark.parametrize("name", ["layer", "head"])
def test_what_cannot_be_seen_is_found_by_a_full_pass(
    forward: Callable[..., Any], name: str
) -> None:
    check_own(forward, name)


def check_all(
    model: nn.Module, layer: Layer, modules: Sequence[nn.Module], batches: Sequence[Tensor]
) -> None:
    """As check(), for models that copy.deepcopy would tear apart."""
    dense, found = logits(model, layer, modules, batches)
    target = model.get_submodule(layer.name)
    model.eval()
    for module, have in zip([target, *modules], [dense, *found], strict=True):
        replace_layer(model, layer, module)
        with torch.no_grad():
            want = torch.cat([first_tensor(model(batch.clone())) for batch in batches])
        replace_layer(model, layer, target)
        assert torch.equal(have, want)


@pytest.mark.parametrize(
    ("forward", "replayed"),
    [
        (shared_relu, True),
        (shared_layer, True),
        (inputs_changed, True),
        (changed_after, True),
        (views_changed, True),
        (branches, True),
        (containers, True),
        (appended, True),
        (by_attribute, True),
        (returns_nothing, True),
        (objects, True),
        (odd_tensors, True),
        (untracked_change, False),
        (weight_read_before, False),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_replays_are_used_where_they_are_right(forward: Callable[..., Any], replayed: bool) -> None:
    model = model_of(forward)
    stem = model.stem = Counted(4, 6)
    model(images(2, shape=[4])[0])
    per_pass, stem.calls = stem.calls, 0
    target = layer_of(model, "layer")
    predictions(
        model, target, [perturbed(model.layer, 1) for _ in range(5)], images(3, 3, shape=[4])
    )
    in_stand_ins = stem.calls - (2 + 2 + 1) * per_pass
    if forward is inputs_changed:
        assert in_stand_ins == 5 * 2  # its second call comes after the layer's first
    elif replayed:
        assert in_stand_ins == 0
    else:
        assert in_stand_ins == 5 * 2 * per_pass


class CountedReLU(nn.ReLU):
    """Works in place, and counts how often it does."""

    def __init__(self) -> None:
        super().__init__(inplace=True)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def changed_at_once(m: Model, x: Tensor) -> Tensor:
    return m.head(m.layer(m.counted(m.active(m.stem(x)))))


def read_before_the_change(m: Model, x: Tensor) -> Tensor:
    y = m.stem(x)
    before = y * 2
    return m.head(m.layer(m.counted(m.active(y)) + before))


def changed_twice(m: Model, x: Tensor) -> Tensor:
    y = m.active(m.stem(x))
    out = m.layer(m.counted(y) + y)
    return m.head(y.mul_(2) + out)


@pytest.mark.usefixtures("_no_fallback")
@pytest.mark.parametrize(
    ("forward", "runs"),
    [
        (changed_at_once, 0),
        (read_before_the_change, 1),
        (changed_twice, 1),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_changed_in_place_at_once_is_not_changed_again(
    forward: Callable[..., Any], runs: int
) -> None:
    active = CountedReLU()
    model = Model(forward, active=active)
    target = layer_of(model, "layer")
    batches = images(3, 3, shape=[4])
    modules = [perturbed(model.layer, 1) for _ in range(5)]
    check(model, target, modules, batches)
    active.calls = 0
    predictions(model, target, modules, batches)
    # Scouting, two dense passes of the first batch and one to check it, one of the second.
    assert active.calls - 5 == runs * 5 * 2


@pytest.mark.usefixtures("_no_fallback")
def test_changes_at_once_before_a_chain_and_in_it() -> None:
    active = CountedReLU()
    chain = nn.Sequential(nn.Linear(6, 6), active, nn.Linear(6, 6), nn.Linear(6, 6))
    model = Model(lambda m, x: m.head(m.chain(m.active(m.stem(x)))), active=active, chain=chain)
    target = layer_of(model, "chain.3")
    modules = stand_ins(model, target, 5)
    batches = images(3, 3, shape=[4])
    check(model, target, modules, batches)
    active.calls = 0
    predictions(model, target, modules, batches)
    assert active.calls == 5 * 2


@pytest.mark.parametrize(
    "usual",
    [
        lambda m, x: len(x) != 5,
        lambda m, x: isinstance(m.layer, nn.Linear),
        lambda m, x: isinstance(m.layer, nn.Sequential),
        lambda m, x: isinstance(m.layer, nn.Linear) or len(x) != 5,
        lambda m, x: isinstance(m.layer, nn.Sequential) or len(x) != 5,
    ],
)
def test_another_output_is_changed_at_once_now_and_then(
    usual: Callable[[Model, Tensor], bool],
) -> None:
    def forward(m: Model, x: Tensor) -> Tensor:
        other = x.repeat(1, 2)[:, :6] - 1
        y = m.stem(x)
        return m.head(m.layer(m.active(y if usual(m, x) else other)))

    model = Model(forward, active=CountedReLU())
    target = layer_of(model, "layer")
    modules = [nn.Sequential(perturbed(model.layer, 1)) for _ in range(3)]
    for sizes in ((4, 5, 4), (5, 4, 5), (4, 4, 5)):
        check(model, target, modules, images(*sizes, shape=[4]))


@pytest.mark.usefixtures("_no_fallback")
def test_a_chain_with_changes_in_place_keeps_what_its_next_call_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memories = []
    play = Player.__init__

    def noted(self: Any, steps: Any, memory: Any, *rest: Any) -> None:
        memories.append(len(memory))
        play(self, steps, memory, *rest)

    monkeypatch.setattr(Player, "__init__", noted)
    active = CountedReLU()
    model = nn.Sequential(
        *(nn.Linear(4, 4), active), *(nn.Linear(4, 4), active), *(nn.Linear(4, 4), active),
        *(nn.Linear(4, 4), nn.Linear(4, 3)),
    )  # fmt: skip
    batches = images(3, 3, shape=[4])
    for name, kept in (("2", 1), ("4", 1), ("6", 1), ("7", 1)):
        target = layer_of(model, name)
        modules = stand_ins(model, target, 5)
        active.calls = 0
        memories.clear()
        predictions(model, target, modules, batches)
        assert set(memories) == {kept}
        before, after = int(name) // 2, max(3 - int(name) // 2, 0)
        assert active.calls == 5 * before + (5 + 5 * 2) * after
        check(model, target, modules, batches)


def test_steps_that_no_longer_fit_are_found_anew() -> None:
    model = Model(depends_on_data)
    stem = model.stem = Counted(4, 6)
    batches = images(3, 3, 3, 3, shape=[4])
    for batch, shift in zip(batches, (-1, 1, 1, 1), strict=True):
        batch += shift - batch.mean()
    modules = [perturbed(model.layer, 1) for _ in range(5)]
    replaced_predictions(model, layer_of(model, "layer"), modules, batches)
    # The second batch: a stand-in's pass that does not fit, then two samples and a dense pass,
    # which do; in the others one full pass.
    assert stem.calls == 4 + 3 + 1 + 1


@dataclass
class Output:
    hidden: tuple[Tensor, ...]
    logits: Tensor


@pytest.mark.parametrize(
    "wrap",
    [
        lambda hidden, logits: Output((hidden,), logits),
        lambda hidden, logits: (hidden, logits),
        lambda hidden, logits: {"hidden": hidden, "logits": logits},
    ],
    ids=["dataclass", "tuple", "dict"],
)
def test_outputs_that_are_not_a_tensor(wrap: Callable[[Tensor, Tensor], Any]) -> None:
    def forward(m: Model, x: Tensor) -> Any:
        hidden = m.layer(m.stem(x))
        return wrap(hidden[None], m.head(hidden.tanh()))

    model, batches = Model(forward), images(4, 3, shape=[4])
    layer = layer_of(model, "layer")
    assert logits(model, layer, [], batches)[0].shape == (7, 5)
    _, (found,) = predictions(model, layer, stand_ins(model, layer, 1), batches)
    assert isinstance(found, Tensor)
    assert found.dtype == torch.int64


class Text(nn.Module):
    """An encoder whose layers read the weights of their parts themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.proj, self.head = nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(self.embed(x))
        x, _ = self.attention(x, self.proj(x), x, need_weights=False)
        return self.head(x.mean(1))


@pytest.mark.parametrize("name", ["embed", "proj", "head"])
def test_transformer_layers(name: str) -> None:
    model = Text()
    layer = layer_of(model, name)
    check(model, layer, stand_ins(model, layer), images(3, 2, shape=[7, 3]))


def test_the_fast_path_of_transformer_layers_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fast = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(
        torch, "_transformer_encoder_layer_fwd", lambda *args: calls.append(0) or fast(*args)
    )
    model = Text()
    layer = layer_of(model, "proj")
    predictions(model, layer, stand_ins(model, layer, 4), images(3, 2, shape=[7, 3]))
    assert len(calls) == 2 * (2 + 3)


def test_a_layer_that_is_read_and_never_called() -> None:
    model = Text()
    layer = layer_of(model, "encoder.layers.0.linear1")
    linear = perturbed(model.encoder.layers[0].linear1, 3)
    check(model, layer, [linear], images(3, 2, shape=[7, 3]))
    chain = nn.Sequential(copy.deepcopy(linear))
    _, found = predictions(model, layer, [chain, linear], images(3, shape=[7, 3]))
    assert found[0] == "AttributeError: 'Sequential' object has no attribute 'weight'"
    assert isinstance(found[1], Tensor)


def test_a_weight_that_is_read_by_a_function() -> None:
    model = Model(lambda m, x: m.head(functional.linear(m.stem(x), m.layer.weight)))
    stem = model.stem = Counted(4, 6)
    layer, batches = layer_of(model, "layer"), images(3, 3, 3, shape=[4])
    linear = perturbed(model.layer, 1)
    predictions(model, layer, [linear, linear], batches)
    # Looking for the layer's call in two samples and in all, twice; and whether it is random.
    assert stem.calls == 4 + 3 * (1 + 2)
    check_all(model, layer, [linear], batches)
    _, found = predictions(model, layer, [nn.Sequential(linear), linear], batches)
    assert found[0] == "AttributeError: 'Sequential' object has no attribute 'weight'"
    assert isinstance(found[1], Tensor)


@pytest.mark.usefixtures("_no_fallback")
def test_hooks_of_the_users_run() -> None:
    seen: dict[str, Tensor] = {}

    def forward(m: Model, x: Tensor) -> Tensor:
        seen.clear()
        y = m.block(m.stem(x))
        return m.head(m.layer(y) + seen["inner"])

    model = Model(forward, block=nn.Sequential(nn.Tanh(), nn.Linear(6, 6), nn.Tanh()))
    model.block[1].register_forward_hook(lambda m, args, output: seen.update(inner=output * 2))
    model.stem.register_forward_pre_hook(lambda m, args: (args[0] * 3,))
    layer = layer_of(model, "layer")
    check_all(model, layer, [perturbed(model.layer, 1)], images(3, 3, shape=[4]))


# Random programs: a graph of modules and functions over a growing list of values.

WIDTH = 4


class Program(nn.Module):
    """Runs steps (operation, operand, operand, module); operands count from the latest value."""

    def __init__(self, steps: Sequence[Any], pool: Sequence[nn.Module]) -> None:
        super().__init__()
        self.steps = steps
        self.pool = nn.ModuleList(pool)

    def forward(self, *given: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        values = list(given)
        for operation, a, b, module in self.steps:
            x, y = values[-1 - a % len(values)], values[-1 - b % len(values)]
            result = OPERATIONS[operation](x, y, self.pool[module % len(self.pool)])
            values += result if isinstance(result, tuple) else [result]
        return values[-1] if len(self.steps) % 2 else (values[-1], values[0])


def takes_one(module: nn.Module) -> Callable[..., Any]:
    return lambda x, y: module(x, y) if isinstance(module, Program) else module(x)


OPERATIONS: dict[str, Callable[[Tensor, Tensor, nn.Module], Any]] = {
    "call": lambda x, y, module: takes_one(module)(x, y),
    "call the other way": lambda x, y, module: takes_one(module)(y, x),
    "add": lambda x, y, module: x + y,
    "add in place": lambda x, y, module: x.add_(y.tanh()),
    "scale a view": lambda x, y, module: (x[:, :2].mul_(0.5), x)[1],
    "relu in place": lambda x, y, module: functional.leaky_relu_(x),
    "squash": lambda x, y, module: (x * y).tanh(),
    "view": lambda x, y, module: x.view(-1, 2, 2).flatten(1),
    "mix": lambda x, y, module: torch.cat([x[:, 2:], y[:, :2]], 1),
    "detach": lambda x, y, module: x.detach(),
    "set": lambda x, y, module: x.detach().copy_(y),
}

STEPS = st.lists(
    st.tuples(
        st.sampled_from([*OPERATIONS, *["call"] * 8]),
        st.integers(0, 3),
        st.integers(0, 3),
        st.integers(0, 11),
    ),
    min_size=2,
    max_size=8,
)


def linear() -> nn.Linear:
    layer = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
    nn.init.orthogonal_(layer.weight)
    return layer


@pytest.mark.usefixtures("_no_fallback")
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(STEPS, min_size=2, max_size=4), st.integers(0, 3), st.integers(0, 2**16))
def test_random_graphs(programs: list[Any], number: int, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        leaves = [linear() for _ in range(4)]
        pool: list[nn.Module] = [
            *leaves,
            nn.Identity(),
            nn.LeakyReLU(inplace=True),
            nn.Sequential(linear(), nn.LeakyReLU(inplace=True), nn.Dropout(0.5), linear()),
            nn.Sequential(nn.Identity(), nn.Tanh(), leaves[0]),
            nn.Sequential(leaves[1], nn.LeakyReLU(inplace=True), leaves[2], nn.Dropout(0.5)),
        ]
        for steps in programs:
            pool.append(Program(steps, list(pool)))
        model = nn.Sequential(linear(), pool[-1], Last())
        layer = layer_of(model, next(n for n, m in model.named_modules() if m is leaves[number]))
        batches = [torch.randn(size, WIDTH, dtype=torch.float64) for size in (3, 2)]
        modules = [nn.Sequential(perturbed(leaves[number], by)) for by in (0.5, 1)]
        check_all(model, layer, modules, batches)


class Last(nn.Module):
    def forward(self, values: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        return values if isinstance(values, Tensor) else values[0] - 2 * values[1]


# What is refused, and what fails.


class Counter(nn.Module):
    def __init__(self, kept: str) -> None:
        super().__init__()
        self.register_buffer("buffer", torch.zeros(()))
        self.number, self.kept = 0, kept

    def forward(self, x: Tensor) -> Tensor:
        self.number += 1
        self.buffer += 1
        return x * (self.number if self.kept == "attribute" else self.buffer)


@pytest.mark.parametrize(
    "noise",
    [
        lambda x: functional.dropout(x, 0.5, training=True),
        lambda x: x + torch.randn_like(x),
        lambda x: x + random.random(),
        lambda x: x + float(np.random.rand()),
        Counter("attribute"),
        Counter("buffer"),
    ],
    ids=["dropout", "torch", "python", "numpy", "attribute", "buffer"],
)
@pytest.mark.parametrize("place", ["before", "after"])
def test_models_that_are_not_deterministic_are_refused(
    noise: Callable[[Tensor], Tensor], place: str
) -> None:
    def forward(m: Model, x: Tensor) -> Tensor:
        x = noise(m.stem(x)) if place == "before" else m.stem(x)
        x = m.layer(x)
        return m.head(noise(x) if place == "after" else x)

    model, batches = Model(forward), images(4, shape=[4])
    layer = layer_of(model, "layer")
    for attempt in (
        lambda: predictions(model, layer, stand_ins(model, layer), batches),
        lambda: dense_predictions(model, batches),
    ):
        with pytest.raises(UnsupportedError, match="not deterministic in eval mode"):
            attempt()


def test_dropout_and_batchnorm_are_in_eval_mode() -> None:
    model = Model(
        lambda m, x: m.head(m.drop(m.layer(m.bn(m.stem(x))))),
        drop=nn.Dropout(0.5),
        bn=nn.BatchNorm1d(6),
    ).train()
    layer = layer_of(model, "layer")
    modules = [nn.Sequential(perturbed(model.layer, 1), nn.Dropout(0.9)).train()]
    check(model, layer, modules, images(4, 1, shape=[4]))
    assert modules[0].training
    assert modules[0][1].training


def test_a_stand_in_that_fails_leaves_the_others_alone(stack: nn.Sequential) -> None:
    layer, batches = layer_of(stack, "2.one"), images(4, 3, shape=[4])
    good = stand_ins(stack, layer)
    wrong = nn.Sequential(nn.Linear(7, 6))
    late = nn.Sequential(FailsOn(3))
    _, found = predictions(stack, layer, [wrong, good[0], late, good[1]], batches)
    assert str(found[0]).startswith("RuntimeError: mat1 and mat2 shapes cannot be multiplied")
    assert found[2] == "ValueError: no batches of 3"
    want = predictions(stack, layer, good, batches)[1]
    assert torch.equal(found[1], want[0])
    assert torch.equal(found[3], want[1])


class FailsOn(nn.Linear):
    def __init__(self, size: int) -> None:
        super().__init__(6, 6)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == self.size:
            raise ValueError(f"no batches of {self.size}")
        return super().forward(x)


def test_out_of_memory_has_its_own_reason(stack: nn.Sequential) -> None:
    class Greedy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("Tried to allocate 80 GiB")

    layer = layer_of(stack, "2.one")
    _, found = predictions(stack, layer, [Greedy()], images(4, shape=[4]))
    assert found == ["out of memory: Tried to allocate 80 GiB"]


def test_nan_is_no_class(stack: nn.Sequential) -> None:
    layer, batches = layer_of(stack, "5"), images(4, shape=[4])
    broken = perturbed(stack[5], 0)
    with torch.no_grad():
        broken.bias[2] = float("nan")
    _, found = predictions(stack, layer, [broken], batches)
    assert torch.equal(found[0], torch.full((4,), -1))


def test_no_images_no_predictions(stack: nn.Sequential) -> None:
    with pytest.raises(UsageError, match="no images to measure on"):
        predictions(stack, layer_of(stack, "2.one"), [], [])


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda m, x: m.head(m.layer(m.stem(x))).sum(1), r"no output of shape \(4, classes\)"),
        (lambda m, x: m.layer(x), r"does not run on images of shape \(4,\): mat1 and mat2"),
    ],
)
def test_models_without_logits(forward: Callable[..., Any], message: str) -> None:
    model = Model(forward)
    with pytest.raises(UnsupportedError, match=message):
        predictions(model, layer_of(model, "layer"), [], images(4, shape=[4]))


# Nothing is left behind.


def attributes(model: nn.Module) -> dict[str, dict[str, Any]]:
    return {
        name: {key: value for key, value in vars(module).items() if key != "calls"}
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("fails", ["not", "in the model", "in the data", "in watch"])
def test_the_model_is_as_before(stack: nn.Sequential, fails: str) -> None:
    stack.train()
    stack[1].norm.eval()
    own = stack[2].relu.forward
    stack[2].relu.forward = lambda x: own(x)
    kept = vars(stack[2].relu)["forward"]
    before = attributes(stack)
    children = {name: dict(m._modules) for name, m in stack.named_modules()}
    state, rng = copy.deepcopy(stack.state_dict()), torch.get_rng_state()
    layer = layer_of(stack, "3.one")
    modules = stand_ins(stack, layer)
    data = images(4, 2, shape=[4])
    copies = [batch.clone() for batch in data]
    torch.set_rng_state(rng)
    number, array = random.getstate(), np.random.get_state()[1].copy()

    def batches() -> Iterator[Tensor]:
        yield from data
        if fails == "in the data":
            raise ValueError("no more data")
        yield torch.zeros(2, 4 + (fails == "in the model"))

    def watch(*_: Any) -> None:
        if fails == "in watch":
            raise ValueError("not to be watched")

    if fails == "not":
        predictions(stack, layer, modules, batches(), watch=watch)
    else:
        with pytest.raises((ValueError, UnsupportedError)):
            predictions(stack, layer, modules, batches(), watch=watch)
    assert attributes(stack) == before
    assert {name: dict(m._modules) for name, m in stack.named_modules()} == children
    assert vars(stack[2].relu)["forward"] is kept
    assert not any("forward" in vars(m) for module in modules for m in module.modules())
    assert all(torch.equal(value, state[key]) for key, value in stack.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(data, copies, strict=True))
    assert torch.equal(torch.get_rng_state(), rng)
    assert random.getstate() == number
    assert np.array_equal(np.random.get_state()[1], array)


def test_features_are_seen_in_the_dense_pass(stack: nn.Sequential) -> None:
    layer, batches = layer_of(stack, "3.two"), images(4, 3, 3, shape=[4])
    modules = stand_ins(stack, layer)
    watched = Watched("3.two", modules, [RELATIVE, ABSOLUTE])
    predictions(stack, layer, modules, batches, watch=watched)
    expected = feature_errors(stack, {"3.two": modules}, batches, [RELATIVE, ABSOLUTE])
    assert watched.samples == 10
    assert watched.means() == expected["3.two"]


class Recorded(nn.Linear):
    """Tells how many of the outputs of all its instances are still in memory."""

    alive: list[weakref.ref[Tensor]]

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        self.alive.append(weakref.ref(output))
        return output


def recorded(alive: list[weakref.ref[Tensor]]) -> Recorded:
    result = Recorded(4, 4)
    result.alive = alive
    return result


class Hungry(nn.Linear):
    """Runs out of memory when more than so many outputs of recorded layers are in it."""

    def __init__(self, alive: list[weakref.ref[Tensor]], room: int) -> None:
        super().__init__(4, 4)
        self.alive, self.room = alive, room
        self.counts: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.counts.append(sum(ref() is not None for ref in self.alive))
        if self.counts[-1] > self.room:
            raise torch.OutOfMemoryError("too many")
        return super().forward(x)


def test_memory_does_not_grow_with_the_stand_ins() -> None:
    """Of a chain one output is remembered; and nothing of one stand-in's pass in the next one."""
    alive: list[weakref.ref[Tensor]] = []
    chain = [recorded(alive) for _ in range(5)]
    model = nn.Sequential(*chain, nn.Linear(4, 4), nn.Linear(4, 4))
    modules = [Hungry(alive, 99) for _ in range(5)]
    predictions(model, layer_of(model, "5"), modules, images(3, 3, shape=[4]))
    # The second pass of the last one is the full one that its replay is compared with.
    assert [module.counts for module in modules] == [[1, 1]] * 4 + [[1, 2, 1]]


def test_what_is_remembered_gives_way_to_a_stand_in() -> None:
    alive: list[weakref.ref[Tensor]] = []
    chain = nn.ModuleList(recorded(alive) for _ in range(5))

    def forward(m: Model, x: Tensor) -> Tensor:
        for part in m.chain:
            x = part(x)
        return m.head(m.layer(x))

    model = Model(forward, chain=chain, layer=nn.Linear(4, 4), head=nn.Linear(4, 4))
    modules = [Hungry(alive, room) for room in (5, 2)]
    _, found = predictions(model, layer_of(model, "layer"), modules, images(3, shape=[4]))
    assert [module.counts for module in modules] == [[5, 1], [5, 1]]
    assert all(isinstance(each, Tensor) for each in found)
