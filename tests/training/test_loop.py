from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
import typer
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from tdkit.datasets.base import Dataset, TensorSplit
from tdkit.errors import (
    StorageError,
    TdkitError,
    UnreadableFileError,
    UnsupportedError,
    UsageError,
)
from tdkit.hookspecs import ModelRecord
from tdkit.training.loop import (
    Epoch,
    evaluate,
    initial_model,
    last_learning_rate,
    learning_rate_share,
    steps_per_epoch,
    train,
)
from tdkit.training.recipe import FitRecipe, OptimizerRecipe, ScheduleRecipe

SGD = OptimizerRecipe("sgd", 0.1, momentum=0.9, nesterov=True)
RECIPE = FitRecipe(epochs=3, batch_size=16, optimizer=SGD)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def toy_split(count: int, seed: int = 0) -> TensorSplit:
    """Noise that is brighter in class 1."""
    labels = torch.arange(count) % 2
    noise = torch.randint(0, 120, (count, 1, 8, 8), generator=seeded(seed))
    images = (noise + 60 * labels.view(-1, 1, 1, 1)).byte()
    return TensorSplit(images, labels, (0.35,), (0.2,))


def toy_data(train_count: int = 64) -> Dataset:
    splits = {"train": toy_split(train_count, 1), "validation": toy_split(40, 2)}
    return Dataset("toy", ("dark", "bright"), (1, 8, 8), (0.35,), (0.2,), "", **splits)


def toy_model(seed: int = 0, dropout: float = 0.0) -> nn.Sequential:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(6, 2),
        )


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


