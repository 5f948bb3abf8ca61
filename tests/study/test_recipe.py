"""Studies as TOML: what may stand there, and what the shipped ones say of the paper."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_study
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tdkit.decompositions.base import as_tuple
from tdkit.decompositions.settings import settings_of
from tdkit.errors import UsageError
from tdkit.recipes import BUNDLED, load_recipe, parse_recipe
from tdkit.registry import load_registry
from tdkit.study.opening import make_workspace
from tdkit.study.recipe import (
    METRICS,
    FinetuneRecipe,
    ImagesRecipe,
    MethodRecipe,
    PublishedRecipe,
    RankRecipe,
    StudyRecipe,
    adapted,
    bundled_recipe,
    own_study,
    to_toml,
)
from tdkit.study.store import read_results
from tdkit.study.trials import identity, plan_trials
from tdkit.training.loop import last_learning_rate
from tdkit.training.recipe import OptimizerRecipe, ScheduleRecipe, TrainRecipe

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(BUNDLED.glob("*.toml"))
STUDIES = [file for file in SHIPPED if "output =" not in file.read_text(encoding="utf-8")]

TEXT = """
title = "A study"
model = "garipov"
data = "fashion-mnist"
layers = ["conv2", "conv3"]
numbers = [2, 4]
methods = ["cp", "tucker"]
keeps = [0.5, 0.25]
focus = [0.25]
metrics = ["relative-weights", "relative-features"]
runs = 3
seed = 7

[evaluation]
split = "test"
images = 100

[features]
split = "train"
images = 50

[[ranks]]
layer = "conv2"
method = "tucker"
keep = 0.5
rank = [12, 12]

[[options]]
method = "cp"
sweeps = 10

[finetune]
epochs = 2
batch_size = 16
images = 30
keeps = [0.25]

[finetune.optimizer]
name = "sgd"
learning_rate = 0.1

