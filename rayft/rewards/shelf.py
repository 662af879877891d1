"""Scores that are known already: one SQLite file for every trial of a sweep and for later runs.

    key = digest(sample, reward, version, arguments)  ->  what the reward said

Rows are numbered by their last use, so the low end of the table is what goes first when the file is full. A hit on the
older half is noted in memory and renumbered with the next write: reading never writes.

A cache never ends a run. Only opening a file that cannot serve is an error; what goes wrong later is said once.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

Found = TypeVar("Found")

SCHEMA, APPLICATION = 1, 0x72617966
BUSY = 10.0  # seconds to wait for another process that writes
KEYS_A_QUERY = 900  # SQLite takes 999 variables wherever it is built
NOTED_HITS, UNSAVED = 200_000, 200_000  # rows held in memory at most
RETRY = 60.0  # seconds before a disk that refused is tried again
CHECKED_MB = 64  # files up to here are read through when they are opened
ANSWERS = ("returned",)  # failures that would be the same again; an exception, a timeout or a crash need not be


class Entry(NamedTuple):
    """What a reward said about one sample: a number, or NaN with the reason."""

    value: float
    error: str = ""  # "kind: detail"
    extras: str = ""  # JSON text of a dict, as the reward's own logged numbers

    @property
    def lasting(self) -> bool:
        """Whether asking again would give the same: a number, or a failure that is an answer."""
        return self.value == self.value if not self.error else self.error.partition(":")[0] in ANSWERS


class Store:
    """One SQLite file (``path`` None: memory), shared with other processes that open it. Used by one thread at a time.

    A process killed at any moment loses at most the batch in flight; after a power cut the last few may be missing.
    """

    def __init__(self, path: Path | None, max_mb: float = 1024) -> None:
        self.path, self.max_mb = path, max_mb
        self.hits = self.misses = self.evicted = 0
        self.noted: set[int] = set()  # numbers of old rows that were asked for
        self.unsaved: dict[bytes, Entry] = {}  # what the disk refused
        self.fault, self.retry_at, self.told = "", 0.0, False
        self.connection = open_file(path)

    def lookup(self, keys: Sequence[bytes]) -> dict[bytes, Entry]:
        """The entries that are known."""
        wanted = set(keys)
        found = {key: self.unsaved[key] for key in wanted & self.unsaved.keys()}
        try:
            low, high = self._numbers()
            half = (low + high) // 2
            for number, key, value, error, extras in self._rows(sorted(wanted)):
                found[key] = Entry(float("nan") if value is None else value, error or "", extras or "")
                if number < half and len(self.noted) < NOTED_HITS:
                    self.noted.add(number)
        except sqlite3.Error as error:
            self._refused(error)
        self.hits += len(found)
        self.misses += len(wanted) - len(found)
        return found

    def put(self, entries: Mapping[bytes, Entry]) -> None:
        """Keeps those that last, in one transaction; in memory where the disk refuses them."""
        lasting = {key: entry for key, entry in entries.items() if entry.lasting}
        self.unsaved = {**self.unsaved, **lasting} if self.unsaved else lasting
        if self.unsaved and time.monotonic() >= self.retry_at:
            try:
                self._write(self.unsaved)
                self.unsaved, self.fault = {}, ""
            except sqlite3.Error as error:
                self._refused(error)
        if len(self.unsaved) > UNSAVED:
            self.unsaved = dict(islice(self.unsaved.items(), len(self.unsaved) - UNSAVED, None))

    def news(self) -> str:
        """What a person should be told, the first time it is asked for after it went wrong."""
        told, self.told = self.told, self.told or bool(self.fault)
        return "" if told else self.fault

    def stats(self) -> dict[str, Any]:
        """Numbers for a person; counting the keys reads the whole index."""
        keys, mb = len(self.unsaved), 0.0
        try:
            keys, mb = keys + self.connection.execute("SELECT count(*) FROM entries").fetchone()[0], self._used_mb()
        except sqlite3.Error as error:
            self._refused(error)
        told = {"hits": self.hits, "misses": self.misses, "evicted": self.evicted, "fault": self.fault}
        return {"keys": keys, "mb": mb, **told}

    def send(self) -> None:
        """To where others read it; a file here is there already."""

    def close(self) -> None:
        """Writes down what was used, and lets go of the file."""
        with contextlib.suppress(sqlite3.Error):
            if self.noted or self.unsaved:
                self._write(self.unsaved)
        self.connection.close()

    def _rows(self, keys: list[bytes]) -> Iterator[tuple[int, bytes, float | None, str | None, str | None]]:
        for start in range(0, len(keys), KEYS_A_QUERY):
            some = keys[start : start + KEYS_A_QUERY]
            query = f"SELECT number, key, value, error, extras FROM entries WHERE key IN ({','.join('?' * len(some))})"
            yield from self.connection.execute(query, some)

    def _write(self, entries: Mapping[bytes, Entry]) -> None:
        rows = [(key, float(e.value), e.error or None, e.extras or None) for key, e in entries.items()]
        with transaction(self.connection) as run:
            top = self._numbers()[1] + 1
            moves = zip(range(top, top + len(self.noted)), sorted(self.noted), strict=True)
            run.executemany("UPDATE entries SET number = ? WHERE number = ?", moves)
            run.executemany("INSERT OR REPLACE INTO entries (key, value, error, extras) VALUES (?, ?, ?, ?)", rows)
            evicted = self._evict()
        self.noted.clear()
        self.evicted += evicted
        if evicted and self._used_mb("page_count") > 1.25 * self.max_mb:
            self.connection.executescript("PRAGMA incremental_vacuum(4000)")  # execute would free a single page

    def _evict(self) -> int:
        """Deletes from the low end until the pages in use are within the limit. A lowered limit is reached slowly."""
        gone = 0
        while self._used_mb() > self.max_mb:
            low, high = self._numbers()
            some = low + min((high - low) // 50, 10_000)  # a fraction of a second
            deleted = self.connection.execute("DELETE FROM entries WHERE number <= ?", (some,))
            if not deleted.rowcount:
                break
            gone += deleted.rowcount
        return gone

    def _numbers(self) -> tuple[int, int]:
        ends = "SELECT (SELECT min(number) FROM entries), (SELECT max(number) FROM entries)"
        low, high = self.connection.execute(ends).fetchone()
        return low or 0, high or 0

    def _used_mb(self, pages: str = "page_count - freelist_count") -> float:
        query = f"SELECT ({pages}) * page_size FROM pragma_page_count, pragma_freelist_count, pragma_page_size"
        return self.connection.execute(query).fetchone()[0] / 1e6

    def _refused(self, error: sqlite3.Error) -> None:
        self.retry_at = time.monotonic() + RETRY
        what = "free disk space, or move a damaged file away; the run goes on"
        self.fault = f"the score cache {self.path or 'in memory'} is of no use for the moment ({error}): {what}"


# -- the file


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection, begin: str = "BEGIN IMMEDIATE") -> Iterator[sqlite3.Connection]:
    """All or nothing."""
    connection.execute(begin)
    try:
        yield connection
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # a full disk has rolled back already
            connection.execute("ROLLBACK")
        raise


def open_file(path: Path | None) -> sqlite3.Connection:
    """The database, made where there is none. A ``ValueError`` says why a file cannot serve; it stays as it was."""
    try:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path or ":memory:", timeout=BUSY, isolation_level=None, check_same_thread=False)
        try:
            _patiently(lambda: _prepare(connection, path))
        except BaseException:
            connection.close()
            raise
    except (sqlite3.Error, OSError, ValueError) as error:
        raise ValueError(f"the score cache {path} cannot be used: {error}; {remedy(error)}") from error
    return connection


def remedy(error: Exception) -> str:
    """What to do about a file that cannot be opened."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if isinstance(error, ValueError):
        return "name another file as scoring.cache"
    if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return (
            "it is damaged, or no cache: move it away for a new one to be made, or name another file as scoring.cache"
        )
    if isinstance(error, OSError) or code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
        return "name a file in a folder that you may write to as scoring.cache"
    return "a program holds it, or it is on a network disk without locks: name a local file as scoring.cache"


