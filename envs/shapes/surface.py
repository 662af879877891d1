"""One file as a point cloud: as many points per area everywhere, by Open3D.

points on a triangle ~ num_points * its area / area of the mesh

Which way round a triangle is wound does not matter to that, nor do holes and edges of three faces. A file without faces
is a point cloud, a face of more than three corners a fan of triangles. Open3D is silent about files that are cut off,
fills in what memory held, and loses the quads of an .obj: so .off and .obj are read here, .ply is held against its
header, and a text .stl has to end. An .obj says nowhere how long it is: one that is cut off is a smaller mesh.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import numpy as np

from envs.shapes.data import MIN_POINTS, fitted, in_one_place

SUFFIXES = (".off", ".obj", ".ply", ".stl", ".xyz")
FARTHEST = 1e18  # a coordinate beyond it has no square in float32
BYTES = {"char": 1, "uchar": 1, "short": 2, "ushort": 2, "int": 4, "uint": 4, "float": 4, "double": 8} | {
    f"{kind}{bits}": bits // 8
    for kind, sizes in {"int": (8, 16, 32), "uint": (8, 16, 32), "float": (32, 64)}.items()
    for bits in sizes
}
NO_FACES = np.empty((0, 3), np.int64)
NO_LINE = "with a line that is no vertex or face"
CUT = "shorter than its header says: cut off"


class UnusableError(Exception):
    """Why a file gives no cloud, as in '3 with NaN vertices'."""


@cache
def open3d() -> Any:
    """Open3D, with the libusb that plain machines lack."""
    try:
        import libusb_package

        ctypes.CDLL(str(libusb_package.get_library_path()), mode=ctypes.RTLD_GLOBAL)
    except (ImportError, OSError):
        pass  # the machine may have its own
    try:
        import open3d
    except (ImportError, OSError) as error:
        raise ValueError(f"this needs Open3D, and {error}; pip install 'rayft[shapes]'") from error
    open3d.utility.set_verbosity_level(open3d.utility.VerbosityLevel.Error)
    return open3d


def sample(path: str, num_points: int, seed: int, max_megabytes: float) -> tuple[np.ndarray, list[str]]:
    """Points [num_points, 3] of one file in random order, and what is odd about it. ``UnusableError`` says why not."""
    try:
        size = os.stat(path).st_size
        if size > max_megabytes * 2**20:
            raise UnusableError(f"of more than {max_megabytes:g} MB")
        vertices, triangles = {".off": _off, ".obj": _obj}.get(path[-4:].lower(), _read)(path)
    except OSError as error:
        raise UnusableError(f"that cannot be opened, {error.strerror or error}") from None
    if not len(vertices):
        raise UnusableError("that Open3D cannot read" if size else "empty")
    rng = np.random.default_rng(seed)
    corners = vertices[triangles] if len(triangles) else vertices
    if np.isnan(corners).any():
        raise UnusableError("with NaN vertices")
    if not (np.abs(corners) < FARTHEST).all():
        raise UnusableError(f"with vertices beyond {FARTHEST:g}")
    if in_one_place(corners.reshape(-1, 3)):
        raise UnusableError("with all points in one place")
    if not len(triangles):
        if len(vertices) < MIN_POINTS:
            raise UnusableError(f"without faces and with fewer than {MIN_POINTS} points")
        few = [f"with fewer than {num_points} points, some of them taken twice"] if len(vertices) < num_points else []
        return fitted(vertices, num_points, rng).astype(np.float32), few
    return _on_triangles(vertices, triangles, num_points, rng)


def _on_triangles(
    vertices: np.ndarray, triangles: np.ndarray, num_points: int, rng: np.random.Generator
) -> tuple[np.ndarray, list[str]]:
    o3d = open3d()
    corners = vertices[triangles]
    centre = corners.mean((0, 1))
    sides = corners[:, 1:] - corners[:, :1]
    area = np.linalg.norm(np.cross(sides[:, 0], sides[:, 1]), axis=1).sum() / 2
    if area <= 1e-12 * np.ptp(corners, axis=(0, 1)).max() ** 2:
        raise UnusableError("with no area")
    mesh = o3d.geometry.TriangleMesh(
        o3d.utility.Vector3dVector(vertices - centre), o3d.utility.Vector3iVector(triangles.astype(np.int32))
    )
    o3d.utility.random.seed(int(rng.integers(2**31)))
    points = np.asarray(mesh.sample_points_uniformly(num_points).points)
    notes = [] if mesh.is_edge_manifold() else ["not manifold"]
    return points[rng.permutation(num_points)].astype(np.float32), notes  # Open3D 0.19 gives triangle after triangle


def _read(path: str) -> tuple[np.ndarray, np.ndarray]:
    o3d = open3d()
    if path.lower().endswith(".xyz"):
        return np.asarray(o3d.io.read_point_cloud(path).points), NO_FACES
    if path.lower().endswith(".stl"):
        _ended(path)
    num_faces = _faces_of_ply(path) if path.lower().endswith(".ply") else 0
    mesh = o3d.io.read_triangle_mesh(path)
    vertices, triangles = np.asarray(mesh.vertices), np.asarray(mesh.triangles)
    if num_faces and not len(triangles):
        raise UnusableError(CUT)
    return vertices, _checked(triangles, len(vertices))


def _checked(triangles: np.ndarray, num_vertices: int) -> np.ndarray:
    if len(triangles) and not 0 <= triangles.min() <= triangles.max() < num_vertices:
        raise UnusableError("with a face at a vertex that is not there")
    return triangles


def _off(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Vertices and triangles. ModelNet writes 'OFF490 518 0' in one line."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        lines = [line for line in (line.partition("#")[0].strip() for line in file) if line]
    if not lines:
        return np.empty((0, 3)), NO_FACES
    before, mark, counts = lines[0].partition("OFF")
    start = 1 if counts.strip() else 2
    try:
        num_vertices, num_faces = map(int, (counts.strip() or lines[1]).split()[:2])
    except (ValueError, IndexError):
        num_vertices = num_faces = -1
    if not mark or min(num_vertices, num_faces) < 0 or before not in ("", "C", "N", "CN", "ST"):
        raise UnusableError("without the header of an .off file")
    middle, end = start + num_vertices, start + num_vertices + num_faces
    if len(lines) < end:
        raise UnusableError(CUT)
    try:
        sizes = [int(line.split(None, 1)[0]) for line in lines[middle:end]]
    except ValueError:
        raise UnusableError(NO_LINE) from None
    return _mesh(lines[start:middle], lines[middle:end], sizes, first=1)


def _obj(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Vertices and triangles of all objects in the file. A corner is vertex/texture/normal; -1 is the last vertex."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        content = file.read()
    lines = [line.partition("#")[0].strip() for line in content.replace("\\\n", " ").splitlines()]
    vertices = [line[1:] for line in lines if line[:2] in ("v ", "v\t")]
    faces = re.sub(r"/\S*", "", "\n".join(line[1:] for line in lines if line[:2] in ("f ", "f\t"))).splitlines()
    if content and not vertices:
        raise UnusableError("without a vertex")
    before: Any = 1
    if any("-" in line for line in faces):
        seen = np.cumsum([line[:2] in ("v ", "v\t") for line in lines])
        before = seen[[line[:2] in ("f ", "f\t") for line in lines]]
    return _mesh(vertices, faces, [len(line.split()) for line in faces], before=before)


def _mesh(
    vertices: list[str], faces: list[str], sizes: list[int], first: int = 0, before: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Lines as numbers: of faces with so many corners, from the ``first`` word on.

    Corners count from 0, or, where ``before`` says how many vertices there were, from 1 and back from -1.
    """
    triangles, kinds = [NO_FACES], np.array(sizes, np.int64)
    try:
        places = np.loadtxt(vertices, usecols=(0, 1, 2), ndmin=2) if vertices else np.empty((0, 3))
        for size in np.unique(kinds[kinds > 2]).tolist():
            rows = np.flatnonzero(kinds == size)
            words = [faces[row] for row in rows]
            corners = np.loadtxt(words, np.int64, usecols=range(first, first + size), ndmin=2)
            if before is not None:
                back = np.broadcast_to(before, len(faces))[rows, None] + corners
                corners = np.where(corners < 0, back, corners - 1)
            triangles += [corners[:, [0, after, after + 1]] for after in range(1, size - 1)]
    except (ValueError, OverflowError):
        raise UnusableError(NO_LINE) from None
    return places, _checked(np.concatenate(triangles), len(places))


