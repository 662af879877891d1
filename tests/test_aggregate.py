"""From several scores to one reward: aggregates, transforms, curricula and filters, in numbers worked by hand."""

from __future__ import annotations

import json
import math
import pickle
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rayft.aggregate import Clip, Recipe, Sigmoid, Step, Window, Zscore
from rayft.compose import recipe

SHORT = dict.fromkeys(("qed", "sa", "mw", "dock"), "builtins:len")
NAN = float("nan")


def read(text: str, watch: Any = None) -> Recipe:
    """The recipe of a YAML's ``reward:``."""
    tree = yaml.safe_load(text)
    tree = tree if isinstance(tree, dict) else {"name": tree}
    return recipe(tree.pop("name"), tree, watch, SHORT)


def combine(aggregate: str = "sum", parts: dict[str, Any] | None = None, **more: Any) -> Recipe:
    return recipe("combine", {"aggregate": aggregate, "parts": parts or {}, **more}, None, SHORT)


def total(made: Recipe, raw: dict[str, Any], iteration: int | None = None) -> list[float]:
    columns = {name: np.array(column, dtype=float) for name, column in raw.items()}
    rewards, errors = made.total(columns, iteration, {})
    assert not errors, errors
    return rewards.tolist()


# -- the aggregates


PARTS = {"a": {"name": "qed", "weight": 0.75}, "b": {"name": "sa", "weight": 0.25}}
RAW = {"a": [1.0, 0.0, 16.0], "b": [0.5, 1.0, 81.0]}


def test_sum_weighs_and_adds():
    assert total(combine("sum", PARTS), RAW) == [0.875, 0.25, 32.25]


def test_sum_takes_weights_of_any_sign():
    made = combine(parts={"a": "qed", "b": {"name": "sa", "weight": -2}})
    assert total(made, RAW) == [0.0, -2.0, -146.0]


def test_geometric_is_a_mean_whatever_the_scale_of_the_weights():
    for scale in (1, 10):
        parts = {name: {**part, "weight": part["weight"] * scale} for name, part in PARTS.items()}
        assert total(combine("geometric", parts), RAW) == pytest.approx([0.5**0.25, 0.0, 8 * 3])


def test_product_raises_each_part_to_its_weight():
    made = combine("product", {"a": "qed", "b": {"name": "sa", "weight": 0.5}})
    assert total(made, RAW) == pytest.approx([math.sqrt(0.5), 0.0, 144.0])


def test_a_product_of_whole_weights_takes_negative_scores():
    made = combine("product", {"a": "qed", "b": {"name": "sa", "weight": 2}})
    assert total(made, {"a": [-2.0], "b": [-3.0]}) == [-18.0]


@pytest.mark.parametrize(
    ("aggregate", "reason"),
    [
        ("geometric", "aggregate: a is negative in a geometric mean"),
        ("product", "aggregate: a is negative in a product with a weight that is no whole number"),
    ],
)
def test_a_negative_score_that_has_no_root_is_a_failure_and_no_number(aggregate, reason):
    rewards, errors = combine(aggregate, PARTS).total({"a": np.array([-1.0, 1]), "b": np.ones(2)}, None, {})
    assert np.isnan(rewards[0])
    assert rewards[1] == 1
    assert errors == {0: reason}


def test_a_part_of_weight_zero_may_be_negative_in_a_geometric_mean():
    made = combine("geometric", {"a": {"name": "qed", "weight": {0: 0, 10: 1}}, "b": "sa"})
    assert total(made, {"a": [-4.0], "b": [9.0]}, 0) == [9.0]


def test_constraint_in_numbers():
    """K = 2, floor 0.5: -1.5 + s where the first fails, -0.5 + s where the second does, else max(0.5, objective)."""
    parts = {
        "c1": {"name": "mw", "at_least": 0.5},
        "goal": {"name": "qed", "weight": 2},
        "c2": {"name": "sa", "at_least": 3},
    }
    made = combine("constraint", parts, floor=0.5)
    raw = {"c1": [0.0, 0.5, 0.5, 0.9], "c2": [9.0, 2.0, 3.0, 4.0], "goal": [8.0, 8.0, 0.1, 8.0]}
    first, second = 0.5 - 2 + 1 / 1.5, 0.5 - 1 + 1 / 2
    assert total(made, raw) == pytest.approx([first, second, 0.5, 16.0], abs=2e-6)
    assert made.undecodable == -1.5


def test_a_reward_that_overflows_is_a_failure():
    rewards, errors = combine("product", {"a": "qed", "b": "sa"}).total(
        {"a": np.array([1e200]), "b": np.array([1e200])}, None, {}
    )
    assert np.isnan(rewards[0])
    assert errors == {0: "aggregate: the reward is not finite"}


SCORE = st.floats(-1e3, 1e3, allow_subnormal=False)
CONSTRAINTS = combine(
    "constraint", {"goal": "qed", "first": {"name": "mw", "at_least": 1}, "then": {"name": "sa", "at_least": -2}}
)


