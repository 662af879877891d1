"""A score cache at a URI: this machine works on a copy, and sends it back with what others sent meanwhile.

    open: fetch -> ours          send: theirs since -> into ours -> a snapshot of ours -> there

Two that send at the same moment lose the one's new scores until its next time: that costs calls and nothing else.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa

from rayft import storage
from rayft.rewards.shelf import APPLICATION, Entry, Store, transaction

EVERY = 300.0  # seconds between two sends; the last is at the end


class AwayStore(Store):
    """A ``Store`` whose file lies at a URI."""

    def __init__(self, uri: str, max_mb: float = 1024) -> None:
        there = storage.ready(storage.place(uri, "scoring.cache").parent().uri, "scoring.cache")
        self.there, self.name = there, storage.place(uri).name
        self.copy = storage.cache_folder(uri)
        self.seen: bytes | None = None  # mark of what lay there when it was last taken over
        self.changed, self.send_at = False, time.monotonic() + EVERY
        super().__init__(self.copy, max_mb)
        try:
            self.take_over()
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"the score cache {uri} cannot be fetched ({storage.plainly(error)})") from None

    def put(self, entries: Mapping[bytes, Entry]) -> None:
        super().put(entries)
        self.changed = True
        if time.monotonic() >= self.send_at:
            self.send()

    def send(self) -> None:
        """Ours there, with what others have sent since the last time; a failure is told, and made up for later."""
        if not self.changed:
            return
        snapshot = self.copy.with_name(f".{self.copy.name}.sent")
        try:
            self.take_over()
            snapshot.unlink(missing_ok=True)
            with contextlib.closing(sqlite3.connect(snapshot)) as target:
                self.connection.backup(target)
            storage.patiently(lambda: self.there.put(snapshot, self.name))
            mark = uuid.uuid4().hex.encode()
            storage.patiently(lambda: self.there.write(f"{self.name}.mark", mark))
            self.seen, self.changed = mark, False
        except (OSError, pa.ArrowException, sqlite3.Error) as error:
            self.fault = f"the score cache could not be sent to {self.there.uri} ({storage.plainly(error)})"
        finally:
            self.send_at = time.monotonic() + EVERY
            snapshot.unlink(missing_ok=True)

    def take_over(self) -> None:
        """Into ours what others have there and we have not."""
        now = storage.patiently(lambda: self.there.read(f"{self.name}.mark"))  # times there may be whole seconds
        if (now is not None and now == self.seen) or not storage.patiently(lambda: self.there.has(self.name)):
            return
        fetched = self.copy.with_name(f".{self.copy.name}.fetched")
        storage.patiently(lambda: self.there.get(self.name, fetched))
        try:
            self._merge(fetched)
            self.seen = now
        finally:
            for path in fetched.parent.glob(f"{fetched.name}*"):
                path.unlink(missing_ok=True)

    def close(self) -> None:
        with contextlib.suppress(sqlite3.Error):
            if self.noted or self.unsaved:
                self._write(self.unsaved)
                self.unsaved = {}
        self.send()
        super().close()

    def _merge(self, fetched: Path) -> None:
        try:
            with contextlib.closing(sqlite3.connect(fetched)) as theirs:
                if theirs.execute("PRAGMA application_id").fetchone()[0] != APPLICATION:
                    raise ValueError(f"{self.there.uri} holds no score cache named {self.name}; name another file")
                rows = theirs.execute("SELECT key, value, error, extras FROM entries ORDER BY number").fetchall()
        except sqlite3.DatabaseError as error:
            what = f"{self.name} at {self.there.uri} is damaged, or no cache: name another file"
            raise ValueError(f"{what} ({error})") from None
        with transaction(self.connection) as run:
            run.executemany("INSERT OR IGNORE INTO entries (key, value, error, extras) VALUES (?, ?, ?, ?)", rows)


def open_store(place: Path | str | None, max_mb: float) -> Store:
    """The store of a path, of a URI, or in memory."""
    if place is None or not storage.is_uri(place):
        return Store(None if place is None else Path(place), max_mb)
    return AwayStore(str(place), max_mb)
