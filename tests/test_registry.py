"""The registry: built-ins and plugins through the same hooks, and every way to break one."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from importlib.metadata import EntryPoint, distribution, version
from typing import TYPE_CHECKING, Any

import pluggy
import pytest

import tdkit.builtin
from tdkit import registry as registry_module
from tdkit.errors import UsageError
from tdkit.hookspecs import HOOKS, MetricRecord, hookimpl
from tdkit.layers.chains import OWN_STAGES
from tdkit.registry import Registry, load_registry, lookup, resolve_stages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

HEAD = "from tdkit.hookspecs import MetricRecord, ModelRecord, PlannerRecord, hookimpl\n"
GOOD = (
    HEAD
    + """
@hookimpl
def tdkit_metrics():
    return [MetricRecord("good-metric", "a good one", dict)]

@hookimpl
def tdkit_planners():
    return [PlannerRecord("good-planner", "a good one", dict)]
"""
)


def metrics(returned: str) -> str:
    return f"{HEAD}\n@hookimpl\ndef tdkit_metrics():\n    return {returned}\n"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., EntryPoint]]:
    """Install a plugin as pip would leave it, and return its entry point."""
    modules = []

    def install(name: str, source: str | None, value: str = "") -> EntryPoint:
        module = name.replace("-", "_")
        info = tmp_path / name / f"{module}-1.5.dist-info"
        info.mkdir(parents=True)
        if source is not None:
            (tmp_path / name / f"{module}.py").write_text(source)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
        (info / "entry_points.txt").write_text(f"[tdkit]\n{name} = {value or module}\n")
        monkeypatch.syspath_prepend(str(tmp_path / name))
        modules.append(module)
        (entry,) = distribution(name).entry_points
        return entry

    yield install
    for module in modules:
        sys.modules.pop(module, None)


def names(registry: Registry) -> dict[str, set[str]]:
    return {hook: set(getattr(registry, hook.removeprefix("tdkit_"))) for hook in HOOKS}


@pytest.fixture
def builtin() -> dict[str, set[str]]:
    return names(load_registry(()))


def test_the_built_ins_are_one_provider_like_any_other(builtin) -> None:
    registry = load_registry(())
    (provider,) = registry.providers
    assert (provider.name, provider.version) == ("tdkit", version("tdkit"))
    assert provider.failure is None
    assert {hook: set(found) for hook, found in provider.provides.items()} == builtin
    assert builtin["tdkit_decompositions"] == {"svd", "cp", "tucker", "tt"}
    assert len(builtin["tdkit_metrics"]) == 8
    assert {"garipov", "resnet18-cifar", "resnet18"} <= builtin["tdkit_models"]
    assert "fashion-mnist-sample" in builtin["tdkit_datasets"]
    assert builtin["tdkit_planners"] == {"exact", "greedy"}
    assert builtin["tdkit_costs"] == {"params", "macs"}


def test_the_built_ins_come_through_the_hooks(monkeypatch) -> None:
    @hookimpl
    def tdkit_metrics() -> list[MetricRecord]:
        return [MetricRecord("only-this", "instead of the six", dict)]

    monkeypatch.setattr(tdkit.builtin, "tdkit_metrics", tdkit_metrics)
    assert set(load_registry(()).metrics) == {"only-this"}


def test_every_record_is_found_under_its_name_and_is_of_its_kind() -> None:
    registry = load_registry()
    for hook, expected in HOOKS.items():
        for name, record in getattr(registry, hook.removeprefix("tdkit_")).items():
            assert isinstance(record, expected)
            assert record.name == name
            assert record.summary
            assert "\n" not in record.summary


def test_tables_cannot_be_written_to() -> None:
    registry: Any = load_registry(())
    with pytest.raises(TypeError, match="does not support item assignment"):
        registry.metrics["mine"] = None
    with pytest.raises(AttributeError, match="cannot assign"):
        registry.metrics = {}


def test_an_installed_plugin_is_found_by_its_entry_point(install) -> None:
    before = load_registry()
    install("tdkit-good", GOOD)
    registry = load_registry()
    provider = next(p for p in registry.providers if p.name == "tdkit-good")
    assert (provider.version, provider.failure) == ("1.5", None)
    assert provider.provides == {
        "tdkit_metrics": ("good-metric",),
        "tdkit_planners": ("good-planner",),
    }
    assert registry.metrics["good-metric"].summary == "a good one"
    assert set(registry.metrics) - set(before.metrics) == {"good-metric"}
    assert registry.models.keys() == before.models.keys()
    assert len(registry.providers) == len(before.providers) + 1


def test_versions_are_those_of_the_plugins_that_records_come_from(install) -> None:
    install("tdkit-good", GOOD)
    registry = load_registry()
    builtin = [registry.decompositions["cp"], registry.metrics["relative-weights"]]
    assert registry.versions(builtin) == {}
    mine = [registry.metrics["good-metric"], registry.planners["good-planner"]]
    assert registry.versions([*builtin, *mine]) == {"tdkit-good": "1.5"}
    other_way_round = replace(registry, providers=registry.providers[::-1])
    assert other_way_round.versions([*builtin, *mine]) == {"tdkit-good": "1.5"}
    # A name counts together with its kind.
    assert registry.versions([replace(registry.models["garipov"], name="good-metric")]) == {}


def test_an_entry_point_outside_a_distribution_goes_by_its_own_name(install, builtin) -> None:
    install("tdkit-good", GOOD)
    provider = load_registry([EntryPoint("bare", "tdkit_good", "tdkit")]).providers[1]
    assert (provider.name, provider.version) == ("bare", "unknown")


BROKEN = {
    "import error": ("import not_there_at_all", "ModuleNotFoundError: No module named 'not_there"),
    "error when imported": ("raise OSError('no\\nlicence')", "OSError: no"),
    "silent error": ("raise ValueError", "ValueError: no message"),
    "exit when imported": ("raise SystemExit(3)", "SystemExit: 3"),
    "syntax error": ("def tdkit_metrics(:", "SyntaxError: "),
    "no such module": (None, "ModuleNotFoundError: No module named 'tdkit_broken'"),
    "misspelt hook": (
        GOOD.replace("tdkit_planners", "tdkit_planer"),
        "there is no hook tdkit_planer; did you mean tdkit_planners?",
    ),
    "forgotten marker": (GOOD.replace("@hookimpl", ""), "is @hookimpl missing"),
    "wrong signature": (
        GOOD.replace("tdkit_planners()", "tdkit_planners(model)"),
        "Argument(s) {'model'} are declared in the hookimpl but can not be found",
    ),
    "hook that fails": (metrics("1 / 0"), "ZeroDivisionError: division by zero"),
    "no list": (
        metrics("MetricRecord('one', 'it', dict)"),
        "tdkit_metrics returned a MetricRecord, not a list",
    ),
    "tuple": (metrics("()"), "tdkit_metrics returned a tuple, not a list"),
    "name instead of record": (
        metrics("['one']"),
        "tdkit_metrics returned a str where a MetricRecord belongs",
    ),
    "record of another kind": (
        metrics("[PlannerRecord('one', 'it', dict)]"),
        "tdkit_metrics returned a PlannerRecord where a MetricRecord belongs",
    ),
    "bad name": (
        metrics("[MetricRecord('One Metric', 'it', dict)]"),
        "'One Metric' does not match",
    ),
    "underscore": (
        metrics("[MetricRecord('one_metric', 'it', dict)]"),
        "does not match [a-z0-9-]+",
    ),
    "newline": (metrics("[MetricRecord('one\\n', 'it', dict)]"), "does not match [a-z0-9-]+"),
    "empty name": (metrics("[MetricRecord('', 'it', dict)]"), "'' does not match"),
    "no name": (metrics("[MetricRecord(None, 'it', dict)]"), "None does not match"),
    "nothing to call": (metrics("[MetricRecord('one', 'it', {})]"), "create of 'one' cannot be"),
    "one name twice": (
        metrics("[MetricRecord('one', 'it', dict), MetricRecord('one', 'it', dict)]"),
        "tdkit_metrics returned two records named 'one'",
    ),
}
"""Source of a plugin's module, and what is said of it."""


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_left_out_with_its_reason(install, builtin, case) -> None:
    source, reason = BROKEN[case]
    entries = [install("tdkit-broken", source), install("tdkit-good", GOOD)]
    if source is not None and "good-metric" in source:
        # The healthy hook of the broken plugin must not be used either, nor be in the way.
        source = source.replace("good-", "half-")
        (entries[0].dist.locate_file("tdkit_broken.py")).write_text(source)
    with pytest.warns(RuntimeWarning, match="tdkit-broken 1.5 is not used") as warned:
        registry = load_registry(entries)
    assert len(warned) == 1
    _, broken, good = registry.providers
    assert (broken.name, broken.version, broken.provides) == ("tdkit-broken", "1.5", {})
    assert broken.failure is not None
    assert reason in broken.failure
    assert "\n" not in broken.failure
    assert good.failure is None
    after = names(registry)
    assert after["tdkit_metrics"] - builtin["tdkit_metrics"] == {"good-metric"}
    assert after["tdkit_planners"] - builtin["tdkit_planners"] == {"good-planner"}
    assert after["tdkit_models"] == builtin["tdkit_models"]


