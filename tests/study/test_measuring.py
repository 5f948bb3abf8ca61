"""Measurements against the same thing done by hand, one candidate at a time."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tdkit.compression.scoring import candidate_of, factorize, prepare
from tdkit.datasets.base import Dataset, TensorSplit
from tdkit.decompositions.base import Decomposition, Prepared, Rank
from tdkit.decompositions.cp import Cp
from tdkit.decompositions.tt import TensorTrain
from tdkit.decompositions.tucker import Tucker
from tdkit.errors import UnsupportedError, UsageError
from tdkit.forward.inputs import Inputs
from tdkit.layers.counting import model_parameters
from tdkit.layers.evidence import NO_EVIDENCE, Evidence
from tdkit.layers.inventory import find_layers, replace_layer
from tdkit.layers.spec import LayerSpec
from tdkit.layers.weights import ModuleWeights
from tdkit.metrics import features, weights
from tdkit.metrics.features import feature_errors
from tdkit.study import layouts, measuring
from tdkit.study.measuring import baseline, measure
from tdkit.study.recipe import ImagesRecipe, StudyRecipe
from tdkit.study.records import Measurement, Trial
from tdkit.study.workspace import Workspace

METRICS = (
    weights.RELATIVE,
    weights.SCALED,
    weights.ABSOLUTE,
    features.RELATIVE,
    features.SCALED,
    features.ABSOLUTE,
)
FEATURES = METRICS[3:]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.conv = nn.Conv2d(6, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.next = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8 * 49, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv(self.relu(self.stem(x)))))
        x = x + self.relu(self.next(x))
        return self.head(x.flatten(1))


def split(count: int, seed: int, labelled: bool = True) -> TensorSplit:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, 1, 7, 7), generator=generator).byte()
    labels = torch.randint(4, (count,), generator=generator) if labelled else None
    return TensorSplit(pixels, labels, (0.5,), (0.25,))


def opened(
    model: nn.Module | None = None, *, dtype: torch.dtype = torch.float32, **changes: Any
) -> Workspace:
    """A workspace; the changes are made to it or to its recipe."""
    if model is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Net()
    model = model.eval().to(dtype)
    recipe = StudyRecipe(
        title="A test",
        model="net",
        data="noise",
        methods=("cp", "tucker", "tt"),
        keeps=(0.5, 0.25),
        evaluation=ImagesRecipe("test", batch_size=16),
        features=ImagesRecipe("train", images=10, batch_size=4),
    )
    workspace = Workspace(
        model=model,
        layers=tuple(find_layers(model, inputs=Inputs((torch.zeros(1, 1, 7, 7, dtype=dtype),)))),
        methods={"cp": Cp(sweeps=5, start="uniform"), "tucker": Tucker(), "tt": TensorTrain()},
        metrics=METRICS,
        dataset=Dataset(
            "noise", tuple("abcd"), (1, 7, 7), (0.5,), (0.25,), "", split(30, 1), None, split(50, 2)
        ),
        recipe=recipe,
        device=torch.device("cpu"),
    )
    mine = {key: changes.pop(key) for key in list(changes) if hasattr(workspace, key)}
    return replace(workspace, **mine, recipe=replace(recipe, **changes))


TRIALS = [
    Trial("conv", "cp", 0.5, 12, 0, 0),
    Trial("conv", "cp", 0.5, 12, 1, 1),
    Trial("conv", "cp", 0.25, 4, 0, 0),
    Trial("conv", "tucker", 0.5, (5, 4), 0, 0),
    Trial("conv", "tucker", 0.25, (3, 2), 0, 0),
    Trial("conv", "tt", 0.5, (5, 6, 5), 0, 0),
]


class Watchful(Net):
    """Notes how many modes of torch's functions it runs in."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: set[int] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.modes.add(torch._C._len_torch_function_stack())
        return super().forward(x)


