"""The bank: what is written is read back, whoever was killed meanwhile, and nothing of another model is read."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from rayft.payoff.bank import Shard, load, open_bank, save

MANIFEST = {"domain": "toy", "model": "ab12", "reward": "quadratic 1", "radii": (0.5, 1.0), "shard_pairs": 6}


def shard(number=0, rows=6, dtype=np.float32):
    rng = np.random.default_rng(number)
    x = rng.normal(size=(4, rows, 3, 2)).astype(dtype)
    rewards = rng.normal(size=(rows, 5))
    rewards[1, 2] = np.nan
    return Shard(
        number,
        seed=123456789012345678 + number,
        x_0=x[0],
        t=np.arange(1, rows + 1, dtype=np.int32),
        eps_star=rng.normal(size=(rows, 5, 3, 2)).astype(dtype),
        rewards=rewards,
        mean_ref=x[1],
        start=rewards + 1,
        context={"mask": rng.random((rows, 3)) < 0.5, "class": np.arange(rows)},
        parts={"QED/x": rewards * 2},
        num_calls=30,
    )


def same(a, b):
    for name in ("number", "seed", "num_calls"):
        assert getattr(a, name) == getattr(b, name)
    for name in ("x_0", "t", "eps_star", "rewards", "mean_ref", "start"):
        one, other = getattr(a, name), getattr(b, name)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    for name in ("context", "parts"):
        one, other = getattr(a, name), getattr(b, name)
        assert one.keys() == other.keys()
        for key in one:
            assert one[key].dtype == other[key].dtype
            np.testing.assert_array_equal(one[key], other[key])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_shard_comes_back_as_it_was_kept(tmp_path, dtype):
    save(shard(dtype=dtype), tmp_path / "a.arrow")
    same(load(tmp_path / "a.arrow"), shard(dtype=dtype))


def test_reading_a_shard_copies_nothing(tmp_path):
    save(shard(), tmp_path / "a.arrow")
    found = load(tmp_path / "a.arrow")
    assert not found.eps_star.flags.owndata and not found.eps_star.flags.writeable


def test_a_bank_is_opened_again_and_appended_to(tmp_path):
    bank = open_bank(tmp_path / "deep" / "bank", MANIFEST)
    bank.write(shard(0))
    again = open_bank(tmp_path / "deep" / "bank", MANIFEST)
    again.write(shard(1))
    assert [again.has(n) for n in range(3)] == [True, True, False]
    assert open_bank(tmp_path / "deep" / "bank", MANIFEST).numbers == [0, 1]
    same(again.read(1), shard(1))
    assert again.shard_pairs == 6


@pytest.mark.parametrize("key", ["model", "reward", "radii"])
def test_a_bank_of_something_else_is_refused_with_a_sentence(tmp_path, key):
    open_bank(tmp_path, MANIFEST)
    with pytest.raises(ValueError, match=f"was made with {key} .* and this run has .*: choose another folder"):
        open_bank(tmp_path, {**MANIFEST, key: "other"})


def test_the_size_of_shards_is_the_banks_own(tmp_path):
    open_bank(tmp_path, MANIFEST)
    assert open_bank(tmp_path, {**MANIFEST, "shard_pairs": 50}).shard_pairs == 6


@pytest.mark.parametrize("damage", [b"", b"ARROW1", None])
def test_a_damaged_shard_is_named(tmp_path, damage):
    path = tmp_path / "shard_000000.arrow"
    save(shard(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if damage is None else damage)
    with pytest.raises(ValueError, match=r"shard_000000.arrow is damaged .*; delete it, it is made again"):
        load(path)


def test_folders_that_are_no_bank_are_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"cannot keep a bank in .*; choose another folder"):
        open_bank(tmp_path / "file", MANIFEST)
    save(shard(), tmp_path / "shard_000000.arrow")
    with pytest.raises(ValueError, match=r"has shards and no manifest.json"):
        open_bank(tmp_path, MANIFEST)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json is damaged"):
        open_bank(tmp_path / "b", MANIFEST)


def test_a_full_disk_leaves_no_half_shard(tmp_path):
    code = (
        "import resource, sys; sys.path.insert(0, 'tests'); from test_bank import shard, save\n"
        "from pathlib import Path; import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        f"try:\n    save(shard(rows=50), Path({str(tmp_path)!r}) / 'shard_000000.arrow')\n"
        "except ValueError as error:\n    print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "could not be written" in ran.stdout and "free some space" in ran.stdout
    assert list(tmp_path.iterdir()) == []


def write_for_ever(folder):
    bank, number = open_bank(folder, MANIFEST), 0
    while True:
        bank.write(shard(number, rows=3000))
        number += 1


def test_a_writer_killed_mid_shard_leaves_whole_ones_and_the_rest_can_be_made_again(tmp_path):
    for seconds in (0.3, 0.05, 0.11):
        writer = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(tmp_path,))
        writer.start()
        while not (tmp_path / "shard_000000.arrow").is_file():
            time.sleep(0.005)
        time.sleep(seconds)
        os.kill(writer.pid or 0, signal.SIGKILL)
        writer.join()
    bank = open_bank(tmp_path, MANIFEST)
    for number in bank.numbers:
        same(bank.read(number), shard(number, rows=3000))
    following = bank.numbers[-1] + 1
    with bank.claim(following):
        assert not bank.has(following)
        bank.write(shard(following))
    same(bank.read(following), shard(following))


def hold(folder, number):
    with open_bank(folder, MANIFEST).claim(number):
        (folder / "held").write_text("")
        time.sleep(60)


def test_a_claim_dies_with_who_holds_it(tmp_path):
    bank = open_bank(tmp_path, MANIFEST)
    holder = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path, 4))
    holder.start()
    while not (tmp_path / "held").is_file():
        time.sleep(0.005)
    with bank.claim(5):
        pass  # another shard is free
    os.kill(holder.pid or 0, signal.SIGKILL)
    with bank.claim(4):
        holder.join()


def test_the_manifest_is_plain_json(tmp_path):
    open_bank(tmp_path, MANIFEST)
    assert json.loads((tmp_path / "manifest.json").read_text())["radii"] == [0.5, 1.0]
