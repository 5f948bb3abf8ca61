"""No default is written twice: a command's is that of the public function, which names it."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tdkit
from tdkit import defaults as written
from tdkit.cli import app

COMMANDS = {each.callback.__name__: each.callback for each in app.registered_commands}

# What the shell repeats has a name in the singular; a score of one error is asked for as one.
NAMES = {
    "allow_class": "allow_classes",
    "bound": "bounds",
    "set": "settings",
    ("score", "metric"): "metrics",
}

# In Python a model that is handed over stays where it is.
ELSEWHERE = {"device"}


def defaults(function: Any) -> dict[str, Any]:
    """By the name of a parameter what it is when nobody says; empty lists are nothing."""
    found = {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    return {name: None if value == () else value for name, value in found.items()}


@pytest.mark.parametrize("command", COMMANDS)
def test_defaults_are_those_of_the_function(command) -> None:
    python = defaults(getattr(tdkit, command))
    compared = set()
    for name, value in defaults(COMMANDS[command]).items():
        key = NAMES.get((command, name), NAMES.get(name, name))
        if key in python and key not in ELSEWHERE:
            given = float(value) if key == "budget" else value
            assert given == python[key], name
            compared.add(key)
    assert compared or command == "plugins"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_one_of_the_function_or_about_printing(command) -> None:
    python = set(inspect.signature(getattr(tdkit, command)).parameters)
    shell = {
        NAMES.get((command, name), NAMES.get(name, name))
        for name in inspect.signature(COMMANDS[command]).parameters
    }
    assert shell - python <= {"json", "dry_run", "no_report", "trade_off"}


# By the name of an option what it may be when nobody says.
WRITTEN = {name.lower(): value for name, value in vars(written).items() if name.isupper()} | {
    "metrics": written.METRIC
}


def literals(path: Path) -> Iterator[tuple[str, Any]]:
    """The parameters of functions and the fields of records that have a literal as default."""
    for node in ast.walk(ast.parse(path.read_text())):
        found: list[tuple[str, ast.expr | None]] = []
        if isinstance(node, ast.FunctionDef):
            given = node.args.posonlyargs + node.args.args
            last = given[len(given) - len(node.args.defaults) :]
            found += [(a.arg, d) for a, d in zip(last, node.args.defaults, strict=True)]
            only = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            found += [(a.arg, d) for a, d in only]
        elif isinstance(node, ast.ClassDef):
            fields = [each for each in node.body if isinstance(each, ast.AnnAssign)]
            found += [(ast.unparse(each.target), each.value) for each in fields]
        for name, value in found:
            if isinstance(value, ast.Constant):
                yield name, value.value


def test_no_default_is_written_but_on_its_page() -> None:
    package = Path(tdkit.__file__).parent
    found = {path: list(literals(path)) for path in package.rglob("*.py")}
    assert sum(map(len, found.values())) > 100
    twice = [
        f"{path.relative_to(package)}: {name} = {value!r}"
        for path, each in found.items()
        for name, value in each
        if name in WRITTEN and value == WRITTEN[name] and value is not None
    ]
    assert twice == []
