"""What tests of rewards share: works, the workers and pools that carry them out, and how to wait for something."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from acts import KINDS

from rayft import imports
from rayft.rewards.isolate import Isolated
from rayft.rewards.pool import RewardPool
from rayft.rewards.settings import Placement
from rayft.rewards.worker import Limits
from rayft.score import Part, Task, Told, Work


def until(holds: Callable[[], Any], seconds: float = 8.0) -> Any:
    """Whether it has come to hold within so many seconds."""
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.02)
    return holds()


def lives(pid: int | str) -> bool:
    """Whether there is such a process, other than a dead one that nobody has asked after."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def num_marked(mark: str) -> int:
    """How many processes have ``mark`` in their environment."""
    found = 0
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            alive = folder.name.isdigit() and lives(folder.name)
            found += alive and mark.encode() in (folder / "environ").read_bytes()
    return found


# -- scoring processes


def told(*rewards: Any, decoder: str | None = None, **arguments: Any) -> Told:
    parts = [
        Part(getattr(r, "__name__", str(i)), imports.portable(r), arguments, str(i)) for i, r in enumerate(rewards)
    ]
    return Told(tuple(parts), decoder)


@contextlib.contextmanager
def isolated(told: Told, **limits: Any) -> Iterator[Isolated]:
    worker = Isolated(told, Limits(**{"timeout": 5.0, "startup": 30.0} | limits))
    try:
        yield worker
    finally:
        worker.stop()


def work(kinds: list[str | None], parts: int = 1, call: int = 0, **more: Any) -> Work:
    """One event of ``acts.Acts`` for each of ``kinds``: None for a good one."""
    codes = [0 if kind is None else KINDS.index(kind) + 1 for kind in kinds]
    rows = np.arange(len(codes))
    events = np.stack([rows + 1.0, np.array(codes, dtype=float)], axis=-1)
    return Work(call, rows + 100, events, {}, tuple(Task(part, rows) for part in range(parts)), **more)


def with_bad(kind: str, bad: tuple[int, ...] = (7, 23), num: int = 40) -> list[str | None]:
    return [kind if row in bad else None for row in range(num)]


def expected(num: int, bad: Any = ()) -> np.ndarray:
    """What ``acts.Acts`` says of those."""
    values = 3.0 * np.arange(1, num + 1) + 1
    values[list(bad)] = np.nan
    return values


# -- pools


def pool_of(*rewards: Any, limits: Limits | None = None, decoder: str | None = None, **placement: Any) -> RewardPool:
    placed = Placement(**{"actors": 2, "num_cpus_per_actor": 0.1, **placement})
    return RewardPool(told(*rewards, decoder=decoder), limits or Limits(), placed)


@contextlib.contextmanager
def opened(*rewards: Any, **more: Any) -> Iterator[RewardPool]:
    """A pool of which all actors are up, stopped at the end."""
    pool = pool_of(*rewards, **more)
    try:
        pool.start()
        assert until(lambda: pool.num_actors == (pool.placement.min_actors or pool.placement.actors), 40)
        yield pool
    finally:
        pool.stop()


def ascending(num: int) -> np.ndarray:
    """Events that are their own numbers."""
    return np.arange(float(num)).reshape(-1, 1)