def test_wide_convolutions_run_in_their_faster_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "_WIDE", 500)
    model = Watchful()
    workspace = opened(model)
    # As a workspace is opened; "next" is wide and "conv" is not.
    layouts.set_layouts(model, Inputs((torch.zeros(1, 1, 7, 7),)))
    model.modes.clear()
    baseline(workspace)
    assert model.modes == {1}
    measure(workspace, TRIALS[:1])
    assert model.modes == {1}
    assert torch._C._len_torch_function_stack() == 0


def by_hand(workspace: Workspace, trial: Trial) -> dict[str, Any]:
    layer = next(each for each in workspace.layers if each.name == trial.layer)
    module = workspace.model.get_submodule(trial.layer)
    weights, method = ModuleWeights(workspace.model), workspace.methods[trial.method]
    prepared = prepare(layer, weights, trial.method, method, Evidence(trial.seed))
    assert prepared is not None
    stand_in = factorize(layer, weights, prepared, trial.rank)
    weight = module.get_parameter("weight").detach().double()
    gap = float(torch.linalg.vector_norm(weight - prepared.reconstruct(trial.rank)))
    norm = float(torch.linalg.vector_norm(weight))
    errors = {
        "relative-weights": gap / norm,
        "scaled-weights": gap / weight.numel(),
        "absolute-weights": gap,
    }
    assert workspace.dataset.train is not None
    assert workspace.dataset.test is not None
    dtype = next(workspace.model.parameters()).dtype
    batches = [x.to(dtype) for x, _ in workspace.dataset.train.batches(7, limit=10)]
    errors |= feature_errors(workspace.model, {trial.layer: [stand_in]}, batches, FEATURES)[
        trial.layer
    ][0]
    model = copy.deepcopy(workspace.model)
    replace_layer(model, layer, stand_in)
    with torch.no_grad():
        pairs = [(model(x.to(dtype)), y) for x, y in workspace.dataset.test.batches(50)]
    right = torch.cat([logits.argmax(1) == labels for logits, labels in pairs]).numpy()
    return {
        "params": (layer.parameters, model_parameters(stand_in)),
        "errors": errors,
        "right": right,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_one_candidate_at_a_time(dtype: torch.dtype) -> None:
    workspace = opened(dtype=dtype)
    found = measure(workspace, TRIALS)
    assert [m.trial for m in found] == TRIALS
    rights = set()
    for measurement in found:
        want = by_hand(workspace, measurement.trial)
        assert measurement.failure is None
        assert (measurement.params_before, measurement.params_after) == want["params"]
        assert measurement.errors == pytest.approx(want["errors"], rel=1e-5)
        assert measurement.images == 50
        assert np.array_equal(measurement.bits, want["right"])
        assert measurement.performance_error == pytest.approx(1 - want["right"].mean())
        assert measurement.change == {}
        assert measurement.seconds > 0
        rights.add(measurement.correct)
    assert len(rights) > 3, "the candidates hardly differ"


def test_costs_are_those_of_candidates() -> None:
    workspace = opened()
    trial = TRIALS[3]
    layer = next(each for each in workspace.layers if each.name == "conv")
    weights = ModuleWeights(workspace.model)
    prepared = prepare(layer, weights, "tucker", Tucker(), Evidence(0))
    assert prepared is not None
    candidate = candidate_of(layer, "tucker", prepared, trial.rank, METRICS)
    (found,) = measure(workspace, [trial])
    macs = candidate.costs["macs"]
    assert (found.macs_before, found.macs_after) == (macs.before, macs.after)
    assert found.macs_before == 49 * 6 * 8 * 9


def without_time(measurements: Sequence[Measurement]) -> list[Measurement]:
    return [replace(measurement, seconds=0) for measurement in measurements]


def test_grouping_and_order_change_nothing() -> None:
    workspace = opened()
    together = without_time(measure(workspace, TRIALS))
    alone = [m for trial in TRIALS for m in without_time(measure(opened(), [trial]))]
    backwards = without_time(measure(workspace, TRIALS[::-1]))[::-1]
    assert alone == together
    assert backwards == together
    assert measure(workspace, []) == []


def test_runs_of_a_random_method_differ() -> None:
    first, second, *_ = measure(opened(), TRIALS)
    assert first.errors["relative-weights"] != second.errors["relative-weights"]


def test_two_keeps_of_one_rank_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    monkeypatch.setattr(
        measuring, "factorize", lambda *args: built.append(args[-1]) or factorize(*args)
    )
    twin = replace(TRIALS[3], keep=0.45)
    first, second = measure(opened(), [TRIALS[3], twin])
    assert first == replace(second, trial=TRIALS[3])
    assert second.trial == twin
    assert built == [TRIALS[3].rank]


def test_same_images_share_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    batches = TensorSplit.batches

    def counted(self: TensorSplit, *args: Any, **kwargs: Any) -> Any:
        passes.append(len(self))
        return batches(self, *args, **kwargs)

    monkeypatch.setattr(TensorSplit, "batches", counted)
    # Another batch size and a limit beyond the end are the same images all the same.
    shared = measure(opened(features=ImagesRecipe("test", 50, batch_size=8)), TRIALS)
    assert passes == [50]
    apart = measure(opened(features=ImagesRecipe("train", 30)), TRIALS[:1])
    assert sorted(passes[1:]) == [30, 50]
    workspace = opened(features=ImagesRecipe("test", 49))
    fewer = measure(workspace, TRIALS[:1])
    assert passes[3:] == [50, 50]
    stand_in_errors = [m.errors["relative-features"] for m in (shared[0], apart[0], fewer[0])]
    assert len(set(stand_in_errors)) == 3
    # The shared pass finds what a pass of its own finds.
    dataset = replace(workspace.dataset, train=workspace.dataset.test)
    own = measure(opened(dataset=dataset, features=ImagesRecipe("train", batch_size=9)), TRIALS)
    for one, other in zip(shared, own, strict=True):
        assert one.errors == pytest.approx(other.errors, rel=1e-6)
        assert one.correct == other.correct


def test_without_feature_metrics_the_feature_images_are_not_needed() -> None:
    workspace = opened(metrics=METRICS[:3])
    workspace = replace(workspace, dataset=replace(workspace.dataset, train=None))
    (found,) = measure(workspace, TRIALS[:1])
    assert set(found.errors) == {"relative-weights", "scaled-weights", "absolute-weights"}


def test_baseline() -> None:
    workspace = opened()
    test = workspace.dataset.test
    assert test is not None
    images, labels = next(test.batches(50))
    with torch.no_grad():
        right = workspace.model(images).argmax(1) == labels
    found = baseline(workspace)
    assert np.array_equal(found.bits, right.numpy())
    assert (found.images, found.labelled) == (50, True)
    assert found.params == sum(p.numel() for p in workspace.model.parameters())
    assert found.macs == 49 * (9 * (6 + 6 * 8 + 8 * 8) + 8 * 4)
    assert found.layers == (("stem", 60), ("conv", 440), ("next", 584), ("head", 1572))


def test_baseline_of_fewer_images_and_unknown_macs() -> None:
    workspace = opened(evaluation=ImagesRecipe("test", images=7, batch_size=3))
    layers = tuple(replace(layer, calls=None) for layer in workspace.layers)
    found = baseline(replace(workspace, layers=layers))
    assert (found.images, found.macs) == (7, None)
    assert len(measure(workspace, TRIALS[:1])[0].bits) == 7


def test_without_labels_agreement_with_the_dense_model_counts() -> None:
    labelled = opened()
    test = labelled.dataset.test
    assert isinstance(test, TensorSplit)
    images, _ = next(test.batches(50))
    with torch.no_grad():
        dense = labelled.model(images).argmax(1)
    blank, known = (
        opened(dataset=replace(labelled.dataset, test=replace(test, labels=labels)))
        for labels in (None, dense)
    )
    base = baseline(blank)
    assert not base.labelled
    assert base.bits.all()
    assert [m.correct for m in measure(blank, TRIALS)] == [
        m.correct for m in measure(known, TRIALS)
    ]
    assert not measure(blank, TRIALS[-1:])[0].bits.all()


# What fails is a result too.


class Odd(Decomposition):
    """A method that does something wrong at some rank."""

    def __init__(self, wrong: Callable[[Tensor], Tensor] = lambda w: w) -> None:
        self.wrong = wrong

    def rank(self, layer: LayerSpec, keep: float) -> int:
        return 1

    def max_rank(self, layer: LayerSpec) -> int:
        return 9

    def stages(self, layer: LayerSpec, rank: Rank) -> Sequence[LayerSpec]:
        return (layer,)

    def decompose(
        self, layer: LayerSpec, weight: Tensor, rank: Rank, generator: torch.Generator
    ) -> Sequence[Tensor]:
        if rank == 1:
            return (weight * 0.9,)
        return (self.wrong(weight),)


def fails(error: Exception) -> Callable[[Tensor], Tensor]:
    def wrong(_: Tensor) -> Tensor:
        raise error

    return wrong


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (fails(ValueError("no such rank")), "odd fails on the layer 'conv': ValueError: no such"),
        (lambda w: w * float("nan"), "returned NaN or infinite factors"),
        (lambda w: w / 0, "returned NaN or infinite factors"),
        (lambda w: w * 1e300, "the factors overflow torch.float32"),
        (lambda w: w[:1], "returned factors of shapes"),
        (fails(torch.OutOfMemoryError("too much")), "out of memory: too much"),
        (fails(MemoryError()), "out of memory: MemoryError"),
    ],
)
def test_a_method_that_fails(wrong: Callable[[Tensor], Tensor], reason: str) -> None:
    workspace = opened()
    workspace = replace(workspace, methods={**workspace.methods, "odd": Odd(wrong)})
    trials = [TRIALS[0], *(Trial("conv", "odd", 0.5, rank, 0, 0) for rank in (2, 1)), TRIALS[4]]
    found = measure(workspace, trials)
    assert [m.trial for m in found] == trials
    assert reason in str(found[1].failure)
    assert found[1] == Measurement(trials[1], failure=found[1].failure)
    assert math.isnan(found[1].performance_error)
    assert found[2].failure is None
    assert without_time([found[0], found[3]]) == without_time(measure(opened(), trials[::3]))


