from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from tdkit.errors import UnreadableFileError, UsageError
from tdkit.recipes import BUNDLED, find_recipe, load_recipe, parse_recipe
from tdkit.training.recipe import FitRecipe, OptimizerRecipe, ScheduleRecipe, TrainRecipe

TEXT = """
model = "garipov"
data = "fashion-mnist"
seed = 3
epochs = 2
batch_size = 64
patience = 5
output = "out.safetensors"

[optimizer]
name = "sgd"
learning_rate = 1
nesterov = true

[schedule]
name = "multistep"
milestones = [1, 2]
"""


def parse(text: str) -> TrainRecipe:
    return parse_recipe(text, TrainRecipe, "some.toml")


def test_every_value_arrives_with_its_type(tmp_path):
    file = tmp_path / "some.toml"
    file.write_text(TEXT, encoding="utf-8")
    assert load_recipe(file, TrainRecipe) == TrainRecipe(
        model="garipov",
        data="fashion-mnist",
        seed=3,
        epochs=2,
        batch_size=64,
        patience=5,
        output="out.safetensors",
        optimizer=OptimizerRecipe("sgd", 1.0, nesterov=True),
        schedule=ScheduleRecipe("multistep", milestones=(1, 2)),
    )
    assert type(parse(TEXT).optimizer.learning_rate) is float


def test_what_is_left_out_has_its_default():
    recipe = parse_recipe(
        'epochs = 1\nbatch_size = 2\n[optimizer]\nname = "adam"\nlearning_rate = 0.1',
        FitRecipe,
        "fit.toml",
    )
    assert recipe.schedule == ScheduleRecipe("constant")
    assert recipe.patience is None
    assert (recipe.autocast, recipe.channels_last) == ("none", False)


@pytest.mark.parametrize(
    ("old", "new", "message", "hint"),
    [
        ("epochs =", "epoch =", "some.toml: unknown key epoch", "epochs"),
        ("nesterov", "nestorov", "some.toml: unknown key optimizer.nestorov", "nesterov"),
        ("epochs = 2", "", "some.toml: the key epochs is missing", "an integer"),
        ("learning_rate = 1", "", "the key optimizer.learning_rate is missing", "a number"),
        ("epochs = 2", 'epochs = "2"', "epochs must be an integer, not '2'", None),
        ("epochs = 2", "epochs = true", "epochs must be an integer, not True", None),
        ("epochs = 2", "epochs = 2.0", "epochs must be an integer, not 2.0", None),
        ("nesterov = true", "nesterov = 1", "nesterov must be true or false, not 1", None),
        ("rate = 1", "rate = true", "learning_rate must be a number, not True", None),
        ("[1, 2]", "[1, 'b']", "schedule.milestones must be an integer, not 'b'", None),
        ("[1, 2]", "1", "schedule.milestones must be a list, not 1", None),
        ('"sgd"', '"sdg"', "optimizer.name must be one of sgd, adam, adamw", "sgd"),
        ('"sgd"', "[]", r"optimizer.name must be one of sgd, adam, adamw, not \[\]", "Possible"),
        ("epochs = 2", "epochs = 0", "some.toml: epochs must be at least 1, not 0", None),
        ("size = 64", "size = 1", "batch_size must be at least 2", None),
        ("patience = 5", "patience = 0", "patience must be at least 1", None),
        ("rate = 1", "rate = 0", "some.toml: optimizer.learning_rate must be above 0", None),
        (
            "rate = 1",
            "rate = nan",
            "optimizer.learning_rate must be a finite number, not nan",
            None,
        ),
        (
            "rate = 1",
            "rate = inf",
            "optimizer.learning_rate must be a finite number, not inf",
            None,
        ),
        ("[1, 2]", "[]", "schedule.milestones must not be empty", None),
        ("true", "true\nmomentum = 0", "optimizer.nesterov needs a momentum", None),
        (".safetensors", ".pt", "output must be a name in .safetensors", None),
        ("seed = 3", "seed = -1", "seed must be at least 0", None),
        ("[schedule]", "[schedule", "some.toml is not valid TOML", None),
    ],
)
def test_a_wrong_recipe_names_file_key_and_remedy(old, new, message, hint):
    assert old in TEXT
    with pytest.raises(UsageError, match=message) as caught:
        parse(TEXT.replace(old, new))
    if hint is not None:
        assert hint in caught.value.hint


def test_a_table_in_place_of_a_value_is_refused():
    with pytest.raises(UsageError, match="optimizer must be a table, not 'sgd'"):
        parse(TEXT.partition("[optimizer]")[0] + 'optimizer = "sgd"')


def test_a_missing_file_is_unreadable(tmp_path):
    with pytest.raises(UnreadableFileError, match=r"none\.toml cannot be read"):
        load_recipe(tmp_path / "none.toml", TrainRecipe)


def test_a_binary_file_is_unreadable(tmp_path):
    file = tmp_path / "binary.toml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UnreadableFileError, match="cannot be read"):
        load_recipe(file, TrainRecipe)


def test_any_dataclass_can_be_a_recipe():
    @dataclass(frozen=True)
    class Study:
        layers: tuple[str, ...]
        kind: Literal["a", "b"] = "a"
        limit: int | None = None

    assert parse_recipe('layers = ["x"]', Study, "s") == Study(("x",))
    assert parse_recipe('layers = []\nkind = "b"\nlimit = 4', Study, "s") == Study((), "b", 4)


def test_a_name_is_of_a_recipe_here_before_one_that_comes_with_tdkit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick.toml").touch()
    assert find_recipe("quick") == BUNDLED / "quick.toml"
    assert find_recipe("quick.toml") == Path("quick.toml")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "quick.toml").touch()
    assert find_recipe("quick") == Path("recipes/quick.toml")
    with pytest.raises(UsageError, match="no recipe, and no file, named 'quik'") as caught:
        find_recipe("quik")
    assert caught.value.hint == "close names: quick"


RECIPES = sorted(Path(__file__).parent.parent.glob("recipes/*.toml"))
TRAININGS = [file for file in RECIPES if "output =" in file.read_text(encoding="utf-8")]


@pytest.mark.parametrize("file", TRAININGS, ids=lambda file: file.stem)
def test_the_shipped_recipe_is_valid(file):
    recipe = load_recipe(file, TrainRecipe)
    assert recipe.output == file.with_suffix(".safetensors").name
