"""Meshes as text, good and bad, and what writes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

TETRAHEDRON = """OFF
4 4 6
0 0 0
1 0 0
0 1 0
0 0 1
3 0 2 1
3 0 1 3
3 0 3 2
3 1 2 3
"""
SQUARE_OBJ = "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nf 1 2 3 4\n"
PLY = """ply
format ascii 1.0
element vertex 3
property float x
property float y
property float z
element face 1
property list uchar int vertex_indices
end_header
0 0 0
1 0 0
0 1 0
3 0 1 2
"""
STL = """solid a
facet normal 0 0 1
 outer loop
  vertex 0 0 0
  vertex 1 0 0
  vertex 0 1 0
 endloop
endfacet
endsolid a
"""


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def points_file(count: int, suffix: str = ".xyz") -> str:
    rows = [
        ("v " if suffix == ".obj" else "") + " ".join(map(str, row))
        for row in np.random.default_rng(0).normal(size=(count, 3))
    ]
    head = PLY.partition("element face")[0].replace("vertex 3", f"vertex {count}") + "end_header\n"
    return (head if suffix == ".ply" else "") + "\n".join(rows) + "\n"


BAD = {
    "empty.off": ("", "empty"),
    "empty.obj": ("", "empty"),
    "text.off": ("not a mesh", "without the header of an .off file"),
    "text.obj": ("not a mesh", "without a vertex"),
    "text.ply": ("not a mesh", "that Open3D cannot read"),
    "header.ply": (PLY.replace("float x", "complex x"), "with a header that is not a .ply file's"),
    "text.stl": ("not a mesh", "that Open3D cannot read"),
    "text.xyz": ("not a mesh", "that Open3D cannot read"),
    "nan.off": (TETRAHEDRON.replace("1 0 0", "nan 0 0"), "with NaN vertices"),
    "nan.obj": (SQUARE_OBJ.replace("v 1 1 0", "v nan 1 0"), "with NaN vertices"),
    "nan.xyz": (points_file(20) + "nan 0 0\n", "with NaN vertices"),
    "inf.off": (TETRAHEDRON.replace("1 0 0", "1e200 0 0"), "with vertices beyond 1e+18"),
    "word.off": (TETRAHEDRON.replace("1 0 0", "1 x 0"), "with a line that is no vertex or face"),
    "short.off": (TETRAHEDRON.replace("3 1 2 3", "3 1 2"), "with a line that is no vertex or face"),
    "cut.off": (TETRAHEDRON[:-20], "shorter than its header says: cut off"),
    "cut.ply": (PLY[:-20], "shorter than its header says: cut off"),
    "cut_points.ply": (points_file(50, ".ply")[:-200], "shorter than its header says: cut off"),
    "cut.stl": (STL[: STL.index("endsolid")], "without its endsolid: cut off"),
    "cut_second.stl": (STL + STL[:-30], "without its endsolid: cut off"),
    "outside.off": (TETRAHEDRON.replace("3 1 2 3", "3 1 2 4"), "with a face at a vertex that is not there"),
    "outside.ply": (PLY.replace("3 0 1 2", "3 0 1 9"), "with a face at a vertex that is not there"),
    "outside.obj": (SQUARE_OBJ.replace("f 1 2 3 4", "f 1 2 9"), "with a face at a vertex that is not there"),
    "zero.obj": (SQUARE_OBJ.replace("f 1 2 3 4", "f 0 1 2"), "with a face at a vertex that is not there"),
    "word.obj": (SQUARE_OBJ.replace("f 1 2", "f 1 x"), "with a line that is no vertex or face"),
    "flat.obj": (SQUARE_OBJ.replace("v 1 1 0", "v 1 1"), "with a line that is no vertex or face"),
    "digits.off": (TETRAHEDRON.replace("3 1 2 3", f"3 1 2 {'9' * 30}"), "with a line that is no vertex or face"),
    "negative.off": (TETRAHEDRON.replace("4 4 6", "-4 4 6"), "without the header of an .off file"),
    "endless.off": (TETRAHEDRON.replace("4 4 6", "999999999999 4 6"), "shorter than its header says: cut off"),
    "line.off": ("OFF\n3 1 0\n0 0 0\n1 0 0\n2 0 0\n3 0 1 2\n", "with no area"),
    "one.off": ("OFF\n3 1 0\n5 5 5\n5 5 5\n5 5 5\n3 0 1 2\n", "with all points in one place"),
    "one.xyz": ("5 5 5\n" * 50, "with all points in one place"),
    "few.xyz": (points_file(15), "without faces and with fewer than 16 points"),
    "huge.off": (TETRAHEDRON + "#" * 2**20, "of more than 1 MB"),
}
