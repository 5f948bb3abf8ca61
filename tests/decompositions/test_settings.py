"""Settings of methods: made by name, checked, remembered."""

from typing import Any

import pytest

from tdkit.decompositions.cp import Cp
from tdkit.decompositions.settings import create, settings_of
from tdkit.decompositions.svd import Svd
from tdkit.decompositions.tucker import Tucker
from tdkit.errors import UsageError
from tdkit.hookspecs import DecompositionRecord
from tdkit.registry import load_registry, resolve_methods

RECORDS = load_registry().decompositions


class Of(Svd):
    """Settings of every kind, and what is kept that is none."""

    def __init__(
        self,
        whole: int = 3,
        share: float = 0.5,
        deep: bool = False,
        name: str = "plain",
        anything: Any = None,
    ) -> None:
        if name == "worse":
            raise ValueError("no such name\nnor another")
        self.whole, self.share, self.deep, self.name = whole, share, deep, name
        self.anything = anything
        self.follows = 2 * whole
        self._secret = 7
        self.table = [whole]


OF = DecompositionRecord("of", "settings of every kind", Of)


@pytest.mark.parametrize("name", RECORDS)
def test_every_registered_method_is_created_with_its_own_settings(name: str) -> None:
    made = RECORDS[name].create()
    known = settings_of(made)
    again = create(RECORDS[name], known)
    assert type(again).__name__ == type(made).__name__
    assert settings_of(again) == known


def test_defaults_count_and_what_follows_does_not() -> None:
    assert settings_of(Cp()) == {
        "sweeps": 5,
        "tolerance": 1e-3,
        "ridge": 1e-10,
        "start": "orthogonal",
    }
    assert settings_of(Tucker(sweeps=2)) == {"sweeps": 2, "tolerance": 1e-5}
    assert settings_of(Svd()) == {}
    assert settings_of(Of()) == {"whole": 3, "share": 0.5, "deep": False, "name": "plain"}


def test_those_given_are_in_force() -> None:
    made = create(OF, {"whole": 4, "share": 1, "deep": True, "name": "x"})
    assert isinstance(made, Of)
    assert (made.whole, made.share, made.deep, made.name) == (4, 1, True, "x")
    assert settings_of(made) == {"whole": 4, "share": 1, "deep": True, "name": "x"}
    assert settings_of(create(OF, {})) == settings_of(Of())
    assert settings_of(create(OF, {"anything": "goes"}))["anything"] == "goes"


def test_unknown_names_are_refused_with_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"^of has no setting 'hole'$") as caught:
        create(OF, {"hole": 4})
    assert caught.value.hint == "it has whole, share, deep, name, anything"
    with pytest.raises(UsageError, match=r"^svd has no setting 'sweeps'$") as caught:
        create(RECORDS["svd"], {"sweeps": 4})
    assert caught.value.hint == "it has none"
    with pytest.raises(UsageError, match=r"^cp has no setting 'random'$") as caught:
        create(RECORDS["cp"], {"random": True})
    assert caught.value.hint == "it has sweeps, tolerance, ridge, start"


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("whole", 2.0, "a whole number"),
        ("whole", "2", "a whole number"),
        ("whole", True, "a whole number"),
        ("share", "0.5", "a number"),
        ("share", False, "a number"),
        ("share", None, "a number"),
        ("deep", 1, "true or false"),
        ("deep", "true", "true or false"),
        ("name", 5, "a text"),
        ("name", ["x"], "a text"),
    ],
)
def test_values_of_another_kind_are_refused(key: str, value: Any, kind: str) -> None:
    with pytest.raises(UsageError, match=f"the setting {key} of of is {kind}, not ") as caught:
        create(OF, {key: value})
    assert str(caught.value.hint).startswith("its default is ")


def test_what_a_constructor_refuses_is_told() -> None:
    with pytest.raises(UsageError, match="of does not take the settings name = 'worse': no such"):
        create(OF, {"name": "worse"})
    with pytest.raises(UsageError, match="unknown start 'best'"):
        create(RECORDS["cp"], {"start": "best"})
    with pytest.raises(UsageError, match="the setting sweeps must be at least 0, not -1"):
        create(RECORDS["cp"], {"sweeps": -1})


def test_a_create_that_is_a_function_says_what_it_takes() -> None:
    def make(whole: int = 3) -> Of:
        return Of(whole, name="made")

    made = create(DecompositionRecord("made", "by a function", make), {"whole": 9})
    assert isinstance(made, Of)
    assert (made.whole, made.name) == (9, "made")
    with pytest.raises(UsageError, match="made has no setting 'name'") as caught:
        create(DecompositionRecord("made", "by a function", make), {"name": "x"})
    assert caught.value.hint == "it has whole"


def test_settings_go_to_the_methods_that_are_used() -> None:
    registry = load_registry()
    made = resolve_methods(registry, ["cp", "tucker"], {"CP": {"sweeps": 9}})
    assert settings_of(made["cp"])["sweeps"] == 9
    assert settings_of(made["tucker"]) == settings_of(Tucker())
    with pytest.raises(UsageError, match="settings for cp, which is not among the methods"):
        resolve_methods(registry, ["svd"], {"cp": {"sweeps": 9}})
    with pytest.raises(UsageError, match="no method named 'pc'"):
        resolve_methods(registry, ["svd"], {"pc": {}})


@pytest.mark.parametrize(
    ("record", "kept"),
    [
        (DecompositionRecord("my", "takes nothing", lambda: Of(whole=4)), {}),
        (DecompositionRecord("my", "takes some", lambda whole=4: Of(whole)), {"whole": 4}),
        (DecompositionRecord("my", "takes all", lambda **given: Of(**given)), settings_of(Of())),
    ],
    ids=lambda value: value.summary if isinstance(value, DecompositionRecord) else "",
)
def test_only_what_the_record_takes_is_remembered(
    record: DecompositionRecord, kept: dict[str, Any]
) -> None:
    made = create(record, {})
    assert settings_of(made) == kept
    assert settings_of(create(record, settings_of(made))) == kept
