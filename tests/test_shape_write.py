"""Shapes as files: what is written is read again, by Open3D or by formats, and is the same."""

from __future__ import annotations

import subprocess
import sys
import zipfile

import numpy as np
import pytest

from envs.shapes import formats, write
from rayft import learnable

WRITERS = {".ply": write.ply, ".obj": write.obj, ".zip": write.archive}


@pytest.fixture(scope="module")
def o3d():
    pytest.importorskip("libusb_package")
    from envs.shapes.surface import open3d

    return open3d()


@pytest.fixture(scope="module")
def made():
    """(samples, columns) of five clouds; the third is undecodable, the fourth has no score."""
    rng = np.random.default_rng(0)
    samples = [None if i == 2 else rng.normal(size=(30 + i, 3)).astype(np.float32) for i in range(5)]
    reward = np.array([0.9, 0.5, 0.0, np.nan, 0.1])
    return samples, {"index": np.array([7, 3, 5, 11, 0]), "reward": reward, "part/hull volume": reward * 2}


def vertices(path):
    """The points of a binary PLY as a structured array, and its comments, by the format's own rules."""
    head, _, body = path.read_bytes().partition(b"end_header\n")
    lines = head.decode("ascii").splitlines()
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    kinds = {"float": "<f4", "int": "<i4", "uchar": "u1"}
    told = [line.split() for line in lines]
    fields = [(name, kinds[kind]) for what, kind, name in (one for one in told if one[0] == "property")]
    found = np.frombuffer(body, fields)
    assert f"element vertex {len(found)}" in lines
    return found, [line.removeprefix("comment ") for line in lines if line.startswith("comment ")]


def test_one_shape_in_a_ply_is_where_the_model_made_it(o3d, made, tmp_path):
    path = tmp_path / "best.ply"
    assert write.ply(path, made[0][:1], {name: column[:1] for name, column in made[1].items()}) == 1
    read = o3d.io.read_point_cloud(str(path))
    np.testing.assert_array_equal(np.asarray(read.points, np.float32), made[0][0])
    assert read.has_colors()
    assert vertices(path)[1] == ["sample_0007, not moved, reward 0.9, part_hull_volume 1.8"]


def test_open3d_reads_every_point_of_every_shape_with_its_sample_and_scores(o3d, made, tmp_path):
    path = tmp_path / "all.ply"
    assert write.ply(path, *made) == 4
    read = o3d.t.io.read_point_cloud(str(path)).point
    sample, reward = (read[name].numpy().ravel() for name in ("sample", "reward"))
    assert len(sample) == 30 + 31 + 33 + 34
    for row, index in ((0, 7), (1, 3), (3, 11), (4, 0)):
        mine = sample == index
        assert mine.sum() == len(made[0][row])
        np.testing.assert_array_equal(reward[mine], np.float32(made[1]["reward"][row]))
        moved = read["positions"].numpy()[mine] - made[0][row]
        assert np.ptp(moved, axis=0) == pytest.approx(0, abs=1e-5)
    np.testing.assert_array_equal(read["part_hull_volume"].numpy().ravel(), 2 * reward)


def test_several_shapes_lie_side_by_side_and_the_file_says_how_far_they_were_moved(made, tmp_path):
    path = tmp_path / "all.ply"
    write.ply(path, *made)
    found, comments = vertices(path)
    boxes = []
    for row, comment in zip((0, 1, 3, 4), comments, strict=True):
        name, moved, *_ = comment.split(", ")
        mine = found[found["sample"] == made[1]["index"][row]]
        places = np.stack([mine[axis] for axis in "xyz"], 1)
        offset = np.zeros(3) if moved == "not moved" else np.array(moved.split()[2:], dtype=float)
        assert name == f"sample_{made[1]['index'][row]:04d}"
        np.testing.assert_allclose(places - offset, made[0][row], atol=1e-5)
        boxes.append((places.min(0), places.max(0)))
    assert comments[0].startswith("sample_0007, not moved")
    for i, (low, high) in enumerate(boxes):
        for other_low, other_high in boxes[:i]:
            assert (low[:2] > other_high[:2]).any() or (high[:2] < other_low[:2]).any()


def test_the_reward_is_seen_as_a_colour_and_its_absence_as_grey(made, tmp_path):
    path = tmp_path / "all.ply"
    write.ply(path, *made)
    found, _ = vertices(path)
    inks = {index: tuple(found[found["sample"] == index][["red", "green", "blue"]][0]) for index in (7, 3, 11, 0)}
    assert inks[7] == tuple(write.HIGH) and inks[0] == tuple(write.LOW)
    assert inks[11] == (160, 160, 160)
    assert write.LOW[0] < inks[3][0] < write.HIGH[0]


