"""A run's folder kept on a storage as well: whole files, what is new, and a checkpoint's card after the rest of it.

    send:   files, payload of checkpoints  ->  card.json  ->  best.json  ->  what was pruned goes
    bring:  the run as it was last sent; a checkpoint without its card is not there

So whatever moment an upload is killed in, what lies there is a run that can be resumed.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pyarrow as pa

from rayft import storage, store
from rayft.storage import Place

CHECKPOINTS = "checkpoints/"
SWEEP, ROWS = "sweep.json", "rows.jsonl"
SHARED = ("trials/", "bank/", "claims/")  # by the trials of a sweep, who read it where it lies
Stamp = tuple[int, int]


class Mirror:
    """Sends ``folder`` to ``there``, and never twice what has not changed."""

    def __init__(self, folder: Path, there: Place) -> None:
        self.folder, self.there = folder, there
        self.sent: dict[str, Stamp] = {}
        self.known: set[str] | None = None  # files that lie there
        self.uploads = 0

    def send(self) -> str:
        """Everything that is new; why it failed, or nothing. What arrived stays, the rest goes with the next call."""
        try:
            self._send()
        except (OSError, pa.ArrowException) as error:
            return f"could not be sent to {self.there.uri} ({storage.plainly(error)})"
        return ""

    def fetch(self, name: str) -> None:
        """From there, where somebody else has put it."""
        storage.patiently(lambda: self.there.get(name, self.folder / name))
        self.sent[name] = _stamp(self.folder / name)

    def _send(self) -> None:
        here = self._here()
        if self.known is None:
            self._look(here)
        assert self.known is not None
        fresh = [name for name, stamp in here.items() if self.sent.get(name) != stamp]
        for name in fresh:  # a checkpoint that is written again is not whole meanwhile
            card = _card_of(name)
            if card is not None and card in self.known and self.sent.get(card) != here.get(card):
                self._delete(card)
        for name in sorted(fresh, key=lambda name: (_turn(name), name)):
            storage.patiently(lambda name=name: self.there.put(self.folder / name, name))
            self.sent[name] = here[name]
            self.known.add(name)
            self.uploads += 1
        for name in sorted(self.known, key=lambda name: (-_turn(name), name)):  # a card first
            if name.startswith(CHECKPOINTS) and name not in here:
                self._delete(name)

    def _delete(self, name: str) -> None:
        assert self.known is not None
        storage.patiently(lambda: self.there.delete(name))
        self.known.discard(name)
        self.sent.pop(name, None)

    def _here(self) -> dict[str, Stamp]:
        found = {}
        for path in sorted(self.folder.rglob("*")):
            inner = path.relative_to(self.folder)
            name = inner.as_posix()
            if any(part.startswith(".") and part.endswith((".tmp", ".old", ".part", ".lock")) for part in inner.parts):
                continue
            with contextlib.suppress(FileNotFoundError):
                if path.is_file():
                    found[name] = _stamp(path)
        return found

    def _look(self, here: dict[str, Stamp]) -> None:
        """What lies there already; checkpoints whose card is the same there and here are not sent again."""
        sizes = storage.patiently(self.there.listing)
        for card in [name for name in sizes if _turn(name) == 1 and name in here]:
            if storage.patiently(lambda card=card: self.there.read(card)) == (self.folder / card).read_bytes():
                folder = card.removesuffix("card.json")
                same = [name for name in here if name.startswith(folder) and sizes.get(name) == here[name][0]]
                self.sent |= {name: here[name] for name in same}
        self.known = set(sizes)


def bring(there: Place, folder: Path, whole: bool, trust: bool = False) -> bool:
    """The run at ``there`` into ``folder``, unless what lies here is as far; ``whole`` with what a resume reads."""
    sizes = storage.patiently(there.listing)
    cards = [name for name in sizes if _turn(name) == 1]
    if "config.yaml" not in sizes and "card.json" not in sizes:
        raise ValueError(f"{there.uri} is neither a run nor a checkpoint: it has no config.yaml; look at the name")
    if whole and SWEEP in sizes and (folder / ROWS).is_file() and sizes.get(ROWS, 0) <= (folder / ROWS).stat().st_size:
        return False
    if whole and (folder / CHECKPOINTS).is_dir():
        own = store.newest(folder)
        if own is not None and own.iteration >= max((_iteration(card) for card in cards), default=-1):
            return False
    if whole and not trust and SWEEP not in sizes:
        owned(there, sizes)
    checkpoints = {card.removesuffix("card.json") for card in cards}
    folder.mkdir(parents=True, exist_ok=True)
    left = (CHECKPOINTS, *SHARED) if SWEEP in sizes else (CHECKPOINTS,)
    for name in sizes:
        if not name.startswith(left) and (whole or "rllib/" not in name):
            storage.patiently(lambda name=name: there.get(name, folder / name))
    for checkpoint in sorted(checkpoints):
        _bring_checkpoint(there, checkpoint, sizes, folder, whole)
    for path in (folder / "checkpoints").glob("iteration_*"):
        if f"{CHECKPOINTS}{path.name}/" not in checkpoints:
            (path / "card.json").unlink(missing_ok=True)
    if f"{CHECKPOINTS}best.json" in sizes:
        storage.patiently(lambda: there.get(f"{CHECKPOINTS}best.json", folder / CHECKPOINTS / "best.json"))
    return True


def _bring_checkpoint(there: Place, name: str, sizes: dict[str, int], folder: Path, whole: bool) -> None:
    files = {n.removeprefix(name): size for n, size in sizes.items() if n.startswith(name)}
    files = {n: size for n, size in files.items() if whole or not n.startswith("rllib/")}
    target, source = folder / name, there.child(name.rstrip("/"))
    card = storage.patiently(lambda: source.read("card.json"))
    same = all((target / n).is_file() and (target / n).stat().st_size == size for n, size in files.items())
    if same and (target / "card.json").read_bytes() == card:
        return
    storage.copy_down(source, list(files), target)


def owned(there: Place, sizes: dict[str, int]) -> None:
    """Resuming unpickles what lies there: a disk says whose it is, a bucket cannot."""
    how = "resume with --trust if you know where it comes from"
    if there.local and hasattr(os, "getuid"):
        root = there.root.rstrip("/")
        owners = {os.lstat(path).st_uid for path in (root, *(f"{root}/{name}" for name in sizes))} - {os.getuid()}
        if owners:
            others = ", ".join(map(str, sorted(owners)))
            raise ValueError(f"{there.uri} belongs to another user (uid {others}) and resuming unpickles it; {how}")
    elif not there.local:
        print(
            f"{there.uri} cannot say whose it is: its state is unpickled where it matches the hash on its card, and "
            "whoever may write there can run programs here",
            file=sys.stderr,
        )


def taken(there: Place) -> Callable[[str], bool]:
    """Whether a run of this name lies there."""
    names = set(storage.patiently(there.folders))
    return lambda name: name in names


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _turn(name: str) -> int:
    """When a file goes up: payload, then cards, then the name of the best."""
    path = PurePosixPath(name)
    if name == f"{CHECKPOINTS}best.json":
        return 2
    return int(path.name == "card.json" and name.startswith(CHECKPOINTS) and len(path.parts) == 3)


def _card_of(name: str) -> str | None:
    parts = PurePosixPath(name).parts
    return f"{CHECKPOINTS}{parts[1]}/card.json" if name.startswith(CHECKPOINTS) and len(parts) > 2 else None


def _iteration(card: str) -> int:
    number = PurePosixPath(card).parts[1].removeprefix("iteration_")
    return int(number) if number.isdigit() else -1
