"""Generated shapes as files: ``.ply`` with scores on every point, ``.obj`` with an object each, ``.zip``, ``.npz``.

write(path, samples, columns) -> how many it wrote,    samples[i] = [n, 3] or None,    columns[name][i] = its number

A PLY or OBJ is one file that MeshLab or Blender opens to show all samples at once: one lies where the model made it,
several lie in rows on the floor, in the order in which they are given: with --top, the best come first. PLY says of
each point its ``sample`` and scores, to filter and colour by; OBJ's objects can be picked by name. To work on shapes
one by one there is ``.zip``, of a PLY each, and ``.npz``, which ``formats.read`` takes; there all are where the model
made them.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

GAP = 1.25  # times the widest sample, from one to the next
LOW, HIGH = np.array([94, 110, 138]), np.array([255, 166, 61])  # colours of the lowest and of the highest reward
LONG_AGO = (1980, 1, 1, 0, 0, 0)  # a file's time in an archive, which would make two that are alike differ
Columns = Mapping[str, np.ndarray]


def ply(path: Path, samples: Sequence[Any], columns: Columns) -> int:
    """Binary, little-endian: x y z, red green blue by the reward, sample, and a float for each score (NaN: none)."""
    rows = _present(samples)
    with path.open("wb") as file:
        _ply(file, samples, columns, rows, _places(samples, rows))
    return len(rows)


def obj(path: Path, samples: Sequence[Any], columns: Columns) -> int:
    """Points as ``p`` elements, the format's own; scores are comments above each object."""
    rows, first = _present(samples), 1
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row, place in zip(rows, _places(samples, rows), strict=True):
            points = np.asarray(samples[row]) + place
            file.write(f"# {_told(columns, row, place)}\no {_name(columns, row)}\n")
            file.writelines(f"v {x:.6g} {y:.6g} {z:.6g}\n" for x, y, z in points.tolist())
            file.writelines(f"p {number}\n" for number in range(first, first + len(points)))
            first += len(points)
    return len(rows)


def archive(path: Path, samples: Sequence[Any], columns: Columns) -> int:
    """``sample_0007.ply`` for each."""
    rows = _present(samples)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bundle:
        for row in rows:
            made = BytesIO()
            _ply(made, samples, columns, [row], np.zeros((1, 3)))
            entry = zipfile.ZipInfo(f"{_name(columns, row)}.ply", LONG_AGO)
            bundle.writestr(entry, made.getvalue(), zipfile.ZIP_DEFLATED)
    return len(rows)


def npz(path: Path, samples: Sequence[Any], columns: Columns) -> int:
    """points [N, n, 3], NaN where a sample is None; name and category [N], one for all; the columns as they are."""
    rows = _present(samples)
    points = np.full((len(samples), len(samples[rows[0]]) if rows else 0, 3), np.nan, np.float32)
    for row in rows:
        points[row] = samples[row]
    name = np.array([_name(columns, row) for row in range(len(samples))], dtype=str)
    with path.open("wb") as file:  # given a path, numpy would add .npz to it
        told = {"points": points, "name": name, "category": np.full(len(samples), "sample"), **columns}
        np.savez_compressed(file, allow_pickle=False, **told)
    return len(rows)


def _ply(file: BinaryIO, samples: Sequence[Any], columns: Columns, rows: Sequence[int], places: np.ndarray) -> None:
    scores = {name: tag for name, tag in _tags(columns).items() if name != "index"}
    kinds = [(axis, "<f4") for axis in "xyz"] + [(ink, "u1") for ink in ("red", "green", "blue")]
    kinds += [("sample", "<i4"), *((tag, "<f4") for tag in scores.values())]
    sizes = [len(samples[row]) for row in rows]
    table, inks = np.zeros(sum(sizes), kinds), _inks(columns, _present(samples), len(samples))
    for row, place, stop, size in zip(rows, places, np.cumsum(sizes).tolist(), sizes, strict=True):
        part = table[stop - size : stop]
        for i, axis in enumerate("xyz"):
            part[axis] = np.asarray(samples[row])[:, i] + place[i]
        for i, ink in enumerate(("red", "green", "blue")):
            part[ink] = inks[row, i]
        part["sample"] = _index(columns, row)
        for name, tag in scores.items():
            part[tag] = columns[name][row]
    spoken = {"<f4": "float", "u1": "uchar", "<i4": "int"}
    lines = ["ply", "format binary_little_endian 1.0"]
    lines += [f"comment {_told(columns, row, place)}" for row, place in zip(rows, places, strict=True)]
    lines += [f"element vertex {len(table)}", *(f"property {spoken[kind]} {name}" for name, kind in kinds)]
    file.write("\n".join([*lines, "end_header", ""]).encode("ascii"))
    file.write(table.tobytes())


def _present(samples: Sequence[Any]) -> list[int]:
    return [row for row, sample in enumerate(samples) if sample is not None]


def _places(samples: Sequence[Any], rows: Sequence[int]) -> np.ndarray:
    """How far each sample is moved [sample, 3]: rows along x, one behind the other along -y; the first stays."""
    if not rows:
        return np.zeros((0, 3))
    step = GAP * max(float(np.ptp(np.asarray(samples[row]), axis=0).max()) for row in rows)
    across, found = int(np.ceil(np.sqrt(len(rows)))), np.zeros((len(rows), 3))
    found[:, 0] = np.arange(len(rows)) % across * step
    found[:, 1] = np.arange(len(rows)) // across * -step
    return found.round(4)


def _inks(columns: Columns, present: Sequence[int], num: int) -> np.ndarray:
    """From the lowest reward of a shape to the highest [sample, 3]; grey where there is none."""
    reward = np.asarray(columns.get("reward", np.full(num, np.nan)), dtype=float)
    seen = np.isfinite(reward) & np.isin(np.arange(num), present)
    found = np.full((num, 3), 160)
    if seen.any():
        low, high = reward[seen].min(), reward[seen].max()
        share = (reward[seen] - low) / (high - low) if high > low else np.ones(seen.sum())
        found[seen] = np.rint(LOW + share[:, None] * (HIGH - LOW))
    return found


def _told(columns: Columns, row: int, place: np.ndarray) -> str:
    scores = [f"{tag} {columns[name][row]:.8g}" for name, tag in _tags(columns).items() if name != "index"]
    moved = f"moved by {place[0]:g} {place[1]:g} {place[2]:g}" if place.any() else "not moved"
    return ", ".join([_name(columns, row), moved, *scores])


def _tags(columns: Columns) -> dict[str, str]:
    """The names of columns as the formats allow them, no two alike and none that a point has already."""
    found: dict[str, str] = {}
    taken = {"x", "y", "z", "red", "green", "blue", "sample"}
    for name in columns:
        tag = base = re.sub(r"[^A-Za-z0-9_]", "_", name) or "_"
        number = 2
        while tag in taken:
            tag, number = f"{base}_{number}", number + 1
        taken.add(tag)
        found[name] = tag
    return found


def _index(columns: Columns, row: int) -> int:
    return int(columns["index"][row]) if "index" in columns else row


def _name(columns: Columns, row: int) -> str:
    return f"sample_{_index(columns, row):04d}"
