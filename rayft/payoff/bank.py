"""The bank: shards of pay-off draws on disk, each made once, read by memory map, larger than memory if need be.

    FOLDER/  manifest.json  shard_000000.arrow  shard_000001.arrow ...

A bank at a URI has such a folder on every machine that reads it: a shard is fetched when it is asked for, and sent when
it was made.

Shard n is a function of the manifest and n alone, so whoever needs one that is missing makes it (under a lock, so that
nobody else does), and one whose writer was killed is made again. It holds the seed of its noise rather than the noise.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rayft.lease import lease
from rayft.storage import Place, cache_folder, is_uri, patiently, plainly, ready

FORMAT = 1
CONTEXT, PART = "context/", "part/"


@dataclass(frozen=True)
class Shard:
    """Pairs with their candidates; arrays are [row, ...]."""

    number: int
    seed: int  # of the forward noise
    x_0: np.ndarray
    t: np.ndarray
    eps_star: np.ndarray  # [row, cand, *event]
    rewards: np.ndarray  # [row, cand] float64, NaN = failed
    mean_ref: np.ndarray  # mu_pre(x_t, t)
    start: np.ndarray | None = None  # [row, cand] rewards of uniform draws, where a search began with some
    context: dict[str, np.ndarray] = field(default_factory=dict)
    parts: dict[str, np.ndarray] = field(default_factory=dict)  # component -> [row, cand]
    num_calls: int = 0  # that making it cost

    @property
    def num_pairs(self) -> int:
        return len(self.t)


def save(shard: Shard, path: Path) -> None:
    """In one piece, or not at all."""
    columns = {"x_0": shard.x_0, "t": shard.t, "eps_star": shard.eps_star, "rewards": shard.rewards}
    columns |= {"mean_ref": shard.mean_ref, **({} if shard.start is None else {"start": shard.start})}
    columns |= {CONTEXT + k: v for k, v in shard.context.items()} | {PART + k: v for k, v in shard.parts.items()}
    shapes = {name: [str(column.dtype), *column.shape[1:]] for name, column in columns.items()}
    told = {"format": FORMAT, "number": shard.number, "seed": shard.seed, "calls": shard.num_calls, "shapes": shapes}
    batch = pa.record_batch({name: _packed(column) for name, column in columns.items()})
    schema = batch.schema.with_metadata({"rayft": json.dumps(told)})
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            with pa.ipc.new_file(file, schema) as writer:
                writer.write_batch(batch.replace_schema_metadata(schema.metadata))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ValueError(
            f"{path} could not be written ({error.strerror or error}); the shards before it are whole: free some space "
            "and start again, or choose another folder with training.bank"
        ) from None


def load(path: Path) -> Shard:
    """Its arrays are views of the mapped file: nothing is read before it is looked at."""
    try:
        batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        told = json.loads((batch.schema.metadata or {})[b"rayft"])
    except (pa.ArrowInvalid, KeyError, ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged ({str(error).splitlines()[0]}); delete it, it is made again") from None
    columns = {name: _unpacked(batch.column(name), *shape) for name, shape in told["shapes"].items()}
    named = {k: v for k, v in columns.items() if not k.startswith((CONTEXT, PART))}
    context = {k.removeprefix(CONTEXT): v for k, v in columns.items() if k.startswith(CONTEXT)}
    parts = {k.removeprefix(PART): v for k, v in columns.items() if k.startswith(PART)}
    return Shard(told["number"], told["seed"], **named, context=context, parts=parts, num_calls=told["calls"])


def _packed(column: np.ndarray) -> pa.Array:
    """Rows of one list each, so that an array of any shape is read back without a copy."""
    plain = np.ascontiguousarray(column)
    plain = plain.view(np.uint8) if plain.dtype == bool else plain
    width = int(np.prod(plain.shape[1:], dtype=int))
    return pa.FixedSizeListArray.from_arrays(pa.array(plain.ravel()), width)


def _unpacked(column: Any, dtype: str, *shape: int) -> np.ndarray:
    values = column.flatten().to_numpy(zero_copy_only=True)
    return values.view(dtype).reshape(len(column), *shape)


@dataclass(frozen=True)
class Bank:
    """A folder of shards of one manifest. ``open_bank`` gives it."""

    folder: Path
    manifest: dict[str, Any]
    there: Place | None = None  # where all machines have it from
    unsent: set[int] = field(default_factory=set)  # shards that did not get there

    @property
    def shard_pairs(self) -> int:
        """Pairs in each shard."""
        return int(self.manifest["shard_pairs"])

    @cached_property
    def numbers(self) -> list[int]:
        """Shards that were there when this was first asked."""
        here = [path.name for path in self.folder.glob("shard_*.arrow")]
        away = [] if self.there is None else [n for n in patiently(self.there.listing) if n.startswith("shard_")]
        return sorted({int(Path(name).stem.removeprefix("shard_")) for name in (*here, *away)})

    def path(self, number: int) -> Path:
        return self.folder / f"shard_{number:06d}.arrow"

    def has(self, number: int) -> bool:
        there, path = self.there, self.path(number)
        return path.is_file() or (there is not None and patiently(lambda: there.has(path.name)))

    def read(self, number: int) -> Shard:
        there, path = self.there, self.path(number)
        if there is not None and not path.is_file():
            patiently(lambda: there.get(path.name, path))
        return load(path)

    def write(self, shard: Shard) -> None:
        """Here, and then there: what cannot be sent is told and goes with the next one."""
        save(shard, self.path(shard.number))
        there = self.there
        if there is None:
            return
        self.unsent.add(shard.number)
        try:
            for number in sorted(self.unsent):
                path = self.path(number)
                patiently(lambda path=path: there.put(path, path.name))
                self.unsent.discard(number)
        except (OSError, pa.ArrowException) as error:
            warnings.warn(
                f"{len(self.unsent)} shards of the bank {there.uri} lie on this machine alone ({plainly(error)}); "
                "they are sent with the next one",
                RuntimeWarning,
                stacklevel=2,
            )

    @contextlib.contextmanager
    def claim(self, number: int) -> Iterator[None]:
        """Alone with this shard, among all processes of this machine, and all machines where the bank is at a URI.

        Freed by the death of whoever holds it.
        """
        with (self.folder / f".shard_{number:06d}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if self.there is None or self.has(number):
                yield
                return
            with lease(self.there, f"shard_{number:06d}"):
                yield


def open_bank(place: str | Path, manifest: Mapping[str, Any]) -> Bank:
    """The bank in a folder, or at a URI, begun where there is none. Refuses one made for something else."""
    if isinstance(place, str) and is_uri(place):
        return _open_away(ready(place, "training.bank"), manifest)
    return _open_here(Path(place), manifest)


def _open_away(there: Place, manifest: Mapping[str, Any]) -> Bank:
    """This machine's part of the bank at a URI: of another bank that was there before, nothing is kept."""
    folder = cache_folder(there.uri)
    try:
        with lease(there, "manifest"):
            found = there.read("manifest.json")
            if found is None:
                if any(name.startswith("shard_") for name in there.listing()):
                    raise ValueError(f"{there.uri} has shards and no manifest.json; choose another with training.bank")
                found = json.dumps(json.loads(json.dumps({"format": FORMAT, **manifest})), indent=1).encode()
                there.write("manifest.json", found)
        if not (folder / "manifest.json").is_file() or (folder / "manifest.json").read_bytes() != found:
            shutil.rmtree(folder, ignore_errors=True)
            there.get("manifest.json", folder / "manifest.json")
    except (OSError, pa.ArrowException) as error:
        why = f"cannot keep a bank at {there.uri} ({plainly(error)})"
        raise ValueError(f"{why}; choose another with training.bank") from None
    return replace(_open_here(folder, manifest, there.uri), there=there)


def _open_here(folder: Path, manifest: Mapping[str, Any], name: str = "") -> Bank:
    told = json.loads(json.dumps({"format": FORMAT, **manifest}))
    path = folder / "manifest.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".manifest.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.is_file():
                if any(folder.glob("shard_*.arrow")):
                    raise ValueError(f"{folder} has shards and no manifest.json; choose another with training.bank")
                temporary = folder / ".manifest.json.tmp"
                temporary.write_text(json.dumps(told, indent=1))
                temporary.replace(path)
        found = json.loads(path.read_text())
    except OSError as error:
        why = f"cannot keep a bank in {folder} ({error.strerror or error})"
        raise ValueError(f"{why}; choose another folder with training.bank") from None
    except json.JSONDecodeError:
        raise ValueError(f"{path} is damaged; delete the folder, or choose another with training.bank") from None
    for key in told:
        if key != "shard_pairs" and found.get(key) != told[key]:
            raise ValueError(
                f"the bank in {name or folder} was made with {key} {_short(found.get(key))}, and this run has "
                f"{_short(told[key])}: choose another folder with training.bank, or run with what it was made for"
            )
    return Bank(folder, found)


def _short(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= 60 else f"{text[:57]}..."
