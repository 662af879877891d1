"""One cache for all trials of a sweep and all jobs of a cluster: a named Ray actor holds the file (shelf.py) open.

Without Ray the process holds it itself. A cache never ends a run: what goes wrong after opening is said once.
"""

from __future__ import annotations

import gc
import hashlib
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import ActorDiedError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayft.rewards.away import open_store
from rayft.rewards.shelf import SCHEMA, Entry, Found
from rayft.storage import is_uri

WAIT = 60.0  # seconds for the actor to answer
OUTSTANDING = 8  # puts under way

Packed = tuple[bytes, np.ndarray, dict[int, tuple[str, str]]]  # keys end to end, values, (error, extras) of some


def pack(entries: Mapping[bytes, Entry]) -> Packed:
    """Entries as three objects instead of thousands: pickling them costs a tenth."""
    keys, values = b"".join(entries), np.array([entry.value for entry in entries.values()], dtype=np.float64)
    assert len(keys) == 16 * len(entries), "a key has 16 bytes"
    return keys, values, {i: (e.error, e.extras) for i, e in enumerate(entries.values()) if e.error or e.extras}


def unpack(packed: Packed) -> dict[bytes, Entry]:
    """The entries again."""
    keys, values, notes = packed
    found = {keys[16 * i : 16 * i + 16]: Entry(value) for i, value in enumerate(values.tolist())}
    for i, (error, extras) in notes.items():
        found[keys[16 * i : 16 * i + 16]] = Entry(float(values[i]), error, extras)
    return found


class CacheActor:
    """The one process of a cluster that holds a file open. Every answer comes with what a person should be told."""

    def __init__(self, path: Path | str | None, max_mb: float) -> None:
        self.path, self.max_mb = path, max_mb
        self.store: Any = None
        gc.freeze()  # thousands of entries an answer start full collections; what is imported need not be gone through

    def open(self, max_mb: float) -> str:
        """Why it cannot serve, or nothing. Who opens last says how large the file may be."""
        try:
            self.store = self.store or open_store(self.path, max_mb)
            self.store.max_mb = max_mb
        except ValueError as error:
            return str(error)
        return ""

    def lookup(self, keys: Sequence[bytes]) -> tuple[Packed, str]:
        return pack(self.store.lookup(keys)), self.store.news()

    def put(self, packed: Packed) -> tuple[None, str]:
        self.store.put(unpack(packed))
        return None, self.store.news()

    def stats(self) -> tuple[dict[str, Any], str]:
        return self.store.stats(), self.store.news()

    def send(self) -> tuple[None, str]:
        """To the URI that it is kept at, if it is."""
        self.store.send()
        return None, self.store.news()


class SharedCache:
    """The cache as the one who scores sees it: an actor's where Ray is up, else this process's own.

    ``path`` None or "memory" keeps nothing beyond that actor or process. With ``keep_failures`` a failure that is an
    answer is a hit as well; otherwise such a sample is scored again. A lost actor is replaced, and told again what it
    had not confirmed; if that fails too, the cache is empty from then on.
    """

    def __init__(self, path: str | Path | None, max_mb: float = 1024, keep_failures: bool = False) -> None:
        self.path: Path | str | None = None
        if path is not None and str(path) != "memory":
            self.path = str(path) if is_uri(path) else Path(path).expanduser().resolve()
        self.max_mb, self.keep_failures, self.lost = max_mb, keep_failures, False
        self.lock = threading.RLock()
        self.outstanding: deque[tuple[Any, Packed]] = deque()
        self.store = None if ray.is_initialized() else open_store(self.path, max_mb)
        self.actor: Any = None if self.store else self._reach()

    def lookup(self, keys: Sequence[bytes]) -> dict[bytes, Entry]:
        """The entries that are known. The order of puts and lookups of one client is kept."""
        if self.store:
            with self.lock:
                found = self.store.lookup(keys)
                self._say(self.store.news())
        else:
            found = unpack(self._surely(lambda: self._get(self.actor.lookup.remote(list(keys))), pack({})))
        return {key: entry for key, entry in found.items() if self.keep_failures or not entry.error}

    def put(self, entries: Mapping[bytes, Entry]) -> None:
        """Keeps what lasts, without waiting; ``flush`` says when it is on disk."""
        kept = {k: e for k, e in entries.items() if e.lasting and (self.keep_failures or not e.error)}
        with self.lock:
            if self.store:
                self.store.put(kept)
                self._say(self.store.news())
            elif kept:
                packed = pack(kept)
                self._surely(lambda: self.outstanding.append((self.actor.put.remote(packed), packed)), None)
                self.flush(OUTSTANDING)

    def flush(self, at_most: int = 0) -> None:
        """Waits until every put but ``at_most`` is on disk, or said to have failed."""

        def oldest() -> None:
            self._get(self.outstanding[0][0])
            self.outstanding.popleft()

        with self.lock:
            while len(self.outstanding) > at_most:
                self._surely(oldest, None)

    def stats(self) -> dict[str, Any]:
        """Of all clients together: keys, mb, hits, misses, evicted, fault."""
        if self.store:
            return self.store.stats()
        return self._surely(lambda: self._get(self.actor.stats.remote()), {})

    def close(self) -> None:
        """Lets go. The actor ends with the client that made it; others make another."""
        self.flush()
        if self.store:
            self.store.close()
        elif is_uri(self.path):
            self._surely(lambda: self._get(self.actor.send.remote()), None)
        self.actor, self.lost = None, True

    def _surely(self, ask: Callable[[], Found], otherwise: Found) -> Found:
        """``ask()``; if that fails once more, with a new actor; ``otherwise`` from then on."""
        with self.lock:
            why = ""
            for again in (False, True) if not self.lost else ():
                try:
                    if again:
                        self._renew()
                    return ask()
                except Exception as error:
                    self.lost = again
                    why = (str(error).splitlines() or [type(error).__name__])[0]
            self._say(f"the score cache is lost, samples are scored afresh: {why}" if why else "")
            self.outstanding.clear()
            return otherwise

    def _renew(self) -> None:
        """A new actor, told everything that the old one did not confirm."""
        self.actor = self._reach()
        self.outstanding = deque((self.actor.put.remote(packed), packed) for _, packed in self.outstanding)

    def _reach(self) -> Any:
        """The actor of this file, made where there is none."""
        where = "memory" if self.path is None else hashlib.blake2b(str(self.path).encode(), digest_size=12).hexdigest()
        placed: Any = ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0)(CacheActor).options(
            name=f"rayft-cache-{SCHEMA}-{where}",
            namespace="rayft",
            get_if_exists=True,
            scheduling_strategy=NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True),
        )
        for pause in (0.1, 0.5, 2.0, 5.0):
            actor = placed.remote(self.path, self.max_mb)
            try:
                refused = ray.get(actor.open.remote(self.max_mb), timeout=WAIT)
            except RayActorError as error:
                if isinstance(error, ActorDiedError):
                    ray.kill(actor)  # Ray goes on finding a dead actor by its name until this is said
                time.sleep(pause)
                continue
            if refused:
                raise ValueError(refused)
            return actor
        raise RuntimeError("its actor dies as soon as it is made")

    def _get(self, reference: Any) -> Any:
        value, news = ray.get(reference, timeout=WAIT)
        self._say(news)
        return value

    def _say(self, news: str) -> None:
        if news:
            warnings.warn(news, RuntimeWarning, stacklevel=4)
