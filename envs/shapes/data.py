"""Point clouds with sub-categories: every shape has as many points, and a label among the classes.

A class may have a group, the category that it is a kind of:  full name = group/class,  as in aircraft/Helicopter

On the way to a model a cloud x becomes  (x - mean) / std,  the mean per axis, the std one number over all of it.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

HELD_OUT = 0.05  # of a class, in each of valid and test
FLOOR = 3  # shapes that each of them gets even of a small class
MIN_POINTS = 16  # a cloud of fewer is no shape
NAMED = 3  # examples in a message


@dataclass(frozen=True, eq=False)
class Shapes:
    """Clouds in the order they came. Read only: arrays may be a file on disk."""

    points: np.ndarray
    """[shape, n, 3] float32, in the units of the source."""
    label: np.ndarray
    """[shape] int, the place of its class in ``classes``."""
    classes: tuple[str, ...]
    """Names of the sub-categories."""
    name: np.ndarray
    """[shape] strings, no two of one class alike."""
    groups: tuple[str, ...] = ()
    """The category of each class, '' where it has none; nothing at all means '' for all of them."""

    def __post_init__(self) -> None:
        if self.points.ndim != 3 or self.points.shape[2] != 3 or not self.points.shape[1]:
            raise ValueError(f"points has shape {self.points.shape}; give [shape, point, 3]")
        size = len(self.points)
        if self.label.shape != (size,) or self.name.shape != (size,):
            raise ValueError(
                f"there are {size} clouds, label has shape {self.label.shape} and name {self.name.shape}; give one per "
                "cloud"
            )
        outside = self.label[(self.label < 0) | (self.label >= len(self.classes))]
        if self.label.dtype.kind not in "iu" or len(outside):
            what = outside[0] if len(outside) else f"of type {self.label.dtype}"
            raise ValueError(
                f"a label is {what}, and there are {len(self.classes)} classes; give whole numbers below it"
            )
        if not self.groups:
            object.__setattr__(self, "groups", ("",) * len(self.classes))
        if len(self.groups) != len(self.classes):
            raise ValueError(f"there are {len(self.groups)} groups for {len(self.classes)} classes; give one per class")

    def __len__(self) -> int:
        return len(self.points)

    @property
    def full_names(self) -> tuple[str, ...]:
        """'group/class' of every class, or 'class' where it has no group."""
        return tuple(map(full_name, self.groups, self.classes))

    def take(self, rows: np.ndarray) -> Shapes:
        """The shapes at these rows, as often as they are named; a mask will do. The classes stay."""
        rows = np.arange(len(self))[rows]
        return Shapes(self.points[rows], self.label[rows], self.classes, self.name[rows], self.groups)

    def subset(self, classes: Sequence[str] | None = None, group: str | None = None) -> Shapes:
        """The shapes of these classes, which are numbered anew in the order given; of one group's, where one is."""
        chosen = choose(self.groups, self.classes, group, classes)
        renumbered = np.full(len(self.classes), -1)
        renumbered[chosen] = np.arange(len(chosen))
        label = renumbered[self.label]
        rows = np.flatnonzero(label >= 0)
        picked, owners = tuple(self.classes[i] for i in chosen), tuple(self.groups[i] for i in chosen)
        return Shapes(self.points[rows], label[rows], picked, self.name[rows], owners)


@dataclass
class Skipped:
    """What was left out, by reason, and what was used though something is the matter with it; names under each."""

    left_out: dict[str, list[str]] = field(default_factory=dict)
    kept: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, label: str) -> None:
        self.left_out.setdefault(reason, []).append(label)

    def note(self, what: str, label: str) -> None:
        self.kept.setdefault(what, []).append(label)

    @property
    def total(self) -> int:
        return sum(map(len, self.left_out.values()))

    def sentence(self, num_seen: int, things: str = "meshes") -> str:
        """'3 of 40 meshes skipped: 1 empty (a.off), 2 with NaN vertices (b.off, c.obj)'; '' where all is well."""
        skipped = f"{self.total} of {num_seen} {things} skipped: {_told(self.left_out)}" if self.total else ""
        kept = f"used all the same: {_told(self.kept)}" if self.kept else ""
        return "; ".join(filter(None, (skipped, kept)))


def _told(reasons: dict[str, list[str]]) -> str:
    told = []
    for reason, labels in sorted(reasons.items(), key=lambda item: -len(item[1])):
        examples = ", ".join(labels[:NAMED]) + (", ..." if len(labels) > NAMED else "")
        told.append(f"{len(labels)} {reason} ({examples})")
    return ", ".join(told)


def full_name(group: str, name: str) -> str:
    return f"{group}/{name}" if group else name


