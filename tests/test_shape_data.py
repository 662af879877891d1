"""Shapes as arrays: taken, chosen, normalised, fitted and split."""

from __future__ import annotations

import numpy as np
import pytest

from envs.shapes.data import Shapes, Skipped, collate, fitted, normalised, split

KINDS = [("aircraft", "Helicopter"), ("aircraft", "Jet"), ("vehicle", "Bus"), ("", "Cup")]


def shapes(*counts: int, num_points: int = 20) -> Shapes:
    """So many of each of the KINDS."""
    rng = np.random.default_rng(0)
    kinds = [kind for kind, count in zip(KINDS, counts, strict=False) for _ in range(count)]
    names = [f"{name}{number}" for number, (_, name) in enumerate(kinds)]
    return collate(rng.normal(2, 3, (len(kinds), num_points, 3)), kinds, names, KINDS)


def same(a: Shapes, b: Shapes) -> bool:
    arrays = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("points", "label", "name"))
    return arrays and a.classes == b.classes and a.groups == b.groups


def test_a_shape_keeps_its_label_and_name_wherever_it_is_taken():
    whole = shapes(2, 3, 1)
    taken = whole.take(np.array([5, 0, 0]))
    assert len(taken) == 3 and taken.label.tolist() == [2, 0, 0]
    assert taken.name.tolist() == ["Bus5", "Helicopter0", "Helicopter0"]
    assert np.array_equal(taken.points, whole.points[[5, 0, 0]]) and taken.points.dtype == np.float32
    assert same(whole.take(whole.label == 1), whole.take(np.array([2, 3, 4])))


def test_a_subset_is_numbered_anew_in_the_order_asked_for():
    whole = shapes(2, 3, 1, 1)
    chosen = whole.subset(["Jet", "aircraft/Helicopter"])
    assert chosen.classes == ("Jet", "Helicopter") and chosen.full_names == ("aircraft/Jet", "aircraft/Helicopter")
    assert chosen.label.tolist() == [1, 1, 0, 0, 0] and np.array_equal(chosen.points, whole.points[:5])
    assert same(whole.subset(group="aircraft"), whole.subset(["Helicopter", "Jet"]))
    assert same(whole.subset(), whole)
    assert whole.subset(["Cup"]).full_names == ("Cup",)


def test_a_class_of_two_groups_is_chosen_in_both_or_in_one():
    whole = collate(
        np.random.default_rng(0).random((3, 4, 3)), [("a", "other"), ("b", "other"), ("b", "x")], ["1", "2", "3"]
    )
    assert whole.subset(["other"]).full_names == ("a/other", "b/other")
    assert whole.subset(["b/other"]).name.tolist() == ["2"]
    assert whole.subset(["other"], group="b").name.tolist() == ["2"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"classes": ["helicoptr"]},
            r"no class 'helicoptr' \(did you mean 'Helicopter'\?\); there are Helicopter, Jet",
        ),
        ({"classes": ["Bus"], "group": "aircraft"}, "no class 'Bus' in aircraft; there are Helicopter, Jet"),
        ({"group": "air"}, r"no group 'air' \(did you mean 'aircraft'\?\); there are aircraft, vehicle"),
        ({"classes": []}, "classes is empty; name at least one"),
    ],
)
def test_an_unknown_class_or_group_names_the_nearest(asked, message):
    with pytest.raises(ValueError, match=message):
        shapes(1, 1, 1, 1).subset(**asked)


def test_columns_that_do_not_fit_are_refused():
    points, label, name = np.zeros((2, 4, 3), np.float32), np.array([0, 1]), np.array(["a", "b"])
    cases = [
        ((points[0], label, ("x", "y"), name), r"points has shape \(4, 3\); give \[shape, point, 3\]"),
        ((points, label[:1], ("x", "y"), name), r"there are 2 clouds, label has shape \(1,\)"),
        ((points, label, ("x",), name), "a label is 1, and there are 1 classes"),
        ((points, label + 0.0, ("x", "y"), name), "a label is of type float64"),
        ((points, label, ("x", "y"), name, ("g",)), "there are 1 groups for 2 classes"),
    ]
    for columns, message in cases:
        with pytest.raises(ValueError, match=message):
            Shapes(*columns)


