"""The generated set: the same everywhere, closed meshes in one pose, sub-categories that can be told apart."""

from __future__ import annotations

import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from envs.shapes.blocks import box, egg, rod, rotor, surface_points, tube, wings
from envs.shapes.data import normalised
from envs.shapes.generated import CATEGORIES, generated, main, mesh
from envs.shapes.meshes import listed, sampled
from envs.shapes.surface import sample

needs_open3d = pytest.mark.skipif(find_spec("open3d") is None, reason="needs Open3D: pip install 'rayft[shapes]'")
KINDS = [(category, kind) for category, kinds in CATEGORIES.items() for kind in kinds]


def volume(shape) -> float:
    a, b, c = shape[0][shape[1]].transpose(1, 0, 2)
    return float(np.einsum("ij,ij->i", a, np.cross(b, c)).sum() / 6)


def polygon(radius: float) -> float:
    """The area of a circle of 14 corners."""
    return 7 * np.sin(2 * np.pi / 14) * radius**2


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (box((0, 1), (0, 2), (0, 3)), 6),
        *[(rod((1, 2, 3), 0.5, 2, axis), 2 * polygon(0.5)) for axis in "xyz"],
        *[(rotor((0, 0, 0), 3, 1, 0.1, 0.3, axis), 3 * 0.1 * 0.02) for axis in "xyz"],
        (wings((0, 0, 0), 2, 0.5, 1, 0.3), 2 * 2 * 0.5 * 0.04),
        (wings((0, 0, 0), 2, 0.5, 1, 0.3, upright=True), 2 * 0.5 * 0.04),
        (tube([(0, 1, 0), (3, 1, 0.5)]), 3 * polygon(1)),
    ],
)
def test_blocks_are_closed_and_wound_outwards(shape, expected):
    """Signed volumes by the divergence theorem: a hole or a face turned inwards changes them."""
    assert volume(shape) == pytest.approx(expected)
    edges = np.sort(np.concatenate([shape[1][:, pair] for pair in ([0, 1], [1, 2], [2, 0])]), axis=1)
    assert (np.unique(edges, axis=0, return_counts=True)[1] == 2).all()


def test_an_egg_has_its_axes():
    vertices = egg((1, 2, 3), 0.6, 0.3)[0] - [1, 2, 3]
    np.testing.assert_allclose((vertices[:-2] ** 2 / np.array([0.36, 0.09, 0.09])).sum(1), 1)


def test_points_lie_on_triangles_by_their_area():
    shape = (
        np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [3, 0, 1], [0, 1, 1]], float),
        np.arange(6).reshape(2, 3),
    )
    cloud = surface_points(shape, 20000, np.random.default_rng(0))
    above = cloud[:, 2] == 1
    assert above.mean() == pytest.approx(0.75, abs=0.015) and set(cloud[:, 2]) == {0, 1}
    np.testing.assert_allclose(cloud[~above, :2].mean(0), 1 / 3, atol=0.02)
    assert (cloud[~above].sum(1) <= 1 + 1e-6).all()


def test_the_default_set_has_600_shapes_the_last_class_a_tenth_of_them_in_seconds():
    start = time.monotonic()
    shapes = generated()
    assert time.monotonic() - start < 10
    assert shapes.points.shape == (600, 2048, 3) and shapes.full_names[-1] == "aircraft/helicopter"
    assert np.bincount(shapes.label).tolist() == [270, 150, 120, 60]
    assert len(set(shapes.name)) == 600


def test_a_shape_does_not_depend_on_the_others():
    few, more = generated(num_per_class={"helicopter": 2}), generated(num_per_class=3)
    assert few.classes == ("helicopter",) and np.array_equal(few.points, more.points[9:11])
    assert not np.array_equal(generated(num_per_class=1, seed=1).points, generated(num_per_class=1).points)
    assert not np.array_equal(more.points[0], more.points[1])


