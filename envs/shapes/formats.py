"""Shapes from wherever they are: the generated set, a folder of meshes, an .npz, or ShapeNet's point clouds in HDF5.

read(source) = every shape that can be used, with num_points each; the others are counted by reason in one sentence

A cloud with more points is thinned, one with fewer has some twice; which ones depends on its name alone.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from envs.shapes import generated
from envs.shapes.cache import cached, default_folder, key
from envs.shapes.data import MIN_POINTS, Shapes, Skipped, choose, collate, fitted, in_one_place, seed_of
from envs.shapes.meshes import listed, sampled

ALLOWED = "'generated', a folder of meshes, an .npz, or ShapeNet's .h5 or .hdf5"
PARTS = ("train", "val", "test")
HDF5 = (".h5", ".hdf5")
ARRAYS = ("points", "label", "classes", "class_group", "category", "group", "name", "rot24", "rotations")  # of an npz
ALONE = "alone in a class, of which nothing is held out"
Kind = tuple[str, str]  # group, class
SHAPENET = """
02691156 airplane  02747177 bin  02773838 bag  02801938 basket  02808440 bathtub  02818832 bed  02828884 bench
02834778 bicycle  02843684 birdhouse  02871439 bookshelf  02876657 bottle  02880940 bowl  02924116 bus
02933112 cabinet  02942699 camera  02946921 can  02954340 cap  02958343 car  02992529 cellphone  03001627 chair
03046257 clock  03085013 keyboard  03207941 dishwasher  03211117 display  03261776 earphone  03325088 faucet
03337140 file  03467517 guitar  03513137 helmet  03593526 jar  03624134 knife  03636649 lamp  03642806 laptop
03691459 loudspeaker  03710193 mailbox  03759954 microphone  03761084 microwave  03790512 motorbike  03797390 mug
03928116 piano  03938244 pillow  03948459 pistol  03991062 flowerpot  04004475 printer  04074963 remote
04090263 rifle  04099429 rocket  04225987 skateboard  04256520 sofa  04330267 stove  04379243 table
04401088 telephone  04460130 tower  04468005 train  04530566 watercraft  04554684 washer
"""  # its 55 categories and one more
SYNSETS = dict(re.findall(r"(\d+) (\w+)", SHAPENET))

logger = logging.getLogger(__name__)


def read(
    source: str | Path, num_points: int = 2048, group: str | None = None, classes: Sequence[str] | None = None
) -> Shapes:
    """The shapes of a source, of one group and of these classes where they are named.

    Bad ones are left out and counted in one warning; ``ValueError`` where no good one is left.
    """
    shapes, skipped = read_counted(source, num_points, group, classes)
    sentence = skipped.sentence(len(shapes) + skipped.total, "shapes")
    if sentence:
        logger.warning("%s: %s", source, sentence)
    return shapes


def read_counted(
    source: str | Path, num_points: int = 2048, group: str | None = None, classes: Sequence[str] | None = None
) -> tuple[Shapes, Skipped]:
    """``read``, and what was left out; of a class with a single shape its name is noted."""
    if not isinstance(num_points, int) or num_points < 1:
        raise ValueError(f"num_points is {num_points!r}; give a whole number of at least 1")
    path = Path(source).expanduser()
    if source == "generated":
        shapes, skipped = _generated(num_points, group, classes), Skipped()
    elif path.is_dir():
        shapes, skipped = _folder(path, num_points, group, classes)
    elif not path.exists():
        raise ValueError(f"there is no {path}; give {ALLOWED}")
    elif path.suffix.lower() == ".npz":
        shapes, skipped = npz(path, num_points, group, classes)
    elif path.suffix.lower() in HDF5:
        shapes, skipped = hdf5(path, num_points, group, classes)
    else:
        raise ValueError(f"{path} has a name that says no format; give {ALLOWED}")
    if not len(shapes):
        told = skipped.sentence(skipped.total, "shapes") or "it holds none"
        raise ValueError(f"no shape in {source} can be used: {told}; give one with others")
    for place in np.flatnonzero(np.bincount(shapes.label) == 1).tolist():
        skipped.note(ALONE, shapes.full_names[place])
    return shapes, skipped


def _generated(num_points: int, group: str | None, classes: Sequence[str] | None) -> Shapes:
    kinds = [(category, kind) for category, makers in generated.CATEGORIES.items() for kind in makers]
    chosen = [kinds[place] for place in _chosen(kinds, group, classes)]
    clouds, labels, names = [], [], []
    for category in dict.fromkeys(owner for owner, _ in chosen):
        made = generated.generated(category, num_points=num_points)
        full = [(category, made.classes[label]) for label in made.label]
        rows = [row for row, kind in enumerate(full) if kind in chosen]
        clouds.append(made.points[rows])
        labels += [full[row] for row in rows]
        names += made.name[rows].tolist()
    return collate(np.concatenate(clouds), labels, names, chosen)


def _folder(path: Path, num_points: int, group: str | None, classes: Sequence[str] | None) -> tuple[Shapes, Skipped]:
    files = listed(path)
    kinds = sorted({file.kind for file in files})
    order = [kinds[place] for place in _chosen(kinds, group, classes)]
    files = [file for file in files if file.kind in order]

    def build() -> tuple[Shapes, Skipped]:
        clouds, kept, skipped = sampled(files, num_points)
        return collate(clouds, [file.kind for file in kept], [file.name for file in kept], order), skipped

    name = f"{path.resolve().name}-{key(files, num_points, order)}.arrow"
    return cached(default_folder() / "shapes" / name, build)


def _chosen(kinds: Sequence[Kind], group: str | None, classes: Sequence[str] | None) -> list[int]:
    return choose([owner for owner, _ in kinds], [name for _, name in kinds], group, classes)


def npz(
    path: Path, num_points: int, group: str | None = None, classes: Sequence[str] | None = None
) -> tuple[Shapes, Skipped]:
    """points [N, n, 3], and label [N] with classes [K], or category [N] or label [N] as strings, and name [N].

    class_group [K], or with category group [N], say the group; rot24 [N] and rotations [R, 3, 3] put the clouds into
    one pose,  p rotations[rot24]^T.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in ARRAYS if name in archive.files}
    except Exception as error:  # a damaged file fails in many ways, a .npy of this name is no archive
        raise ValueError(f"{path} is no whole .npz of plain arrays ({error}); get it or write it again") from None
    points = arrays.get("points")
    if points is None or points.ndim != 3 or points.shape[2] != 3 or points.dtype.kind not in "fiu":
        found = "no points" if points is None else f"points {points.shape} of {points.dtype}"
        raise ValueError(f"{path} has {found}; it needs points [shape, point, 3] and label with classes, or category")
    wrong = [
        name
        for name in ("label", "category", "group", "name", "rot24")
        if name in arrays and arrays[name].shape != points.shape[:1]
    ]
    if wrong:
        raise ValueError(
            f"{path} has {len(points)} clouds and {wrong[0]} has shape {arrays[wrong[0]].shape}; give one per cloud"
        )
    kinds, order = _labelled(path, arrays)
    picked = [order[place] for place in _chosen(order, group, classes)]
    rows = [row for row, kind in enumerate(kinds) if kind in picked]
    names = arrays["name"].astype(str).tolist() if "name" in arrays else [str(row) for row in range(len(points))]
    clouds = _single(points[rows])
    if "rot24" in arrays and "rotations" in arrays:
        try:
            turns = arrays["rotations"].astype(np.float32)[arrays["rot24"].astype(np.int64)[rows]]
            clouds = clouds @ turns.transpose(0, 2, 1)
        except (IndexError, ValueError) as error:
            raise ValueError(f"{path} has rot24 that do not fit rotations ({error}); leave both out") from None
    return _usable([(clouds, [kinds[row] for row in rows], [names[row] for row in rows])], num_points, picked)


