"""With which settings a model is fine-tuned, by what is known of its training."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from tdkit.checkpoint.states import find_optimizer
from tdkit.errors import UsageError
from tdkit.training.settings import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_RATES,
    FinetuneSettings,
    after_finetuning,
    finetune_recipe,
    split_seed,
)

RECIPE = """
model = "garipov"
data = "fashion-mnist"
seed = 3
epochs = 100
batch_size = 64
label_smoothing = 0.1
channels_last = true
autocast = "bfloat16"
output = "weights.safetensors"

[optimizer]
name = "sgd"
learning_rate = 0.1
nesterov = true
weight_decay = 5e-4

[schedule]
"""
PAPER = RECIPE + 'name = "multistep"\nmilestones = [30, 60, 90]\n'
ONE_CYCLE = RECIPE + 'name = "one-cycle"\n'


@pytest.mark.parametrize(
    ("text", "rate", "says"),
    [
        (PAPER, 1e-4, "the last one of its training"),
        (ONE_CYCLE, 1e-3, "a hundredth of the highest of its training"),
    ],
)
def test_fine_tuning_goes_on_as_the_training_ended(text, rate, says) -> None:
    recipe, reason = finetune_recipe({"recipe": text}, FinetuneSettings(7, patience=2))
    assert recipe.optimizer.learning_rate == pytest.approx(rate)
    assert reason.startswith(says)
    assert (recipe.optimizer.name, recipe.optimizer.momentum) == ("sgd", 0.9)
    assert (recipe.optimizer.nesterov, recipe.optimizer.weight_decay) == (True, 5e-4)
    assert (recipe.batch_size, recipe.label_smoothing, recipe.channels_last) == (64, 0.1, True)
    # These belong to a training from scratch, or to the machine it ran on.
    assert (recipe.epochs, recipe.patience) == (7, 2)
    assert (recipe.schedule.name, recipe.autocast) == ("constant", "none")


@pytest.mark.parametrize("training", [None, {}, {"recipe": "no recipe ["}, {"optimizer": {}}])
def test_without_a_training_there_are_defaults(training) -> None:
    recipe, reason = finetune_recipe(training, FinetuneSettings(1))
    assert (recipe.optimizer.name, recipe.optimizer.learning_rate) == ("sgd", 1e-3)
    assert recipe.batch_size == DEFAULT_BATCH_SIZE
    assert reason == "the default for sgd: nothing is known about the training of the model"


def test_another_optimizer_has_a_rate_of_its_own() -> None:
    recipe, reason = finetune_recipe({"recipe": PAPER}, FinetuneSettings(1, optimizer="adamw"))
    assert recipe.optimizer.learning_rate == DEFAULT_RATES["adamw"]
    assert recipe.batch_size == 64
    assert reason == "the default for adamw: the model was trained with sgd"
    recipe, _ = finetune_recipe({"recipe": PAPER}, FinetuneSettings(1, optimizer="sgd"))
    assert recipe.optimizer.learning_rate == pytest.approx(1e-4)


def test_what_the_user_says_comes_first() -> None:
    settings = FinetuneSettings(1, learning_rate=0.02, batch_size=5, autocast="bfloat16")
    recipe, reason = finetune_recipe({"recipe": PAPER}, settings)
    assert (recipe.optimizer.learning_rate, recipe.optimizer.weight_decay) == (0.02, 5e-4)
    assert (recipe.batch_size, recipe.autocast, reason) == (5, "bfloat16", "as asked for")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"optimizer": "rmsprop"}, "unknown optimizer 'rmsprop'"),
        ({"autocast": "float16"}, "unknown precision 'float16'"),
        ({"learning_rate": -1.0}, "learning_rate must be above 0"),
        ({"learning_rate": math.inf}, "learning_rate must be a finite number, not inf"),
        ({"learning_rate": math.nan}, "learning_rate must be a finite number, not nan"),
        ({"batch_size": 1}, "batch_size must be at least 2"),
        ({"patience": 0}, "patience must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(options, says) -> None:
    with pytest.raises(UsageError, match=says):
        finetune_recipe(None, FinetuneSettings(1, **options))


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.1, momentum=0.8, nesterov=True, weight_decay=0.01)


SCHEDULERS = torch.optim.lr_scheduler
ENDS = {
    "constant": (lambda o: SCHEDULERS.ConstantLR(o, 1.0), 0.1),
    "multistep": (lambda o: SCHEDULERS.MultiStepLR(o, [4, 8]), 1e-3),
    "one-cycle": (lambda o: SCHEDULERS.OneCycleLR(o, 0.3, total_steps=11), 3e-3),
    "cosine": (lambda o: SCHEDULERS.CosineAnnealingLR(o, 9, eta_min=1e-9), 1e-3),
}


@pytest.mark.parametrize("schedule", ENDS)
def test_the_state_of_a_torch_optimizer_tells_the_last_rate(schedule) -> None:
    create, expected = ENDS[schedule]
    optimizer = sgd([nn.Parameter(torch.ones(2))])
    scheduler = create(optimizer)
    for _ in range(9 if schedule == "cosine" else 10):
        optimizer.step()
        scheduler.step()
    checkpoint = {"epoch": 10, "state_dict": {}, "optimizer": optimizer.state_dict()}
    recipe, reason = finetune_recipe({"optimizer": find_optimizer(checkpoint)}, FinetuneSettings(1))
    assert recipe.optimizer.learning_rate == pytest.approx(expected)
    assert ("near zero" in reason) == (schedule in ("one-cycle", "cosine"))
    # One-cycle moves the momentum, too.
    assert recipe.optimizer.momentum == optimizer.param_groups[0]["momentum"]
    assert (recipe.optimizer.nesterov, recipe.optimizer.weight_decay) == (True, 0.01)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        (torch.optim.SGD, "sgd"),
        (torch.optim.Adam, "adam"),
        (torch.optim.AdamW, "adamw"),
        (torch.optim.RMSprop, None),
        (torch.optim.Adagrad, None),
    ],
)
def test_the_optimizer_is_known_by_its_settings(family, name) -> None:
    optimizer = family([nn.Parameter(torch.ones(2))], lr=0.02)
    # As Lightning keeps it.
    found = find_optimizer({"state_dict": {}, "optimizer_states": [optimizer.state_dict()]})
    recipe, _ = finetune_recipe({"optimizer": found}, FinetuneSettings(1))
    assert recipe.optimizer.name == (name or "sgd")
    assert recipe.optimizer.learning_rate == (0.02 if name else DEFAULT_RATES["sgd"])


def test_of_several_groups_the_slowest_that_moves_counts() -> None:
    first, second, third = (nn.Parameter(torch.ones(2)) for _ in range(3))
    groups: list[dict[str, Any]] = [
        {"params": [first], "lr": 0.5},
        {"params": [second], "lr": 0.0},
        {"params": [third], "lr": 0.25},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    found = find_optimizer({"optimizer": optimizer.state_dict()})
    assert found is not None
    assert found["lr"] == 0.25


@pytest.mark.parametrize(
    "checkpoint",
    [
        None,
        {},
        {"optimizer": None},
        {"optimizer": {"param_groups": None}},
        {"optimizer": {"param_groups": [None, [], {}]}},
        {"optimizer": {"param_groups": [{"lr": "0.1"}, {"lr": None}]}},
        {"optimizer": {"param_groups": [{"lr": math.nan}, {"lr": -1.0}, {"lr": 10**400}]}},
        {"optimizer": {"param_groups": [{"lr": torch.tensor(0.1)}, {0: 0.1}]}},
    ],
)
def test_what_is_no_optimizer_tells_nothing(checkpoint) -> None:
    assert find_optimizer(checkpoint) is None


ODD = ("", "sgd", "adam", "epochs = 1", [], [0.1], {}, {"lr": 0.1}, 10**400, 1e-3, 0.9)
JSON = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(ODD)
SETTINGS = st.dictionaries(
    st.sampled_from(["name", "lr", "initial_lr", "max_lr", "momentum", "nesterov", "dampening"]),
    JSON,
)


@given(st.fixed_dictionaries({}, optional={"recipe": JSON, "optimizer": SETTINGS | JSON}))
@example({"optimizer": {"name": "sgd", "lr": math.inf}})
@example({"optimizer": {"name": "sgd", "lr": 0.1, "max_lr": math.inf}})
def test_whatever_a_file_says_ends_in_a_recipe(training) -> None:
    recipe, reason = finetune_recipe(training, FinetuneSettings(1))
    assert 0 < recipe.optimizer.learning_rate < math.inf
    assert reason
    assert split_seed(training, 5) == 5


def test_after_a_fine_tuning_the_next_one_goes_on_from_it() -> None:
    settings = FinetuneSettings(1, learning_rate=0.02, optimizer="adam")
    training: dict[str, Any] = {"recipe": PAPER}
    recipe, _ = finetune_recipe(training, settings)
    known = json.loads(json.dumps(after_finetuning(training, recipe)))
    again, reason = finetune_recipe(known, FinetuneSettings(1))
    assert again == recipe
    assert reason == "the last one of its training"
    assert split_seed(known, 0) == 3
    assert after_finetuning(None, recipe)["optimizer"]["lr"] == 0.02


def test_the_validation_split_is_the_trainings() -> None:
    assert split_seed({"recipe": PAPER}, 0) == 3
    assert split_seed(None, 8) == 8


def test_the_bundled_model_tells_its_training() -> None:
    from tdkit.checkpoint import load_model
    from tdkit.registry import load_registry

    models = load_registry().models
    recipe, _ = finetune_recipe(load_model("garipov", models=models).training, FinetuneSettings(1))
    assert recipe.optimizer.learning_rate == pytest.approx(1e-3)
    assert load_model("garipov", models=models, weights="none").training is None
