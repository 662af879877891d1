"""Composition: what a YAML may say of rewards, what becomes of it, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from test_aggregate import NAN, SHORT, combine, read, total

from rayft.aggregate import Component, Recipe
from rayft.compose import recipe

# -- one reward


class Docking:
    """A reward of the user's own."""

    def __init__(self, receptor: str = "", weight: float = 1.0) -> None: ...

    def __call__(self, samples: Any) -> Any: ...


def test_one_reward_is_one_part_with_its_scores_as_they_are():
    made = read("qed")
    assert made == Recipe((Component("qed", "qed"),))
    assert (made.undecodable, made.needs_fit, made.stages) == (None, False, [[0]])
    assert total(made, {"qed": [0.1, -7.3, 1e30]}) == [0.1, -7.3, 1e30]


@pytest.mark.parametrize(
    ("path", "name"),
    [("qed", "qed"), (f"{__name__}:Docking", "Docking"), (Docking, "Docking"), (Docking(), "Docking"), (len, "reward")],
)
def test_one_reward_is_named_by_its_last_word(path, name):
    made = recipe(path, {}, None, SHORT).components[0]
    assert (made.name, made.path) == (name, path) or path is len


def test_every_key_of_one_reward_is_its_own_argument():
    made = read("{name: 'test_compose:Docking', receptor: x.pdbqt, weight: 2}").components[0]
    assert made.arguments == {"receptor": "x.pdbqt", "weight": 2}
    assert made.weight == 1.0


# -- what is watched


@pytest.mark.parametrize(
    ("watch", "names"),
    [
        (None, []),
        ([], []),
        ("sa", ["sa"]),
        (["sa", {"name": f"{__name__}:Docking", "receptor": "x"}], ["sa", "Docking"]),
        ({"name": "sa"}, ["sa"]),
        ({"mine": {"name": f"{__name__}:Docking", "arguments": {"receptor": "x"}}, "other": "sa"}, ["mine", "other"]),
        ({"name": {"name": "sa"}}, ["name"]),
    ],
)
def test_watched_rewards_are_components_that_never_enter_the_total(watch, names):
    made = read("qed", watch)
    assert [part.name for part in made.components if part.watched] == names
    assert [part.name for part in made.parts] == ["qed"]
    assert {part.arguments.get("receptor") for part in made.components if "ocking" in str(part.path)} <= {"x"}
    assert total(made, {"qed": [0.5], **{name: [NAN] for name in names}}) == [0.5]


