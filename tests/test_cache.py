"""One cache for all who score: shared, never losing what was put, and empty rather than in the way."""

from __future__ import annotations

import gc
import os
import random
import signal
import time
import warnings

import pytest
import ray
from pools import lives, until
from test_shelf import NAN, finish, keys, numbers, python

from rayft.rewards.cache import SharedCache
from rayft.rewards.shelf import Entry, Store


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "scores.db"


def test_importing_it_loads_neither_torch_nor_rllib():
    code = "import sys, rayft.rewards.cache; print([m for m in ('torch', 'ray.rllib') if m in sys.modules])"
    assert finish(python(code)) == "[]\n"


def test_without_ray_a_client_has_a_store_of_its_own(path):
    code = """
import ray, sys
from rayft.rewards.cache import SharedCache
from rayft.rewards.shelf import Entry
cache = SharedCache(sys.argv[1])
cache.put({b"a" * 16: Entry(1.0), b"b" * 16: Entry(float("nan"), "returned: None")})
cache.flush()
assert cache.lookup([b"a" * 16, b"b" * 16]) == {b"a" * 16: Entry(1.0)}
assert not ray.is_initialized()
cache.close()
"""
    finish(python(code, path))
    assert Store(path).lookup([b"a" * 16, b"b" * 16]) == {b"a" * 16: Entry(1.0)}


@pytest.fixture
def shared(ray_session):
    """Makes clients, and lets go of them."""
    made = []

    def client(*arguments, **more):
        made.append(SharedCache(*arguments, **more))
        return made[-1]

    yield client
    for one in reversed(made):
        one.close()
    made.clear()
    gc.collect()


# by value: a worker need not import this file
PROCESS = eval("lambda actor: __import__('os').getpid()", {"__name__": "__main__"})  # noqa: S307


def process_of(cache):
    return ray.get(cache.actor.__ray_call__.remote(PROCESS))


def kill_9(cache):
    os.kill(process_of(cache), signal.SIGKILL)


def test_clients_of_one_file_share_one_actor(shared, path):
    first, second = shared(path), shared(path.parent / ".." / path.parent.name / path.name)
    other = shared(path.with_name("other.db"))
    first.put(numbers(0, 100))
    first.flush()
    assert second.lookup(keys(0, 200)) == numbers(0, 100)
    assert other.lookup(keys(0, 200)) == {}
    assert second.stats()["keys"] == 100
    assert first.actor._actor_id == second.actor._actor_id != other.actor._actor_id


def test_a_client_in_another_process_of_the_cluster_shares_it_too(shared, path):
    @ray.remote(num_cpus=0)
    def elsewhere(where, entries):
        cache = SharedCache(where)
        found = cache.lookup(list(entries))
        cache.put({key: Entry(entry.value + 1) for key, entry in entries.items()})
        cache.flush()
        return found, ray.get(cache.actor.__ray_call__.remote(PROCESS))

    cache = shared(path)
    cache.put(numbers(0, 10))
    cache.flush()
    found, pid = ray.get(elsewhere.remote(path, numbers(0, 10)))
    assert found == numbers(0, 10)
    assert pid == process_of(cache)
    assert cache.lookup(keys(0, 10))[keys(3, 4)[0]] == Entry(4.0)


def test_a_client_reads_what_it_put_without_waiting(shared, path):
    cache = shared(path)
    for start in range(0, 2000, 100):
        cache.put(numbers(start, start + 100))
        assert len(cache.outstanding) <= 8
        assert cache.lookup(keys(0, start + 100)) == numbers(0, start + 100)


def test_nothing_put_is_lost_with_a_killed_actor(shared, path):
    cache = shared(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for start in range(0, 3000, 100):
            cache.put(numbers(start, start + 100))
            if start == 500:
                kill_9(cache)
        cache.flush()
        kill_9(cache)
        assert cache.lookup(keys(0, 3100)) == numbers(0, 3000)


def test_clients_outlive_the_one_that_made_the_actor(shared, path):
    maker, other = shared(path), shared(path)
    maker.put(numbers(0, 50))
    pid = process_of(maker)
    maker.close()
    assert maker.lookup(keys(0, 50)) == {}
    gc.collect()
    assert until(lambda: not lives(pid)), "the actor ends with the client that made it"
    other.put(numbers(50, 100))
    assert other.lookup(keys(0, 100)) == numbers(0, 100)


def test_kept_failures_are_hits_for_those_who_ask_for_them(shared, path):
    keeps, retries = shared(path, keep_failures=True), shared(path)
    answer = {b"a" * 16: Entry(NAN, "returned: nan"), b"b" * 16: Entry(NAN, "timed out: no answer for 1 s")}
    retries.put(answer)
    assert keeps.lookup(list(answer)) == {}
    keeps.put(answer)
    assert [entry.error for entry in keeps.lookup(list(answer)).values()] == ["returned: nan"]
    assert retries.lookup(list(answer)) == {}
    retries.put({b"a" * 16: Entry(1.5)})
    assert retries.lookup([b"a" * 16]) == keeps.lookup([b"a" * 16]) == {b"a" * 16: Entry(1.5)}


def test_memory_is_shared_and_leaves_no_file(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = shared("memory"), shared(None)
    first.put({key: Entry(e.value, extras='{"a": 1}') for key, e in numbers(0, 10).items()})
    assert second.lookup(keys(0, 10))[keys(1, 2)[0]] == Entry(1.0, "", '{"a": 1}')
    assert not list(tmp_path.iterdir())


def test_a_file_refused_by_the_actor_is_refused_here_and_taken_when_it_is_mended(shared, path):
    path.parent.mkdir()
    path.write_text("scores\n" * 1000)
    for _ in range(2):
        with pytest.raises(ValueError, match="no cache: move it away"):
            shared(path)
    path.unlink()
    cache = shared(path)
    cache.put(numbers(0, 5))
    assert cache.lookup(keys(0, 5)) == numbers(0, 5)


def test_a_cache_that_cannot_be_had_again_is_empty_and_says_so_once(shared, path):
    cache = shared(path)
    cache.put(numbers(0, 100))
    cache.flush()
    kill_9(cache)
    for file in path.parent.iterdir():
        file.write_bytes(os.urandom(8192))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert cache.lookup(keys(0, 100)) == {}
        cache.put(numbers(0, 100))
        cache.flush()
        assert cache.lookup(keys(0, 100)) == {}
        assert cache.stats() == {}
    (one,) = [str(warning.message) for warning in said]
    assert one.startswith("the score cache is lost, samples are scored afresh:") and "move it away" in one


def test_twenty_thousand_keys_take_less_than_200_ms(shared, path):
    entries = {os.urandom(16): Entry(random.random()) for _ in range(20_000)}
    cache = shared(path)
    cache.put(entries)
    cache.flush()

    def seconds():
        start = time.perf_counter()
        assert len(cache.lookup(list(entries))) == 20_000
        return time.perf_counter() - start

    warm = min(seconds() for _ in range(5))
    fresh = []
    for _ in range(2):
        ray.kill(cache.actor)
        cache = shared(path)
        fresh.append(seconds())
    assert warm < 0.2
    assert min(fresh) < 0.2
