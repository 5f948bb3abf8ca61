"""What is installed from a package, where there is no repository around it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECIPES = {path.name for path in (ROOT / "recipes").glob("*.toml")}
PARTS = ("tdkit", "recipes", "pyproject.toml", "README.md", "LICENSE")

BUILD = """
import sys
from setuptools import build_meta
target = sys.argv[1]  # the builds change it
build_meta.build_wheel(target)
build_meta.build_sdist(target)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel and a source distribution."""
    pytest.importorskip("setuptools", minversion="77")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in PARTS:
        if (ROOT / name).is_dir():
            unwanted = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=unwanted)
        else:
            shutil.copyfile(ROOT / name, source / name)
    command = [sys.executable, "-c", BUILD, str(target)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return target


def test_a_wheel_holds_every_recipe(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        found = {name for name in wheel.namelist() if name.endswith(".toml")}
        assert found == {f"tdkit/assets/recipes/{name}" for name in RECIPES}
        for name in RECIPES:
            content = wheel.read(f"tdkit/assets/recipes/{name}")
            assert content == (ROOT / "recipes" / name).read_bytes()


def test_so_does_a_source_distribution_also_where_links_are_not_followed(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        folder = archive.getnames()[0].partition("/")[0]
        for name in RECIPES:
            member = archive.getmember(f"{folder}/tdkit/assets/recipes/{name}")
            assert member.isfile()