def _prepare(connection: sqlite3.Connection, path: Path | None) -> None:
    def ask(query: str) -> Any:
        return (connection.execute(query).fetchone() or (None,))[0]

    with transaction(connection, "BEGIN"):  # so that nobody makes the table in between
        mark, schema = ask("PRAGMA application_id"), ask("PRAGMA user_version")
        if mark != APPLICATION and (mark or schema or ask("SELECT count(*) FROM sqlite_master")):
            raise ValueError("it is the database of another program")
        if schema > SCHEMA:
            raise ValueError(f"a newer rayft wrote it (format {schema}, this one reads up to {SCHEMA}): upgrade rayft")
    if not mark:
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # heeded only while there is no table
    if (mode := ask("PRAGMA journal_mode = WAL")) not in ("wal", "memory"):
        raise ValueError(f"its disk (a network disk?) keeps no write-ahead log, only {mode!r}")
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA cache_size = -65536")  # KiB
    connection.execute(f"PRAGMA journal_size_limit = {64 << 20}")
    with transaction(connection) as run:  # refused where the file may only be read
        if not mark:
            run.execute(
                "CREATE TABLE IF NOT EXISTS entries"
                " (number INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, value REAL, error TEXT, extras TEXT)"
            )
            run.execute(f"PRAGMA application_id = {APPLICATION}")
            run.execute(f"PRAGMA user_version = {SCHEMA}")
    if path is not None and path.stat().st_size < CHECKED_MB * 1e6 and ask("PRAGMA quick_check(1)") != "ok":
        raise ValueError("it is damaged: move it away for a new one to be made")


def _patiently(attempt: Callable[[], None]) -> None:
    """Repeats while another process opens the same file: the switch to a write-ahead log does not wait for locks."""
    deadline = time.monotonic() + BUSY
    while True:
        try:
            return attempt()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.02)
