"""Settings: every bad value is met by one sentence that names the key, what was given and what is allowed."""

from dataclasses import FrozenInstanceError, dataclass
from typing import Literal

import pytest

from rayft.settings import STRICT, Count, CountOrZero, NonNegative, Positive, Share, check, defaults, explain


@dataclass(frozen=True)
class Base:
    """What all ovens are told."""

    __pydantic_config__ = STRICT

    heat: Positive = 180.0
    """Degrees, in the
    middle of the oven."""
    trays: Count = 2
    """How many."""


@dataclass(frozen=True)
class Oven(Base):
    """An oven."""

    trays: Count = 4
    """Trays of this one."""
    draught: NonNegative = 0.0
    """Fan speed; 0 is off."""
    steam: Share = 0.5
    """Part of the air."""
    pauses: CountOrZero = 0
    """Times the door is opened."""
    mode: Literal["bake", "grill"] = "bake"
    """What for."""
    limit: Positive | None = None
    """Minutes, or no end."""

    def __post_init__(self) -> None:
        if self.mode == "grill" and self.steam > 0.5:
            raise ValueError(f"steam is {self.steam} while grilling; set it to 0.5 or less, or bake")


def test_nothing_given_is_the_defaults():
    assert check("oven", Oven, {}) == Oven()


def test_values_are_kept_and_the_rest_is_the_defaults():
    found = check("oven", Oven, {"heat": 220.0, "mode": "grill", "limit": 30})
    assert found == Oven(heat=220.0, mode="grill", limit=30.0)
    assert isinstance(found.limit, float)


@pytest.mark.parametrize(("given", "wanted"), [("1e-4", 1e-4), ("2E2", 200.0), (3, 3.0)])
def test_numbers_that_yaml_reads_as_text_are_numbers_all_the_same(given, wanted):
    assert check("oven", Oven, {"heat": given}).heat == wanted


def test_none_is_a_value_where_it_is_allowed_and_nowhere_else():
    assert check("oven", Oven, {"limit": None}).limit is None
    with pytest.raises(ValueError, match=r"^oven\.heat is None; it should be "):
        check("oven", Oven, {"heat": None})


def test_a_misspelt_key_names_the_nearest_and_all_there_are():
    with pytest.raises(
        ValueError, match=r"^oven has no key 'drought' \(did you mean 'draught'\?\); it has .*mode, limit"
    ):
        check("oven", Oven, {"drought": 1.0})


def test_a_key_like_no_other_gets_no_guess():
    with pytest.raises(ValueError, match=r"^oven has no key 'zzz'; it has heat, trays"):
        check("oven", Oven, {"zzz": 1})


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("heat", 0, "greater than 0"),
        ("heat", -1.5, "greater than 0"),
        ("heat", "hot", "a valid number"),
        ("heat", float("nan"), "a finite number"),
        ("heat", float("inf"), "a finite number"),
        ("limit", 0, "greater than 0"),
        ("draught", -0.1, "greater than or equal to 0"),
        ("steam", 1.0, "less than 1"),
        ("steam", -0.1, "greater than or equal to 0"),
        ("trays", 0, "greater than or equal to 1"),
        ("trays", 2.5, "a valid integer"),
        ("trays", "two", "a valid integer"),
        ("pauses", -1, "greater than or equal to 0"),
        ("mode", "boil", "'bake' or 'grill'"),
    ],
)
def test_a_bad_value_is_one_sentence_with_key_value_and_what_is_allowed(key, value, allowed):
    with pytest.raises(ValueError, match="it should be") as caught:
        check("oven", Oven, {key: value})
    said = str(caught.value)
    assert said.startswith(f"oven.{key}")
    assert repr(value) in said and allowed in said
    assert "\n" not in said and "pydantic" not in said
    assert caught.value.__cause__ is None


def test_the_edges_of_what_is_allowed_are_allowed():
    found = check("oven", Oven, {"draught": 0, "steam": 0, "trays": 1, "pauses": 0, "heat": 1e-300})
    assert (found.draught, found.steam, found.trays, found.pauses) == (0, 0, 1, 0)


@pytest.mark.parametrize("key", ["heat", "trays"])
def test_true_is_not_a_number(key):
    with pytest.raises(ValueError, match=f"^oven.{key} is True"):
        check("oven", Oven, {key: True})


def test_a_sections_own_check_speaks_in_its_own_words():
    with pytest.raises(ValueError, match=r"^oven: steam is 0\.9 while grilling; set it to 0\.5 or less, or bake$"):
        check("oven", Oven, {"mode": "grill", "steam": 0.9})


def test_the_first_of_several_complaints_is_told():
    with pytest.raises(ValueError, match=r"^oven\.heat is -1"):
        check("oven", Oven, {"heat": -1, "trays": 0})


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(FrozenInstanceError):
        check("oven", Oven, {}).heat = 3.0


def test_defaults_are_those_of_the_class_itself_bases_included():
    assert defaults(Oven) == vars(Oven())
    assert defaults(Oven)["trays"] == 4 and defaults(Base)["trays"] == 2


def test_every_field_is_explained_by_the_string_under_it():
    assert explain(Base) == {"heat": "Degrees, in the middle of the oven.", "trays": "How many."}
    said = explain(Oven)
    assert said.keys() == defaults(Oven).keys()
    assert said["trays"] == "Trays of this one." and said["heat"] == "Degrees, in the middle of the oven."
