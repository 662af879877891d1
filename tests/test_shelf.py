"""The file of scores keeps what was confirmed, through kills and full disks, and says why it cannot serve."""

from __future__ import annotations

import math
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from rayft.rewards.shelf import Entry, Store

NAN = float("nan")


def keys(start, stop):
    return [number.to_bytes(16, "big") for number in range(start, stop)]


def numbers(start, stop):
    """Entries whose value is their number."""
    return {key: Entry(float(number)) for number, key in zip(range(start, stop), keys(start, stop), strict=True)}


def python(code, *arguments, **more):
    """A process that runs ``code``."""
    told = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(told, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


def finish(process):
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "scores.db"


# -- one file


@pytest.mark.parametrize("where", ["file", "memory"])
def test_what_was_put_is_found_again(path, where):
    store = Store(path if where == "file" else None)
    store.put({b"a" * 16: Entry(0.1, extras='{"size": 3}'), b"b" * 16: Entry(-math.pi)})
    store.put({b"b" * 16: Entry(2.0)})
    found = store.lookup([b"a" * 16, b"b" * 16, b"c" * 16, b"a" * 16])
    assert found == {b"a" * 16: Entry(0.1, "", '{"size": 3}'), b"b" * 16: Entry(2.0)}
    assert store.stats() | {"mb": 0} == {"keys": 2, "mb": 0, "hits": 2, "misses": 1, "evicted": 0, "fault": ""}
    assert store.lookup([]) == {}
    store.close()


@pytest.mark.parametrize(
    ("reason", "kept"),
    [
        ("returned: None", True),
        ("raised: ValueError: bad ring", False),
        ("timed out: no answer for 1 s", False),
        ("crashed: signal 11", False),
        ("lost: the actor died", False),
        ("", False),
    ],
)
def test_only_failures_that_are_an_answer_are_kept(path, reason, kept):
    for store in (Store(path), Store(path)):  # the second reads what the first wrote
        store.put({b"a" * 16: Entry(NAN, reason)})
        found = store.lookup([b"a" * 16])
        assert len(found) == kept
        assert not kept or (math.isnan(found[b"a" * 16].value) and found[b"a" * 16].error == reason)


def test_reading_writes_nothing(path):
    store = Store(path)
    store.put(numbers(0, 5000))

    def state():
        return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(path.parent.glob("*-wal"))]

    before = state()
    for _ in range(3):
        assert len(store.lookup(keys(0, 6000))) == 5000
    assert before and state() == before


def test_a_full_file_forgets_what_was_not_asked_for_longest(path):
    store = Store(path, max_mb=1)
    for start in range(0, 60_000, 500):
        store.put(numbers(start, start + 500))
        assert store._used_mb() <= 1
        if start >= 1000:
            assert store.lookup(keys(0, 200)) == numbers(0, 200), "in use all the time"
    assert not store.lookup(keys(1000, 5000))
    assert store.lookup(keys(55_000, 60_000)) == numbers(55_000, 60_000)
    told = store.stats()
    assert told["keys"] + told["evicted"] == 60_000
    assert told["keys"] > 10_000
    store.close()
    assert path.stat().st_size < 1.25e6


def test_a_file_shrinks_to_a_lowered_limit(path):
    store = Store(path)
    store.put(numbers(0, 100_000))
    store.close()
    assert path.stat().st_size > 5e6
    store = Store(path, max_mb=1)
    for start in range(100_000, 102_000, 500):
        store.put(numbers(start, start + 500))
    store.close()
    assert path.stat().st_size < 1.3e6
    assert Store(path).lookup(keys(99_000, 102_000)) == numbers(99_000, 102_000)


WRITER = """
import sys
from pathlib import Path
from rayft.rewards.shelf import Entry, Store
store, number = Store(Path(sys.argv[1])), int(sys.argv[2])
print("open", flush=True)
while True:
    store.put({n.to_bytes(16, "big"): Entry(float(n)) for n in range(number, number + 200)})
    number += 200
    print(number, flush=True)
"""


def test_kill_9_loses_at_most_the_batch_in_flight(path):
    random.seed(0)
    confirmed = 0
    for _ in range(4):
        process = python(WRITER, path, confirmed)
        assert process.stdout.readline() == "open\n"
        time.sleep(random.uniform(0.0, 0.1))
        process.kill()
        said = [line for line in process.communicate()[0].splitlines(keepends=True) if line.endswith("\n")]
        assert process.returncode == -signal.SIGKILL
        confirmed = max(confirmed, *(int(line) for line in said), 0)
        store = Store(path)
        assert store.lookup(keys(0, confirmed)) == numbers(0, confirmed)
        assert len(store.lookup(keys(confirmed, confirmed + 400))) in (0, 200), "a batch is there whole or not at all"
        store.close()
    assert confirmed > 1000