def _faces_of_ply(path: str) -> int:
    """How many faces the header promises; refused where the file is too short for what the header promises.

    A row of numbers has its length; a list counts as a triangle, the shortest there is.
    """
    with open(path, "rb") as file:
        header = [line.decode("ascii", "replace").split() for line in _until(iter(file.readline, b""), b"end_header")]
        rest = os.stat(path).st_size - file.tell()
        ascii_rows = sum(1 for line in file if line.strip()) if ["format", "ascii", "1.0"] in header else None
    count = rows = shortest = num_faces = 0
    try:
        for words in header:
            if words[:1] == ["element"]:
                rows += (count := int(words[2]))
                num_faces = count if words[1] == "face" else num_faces
            elif words[:2] == ["property", "list"]:
                shortest += count * (BYTES[words[2]] + 3 * BYTES[words[3]])
            elif words[:1] == ["property"]:
                shortest += count * BYTES[words[1]]
    except (KeyError, IndexError, ValueError):
        raise UnusableError("with a header that is not a .ply file's") from None
    if rest < shortest if ascii_rows is None else ascii_rows < rows:
        raise UnusableError(CUT)
    return num_faces


def _ended(path: str) -> None:
    """Refuses a text .stl with a ``solid`` that has no ``endsolid``. A binary one may begin with the word too."""
    with open(path, "rb") as file:
        head = file.read(84)
    if os.stat(path).st_size == 84 + 50 * int.from_bytes(head[80:], "little") or b"solid" not in head[:10]:
        return
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        words = Counter(word.lower() for line in file for word in line.split(None, 1)[:1])
    if words["solid"] > words["endsolid"]:
        raise UnusableError("without its endsolid: cut off")


def _until(lines: Iterable[bytes], last: bytes) -> Iterator[bytes]:
    for number, line in enumerate(lines):
        if line.strip() == last or number > 1000:
            return
        yield line.strip()