@given(st.lists(st.tuples(SCORE, SCORE, SCORE), min_size=2, max_size=2))
@settings(deadline=None, max_examples=200)
def test_constraint_is_lexicographic_and_monotone(events):
    """The rewards of two events are ordered as (constraints held before the first violated one, its score) is."""

    def rank(goal: float, first: float, then: float) -> tuple[int, float]:
        if first < 1:
            return 0, first
        return (1, then) if then < -2 else (2, max(goal, 0.0))

    goal, first, then = (list(column) for column in zip(*events, strict=True))
    left, right = total(CONSTRAINTS, {"goal": goal, "first": first, "then": then})
    low, high = sorted([(rank(*events[0]), left), (rank(*events[1]), right)])
    assert low[1] <= high[1]
    if low[0][0] != high[0][0]:
        assert low[1] < high[1]
        assert np.float32(low[1]) < np.float32(high[1]) or high[1] - low[1] < 1e-5
    elif high[0][1] - low[0][1] > 1e-3:
        assert low[1] < high[1]
    assert CONSTRAINTS.undecodable < low[1]


@given(st.lists(SCORE, min_size=1, max_size=5))
@settings(deadline=None)
def test_a_sum_of_one_part_of_weight_one_is_the_identity(scores):
    assert total(combine(parts={"a": "qed"}), {"a": scores}) == scores


