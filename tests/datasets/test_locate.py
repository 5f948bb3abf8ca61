from pathlib import Path

import pytest

from tdkit.datasets.locate import cache_folder, search
from tdkit.errors import UnreadableFileError


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch) -> dict[str, Path]:
    names = ("root", "variable", "system", "home")
    found = {name: tmp_path / name for name in names}
    for folder in found.values():
        folder.mkdir()
    monkeypatch.setenv("TDKIT_DATA", str(found["variable"]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(found["home"]))
    return {**found, "cache": found["home"] / "tdkit"}


def look(places) -> Path | None:
    return search(("sub/raw",), "data-*", places["root"], [places["system"]])


def test_the_order_is_root_variable_system_cache(places):
    assert look(places) is None
    for name in ("cache", "system", "variable", "root"):
        places[name].mkdir(exist_ok=True)
        (places[name] / "data-1").touch()
        assert look(places) == places[name]


def test_sub_folders_are_searched_too(places):
    folder = places["root"] / "sub" / "raw"
    folder.mkdir(parents=True)
    (folder / "data-1").touch()
    (places["variable"] / "data-1").touch()
    assert look(places) == folder


def test_without_root_and_variable_the_rest_is_searched(places, monkeypatch):
    monkeypatch.delenv("TDKIT_DATA")
    (places["system"] / "data-1").touch()
    assert search((), "data-*", None, [places["system"]]) == places["system"]


def test_a_root_that_is_no_folder_is_named(places):
    with pytest.raises(UnreadableFileError, match=r"data_root=.*gone' is not a folder"):
        search((), "data-*", places["root"] / "gone")


def test_a_variable_that_names_no_folder_is_named(places, monkeypatch):
    monkeypatch.setenv("TDKIT_DATA", str(places["root"] / "gone"))
    with pytest.raises(UnreadableFileError, match=r"\$TDKIT_DATA=.*gone is not a folder"):
        search((), "data-*", None)


def test_the_cache_is_in_the_home_folder_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "tdkit"
