"""Blocks that shapes are built of: six-sided ones and bodies of revolution, as triangle meshes that are closed.

x forward, z up;    a mesh is (vertices [v, 3], triangles [f, 3]), wound anticlockwise seen from outside
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Mesh = tuple[np.ndarray, np.ndarray]
ROUND = 14  # corners of a circle


def joined(*parts: Mesh) -> Mesh:
    """Several meshes as one; they may run into each other."""
    before = np.cumsum([0, *(len(vertices) for vertices, _ in parts)])
    faces = [triangles + start for (_, triangles), start in zip(parts, before, strict=False)]
    return np.concatenate([vertices for vertices, _ in parts]), np.concatenate(faces)


def block(low: Sequence[Sequence[float]], high: Sequence[Sequence[float]]) -> Mesh:
    """Six sides between two faces of four corners each, seen anticlockwise from the high one."""
    sides = [[a, (a + 1) % 4, 4 + (a + 1) % 4, 4 + a] for a in range(4)]
    faces = np.array([[3, 2, 1, 0], [4, 5, 6, 7], *sides])
    return np.array([*low, *high], float), np.concatenate([faces[:, [0, 1, 2]], faces[:, [0, 2, 3]]])


def box(x: tuple[float, float], y: tuple[float, float], z: tuple[float, float], roof: float = 1.0) -> Mesh:
    """An upright box; its top is ``roof`` times as long, and a little of that narrower."""
    (middle, half), side = ((x[0] + x[1]) / 2, (x[1] - x[0]) / 2), 1 - (1 - roof) / 4
    across = ((y[0] + y[1]) / 2, (y[1] - y[0]) / 2)
    corners = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    low = [(middle + half * a, across[0] + across[1] * b, z[0]) for a, b in corners]
    high = [(middle + half * roof * a, across[0] + across[1] * side * b, z[1]) for a, b in corners]
    return block(low, high)


def wings(
    at: Sequence[float],
    half_span: float,
    chord: float,
    taper: float,
    sweep: float,
    rise: float = 0.0,
    upright: bool = False,
) -> Mesh:
    """Two thin tapered wings from a root at ``at``, their tips ``sweep`` behind; one alone, standing up, as a fin."""
    thick = 0.08 * chord
    parts = []
    for side in (1.0,) if upright else (1.0, -1.0):
        faces = []
        for out, width in ((0.0, chord), (half_span, chord * taper)):
            front, edge = at[0] - sweep * out / half_span, thick * width / chord / 2
            section = [(front, -edge), (front, edge), (front - width, edge), (front - width, -edge)]
            section = section if upright or side < 0 else section[::-1]
            faces.append(
                [(x, at[1] + t, at[2] + out) for x, t in section]
                if upright
                else [(x, at[1] + side * out, at[2] + t + rise * out) for x, t in section]
            )
        parts.append(block(*faces))
    return joined(*parts)


def tube(stations: Sequence[tuple[float, float, float]], at: Sequence[float] = (0, 0, 0), axis: str = "x") -> Mesh:
    """A closed body of circles: (where along the axis, radius, rise of the centre) of each."""
    angle = 2 * np.pi * np.arange(ROUND) / ROUND
    rings = [np.stack([np.full(ROUND, x), r * np.cos(angle), rise + r * np.sin(angle)], 1) for x, r, rise in stations]
    ends = [[[stations[place][0], 0, stations[place][2]]] for place in (0, -1)]
    vertices = np.concatenate([*rings, *ends])
    one, two = np.arange(ROUND), (np.arange(ROUND) + 1) % ROUND
    first, last, top = len(vertices) - 2, len(vertices) - 1, ROUND * (len(stations) - 1)
    faces = [np.stack([np.full(ROUND, first), two, one], 1), np.stack([np.full(ROUND, last), top + one, top + two], 1)]
    for start in range(0, top, ROUND):
        a, b, c, d = start + one, start + two, start + ROUND + two, start + ROUND + one
        faces += [np.stack([a, b, c], 1), np.stack([a, c, d], 1)]
    turned = vertices[:, {"x": [0, 1, 2], "y": [2, 0, 1], "z": [1, 2, 0]}[axis]]
    return turned + np.asarray(at, float), np.concatenate(faces)


def rod(at: Sequence[float], radius: float, length: float, axis: str) -> Mesh:
    """A cylinder around ``at``: a wheel, a strut, an engine."""
    return tube([(-length / 2, radius, 0), (length / 2, radius, 0)], at, axis)


def egg(at: Sequence[float], long: float, radius: float) -> Mesh:
    """An ellipsoid with two equal axes, the third along x."""
    angle = np.linspace(-np.pi / 2, np.pi / 2, 9)[1:-1]
    return tube([(long * np.sin(a), radius * np.cos(a), 0.0) for a in angle.tolist()], at)


def rotor(at: Sequence[float], num_blades: int, radius: float, width: float, turn: float, axis: str) -> Mesh:
    """Flat blades around an axis."""
    blade = box((0.0, radius), (-width / 2, width / 2), (-width / 10, width / 10))
    parts = []
    for angle in turn + 2 * np.pi * np.arange(num_blades) / num_blades:
        c, s = np.cos(angle), np.sin(angle)
        flat = blade[0] @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
        parts.append(
            (flat[:, {"x": [2, 0, 1], "y": [1, 2, 0], "z": [0, 1, 2]}[axis]] + np.asarray(at, float), blade[1])
        )
    return joined(*parts)


def pairs(make: Callable[[float], Mesh], *sides: float) -> Mesh:
    """The same part at y and -y."""
    return joined(*(make(side * sign) for side in sides for sign in (1, -1)))


def surface_points(mesh: Mesh, num_points: int, rng: np.random.Generator) -> np.ndarray:
    """Random points, as many per area everywhere:  (1 - sqrt(u)) a + sqrt(u) (1 - v) b + sqrt(u) v c."""
    corners = mesh[0][mesh[1]]
    sides = corners[:, 1:] - corners[:, :1]
    area = np.linalg.norm(np.cross(sides[:, 0], sides[:, 1]), axis=1)
    drawn = rng.choice(len(area), num_points, p=area / area.sum())
    root, v = np.sqrt(rng.random((num_points, 1))), rng.random((num_points, 1))
    a, b, c = corners[drawn].transpose(1, 0, 2)
    return ((1 - root) * a + root * (1 - v) * b + root * v * c).astype(np.float32)