def choose(
    groups: Sequence[str], classes: Sequence[str], group: str | None = None, wanted: Sequence[str] | None = None
) -> list[int]:
    """Places of the ``wanted`` classes, by name or full name, within the group; all of them where none is named."""
    if group is not None and group not in groups:
        known = sorted(set(filter(None, groups)))
        raise ValueError(f"no group {group!r}{nearest(group, known)}; there are {', '.join(known) or 'none'}")
    inside = [place for place, owner in enumerate(groups) if group in (None, owner)]
    if wanted is None:
        return inside
    names = {place: (classes[place], full_name(groups[place], classes[place])) for place in inside}
    found: dict[int, None] = {}
    for name in [wanted] if isinstance(wanted, str) else wanted:
        places = [place for place in inside if name in names[place]]
        if not places:
            known = [classes[place] for place in inside]
            there = ", ".join(known[:12]) + (f" and {len(known) - 12} others" if len(known) > 12 else "")
            within = "" if group is None else f" in {group}"
            raise ValueError(f"no class {name!r}{within}{nearest(name, known)}; there are {there}")
        found |= dict.fromkeys(places)
    if not found:
        raise ValueError("classes is empty; name at least one, or leave it out for all of them")
    return list(found)


def nearest(name: str, known: Sequence[str]) -> str:
    """' (did you mean X?)' for a misspelt name, '' where nothing is near."""
    spelt = {other.lower(): other for other in known}
    found = difflib.get_close_matches(str(name).lower(), list(spelt), n=1, cutoff=0.5)
    return f" (did you mean {spelt[found[0]]!r}?)" if found else ""


def seed_of(*parts: object) -> int:
    """A seed that depends on these words and numbers only, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def in_one_place(cloud: np.ndarray) -> bool:
    """Whether all its points are one, up to the rounding of their coordinates: such a cloud has no shape."""
    rounding = 8 * np.finfo(cloud.dtype).eps if cloud.dtype.kind == "f" else 0.0
    return not len(cloud) or bool(np.ptp(cloud, axis=0).max() <= rounding * np.abs(cloud).max())


def normalised(points: np.ndarray) -> np.ndarray:
    """Each cloud of [..., n, 3] at zero mean and unit variance: (x - mean) / std over all its coordinates."""
    clouds = points.reshape(-1, *points.shape[-2:])
    found = np.empty(clouds.shape, np.float32)
    for place, cloud in enumerate(clouds):
        if in_one_place(cloud):
            raise ValueError(f"cloud {place} has all its points in one place and no shape; leave it out")
        centred = cloud.astype(np.float64) - cloud.mean(0, dtype=np.float64)
        found[place] = centred / centred.std()
    return found.reshape(points.shape)


def fitted(cloud: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """A cloud [points, 3] with exactly n points: some of them, or all of them and random ones once more."""
    if len(cloud) == n:
        return cloud
    if len(cloud) > n:
        return cloud[rng.permutation(len(cloud))[:n]]
    return np.concatenate([cloud, cloud[rng.integers(len(cloud), size=n - len(cloud))]])


def split(shapes: Shapes, seed: int = 0) -> dict[str, Shapes]:
    """'train', 'valid' and 'test': 90, 5 and 5 % of every class, drawn by name and seed whatever the order.

    Of small classes valid and test get three each, as long as half of the class stays for training.
    """
    full = shapes.full_names
    named = zip(shapes.label, shapes.name, strict=True)
    ranks = np.array([seed_of(seed, full[label], str(name)) for label, name in named], np.uint64)
    parts: dict[str, list[int]] = {"train": [], "valid": [], "test": []}
    for place in range(len(shapes.classes)):
        rows = np.flatnonzero(shapes.label == place)
        drawn = rows[np.argsort(ranks[rows], kind="stable")].tolist()
        held = min(2 * max(FLOOR, round(HELD_OUT * len(rows))), len(rows) // 2)
        parts["valid"] += drawn[: held // 2]
        parts["test"] += drawn[held // 2 : held]
        parts["train"] += drawn[held:]
    return {part: shapes.take(np.sort(np.array(rows, np.int64))) for part, rows in parts.items()}


def collate(
    clouds: np.ndarray, kinds: Sequence[tuple[str, str]], names: Sequence[str], order: Sequence[tuple[str, str]] = ()
) -> Shapes:
    """Clouds, the (group, class) of each and its name as ``Shapes``. A name that comes again is numbered.

    The classes are those that have a shape, in the given order or sorted.
    """
    present = set(kinds)
    listed = [kind for kind in (order or sorted(present)) if kind in present]
    place = {kind: number for number, kind in enumerate(listed)}
    label = np.array([place[kind] for kind in kinds], np.int64)
    seen: dict[tuple[str, str, str], int] = {}
    unique = []
    for kind, name in zip(kinds, names, strict=True):
        seen[*kind, name] = count = seen.get((*kind, name), 0) + 1
        unique.append(name if count == 1 else f"{name} ({count})")
    groups, classes = tuple(group for group, _ in listed), tuple(name for _, name in listed)
    return Shapes(np.asarray(clouds, np.float32), label, classes, np.array(unique, object), groups)