MANY = """
import sys
from pathlib import Path
from rayft.rewards.shelf import Entry, Store
print("ready", flush=True)
sys.stdin.readline()
store, first = Store(Path(sys.argv[1])), int(sys.argv[2])
for start in range(first, first + 1000, 20):
    store.put({n.to_bytes(16, "big"): Entry(float(n)) for n in range(start, start + 20)})
    assert len(store.lookup([n.to_bytes(16, "big") for n in range(first, start + 20)])) == start + 20 - first
assert not store.fault, store.fault
store.close()
"""


def test_processes_that_open_one_file_at_the_same_moment_all_work(path):
    started = [python(MANY, path, 1000 * i, stdin=subprocess.PIPE) for i in range(4)]
    for process in started:
        assert process.stdout.readline() == "ready\n"
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in started:
        finish(process)
    assert Store(path).lookup(keys(0, 4000)) == numbers(0, 4000)


# -- files that cannot serve


def filled(path):
    store = Store(path)
    store.put(numbers(0, 20_000))
    store.close()


def overwritten(path, start, what):
    filled(path)
    with path.open("r+b") as file:
        file.seek(start)
        file.write(what)


def foreign(path):
    path.parent.mkdir()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE bank (account, money)")
    connection.close()


def newer(path):
    filled(path)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 7")
    connection.close()


def held(path):
    filled(path)
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    connection.execute("BEGIN EXCLUSIVE")
    return connection


BROKEN = {
    "no database": (lambda p: (p.parent.mkdir(), p.write_text("scores\n" * 1000)), "move it away"),
    "damaged header": (lambda p: overwritten(p, 0, os.urandom(4096)), "move it away"),
    "damaged pages": (lambda p: overwritten(p, 8192, b"\xff" * 200_000), "damaged: move it away"),
    "cut off": (lambda p: (filled(p), os.truncate(p, 500_000)), "move it away"),
    "of another program": (foreign, "database of another program; name another file"),
    "of a newer rayft": (newer, r"newer rayft wrote it \(format 7, this one reads up to 1\): upgrade rayft"),
    "a folder": (lambda p: p.mkdir(parents=True), "folder that you may write to"),
    "below a file": (lambda p: p.parent.write_text(""), "folder that you may write to"),
    "held by another program": (held, "a program holds it, or it is on a network disk"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_file_that_cannot_serve_is_refused_in_a_sentence_and_left_alone(path, what, monkeypatch):
    monkeypatch.setattr("rayft.rewards.shelf.BUSY", 0.3)
    make, said = BROKEN[what]
    kept = make(path)
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(ValueError, match=said) as caught:
        Store(path)
    assert str(path) in str(caught.value) and "scoring.cache" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not path.is_file() or path.read_bytes() == before
    del kept


FULL = """
import resource, sys
from pathlib import Path
from rayft.rewards.shelf import Entry, Store
def some(start): return {n.to_bytes(16, "big"): Entry(float(n)) for n in range(start, start + 1000)}
store, said = Store(Path(sys.argv[1])), []
store.put(some(0))
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # what a disk without space does
for start in range(1000, 20_000, 1000):
    store.put(some(start))
    store.retry_at = 0.0
    said.append(store.news())
assert store.unsaved and [s for s in said if s] == [s for s in said if "free disk space" in s][:1], said
for start in range(0, 20_000, 1000):
    assert store.lookup(list(some(start))) == some(start), "what the disk refuses is held in memory"
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
store.put(some(20_000))
assert not store.unsaved and not store.fault, store.fault
store.close()
"""


def test_a_full_disk_is_said_once_and_made_up_for_when_there_is_space(path):
    finish(python(FULL, path))
    assert Store(path).lookup(keys(0, 21_000)) == numbers(0, 21_000)


def test_a_file_damaged_while_it_is_open_costs_hits_and_one_sentence(path):
    store = Store(path)
    store.put(numbers(0, 50_000))
    store.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    store.connection.execute("PRAGMA cache_size = 10")
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (path.stat().st_size - 4096))
    store.lookup(keys(0, 50_000))
    store.put(numbers(50_000, 50_100))
    assert "move a damaged file away" in store.news()
    assert store.lookup(keys(50_000, 50_100)) == numbers(50_000, 50_100)
    assert store.news() == ""
    store.stats()
    store.close()