def test_a_missing_attribute_of_the_entry_point(install) -> None:
    entry = install("tdkit-broken", GOOD, "tdkit_broken:plugin")
    with pytest.warns(RuntimeWarning, match="has no attribute 'plugin'"):
        registry = load_registry([entry])
    assert registry.providers[1].provides == {}


def test_several_broken_plugins_at_once(install, builtin) -> None:
    sources = [source for source, _ in BROKEN.values()]
    entries = [install(f"tdkit-broken{i}", source) for i, source in enumerate(sources)]
    entries.insert(2, install("tdkit-good", GOOD))
    with pytest.warns(RuntimeWarning, match="is not used") as warned:
        registry = load_registry(entries)
    assert len(warned) == len(sources)
    failed = [provider for provider in registry.providers if provider.failure]
    assert len(failed) == len(sources)
    assert all(provider.provides == {} for provider in failed)
    after = names(registry)
    assert after["tdkit_metrics"] - builtin["tdkit_metrics"] == {"good-metric"}
    assert after["tdkit_planners"] - builtin["tdkit_planners"] == {"good-planner"}


def test_a_plugin_that_was_repaired_works_in_the_same_process(install) -> None:
    entry = install("tdkit-broken", "import not_there_at_all")
    with pytest.warns(RuntimeWarning, match="is not used"):
        load_registry([entry])
    entry.dist.locate_file("tdkit_broken.py").write_text(GOOD)
    registry = load_registry([entry])
    assert "good-metric" in registry.metrics
    assert load_registry(()).metrics.keys().isdisjoint({"good-metric"})


