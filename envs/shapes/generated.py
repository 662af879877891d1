"""A small set of shapes made from numbers, so that everything runs without a download: aircraft and vehicles.

shape = six-sided blocks and bodies of revolution, x forward and z up, with proportions drawn per sub-category

The last sub-category of a category is its rarest, the one to fine-tune towards. The same shapes as files:
``python -m envs.shapes.generated FOLDER [--category vehicle] [--num 600] [--format off|obj|ply|stl]``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from envs.shapes.blocks import Mesh, box, egg, joined, pairs, rod, rotor, surface_points, tube, wings
from envs.shapes.data import Shapes, collate, nearest, seed_of

NUM_SHAPES = 600
SHARES = (0.45, 0.25, 0.2, 0.1)


# -- sub-categories: u(a, b) is a number between a and b


Uniform = Callable[[float, float], float]


def _fuselage(length: float, radius: float, nose: float) -> Mesh:
    shape = [
        (-0.5, 0.15),
        (-0.35, 0.55),
        (-0.1, 1.0),
        (0.2, 1.0),
        (0.5 - nose, 0.85),
        (0.5 - nose / 3, 0.4),
        (0.5, 0.05),
    ]
    return tube([(length * x, radius * r, radius * (1 - r) * 0.4 * (x < 0)) for x, r in shape])


def _jet(u: Uniform) -> Mesh:
    length, radius = u(1.8, 2.2), u(0.09, 0.15)
    chord, span, sweep = u(0.5, 0.9), u(0.6, 1.05), u(0.35, 0.85)
    low, back = u(-0.7, 0.2) * radius, -0.5 * length
    small = u(0.35, 0.5)
    parts = [
        _fuselage(length, radius, u(0.15, 0.3)),
        wings((u(0.15, 0.4), 0, low), span, chord, u(0.15, 0.4), sweep, u(0.0, 0.08)),
        wings((back + 0.35, 0, radius * 0.4), span * small, chord * small, 0.4, sweep * small),
    ]
    fin = (u(0.25, 0.45), u(0.28, 0.4), 0.4, u(0.2, 0.35))
    places = (0.0,) if u(0, 1) < 0.7 else (radius, -radius)
    parts += [wings((back + 0.4, y, radius * 0.5), *fin, upright=True) for y in places]
    engine, num_pairs = u(0.05, 0.075), int(u(0, 2.99))
    for out in (0.35, 0.6)[:num_pairs]:
        x = 0.3 - chord / 2 - sweep * out * 0.6
        parts.append(pairs(lambda y, x=x: rod((x, y, low - 1.3 * engine), engine, 0.3, "x"), span * out))
    return joined(*parts)


def _gear(x: float, width: float, depth: float, radius: float) -> Mesh:
    legs = pairs(lambda y: rod((x, y, -depth / 2), 0.015, depth, "z"), width)
    return joined(legs, pairs(lambda y: rod((x, y, -depth), radius, 0.05, "y"), width))


def _straight(u: Uniform, length: float, radius: float) -> list[Mesh]:
    """What a propeller plane and a biplane share: body, tail, propeller and wheels."""
    back, span = -0.5 * length, u(0.3, 0.42)
    return [
        _fuselage(length, radius, u(0.08, 0.14)),
        wings((back + 0.25, 0, radius * 0.4), span, u(0.18, 0.26), u(0.6, 0.9), u(0.0, 0.06)),
        wings((back + 0.27, 0, radius * 0.5), u(0.22, 0.34), u(0.2, 0.28), u(0.5, 0.8), 0.08, upright=True),
        rotor((0.5 * length + 0.02, 0, 0), int(u(2, 4.99)), u(0.22, 0.32), 0.06, u(0, 6), "x"),
        _gear(u(0.1, 0.3), u(0.12, 0.25), radius + u(0.1, 0.18), u(0.05, 0.08)),
    ]


def _propeller(u: Uniform) -> Mesh:
    radius, chord = u(0.1, 0.16), u(0.24, 0.36)
    high = radius * (1 if u(0, 1) < 0.5 else -0.6)
    wing = wings((u(0.2, 0.4), 0, high), u(0.95, 1.3), chord, u(0.55, 1.0), u(-0.03, 0.08), u(0.0, 0.08))
    return joined(*_straight(u, u(1.5, 1.9), radius), wing)


def _biplane(u: Uniform) -> Mesh:
    radius, chord, span = u(0.1, 0.15), u(0.26, 0.38), u(0.7, 1.0)
    front, low, high = u(0.25, 0.4), -0.7 * radius, u(0.3, 0.45)
    lead, taper = u(0.0, 0.15), u(0.85, 1.0)
    parts = [
        *_straight(u, u(1.3, 1.6), radius),
        wings((front, 0, low), span * u(0.85, 1.0), chord, taper, 0.0),
        wings((front + lead, 0, high), span, chord, taper, 0.0),
    ]
    middle, tall = (low + high) / 2, high - low
    for back in (0.25, 0.75):
        x = front + lead / 2 - chord * back
        parts.append(pairs(lambda y, x=x: rod((x, y, middle), 0.015, tall, "z"), 0.15, u(0.6, 0.75) * span))
    return joined(*parts)


def _helicopter(u: Uniform) -> Mesh:
    body, radius = u(0.4, 0.6), u(0.2, 0.32)
    boom, rise, mast = u(0.75, 1.15), u(0.0, 0.12), u(0.08, 0.16)
    tail, top = -0.6 * body - boom, radius + mast
    wide, depth, half = u(0.16, 0.26), radius + u(0.1, 0.18), u(0.35, 0.55)
    parts = [
        egg((0, 0, 0), body, radius),
        tube([(tail, 0.035, rise), (-0.5 * body, u(0.07, 0.11), 0.3 * radius)]),
        wings((tail + 0.16, 0, rise), u(0.15, 0.3), 0.18, 0.7, 0.12, upright=True),
        rotor((tail, 0.04, rise + 0.06), int(u(2, 4.99)), u(0.14, 0.22), 0.04, u(0, 6), "y"),
        rod((0, 0, radius + mast / 2), 0.03, mast, "z"),
        rotor((0, 0, top), int(u(2, 5.99)), u(0.9, 1.25), u(0.06, 0.1), u(0, 6), "z"),
        pairs(lambda y: rod((0.05, y, -depth), 0.02, 2 * half, "x"), wide),
    ]
    struts = (pairs(lambda y, x=x: rod((x, y, -depth / 2), 0.015, depth, "z"), wide) for x in (0.25, -0.15))
    return joined(*parts, *struts)


def _wheels(places: Sequence[float], half_width: float, radius: float, width: float = 0.1) -> Mesh:
    return joined(*(pairs(lambda y, x=x: rod((x, y, radius), radius, width, "y"), half_width) for x in places))


def _car(u: Uniform) -> Mesh:
    long, wide, wheel, waist = u(0.85, 1.0), u(0.36, 0.44), u(0.14, 0.18), u(0.36, 0.46)
    front, back = u(0.2, 0.45), -u(0.6, 0.9) * long
    return joined(
        box((-long, long), (-wide, wide), (wheel, waist), 0.96),
        box((back, front), (-wide, wide), (waist, waist + u(0.24, 0.34)), u(0.5, 0.8)),
        _wheels((-0.6 * long, 0.62 * long), wide, wheel),
    )


def _truck(u: Uniform) -> Mesh:
    long, wide, wheel = u(1.0, 1.35), u(0.28, 0.36), u(0.13, 0.17)
    cab, gap, floor = u(0.3, 0.42), u(0.06, 0.14), 2 * wheel
    axles = np.linspace(-0.85 * long, -0.3 * long, int(u(1, 3.99))).tolist()
    return joined(
        box((long - cab, long), (-wide, wide), (wheel, floor + u(0.35, 0.5)), u(0.75, 1.0)),
        box((-long, long - cab - gap), (-wide, wide), (floor, floor + u(0.45, 0.75))),
        box((-long, long - cab / 2), (-wide / 2, wide / 2), (wheel, floor)),
        _wheels((*axles, long - cab / 2), wide, wheel),
    )


def _bus(u: Uniform) -> Mesh:
    long, wide, wheel = u(1.1, 1.4), u(0.26, 0.33), u(0.11, 0.15)
    return joined(
        box((-long, long), (-wide, wide), (wheel, wheel + u(0.55, 0.75)), u(0.94, 1.0)),
        _wheels((-u(0.5, 0.7) * long, u(0.6, 0.75) * long), wide, wheel),
    )


def _tractor(u: Uniform) -> Mesh:
    wide, big, small = u(0.28, 0.4), u(0.34, 0.45), u(0.16, 0.24)
    nose, floor, hood = u(0.6, 0.85), u(0.28, 0.36), u(0.55, 0.68)
    return joined(
        box((-0.1, nose), (-0.17, 0.17), (floor, hood), u(0.85, 1.0)),
        box((-0.55, -0.05), (-0.3, 0.3), (floor, hood + u(0.35, 0.5)), u(0.7, 0.95)),
        rod((u(0.2, 0.4), u(-0.08, 0.08), hood + 0.12), 0.03, 0.26, "z"),
        _wheels((-0.4,), wide + 0.08, big, 0.2),
        _wheels((nose - 0.15,), wide, small, 0.12),
    )


# -- the set


CATEGORIES: dict[str, dict[str, Callable[[Uniform], Mesh]]] = {
    "aircraft": {"jet": _jet, "propeller": _propeller, "biplane": _biplane, "helicopter": _helicopter},
    "vehicle": {"car": _car, "truck": _truck, "bus": _bus, "tractor": _tractor},
}


def mesh(category: str, kind: str, number: int, seed: int = 0) -> Mesh:
    """One shape. It depends on these four alone, not on how many others there are."""
    rng = np.random.default_rng(seed_of(seed, category, kind, number))
    return CATEGORIES[category][kind](lambda low, high: float(rng.uniform(low, high)))


def generated(
    category: str = "aircraft",
    num_per_class: int | Mapping[str, int] | None = None,
    seed: int = 0,
    num_points: int = 2048,
) -> Shapes:
    """The shapes of "aircraft" or "vehicle"; by default 600, of which the last sub-category has a tenth."""
    clouds, kinds, names = [], [], []
    for kind, number in _numbered(category, num_per_class):
        rng = np.random.default_rng(seed_of(seed, category, kind, number, "points"))
        clouds.append(surface_points(mesh(category, kind, number, seed), num_points, rng))
        kinds.append((category, kind))
        names.append(f"{kind}_{number:04d}")
    return collate(np.stack(clouds), kinds, names, [(category, kind) for kind in CATEGORIES[category]])


def _numbered(category: str, counts: int | Mapping[str, int] | None) -> list[tuple[str, int]]:
    if category not in CATEGORIES:
        hint = nearest(category, list(CATEGORIES))
        raise ValueError(f"no generated category {category!r}{hint}; there are {', '.join(CATEGORIES)}")
    kinds = list(CATEGORIES[category])
    if not isinstance(counts, Mapping):
        counts = dict.fromkeys(kinds, counts) if isinstance(counts, int) else _shared(kinds, NUM_SHAPES)
    unknown = [kind for kind in counts if kind not in kinds]
    if unknown:
        hint = nearest(unknown[0], kinds)
        raise ValueError(f"no class {unknown[0]!r} of {category}{hint}; there are {', '.join(kinds)}")
    found = [(kind, number) for kind in kinds for number in range(1, counts.get(kind, 0) + 1)]
    if not found or min(counts.values()) < 0:
        raise ValueError(f"num_per_class is {dict(counts)}; give counts of at least 0, one of them above")
    return found


def _shared(kinds: Sequence[str], total: int) -> dict[str, int]:
    ends = np.round(total * np.cumsum([0, *SHARES])).astype(int)
    return dict(zip(kinds, np.diff(ends).tolist(), strict=True))


# -- files


def write(path: Path, shape: Mesh) -> None:
    """A mesh as text; the suffix says how."""
    vertices, triangles = shape
    places = [" ".join(f"{x:.6g}" for x in row) for row in vertices.tolist()]
    if path.suffix == ".obj":
        lines = [*(f"v {place}" for place in places), *("f {} {} {}".format(*row) for row in (triangles + 1).tolist())]
    elif path.suffix == ".stl":
        facets = [[f"  vertex {places[corner]}" for corner in row] for row in triangles.tolist()]
        lines = [f"solid {path.stem}"]
        for facet in facets:  # readers compute the normals themselves
            lines += ["facet normal 0 0 0", " outer loop", *facet, " endloop", "endfacet"]
        lines.append(f"endsolid {path.stem}")
    else:
        faces = ["3 {} {} {}".format(*row) for row in triangles.tolist()]
        header = ["OFF", f"{len(vertices)} {len(triangles)} 0"]
        if path.suffix == ".ply":
            axes = [f"property float {axis}" for axis in "xyz"]
            header = ["ply", "format ascii 1.0", f"element vertex {len(vertices)}", *axes]
            header += [f"element face {len(triangles)}", "property list uchar int vertex_indices", "end_header"]
        lines = [*header, *places, *faces]
    path.write_text("\n".join(lines) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m envs.shapes.generated", description="The shapes as mesh files.")
    parser.add_argument("folder", type=Path, help="gets FOLDER/category/sub-category/name.off")
    parser.add_argument("--category", choices=CATEGORIES, default="aircraft")
    parser.add_argument("--num", type=int, default=NUM_SHAPES, help="shapes in all")
    parser.add_argument("--format", choices=("off", "obj", "ply", "stl"), default="off")
    parser.add_argument("--seed", type=int, default=0)
    told = parser.parse_args(arguments)
    if told.num < 1:
        parser.error(f"--num is {told.num}; give at least 1")
    found = _numbered(told.category, _shared(list(CATEGORIES[told.category]), told.num))
    for kind, number in found:
        path = told.folder.expanduser() / told.category / kind / f"{kind}_{number:04d}.{told.format}"
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, mesh(told.category, kind, number, told.seed))
    print(f"{len(found)} meshes in {told.folder / told.category}")


if __name__ == "__main__":
    main()
