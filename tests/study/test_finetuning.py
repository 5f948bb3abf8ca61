"""p*: one candidate fine-tuned, against the same thing done by hand; and what it depends on."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_study import RECIPE as STUDY
from torch import Tensor, nn

from tdkit.compression.scoring import factorize, prepare
from tdkit.datasets.base import Dataset, TensorSplit
from tdkit.decompositions.cp import Cp
from tdkit.decompositions.tt import TensorTrain
from tdkit.decompositions.tucker import Tucker
from tdkit.errors import TdkitError, UsageError
from tdkit.forward.inputs import Inputs
from tdkit.layers.evidence import Evidence
from tdkit.layers.inventory import Layer, find_layers
from tdkit.layers.weights import ModuleWeights
from tdkit.metrics.weights import RELATIVE
from tdkit.study.finetuning import _seed, fine_tuned, training_images, weight_norms
from tdkit.study.measuring import measure
from tdkit.study.recipe import FinetuneRecipe
from tdkit.study.records import Trial
from tdkit.study.workspace import Workspace
from tdkit.training.loop import evaluate
from tdkit.training.recipe import OptimizerRecipe

RECIPE = FinetuneRecipe(epochs=3, batch_size=16, optimizer=OptimizerRecipe("sgd", 0.02))


def split(count: int, seed: int) -> TensorSplit:
    """Noise that is brighter in class 1; three images in four are of class 0."""
    labels = (torch.arange(count) % 4 == 0).long()
    noise = torch.randint(0, 150, (count, 1, 8, 8), generator=torch.Generator().manual_seed(seed))
    return TensorSplit((noise + 50 * labels.view(-1, 1, 1, 1)).byte(), labels, (0.35,), (0.2,))


def network(dropout: float = 0.0) -> nn.Sequential:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(8, 2),
        ).eval()


def opened(model: nn.Module | None = None, **changes: Any) -> Workspace:
    """A workspace whose recipe has some changes."""
    model = model or network()
    parts = {"train": split(64, 1), "validation": split(40, 2), "test": split(80, 3)}
    return Workspace(
        model=model,
        layers=tuple(find_layers(model, inputs=Inputs((torch.zeros(1, 1, 8, 8),)))),
        methods={"cp": Cp(sweeps=5, start="uniform"), "tucker": Tucker(), "tt": TensorTrain()},
        metrics=(RELATIVE,),
        dataset=Dataset("grey", ("dark", "bright"), (1, 8, 8), (0.35,), (0.2,), "", **parts),
        recipe=replace(STUDY, **{"finetune": RECIPE, **changes}),
        device=torch.device("cpu"),
    )


TUCKER = Trial("2", "tucker", 0.5, (3, 4), 0, 0, "after")
CP = Trial("2", "cp", 0.5, 9, 0, 0, "after")


def stand_in(workspace: Workspace, trial: Trial) -> tuple[Layer, nn.Sequential]:
    layer = next(each for each in workspace.layers if each.name == trial.layer)
    weights, method = ModuleWeights(workspace.model), workspace.methods[trial.method]
    prepared = prepare(layer, weights, trial.method, method, Evidence(trial.seed))
    assert prepared is not None
    return layer, factorize(layer, weights, prepared, trial.rank).eval()


def tuned(workspace: Workspace, trial: Trial) -> tuple[nn.Module, dict[str, float]]:
    return fine_tuned(workspace, trial, *stand_in(workspace, trial))


def equal(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return list(states[0]) == list(states[1]) and all(
        torch.equal(value, states[1][name]) for name, value in states[0].items()
    )


def test_it_is_the_loop_written_out() -> None:
    """All layers train, and the epoch that validates best is kept, not the last one."""
    workspace = opened()
    layer, module = stand_in(workspace, TUCKER)
    expected = nn.Sequential(*copy.deepcopy(workspace.model))
    expected[2] = copy.deepcopy(module)
    optimizer = torch.optim.SGD(expected.parameters(), 0.02, momentum=0.9)
    generator = torch.Generator().manual_seed(_seed(TUCKER))
    epochs = []
    for _ in range(3):
        torch.randint(2**63 - 1, (), generator=generator)  # for dropout, which there is none of
        expected.train()
        batches = workspace.dataset.train.batches(16, generator=generator, augment=True)
        for images, labels in batches:
            loss = nn.functional.cross_entropy(expected(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        right = evaluate(expected, workspace.dataset.validation).accuracy
        epochs.append((right, copy.deepcopy(expected.state_dict())))
    _, best = max(epochs, key=lambda epoch: epoch[0])
    model, _ = fine_tuned(workspace, TUCKER, layer, module)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, best[name], rtol=1e-5, atol=1e-6)
    assert not any(
        torch.equal(p, q) for p, q in zip(model[2].parameters(), module.parameters(), strict=True)
    )


def test_fine_tuning_makes_up_for_the_loss() -> None:
    workspace = opened(finetune=replace(RECIPE, epochs=8))
    model, change = tuned(workspace, TUCKER)
    before = evaluate(workspace.model, workspace.dataset.test).accuracy
    assert evaluate(model, workspace.dataset.test).accuracy > before
    assert all(value > 0 for value in change.values())


def test_nothing_that_it_is_handed_changes() -> None:
    model = network()
    model[3].train()
    workspace, before = opened(model), copy.deepcopy(model)
    layer, module = stand_in(workspace, CP)
    kept = copy.deepcopy(module)
    random = torch.get_rng_state()
    result, _ = fine_tuned(workspace, CP, layer, module)
    assert equal(workspace.model, before)
    assert equal(module, kept)
    assert torch.equal(torch.get_rng_state(), random)
    assert [each.training for each in workspace.model] == [i == 3 for i in range(9)]
    assert [each.training for each in result] == [i == 3 for i in range(9)]
    assert all(parameter.grad is None for parameter in (*model.parameters(), *module.parameters()))


def test_it_depends_on_the_trial_alone() -> None:
    """Not on what ran before, on the global random numbers or on the keep that led to the rank."""
    workspace = opened(network(dropout=0.5))
    alone, change = tuned(workspace, CP)
    torch.manual_seed(99)
    tuned(workspace, TUCKER)
    again, same = tuned(workspace, replace(CP, keep=0.51))
    assert equal(alone, again)
    assert change == same
    together = measure(workspace, [TUCKER, CP, replace(CP, run=1, seed=1)])
    (single,) = measure(workspace, [CP])
    assert replace(together[1], seconds=0) == replace(single, seconds=0)
    assert single.change == change


def test_every_candidate_and_run_has_random_numbers_of_its_own() -> None:
    others = [{"layer": "4"}, {"method": "tt"}, {"rank": 8}, {"rank": (9,)}, {"seed": 1}]
    trials = [CP, *(replace(CP, **other) for other in others)]
    assert len({_seed(trial) for trial in trials}) == len(trials)
    assert all(0 <= _seed(trial) < 2**63 for trial in trials)
    # And they are used: the same factors end differently.
    workspace = opened()
    layer, module = stand_in(workspace, TUCKER)
    one, _ = fine_tuned(workspace, TUCKER, layer, module)
    other, _ = fine_tuned(workspace, replace(TUCKER, run=1, seed=1), layer, module)
    assert not equal(one, other)


def norm(weight: Tensor) -> float:
    return float(torch.linalg.vector_norm(weight.detach().double()))


def test_the_change_is_that_of_the_norms_the_factorized_layer_expanded() -> None:
    workspace = opened()
    layer, module = stand_in(workspace, TUCKER)
    model, change = fine_tuned(workspace, TUCKER, layer, module)

    def expanded(stages: nn.Sequential) -> float:
        first, core, last = (stage.weight.detach().double() for stage in stages)
        return norm(torch.einsum("ca,bcyx,db->dayx", first[..., 0, 0], core, last[..., 0, 0]))

    assert set(change) == {"0", "2", "8"}
    for name, before, after in (
        ("0", norm(workspace.model[0].weight), norm(model[0].weight)),
        ("2", expanded(module), expanded(model[2])),
        ("8", norm(workspace.model[8].weight), norm(model[8].weight)),
    ):
        assert change[name] == pytest.approx(abs(after - before) / before, rel=1e-9)


def test_a_frozen_layer_does_not_change_and_no_norm_has_no_relative_change() -> None:
    model = network()
    model[0].requires_grad_(False)
    nn.init.zeros_(model[8].weight)
    tuned_model, change = tuned(opened(model), TUCKER)
    assert change["0"] == change["8"] == 0.0
    assert norm(tuned_model[8].weight) > 0
    assert change["2"] > 0


def test_a_layer_without_a_weight_tensor_has_no_norm() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten())
    packed = Layer("1", (), "Packed", None, 0)
    model[1].weight = lambda: None
    assert set(weight_norms(model, [*find_layers(model, include_ends=True), packed])) == {"0"}


def test_all_trials_see_the_same_images_with_the_class_shares_of_all() -> None:
    data = opened().dataset
    recipe = replace(RECIPE, images=12)
    chosen, again, other = (training_images(data, recipe, seed) for seed in (5, 5, 6))
    assert torch.equal(chosen.train.images, again.train.images)
    assert not torch.equal(chosen.train.images, other.train.images)
    assert chosen.train.labels.bincount().tolist() == [9, 3]
    rows = {image.numpy().tobytes() for image in data.train.images}
    assert {image.numpy().tobytes() for image in chosen.train.images} <= rows
    assert chosen.validation is data.validation
    assert chosen.test is data.test
    for images in (None, 64, 65):
        assert training_images(data, replace(RECIPE, images=images), 5) is data


def test_the_images_are_those_that_it_is_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def train(model: nn.Module, dataset: Dataset, *args: Any, **options: Any) -> None:
        seen.append(dataset.train.images)

    monkeypatch.setattr("tdkit.study.finetuning.train", train)
    workspace = opened(finetune=replace(RECIPE, images=12), seed=7)
    for trial in (CP, replace(CP, run=1, seed=8), TUCKER):
        tuned(workspace, trial)
    expected = training_images(workspace.dataset, replace(RECIPE, images=12), 7).train.images
    assert all(torch.equal(images, expected) for images in seen)
    assert len(seen) == 3


def test_a_training_that_diverges_is_a_failed_measurement() -> None:
    workspace = opened(finetune=replace(RECIPE, optimizer=OptimizerRecipe("sgd", 1e30)))
    with pytest.raises(TdkitError, match="the training loss became"):
        tuned(workspace, TUCKER)
    (found,) = measure(workspace, [TUCKER])
    assert found.failure is not None
    assert "the training loss became" in found.failure
    assert (found.correct, found.change) == (b"", {})


def test_without_a_table_for_it_there_is_no_fine_tuning() -> None:
    with pytest.raises(UsageError, match="asks for no fine-tuning"):
        tuned(opened(finetune=None), TUCKER)