class Constant(nn.Module):
    """Always answers with the same logits."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(len(images), -1)


def test_evaluation_of_a_constant_answer_is_known_in_closed_form():
    split = TensorSplit(torch.zeros(5, 1, 2, 2), torch.tensor([1, 0, 1, 1, 0]), (0.0,), (1.0,))
    measured = evaluate(Constant(0.0, math.log(3.0)), split, batch_size=2)
    assert measured.accuracy == pytest.approx(3 / 5)
    assert measured.correct.tolist() == [True, False, True, True, False]
    assert measured.correct.dtype == torch.bool
    assert not measured.correct.is_inference()
    assert measured.loss == pytest.approx(-(3 * math.log(3 / 4) + 2 * math.log(1 / 4)) / 5)


def test_evaluation_does_not_depend_on_the_batch_size_and_restores_modes():
    model = toy_model(dropout=0.5)
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    split = toy_split(30)
    one, other = (evaluate(model, split, batch_size=size) for size in (30, 7))
    assert torch.equal(one.correct, other.correct)
    assert one.loss == pytest.approx(other.loss)
    assert [module.training for module in model] == [True, False, *[True] * 5]
    assert equal(before, model.state_dict())


def test_evaluation_follows_the_models_dtype():
    assert evaluate(toy_model().double(), toy_split(6)).accuracy in {k / 6 for k in range(7)}


def test_evaluation_takes_a_limit():
    assert len(evaluate(toy_model(), toy_split(30), limit=7).correct) == 7


def test_evaluation_needs_labels():
    split = replace(toy_split(4), labels=None)
    with pytest.raises(UsageError, match="accuracy needs labels"):
        evaluate(toy_model(), split)


def test_evaluation_of_images_of_another_shape_names_it():
    split = TensorSplit(torch.zeros(4, 3, 8, 8), torch.zeros(4).long(), (0.0,) * 3, (1.0,) * 3)
    with pytest.raises(UsageError, match=r"cannot take images of shape \(3, 8, 8\): .*channels"):
        evaluate(toy_model(), split)


@pytest.mark.parametrize("model", [Constant(0.0, 1.0), nn.Identity()], ids=["classes", "axes"])
def test_evaluation_with_more_classes_than_the_model_has_is_refused(model):
    split = TensorSplit(torch.zeros(3, 1, 2, 2), torch.tensor([0, 1, 2]), (0.0,), (1.0,))
    with pytest.raises(UsageError, match="no score for each of at least 3 classes"):
        evaluate(model, split)


def test_evaluation_needs_images():
    with pytest.raises(UsageError, match="the split is empty"):
        evaluate(toy_model(), toy_split(0))


@pytest.mark.parametrize(("steps", "epochs", "warmup"), [(7, 5, 0.3), (430, 8, 0.25), (3, 2, 0.5)])
def test_one_cycle_equals_torchs_scheduler(steps, epochs, warmup):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1.0, total_steps=steps * epochs, pct_start=warmup, cycle_momentum=False
    )
    schedule = ScheduleRecipe("one-cycle", warmup=warmup)
    for step in range(steps * epochs):
        share = learning_rate_share(schedule, step, steps, epochs)
        assert share == pytest.approx(reference.get_last_lr()[0], rel=1e-6, abs=1e-12)
        optimizer.step()
        if step < steps * epochs - 1:
            reference.step()


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_one_cycle_is_defined_for_very_short_trainings(steps):
    schedule = ScheduleRecipe("one-cycle", warmup=0.5)
    shares = [learning_rate_share(schedule, step, steps, 1) for step in range(steps)]
    assert all(0 < share <= 1 for share in shares)


def test_multistep_equals_torchs_scheduler():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3], gamma=0.1)
    schedule = ScheduleRecipe("multistep", milestones=(2, 3))
    for epoch in range(6):
        for step in (10 * epoch, 10 * epoch + 9):
            share = learning_rate_share(schedule, step, 10, 6)
            assert share == pytest.approx(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()


@pytest.mark.parametrize(
    ("images", "batch_size", "steps"), [(64, 16, 4), (65, 16, 4), (66, 16, 5), (2, 16, 1)]
)
def test_a_last_batch_of_one_is_dropped(images, batch_size, steps):
    assert steps_per_epoch(images, batch_size) == steps


@pytest.mark.parametrize("count", [33, 34])
def test_training_with_batch_norm_survives_a_last_batch_of_one(count):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    assert train(model, toy_data(count), RECIPE, generator=seeded()).history


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [
        (SGD, ScheduleRecipe("one-cycle")),
        (OptimizerRecipe("adam", 0.02), ScheduleRecipe("multistep", milestones=(4,))),
        (OptimizerRecipe("adamw", 0.02, weight_decay=0.01), ScheduleRecipe()),
    ],
    ids=lambda recipe: recipe.name,
)
def test_training_learns(optimizer, schedule):
    recipe = replace(RECIPE, epochs=6, optimizer=optimizer, schedule=schedule)
    model, data = toy_model(), toy_data(128)
    before = evaluate(model, data.validation)
    result = train(model, data, recipe, generator=seeded())
    after = evaluate(model, data.validation)
    assert after.loss < before.loss - 0.1
    assert after.accuracy > 0.95
    assert [epoch.number for epoch in result.history] == [1, 2, 3, 4, 5, 6]
    assert result.history[-1].loss < result.history[0].loss


def test_the_step_is_that_of_a_loop_written_out():
    """Weight decay, label smoothing, momentum and the rate of every step reach the optimizer."""
    recipe = FitRecipe(
        epochs=1,
        batch_size=20,
        optimizer=OptimizerRecipe("sgd", 0.3, momentum=0.8, nesterov=True, weight_decay=0.01),
        schedule=ScheduleRecipe("one-cycle"),
        label_smoothing=0.2,
    )
    data, expected = toy_data(60), toy_model().train()
    optimizer = torch.optim.SGD(
        expected.parameters(), lr=0.3, momentum=0.8, nesterov=True, weight_decay=0.01
    )
    generator = seeded(3)
    torch.randint(2**63 - 1, (), generator=generator)
    for step, (images, labels) in enumerate(
        data.train.batches(20, generator=generator, augment=True)
    ):
        optimizer.param_groups[0]["lr"] = 0.3 * learning_rate_share(recipe.schedule, step, 3, 1)
        loss = nn.functional.cross_entropy(expected(images), labels, label_smoothing=0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model = toy_model()
    train(model, data, recipe, generator=seeded(3))
    for name, tensor in expected.state_dict().items():
        assert torch.allclose(model.state_dict()[name], tensor, atol=1e-6), name


def test_the_best_epoch_is_kept_not_the_last():
    """After the second epoch the answers are turned round, and hardly anything is learned."""
    schedule = ScheduleRecipe("multistep", milestones=(2,), factor=1e-3)
    model, data, states = toy_model(), toy_data(), []

    def sabotage(epoch: Epoch, state: dict) -> None:
        states.append(state)
        if epoch.number == 2:
            model[-1].weight.data.neg_()
            model[-1].bias.data.neg_()

    recipe = replace(RECIPE, schedule=schedule)
    result = train(model, data, recipe, generator=seeded(), on_epoch=sabotage)
    accuracies = [epoch.validation_accuracy for epoch in result.history]
    best = accuracies.index(max(accuracies))
    assert accuracies[2] < accuracies[best]
    assert equal(result.weights, states[best]["model"])
    assert equal(result.weights, model.state_dict())
    assert evaluate(model, data.validation).accuracy == max(accuracies)


def test_the_same_seed_gives_the_same_weights_and_leaves_torchs_generator_alone():
    data, results = toy_data(), []
    for seed, disturbance in ((0, 1), (0, 2), (1, 2)):
        torch.manual_seed(disturbance)
        before = torch.get_rng_state()
        model = toy_model(dropout=0.3)
        results.append(train(model, data, RECIPE, generator=seeded(seed)).weights)
        assert torch.equal(torch.get_rng_state(), before)
    assert equal(results[0], results[1])
    assert not equal(results[0], results[2])


@pytest.mark.parametrize("optimizer", [SGD, OptimizerRecipe("adam", 0.01)], ids=["sgd", "adam"])
def test_an_interrupted_training_ends_with_the_same_weights(tmp_path, optimizer):
    recipe = replace(
        RECIPE, epochs=5, optimizer=optimizer, schedule=ScheduleRecipe("one-cycle"), patience=4
    )
    data, file = toy_data(), tmp_path / "state.pt"

    def stop_after_two(epoch: Epoch, state: dict) -> None:
        torch.save(state, file)
        if epoch.number == 2:
            raise KeyboardInterrupt

    whole = train(toy_model(dropout=0.3), data, recipe, generator=seeded())
    with pytest.raises(KeyboardInterrupt):
        train(toy_model(dropout=0.3), data, recipe, generator=seeded(), on_epoch=stop_after_two)
    state = torch.load(file, weights_only=True)
    resumed = train(toy_model(9, 0.3), data, recipe, generator=seeded(9), state=state)
    assert equal(whole.weights, resumed.weights)
    assert [replace(e, seconds=0) for e in whole.history] == [
        replace(e, seconds=0) for e in resumed.history
    ]


def test_a_later_epoch_does_not_change_an_earlier_state():
    data, long, short = toy_data(), [], []
    train(toy_model(), data, RECIPE, generator=seeded(), on_epoch=lambda _, s: long.append(s))
    recipe = replace(RECIPE, epochs=1)
    train(toy_model(), data, recipe, generator=seeded(), on_epoch=lambda _, s: short.append(s))
    assert len(long[0]["history"]) == 1
    assert equal(long[0]["best"], short[0]["best"])
    assert equal(long[0]["model"], short[0]["model"])
    momentum = [state["optimizer"]["state"][0]["momentum_buffer"] for state in (*long, *short)]
    assert torch.equal(momentum[0], momentum[-1])
    assert not torch.equal(momentum[1], momentum[-1])


def test_patience_ends_a_training_that_no_longer_improves():
    data = toy_data()
    frozen = replace(RECIPE, epochs=50, optimizer=OptimizerRecipe("sgd", 1e-30), patience=3)
    model = toy_model()
    for parameter in model[:4].parameters():
        parameter.requires_grad = False
    model[1].momentum = 0.0
    result = train(model, data, frozen, generator=seeded())
    assert len(result.history) == 4


def test_a_loss_that_is_not_finite_ends_the_training():
    recipe = replace(RECIPE, optimizer=OptimizerRecipe("sgd", 1e30, momentum=0.0))
    with pytest.raises(TdkitError, match=r"training loss became .* in epoch 1, step") as caught:
        train(toy_model(), toy_data(), recipe, generator=seeded())
    assert caught.value.hint == "lower the learning rate"


@pytest.mark.parametrize("part", ["train", "validation"])
def test_training_needs_both_splits(part):
    data = replace(toy_data(), **{part: None})
    with pytest.raises(UsageError, match=r"toy has no (training|validation) images"):
        train(toy_model(), data, RECIPE, generator=seeded())


def test_training_needs_labels():
    data = replace(toy_data(), train=replace(toy_split(8), labels=None))
    with pytest.raises(UsageError, match="training needs labels"):
        train(toy_model(), data, RECIPE, generator=seeded())


def test_training_needs_two_images():
    with pytest.raises(UsageError, match="at least 2 images"):
        train(toy_model(), toy_data(1), RECIPE, generator=seeded())


def test_training_needs_images_to_validate_on():
    data = replace(toy_data(), validation=toy_split(0))
    with pytest.raises(UsageError, match="toy has no validation images"):
        train(toy_model(), data, RECIPE, generator=seeded())


def test_memory_layout_changes_nothing_but_speed():
    data, results, layouts = toy_data(), [], []
    colours = {name: getattr(data, name) for name in ("train", "validation")}
    for name, split in colours.items():
        images = split.images.expand(-1, 3, -1, -1)
        colours[name] = TensorSplit(images, split.labels, (0.35,) * 3, (0.2,) * 3)
    data = replace(data, **colours)
    for channels_last in (False, True):
        model = nn.Sequential(nn.Conv2d(3, 6, 3), *toy_model()[1:])
        nn.init.constant_(model[0].weight, 0.1)
        nn.init.zeros_(model[0].bias)
        model[0].register_forward_pre_hook(
            lambda module, images: layouts.append(
                images[0].is_contiguous(memory_format=torch.channels_last)
                and module.weight.is_contiguous(memory_format=torch.channels_last)
                if module.training
                else None
            )
        )
        results.append(
            train(model, data, replace(RECIPE, channels_last=channels_last), generator=seeded())
        )
        assert model[0].weight.is_contiguous()
    one, other = (result.weights for result in results)
    assert all(torch.allclose(other[name], one[name], atol=1e-4) for name in one)
    steps = [layout for layout in layouts if layout is not None]
    assert steps == [False] * 12 + [True] * 12


def test_bfloat16_lowers_the_precision_of_the_forward_pass_only():
    seen = []
    model = toy_model()
    model[0].register_forward_hook(
        lambda module, _, output: seen.append((module.training, output.dtype)) and None
    )
    train(model, toy_data(), replace(RECIPE, autocast="bfloat16"), generator=seeded())
    assert {dtype for training, dtype in seen if training} == {torch.bfloat16}
    assert {dtype for training, dtype in seen if not training} == {torch.float32}
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_the_initial_model_follows_its_seed_alone():
    def create(in_channels: int, num_classes: int) -> nn.Module:
        return nn.Linear(in_channels, num_classes)

    record = ModelRecord("linear", "", create, (1, 8, 8), 2)
    before = torch.get_rng_state()
    first, same, other = (initial_model(record, toy_data(), seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.weight.shape == (2, 1)
    assert torch.equal(first.weight, same.weight)
    assert not torch.equal(first.weight, other.weight)


def test_a_model_needs_classes():
    record = ModelRecord("linear", "", nn.Linear, (1, 8, 8), 2)
    with pytest.raises(UsageError, match="training needs labels, and the images of toy have none"):
        initial_model(record, replace(toy_data(), classes=()), 0)


PAPER = ScheduleRecipe("multistep", milestones=(30, 60, 90))


@pytest.mark.parametrize(
    ("schedule", "epochs", "last"),
    [
        (ScheduleRecipe(), 7, 0.1),
        (PAPER, 100, 1e-4),
        (PAPER, 91, 1e-4),
        (PAPER, 90, 1e-3),
        (PAPER, 30, 0.1),
        (ScheduleRecipe("one-cycle"), 12, 1e-3),
    ],
)
def test_the_last_learning_rate_is_that_of_the_last_epoch(schedule, epochs, last):
    recipe = replace(RECIPE, epochs=epochs, schedule=schedule)
    assert last_learning_rate(recipe) == pytest.approx(last)
    if schedule.name != "one-cycle":
        share = learning_rate_share(schedule, 10 * epochs - 1, 10, epochs)
        assert last_learning_rate(recipe) == pytest.approx(0.1 * share)


def trained(epochs: int = 6) -> nn.Module:
    model = toy_model()
    train(model, toy_data(128), replace(RECIPE, epochs=epochs), generator=seeded())
    return model


def test_weights_that_no_epoch_improves_are_kept():
    model, data = trained(), toy_data()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    accuracy = evaluate(model, data.validation).accuracy
    harmful = replace(RECIPE, optimizer=OptimizerRecipe("sgd", 30.0))
    result = train(model, data, harmful, generator=seeded(), keep_better=True)
    first, *others = result.history
    assert (first.number, first.loss, first.validation_accuracy) == (0, None, accuracy)
    assert [epoch.number for epoch in others] == [1, 2, 3]
    assert max(epoch.validation_accuracy for epoch in others) <= accuracy
    assert result.best is first
    assert equal(before, model.state_dict())
    assert equal(before, result.weights)
    # Without being asked for they are not among those to choose from.
    result = train(model, data, harmful, generator=seeded())
    assert result.best.number > 0
    assert not equal(before, model.state_dict())


@pytest.mark.parametrize("rate", [1e-30, 1e-3, 0.1, 1.0, 10.0])
def test_keeping_the_better_weights_never_makes_validation_worse(rate):
    model, data = toy_model(), toy_data()
    before = evaluate(model, data.validation).accuracy
    recipe = replace(RECIPE, optimizer=OptimizerRecipe("sgd", rate))
    result = train(model, data, recipe, generator=seeded(), keep_better=True)
    after = evaluate(model, data.validation).accuracy
    assert after == result.best.validation_accuracy >= before
    assert equal(result.weights, model.state_dict())


def test_the_weights_before_count_against_the_patience():
    recipe = replace(RECIPE, epochs=50, optimizer=OptimizerRecipe("sgd", 1e-30), patience=3)
    model = trained()
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    result = train(model, toy_data(), recipe, generator=seeded(), keep_better=True)
    assert [epoch.number for epoch in result.history] == [0, 1, 2, 3]
    assert result.best.number == 0


@pytest.mark.parametrize("last", [0, 1, 3])
def test_keeping_the_better_weights_can_be_interrupted(tmp_path, last):
    data, file = toy_data(), tmp_path / "state.pt"

    def stop(epoch: Epoch, state: dict) -> None:
        torch.save(state, file)
        if epoch.number == last:
            raise KeyboardInterrupt

    def run(model: nn.Module, seed: int = 0, **options):
        return train(model, data, RECIPE, generator=seeded(seed), keep_better=True, **options)

    whole = run(toy_model(dropout=0.3))
    with pytest.raises(KeyboardInterrupt):
        run(toy_model(dropout=0.3), on_epoch=stop)
    state = torch.load(file, weights_only=True)
    resumed = run(toy_model(9, 0.3), 9, state=state)
    assert equal(whole.weights, resumed.weights)
    assert [e.validation_loss for e in whole.history] == [
        e.validation_loss for e in resumed.history
    ]


def test_every_step_is_told():
    seen = []
    train(
        toy_model(),
        toy_data(),
        replace(RECIPE, epochs=2, batch_size=24),
        generator=seeded(),
        on_step=lambda *numbers: seen.append(numbers),
        on_epoch=lambda epoch, _: seen.append(epoch.number),
    )
    assert seen == [(1, 1, 3), (1, 2, 3), (1, 3, 3), 1, (2, 1, 3), (2, 2, 3), (2, 3, 3), 2]


def test_frozen_parameters_stay_and_modes_and_gradients_are_as_before():
    model = toy_model().eval()
    model[2].train()
    model[0].weight.requires_grad = False
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, toy_data(), RECIPE, generator=seeded())
    changed = [name for name in before if not torch.equal(before[name], model.state_dict()[name])]
    assert "0.weight" not in changed
    assert {"1.weight", "1.bias", "1.running_mean", "6.weight", "6.bias"} <= set(changed)
    assert [module.training for module in model] == [False, False, True, *[False] * 4]
    assert not model.training
    assert not model[0].weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_that_is_frozen_whole_cannot_be_trained():
    with pytest.raises(UnsupportedError, match="no parameter of the model requires a gradient"):
        train(toy_model().requires_grad_(False), toy_data(), RECIPE, generator=seeded())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_trained_in_full_and_rounded_at_the_end(dtype):
    """Steps this small would all be lost to rounding."""
    recipe = replace(RECIPE, optimizer=OptimizerRecipe("sgd", 2e-3, momentum=0.0), epochs=8)
    half, full = toy_model().to(dtype), toy_model().to(dtype).float()
    before = half[6].weight.clone()
    result = train(half, toy_data(), recipe, generator=seeded())
    train(full, toy_data(), recipe, generator=seeded())
    rounded = {name: t.to(half.state_dict()[name].dtype) for name, t in full.state_dict().items()}
    assert equal(half.state_dict(), rounded)
    assert equal(result.weights, rounded)
    assert half[6].weight.dtype == dtype
    assert not torch.equal(half[6].weight, before)


def test_double_precision_is_kept():
    optimizer = OptimizerRecipe("sgd", 0.1, momentum=0.0)
    recipe = FitRecipe(epochs=1, batch_size=64, optimizer=optimizer)
    model, expected = toy_model().double(), toy_model().double()
    generator = seeded(3)
    torch.randint(2**63 - 1, (), generator=generator)
    images, labels = next(toy_data().train.batches(64, generator=generator, augment=True))
    nn.functional.cross_entropy(expected(images.double()), labels).backward()
    train(model, toy_data(), recipe, generator=seeded(3))
    for found, start in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, start - 0.1 * start.grad, rtol=1e-12, atol=1e-14)


class Wrapped(nn.Module):
    """Gives its logits with those of an auxiliary head in train mode, as torchvision's do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = toy_model()

    def forward(self, images: torch.Tensor):
        from torchvision.models.googlenet import GoogLeNetOutputs

        logits = self.net(images)
        return GoogLeNetOutputs(logits, None, None) if self.training else logits