[[published]]
stage = "before"
metric = "relative-weights"
mean = 0.5
std = 0.1
"""


def parse(text: str) -> StudyRecipe:
    return parse_recipe(text, StudyRecipe, "some.toml")


class TestValidation:
    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("runs = 3", "run = 3", "unknown key run"),
            ("runs = 3", "runs = 0", "runs must be at least 1, not 0"),
            ("seed = 7", "seed = -1", "seed must be at least 0 and below"),
            ("seed = 7", f"seed = {2**63 - 1}", "seed must be at least 0 and below"),
            ('title = "A study"', 'title = " "', "title must be not empty, not ' '"),
            ('"garipov"', '""', "model must be not empty"),
            ('"fashion-mnist"', '""', "data must be not empty"),
            ('["cp", "tucker"]', "[]", "methods must be at least one value"),
            ('["cp", "tucker"]', '["cp", "tucker", "cp"]', "methods names 'cp' twice"),
            (
                "keeps = [0.5, 0.25]",
                "keeps = [0.5, 0.25, 1.5]",
                "keeps must be above 0 and at most",
            ),
            (
                "keeps = [0.5, 0.25]",
                "keeps = [0.5, 0.25, 0]",
                "keeps must be above 0 and at most 1",
            ),
            ("keeps = [0.5, 0.25]", "keeps = [0.5, 0.25, 0.5]", "keeps names 0.5 twice"),
            ("keeps = [0.5, 0.25]", "keeps = ['half']", "keeps must be a number, not 'half'"),
            (
                "focus = [0.25]",
                "focus = [0.3]",
                "focus must be one of the keeps 0.5, 0.25",
            ),
            ("focus = [0.25]", "focus = [0.25, 0.25]", "focus names 0.25 twice"),
            ('["conv2", "conv3"]', '["conv2", "conv2"]', "layers names 'conv2' twice"),
            ("numbers = [2, 4]", "numbers = [2]", r"numbers must be one for each of the 2 layers"),
            ('"conv3"]', '"conv*"]', "layers must be full names where there are numbers"),
            ("seed = 7", "seed = 7\nrank_rule = 'worst'", "rank_rule must be one of proportional"),
            (', "relative-features"]', ', "relative-weights"]', "metrics names 'relative-weights'"),
            ('split = "test"', 'split = "tset"', r"evaluation\.split must be one of train, valid"),
            ("images = 100", "images = 0", r"evaluation\.images must be at least 1, not 0"),
            ("images = 100", "batch_size = 0", r"evaluation\.batch_size must be at least 1"),
            ("images = 50", "images = -1", r"features\.images must be at least 1, not -1"),
            (
                "rank = [12, 12]",
                "rank = []",
                r"ranks\.rank must be one or more numbers",
            ),
            ("rank = [12, 12]", "rank = [12, 0]", r"ranks\.rank must be one or more numbers"),
            ("keep = 0.5", "keep = 0.75", r"ranks\.keep must be one of the keeps 0\.5, 0\.25"),
            ("keep = 0.5", "keep = 2", r"ranks\.keep must be above 0 and at most 1, not 2"),
            ('"tucker"\nkeep', '"tt"\nkeep', r"ranks\.method must be one of cp, tucker, not 'tt'"),
            ("sweeps = 10", "sweeps = [10]", r"options\.sweeps must be a number, a string, true"),
            ('method = "cp"\nsweeps', "sweeps", r"the key options\.method is missing"),
            ('"cp"\nsweeps', '"tt"\nsweeps', r"options\.method must be one of cp, tucker"),
            ("images = 30", "images = 1", r"finetune\.images must be at least 2, not 1"),
            ("keeps = [0.25]", "keeps = [0.75]", r"finetune\.keeps must be one of the keeps"),
            ("keeps = [0.25]", "keeps = []", r"finetune\.keeps must be at least one value"),
            ("epochs = 2", "epochs = 0", r"finetune\.epochs must be at least 1"),
            ("batch_size = 16", "batch_size = 1", r"finetune\.batch_size must be at least 2"),
            ('stage = "before"', 'stage = "during"', r"published\.stage must be one of before"),
            ("mean = 0.5", "mean = 1.5", r"published\.mean must be from -1 to 1, not 1\.5"),
            ("std = 0.1", "std = -0.1", r"published\.std must be at least 0, not -0\.1"),
            (
                '"relative-weights"\nmean',
                '"weights"\nmean',
                r"published\.metric must be one of relative-weights, relative-features",
            ),
        ],
    )
    def test_a_wrong_value_is_named_with_the_file(self, old, new, message) -> None:
        assert TEXT.count(old) == 1
        with pytest.raises(UsageError, match=f"some.toml: {message}"):
            parse(TEXT.replace(old, new))

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            ("ranks", r"ranks names \('conv2', 'tucker', 0\.5\) twice"),
            ("options", r"options\.method names 'cp' twice"),
            ("published", r"published names \('before', 'relative-weights'\) twice"),
        ],
    )
    def test_a_table_that_stands_there_twice(self, table, message) -> None:
        start = TEXT.index(f"[[{table}]]")
        end = TEXT.find("\n[", start)
        with pytest.raises(UsageError, match=message):
            parse(TEXT + TEXT[start : end if end > 0 else None])

    def test_what_is_left_out_has_its_default(self) -> None:
        recipe = parse("title='t'\nmodel='m'\ndata='d'\nmethods=['cp']\nkeeps=[1]")
        assert recipe == StudyRecipe(
            title="t", model="m", data="d", methods=("cp",), keeps=(1.0,), metrics=METRICS
        )
        assert recipe.evaluation == ImagesRecipe("test")
        assert recipe.finetune is None

    def test_settings_of_methods_are_for_whoever_opens_the_study_to_check(self) -> None:
        recipe = parse(TEXT.replace("sweeps = 10", "swoops = -1"))
        assert recipe.options == (MethodRecipe("cp", swoops=-1),)
        with pytest.raises(UsageError, match=r"^cp has no setting 'swoops'$") as caught:
            methods_of(recipe)
        assert caught.value.hint == "it has sweeps, tolerance, ridge, start"

    def test_settings_are_those_that_are_given(self) -> None:
        given = {"sweeps": 0, "ridge": 1e-5, "start": "uniform"}
        assert MethodRecipe("cp", **given).settings == given
        assert MethodRecipe("cp").settings == {}


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)
keep_sets = st.lists(st.floats(1e-6, 1), min_size=1, max_size=4, unique=True).map(tuple)
optimizers = st.builds(
    OptimizerRecipe,
    name=st.sampled_from(["sgd", "adam"]),
    learning_rate=st.floats(1e-9, 10),
    momentum=st.floats(0.1, 0.99),
    nesterov=st.booleans(),
)


@st.composite
def recipes(draw) -> StudyRecipe:
    keeps = draw(keep_sets)
    methods = draw(st.lists(texts, min_size=1, max_size=3, unique=True).map(tuple))
    some = st.lists(st.sampled_from(keeps), min_size=1, unique=True).map(tuple)
    ranks = st.builds(
        RankRecipe,
        layer=texts,
        method=st.sampled_from(methods),
        keep=st.sampled_from(keeps),
        rank=st.lists(st.integers(1, 99), min_size=1, max_size=3).map(tuple),
    )
    finetunes = st.builds(
        FinetuneRecipe,
        epochs=st.integers(1, 9),
        batch_size=st.integers(2, 99),
        optimizer=optimizers,
        schedule=st.sampled_from(
            [ScheduleRecipe(), ScheduleRecipe("multistep", milestones=(1, 2), factor=0.5)]
        ),
        channels_last=st.booleans(),
        images=st.none() | st.integers(2, 99),
        keeps=st.none() | some,
    )
    return StudyRecipe(
        title=draw(texts),
        model=draw(texts),
        data=draw(texts),
        methods=methods,
        keeps=keeps,
        weights=draw(st.none() | texts),
        layers=draw(st.lists(texts, max_size=3, unique=True).map(tuple)),
        focus=draw(st.just(()) | some),
        runs=draw(st.integers(1, 9)),
        seed=draw(st.integers(0, 2**62)),
        evaluation=ImagesRecipe("validation", draw(st.none() | st.integers(1, 99))),
        ranks=tuple(
            draw(st.lists(ranks, max_size=3, unique_by=lambda r: (r.layer, r.method, r.keep)))
        ),
        options=tuple(MethodRecipe(m, tolerance=draw(st.floats(0, 1))) for m in methods[:1]),
        finetune=draw(st.none() | finetunes),
        published=draw(
            st.just(()) | st.just((PublishedRecipe("after", "scaled-weights", -0.058, 0.01),))
        ),
        notes=draw(st.lists(st.text(st.characters(exclude_categories=["Cs"]))).map(tuple)),
    )


@given(recipes())
@settings(max_examples=60, deadline=None)
def test_what_is_written_reads_as_the_same(recipe) -> None:
    assert parse(to_toml(recipe)) == recipe


class TestAdapted:
    def test_nothing_changes_nothing(self) -> None:
        recipe = parse(TEXT)
        assert adapted(recipe) == recipe
        same = adapted(
            recipe, layers=recipe.layers, methods=recipe.methods, keeps=recipe.keeps, runs=3
        )
        assert same == recipe

    def test_what_is_said_of_things_that_are_gone_goes_with_them(self) -> None:
        recipe = parse(TEXT)
        keeps = adapted(recipe, keeps=(0.5, 0.1))
        assert (keeps.keeps, keeps.focus, keeps.ranks) == ((0.5, 0.1), (), recipe.ranks)
        assert keeps.finetune is None  # nobody asked for these keeps to be fine-tuned
        assert keeps.published == ()
        assert keeps.numbers == (2, 4)
        methods = adapted(recipe, methods=("tucker", "tt"))
        assert (methods.options, methods.ranks) == ((), recipe.ranks)
        assert adapted(recipe, methods=("cp",)).ranks == ()
        layers = adapted(recipe, layers=("conv3",))
        assert (layers.layers, layers.numbers, layers.ranks) == (("conv3",), (), ())

    def test_images_and_runs_leave_the_choices_alone(self) -> None:
        recipe = parse(TEXT)
        other = adapted(recipe, images=7, runs=1)
        assert other == replace(recipe, evaluation=ImagesRecipe("test", 7), runs=1)

    def test_a_wrong_value_is_refused(self) -> None:
        with pytest.raises(UsageError, match="keeps must be above 0 and at most 1, not"):
            adapted(parse(TEXT), keeps=(1.5,))

    def test_a_study_of_ones_own_says_nothing_of_another_model(self) -> None:
        own = own_study(parse(TEXT), "mine.pt", "image-folder:val", "mine")
        assert (own.model, own.data, own.title) == ("mine.pt", "image-folder:val", "mine")
        said = (own.layers, own.numbers, own.ranks, own.published, own.notes)
        assert said == ((),) * 5
        assert (own.methods, own.keeps, own.runs) == (("cp", "tucker"), (0.5, 0.25), 3)


# Tables 2 and 3 of the paper: for each layer CP, Tucker (out, in) and TT (inner ranks) at the keeps
# 0.1, 0.25, 0.5, 0.75 and 0.9.
KEEPS = (0.1, 0.25, 0.5, 0.75, 0.9)
_64_CP = (28, 69, 138, 206, 248)
_64_TUCKER = (14, 26, 39, 49, 54)
_128_CP, _128_TUCKER = (37, 93, 186, 279, 335), ((26, 13), (49, 24), (74, 37), (94, 47), (105, 52))
_128 = (
    (56, 141, 281, 422, 507),
    (29, 51, 77, 98, 108),
    ((94, 4, 12), (128, 21, 63), (128, 53, 128), (128, 101, 128), (128, 130, 128)),
)
_256 = (
    (114, 285, 569, 854, 1025),
    (57, 103, 155, 195, 216),
    ((207, 5, 15), (256, 43, 129), (256, 107, 256), (256, 203, 256), (256, 262, 256)),
)
_512 = (
    (229, 573, 1145, 1718, 2062),
    (115, 205, 310, 390, 432),
    ((425, 5, 15), (512, 85, 255), (512, 213, 512), (512, 401, 512), (512, 526, 512)),
)
TABLE_2 = {
    2: (
        _64_CP,
        _64_TUCKER,
        ((40, 4, 12), (64, 11, 33), (64, 27, 64), (64, 51, 64), (64, 65, 64)),
    ),
    4: (
        _128_CP,
        _128_TUCKER,
        ((63, 6, 18), (64, 19, 57), (64, 36, 108), (64, 60, 128), (64, 80, 128)),
    ),
    6: _128,
    8: _128,
    10: _128,
}
TABLE_3 = {
    15: (
        _64_CP,
        _64_TUCKER,
        ((40, 4, 12), (64, 11, 33), (64, 26, 64), (64, 51, 64), (64, 65, 64)),
    ),
    19: (
        _128_CP,
        _128_TUCKER,
        ((63, 6, 18), (64, 19, 57), (64, 36, 108), (64, 61, 128), (64, 80, 128)),
    ),
    28: _128,
    38: _256,
    41: (
        (8, 21, 42, 64, 76),
        ((10, 5), (25, 12), (48, 24), (69, 35), (82, 41)),
        None,  # (256, 11, 33) and so on do not fit a 1x1 kernel
    ),
    44: _256,
    60: _512,
    63: _512,
}


def planned(recipe: StudyRecipe, model: str, channels: int = 1):
    registry = load_registry()
    module = registry.models[model].create(in_channels=channels)
    # Ranks by the proportional rule follow from shapes: any images of the right size will do.
    dataset = tiny_study.noise(channels=channels)
    return plan_trials(make_workspace(recipe, module, dataset, registry))


def methods_of(recipe: StudyRecipe):
    """The methods as a study gets them; layers and images do not matter."""
    recipe = replace(recipe, layers=(), numbers=(), ranks=(), finetune=None)
    model = load_registry().models["garipov"].create()
    return make_workspace(recipe, model, tiny_study.noise(), load_registry()).methods


def load(name: str) -> StudyRecipe:
    return load_recipe(ROOT / "recipes" / f"{name}.toml", StudyRecipe)


def both(rank):
    """Printed once where Tucker's two channel ranks are equal."""
    return rank if isinstance(rank, tuple) else (rank, rank)


