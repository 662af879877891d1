"""Sweeps whose trials lie on a storage: nothing that counts is on one machine alone, and any other goes on."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
from test_tune import LR, begun, check_resumed, in_the_middle, tuned

from rayft import cluster, storage, store, sweep, tune
from rayft.cli import main

TWO = {"space": LR, "trials": 2, "max_concurrent": 1, "objective": "reward", "scheduler": "none"}
OWN = {"config.yaml", "sweep.json", "rows.jsonl", "trials.csv", "best.yaml", "report.html", "best/card.json"}


def test_a_sweep_lies_in_the_bucket_and_what_is_read_here_is_there_too(ray_session, tmp_path, machine, bucket, capfd):
    machine("one")
    home = bucket.format(tmp_path.name)
    code, _, err = tuned(tmp_path, TWO, f"storage={home}", iterations=2)
    assert code == 0, err
    there, here = storage.place(home).child("small"), tmp_path / "runs/small"
    found = there.listing()
    assert found.keys() >= OWN and "trials/tuner.pkl" in found
    assert not (here / "trials").exists()
    assert there.read("rows.jsonl") == (here / "rows.jsonl").read_bytes()
    assert all(word in (here / "report.html").read_text() for word in ("the frontier", "signal"))
    paid = json.loads((here / "sweep.json").read_text())["calls"]
    assert paid["pretrained"] == 1024 and paid["train"] == 2 * 2 * 64
    assert store.load(here / "best").card["row"]["reward"] == sweep.winner(outcomes(here)).best["reward"]

    shutil.rmtree(here)
    machine("two")
    assert main(["report", f"{there.uri}"]) == 0
    copy = storage.cache_folder(there.uri)
    assert (copy / "report.html").is_file() and not (copy / "trials").exists()
    assert main(["tune", "--resume", there.uri]) == 0, capfd.readouterr().err  # nothing is left to do, and it says so


def outcomes(folder):
    return sweep.outcomes(sweep.read_rows(folder), ended=True)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["its URI", "its name"])
def test_a_sweep_that_was_killed_goes_on_from_the_bucket_alone(ray_session, tmp_path, bucket, how, monkeypatch, capfd):
    home = bucket.format(tmp_path.name)
    process = begun(tmp_path, in_the_middle, f"storage={home}")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    shutil.rmtree(tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    there = storage.place(home).child("small")
    num = len((there.read("rows.jsonl") or b"").splitlines())
    told = [there.uri] if how == "its URI" else ["small", str(tmp_path / "small.yaml"), f"storage={home}", "output=new"]
    assert main(["tune", "--resume", *told]) == 0, capfd.readouterr().err
    folder = tmp_path / ("runs" if how == "its URI" else "new") / "small"
    check_resumed(folder, num)
    assert there.read("rows.jsonl") == (folder / "rows.jsonl").read_bytes()
    assert json.loads(there.read("sweep.json") or b"")["status"] == "finished"


class Elsewhere(storage.Place):
    """A folder that no other node has."""

    def has(self, name):
        return False


def test_a_folder_that_a_node_does_not_see_is_refused_before_any_trial(ray_session, tmp_path, monkeypatch):
    here = storage.place(str(tmp_path))
    cluster.sees(here)
    monkeypatch.setattr(cluster, "nodes_now", lambda: [{"CPU": 1.0}] * 2)
    cluster.sees(here)
    blind = Elsewhere(here.uri, here.files, here.root)
    with pytest.raises(ValueError, match=r"node \S+ does not see .*: give storage=s3://BUCKET/FOLDER or another URI"):
        cluster.sees(blind)
    assert not list(tmp_path.iterdir())


def test_a_sweep_that_is_not_there_is_said(ray_session, tmp_path, home, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["tune", "toy_rgdm_asha", "--resume", f"storage={home}"]) == 2
    assert "nothing to resume: no sweep named 'toy_rgdm_asha'" in capsys.readouterr().err
    storage.place(home).child("toy_rgdm_asha").write("config.yaml", b"a run")
    assert main(["tune", "toy_rgdm_asha", "--resume", "toy_rgdm_asha", f"storage={home}"]) == 2
    assert "nothing to resume: no sweep" in capsys.readouterr().err
    assert tune.home_of(tune.specs.read("toy_rgdm_asha"), tmp_path / "one").uri == str(tmp_path / "one")