def test_wrapped_logits_are_unwrapped():
    wrapped, plain = Wrapped(), toy_model()
    train(wrapped, toy_data(), RECIPE, generator=seeded())
    train(plain, toy_data(), RECIPE, generator=seeded())
    assert equal(wrapped.net.state_dict(), plain.state_dict())


def test_an_output_that_is_no_tensor_is_named():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = toy_model()

        def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"scores": self.net(images)}

    with pytest.raises(UsageError, match="output is a dict, not a tensor"):
        train(Named(), toy_data(), RECIPE, generator=seeded())


def test_training_on_more_classes_than_the_model_has_is_refused():
    labels = torch.arange(64) % 3
    data = replace(toy_data(), train=replace(toy_split(64), labels=labels))
    with pytest.raises(UsageError, match="no score for each of at least 3 classes"):
        train(toy_model(), data, RECIPE, generator=seeded())


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A recipe on ten images per class and split, and the command that runs it."""
    from tdkit.cli.train import train as command

    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for part in ("train", "val", "test"):
        for label, low in (("dark", 0), ("bright", 120)):
            folder = tmp_path / "images" / part / label
            folder.mkdir(parents=True)
            for number in range(10):
                pixels = random.integers(low, low + 120, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    (tmp_path / "small.toml").write_text(
        'model = "garipov"\ndata = "image-folder:images"\nseed = 1\nepochs = 2\n'
        'batch_size = 10\noutput = "small.safetensors"\n'
        '[optimizer]\nname = "sgd"\nlearning_rate = 0.05\n'
    )
    app = typer.Typer()
    app.command()(command)

    def run(*arguments: str):
        return CliRunner().invoke(app, ["small.toml", "--device", "cpu", *arguments])

    return run


def test_the_command_writes_weights_and_how_they_were_made(project, tmp_path):
    done = project()
    assert done.exit_code == 0, done.exception
    lines = done.output.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["epoch", "1/2"], ["epoch", "2/2"]]
    assert "validation" in lines[0]
    assert "left" in lines[0]
    assert "accuracy on 20 test images" in done.output
    made = json.loads((tmp_path / "small.json").read_text())
    assert made["recipe"] == (tmp_path / "small.toml").read_text()
    assert (made["seed"], made["test_images"]) == (1, 20)
    assert made["torch"] == torch.__version__
    assert len(made["validation_accuracy"]) == 2
    from tdkit.datasets import image_folder
    from tdkit.models import garipov

    model = garipov.create(3, 2)
    model.load_state_dict(safetensors.torch.load_file(tmp_path / "small.safetensors"))
    data = image_folder.create(path=str(tmp_path / "images"), image_size=28)
    assert evaluate(model, data.test).accuracy == made["test_accuracy"]


def test_the_command_can_be_resumed_and_repeats_itself(project, tmp_path):
    assert project("--resume", "state.pt").exit_code == 0
    weights = safetensors.torch.load_file(tmp_path / "small.safetensors")
    again = project("--resume", "state.pt", "-o", "again.safetensors")
    assert "epoch" not in again.output
    assert equal(weights, safetensors.torch.load_file(tmp_path / "again.safetensors"))
    assert project("--force").exit_code == 0
    assert equal(weights, safetensors.torch.load_file(tmp_path / "small.safetensors"))


def test_the_command_never_replaces_a_file_without_force(project, tmp_path):
    (tmp_path / "small.json").write_text("mine")
    done = project()
    assert isinstance(done.exception, StorageError)
    assert (tmp_path / "small.json").read_text() == "mine"
    assert not (tmp_path / "small.safetensors").exists()
    assert "epoch" not in done.output


def test_the_command_refuses_a_state_of_another_recipe(project, tmp_path):
    assert project("--resume", "state.pt").exit_code == 0
    recipe = tmp_path / "small.toml"
    recipe.write_text(recipe.read_text().replace("0.05", "0.06"))
    done = project("--resume", "state.pt", "--force")
    assert isinstance(done.exception, UsageError)
    assert "belongs to another recipe" in str(done.exception)


def test_the_command_refuses_a_damaged_state(project, tmp_path):
    (tmp_path / "state.pt").write_text("no state")
    done = project("--resume", "state.pt")
    assert isinstance(done.exception, UnreadableFileError)
    assert "state.pt is not a state" in str(done.exception)


def test_the_command_wants_a_safetensors_output(project):
    done = project("-o", "weights.pt")
    assert isinstance(done.exception, UsageError)
    assert "weights.pt does not end in .safetensors" in str(done.exception)
