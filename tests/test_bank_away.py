"""A bank at a URI: every machine has a folder of its own, and a shard is made once by whoever is first."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import numpy as np
import pytest
from test_bank import MANIFEST, same, shard

from rayft import lease, storage, store
from rayft.cli import main
from rayft.payoff.bank import open_bank
from rayft.table import Table


def test_what_one_machine_makes_another_reads(home, machine):
    machine("one")
    first = open_bank(home, MANIFEST)
    with first.claim(0):
        first.write(shard(0))
    machine("two")
    second = open_bank(home, MANIFEST)
    assert second.folder != first.folder and second.numbers == [0] and second.has(0) and not second.has(1)
    assert not second.path(0).is_file()
    same(second.read(0), shard(0))
    assert second.path(0).is_file(), "fetched once"
    assert storage.place(home).listing().keys() == {"manifest.json", "shard_000000.arrow"}, "no claim is left"


def test_a_bank_of_another_model_is_refused_and_one_begun_anew_forgets_the_old(home, machine):
    machine("one")
    open_bank(home, MANIFEST).write(shard(0))
    with pytest.raises(ValueError, match="was made with model ab12"):
        open_bank(home, {**MANIFEST, "model": "cd34"})
    there = storage.place(home)
    for name in there.listing():
        there.delete(name)
    assert not open_bank(home, {**MANIFEST, "model": "cd34"}).has(0)


def test_a_shard_that_cannot_be_sent_stays_here_and_goes_with_the_next(home, machine, monkeypatch):
    machine("one")
    monkeypatch.setattr(storage, "PAUSE", 0.001)
    bank = open_bank(home, MANIFEST)

    def refuse(*told):
        raise OSError("AWS Error SLOW_DOWN")

    with monkeypatch.context() as patch:
        patch.setattr(storage.Place, "put", refuse)
        with pytest.warns(RuntimeWarning, match="1 shards of the bank .* lie on this machine alone"):
            bank.write(shard(0))
    same(bank.read(0), shard(0))
    bank.write(shard(1))
    assert {name for name in storage.place(home).listing() if "shard" in name} == {
        "shard_000000.arrow",
        "shard_000001.arrow",
    }


MAKER = """
import os, sys, time
sys.path.insert(0, sys.argv[3])
from rayft import lease
from rayft.payoff.bank import open_bank
from test_bank import MANIFEST, shard
lease.POLL = 0.05
bank = open_bank(sys.argv[1], MANIFEST)
for number in range(3):
    with bank.claim(number):
        if not bank.has(number):
            time.sleep(0.1)
            bank.write(shard(number))
            with open(sys.argv[2], "a") as file:
                file.write(f"{number}\\n")
"""


def test_machines_that_want_the_same_shards_make_each_once(home, tmp_path):
    def start(name):
        command = [sys.executable, "-c", MAKER, home, str(tmp_path / "made"), os.path.dirname(__file__)]
        return subprocess.Popen(command, env=os.environ | {"RAYFT_DATA": str(tmp_path / name)})

    makers = [start(name) for name in ("one", "two", "three")]
    assert [maker.wait(60) for maker in makers] == [0, 0, 0]
    assert sorted((tmp_path / "made").read_text().split()) == ["0", "1", "2"]
    there = storage.place(home).listing()
    assert {"manifest.json", *(f"shard_{number:06d}.arrow" for number in range(3))} <= there.keys()


def test_a_claim_whose_owner_died_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "STALE", 0.3)
    monkeypatch.setattr(lease, "RENEW", 0.05)
    monkeypatch.setattr(lease, "POLL", 0.05)
    there = storage.place((tmp_path / "store").as_uri())
    there.write("claims/x/dead", b"")
    began = time.monotonic()
    with lease.lease(there, "x"):
        assert time.monotonic() - began > 0.3
        time.sleep(0.5)
        [mine] = there.listing("claims/x")
        assert there.changed(mine)[1] > 0, "it is renewed"
    assert there.listing() == {}


@pytest.mark.slow
def test_rgdm_learns_from_a_bank_at_a_uri_as_from_one_here_and_pays_once(ray_session, bucket, machine, tmp_path):
    small = ["training.chains=512", "training.minibatch_size=512", "iterations=2", "chain.num_steps=4", "--quiet"]
    small += ["evaluate.every=0", "evaluate.chains=64", "evaluate.pretrained_chains=128", f"output={tmp_path / 'runs'}"]
    paid = []
    for name, bank in (("near", tmp_path / "bank"), ("one", bucket.format("rgdm")), ("two", bucket.format("rgdm"))):
        machine(name)
        assert main(["run", "toy_rgdm", f"name={name}", f"training.bank={bank}", *small]) == 0
        paid.append(Table(tmp_path / f"runs/{name}/metrics.csv").rows[-1]["reward_calls"])
    weights = [store.newest(tmp_path / f"runs/{name}").weights() for name in ("near", "one", "two")]
    for key, value in weights[0].items():
        np.testing.assert_array_equal(value, weights[1][key])
        np.testing.assert_array_equal(value, weights[2][key])
    assert paid[0] == paid[1] > paid[2]