def test_ctrl_c_while_a_plugin_is_imported_is_not_the_plugins_failure(install) -> None:
    with pytest.raises(KeyboardInterrupt):
        load_registry([install("tdkit-broken", "raise KeyboardInterrupt")])


class Remembering(pluggy.PluginManager):
    """Keeps a plugin registered whose validation failed, as pluggy did up to some version."""

    made: Remembering

    def __init__(self, project_name: str) -> None:
        super().__init__(project_name)
        Remembering.made = self

    def register(self, plugin: Any, name: str | None = None) -> str | None:
        try:
            return super().register(plugin, name)
        except pluggy.PluginValidationError:
            self._name2plugin[plugin.__name__] = plugin
            raise


def test_nothing_stays_of_a_plugin_that_pluggy_keeps(install, builtin, monkeypatch) -> None:
    monkeypatch.setattr(registry_module.pluggy, "PluginManager", Remembering)
    broken = install("tdkit-broken", BROKEN["wrong signature"][0])
    with pytest.warns(RuntimeWarning, match="tdkit-broken"):
        registry = load_registry([broken, install("tdkit-good", GOOD)])
    kept = {plugin.__name__ for plugin in Remembering.made.get_plugins()}
    assert "tdkit_broken" not in kept
    assert "tdkit_good" in kept
    after = names(registry)
    assert after["tdkit_metrics"] - builtin["tdkit_metrics"] == {"good-metric"}
    assert registry.providers[1].provides == {}