def test_normalised_clouds_have_mean_zero_and_std_one_and_keep_their_proportions():
    points = np.random.default_rng(0).normal(1000, [1, 2, 3], (5, 400, 3)).astype(np.float32)
    found = normalised(points)
    assert found.dtype == np.float32 and found.shape == points.shape
    assert np.abs(found.mean(1)).max() < 1e-6
    np.testing.assert_allclose(found.std((1, 2)), 1, rtol=1e-6)
    np.testing.assert_allclose(
        found.std(1)[:, 2] / found.std(1)[:, 0], points.std(1)[:, 2] / points.std(1)[:, 0], rtol=1e-4
    )
    assert np.array_equal(normalised(points[1]), found[1])


def test_a_cloud_in_one_place_is_refused_by_number():
    points = np.random.default_rng(0).random((3, 10, 3))
    points[1] = [5, 5, 5]
    with pytest.raises(ValueError, match="cloud 1 has all its points in one place"):
        normalised(points)


def test_a_fitted_cloud_has_all_its_points_before_any_comes_twice():
    cloud = np.random.default_rng(0).random((30, 3))
    assert len(np.unique(fitted(cloud, 20, np.random.default_rng(0)), axis=0)) == 20
    more = fitted(cloud, 50, np.random.default_rng(0))
    assert more.shape == (50, 3) and len(np.unique(more, axis=0)) == 30


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        *[(1, (1, 0, 0)), (2, (1, 0, 1)), (3, (2, 0, 1)), (4, (2, 1, 1)), (6, (3, 1, 2)), (12, (6, 3, 3))],
        *[(50, (44, 3, 3)), (60, (54, 3, 3)), (100, (90, 5, 5)), (270, (242, 14, 14))],
    ],
)
def test_small_classes_have_three_held_out_as_long_as_half_is_left(size, expected):
    parts = split(shapes(size))
    assert tuple(len(parts[name]) for name in ("train", "valid", "test")) == expected


def test_a_split_is_of_every_class_complete_and_without_overlap():
    whole = shapes(120, 40, 8, 1)
    parts = split(whole)
    assert [np.bincount(part.label, minlength=4).tolist() for part in parts.values()] == [
        [108, 34, 4, 1],
        [6, 3, 2, 0],
        [6, 3, 2, 0],
    ]
    assert sorted(name for part in parts.values() for name in part.name) == sorted(whole.name)
    assert all(part.classes == whole.classes for part in parts.values())


def test_a_split_depends_on_names_and_seed_not_on_order():
    whole = shapes(60, 60)
    shuffled = whole.take(np.random.default_rng(1).permutation(len(whole)))
    for part, other in zip(split(whole).values(), split(shuffled).values(), strict=True):
        assert {*part.name} == {*other.name}
    assert {*split(whole)["test"].name} != {*split(whole, seed=1)["test"].name}


def test_equal_names_are_numbered_and_classes_without_a_shape_left_out():
    found = collate(
        np.random.default_rng(0).random((3, 4, 3)), [KINDS[3], KINDS[3], KINDS[1]], ["Bed", "Bed", "Bed"], KINDS
    )
    assert found.name.tolist() == ["Bed", "Bed (2)", "Bed"]
    assert found.full_names == ("aircraft/Jet", "Cup") and found.label.tolist() == [1, 1, 0]


def test_what_was_left_out_is_one_sentence():
    skipped = Skipped()
    assert skipped.sentence(40) == ""
    skipped.add("empty", "a.off")
    for name in ("b.off", "c.obj"):
        skipped.add("with NaN vertices", name)
    assert skipped.sentence(40) == "3 of 40 meshes skipped: 2 with NaN vertices (b.off, c.obj), 1 empty (a.off)"
    for name in "defg":
        skipped.note("not manifold", name)
    assert skipped.sentence(40).endswith("1 empty (a.off); used all the same: 4 not manifold (d, e, f, ...)")
