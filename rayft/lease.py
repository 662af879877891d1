"""Alone with a name on a storage: by the kernel's lock on a disk, by marks among machines that share nothing else.

    nobody's mark there  ->  mark it  ->  still nobody else's: ours;  else take ours away, wait, again

A listing shows every write that is finished, so of two that mark it the later one sees the other: no two find
themselves alone. A mark is renewed while its owner lives and is taken away once it is not. Where an owner was merely
slow, two make the same shard: that costs calls, never a wrong byte.
"""

from __future__ import annotations

import contextlib
import fcntl
import random
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from rayft.storage import Place, is_uri, patiently

RENEW, STALE = 5.0, 30.0  # seconds between two renewals, and without one until a mark counts as left behind
POLL = 1.0  # seconds between two looks, on average

Seen = dict[str, tuple[object, float]]  # mark -> (how it was found, since when by this machine's clock)


@contextlib.contextmanager
def alone(there: Place, name: str) -> Iterator[None]:
    """Waits for its turn. At a plain path the lock is freed by the death of whoever holds it."""
    if is_uri(there.uri):
        with lease(there, name):
            yield
        return
    Path(there.root).mkdir(parents=True, exist_ok=True)
    with (Path(there.root) / f".{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def lease(there: Place, name: str) -> Iterator[None]:
    """Waits for its turn; freed at the end of the block, or some time after the death of whoever holds it."""
    marks, own = there.child(f"claims/{name}"), uuid.uuid4().hex
    pause, seen = random.Random(own), {}
    while True:
        if not _others(marks, own, seen):
            patiently(lambda: marks.write(own, b""))
            if not _others(marks, own, seen):
                break
            patiently(lambda: marks.delete(own))
        time.sleep(POLL * pause.uniform(0.5, 1.5))
    done = threading.Event()
    renewing = threading.Thread(target=_renew, args=(marks, own, done), daemon=True)
    renewing.start()
    try:
        yield
    finally:
        done.set()
        renewing.join(RENEW)
        with contextlib.suppress(OSError):
            patiently(lambda: marks.delete(own))


def _others(marks: Place, own: str, seen: Seen) -> bool:
    """Whether anybody else's mark is there that is still renewed."""
    names, now = set(patiently(marks.listing)) - {own}, time.monotonic()
    for name in seen.keys() - names:
        del seen[name]
    for name in names:
        stamp = patiently(lambda name=name: marks.changed(name))
        if name not in seen or seen[name][0] != stamp:
            seen[name] = (stamp, now)
        elif now - seen[name][1] > STALE:
            patiently(lambda name=name: marks.delete(name))
            del seen[name]
    return bool(seen)


def _renew(marks: Place, own: str, done: threading.Event) -> None:
    number = 0
    while not done.wait(RENEW):
        number = number % 1000 + 1
        with contextlib.suppress(OSError, pa.ArrowException):  # the next one may come through
            marks.write(own, b"." * number)