def test_a_method_that_cannot_prepare() -> None:
    class Unprepared(Odd):
        def prepare(
            self, layer: LayerSpec, weight: Tensor, evidence: Evidence | int = NO_EVIDENCE
        ) -> Prepared:
            raise RuntimeError("not today")

    class Unfit(Odd):
        def supports(self, layer: LayerSpec) -> str | None:
            return "never"

    workspace = replace(opened(), methods={"odd": Unprepared(), "unfit": Unfit(), "cp": Cp()})
    odd, unfit = (Trial("conv", name, 0.5, 1, 0, 0) for name in ("odd", "unfit"))
    found = measure(workspace, [odd, unfit, TRIALS[0]])
    assert found[0].failure == "odd fails on the layer 'conv': RuntimeError: not today"
    assert found[1].failure == "unfit does not support the layer 'conv'"
    assert found[2].failure is None


def test_a_rank_that_does_not_fit() -> None:
    found = measure(opened(), [replace(TRIALS[0], rank=0), TRIALS[1]])
    assert "rank 0 does not fit" in str(found[0].failure)
    assert found[1].failure is None


class Narrow(nn.Sequential):
    """Stages that run for ever so few samples."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 12:
            raise torch.OutOfMemoryError("Tried to allocate 1 GiB")
        output: Tensor = super().forward(x)
        return output


@pytest.mark.parametrize("images", [ImagesRecipe("train", batch_size=4), ImagesRecipe("test")])
@pytest.mark.parametrize("small", [4, 16])
def test_a_stand_in_that_fails(
    images: ImagesRecipe, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the pass for the predictions, in that for features, or in that for both."""

    def factorized(*args: Any) -> nn.Sequential:
        return Narrow(*factorize(*args)) if args[-1] == 4 else factorize(*args)

    monkeypatch.setattr(measuring, "factorize", factorized)
    recipes = {"features": images, "evaluation": ImagesRecipe("test", batch_size=small)}
    if images.split == "train" and small == 4:
        recipes["features"] = ImagesRecipe("train")
    found = measure(opened(**recipes), TRIALS)
    assert found[2].failure == "out of memory: Tried to allocate 1 GiB" or (
        images.split == "test" and small == 4 and found[2].failure is None
    )
    monkeypatch.undo()
    others = [trial for trial in TRIALS if trial is not TRIALS[2]]
    expected = measure(opened(**recipes), others)
    assert without_time(found[:2] + found[3:]) == without_time(expected)


