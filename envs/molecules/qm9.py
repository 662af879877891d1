"""QM9 (Ramakrishnan et al. 2014): 130,831 molecules of up to nine C, N, O, F, split as everyone splits it.

133,885 ids = 130,831 + 3,054 whose geometry fails the consistency check;  split = RandomState(0).permutation(130,831)
cut at 100,000 and 117,748 (Anderson et al. 2019, EDM and all after it): train, valid, test

Read once from whatever source there is into one Arrow file, and from there ever after.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from envs.molecules import files, qm9pack
from envs.molecules.cache import cached, default_folder
from envs.molecules.data import Molecules, concatenate
from envs.molecules.formats import QM9_PROPERTIES

NUM_PUBLISHED, NUM_CHARACTERIZED = 133_885, 130_831
SPLITS = {"train": 100_000, "valid": 17_748, "test": 13_083}
FILE = "qm9_v1.arrow"
PUBLISHED_NAMES = (qm9pack.WHEEL, "dsgdb9nsd.xyz.tar.bz2", "dsgdb9nsd.xyz", "dsgdb9nsd", "gdb9.sdf", "qm9")
SOURCES = (
    "qm9pack-1.0.3-py3-none-any.whl, dsgdb9nsd.xyz.tar.bz2 or its folder, gdb9.sdf, or EDM's folder of train.npz, "
    "valid.npz and test.npz"
)


def uncharacterized_ids() -> np.ndarray:
    """The 3,054 ids that are left out, ascending."""
    return np.array(json.loads(Path(__file__).with_name("uncharacterized.json").read_text()), np.int64)


def characterized_ids() -> np.ndarray:
    """The 130,831 ids that are used, ascending."""
    return np.setdiff1d(np.arange(1, NUM_PUBLISHED + 1), uncharacterized_ids(), assume_unique=True)


def split_ids(split: str) -> np.ndarray:
    """The ids of "train", "valid", "test" or, of all three, "all", ascending."""
    return characterized_ids()[_places(split)]


def qm9(split: str = "train", folder: str | Path | None = None, source: str | Path | None = None) -> Molecules:
    """A split of QM9 with all hydrogens, in the order of the ids, with 15 properties in the units of the publication.

    It lies in ``folder`` ($RAYFT_DATA, else ~/.cache/rayft). Where it is not there yet, it is made from ``source``, a
    path to any form of it; without one from $RAYFT_QM9, a published file in ``folder`` (EDM's three in a folder qm9),
    an installed qm9pack, else from PyPI.
    """
    places = _places(split)
    path = (default_folder() if folder is None else Path(folder).expanduser()) / FILE
    found = cached(path, lambda: _build(path.parent, None if source is None else Path(source).expanduser()))
    if not np.array_equal(found.index, characterized_ids()):
        raise ValueError(f"{path} does not hold the {NUM_CHARACTERIZED:,} molecules of QM9; delete it and try again")
    return found if split == "all" else found.take(places)


def _places(split: str) -> np.ndarray:
    if split not in (*SPLITS, "all"):
        raise ValueError(f"split is {split!r}; give {', '.join(SPLITS)} or all")
    if split == "all":
        return np.arange(NUM_CHARACTERIZED)
    order = np.random.RandomState(0).permutation(NUM_CHARACTERIZED)  # as the published split was drawn
    parts = np.split(order, np.cumsum(list(SPLITS.values()))[:-1])
    return np.sort(parts[list(SPLITS).index(split)])


def _build(folder: Path, source: Path | None) -> Molecules:
    """All of QM9 from ``source``; without one, from what is at hand or from PyPI."""
    if source is None and (told := os.environ.get("RAYFT_QM9")):
        source = Path(told).expanduser()
    if source is None:
        lying = (path for name in PUBLISHED_NAMES for path in sorted(folder.glob(name)))
        source = next(lying, None) or qm9pack.installed()
    if source is not None:
        return complete(source)
    for left in folder.glob(".qm9pack-*"):  # of a process that was killed: only one at a time comes here
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".qm9pack-", dir=folder) as fetched:
        try:
            wheel = qm9pack.download(Path(fetched))
        except ValueError as error:
            raise ValueError(
                f"QM9 is not in {folder} and could not be fetched ({error}); with a network, pip install "
                f"'rayft[qm9]', without one, set RAYFT_QM9 to the path of {SOURCES}; or put it into {folder}, "
                "EDM's as qm9"
            ) from None
        return complete(wheel)


def complete(source: str | Path) -> Molecules:
    """The 130,831 molecules out of ``source``, whatever form it has; refused if one is missing."""
    source, skipped = Path(source).expanduser(), files.Skipped()
    whole = concatenate(list(_watched(_chunks(source, skipped))))
    ids = characterized_ids()
    index, first = np.unique(whole.index, return_index=True)
    num_found = int(np.isin(ids, index).sum())
    if num_found < len(ids):
        left_out = f", and {skipped.counts.total()} unusable ones, {skipped}" if skipped.counts else ""
        raise ValueError(
            f"{source} has {num_found:,} of the {len(ids):,} molecules of QM9 by their ids{left_out}; give all of it "
            f"({SOURCES}), or read a part with envs.molecules.files.read"
        )
    kept = whole.take(first[np.isin(index, ids)])
    return Molecules(
        kept.num_atoms,
        kept.numbers,
        kept.positions,
        kept.smiles,
        kept.index,
        {name: kept.properties[name] for name in QM9_PROPERTIES if name in kept.properties},
    )


def _chunks(source: Path, skipped: files.Skipped) -> Iterator[Molecules]:
    if source.suffix == ".whl" or qm9pack.is_folder(source):
        if not source.exists():
            raise ValueError(f"there is no {source}; give the path of {SOURCES}")
        return qm9pack.chunks(source)
    return files.chunks(source, skipped)


def _watched(chunks: Iterator[Molecules]) -> Iterator[Molecules]:
    """The same, with a progress bar on a terminal."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("reading QM9, once", total=NUM_CHARACTERIZED)
        for chunk in chunks:
            yield chunk
            progress.advance(task, len(chunk))
