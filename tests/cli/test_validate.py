"""``tdkit validate``: studies of recipes and of one's own model, stopped and gone on with."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

from tdkit.datasets.base import in_memory_dataset
from tdkit.errors import StorageError
from tdkit.study.recipe import StudyRecipe, bundled_recipe
from tdkit.study.records import Measurement
from tdkit.study.store import read_results

ROOT = Path(__file__).parents[2]
RECIPE = """
title = "Two layers of a toy"
model = "toy.pt"
data = "toy-data"
layers = ["2", "4"]
numbers = [3, 5]
methods = ["cp", "tucker"]
keeps = [0.5, 0.25]
focus = [0.25]
runs = 2

[evaluation]
split = "test"
images = 40

[features]
split = "train"
images = 20

[[options]]
method = "cp"
start = "uniform"

[finetune]
epochs = 1
batch_size = 10
images = 20
keeps = [0.25]

[finetune.optimizer]
name = "sgd"
learning_rate = 0.01

[[published]]
stage = "before"
metric = "relative-weights"
mean = 0.5
std = 0.01
"""
BEFORE = 2 * (2 * 2 + 2)  # two layers, two keeps of cp in two runs and of tucker in one
AFTER = 2 * 2 * 2  # two layers, two methods, two runs at one keep


@pytest.fixture
def recipe(tmp_path, toy, toy_plugin) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(RECIPE)
    return path


def trials(folder):
    return [m.trial for m in read_results(folder).measurements]


def test_a_recipe_ends_in_a_report_and_a_summary(tdkit, recipe, tmp_path) -> None:
    done = tdkit("validate", "mine.toml")
    assert done.status == 0, done.stderr
    assert done.stdout.startswith("Two layers of a toy\n")
    assert "published" in done.stdout
    assert done.stdout.endswith("\nwrote runs/mine/report.html\n")
    folder = tmp_path / "runs" / "mine"
    assert "Two layers of a toy" in (folder / "report.html").read_text(encoding="utf-8")
    assert [*folder.glob("figures/*.svg")]
    assert [*folder.glob("tables/*.csv")]
    results = read_results(folder)
    assert len(results.measurements) == results.planned == BEFORE + AFTER
    assert not [m.failure for m in results.measurements if m.failure]
    done = tdkit("validate", "mine.toml", "--no-report", "--json")
    assert f"going on: {BEFORE + AFTER} of {BEFORE + AFTER} were measured before" in done.stderr
    value = json.loads(done.stdout)
    assert {key: value[key] for key in ("run", "report", "planned", "measured", "failed")} == {
        "run": "runs/mine",
        "report": None,
        "planned": BEFORE + AFTER,
        "measured": BEFORE + AFTER,
        "failed": 0,
    }
    assert value["analysis"]["title"] == "Two layers of a toy"
    assert len(value["analysis"]["points"]) > 0
    assert "NaN" not in done.stdout
    assert read_results(folder) == results


def test_fine_tuning_can_come_later(tdkit, recipe, tmp_path) -> None:
    arguments = ("validate", "mine.toml", "--no-report", "--run", "here")
    assert tdkit(*arguments, "--no-finetune").status == 0
    first = read_results(tmp_path / "here")
    assert len(first.measurements) == first.planned == BEFORE
    done = tdkit(*arguments)
    assert f"going on: {BEFORE} of {BEFORE + AFTER} were measured before" in done.stderr
    second = read_results(tmp_path / "here")
    assert second.measurements[:BEFORE] == first.measurements
    assert len(second.measurements) == BEFORE + AFTER


def test_options_change_the_recipe(tdkit, recipe, tmp_path) -> None:
    choice = ("--layers", "4", "--methods", "tucker,tt", "--keeps", "50%", "--images", "7")
    done = tdkit("validate", "mine.toml", "--no-finetune", "--no-report", "--runs", "1", *choice)
    assert done.status == 0, done.stderr
    results = read_results(tmp_path / "runs" / "mine")
    assert [(m.trial.layer, m.trial.method, m.trial.keep) for m in results.measurements] == [
        ("4", "tucker", 0.5),
        ("4", "tt", 0.5),
    ]
    assert {m.images for m in results.measurements} == {7}


@pytest.fixture
def folder_of_images(tmp_path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for part, names in (("labelled", ("cat", "dog")), ("plain", (".",))):
        for name in names:
            (tmp_path / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(6):
                image = torch.randint(0, 256, (3, 16, 16), generator=generator, dtype=torch.uint8)
                to_pil_image(image).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


OWN = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 16, 3, padding=1)
        self.wide = nn.Linear(16, 24)
        self.head = nn.Linear(24, 2)

    def forward(self, images):
        features = self.body(self.stem(images).relu()).relu().mean((2, 3))
        return self.head(self.wide(features).relu())

def create():
    return Net()
"""