def test_pluggy_does_accept_a_misspelt_hook(install) -> None:
    """Why the registry looks for itself: register() says nothing."""
    manager = pluggy.PluginManager("tdkit")
    manager.add_hookspecs(registry_module.hookspecs)
    plugin = install("tdkit-broken", BROKEN["misspelt hook"][0]).load()
    manager.register(plugin)
    with pytest.raises(pluggy.PluginValidationError, match="unknown hook 'tdkit_planer'"):
        manager.check_pending()


def test_a_name_of_two_plugins_is_an_error_that_names_both(install) -> None:
    one, two = install("tdkit-good", GOOD), install("tdkit-copy", GOOD)
    for entries, second in (([one, two], "tdkit-copy"), ([two, one], "tdkit-good")):
        with pytest.raises(UsageError, match="two plugins provide 'good-metric'") as caught:
            load_registry(entries)
        assert "among the metrics" in str(caught.value)
        assert "tdkit-good" in str(caught.value)
        assert "tdkit-copy" in str(caught.value)
        assert caught.value.hint == f"uninstall one of them: pip uninstall {second}"


def test_a_built_in_name_cannot_be_taken(install) -> None:
    thief = install("tdkit-thief", metrics("[MetricRecord('relative-weights', 'mine', dict)]"))
    with pytest.raises(UsageError, match=r"relative-weights.*: tdkit and tdkit-thief"):
        load_registry([thief])


def test_one_name_may_stand_for_things_of_two_kinds(install) -> None:
    both = metrics("[MetricRecord('greedy', 'a metric', dict)]")
    registry = load_registry([install("tdkit-both", both)])
    assert registry.metrics["greedy"].summary == "a metric"
    assert registry.planners["greedy"].summary != "a metric"


def test_loading_twice_gives_the_same(install) -> None:
    install("tdkit-good", GOOD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert names(load_registry()) == names(load_registry())


@pytest.mark.parametrize("name", ["relative-weights", "relative_weights", " Relative-Weights"])
def test_lookup_takes_underscores_and_capitals(name) -> None:
    assert lookup(load_registry(()).metrics, name, "metric").name == "relative-weights"


@pytest.mark.parametrize(
    ("table", "name", "hint"),
    [
        ("decompositions", "tuker", "did you mean tucker? known: svd, cp, tucker, tt"),
        ("decompositions", "TUKER", "did you mean tucker? known: svd, cp, tucker, tt"),
        ("decompositions", "xyz", "known: svd, cp, tucker, tt"),
        ("models", "resnet81", "did you mean resnet18"),
        ("models", "qqqq", "tdkit plugins lists them all"),
    ],
)
def test_lookup_names_what_is_close(table, name, hint) -> None:
    with pytest.raises(UsageError, match=f"no thing named {name!r}") as caught:
        lookup(getattr(load_registry(()), table), name, "thing")
    assert caught.value.hint is not None
    assert caught.value.hint.startswith(hint)


STAGES = """
from dataclasses import dataclass
from tdkit.hookspecs import StageRecord, hookimpl

def create():
    from tdkit.layers.stages import Flatten

    @dataclass(frozen=True)
    class Mine(Flatten):
        kinds = ("KIND",)

    FAIL
    return Mine

@hookimpl
def tdkit_stages():
    return [StageRecord("mine", "a stage", create)]
"""


def test_stages_are_the_list_that_readers_take(install) -> None:
    assert resolve_stages(load_registry(())) == OWN_STAGES
    install("tdkit-mine", STAGES.replace("KIND", "Mine").replace("FAIL", ""))
    found = resolve_stages(load_registry())
    assert set(found) == {*OWN_STAGES, "Mine"}
    assert found["Mine"].__name__ == "Mine"


def test_two_stages_of_one_kind_name_both(install) -> None:
    install("tdkit-mine", STAGES.replace("KIND", "Flatten").replace("FAIL", ""))
    with pytest.raises(UsageError, match="stand as 'Flatten' in model files: flatten and mine"):
        resolve_stages(load_registry())


def test_a_stage_that_cannot_be_made_stops_no_other(install) -> None:
    install("tdkit-mine", STAGES.replace("KIND", "Mine").replace("FAIL", "1 / 0"))
    registry = load_registry()
    with pytest.warns(RuntimeWarning, match="the stage mine is not used: ZeroDivisionError"):
        assert resolve_stages(registry) == OWN_STAGES
