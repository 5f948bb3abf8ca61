"""What docstrings of public functions promise: what is raised, and the shapes of tensors."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import tdkit

PACKAGE = Path(tdkit.__file__).parent

# (n, channels, height, width), (batch, ...), (out/groups, in, *kernel), (n,)
_TOKEN = r"(?:\*?\w[\w/*+-]*|\.\.\.)"
_SHAPE = re.compile(rf"\({_TOKEN}(?:,|(?:, {_TOKEN})+)\)|any shape|\b[Ss]calar")

# What says that a program is wrong, and is for nobody to catch.
_UNSAID = {"AssertionError", "NotImplementedError"}


@dataclass(frozen=True)
class Documented:
    """A public function or method, and what its source says."""

    name: str
    node: ast.FunctionDef
    docstring: str

    @property
    def raised(self) -> set[str]:
        """Classes of the errors that its own body raises; what a helper makes is ``?``."""
        return set(_raised(self.node)) - _UNSAID

    @property
    def undocumented_errors(self) -> set[str]:
        _, found, section = self.docstring.partition("Raises:\n")
        if not found:
            return self.raised
        # The base stands for all of tdkit's errors.
        return (
            set()
            if "TdkitError" in section
            else {name for name in self.raised if name != "?" and name not in section}
        )

    @property
    def has_tensors(self) -> bool:
        arguments = self.node.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        every += [each for each in (arguments.vararg, arguments.kwarg) if each is not None]
        hints = [each.annotation for each in every] + [self.node.returns]
        return any(re.search(r"\bTensor\b", ast.unparse(hint)) for hint in hints if hint)


def _raised(node: ast.AST) -> Iterator[str]:
    """What leaves a node: without functions inside, and what is caught there or raised again."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            continue
        if isinstance(child, ast.Raise) and child.exc is not None:
            made = isinstance(child.exc, ast.Call)
            name = ast.unparse(child.exc.func if made else child.exc).rpartition(".")[2]
            if name[:1].isupper():
                yield name
            elif made:
                yield "?"
        found = _raised(child)
        if isinstance(child, ast.Try):
            caught = {
                name
                for handler in child.handlers
                for name in re.findall(r"\w+", ast.unparse(handler.type or ast.Constant("")))
            }
            found = (name for name in found if name not in caught)
        yield from found


def documented(source: str, module: str) -> list[Documented]:
    """The public functions and methods of a module."""
    return list(_documented(ast.parse(source), module))


def _documented(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[Documented]:
    for child in node.body:
        if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from _documented(child, f"{prefix}.{child.name}")
        elif isinstance(child, ast.FunctionDef) and not _is_apart(child.name, prefix):
            yield Documented(f"{prefix}.{child.name}", child, ast.get_docstring(child) or "")


def _is_apart(name: str, prefix: str) -> bool:
    """Whether a function is private, or a command, whose docstring is a page of help."""
    is_private = name.startswith("_") and name != "__call__"
    return is_private or prefix == f"tdkit.cli.{name}"


EVERYTHING = [
    each
    for path in sorted(PACKAGE.rglob("*.py"))
    for each in documented(
        path.read_text(encoding="utf-8"),
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"),
    )
]


def test_what_is_raised_is_documented() -> None:
    silent = {each.name for each in EVERYTHING if each.undocumented_errors}
    assert silent == set(), "say what these raise, under Raises:"


def test_tensors_have_their_shapes_documented() -> None:
    shapeless = {
        each.name for each in EVERYTHING if each.has_tensors and not _SHAPE.search(each.docstring)
    }
    assert shapeless == set(), "name the shapes of their tensors"


EXAMPLE = """
def silent(x: Tensor) -> None:
    '''An image (or two), in any order.'''
    raise UsageError("no")

def half(x: int) -> "Tensor":
    '''A map (n, channels, ...).

    Raises:
        UsageError: If there is none.
    '''
    if x:
        raise errors.UsageError("no")
    raise StorageError from None

def good(*x: Tensor) -> None:
    '''Vectors (n,).

    Raises:
        TdkitError: Of the kind that fits.
    '''
    raise UsageError("no")

def again(x: NDArray) -> None:
    '''Does it again.'''
    try:
        if not x:
            raise TypeError
    except ValueError as error:
        def inside(): raise UsageError("no")
        raise error
    except TypeError:
        raise

def helped() -> None:
    '''Lets a helper make it.'''
    raise _unknown("no")

def _private(x: Tensor) -> None:
    raise UsageError("no")

class A:
    def method(self, x: Tensor) -> None:
        '''A value of any shape.'''
        raise UsageError
"""


def test_the_reading_of_sources() -> None:
    found = {each.name: each for each in documented(EXAMPLE, "m")}
    assert {name: each.undocumented_errors for name, each in found.items()} == {
        "m.silent": {"UsageError"},
        "m.half": {"StorageError"},
        "m.good": set(),
        "m.again": set(),
        "m.helped": {"?"},
        "m.A.method": {"UsageError"},
    }
    assert [name for name, each in found.items() if each.has_tensors] == [
        "m.silent", "m.half", "m.good", "m.A.method",
    ]  # fmt: skip
    assert [name for name, each in found.items() if _SHAPE.search(each.docstring)] == [
        "m.half", "m.good", "m.A.method",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["(batch, ...)", "(n,)", "(out/groups, in, *kernel)", "(1, 3, 8)"])
def test_shapes(text) -> None:
    assert _SHAPE.search(f"Images {text}.")


@pytest.mark.parametrize("text", ["(if any)", "(n)", "(such as this, or that)", "()", "f(x)"])
def test_no_shapes(text) -> None:
    assert not _SHAPE.search(f"Images {text}.")