def test_a_model_and_a_folder_of_ones_own(tdkit, folder_of_images, tmp_path, monkeypatch) -> None:
    (tmp_path / "own_net.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    import own_net  # type: ignore[import-not-found]

    torch.save(own_net.create().state_dict(), tmp_path / "mine.pt")
    own = ("--model", "mine.pt", "--arch", "own_net:create", "--input-shape", "3,16,16")
    done = tdkit("validate", *own, "--data", "image-folder:labelled", "--json")
    assert done.status == 0, done.stderr
    assert json.loads(done.stdout)["run"] == "runs/mine"
    results = read_results(tmp_path / "runs" / "mine")
    assert results.baseline.labelled
    assert results.baseline.images == 12
    found = {(m.trial.layer, m.trial.method) for m in results.measurements}
    # svd comes with the linear layer; the other methods do not support it.
    assert found == {("body", m) for m in ("cp", "tucker", "tt", "svd")} | {("wide", "svd")}
    assert {m.trial.keep for m in results.measurements} <= set(bundled_recipe().keeps)
    done = tdkit("validate", *own, "--data", "image-folder:plain", "--no-report")
    assert done.status == 2  # the same folder, other data
    assert "data: " in done.stderr
    assert "--fresh" in done.stderr
    done = tdkit("validate", *own, "--data", "image-folder:plain", "--no-report", "--fresh")
    assert done.status == 0, done.stderr
    assert "note: the old run is now in runs/mine-old-1" in done.stderr
    assert not read_results(tmp_path / "runs" / "mine").baseline.labelled
    assert read_results(tmp_path / "runs" / "mine-old-1") == results


def test_large_images_come_in_small_batches_unless_the_user_says_otherwise() -> None:
    from tdkit.registry import load_registry
    from tdkit.study.opening import Adaptation, make_workspace

    images = torch.zeros(60, 3, 224, 224, dtype=torch.uint8)
    part = images, torch.arange(60) % 2
    dataset = in_memory_dataset("large", ("a", "b"), part, part, 0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 2, 9, stride=9),
        torch.nn.Conv2d(2, 2, 3),
        torch.nn.Flatten(),
        torch.nn.Linear(2 * 22 * 22, 2),
    )
    recipe = replace(bundled_recipe(), layers=(), numbers=())
    for adaptation, size in (
        (Adaptation(), 50),
        (Adaptation(batches=True), 2**22 // (3 * 224 * 224)),
    ):
        found = make_workspace(
            recipe, model, dataset, load_registry(), adaptation=adaptation
        ).recipe
        assert (found.evaluation.batch_size, found.features.batch_size) == (size, size)


@pytest.mark.parametrize("views", [False, True])
def test_channels_come_last_unless_the_model_views_its_features(views) -> None:
    from dataclasses import replace

    from tdkit.datasets.base import in_memory_dataset
    from tdkit.registry import load_registry
    from tdkit.study.opening import make_workspace

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 4, 3)
            self.head = torch.nn.Linear(64, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.body(self.stem(x))
            return self.head(x.view(len(x), -1) if views else x.flatten(1))

    images = torch.zeros(60, 3, 8, 8, dtype=torch.uint8)
    part = images, torch.arange(60) % 2
    dataset = in_memory_dataset("small", ("a", "b"), part, part, 0)
    model = Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recipe = replace(bundled_recipe(), layers=(), numbers=())
    make_workspace(recipe, model, dataset, load_registry())
    assert model.body.weight.is_contiguous(memory_format=torch.channels_last) != views
    assert model.body.weight.is_contiguous() == views
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_recipe_on_other_data_claims_nothing_about_them() -> None:
    from tdkit.api.validate import _asked

    path = str(ROOT / "recipes" / "iclr2023-garipov-fashion-mnist.toml")
    own = _asked(path, None, None)
    assert own.recipe.published
    assert own.recipe.notes
    other = _asked(path, "my/net.pt", "image-folder:photos")
    assert (other.recipe.published, other.recipe.notes) == ((), ())
    title = "net on image-folder:photos, by the recipe iclr2023-garipov-fashion-mnist"
    assert other.recipe.title == title
    assert other.folder != own.folder


@pytest.mark.parametrize("name", ["quick", "iclr2023-garipov-fashion-mnist"])
def test_the_shipped_studies_are_known_by_name_anywhere(tdkit, name) -> None:
    done = tdkit("validate", name, "--layers", "conv9", "--data", "fashion-mnist-sample")
    assert done.status == 2
    assert "no layer named 'conv9'" in done.stderr


def test_a_bare_name_is_bundled_or_in_the_folder_recipes(tdkit, recipe, tmp_path) -> None:
    (tmp_path / "recipes").mkdir()
    recipe.rename(tmp_path / "recipes" / "mine.toml")
    done = tdkit("validate", "mine", "--no-finetune", "--no-report", "--keeps", "0.5")
    assert done.status == 0, done.stderr
    assert (tmp_path / "runs" / "mine").is_dir()
    done = tdkit("validate", "quik")
    assert done.status == 2
    assert "quick" in done.stderr


def test_stopped_and_gone_on_with(tdkit, recipe, tmp_path, monkeypatch) -> None:
    from tdkit.study import running

    real = running.measuring.measure
    calls: list[object] = []

    def stopping(workspace, chunk):
        calls.append(chunk)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return real(workspace, chunk)

    monkeypatch.setitem(running.run.__kwdefaults__, "measure", stopping)
    done = tdkit("validate", "mine.toml", "--no-report")
    stored = len(trials(tmp_path / "runs" / "mine"))
    assert 0 < stored < BEFORE + AFTER
    assert done.status == 130
    said = f"stopped; {stored} of {BEFORE + AFTER} measured; the same command goes on"
    assert done.stderr.splitlines()[-1] == said
    done = tdkit("validate", "mine.toml", "--no-report")
    assert done.status == 0, done.stderr
    assert len(trials(tmp_path / "runs" / "mine")) == BEFORE + AFTER
    again = [trial for chunk in calls for trial in chunk]
    assert len(again) == BEFORE + AFTER + len(calls[2])  # the unit that was interrupted


def test_two_workers(tdkit, recipe, tmp_path) -> None:
    options = ("--no-finetune", "--no-report", "--methods", "tucker")
    assert tdkit("validate", "mine.toml", *options, "--run", "one").status == 0
    done = tdkit("validate", "mine.toml", *options, "--run", "two", "--workers", "2")
    assert done.status == 0, done.stderr
    one, two = (read_results(tmp_path / name) for name in ("one", "two"))
    assert [(m.trial, m.correct, m.errors) for m in one.measurements] == [
        (m.trial, m.correct, m.errors) for m in two.measurements
    ]


def test_failed_candidates_are_told_and_tried_again_when_asked(
    tdkit, recipe, tmp_path, monkeypatch
) -> None:
    from tdkit.study import running

    real = running.measuring.measure

    def failing(workspace, chunk):
        return [
            Measurement(m.trial, failure="NaN logits") if m.trial.method == "cp" else m
            for m in real(workspace, chunk)
        ]

    arguments = ("validate", "mine.toml", "--no-finetune", "--no-report")
    with monkeypatch.context() as patch:
        patch.setitem(running.run.__kwdefaults__, "measure", failing)
        done = tdkit(*arguments)
    assert done.status == 0, done.stderr
    assert f"note: 8 of {BEFORE} failed; --retry-failed measures them again" in done.stderr
    assert "8 of" in tdkit(*arguments).stderr
    done = tdkit(*arguments, "--retry-failed")
    assert "failed" not in done.stderr
    folder = tmp_path / "runs" / "mine"
    assert not [m for m in read_results(folder).measurements if m.failure]


def test_measurements_of_another_version_of_a_plugin_are_refused(tdkit, recipe, install) -> None:
    source = (ROOT / "plugins/tdkit-spatial-svd/tdkit_spatial_svd.py").read_text()
    site = install("tdkit-mine", source.replace('"spatial-svd"', '"mine"'), version="1.2")
    mine = ("validate", "mine.toml", "--no-finetune", "--no-report", "--methods", "mine")
    assert tdkit(*mine).status == 0
    versions = read_results(Path("runs/mine")).identity["versions"]
    assert versions["tdkit-mine"] == "1.2"
    # The plugin whose data these are has their hash instead of a version.
    assert set(versions) == {"tdkit-mine", "tdkit", "torch"}
    metadata = site / "tdkit_mine-1.2.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("Version: 1.2", "Version: 1.3"))
    done = tdkit(*mine)
    assert done.status == 2
    assert "measurements of another study:\n  versions.tdkit-mine: 1.2 → 1.3\n" in done.stderr


def test_when_every_candidate_fails_there_is_no_report(
    tdkit, recipe, tmp_path, monkeypatch
) -> None:
    from tdkit.study import running

    def failing(workspace, chunk):
        return [Measurement(trial, failure="out of memory") for trial in chunk]

    monkeypatch.setitem(running.run.__kwdefaults__, "measure", failing)
    done = tdkit("validate", "mine.toml", "--no-finetune")
    assert done.status == 5
    assert "every candidate failed; the first one: out of memory" in done.stderr
    assert not (tmp_path / "runs" / "mine" / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("none.toml",), 4, "none.toml cannot be read"),
        (("mine.toml", "--model", "none.pt"), 4, "none.pt does not exist\nhint: check the path"),
        (("mine.toml", "--data", "toi-data"), 2, "toy-data"),
        (("mine.toml", "--methods", "tuker"), 2, "tucker"),
        (("mine.toml", "--methods", "svd,"), 0, None),
        (("mine.toml", "--keeps", "0.5,2"), 2, "--keeps '2' is not a fraction"),
        (("mine.toml", "--layers", "9"), 2, "no layer named '9'"),
        (("mine.toml", "--images", "0"), 2, "--images"),
        (("mine.toml", "--workers", "2", "--dask", "tcp://x:1"), 2, "exclude each other"),
        (("mine.toml", "--device", "tpu"), 2, "cpu, cuda or auto"),
        (("--model", "toy.pt"), 2, "--model needs images"),
        (("mine.toml", "--run", "toy.pt"), 6, "toy.pt"),
        (("mine.toml", "--run", "site", "--fresh"), 6, "is not a run folder"),
    ],
)
def test_bad_options(tdkit, recipe, tmp_path, arguments, status, says) -> None:
    if says is None:
        arguments = (*arguments, "--no-finetune", "--no-report")
    done = tdkit("validate", *arguments)
    assert done.status == status
    if says is not None:
        assert says in done.stderr
        assert done.stdout == ""
        assert not (tmp_path / "runs").exists()