@pytest.mark.parametrize(("split", "passes"), [("test", 0), ("train", 1)])
def test_features_that_are_not_finite_are_measured_once(
    split: str, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are the dense layer's, whatever stands in for it."""
    calls: list[int] = []

    def counting(*args: Any) -> Any:
        calls.append(1)
        return feature_errors(*args)

    monkeypatch.setattr(measuring, "feature_errors", counting)
    images = ImagesRecipe(split, batch_size=16)
    workspace = opened(features=images, evaluation=ImagesRecipe("test", batch_size=16))
    with torch.no_grad():
        workspace.model.get_submodule("stem").get_parameter("bias")[0] = float("inf")
    reasons = {found.failure for found in measure(workspace, TRIALS)}
    assert reasons == {"the features of 'conv' are not finite"}
    assert len(calls) == passes


class Reciprocal(nn.Module):
    """NaN where the layer before it gives nothing but zeros."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.abs().amax((1, 2, 3), keepdim=True)


def test_nan_from_finite_factors_is_wrong_and_no_failure() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.Conv2d(6, 8, 3), Reciprocal(), nn.Flatten(), nn.Linear(72, 4)
    )
    workspace = replace(opened(model), methods={"odd": Odd(lambda w: w * 0)})
    model[1].bias.data.zero_()
    found = measure(workspace, [Trial("1", "odd", 0.5, rank, 0, 0) for rank in (2, 1)])
    assert found[0].failure is None
    assert not found[0].bits.any()
    assert found[1].bits.any()


class Overflowing(Odd):
    """Two stages, infinite between them: infinity less infinity is NaN."""

    def stages(self, layer: LayerSpec, rank: Rank) -> Sequence[LayerSpec]:
        return (layer.pointwise(layer.in_channels, layer.in_channels), layer)

    def decompose(
        self, layer: LayerSpec, weight: Tensor, rank: Rank, generator: torch.Generator
    ) -> Sequence[Tensor]:
        first = torch.eye(layer.in_channels, dtype=weight.dtype)[..., None, None]
        return (first * 5e38, weight / 5e38)


def test_features_that_overflow_are_infinitely_far_off() -> None:
    workspace = replace(opened(), methods={"odd": Overflowing()})
    with torch.no_grad():
        workspace.model.stem.bias += 5
    (found,) = measure(workspace, [Trial("conv", "odd", 0.5, 2, 0, 0)])
    assert found.failure is None
    assert found.errors["relative-features"] == math.inf
    assert found.errors["relative-weights"] < 1e-6
    assert not found.bits.any()


def test_two_nans_do_not_agree() -> None:
    workspace = opened()
    test = workspace.dataset.test
    assert isinstance(test, TensorSplit)
    workspace = opened(dataset=replace(workspace.dataset, test=replace(test, labels=None)))
    with torch.no_grad():
        workspace.model.head.bias[1] = float("nan")
    assert not measure(workspace, TRIALS[:1])[0].bits.any()


def test_models_that_cannot_be_measured() -> None:
    class Random(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.randn(len(x), 4)

    workspace = opened(Random())
    for attempt in (lambda: baseline(workspace), lambda: measure(workspace, TRIALS)):
        with pytest.raises(UnsupportedError, match="not deterministic"):
            attempt()


def test_what_is_not_there() -> None:
    workspace = opened()
    with pytest.raises(UsageError, match="noise has no validation images"):
        measure(opened(evaluation=ImagesRecipe("validation")), TRIALS)
    with pytest.raises(UsageError, match="no layer named 'convv'"):
        measure(workspace, [replace(TRIALS[0], layer="convv")])
    with pytest.raises(UsageError, match="no method named 'ct'"):
        measure(workspace, [replace(TRIALS[0], method="ct")])
    with pytest.raises(UnsupportedError, match="'stem' stays dense: the first layer"):
        measure(workspace, [replace(TRIALS[0], layer="stem")])
    with pytest.raises(ValueError, match="one layer and one stage"):
        measure(workspace, [TRIALS[0], replace(TRIALS[0], stage="after")])


class Waits(TorchFunctionMode):
    """Counts the calls that wait for a GPU where there is one: those that bring values back."""

    BACK = frozenset(
        {"cpu", "item", "tolist", "numpy", "nonzero", "equal", "allclose"}
        | {"__bool__", "__float__", "__int__", "__index__"}
    )

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in self.BACK:
            self.calls.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("features", ["train", "test"])
def test_nothing_waits_for_the_device_between_batches(features: Any) -> None:
    def waits(batch_size: int) -> list[str]:
        evaluation = ImagesRecipe("test", batch_size=batch_size)
        workspace = opened(evaluation=evaluation, features=replace(evaluation, split=features))
        with Waits() as counted:
            found = measure(workspace, TRIALS)
            baseline(workspace)
        assert not [m.failure for m in found if m.failure]
        return counted.calls

    assert waits(25) == waits(5)
    assert "cpu" in waits(25)


def test_the_workspace_is_as_before() -> None:
    workspace = opened()
    state = copy.deepcopy(workspace.model.state_dict())
    measure(workspace, TRIALS)
    baseline(workspace)
    assert all(torch.equal(v, state[k]) for k, v in workspace.model.state_dict().items())
    assert isinstance(workspace.model.conv, nn.Conv2d)
    assert not any("forward" in vars(module) for module in workspace.model.modules())


# After fine-tuning; how it is done is tested with finetuning.py.


@dataclass
class Tuned:
    """Stands for fine-tuning: makes one layer predict one class."""

    seen: list[Trial]

    def __call__(
        self, workspace: Workspace, trial: Trial, layer: Any, stand_in: nn.Sequential
    ) -> tuple[nn.Module, dict[str, float]]:
        self.seen.append(trial)
        if trial.rank == 4:
            raise ValueError("the loss became nan")
        model = copy.deepcopy(workspace.model)
        replace_layer(model, layer, stand_in)
        with torch.no_grad():
            model.head.bias[trial.run] = 1e6
        return model, {"conv": 0.5}


@pytest.mark.parametrize("labelled", [True, False])
def test_after_fine_tuning(labelled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = Tuned([])
    monkeypatch.setattr(measuring, "fine_tuned", tuned)
    workspace = opened()
    test = workspace.dataset.test
    assert isinstance(test, TensorSplit)
    images, labels = next(test.batches(50))
    if not labelled:
        workspace = opened(dataset=replace(workspace.dataset, test=replace(test, labels=None)))
        with torch.no_grad():
            labels = workspace.model(images).argmax(1)
    trials = [replace(trial, stage="after") for trial in TRIALS]
    found = measure(workspace, [*trials, replace(trials[0], keep=0.4)])
    assert [trial.rank for trial in tuned.seen] == [trial.rank for trial in trials]
    assert found[2].failure == "ValueError: the loss became nan"
    before = measure(workspace, TRIALS)
    for trial, after, plain in zip(trials, found, before, strict=False):
        assert after.trial == trial
        if after.failure is None:
            assert after.change == {"conv": 0.5}
            assert after.errors == plain.errors
            assert after.params_after == plain.params_after
            assert np.array_equal(after.bits, (labels == trial.run).numpy())
    assert found[-1] == replace(found[0], trial=replace(trials[0], keep=0.4))