@given(st.permutations("abcd"), st.sampled_from(["sum", "geometric", "product"]), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_the_order_of_parts_is_irrelevant(order, aggregate, random):
    parts = {name: {"name": "qed", "weight": random.uniform(0.1, 2)} for name in "abcd"}
    raw = {name: [random.uniform(0, 3) for _ in range(3)] for name in "abcd"}
    shuffled = combine(aggregate, {name: parts[name] for name in order})
    assert total(shuffled, raw) == pytest.approx(total(combine(aggregate, parts), raw), rel=1e-12)


# -- transforms


@pytest.mark.parametrize(
    ("transform", "raw", "value"),
    [
        ("{sigmoid: {centre: 4, scale: -1}}", [4.0, 4 - math.log(3), 1e6], [0.5, 0.75, 0.0]),
        ("sigmoid", [0.0, math.log(4), -1e6], [0.5, 0.8, 0.0]),
        ("{step: {at: 2}}", [1.9, 2.0, 3.0], [0.0, 1.0, 1.0]),
        ("{step: {at: 2, below: true}}", [1.9, 2.0, 3.0], [1.0, 1.0, 0.0]),
        ("{clip: {low: 0, high: 1}}", [-2.0, 0.25, 9.0], [0.0, 0.25, 1.0]),
        ("{clip: {high: 1}}", [-2.0, 9.0], [-2.0, 1.0]),
        ("{window: {low: 2, high: 4, scale: 2}}", [2.0, 4.0, 6.0, -2.0], [1.0, 1.0, np.exp(-0.5), np.exp(-2)]),
        ("{window: {high: 4}}", [-9.0, 5.0], [1.0, np.exp(-0.5)]),
        ("{zscore: {mean: 3, std: 2}}", [3.0, 7.0], [0.0, 2.0]),
        ("[{clip: {low: 0}}, {zscore: {mean: 1, std: 2}}, {clip: {high: 1}}]", [-9.0, 2.0, 9.0], [-0.5, 0.5, 1.0]),
    ],
)
def test_transforms_in_numbers(transform, raw, value):
    made = read(f"{{name: combine, parts: {{a: {{name: qed, transform: {transform}}}}}}}")
    assert total(made, {"a": raw}) == pytest.approx(value)


def test_a_failed_score_stays_failed_through_every_transform():
    for transform in (Sigmoid(), Step(0.0), Step(0.0, below=True), Clip(0.0, 1.0), Window(0.0, 1.0), Zscore(0.0, 1.0)):
        assert np.isnan(transform(np.array([NAN]), ())).all()


def test_a_zscore_takes_its_numbers_once_from_the_pretrained_scores():
    parts = {"a": {"name": "qed", "transform": [{"clip": {"low": 0}}, "zscore"]}, "b": "sa"}
    made = combine(parts=parts)
    assert made.needs_fit
    raw = {"a": np.array([-5.0, 2.0, 4.0, NAN]), "b": np.zeros(4)}
    fitted = made.fitted(raw)
    mean, std = 2.0, math.sqrt(8 / 3)
    assert fitted.fit == {"a.1": (pytest.approx(mean), pytest.approx(std))}
    assert not fitted.needs_fit
    assert total(fitted, {"a": [4.0], "b": [1.0]}) == pytest.approx([2 / std + 1])
    assert fitted.fitted({"a": np.array([7.0, 8.0]), "b": np.zeros(2)}) == fitted
    with pytest.raises(AssertionError, match=r"a\.1 was not fitted"):
        made.total(raw, None, {})


def test_a_zscore_keeps_what_is_given_and_a_constant_has_a_spread_of_one():
    made = combine(parts={"a": {"name": "qed", "transform": [{"zscore": {"mean": 1}}, "zscore"]}})
    fitted = made.fitted({"a": np.array([5.0, 5.0])})
    assert fitted.fit == {"a.0": (5.0, 1.0), "a.1": (4.0, 1.0)}
    assert total(fitted, {"a": [7.0]}) == [2.0]


def test_a_zscore_without_scores_says_so():
    made = combine(parts={"a": {"name": "qed", "transform": "zscore"}})
    with pytest.raises(ValueError, match="a scored 1 of the pretrained samples; zscore needs 2"):
        made.fitted({"a": np.array([NAN, 1.0])})


def test_fitted_numbers_come_back_from_a_checkpoint():
    made = combine(parts={"a": {"name": "qed", "transform": "zscore"}, "b": "sa"})
    fitted = made.fitted({"a": np.array([0.1, 0.7, 0.4]), "b": np.zeros(3)})
    state = json.loads(json.dumps(fitted.state()))
    assert made.with_state(state) == fitted
    assert fitted.with_state(made.state()) == made
    assert pickle.loads(pickle.dumps(fitted)) == fitted
    with pytest.raises(ValueError, match=r"the checkpoint has a zscore 'a\.0', and this reward does not"):
        combine(parts={"b": "sa"}).with_state(state)


# -- curricula


@pytest.mark.parametrize(
    ("iteration", "weight"),
    [(0, 0.5), (10, 0.5), (15, 0.75), (20, 1.0), (60, 0.6), (100, 0.2), (10**6, 0.2), (None, 0.2)],
)
def test_a_curriculum_is_linear_between_its_knots_and_flat_beyond(iteration, weight):
    made = combine(parts={"a": {"name": "qed", "weight": {"100": 0.2, 10: 0.5, 20: 1.0}}, "b": "sa"})
    assert total(made, {"a": [2.0], "b": [1.0]}, iteration) == pytest.approx([2 * weight + 1])


def test_a_part_is_called_while_its_weight_is_zero():
    made = combine(parts={"a": {"name": "qed", "weight": {0: 0, 10: 1}}, "b": "sa"})
    assert made.passing(0, {"b": np.ones(3)}).all()
    rewards, errors = made.total({"a": np.array([NAN]), "b": np.ones(1)}, 0, {})
    assert np.isnan(rewards).all()
    assert errors == {0: "component: a failed"}


# -- stages


CHAIN = """
name: combine
parts:
  dock: {name: dock, only_if: {sa: 0.2, qed: 0.5}, otherwise: -1}
  sa: {name: sa, only_if: {qed: 0.3}, otherwise: 10}
  qed: qed
  mw: mw
"""


def test_stages_are_three_deep_and_each_needs_those_before_it_only():
    made = read(CHAIN, watch={"seen": "qed"})
    assert [[made.components[i].name for i in stage] for stage in made.stages] == [
        ["qed", "mw", "seen"],
        ["sa"],
        ["dock"],
    ]
    assert made.passing(2, {}).shape == ()
    qed = {"qed": np.array([0.2, 0.4, 0.6, 0.6, NAN])}
    assert made.passing(2, qed).tolist() == [True] * 5
    assert made.passing(1, qed).tolist() == [False, True, True, True, False]
    sa = {**qed, "sa": np.array([NAN, 0.9, 0.1, 0.2, NAN])}
    assert made.passing(0, sa).tolist() == [False, False, False, True, False]


def test_what_no_filter_lets_through_has_its_own_value_and_is_no_failure():
    made = read(CHAIN)
    raw = {
        "qed": np.array([0.2, 0.4, 0.6]),
        "sa": np.array([NAN, 0.9, 0.5]),
        "dock": np.array([NAN, NAN, 7.0]),
        "mw": np.zeros(3),
    }
    called = {name: ~np.isnan(column) for name, column in raw.items()}
    rewards, errors = made.total(raw, None, called)
    assert errors == {}
    assert rewards.tolist() == pytest.approx([0.2 + 10 - 1, 0.4 + 0.9 - 1, 0.6 + 0.5 + 7])


def test_a_score_that_was_there_although_no_filter_passed_changes_nothing():
    made = read(CHAIN)
    raw = {"qed": np.array([0.2]), "sa": np.array([0.9]), "dock": np.array([5.0]), "mw": np.zeros(1)}
    assert made.passing(0, raw).tolist() == [False]
    assert total(made, raw) == pytest.approx([0.2 + 10 - 1])


def test_a_failed_filter_fails_the_reward_and_is_the_one_that_is_named():
    made = read(CHAIN)
    raw = {"qed": np.array([NAN, 0.6]), "sa": np.array([NAN, NAN]), "dock": np.full(2, NAN), "mw": np.array([NAN, 1.0])}
    rewards, errors = made.total(raw, None, {})
    assert np.isnan(rewards).all()
    assert errors == {0: "component: qed, mw failed", 1: "component: sa failed"}


def test_an_undecodable_event_has_neither_reward_nor_reason():
    made = combine(parts={"a": "qed", "b": "sa"})
    raw = {"a": np.array([NAN, 1.0]), "b": np.array([NAN, NAN])}
    called = {name: np.array([False, True]) for name in raw}
    rewards, errors = made.total(raw, None, called)
    assert np.isnan(rewards).all()
    assert errors == {1: "component: b failed"}
