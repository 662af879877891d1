"""A molecule in three dimensions, as plotly.js draws it: balls in the colours of the elements, a stick per bond order.

    ball_i = x_i + radius_i S,    S = an icosahedron whose faces are split and pushed out to the sphere

One mesh for each element, so that it can be named under the mouse, and one for all bonds. Plain lists, no plotly.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from envs.molecules.reward import geometry, need

if TYPE_CHECKING:
    from rdkit.Chem import Mol

COLOURS = {  # Corey, Pauling and Koltun's, as chemists know them
    1: "#e6e6e6", 5: "#ffb5b5", 6: "#6f747a", 7: "#3050f8", 8: "#f01818", 9: "#8bd04a", 14: "#f0c8a0", 15: "#ff8000",
    16: "#e6c619", 17: "#1fd01f", 35: "#a62929", 53: "#940094"
}  # fmt: skip
OTHER, STICK = "#d957c0", "#9aa1a9"
SMALL, LARGE = (0.23, 1), (0.38, 2)  # hydrogen's ball, and every other: radius in Angstrom, splits of its faces
SIDES = 8
GAP = {1: (0.0,), 2: (-0.11, 0.11), 3: (-0.16, 0.0, 0.16)}  # Angstrom from the bond's axis
THICK = {1: 0.09, 2: 0.065, 3: 0.055}
LIGHT = {"ambient": 0.7, "diffuse": 0.55, "specular": 0.2, "roughness": 0.5, "fresnel": 0.1}


def scene(sample: Mol, name: str) -> dict[str, Any]:
    """{name, data, layout}. Hydrogens that are no atoms of the sample are placed by RDKit."""
    mol = geometry(sample)
    need("rdkit.Chem", "molecules").Kekulize(mol, clearAromaticFlags=True)
    xyz = mol.GetConformer().GetPositions()
    xyz = xyz - xyz.mean(0)
    hidden = {"visible": False, "showspikes": False}
    axes = {f"{axis}axis": hidden for axis in "xyz"}
    camera = {"eye": dict(zip("xyz", _view(xyz).tolist(), strict=True)), "up": {"x": 0, "y": 0, "z": 1}}
    layout = {
        "scene": {**axes, "aspectmode": "data", "dragmode": "orbit", "camera": camera},
        "margin": {"t": 0, "r": 0, "b": 0, "l": 0},
        "showlegend": True,
        "legend": {"itemsizing": "constant", "orientation": "h", "x": 0, "y": 0},
        "uirevision": name,
    }
    return {"name": name, "data": [*_balls(mol, xyz), *_sticks(mol, xyz)], "layout": layout}


def _view(xyz: np.ndarray) -> np.ndarray:
    """From where the molecule is broadest, at some distance."""
    _, _, axes = np.linalg.svd(xyz if len(xyz) > 2 else np.eye(3), full_matrices=True)
    eye = axes[2] + 0.25 * axes[1]
    return 1.5 * eye / np.linalg.norm(eye)


def _balls(mol: Mol, xyz: np.ndarray) -> list[dict[str, Any]]:
    numbers = np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()])
    table, meshes = need("rdkit.Chem", "molecules").GetPeriodicTable(), []
    for number in sorted(set(numbers.tolist()), key=lambda number: (number == 1, number)):
        centres = xyz[numbers == number]
        (radius, splits), name = (SMALL if number == 1 else LARGE), table.GetElementName(number).lower()
        points, faces = sphere(splits)
        corners = (centres[:, None] + radius * points).reshape(-1, 3)
        which = (faces + len(points) * np.arange(len(centres))[:, None, None]).reshape(-1, 3)
        hover = {"hovertemplate": f"{name}<extra></extra>", "showlegend": True}
        meshes.append(_mesh(corners, which, COLOURS.get(number, OTHER)) | {"name": name} | hover)
    return meshes


def _sticks(mol: Mol, xyz: np.ndarray) -> list[dict[str, Any]]:
    """One, two or three parallel sticks for a bond, side by side in the plane of its neighbours."""
    corners, faces = [], []
    for bond in mol.GetBonds():
        first, second = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        order = min(3, max(1, round(bond.GetBondTypeAsDouble())))
        along = xyz[second] - xyz[first]
        along, side = along / np.linalg.norm(along), _side(mol, xyz, first, second)
        angle = 2 * np.pi * np.arange(SIDES) / SIDES
        ring = THICK[order] * (np.outer(np.cos(angle), side) + np.outer(np.sin(angle), np.cross(along, side)))
        for gap in GAP[order]:
            start = len(corners) * 2 * SIDES
            corners.append(np.concatenate([xyz[end] + gap * side + ring for end in (first, second)]))
            near, far = start + np.arange(SIDES), start + SIDES + np.arange(SIDES)
            after, behind = np.roll(near, -1), np.roll(far, -1)
            faces += [np.stack([near, after, far], 1), np.stack([after, behind, far], 1)]
    if not corners:
        return []
    return [_mesh(np.concatenate(corners), np.concatenate(faces), STICK) | {"hoverinfo": "skip", "showlegend": False}]


def _side(mol: Mol, xyz: np.ndarray, first: int, second: int) -> np.ndarray:
    """A unit vector across the bond, towards a neighbour where there is one beside its line."""
    along = (xyz[second] - xyz[first]) / np.linalg.norm(xyz[second] - xyz[first])
    around = [n.GetIdx() for end in (first, second) for n in mol.GetAtomWithIdx(end).GetNeighbors()]
    near = [xyz[i] - xyz[first] for i in around if i not in (first, second)]
    for way in [*near, *np.eye(3)]:
        across = way - (way @ along) * along
        if np.linalg.norm(across) > 0.3 * np.linalg.norm(way):
            return across / np.linalg.norm(across)
    raise AssertionError("two of three axes lie beside any line")


def _mesh(corners: np.ndarray, faces: np.ndarray, colour: str) -> dict[str, Any]:
    places, which = corners.T.round(2).tolist(), faces.T.tolist()
    shape = dict(zip("xyzijk", [*places, *which], strict=True))
    return {"type": "mesh3d", **shape, "color": colour, "lighting": LIGHT}


@cache
def sphere(splits: int) -> tuple[np.ndarray, np.ndarray]:
    """Points of the unit sphere [n, 3] and triangles [m, 3] seen from outside, each split in four ``splits`` times."""
    g = (1 + 5**0.5) / 2
    points = np.array([np.roll([0.0, a, b * g], turn) for turn in range(3) for a in (-1, 1) for b in (-1, 1)])
    near = np.linalg.norm(points[:, None] - points, axis=-1) < 2.01
    faces = [(i, j, k) for i, j, k in combinations(range(12), 3) if near[i, j] and near[j, k] and near[i, k]]
    corners = points[faces]
    turned = np.linalg.det(corners) < 0
    corners[turned] = corners[turned][:, ::-1]
    for _ in range(splits):
        a, b, c = corners.transpose(1, 0, 2)
        ab, bc, ca = a + b, b + c, c + a
        corners = np.concatenate([np.stack(one, 1) for one in ((a, ab, ca), (b, bc, ab), (c, ca, bc), (ab, bc, ca))])
        corners /= np.linalg.norm(corners, axis=-1, keepdims=True)
    corners /= np.linalg.norm(corners, axis=-1, keepdims=True)
    found, which = np.unique(corners.reshape(-1, 3).round(9) + 0.0, axis=0, return_inverse=True)
    return found, which.reshape(-1, 3)