@pytest.mark.parametrize(
    ("name", "model", "channels", "table"),
    [
        ("iclr2023-garipov-fashion-mnist", "garipov", 1, TABLE_2),
        ("iclr2023-garipov-cifar10", "garipov", 3, TABLE_2),
        ("iclr2023-resnet18-cifar10", "resnet18-cifar", 3, TABLE_3),
    ],
)
def test_the_studies_of_the_paper_have_its_layers_ranks_and_runs(
    name, model, channels, table
) -> None:
    recipe = load(name)
    assert recipe.numbers == tuple(table)
    number = dict(zip(recipe.layers, recipe.numbers, strict=True))
    trials = planned(recipe, model, channels)
    before = [t for t in trials if t.stage == "before"]
    after = [t for t in trials if t.stage == "after"]
    # Section 4.1: 375 measurements of GaripovNet and 600 of ResNet-18.
    assert len(after) == 5 * 3 * 5 * len(table) == {5: 375, 8: 600}[len(table)]
    assert len(before) == (5 + 1 + 1) * 5 * len(table)
    assert {(t.run, t.seed) for t in trials} == {(run, run) for run in range(5)}
    for t in trials:
        cp, tucker, tt = table[number[t.layer]]
        printed = {"cp": cp, "tucker": tucker, "tt": tt}[t.method]
        if printed is not None:
            wanted = printed[KEEPS.index(t.keep)]
            assert t.rank == (both(wanted) if t.method == "tucker" else wanted), t


