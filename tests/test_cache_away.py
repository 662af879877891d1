"""A score cache at a URI: what one machine paid for, another knows."""

from __future__ import annotations

import pytest

from rayft import storage
from rayft.rewards.away import AwayStore
from rayft.rewards.cache import SharedCache
from rayft.rewards.shelf import Entry


@pytest.fixture
def file(home):
    """The URI of a cache."""
    folder, question, options = home.partition("?")
    return f"{folder}/s.sqlite{question}{options}"


def key(number):
    return number.to_bytes(16, "big")


def test_what_one_machine_sent_another_has_and_neither_loses_the_others(file, machine):
    machine("one")
    one = AwayStore(file)
    one.put({key(1): Entry(0.5), key(2): Entry(float("nan"), "returned: None", "{}")})
    one.send()
    machine("two")
    two = AwayStore(file)
    assert two.lookup([key(1), key(3)]) == {key(1): Entry(0.5)}
    assert two.lookup([key(2)])[key(2)].error == "returned: None"
    one.put({key(3): Entry(3.0)})
    two.put({key(4): Entry(4.0)})
    one.close()
    two.close()
    machine("three")
    three = AwayStore(file)
    assert three.lookup([key(1), key(3), key(4)]) == {key(1): Entry(0.5), key(3): Entry(3.0), key(4): Entry(4.0)}
    three.close()


def test_nothing_is_sent_where_nothing_is_new(file, machine, monkeypatch):
    machine("one")
    one = AwayStore(file)
    one.put({key(1): Entry(1.0)})
    one.close()
    monkeypatch.setattr(storage.Place, "put", lambda *told: pytest.fail("sent"))
    again = AwayStore(file)
    assert again.lookup([key(1)])
    again.close()


def test_a_send_that_fails_is_told_once_and_made_up_for(file, machine, monkeypatch):
    machine("one")
    monkeypatch.setattr(storage, "PAUSE", 0.001)
    one = AwayStore(file)
    one.put({key(1): Entry(1.0)})

    def refuse(*told):
        raise OSError("AWS Error SLOW_DOWN")

    with monkeypatch.context() as patch:
        patch.setattr(storage.Place, "put", refuse)
        one.send()
    assert "could not be sent" in one.news() and one.news() == ""
    one.close()
    machine("two")
    assert AwayStore(file).lookup([key(1)])


def test_what_is_no_cache_is_refused(file, machine):
    machine("one")
    there = storage.place(file).parent()
    there.write("s.sqlite", b"text of another kind" * 100)
    with pytest.raises(ValueError, match=r"is damaged, or no cache: name another file"):
        AwayStore(file)
    assert there.read("s.sqlite") == b"text of another kind" * 100


def test_the_actor_of_a_cluster_sends_it_at_the_end(ray_session, bucket, machine):
    uri = bucket.format("actors/s.sqlite")
    cache = SharedCache(uri)
    cache.put({key(7): Entry(7.0)})
    cache.close()
    machine("two")
    assert AwayStore(uri).lookup([key(7)]) == {key(7): Entry(7.0)}