def test_an_obj_has_an_object_for_each_shape_and_its_points_as_elements(made, tmp_path):
    path = tmp_path / "all.obj"
    assert write.obj(path, *made) == 4
    lines, objects, count = path.read_text().splitlines(), {}, 0
    for line in lines:
        kind, *rest = line.split()
        if kind == "o":
            points = objects[rest[0]] = []
        elif kind == "v":
            points.append([float(x) for x in rest])
            count += 1
        elif kind == "p":
            assert 1 <= int(rest[0]) <= count
    assert list(objects) == ["sample_0007", "sample_0003", "sample_0011", "sample_0000"]
    np.testing.assert_allclose(objects["sample_0007"], made[0][0], rtol=1e-5)
    assert sum(line.startswith("p ") for line in lines) == count == 128
    assert "reward 0.5, part_hull_volume 1" in next(line for line in lines if "sample_0003" in line)


def test_an_archive_has_each_shape_in_a_file_where_the_model_made_it(made, tmp_path):
    path = tmp_path / "all.zip"
    assert write.archive(path, *made) == 4
    with zipfile.ZipFile(path) as bundle:
        assert bundle.testzip() is None
        assert bundle.namelist() == [f"sample_{index:04d}.ply" for index in (7, 3, 11, 0)]
        bundle.extractall(tmp_path)
    for row, index in ((0, 7), (4, 0)):
        found, comments = vertices(tmp_path / f"sample_{index:04d}.ply")
        np.testing.assert_array_equal(np.stack([found[axis] for axis in "xyz"], 1), made[0][row])
        assert "not moved" in comments[0]
    before = path.read_bytes()
    write.archive(path, *made)
    assert path.read_bytes() == before


def test_an_npz_is_read_back_as_shapes_without_those_that_are_none(made, tmp_path):
    samples = [None if one is None else one[:30] for one in made[0]]
    columns = {"x_0": np.zeros((5, 38, 3), np.float32), **made[1]}
    assert write.npz(tmp_path / "all.npz", samples, columns) == 4
    with np.load(tmp_path / "all.npz") as found:
        assert found["points"].shape == (5, 30, 3)
        assert np.isnan(found["points"]).all((1, 2)).tolist() == [False, False, True, False, False]
        for name, column in columns.items():
            np.testing.assert_array_equal(found[name], column)
    shapes, skipped = formats.read_counted(tmp_path / "all.npz", 30)
    assert shapes.name.tolist() == ["sample_0007", "sample_0003", "sample_0011", "sample_0000"]
    assert skipped.left_out == {"with NaN or infinite points": ["sample_0005"]}
    assert learnable.read(tmp_path / "all.npz")[0].shape == (30, 3)  # what a reward is told
    np.testing.assert_array_equal(shapes.points, [one for one in samples if one is not None])
    assert write.npz(tmp_path / "none.npz", [None, None], {"reward": np.zeros(2)}) == 0
    assert np.load(tmp_path / "none.npz")["points"].shape == (2, 0, 3)


@pytest.mark.parametrize("suffix", WRITERS)
def test_where_nothing_can_be_decoded_the_file_is_whole_and_empty(suffix, tmp_path):
    path = tmp_path / f"none{suffix}"
    assert WRITERS[suffix](path, [None, None], {"index": np.arange(2), "reward": np.zeros(2)}) == 0
    if suffix == ".ply":
        assert len(vertices(path)[0]) == 0
    assert zipfile.ZipFile(path).namelist() == [] if suffix == ".zip" else path.is_file()


@pytest.mark.parametrize("suffix", WRITERS)
def test_without_columns_samples_are_counted_from_0_and_stay_as_they_were(suffix, made, tmp_path):
    before = [None if one is None else one.copy() for one in made[0]]
    assert WRITERS[suffix](tmp_path / f"all{suffix}", made[0], {}) == 4
    assert all(one is None if old is None else (one == old).all() for one, old in zip(made[0], before, strict=True))


@pytest.mark.parametrize("suffix", WRITERS)
def test_the_name_of_a_part_cannot_break_a_file(suffix, made, tmp_path):
    path = tmp_path / f"all{suffix}"
    names = "part/end_header\nply", "x", "part/a b", "part/a/b", "\u00e9", ""
    assert WRITERS[suffix](path, made[0], {name: np.ones(5) for name in names}) == 4
    if suffix == ".ply":
        found, _ = vertices(path)
        told = ["part_end_header_ply", "x_2", "part_a_b", "part_a_b_2", "_", "__2"]
        assert list(found.dtype.names) == ["x", "y", "z", "red", "green", "blue", "sample", *told]
        assert (found["x_2"] == 1).all()


def test_writing_and_drawing_load_neither_torch_nor_ray():
    code = "import sys, envs.shapes.write, envs.shapes.render; print({'torch', 'ray', 'open3d'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