def test_a_wrong_key_names_the_recipe(tdkit, recipe) -> None:
    recipe.write_text(RECIPE.replace("runs =", "rums ="))
    done = tdkit("validate", "mine.toml")
    assert done.status == 2
    assert "mine.toml: unknown key rums" in done.stderr
    assert "runs" in done.stderr


def test_a_model_that_the_recipe_names_and_that_has_to_be_made(tdkit, recipe) -> None:
    recipe.write_text(RECIPE.replace("toy.pt", "untrained.pt"))
    done = tdkit("validate", "mine.toml")
    assert done.status == 4
    assert "untrained.pt does not exist\nhint: the head of the recipe says how" in done.stderr


def test_a_setting_that_a_method_does_not_have(tdkit, recipe) -> None:
    recipe.write_text(RECIPE + '\n[[options]]\nmethod = "tucker"\nridge = 1.0\n')
    done = tdkit("validate", "mine.toml")
    assert done.status == 2
    message, hint = done.stderr.splitlines()
    assert message == "error: tucker has no setting 'ridge'"
    assert hint == "hint: it has sweeps, tolerance"


def test_a_full_disk_has_its_status(tdkit, recipe, monkeypatch) -> None:
    def full(self, measurements):
        raise StorageError("there is no room left in runs/mine", "free some space")

    monkeypatch.setattr("tdkit.study.store.Store.add", full)
    done = tdkit("validate", "mine.toml", "--no-report")
    assert done.status == 6
    assert "no room left" in done.stderr