def _labelled(path: Path, arrays: dict[str, Any]) -> tuple[list[Kind], list[Kind]]:
    """The (group, class) of each cloud, and of each class in their order."""
    label, classes = arrays.get("label"), arrays.get("classes")
    if label is not None and classes is not None and label.dtype.kind in "iu":
        if classes.ndim != 1:
            raise ValueError(f"{path} has classes of shape {classes.shape}; give a name for each class")
        owners = arrays.get("class_group", np.full(len(classes), ""))
        if owners.shape != classes.shape or (len(label) and not 0 <= label.min() <= label.max() < len(classes)):
            raise ValueError(
                f"{path} has label or class_group that do not fit its {len(classes)} classes; correct them"
            )
        order = list(zip(owners.astype(str).tolist(), classes.astype(str).tolist(), strict=True))
        return [order[place] for place in label.tolist()], order
    words = arrays.get("category", label)
    if words is None or words.dtype.kind not in "US":
        raise ValueError(f"{path} does not say of what class its clouds are; it needs label with classes, or category")
    owners = arrays["group"].astype(str).tolist() if "group" in arrays else [""] * len(words)
    kinds = list(zip(owners, words.astype(str).tolist(), strict=True))
    return kinds, sorted(set(kinds))


def hdf5(
    path: Path, num_points: int, group: str | None = None, classes: Sequence[str] | None = None
) -> tuple[Shapes, Skipped]:
    """ShapeNet's clouds: train, val and test [n, points, 3] in groups named by synset; only what is asked for is read.

    A class goes by its name, airplane, or its synset, 02691156; clouds are named 02691156/train/00000.
    """
    try:
        import h5py
    except ImportError as error:
        raise ValueError(f"{path} needs h5py, and {error}; pip install 'rayft[shapes]'") from error
    expected = f"it needs groups named by synset, and in them {', '.join(PARTS)} [shape, point, 3]"
    wanted = (
        None
        if classes is None
        else [SYNSETS.get(name, name) for name in ([classes] if isinstance(classes, str) else classes)]
    )
    found: list[tuple[np.ndarray, list[Kind], list[str]]] = []
    try:
        with h5py.File(os.fspath(path), "r") as file:
            synsets = [name for name in sorted(file) if isinstance(file[name], h5py.Group)]
            order = [("", SYNSETS.get(name, name)) for name in synsets]
            if not synsets:
                raise ValueError(f"{path} holds {', '.join(list(file)[:5]) or 'nothing'}; {expected}")
            picked = _chosen(order, group, wanted)
            for synset, kind in ((synsets[place], order[place]) for place in picked):
                content: Any = file[synset]
                for part in (part for part in PARTS if part in content):
                    if not isinstance(content[part], h5py.Dataset):
                        raise ValueError(f"{path} has a {type(content[part]).__name__} in {synset}/{part}; {expected}")
                    clouds = np.asarray(content[part][()])
                    if clouds.ndim != 3 or clouds.shape[2] != 3 or clouds.dtype.kind not in "fiu":
                        raise ValueError(f"{path} has {clouds.shape} of {clouds.dtype} in {synset}/{part}; {expected}")
                    names = [f"{synset}/{part}/{row:05d}" for row in range(len(clouds))]
                    found.append((clouds, [kind] * len(names), names))
    except (OSError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path} is cut off, damaged or no HDF5 file ({error}); get it again") from None
    return _usable(found, num_points, [order[place] for place in picked])


