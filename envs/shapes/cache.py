"""Sampled meshes on disk, so that they are sampled once: whoever comes second waits, nothing is left half done.

key = digest(path, size and time of every file, what was asked of them, VERSION)

A file that changed, came or went is another key; the old clouds stay until someone deletes them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa

from envs.shapes.data import Shapes, Skipped
from envs.shapes.meshes import Mesh

VERSION = 2  # of how meshes are sampled: raise it when the same files give other points
ABOUT = b"rayft"  # what the table says besides its columns

logger = logging.getLogger(__name__)


def default_folder() -> Path:
    """``$RAYFT_DATA``, or ~/.cache/rayft."""
    return Path(os.environ.get("RAYFT_DATA") or "~/.cache/rayft").expanduser()


def key(files: Sequence[Mesh], *asked: object) -> str:
    """What clouds of these files go by."""
    found = hashlib.blake2b(repr((VERSION, asked)).encode(), digest_size=12)
    for file in files:
        status = file.path.stat()
        found.update(repr((os.fspath(file.path), file.kind, status.st_size, status.st_mtime_ns)).encode())
    return found.hexdigest()


def cached(path: Path, build: Callable[[], tuple[Shapes, Skipped]]) -> tuple[Shapes, Skipped]:
    """What is in ``path``; where that is nothing, or damaged, ``build`` is called by one process of this machine."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if (found := _whole(path)) is not None:
            return found
        with _alone(path):
            for left in path.parent.glob(f".{path.name}.*.tmp"):  # by a process that was killed
                left.unlink(missing_ok=True)
            if (found := _whole(path, tell=True)) is not None:
                return found
            built = build()
            save(path, *built)
            logger.info("%d clouds are kept in %s; delete it to sample their meshes again", len(built[0]), path)
            return built
    except OSError as error:
        raise ValueError(
            f"cannot keep data in {path.parent} ({error.strerror or error}); set RAYFT_DATA to a folder that you can "
            "write"
        ) from None


def save(path: Path, shapes: Shapes, skipped: Skipped) -> None:
    """As an Arrow file, in one piece or not at all."""
    size = shapes.points.shape[1]
    about = {"num_points": size, "classes": shapes.classes, "groups": shapes.groups, "skipped": asdict(skipped)}
    columns = {
        "name": pa.array(shapes.name, pa.string()),
        "label": pa.array(shapes.label, pa.int64()),
        "points": pa.FixedSizeListArray.from_arrays(pa.array(shapes.points.reshape(-1)), 3 * size),
    }
    batch = pa.record_batch(columns).replace_schema_metadata({ABOUT: json.dumps(about).encode()})
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            with pa.ipc.new_file(file, batch.schema) as writer:
                writer.write_batch(batch)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load(path: Path) -> tuple[Shapes, Skipped]:
    """What ``save`` wrote; the points stay on disk until they are used."""
    with pa.memory_map(str(path)) as mapped, pa.ipc.open_file(mapped) as reader:
        batch = reader.get_batch(0)
        batch.validate(full=True)
        about = json.loads(reader.schema.metadata[ABOUT])
    points = batch.column("points").flatten().to_numpy().reshape(len(batch), about["num_points"], 3)
    label, name = batch.column("label").to_numpy(), batch.column("name").to_numpy(zero_copy_only=False)
    shapes = Shapes(points, label, tuple(about["classes"]), name, tuple(about["groups"]))
    return shapes, Skipped(**about["skipped"])


def _whole(path: Path, tell: bool = False) -> tuple[Shapes, Skipped] | None:
    if not path.is_file():
        return None
    try:
        return load(path)
    except (OSError, KeyError, ValueError, TypeError, pa.ArrowException) as error:
        if tell:
            logger.warning("%s is damaged (%s); it is made again", path, error)
        return None


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """The only process with this file; freed by the death of whoever holds it."""
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("another process is making %s; waiting for it", path)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
