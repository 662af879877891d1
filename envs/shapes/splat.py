"""A cloud of points as a picture, with neither display nor GPU: discs, lit as the surface that they seem to be of.

    light = ambient + diffuse max(0, n . l) - occlusion max(0, blurred depth - depth)

n is the normal of the plane through a point's neighbours, bent towards that of a ball so that a point stays one where
there is no surface. The nearest disc at a pixel is seen. A picture is light and cover in 0..1; a ramp of colours makes
it a PNG.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

VIEWS = {"corner": (-52.0, 24.0), "side": (0.0, 4.0), "front": (-90.0, 4.0), "top": (0.0, 89.9)}  # azimuth, elevation
AXES = {"z": (0, 1, 2), "y": (2, 0, 1)}  # which coordinates are front, right and up
RAMPS = {  # dark, middle and bright: seen on white paper and on black
    "run": ("#163a5e", "#3b86c4", "#b5dcfa"),
    "before": ("#3a414b", "#858e9a", "#d3d9e0"),
    "best": ("#7a3d0c", "#d9822b", "#ffd9ac"),
}
SAMPLES = 2  # pixels that are drawn for each that is seen, along an edge
NEIGHBOURS, DISC = 14, 0.95  # a disc's radius in distances to the third neighbour
SMALLEST, LARGEST = 1.6, 0.028  # radius in pixels drawn, and as a share of the picture's shorter edge
LIGHT = np.array([-0.45, 0.62, 0.64])  # from the left, above and behind the viewer
AMBIENT, DIFFUSE, OCCLUSION, MIST, ROUND = 0.3, 0.62, 0.4, 0.14, 0.25
SHADES, COVERS = 50, 5  # of a PNG's palette of 256


@dataclass(frozen=True)
class Shot:
    """Light and cover of each pixel [height, width]."""

    light: np.ndarray
    cover: np.ndarray


def draw(cloud: np.ndarray, view: str = "corner", width: int = 300, height: int = 220, up: str = "z") -> Shot:
    """The cloud as large as fits, from a direction of ``VIEWS``; ``up`` is the axis that stands upright."""
    if view not in VIEWS or up not in AXES:
        raise ValueError(f"view is {view!r} and up {up!r}; choose of {', '.join(VIEWS)} and of {', '.join(AXES)}")
    w, h = SAMPLES * width, SAMPLES * height
    points, normals = _turned(np.asarray(cloud, dtype=np.float64)[:, AXES[up]], *VIEWS[view])
    low, high = points.min(0), points.max(0)
    largest = LARGEST * min(w, h)
    scale = min((size - 4 * largest) / max(edge, 1e-9) for size, edge in zip((w, h), (high - low)[:2], strict=True))
    scale = min(scale, 1.05 * max(w, h) / max(float(np.linalg.norm(high - low)), 1e-9))
    at = (points - (low + high) / 2) * scale
    radius = float(np.clip(DISC * _spacing(points) * scale, SMALLEST, largest))
    depth, light = _splat(at * [1, -1, 1] + [w / 2, h / 2, 0], normals, radius, w, h)
    seen = np.isfinite(depth)
    light = np.clip(light - _occlusion(depth, seen, 0.045 * min(w, h)), 0, 1)
    cover = _shrunk(seen.astype(float))
    return Shot(_shrunk(np.where(seen, light, 0.0)) / np.maximum(cover, 1e-9), cover)


def _turned(points: np.ndarray, azimuth: float, elevation: float) -> tuple[np.ndarray, np.ndarray]:
    """Points and normals as the viewer has them: right, up, and towards the viewer."""
    a, e = np.radians([azimuth, elevation])
    towards = np.array([np.cos(e) * np.sin(-a), -np.cos(e) * np.cos(a), np.sin(e)])
    right = np.array([np.cos(a), -np.sin(a), 0.0])
    frame = np.stack([right, np.cross(towards, right), towards], 1)
    found = points @ frame
    normals = _normals(found)
    return found, normals * np.where(normals[:, 2:] < 0, -1, 1)


def _normals(points: np.ndarray) -> np.ndarray:
    from scipy.spatial import KDTree

    near = np.asarray(KDTree(points).query(points, min(NEIGHBOURS, len(points)))[1]).reshape(len(points), -1)
    around = points[near] - points[near].mean(1, keepdims=True)
    return np.linalg.eigh(around.transpose(0, 2, 1) @ around)[1][:, :, 0]


def _spacing(points: np.ndarray) -> float:
    """How far points are from each other where they are as dense as is usual."""
    from scipy.spatial import KDTree

    far = np.asarray(KDTree(points).query(points, min(4, len(points)))[0]).reshape(len(points), -1)
    return float(np.median(far[:, -1]))


def _splat(at: np.ndarray, normals: np.ndarray, radius: float, w: int, h: int) -> tuple[np.ndarray, np.ndarray]:
    """Depth towards the viewer, -inf where there is nothing, and light [h, w]."""
    reach = int(np.ceil(radius))
    dy, dx = (part.ravel() for part in np.mgrid[-reach : reach + 1, -reach : reach + 1])
    x, y = (np.rint(at[:, [i]]).astype(int) + step for i, step in ((0, dx), (1, dy)))
    square = (np.square(x - at[:, :1]) + np.square(y - at[:, 1:2])) / radius**2
    kept = (square <= 1) & (x >= 0) & (x < w) & (y >= 0) & (y < h)
    deep = (at[:, 2:] + radius * np.sqrt(np.maximum(1 - square, 0)))[kept]
    level = (deep - deep.min()) * (65535 / max(float(np.ptp(deep)), 1e-9))
    order, place = np.argsort(level.astype(np.uint16), kind="stable"), (y * w + x)[kept]  # NumPy counts small integers
    depth, nearest = np.full(h * w, -np.inf), np.full(h * w, -1)
    depth[place[order]], nearest[place[order]] = deep[order], np.nonzero(kept)[0][order]  # the last, the nearest, stays
    seen = np.flatnonzero(nearest >= 0)
    which = nearest[seen]
    ball = np.stack([seen % w - at[which, 0], at[which, 1] - seen // w, depth[seen] - at[which, 2]], 1) / radius
    bent = (1 - ROUND) * normals[which] + ROUND * ball
    bent /= np.maximum(np.linalg.norm(bent, axis=1, keepdims=True), 1e-9)
    light = np.zeros(h * w)
    light[seen] = AMBIENT + DIFFUSE * np.maximum(bent @ (LIGHT / np.linalg.norm(LIGHT)), 0)
    return depth.reshape(h, w), light.reshape(h, w)


def _occlusion(depth: np.ndarray, seen: np.ndarray, reach: float) -> np.ndarray:
    """Darker where the surroundings are nearer to the viewer, and a little with distance."""
    from scipy.ndimage import uniform_filter

    def blur(level: np.ndarray) -> np.ndarray:
        return uniform_filter(uniform_filter(level, size, mode="constant"), size, mode="constant")

    if not seen.any():
        return np.zeros(depth.shape)
    low, high = depth[seen].min(), depth[seen].max()
    level = np.where(seen, depth, low)
    size = max(3, round(2.4 * reach))
    blurred = blur(level * seen) / np.maximum(blur(seen.astype(float)), 1e-6)
    far = (high - level) / max(high - low, 1e-9)
    return OCCLUSION * np.clip((blurred - level) / (2.5 * reach), 0, 1) + MIST * far


def _shrunk(fine: np.ndarray) -> np.ndarray:
    h, w = fine.shape
    return fine.reshape(h // SAMPLES, SAMPLES, w // SAMPLES, SAMPLES).mean((1, 3))


# -- colours and files


def stacked(shots: Sequence[Shot]) -> Shot:
    """Pictures of one width, one below the other."""
    return Shot(*(np.concatenate([getattr(shot, name) for shot in shots]) for name in ("light", "cover")))


def coloured(light: np.ndarray, ramp: str) -> np.ndarray:
    """[..., 3] in 0..255."""
    stops = np.array([[int(ink[i : i + 2], 16) for i in (1, 3, 5)] for ink in RAMPS[ramp]])
    return np.stack([np.interp(light, [0.0, 0.55, 1.0], stops[:, i]) for i in range(3)], -1)


def png(shot: Shot, ramp: str) -> bytes:
    """The file, with a palette and a see-through background: a sixth of one in full colours."""
    cover = np.rint(shot.cover * COVERS).astype(int)
    shade = np.clip(np.rint(shot.light * (SHADES - 1)), 0, SHADES - 1).astype(int)
    index = np.where(cover > 0, 1 + shade * COVERS + cover - 1, 0).astype(np.uint8)
    inks = coloured(np.repeat(np.linspace(0, 1, SHADES), COVERS), ramp)
    inks = np.concatenate([inks[:1], inks]).round().astype(np.uint8)
    opaque = np.tile(np.linspace(0, 255, COVERS + 1)[1:], SHADES)
    opaque = np.concatenate([[0], opaque]).round().astype(np.uint8)
    h, w = index.shape
    lines = np.concatenate([np.zeros((h, 1), np.uint8), index], 1)  # each begins with the number of its filter, none
    head = struct.pack(">IIBBBBB", w, h, 8, 3, 0, 0, 0)
    parts = {b"IHDR": head, b"PLTE": inks.tobytes(), b"tRNS": opaque.tobytes()}
    parts |= {b"IDAT": zlib.compress(lines.tobytes(), 9), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, body) for kind, body in parts.items())


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