def _single(clouds: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # what is too large becomes infinite and is left out
        return clouds.astype(np.float32)


def _usable(
    parts: Sequence[tuple[np.ndarray, list[Kind], list[str]]], num_points: int, order: Sequence[Kind]
) -> tuple[Shapes, Skipped]:
    """The clouds that are finite and have an extent, all with ``num_points``."""
    skipped = Skipped()
    clouds = np.empty((sum(len(names) for _, _, names in parts), num_points, 3), np.float32)
    kinds: list[Kind] = []
    kept: list[str] = []
    for points, owners, names in parts:
        for cloud, kind, name in zip(_single(points), owners, names, strict=True):
            if len(cloud) < MIN_POINTS:
                skipped.add(f"with fewer than {MIN_POINTS} points", name)
            elif not np.isfinite(cloud).all():
                skipped.add("with NaN or infinite points", name)
            elif in_one_place(cloud):
                skipped.add("with all points in one place", name)
            else:
                if len(cloud) < num_points:
                    skipped.note(f"with fewer than {num_points} points, some of them taken twice", name)
                clouds[len(kept)] = fitted(cloud, num_points, np.random.default_rng(seed_of(name)))
                kinds.append(kind)
                kept.append(name)
    return collate(clouds[: len(kept)], kinds, kept, order), skipped
