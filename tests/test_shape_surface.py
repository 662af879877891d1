"""One mesh file as a point cloud: even over its surface in every format, and for what gives none the reason why."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from small_meshes import BAD, PLY, SQUARE_OBJ, STL, TETRAHEDRON, points_file, put

from envs.shapes.surface import UnusableError, sample

pytest.importorskip("libusb_package", reason="needs Open3D: pip install 'rayft[shapes]'")


def drawn(path: Path, num_points: int = 400, max_megabytes: float = 1.0) -> np.ndarray:
    return sample(str(path), num_points, 0, max_megabytes)[0]


def test_triangles_get_points_by_their_area(tmp_path):
    """Two triangles of areas 1/2 and 3/2, one at z = 0 and the other at z = 1."""
    text = "OFF\n6 2 0\n0 0 0\n1 0 0\n0 1 0\n0 0 1\n3 0 1\n0 1 1\n3 0 1 2\n3 3 4 5\n"
    cloud = drawn(put(tmp_path / "a.off", text), 2000)
    above = cloud[:, 2] > cloud[:, 2].mean()
    assert above.sum() == pytest.approx(1500, abs=80)
    assert above[:1000].sum() == pytest.approx(750, abs=60)  # in random order: the first half is a fair sample too
    small = cloud[~above, :2] - cloud[~above, :2].min(0)
    np.testing.assert_allclose(small.mean(0), 1 / 3, atol=0.05)
    assert (small.sum(1) <= 1 + 1e-5).all()


def test_a_cube_is_covered_evenly_whatever_its_format_and_winding(tmp_path):
    from envs.shapes.blocks import box
    from envs.shapes.generated import write

    vertices, triangles = box((0, 2), (0, 2), (0, 2))
    triangles[::2] = triangles[::2, ::-1]  # wound the wrong way round
    for suffix in (".off", ".obj", ".ply", ".stl"):
        write(tmp_path / f"cube{suffix}", (vertices, triangles))
        cloud = drawn(tmp_path / f"cube{suffix}", 6000)
        cloud = cloud - (cloud.min(0) + cloud.max(0)) / 2
        on_side = np.isclose(np.abs(cloud), 1, atol=1e-5)
        assert on_side.any(1).all(), suffix
        counts = [(on_side[:, axis] & (cloud[:, axis] * side > 0)).sum() for axis in range(3) for side in (1, -1)]
        np.testing.assert_allclose(counts, 1000, atol=120)


@pytest.mark.parametrize(
    "text",
    [
        TETRAHEDRON.replace("OFF\n4", "OFF4"),  # ModelNet
        TETRAHEDRON.replace("OFF\n", "OFF # a comment\n# another\n\n"),
        TETRAHEDRON.replace("OFF", "COFF").replace("0 0 0\n", "0 0 0 255 0 0 255\n"),
        TETRAHEDRON.replace("\n", "\r\n"),
        TETRAHEDRON.replace("3 1 2 3", "3 1 2 3 0.5 0.5 0.5"),
        TETRAHEDRON.rstrip(),
        "\ufeff" + TETRAHEDRON,
    ],
    ids=["ModelNet", "comments", "colours", "CRLF", "face colours", "no newline", "BOM"],
)
def test_headers_and_colours_make_no_difference(text, tmp_path):
    expected = drawn(put(tmp_path / "a.off", TETRAHEDRON))
    assert np.array_equal(drawn(put(tmp_path / "b.off", text)), expected)


def test_large_faces_are_cut_into_triangles(tmp_path):
    texts = {
        "a.off": "OFF\n4 1 0\n0 0 0\n1 0 0\n1 1 0\n0 1 0\n4 0 1 2 3\n",
        "a.obj": SQUARE_OBJ,
        "b.obj": "o a # b\nvt 0 0\nvn 0 0 1\n" + SQUARE_OBJ.replace("f 1 2 3 4", "s 1\nf -4/1/1 2//1 \\\n3/1 -1 # all"),
        "c.obj": "\ufeff" + SQUARE_OBJ,
        "a.ply": PLY.replace("vertex 3", "vertex 4").replace("3 0 1 2", "1 1 0\n4 0 1 3 2"),
    }
    for name, text in texts.items():
        cloud = drawn(put(tmp_path / name, text), 4000)
        np.testing.assert_allclose(np.ptp(cloud, axis=0), [1, 1, 0], atol=0.02)
        np.testing.assert_allclose(cloud.std(0)[:2], 12**-0.5, atol=0.02)


def test_a_file_without_faces_is_taken_as_points(tmp_path):
    for suffix in (".ply", ".xyz", ".obj"):
        path = put(tmp_path / f"a{suffix}", points_file(100, suffix))
        all_of_it = drawn(path, 100)
        assert len(np.unique(all_of_it, axis=0)) == 100
        assert {*map(tuple, drawn(path, 40))} <= {*map(tuple, all_of_it)}
        more, notes = sample(str(path), 150, 0, 1)
        assert more.shape == (150, 3) and {*map(tuple, more)} == {*map(tuple, all_of_it)}
        assert notes == ["with fewer than 150 points, some of them taken twice"]


def test_a_mesh_far_from_the_origin_keeps_its_digits(tmp_path):
    far = TETRAHEDRON.replace("0 0 0\n", "1e7 0 0\n", 1).replace("\n1 0 0", "\n10000001 0 0")
    far = far.replace("0 1 0\n", "1e7 1 0\n").replace("0 0 1\n", "1e7 0 1\n")
    np.testing.assert_allclose(
        drawn(put(tmp_path / "a.off", far)), drawn(put(tmp_path / "b.off", TETRAHEDRON)), atol=1e-6
    )


def test_what_is_not_manifold_is_used_and_told(tmp_path):
    fan = "OFF\n5 3 0\n0 0 0\n1 0 0\n0 1 0\n0 -1 0\n0 0 1\n3 0 1 2\n3 0 1 3\n3 0 1 4\n"  # three faces at an edge
    points, notes = sample(str(put(tmp_path / "a.off", fan)), 100, 0, 1)
    assert points.shape == (100, 3) and notes == ["not manifold"]
    assert sample(str(put(tmp_path / "b.off", TETRAHEDRON)), 100, 0, 1)[1] == []


def test_an_stl_is_whole_as_text_of_two_solids_and_as_numbers_that_begin_with_the_word(tmp_path):
    corners = struct.pack("<12fH", 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0)
    binary = b"solid a".ljust(80) + struct.pack("<I", 1) + corners
    for name, content in {"one": STL, "two": STL + STL.replace("1 0 0", "2 0 0") + "; end\n", "binary": binary}.items():
        cloud = drawn(put(tmp_path / f"{name}.stl", content))
        assert np.ptp(cloud[:, 0]) == pytest.approx(2 if name == "two" else 1, abs=0.2)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_has_its_reason(name, tmp_path):
    content, reason = BAD[name]
    with pytest.raises(UnusableError) as error:
        drawn(put(tmp_path / name, content))
    assert str(error.value) == reason


def test_a_binary_ply_that_is_cut_off_is_not_filled_with_whatever_memory_held(tmp_path):
    from envs.shapes.surface import open3d

    o3d = open3d()
    ball, path = o3d.geometry.TriangleMesh.create_sphere(1.0, 10), tmp_path / "a.ply"
    for shape in (ball, o3d.geometry.PointCloud(ball.vertices)):
        (o3d.io.write_triangle_mesh if shape is ball else o3d.io.write_point_cloud)(str(path), shape)
        np.testing.assert_allclose(np.linalg.norm(drawn(path), axis=1), 1, atol=0.05)
        whole = path.read_bytes()
        for share in (0.3, 0.6, 0.95):
            path.write_bytes(whole[: int(share * len(whole))])
            with pytest.raises(UnusableError, match="cut off"):
                drawn(path)
