"""From a recipe and a model to trials, to units of work, and to what they depend on."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace

import pytest
import tiny_study
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tdkit.compression.scoring import prepare
from tdkit.decompositions.base import count, layer_stages
from tdkit.decompositions.cp import Cp
from tdkit.decompositions.settings import create
from tdkit.decompositions.svd import Svd
from tdkit.errors import UnsupportedError, UsageError
from tdkit.hookspecs import DecompositionRecord
from tdkit.layers.evidence import Evidence
from tdkit.layers.weights import ModuleWeights
from tdkit.registry import load_registry
from tdkit.study.opening import make_workspace
from tdkit.study.recipe import (
    FinetuneRecipe,
    ImagesRecipe,
    MethodRecipe,
    PublishedRecipe,
    RankRecipe,
)
from tdkit.study.records import Trial, outcome_key
from tdkit.study.trials import (
    check_data,
    chosen_layers,
    differences,
    effort,
    identity,
    plan_trials,
    units,
)
from tdkit.training.recipe import OptimizerRecipe

RECIPE = tiny_study.RECIPE
FINETUNE = FinetuneRecipe(
    epochs=2, batch_size=8, optimizer=OptimizerRecipe("sgd", 0.01), images=20, keeps=(0.5,)
)


@pytest.fixture(scope="module")
def workspace():
    return tiny_study.workspace()


def planned(**changes):
    return plan_trials(tiny_study.workspace(replace(RECIPE, **changes)))


class TestPlan:
    def test_it_is_every_choice_in_the_order_of_the_recipe(self, workspace) -> None:
        trials = plan_trials(workspace)
        expected = [
            (layer, method, keep, run)
            for layer in ("2", "4", "6")
            for method in ("cp", "tucker", "tt")
            for keep in (0.75, 0.5, 0.25)
            for run in range(2 if method == "cp" else 1)
        ]
        assert [(t.layer, t.method, t.keep, t.run) for t in trials] == expected
        assert {t.stage for t in trials} == {"before"}
        assert all(t.seed == 3 + t.run for t in trials)

    def test_ranks_are_those_of_the_rule(self, workspace) -> None:
        layers = {layer.name: layer for layer in workspace.layers}
        for t in plan_trials(workspace):
            spec = layers[t.layer].spec
            assert t.rank == workspace.methods[t.method].rank(spec.per_group(), t.keep)
        for t in planned(rank_rule="best", keeps=(0.5,)):
            layer, weights = layers[t.layer], ModuleWeights(workspace.model)
            method, evidence = workspace.methods[t.method], Evidence(RECIPE.seed)
            prepared = prepare(layer, weights, t.method, method, evidence)
            assert t.rank == prepared.rank(0.5, "best")

    def test_after_fine_tuning_every_method_has_its_runs(self) -> None:
        trials = planned(finetune=FINETUNE)
        before = [t for t in trials if t.stage == "before"]
        after = [t for t in trials if t.stage == "after"]
        assert tuple(before) == planned()
        assert trials == (*before, *after)
        assert {t.keep for t in after} == {0.5}
        assert len(after) == 3 * 3 * 2
        assert {(t.method, t.run) for t in after} == {
            (m, run) for m in RECIPE.methods for run in range(2)
        }
        # A run's CP starts as it did before fine-tuning.
        seeds = {(t.layer, t.run): t.seed for t in before if t.method == "cp"}
        assert all(t.seed == seeds[t.layer, t.run] for t in after)

    def test_all_keeps_are_fine_tuned_where_none_are_named(self) -> None:
        trials = planned(finetune=replace(FINETUNE, keeps=None))
        assert {t.keep for t in trials if t.stage == "after"} == set(RECIPE.keeps)

    def test_layers_come_in_the_order_of_the_recipe_and_may_be_the_ends(self) -> None:
        methods = ("svd",)
        trials = planned(layers=("9", "4", "2", "[24]"), methods=methods, options=())
        assert list(dict.fromkeys(t.layer for t in trials)) == ["9", "4", "2"]
        assert {t.layer for t in planned(methods=methods, options=())} == {"2", "4", "6"}

    def test_candidates_that_are_not_smaller_are_left_out_unless_named(self) -> None:
        rank = RankRecipe("6", "tucker", 1.0, (12, 12))
        trials = planned(keeps=(1.0, 0.5), ranks=(rank,), layers=("6",))
        found = {(t.method, t.keep): t.rank for t in trials}
        assert found["tucker", 1.0] == (12, 12)
        assert ("cp", 1.0) not in found
        assert ("cp", 0.5) in found
        assert found["tucker", 0.5] != (12, 12)

    def test_a_rank_by_hand_takes_the_place_of_the_rule(self) -> None:
        ranks = (RankRecipe("2", "cp", 0.5, (7,)), RankRecipe("4", "tt", 0.25, (3, 4, 5)))
        trials = planned(ranks=ranks)
        changed = set(trials) - set(planned())
        assert {(t.layer, t.method, t.keep, t.rank) for t in changed} == {
            ("2", "cp", 0.5, 7),
            ("4", "tt", 0.25, (3, 4, 5)),
        }

    def test_two_keeps_of_one_rank_stay_two(self) -> None:
        ranks = tuple(RankRecipe("2", "tucker", keep, (4, 4)) for keep in (0.5, 0.25))
        found = [t for t in planned(ranks=ranks) if (t.layer, t.method) == ("2", "tucker")]
        assert [t.rank for t in found[1:]] == [(4, 4), (4, 4)]

    @pytest.mark.parametrize(
        ("changes", "kind", "message"),
        [
            ({"layers": ("2", "7*")}, UsageError, r"no layer named '7\*'"),
            (
                {"ranks": (RankRecipe("3", "cp", 0.5, (7,)),)},
                UsageError,
                "no layer of the study named '3'",
            ),
            (
                {"ranks": (RankRecipe("2", "cp", 0.5, (7, 8)),)},
                UsageError,
                r"ranks of 2 under cp: rank \(7, 8\) does not fit",
            ),
            (
                {"ranks": (RankRecipe("2", "tt", 0.5, (7,)),)},
                UsageError,
                r"ranks of 2 under tt: rank \(7,\) does not fit",
            ),
            (
                {"ranks": (RankRecipe("9", "cp", 0.5, (2,)),), "layers": ("9", "2")},
                UsageError,
                "ranks of 9 under cp: .*use svd",
            ),
            ({"methods": ("cp",), "layers": ("9",)}, UsageError, "cp supports none of the layers"),
            ({"methods": ("cp",), "keeps": (1.0,), "layers": ("6",)}, UsageError, "nothing to"),
        ],
    )
    def test_what_does_not_fit_is_named(self, changes, kind, message) -> None:
        with pytest.raises(kind, match=message):
            planned(**changes)

    def test_a_layer_that_cannot_be_compressed(self) -> None:
        model = tiny_study.network()
        with torch.no_grad():
            model[2].weight[0, 0, 0, 0] = float("nan")
        recipe = replace(RECIPE, layers=("2", "4"))
        found = make_workspace(recipe, model, tiny_study.noise(), load_registry())
        message = "the layer '2' cannot be compressed: its weight has NaN"
        with pytest.raises(UnsupportedError, match=message):
            plan_trials(found)
        recipe = replace(RECIPE, layers=("[24]",))
        found = make_workspace(recipe, model, tiny_study.noise(), load_registry())
        assert [layer.name for layer in chosen_layers(found)] == ["4"]

    def test_a_model_without_any_layer_to_compress(self) -> None:
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 4))
        found = make_workspace(RECIPE, model, tiny_study.noise(), load_registry())
        with pytest.raises(UnsupportedError, match="no layer of the model") as caught:
            plan_trials(found)
        assert "0: the first layer is kept dense" in caught.value.hint


class TestUnits:
    def test_they_are_the_trials_each_once(self, workspace) -> None:
        trials = planned(finetune=FINETUNE)
        chunks = units(workspace, trials)
        assert sorted(map(repr, sum(chunks, ()))) == sorted(map(repr, trials))

    @given(st.data())
    @settings(max_examples=50, deadline=None)
    def test_each_has_one_layer_and_one_stage_and_alike_trials_together(
        self, workspace, data
    ) -> None:
        ranks = tuple(RankRecipe("2", "tucker", keep, (4, 4)) for keep in (0.75, 0.5, 0.25))
        every = planned_once(finetune=replace(FINETUNE, keeps=None), ranks=ranks)
        subsets = st.lists(st.sampled_from(every), unique=True)
        chosen = data.draw(st.one_of(st.just(list(every)), subsets))
        chunks = units(workspace, chosen)
        assert sorted(map(repr, sum(chunks, ()))) == sorted(map(repr, chosen))
        homes: dict[Trial, int] = {}
        for place, chunk in enumerate(chunks):
            assert len({(t.layer, t.stage) for t in chunk}) == 1
            assert len({outcome_key(t) for t in chunk}) <= (16 if chunk[0].stage == "before" else 1)
            assert all(homes.setdefault(outcome_key(t), place) == place for t in chunk)
        after = [chunk[0].run for chunk in chunks if chunk[0].stage == "after"]
        assert after == sorted(after)

    def test_they_are_bounded_in_parameters(self, workspace, monkeypatch) -> None:
        trials = [t for t in plan_trials(workspace) if t.layer == "4"]
        layer = next(layer for layer in workspace.layers if layer.name == "4")
        methods = workspace.methods
        sizes = [count(layer_stages(methods[t.method], layer.spec, t.rank)) for t in trials]
        monkeypatch.setattr("tdkit.study.trials._PARAMETERS", sum(sizes) // 5)
        assert len(units(workspace, trials)) >= 5
        monkeypatch.setattr("tdkit.study.trials._PARAMETERS", 1)
        assert [len(chunk) for chunk in units(workspace, trials)] == [1] * len(trials)


_PLANS: dict[str, tuple[Trial, ...]] = {}


def planned_once(**changes):
    if repr(changes) not in _PLANS:
        _PLANS[repr(changes)] = planned(**changes)
    return _PLANS[repr(changes)]


def test_effort_counts_images() -> None:
    workspace = tiny_study.workspace(replace(RECIPE, finetune=FINETUNE))
    trials = plan_trials(workspace)
    assert effort(workspace, trials[0]) == 60
    # Two epochs of three passes over 20 training images and one over the 6 that validate.
    assert effort(workspace, trials[-1]) == 60 + 2 * (3 * 20 + 6)
    fewer = replace(RECIPE, evaluation=ImagesRecipe("test", 7))
    assert effort(tiny_study.workspace(fewer), trials[0]) == 7


class TestData:
    def check(self, dataset, **changes) -> None:
        metrics = tiny_study.workspace().metrics
        check_data(dataset, replace(RECIPE, **changes), metrics)

    def test_a_split_that_is_missing(self) -> None:
        dataset = replace(tiny_study.noise(), train=None)
        with pytest.raises(UsageError, match=r"features\.split is 'train', and noise has no such"):
            self.check(dataset)
        dataset = replace(tiny_study.noise(), test=None)
        with pytest.raises(UsageError, match=r"evaluation\.split is 'test'") as caught:
            self.check(dataset)
        assert caught.value.hint == "it has: train, validation"

    def test_metrics_of_weights_need_no_features(self) -> None:
        metrics = [m for m in tiny_study.workspace().metrics if m.target == "weights"]
        check_data(replace(tiny_study.noise(), train=None), RECIPE, metrics)

    def test_fine_tuning_needs_images_to_train_and_validate_on(self) -> None:
        self.check(tiny_study.noise(), finetune=FINETUNE)
        with pytest.raises(UsageError, match="no validation images"):
            self.check(replace(tiny_study.noise(), validation=None), finetune=FINETUNE)


class TestSettings:
    def methods(self, create, *options: MethodRecipe):
        """The methods of a study that has one of a plugin."""
        registry = load_registry()
        records = {**registry.decompositions, "mine": DecompositionRecord("mine", "", create)}
        recipe = replace(RECIPE, methods=("cp", "mine"), options=options)
        return make_workspace(
            recipe,
            tiny_study.network(),
            tiny_study.noise(),
            replace(registry, decompositions=records),
        ).methods

    def test_they_are_keywords_of_create_whatever_the_method_calls_them(self) -> None:
        calls = []

        def create(ridge: float = 0.5) -> Svd:
            calls.append(ridge)
            return Svd()

        assert type(self.methods(create, MethodRecipe("mine", ridge=0.25))["mine"]) is Svd
        self.methods(create)
        assert calls == [0.25, 0.5]

    def test_those_that_create_does_not_take_are_refused(self) -> None:
        class Plugin(Svd):
            sweeps = 3

        option = MethodRecipe("mine", sweeps=4, start="uniform")
        with pytest.raises(UsageError, match=r"^mine has no setting 'start'$") as e:
            self.methods(Plugin, option)
        assert e.value.hint == "it has none"

    @pytest.mark.parametrize(
        ("settings", "says"),
        [
            ({"sweeps": -1}, "the setting sweeps must be at least 0, not -1"),
            ({"ridge": -1}, "the setting ridge must be at least 0, not -1"),
            ({"ridge": float("nan")}, "the setting ridge must be at least 0, not nan"),
            ({"tolerance": -1e-3}, "the setting tolerance must be at least 0, not -0.001"),
            ({"start": "zero"}, "unknown start 'zero'"),
            ({"swoops": 1}, "cp has no setting 'swoops'"),
            ({"sweeps": "many"}, "the setting sweeps of cp is a whole number, not 'many'"),
            ({"sweeps": 2.5}, "the setting sweeps of cp is a whole number, not 2.5"),
            ({"tolerance": True}, "the setting tolerance of cp is a number, not True"),
            ({"start": 1}, "the setting start of cp is a text, not 1"),
        ],
    )
    def test_what_a_constructor_refuses_is_refused_when_the_study_is_opened(
        self, settings, says
    ) -> None:
        with pytest.raises(UsageError, match=f"^{re.escape(says)}$"):
            self.methods(Svd, MethodRecipe("cp", **settings))

    def test_settings_of_a_method_that_is_not_among_those_of_the_study_are_refused(self) -> None:
        with pytest.raises(UsageError, match="tt"):
            self.methods(Svd, MethodRecipe("tt", sweeps=1))

    def test_a_broken_create_is_not_blamed_on_settings(self) -> None:
        with pytest.raises(TypeError, match="missing 1 required positional argument"):
            self.methods(lambda missing: Svd())


class TestIdentity:
    def test_it_is_json_and_the_same_every_time(self, workspace) -> None:
        found = identity(workspace)
        assert json.loads(json.dumps(found)) == found == identity(tiny_study.workspace())
        assert differences(found, found) == []

    @pytest.mark.parametrize(
        "change",
        [
            {"title": "another"},
            {"notes": ("a remark",)},
            {"focus": (0.5,)},
            {"published": (PublishedRecipe("before", "relative-weights", 0.5, 0.1),)},
            {"model": "elsewhere.pt"},
            {"data": "noise:elsewhere"},
            {"evaluation": ImagesRecipe("test", batch_size=5)},
            {"features": ImagesRecipe("train", 20, batch_size=5)},
        ],
    )
    def test_what_no_measurement_depends_on_does_not_matter(self, workspace, change) -> None:
        other = replace(workspace, recipe=replace(RECIPE, **change))
        assert identity(other) == identity(workspace)

    @pytest.mark.parametrize(
        ("change", "line"),
        [
            ({"keeps": (0.75, 0.5)}, "recipe.keeps: 0.75, 0.5, 0.25 → 0.75, 0.5"),
            ({"methods": ("cp",)}, "recipe.methods: cp, tucker, tt → cp"),
            ({"layers": ("2",)}, "recipe.layers: nothing → 2"),
            ({"rank_rule": "best"}, "recipe.rank_rule: proportional → best"),
            ({"runs": 5}, "recipe.runs: 2 → 5"),
            ({"seed": 4}, "recipe.seed: 3 → 4"),
            (
                {"evaluation": ImagesRecipe("test", 30)},
                "recipe.evaluation.images: nothing → 30",
            ),
            (
                {"features": ImagesRecipe("test", 20)},
                "recipe.features.split: train → test",
            ),
        ],
    )
    def test_every_other_value_is_a_difference_that_is_shown(self, workspace, change, line) -> None:
        other = replace(workspace, recipe=replace(RECIPE, **change))
        assert differences(identity(workspace), identity(other)) == [line]

    def test_settings_count_by_what_they_make_of_a_method(self, workspace) -> None:
        def found(*options: MethodRecipe):
            return identity(tiny_study.workspace(replace(RECIPE, options=options)))

        uniform = MethodRecipe("cp", start="uniform")
        assert found(uniform) == identity(workspace)
        assert found(MethodRecipe("cp", sweeps=5)) == found()
        assert differences(found(uniform), found(MethodRecipe("cp", sweeps=9))) == [
            "methods.cp.start: uniform → orthogonal",
            "methods.cp.sweeps: 5 → 9",
            "methods.cp.random: True → False",
        ]

    def test_settings_count_that_a_method_keeps_to_itself(self, workspace) -> None:
        class Quiet(Svd):
            def __init__(self, rounds: int = 1) -> None:
                self._rounds = rounds

        record = DecompositionRecord("mine", "", Quiet)

        def found(**settings):
            return identity(replace(workspace, methods={"mine": create(record, settings)}))

        assert found()["methods"]["mine"] == {}
        assert differences(found(rounds=2), found(rounds=3)) == ["methods.mine.rounds: 2 → 3"]

    def test_settings_of_methods_count_that_no_recipe_names(self, workspace) -> None:
        class Plugin(Svd):
            def __init__(self, rounds: int) -> None:
                self.rounds, self.exact, self.table, self._latest = rounds, True, {}, 0.5

        def found(sweeps, rounds):
            return identity(replace(workspace, methods={"cp": Cp(sweeps), "mine": Plugin(rounds)}))

        assert found(5, 1)["methods"]["mine"] == {"rounds": 1, "exact": True}
        assert differences(found(5, 1), found(5, 1)) == []
        assert differences(found(50, 1), found(5, 2)) == [
            "methods.cp.sweeps: 50 → 5",
            "methods.mine.rounds: 1 → 2",
        ]

    def test_fine_tuning_may_come_later_but_not_change(self, workspace) -> None:
        def tuned(finetune):
            return identity(replace(workspace, recipe=replace(RECIPE, finetune=finetune)))

        assert differences(tuned(None), tuned(FINETUNE)) == []
        assert differences(tuned(FINETUNE), tuned(None)) == []
        slower = replace(FINETUNE, optimizer=OptimizerRecipe("sgd", 0.001))
        assert differences(tuned(FINETUNE), tuned(slower)) == [
            "recipe.finetune.optimizer.learning_rate: 0.01 → 0.001"
        ]
        # The batches of a training change its outcome.
        other = replace(FINETUNE, batch_size=4)
        assert differences(tuned(FINETUNE), tuned(other)) == ["recipe.finetune.batch_size: 8 → 4"]

    def test_model_data_and_versions(self, workspace, monkeypatch) -> None:
        before = identity(workspace)

        def changed(**parts):
            return [
                d.partition(":")[0]
                for d in differences(before, identity(replace(workspace, **parts)))
            ]

        model = copy.deepcopy(workspace.model)
        with torch.no_grad():
            model[2].weight[0, 0, 0, 0] += 1e-6
        assert changed(model=model) == ["model.weights"]
        model = copy.deepcopy(workspace.model)
        model[1] = nn.GELU()
        assert changed(model=model) == ["model.structure"]
        model = copy.deepcopy(workspace.model)
        model[4].stride = (1, 1)
        assert changed(model=model) == ["model.structure"]
        assert changed(model=copy.deepcopy(workspace.model).double()) == ["model.weights"]
        assert changed(dataset=tiny_study.noise(seed=1)) == ["data"]
        monkeypatch.setattr("tdkit.study.trials.__version__", "9.9")
        assert differences(before, identity(workspace)) == ["versions.tdkit: 0.1.0 → 9.9"]

    def test_hashes_are_cut_short(self, workspace) -> None:
        other = identity(replace(workspace, dataset=tiny_study.noise(seed=1)))
        (line,) = differences(identity(workspace), other)
        assert line == f"data: {identity(workspace)['data'][:12]}… → {other['data'][:12]}…"
