"""No default is written twice: a command's is that of the public function."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import tdkit
from tdkit.cli import app

COMMANDS = {each.callback.__name__: each.callback for each in app.registered_commands}

# What the shell repeats has a name in the singular; a score of one error is asked for as one.
NAMES = {"allow_class": "allow_classes", "set": "settings", ("score", "metric"): "metrics"}

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
    assert shell - python <= {"json", "dry_run", "no_report"}