def test_by_hand_is_only_what_the_rule_does_not_give() -> None:
    assert load("iclr2023-garipov-fashion-mnist").ranks == ()
    assert load("iclr2023-garipov-cifar10").ranks == ()
    recipe = load("iclr2023-resnet18-cifar10")
    ruled = {
        (t.layer, t.method, t.keep): t.rank
        for t in planned(replace(recipe, ranks=(), finetune=None), "resnet18-cifar", 3)
    }
    for rank in recipe.ranks:
        assert as_tuple(ruled[rank.layer, rank.method, rank.keep]) != rank.rank


def test_layer_numbers_count_all_modules_in_order() -> None:
    """Table 4: containers and modules without parameters too, the first convolution being 0."""
    model = load_registry().models["resnet18-cifar"].create()
    order = [name for name, _ in model.named_modules()][1:]
    recipe = load("iclr2023-resnet18-cifar10")
    assert tuple(map(order.index, recipe.layers)) == recipe.numbers
    sizes = {
        number: (layer.in_channels, layer.out_channels, *layer.kernel_size, *layer.stride)
        for name, number in zip(recipe.layers, recipe.numbers, strict=True)
        if isinstance(layer := model.get_submodule(name), nn.Conv2d)
    }
    # Appendix A.3, "first with stride 2" and "1x1 conv", and the shapes that the ranks imply.
    assert sizes == {
        15: (64, 64, 3, 3, 1, 1),
        19: (64, 128, 3, 3, 2, 2),
        28: (128, 128, 3, 3, 1, 1),
        38: (256, 256, 3, 3, 1, 1),
        41: (128, 256, 1, 1, 2, 2),
        44: (256, 256, 3, 3, 1, 1),
        60: (512, 512, 3, 3, 1, 1),
        63: (512, 512, 3, 3, 1, 1),
    }
    convolutions = [
        name
        for name, module in load_registry().models["garipov"].create().named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    garipov = load("iclr2023-garipov-fashion-mnist")
    # The first convolution stays dense, and the linear layer; each has an activation behind it.
    assert garipov.layers == tuple(convolutions[1:])
    assert garipov.numbers == tuple(2 * place for place in range(1, 6))


PUBLISHED = {
    "iclr2023-resnet18-cifar10": (
        ".510±.009 .408±.022 -.058±.010 .476±.013 .312±.011 .487±.021",
        ".567±.034 .467±.030 .023±.016 .546±.035 .340±.024 .517±.028",
    ),
    "iclr2023-garipov-cifar10": (
        ".822±.015 .583±.022 .648±.025 .727±.011 .629±.021 .640±.023",
        ".692±.012 .383±.009 .601±.013 .569±.019 .536±.012 .403±.010",
    ),
    "iclr2023-garipov-fashion-mnist": (
        ".775±.023 .544±.008 .698±.017 .623±.015 .547±.012 .698±.009",
        ".650±.028 .364±.025 .647±.016 .503±.049 .517±.025 .467±.036",
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values_are_those_of_figure_2(name) -> None:
    columns = [
        f"{n}-{t}" for t in ("weights", "features") for n in ("relative", "scaled", "absolute")
    ]
    expected = [
        PublishedRecipe(stage, metric, *map(float, cell.split("±")))
        for stage, row in zip(("before", "after"), PUBLISHED[name], strict=True)
        for metric, cell in zip(columns, row.split(), strict=True)
    ]
    assert list(load(name).published) == expected
    assert load(name).focus == (0.5, 0.25, 0.1)


@pytest.mark.parametrize(
    ("name", "epochs", "optimizer", "training"),
    [
        ("iclr2023-garipov-fashion-mnist", 10, OptimizerRecipe("sgd", 1e-4, 0.9), None),
        ("iclr2023-garipov-cifar10", 10, OptimizerRecipe("sgd", 1e-4, 0.9), "garipov-cifar10"),
        ("iclr2023-resnet18-cifar10", 25, OptimizerRecipe("adam", 1e-5), "resnet18-cifar10"),
    ],
)
def test_fine_tuning_is_that_of_section_4_1(name, epochs, optimizer, training) -> None:
    recipe = load(name)
    found = recipe.finetune
    assert (found.epochs, found.batch_size, found.images, found.keeps) == (epochs, 128, None, None)
    assert found.optimizer == optimizer
    assert found.schedule == ScheduleRecipe("constant")
    if training is not None:
        trained = load_recipe(ROOT / "recipes" / f"{training}.toml", TrainRecipe)
        assert (trained.output, trained.data) == (recipe.model, recipe.data)
        assert last_learning_rate(trained) == pytest.approx(optimizer.learning_rate)
        assert trained.optimizer.name == optimizer.name


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_every_shipped_study_is_valid_and_names_its_layers(file) -> None:
    recipe = load_recipe(file, StudyRecipe)
    assert parse(to_toml(recipe)) == recipe
    assert len(recipe.numbers) == len(recipe.layers)
    assert set(recipe.metrics) == set(METRICS)
    assert recipe.rank_rule == "proportional"


def test_the_bundled_default_is_the_issues_grid() -> None:
    recipe = bundled_recipe()
    assert recipe == load_recipe(BUNDLED / "quick.toml", StudyRecipe)
    assert (recipe.model, recipe.data) == ("garipov", "fashion-mnist-sample")
    trials = planned(recipe, "garipov")
    assert len(trials) == 5 * 3 * 5
    assert {t.keep for t in trials} == {0.9, 0.75, 0.5, 0.25, 0.1}
    assert {t.layer for t in trials} == {f"conv{n}" for n in range(2, 7)}


@pytest.mark.parametrize(
    ("name", "sweeps", "tolerance"),
    [
        *((name, 100, 1e-8) for name in sorted(PUBLISHED)),
        ("garipov-fashion-mnist-finetune-small", 50, 1e-4),
        ("quick", 50, 1e-4),
    ],
)
def test_cp_starts_as_in_the_paper_and_not_in_studies_of_ones_own(name, sweeps, tolerance) -> None:
    recipe = load(name)
    wanted = MethodRecipe("cp", sweeps=sweeps, tolerance=tolerance, start="uniform")
    assert recipe.options == (wanted,)
    method = methods_of(recipe)["cp"]
    assert (method.start, method.random) == ("uniform", True)
    assert (method.sweeps, method.tolerance, method.ridge) == (sweeps, tolerance, 1e-10)
    own = own_study(recipe, "garipov", "noise", "mine")
    usual = load_registry().decompositions["cp"].create()
    assert settings_of(methods_of(own)["cp"]) == settings_of(usual)


@pytest.mark.parametrize(
    "folder", sorted((ROOT / "docs" / "studies").iterdir()), ids=lambda p: p.name
)
def test_the_shipped_measurements_are_of_methods_as_they_are_now(folder, tmp_path) -> None:
    # Opened in a copy: even a reader of SQLite may write beside the file.
    results = read_results(Path(shutil.copytree(folder, tmp_path / folder.name)))
    methods = methods_of(parse(results.recipe))
    now = identity(replace(tiny_study.workspace(), methods=methods))["methods"]
    assert results.identity["methods"] == now


UNCOMMENTED = re.compile(r"^# (\[\[options\]\]|[a-z]+ = \S+)$", re.MULTILINE)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_commented_lines_switch_to_the_methods_of_the_published_code(name) -> None:
    text = (ROOT / "recipes" / f"{name}.toml").read_text(encoding="utf-8")
    recipe = parse(UNCOMMENTED.sub(r"\1", text))
    assert replace(recipe, options=load(name).options) == load(name)
    assert recipe.options == (
        MethodRecipe("cp", sweeps=100, ridge=1e-5, tolerance=1e-8, start="uniform"),
        MethodRecipe("tucker", sweeps=100, tolerance=1e-4),
    )
    methods = methods_of(recipe)
    assert methods["cp"].ridge == 1e-5
    assert (methods["tucker"].sweeps, methods["tucker"].tolerance) == (100, 1e-4)


def test_all_that_is_shipped_is_named_here() -> None:
    names = {file.stem for file in STUDIES}
    assert names == {"quick", *PUBLISHED, "garipov-fashion-mnist-finetune-small"}
