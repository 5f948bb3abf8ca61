"""Messages speak of options by their key, and each door spells it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import tdkit
from tdkit.cli.spelling import ShellSpelling
from tdkit.errors import close_names, command, option, spelled, spelling, unknown_name

PACKAGE = Path(tdkit.__file__).parent
CORE = sorted(
    str(path.relative_to(PACKAGE))
    for path in PACKAGE.rglob("*.py")
    if "cli" not in path.relative_to(PACKAGE).parts
)

# Not var(--ink), which is CSS.
_SHELL_OPTION = re.compile(r"(^|[^\w(-])--([a-z]|$)")


def test_python_is_spoken_to_in_python() -> None:
    assert option("input_shape", (3, 224, 224)) == "input_shape=(3, 224, 224)"
    assert option("methods", ["svd", "cp"]) == "methods=['svd', 'cp']"
    assert option("force", True) == "force=True"
    assert option("data") == "data="
    assert command("inspect") == "tdkit.inspect"


def test_the_shell_is_spoken_to_in_its_options() -> None:
    with spelled(ShellSpelling()):
        assert option("input_shape", (3, 224, 224)) == "--input-shape 3,224,224"
        assert option("methods", ["svd", "cp"]) == "--methods svd,cp"
        assert option("force", True) == "--force"
        assert option("data") == "--data"
        assert option("allow_classes", "mynet:MyNet") == "--allow-class mynet:MyNet"
        assert option("allow_classes", ["a:A", "b:B"]) == "--allow-class a:A --allow-class b:B"
        assert command("inspect") == "tdkit inspect"
        assert command("plan") == "tdkit compress --dry-run"
    assert option("data") == "data="


def test_other_threads_are_handed_the_spelling() -> None:
    assert spelling().option("force", True) == "force=True"
    with spelled(ShellSpelling()):
        assert spelling().option("force", True) == "--force"


def test_close_names_are_few_and_close() -> None:
    known = ["tucker", "tucker-2", "tucker-3", "tucker-4", "svd"]
    assert close_names("tuker", known) == ["tucker", "tucker-4", "tucker-3"]
    assert close_names("cp", known) == []
    assert unknown_name("cp", known[:2], "method").hint == "close names: tucker, tucker-2"


@pytest.mark.parametrize("file", CORE)
def test_no_message_of_the_core_spells_an_option(file) -> None:
    found = [text for text in texts(PACKAGE / file) if _SHELL_OPTION.search(text)]
    assert found == []


def test_options_in_text_are_seen() -> None:
    seen = ["--data", "give --input-shape", "f({x}) --allow-class", "--", "a\n--force b"]
    assert all(map(_SHELL_OPTION.search, seen))
    assert not any(map(_SHELL_OPTION.search, ["var(--ink)", "a---b", "two -- three", "x--y"]))


def texts(file: Path) -> Iterator[str]:
    """Every string in a file but those that document something."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant))
    for node in constants:
        if isinstance(node.value, str) and id(node) not in documentation:
            yield node.value
