"""Data sets on disk that are made once: whoever comes second waits, whoever is killed leaves nothing half done."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from envs.molecules.data import Molecules, load

logger = logging.getLogger(__name__)


def default_folder() -> Path:
    """``$RAYFT_DATA``, or ~/.cache/rayft."""
    return Path(os.environ.get("RAYFT_DATA") or "~/.cache/rayft").expanduser()


def cached(path: Path, build: Callable[[], Molecules]) -> Molecules:
    """The molecules in ``path``; where there is no such file, ``build`` is called by one process of this machine."""
    once(path, lambda: build().save(path))
    return load(path)


def once(path: Path, make: Callable[[], None]) -> None:
    """Where there is no ``path``, ``make`` is called by one process of this machine."""
    if path.is_file():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            for left in path.parent.glob(f".{path.name}.*.tmp"):  # by a process that was killed
                left.unlink(missing_ok=True)
            if not path.is_file():
                make()
    except OSError as error:
        raise ValueError(
            f"cannot keep data in {path.parent} ({error.strerror or error}); set RAYFT_DATA to a folder that you "
            "can write"
        ) from None


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
