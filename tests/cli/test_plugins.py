"""``tdkit plugins``, and how the other commands report a plugin that is broken."""

from __future__ import annotations

import importlib.metadata
import json

import pytest

from tdkit.registry import load_registry

BROKEN = "import a_module_that_is_not_there\n"


@pytest.mark.usefixtures("toy_plugin")
def test_it_lists_providers_versions_names_and_failures(tdkit, install) -> None:
    install("tdkit-broken", BROKEN, version="0.3")
    done = tdkit("plugins")
    assert done.status == 0
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    builtin, toy, broken = (
        lines.index(f"tdkit {importlib.metadata.version('tdkit')}"),
        lines.index("tdkit-toy 1.2"),
        lines.index("tdkit-broken 0.3"),
    )
    first_words = {line.split()[0] for line in lines if line.startswith("  ")}
    assert first_words >= {"decompositions", "metrics", "models", "datasets", "planners"}
    for name in ("tucker", "relative-features", "garipov", "fashion-mnist-sample", "greedy"):
        assert name in done.stdout
    assert lines[toy + 1].split() == ["models", "toy-net", "two", "convolutions"]
    assert lines[toy + 2].split(maxsplit=2) == ["datasets", "toy-data", "sixty images of noise"]
    message = "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"
    assert lines[broken + 1].strip() == f"not used: {message}"
    assert builtin < min(toy, broken)


@pytest.mark.usefixtures("toy_plugin")
def test_json_is_one_object(tdkit, install) -> None:
    install("tdkit-broken", BROKEN, version="0.3")
    found = json.loads(tdkit("plugins", "--json").stdout)["plugins"]
    by_name = {provider["name"]: provider for provider in found}
    assert by_name["tdkit-toy"] == {
        "name": "tdkit-toy",
        "version": "1.2",
        "provides": {"tdkit_models": ["toy-net"], "tdkit_datasets": ["toy-data"]},
        "failure": None,
    }
    assert by_name["tdkit-broken"]["provides"] == {}
    assert by_name["tdkit-broken"]["failure"].startswith("ModuleNotFoundError: ")
    assert found[0]["name"] == "tdkit"


def test_every_registered_name_is_listed(tdkit) -> None:
    registry = load_registry()
    tables = (
        registry.decompositions,
        registry.metrics,
        registry.models,
        registry.datasets,
        registry.planners,
        registry.stages,
    )
    words = set(tdkit("plugins").stdout.replace(",", " ").split())
    assert {name for table in tables for name in table} <= words


def test_methods_outside_the_default_are_marked(tdkit) -> None:
    rows = [line.split() for line in tdkit("plugins").stdout.splitlines()]
    text = " ".join(word for row in rows for word in row)
    limits = [record.default for record in load_registry().decompositions.values()]
    assert text.count("only if named") == limits.count(0) >= 1
    assert "up to keep 0.25" in text
    assert next(row for row in rows if row[:1] == ["tucker"])[-1] != "named"


def test_a_broken_plugin_is_reported_once_and_everything_else_goes_on(tdkit, toy, install) -> None:
    install("tdkit-broken", BROKEN, version="0.3")
    done = tdkit("compress", "toy.pt", "--methods", "svd", "--json")
    assert done.status == 0
    assert done.stderr.count("tdkit-broken") == 1
    assert "note: the plugin tdkit-broken 0.3 is not used: ModuleNotFoundError" in done.stderr
    assert json.loads(done.stdout)["moves"]


@pytest.mark.usefixtures("toy_plugin")
def test_two_plugins_with_one_name_stop_everything(tdkit, toy, install, tmp_path) -> None:
    install(
        "tdkit-other",
        "from tdkit.hookspecs import ModelRecord, hookimpl\n"
        "@hookimpl\n"
        "def tdkit_models():\n"
        "    return [ModelRecord('toy-net', 'another', dict, (1, 2, 2), 2)]\n",
    )
    for command in (("plugins",), ("compress", "toy.pt")):
        done = tdkit(*command)
        assert done.status == 2
        message, hint = done.stderr.splitlines()
        assert "'toy-net' among the models" in message
        assert "tdkit-other" in message
        assert "tdkit-toy" in message
        assert hint.startswith("hint: uninstall one of them: pip uninstall tdkit-")
        assert done.stdout == ""
    assert not (tmp_path / "toy-0.5.pt").exists()
