"""A user's molecules: .xyz, .sdf, .mol and EDM's .npz, alone, in a folder or in a tar archive.

read(path) = every molecule that can be used; the others are counted by reason, and one sentence says so
"""

from __future__ import annotations

import bz2
import gzip
import logging
import lzma
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from envs.molecules import formats
from envs.molecules.data import Molecules, collate, concatenate

CHUNK = 2000  # molecules that are Python objects at the same time
TEXT: dict[str, Callable[[BinaryIO, str], Iterator[formats.Record]]] = {
    ".xyz": formats.xyz,
    ".sdf": formats.sdf,
    ".mol": formats.sdf,
}
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz")
MAGIC: dict[bytes, Callable[[BinaryIO], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
ALLOWED = f"{', '.join([*TEXT, '.npz'])}, a folder of these, or {', '.join(ARCHIVES)}"

logger = logging.getLogger(__name__)


@dataclass
class Skipped:
    """What was left out, by reason, and where each reason was met first."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, label: str) -> None:
        self.counts[reason] += 1
        self.first.setdefault(reason, label)

    def __str__(self) -> str:
        """'2 with no atoms (first: a.xyz), 1 with ...', the five most frequent reasons."""
        told = [f"{count} with {reason} (first: {self.first[reason]})" for reason, count in self.counts.most_common(5)]
        rest = self.counts.total() - sum(count for _, count in self.counts.most_common(5))
        return ", ".join([*told, *([f"{rest} for other reasons"] if rest else [])])


def read(path: str | Path, max_atoms: int | None = None, elements: Iterable[str] | None = None) -> Molecules:
    """The molecules of a file, folder or archive of at most ``max_atoms`` atoms, all of them of these ``elements``.

    Bad ones are left out and counted in one warning; ``ValueError`` where no good one is left.
    """
    molecules, skipped = read_counted(path, max_atoms, elements)
    _warn(path, len(molecules), skipped)
    return molecules


def _warn(path: str | Path, num_kept: int, skipped: Skipped) -> None:
    if total := skipped.counts.total():
        logger.warning("%d of %d molecules in %s are left out: %s", total, total + num_kept, path, skipped)


def read_counted(
    path: str | Path, max_atoms: int | None = None, elements: Iterable[str] | None = None
) -> tuple[Molecules, Skipped]:
    """``read``, and what was left out."""
    skipped = Skipped()
    kept = concatenate(list(chunks(path, skipped, max_atoms, elements)))
    total = skipped.counts.total()
    if not len(kept) and not total:
        raise ValueError(f"{path} holds no molecule; give a file that does")
    if not len(kept):
        raise ValueError(f"none of the {total} molecules in {path} can be used: {skipped}; give a file with others")
    return kept, skipped


def chunks(
    path: str | Path, skipped: Skipped, max_atoms: int | None = None, elements: Iterable[str] | None = None
) -> Iterator[Molecules]:
    """The good molecules, some thousand at a time; the bad ones go to ``skipped``."""
    names = None if elements is None else tuple(elements)
    for batch, labels in _batches(Path(path).expanduser(), skipped):
        yield select(batch, skipped, labels, max_atoms, names)


def select(
    molecules: Molecules,
    skipped: Skipped,
    labels: Sequence[str] | str,
    max_atoms: int | None = None,
    elements: Iterable[str] | None = None,
) -> Molecules:
    """The molecules that a model of ``max_atoms`` and ``elements`` can take; the others go to ``skipped``.

    ``labels`` are for its messages: one per molecule, or one for all.
    """
    names = formats.SYMBOLS if elements is None else tuple(elements)
    unknown = [name for name in names if name not in formats.ATOMIC_NUMBERS]
    if unknown or not names:
        raise ValueError(f"elements has {unknown or 'nothing'}; give symbols of elements such as H, C, N, O, F")
    allowed = np.zeros(256, bool)
    allowed[[formats.ATOMIC_NUMBERS[name] for name in names]] = True
    among = "" if elements is None else f", which is not among {', '.join(names)}"
    owner = np.repeat(np.arange(len(molecules)), molecules.num_atoms)
    reasons: dict[int, str] = {}
    if max_atoms is not None:
        large = np.flatnonzero(molecules.num_atoms > max_atoms).tolist()
        reasons |= dict.fromkeys(large, f"more than {max_atoms} atoms")
    for atom in np.flatnonzero(~allowed[molecules.numbers])[::-1].tolist():
        number = int(molecules.numbers[atom])
        symbol = formats.SYMBOLS[number - 1] if number else "outside 1..118"
        reasons[int(owner[atom])] = f"an element {symbol}{among}"
    lost = owner[~np.isfinite(molecules.positions).all(1)]
    reasons |= dict.fromkeys(lost.tolist(), "a coordinate that is no finite number")
    reasons |= dict.fromkeys(np.flatnonzero(molecules.num_atoms == 0).tolist(), "no atoms")
    if not reasons:
        return molecules
    for place in sorted(reasons):
        skipped.add(reasons[place], f"{labels}, molecule {place + 1}" if isinstance(labels, str) else labels[place])
    kept = np.ones(len(molecules), bool)
    kept[list(reasons)] = False
    return molecules[kept]


def fitting(molecules: Molecules, source: str, max_atoms: int, elements: Sequence[str]) -> Molecules:
    """Those of ``source`` that a model can take; of the others one warning, or ``ValueError``, as in ``read``."""
    skipped = Skipped()
    kept = select(molecules, skipped, source, max_atoms, elements)
    if not len(kept):
        what = f"no molecule of 1 to {max_atoms} atoms of {', '.join(elements)}"
        raise ValueError(f"{source} has {what}: {skipped}; raise max_atoms, or give other data")
    _warn(source, len(kept), skipped)
    return kept


def _batches(path: Path, skipped: Skipped) -> Iterator[tuple[Molecules, Sequence[str] | str]]:
    waiting = _records(path)
    while some := list(islice(waiting, CHUNK)):
        found = []
        for record in some:
            if isinstance(record, formats.Unreadable):
                skipped.add(record.reason, record.label)
            elif isinstance(record, tuple):
                yield record
            else:
                found.append(record)
        if found:
            yield collate(found), [one.label for one in found]


def _records(path: Path) -> Iterator[formats.Record | tuple[Molecules, str]]:
    if path.is_dir():
        yield from _folder(path)
    elif not path.exists():
        raise ValueError(f"there is no {path}; give {ALLOWED}")
    elif path.name.lower().endswith(ARCHIVES):
        yield from _archive(path)
    elif path.suffix.lower() in (*TEXT, ".npz"):
        yield from _file(path, path.name)
    else:
        raise ValueError(f"{path} has a name that says no format; give {ALLOWED}")


def _folder(path: Path) -> Iterator[formats.Record | tuple[Molecules, str]]:
    found = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in (*TEXT, ".npz") and file.is_file()]
    seen = [file for file in found if not file.name.startswith(".")]
    if not seen:
        raise ValueError(f"{path} holds none of {', '.join([*TEXT, '.npz'])}; give {ALLOWED}")
    for file in seen:
        yield from _file(file, str(file.relative_to(path)))


def _file(path: Path, label: str) -> Iterator[formats.Record | tuple[Molecules, str]]:
    try:
        with path.open("rb") as stream:
            if path.suffix.lower() == ".npz":
                yield formats.npz(stream, label), label
            else:
                yield from TEXT[path.suffix.lower()](stream, label)
    except OSError as error:
        yield formats.Unreadable(label, f"a file that cannot be opened, {error.strerror or error}")


class _Counted:
    """A stream that knows how much was read, and where its last byte that is not zero was."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.size, self.end = stream, 0, 0

    def read(self, size: int) -> bytes:
        block = self.stream.read(size)
        filled = len(block.rstrip(b"\0"))
        self.end = self.size + filled if filled else self.end
        self.size += len(block)
        return block


def _archive(path: Path) -> Iterator[formats.Record]:
    """The members in their order, nothing unpacked on disk.

    tarfile takes a damaged or missing header for the end: after the last member only zeros may follow, and some must.
    """
    seen, whole = 0, False
    try:
        with path.open("rb") as file:
            opened = next((opener for magic, opener in MAGIC.items() if file.peek(6).startswith(magic)), None)
            stream: Any = _Counted(opened(file) if opened else file)
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                for member in archive:
                    name = Path(member.name).name
                    reader = None if name.startswith(".") else TEXT.get(Path(name).suffix.lower())
                    inside: Any = archive.extractfile(member) if reader else None
                    if reader and inside is not None:
                        yield from reader(inside, name)
                        seen += 1
                while stream.read(1 << 20):
                    pass
                whole = stream.end <= archive.offset and stream.size >= archive.offset + tarfile.BLOCKSIZE
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(
            f"{path} is cut off, damaged or no tar archive, {seen} files into it ({error}); get it again"
        ) from None
    if not whole:
        raise ValueError(f"{path} is cut off or damaged, {seen} files into it; get it again")
    if not seen:
        raise ValueError(f"{path} holds none of {', '.join(TEXT)}; give {ALLOWED}")