def test_the_python_function_gives_the_same(tdkit, recipe, tmp_path) -> None:
    import tdkit as library

    options = ("--no-finetune", "--no-report", "--methods", "tucker", "--keeps", "0.5,0.25")
    done = tdkit("validate", "--model", "toy.pt", "--data", "toy-data", *options)
    assert done.status == 0, done.stderr
    printed = read_results(tmp_path / "runs" / "toy")
    model = torch.load(tmp_path / "toy.pt", weights_only=False).train()
    choice = {"methods": ["tucker"], "keeps": [0.5, 0.25]}
    named = library.validate("toy.pt", "toy-data", run=tmp_path / "named", **choice)
    kept = library.validate(model, "toy-data", **choice)
    assert model.training
    outcomes = [
        [(m.trial, m.correct, m.errors) for m in results.measurements]
        for results in (printed, named.results, kept.results)
    ]
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert named.results.identity == printed.identity == kept.results.identity
    assert read_results(tmp_path / "named") == named.results
    assert (named.folder, kept.folder, kept.report) == (tmp_path / "named", None, None)
    # What the command prints first is what the record prints.
    assert done.stdout.split()[: len(str(named).split())] == str(named).split()
    study = StudyRecipe(
        title="t", model="-", data="-", methods=("tucker",), keeps=(0.5,), layers=("4",)
    )
    own = library.validate(model, "toy-data", recipe=study, images=9)
    assert [(m.trial.layer, m.images) for m in own.results.measurements] == [("4", 9)]