# -- what is refused


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("qde", r"no reward 'qde' \(did you mean 'qed'\?\); this domain has qed"),
        (
            "{name: 'test_compose:Docking', transform: sigmoid}",
            "takes no 'transform'.*is for a part of reward: {name: com",
        ),
        ("{name: combine}", "reward.parts is None; it should be a mapping"),
        ("{name: combine, parts: [qed]}", "reward.parts is .*'qed'.*; it should be a mapping"),
        ("{name: combine, part: {}}", r"reward has no key 'part' \(did you mean 'parts'\?\); combine has aggregate, "),
        (
            "{name: combine, aggregate: geometri, parts: {a: qed}}",
            r"reward.aggregate is 'geometri' \(did you mean 'geom",
        ),
        ("{name: combine, floor: low, parts: {a: qed}}", "reward.floor is 'low'; it should be a number"),
        ("{name: combine, undecodable: yes, parts: {a: qed}}", "reward.undecodable is True; it should be a number"),
        ("A: qde", r"reward.parts.A: no reward 'qde' \(did you mean 'qed'\?\)"),
        ("A: {weight: 1}", "reward.parts.A has no name; write reward.parts.A: {name: NAME"),
        ("A: {name: combine}", "reward.parts.A.name is 'combine'; parts and watched rewards are single"),
        ("'a b': qed", "reward.parts.a b: the name 'a b' should be letters"),
        (
            "A: {name: 'test_compose:Docking', recepto: x}",
            r"parts.A: .*takes no 'recepto' \(did you mean 'receptor'\?\)",
        ),
        (
            "A: {name: 'test_compose:Docking', wieght: 2}",
            "parts.A: .*takes no 'wieght'.*; of its own a part has name, ",
        ),
        ("A: {name: qed, arguments: 3}", "parts.A.arguments is 3; it should be a mapping"),
        ("A: {name: 'test_compose:Docking', receptor: x, arguments: {receptor: y}}", "parts.A.receptor is there twice"),
        ("A: {name: qed, weight: heavy}", "parts.A.weight is 'heavy'; it should be a number"),
        ("A: {name: qed, weight: {}}", "parts.A.weight is empty; write a number, or iterations"),
        ("A: {name: qed, weight: {-1: 2}}", "parts.A.weight has '?-1'? as an iteration; it should be a whole number"),
        ("A: {name: qed, weight: {5: x}}", "parts.A.weight.5 is 'x'; it should be a number"),
        ("A: {name: qed, transform: sigmod}", r"A.transform is 'sigmod' \(did you mean 'sigmoid'\?\).*zscore"),
        (
            "A: {name: qed, transform: {sigmoid: {center: 4}}}",
            r"A.transform.sigmoid has no key 'center' \(did you mean 'c",
        ),
        ("A: {name: qed, transform: {sigmoid: {}, clip: {}}}", "A.transform is .*; write one as .*, several as a list"),
        ("A: {name: qed, transform: {sigmoid: 4}}", "A.transform.sigmoid is 4; it should be a mapping"),
        ("A: {name: qed, transform: {sigmoid: {scale: 0}}}", "A.transform.sigmoid: scale is 0; give the distance"),
        (
            "A: {name: qed, transform: {sigmoid: {scale: wide}}}",
            "A.transform.sigmoid.scale is 'wide'; it should be a.* number",
        ),
        ("A: {name: qed, transform: step}", "A.transform.step.at is missing"),
        ("A: {name: qed, transform: clip}", "A.transform.clip: clip has no bound; give low, high or both"),
        ("A: {name: qed, transform: {clip: {low: 2, high: 1}}}", "A.transform.clip: low is 2, above high, which is 1"),
        ("A: {name: qed, transform: window}", "A.transform.window: window has no bound"),
        ("A: {name: qed, transform: {zscore: {std: 0}}}", "A.transform.zscore: std is 0; it should be above 0"),
        ("A: {name: qed, only_if: sa}", "parts.A.only_if is 'sa'; it should be a mapping such as"),
        ("A: {name: qed, only_if: {B: 1}}", "parts.A.only_if is 'B'; it should be one of A"),
        ("{AB: qed, A: {name: qed, only_if: {AC: 1}}}", r"A.only_if is 'AC' \(did you mean 'A'\?\); .*one of AB, A"),
        ("{A: qed, B: {name: qed, only_if: {A: low}}}", "B.only_if.A is 'low'; it should be a number"),
        ("A: {name: qed, otherwise: 1}", "A.otherwise is what it counts where only_if does not let it be called"),
        ("A: {name: qed, only_if: {A: 1}}", "only_if goes round in a circle, A -> A; take one of them out"),
        ("A: {name: qed, at_least: 1}", "A.at_least needs aggregate: constraint; it is 'sum'"),
    ],
)
def test_what_makes_no_recipe_is_refused_in_one_sentence(text, said):
    text = text if text.startswith("{name") or text == "qde" else f"{{name: combine, parts: {_braced(text)}}}"
    with pytest.raises(ValueError, match=said) as error:
        read(text)
    assert "\n" not in str(error.value)


def _braced(text: str) -> str:
    return text if text.startswith("{") else f"{{{text}}}"


def test_a_circle_of_filters_is_shown():
    parts = {name: {"name": "qed", "only_if": {other: 0}} for name, other in ("ab", "bc", "cb")}
    with pytest.raises(ValueError, match="in a circle, b -> c -> b; take"):
        combine(parts=parts)


@pytest.mark.parametrize(
    ("aggregate", "parts", "said"),
    [
        ("constraint", {"a": "qed"}, "'constraint' and no part has at_least"),
        ("constraint", {"a": {"name": "qed", "at_least": 1, "weight": 2}}, "parts.a has both weight and at_least"),
        (
            "geometric",
            {"a": {"name": "qed", "weight": -1}, "b": "sa"},
            "a.weight is negative; with geometric it should",
        ),
        ("product", {"a": {"name": "qed", "weight": {0: 1, 5: -1}}}, "a.weight is negative; with product it should"),
        ("geometric", {"a": {"name": "qed", "weight": {0: 0, 5: 1}}}, "at iteration 0 all weights are 0"),
    ],
)
def test_weights_that_mean_nothing_to_the_aggregate_are_refused(aggregate, parts, said):
    with pytest.raises(ValueError, match=said):
        combine(aggregate, parts)


@pytest.mark.parametrize(
    ("watch", "said"),
    [
        (["qed"], "two rewards are called 'qed'; name one"),
        (["sa", "sa"], "two rewards are called 'sa'"),
        (["sq"], "watch.0: no reward 'sq'"),
        ({"mine": {"receptor": "x"}}, "watch.mine has no name"),
        ([{"name": f"{__name__}:Docking", "only_if": {}}], "watch.0: .*takes no 'only_if'"),
        (["combine"], "watch.0.name is 'combine'; parts and watched"),
    ],
)
def test_what_cannot_be_watched_is_refused(watch, said):
    with pytest.raises(ValueError, match=said):
        read("qed", watch)
