"""Section 3 of the design: who may import whom, read off the source."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tdkit"

# From the bottom up. A module imports from lower levels and from its own folder only.
LEVELS = (
    {"version", "errors", "defaults", "pytest_plugin", "tables", "progress"},
    {"files", "recipes", "hookspecs"},
    {"forward"},
    {"layers"},
    {"costs", "decompositions", "metrics", "datasets", "models", "checkpoint"},
    {"planners", "calibration", "training"},
    {"builtin"},
    {"registry"},
    {"compression"},
    {"testing"},
    {"arguments", "opening"},
    {"study"},
    {"api"},
    {"cli"},
    {"__main__"},
)


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """What a module imports when it runs, inside functions too; not what only types need."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    only_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test).endswith("TYPE_CHECKING")
        for statement in block.body
        for node in ast.walk(statement)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in only_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
    return found


IMPORTS = {name: imports(path) for name, path in MODULES.items()}


def part(module: str) -> str:
    return module.split(".")[1]


def users_of(package: str) -> set[str]:
    return {
        name
        for name, found in IMPORTS.items()
        if any(other == package or other.startswith(f"{package}.") for other in found)
    }


def test_every_module_has_a_level() -> None:
    known = {name for level in LEVELS for name in level}
    unknown = {part(name) for name in MODULES if name != "tdkit"} - known
    assert not unknown, f"give {unknown} a place in LEVELS"


@pytest.mark.parametrize("module", [name for name in MODULES if name != "tdkit"])
def test_no_module_imports_upward(module) -> None:
    level = {name: number for number, names in enumerate(LEVELS) for name in names}
    for other in IMPORTS[module]:
        if other.split(".")[0] == "tdkit" and other != "tdkit" and part(other) != part(module):
            assert level[part(other)] < level[part(module)], f"{module} imports {other}"


def test_imports_form_no_circle() -> None:
    graph = {name: found & set(MODULES) - {"tdkit"} for name, found in IMPORTS.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)


def test_the_package_itself_imports_nothing_until_it_is_asked() -> None:
    assert {name for name in IMPORTS["tdkit"] if name.startswith("tdkit")} == {"tdkit.version"}


def test_typer_and_rich_are_for_the_command_line() -> None:
    assert {part(name) for name in users_of("typer")} == {"cli"}
    # A bar is shown to whoever asks for one in Python, too.
    assert {part(name) for name in users_of("rich")} == {"cli", "progress"}


def test_the_command_line_calls_nothing_but_the_public_functions() -> None:
    allowed = re.compile(r"tdkit(\.(api|cli|defaults|errors|tables|version)(\..*)?)?")
    for name, found in IMPORTS.items():
        if part(f"{name}.") == "cli":
            own = {other for other in found if other.partition(".")[0] == "tdkit"}
            assert {other for other in own if not allowed.fullmatch(other)} == set(), name


def test_pluggy_is_for_registry_and_hookspecs() -> None:
    assert users_of("pluggy") == {"tdkit.registry", "tdkit.hookspecs"}


def test_core_functions_are_handed_objects() -> None:
    users = users_of("tdkit.registry")
    assert {part(name) for name in users} <= {"opening", "study", "api"}
    assert {name for name in users if part(name) == "study"} == {"tdkit.study.opening"}
    assert "tdkit.api.compress" in users


def test_test_tools_stay_out_of_the_library() -> None:
    for package in ("pytest", "hypothesis"):
        assert {part(name) for name in users_of(package)} <= {"testing"}
    assert {part(name) for name in users_of("tdkit.testing")} == {"testing"}


PYTEST = """
import sys

import tdkit.pytest_plugin

print(sorted({"torch", "hypothesis", "numpy"} & set(sys.modules)))
"""


def test_every_run_of_pytest_beside_tdkit_waits_for_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", PYTEST], capture_output=True, text=True)
    assert done.stdout.split() == ["[]"], done.stderr


LIGHT = """
import sys

import tdkit
from tdkit.cli import main

for arguments in (
    ["--help"], ["--version"], ["plugins"], ["compress", "--help"], ["nonsense"],
    ["validate", "quik"], ["train", "quik"],
):
    try:
        main(arguments)
    except SystemExit:
        pass
print(sorted({"torch", "torchvision", "tensorly", "scipy", "numpy"} & set(sys.modules)))
"""


def test_help_and_plugins_do_not_wait_for_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIGHT],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert "svd" in done.stdout
    assert done.stderr.count("no recipe, and no file, named 'quik'") == 2


INSPECT = """
import sys

from tdkit.cli import main

try:
    main(["inspect", "garipov"])
except SystemExit:
    pass
print("torch" in sys.modules, "torch._dynamo" in sys.modules)
"""


def test_inspect_does_not_wait_for_the_compiler() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INSPECT], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "True False"


REPLAY = """
import sys

import torch
from torch import nn

from tdkit.layers.inventory import find_layers
from tdkit.study.replay import predictions

model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 3), nn.Linear(3, 2))
layer = next(each for each in find_layers(model, include_ends=True) if each.name == "2")
predictions(model, layer, [nn.Linear(3, 3)], [torch.rand(4, 3)])
print("torch._dynamo" in sys.modules)
"""


def test_replays_do_not_wait_for_the_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", REPLAY], capture_output=True, text=True)
    assert done.stdout.split() == ["False"], done.stderr


def test_the_public_api_is_what_it_says() -> None:
    import tdkit

    for name in tdkit.__all__:
        assert getattr(tdkit, name).__module__.startswith("tdkit.")
        assert name in dir(tdkit)
    assert set(tdkit._HOMES) == set(tdkit.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = tdkit.nonsense