def test_another_process_makes_the_same_points():
    made = "generated('vehicle', 1, num_points=4).points.tobytes().hex()"
    code = f"from envs.shapes.generated import generated; print({made})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert bytes.fromhex(out.strip()) == generated("vehicle", 1, num_points=4).points.tobytes()


@pytest.mark.parametrize(("category", "kind"), KINDS)
def test_shapes_share_a_pose_and_no_two_are_alike(category, kind):
    """Longer along x than high along z, and, rotors apart, as wide to the left as to the right."""
    extents = []
    for number in range(1, 20):
        vertices, triangles = mesh(category, kind, number)
        assert triangles.min() >= 0 and triangles.max() < len(vertices) and np.isfinite(vertices).all()
        low, high = vertices.min(0), vertices.max(0)
        extents.append(high - low)
        assert extents[-1][0] > extents[-1][2] and (kind == "helicopter" or high[1] == pytest.approx(-low[1]))
    assert (np.std(extents, axis=0) / np.mean(extents, axis=0) > 0.03).sum() >= 2


@pytest.mark.parametrize("category", CATEGORIES)
def test_sub_categories_can_be_told_apart(category):
    """By how many points lie in each of 216 boxes, the nearest of 20 known shapes per class is of the same class."""
    shapes = generated(category, 30, num_points=1024)
    clouds = normalised(shapes.points)
    features = np.stack([np.histogramdd(cloud, bins=6, range=[(-3, 3)] * 3)[0].ravel() for cloud in clouds])
    features = np.sqrt(features / features.sum(1, keepdims=True))
    known = np.arange(len(shapes)) % 30 < 20
    distance = np.linalg.norm(features[~known][:, None] - features[known][None], axis=2)
    told = shapes.label[known][distance.argmin(1)]
    assert (told == shapes.label[~known]).mean() >= 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"category": "aircrafts"}, r"no generated category 'aircrafts' \(did you mean 'aircraft'\?\); there are"),
        ({"num_per_class": {"jets": 1}}, r"no class 'jets' of aircraft \(did you mean 'jet'\?\); there are jet, prop"),
        ({"num_per_class": 0}, "num_per_class is .*; give counts of at least 0, one of them above"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        generated(**arguments)


@needs_open3d
def test_files_hold_the_same_shapes_in_every_format(tmp_path, capsys):
    for suffix in ("off", "obj", "ply", "stl"):
        main([str(tmp_path / suffix), "--num", "20", "--format", suffix])
        names = sorted(path.relative_to(tmp_path / suffix).as_posix() for path in (tmp_path / suffix).rglob("*.*"))
        assert len(names) == 20 and names[-5] == f"aircraft/propeller/propeller_0001.{suffix}"
        assert f"aircraft/helicopter/helicopter_0002.{suffix}" in names
    assert capsys.readouterr().out.startswith("20 meshes in ")
    vertices, _ = mesh("aircraft", "helicopter", 2)
    for suffix in ("off", "obj", "ply", "stl"):
        path = tmp_path / suffix / "aircraft" / "helicopter" / f"helicopter_0002.{suffix}"
        cloud, _ = sample(str(path), 20000, 0, 10)
        np.testing.assert_allclose(np.ptp(cloud, axis=0), np.ptp(vertices, axis=0), rtol=0.02)


@needs_open3d
def test_files_and_the_set_agree(tmp_path):
    main([str(tmp_path), "--category", "vehicle", "--num", "10"])
    files = listed(tmp_path)
    clouds, _, skipped = sampled(files, 2048)
    made = generated("vehicle", {"car": 4, "truck": 3, "bus": 2, "tractor": 1})
    row = {name: place for place, name in enumerate(made.name)}
    assert len(files) == 10 and not skipped.left_out and files[0].kind == ("vehicle", "bus")
    for file, cloud in zip(files, clouds, strict=True):
        other = made.points[row[Path(file.name).stem]]
        np.testing.assert_allclose(np.ptp(cloud, axis=0), np.ptp(other, axis=0), rtol=0.1)
