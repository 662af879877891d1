"""A folder behind a URI, on a disk and over the S3 protocol: whole files, plain errors, and runs that come back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_store import add_checkpoint, make_run
from users import SMALL

from rayft import mirror, spec, storage, store
from rayft.cli import main
from rayft.mirror import Mirror

TOLD = [*SMALL, "track.tensorboard=false"]


def test_a_file_goes_up_and_comes_down_as_it_was(home, tmp_path):
    there = storage.place(home).child("run")
    (tmp_path / "a").write_bytes(os.urandom(100_000))
    there.put(tmp_path / "a", "x/a")
    there.write("b", b"text")
    assert there.listing() == {"b": 4, "x/a": 100_000}
    assert there.read("b") == b"text" and there.read("c") is None
    there.get("x/a", tmp_path / "deep/a")
    assert (tmp_path / "deep/a").read_bytes() == (tmp_path / "a").read_bytes()
    assert there.has("x/a") and not there.has("x")
    assert storage.place(home).folders() == ["run"]
    there.delete("x/a")
    there.delete("x/a")
    assert there.listing() == {"b": 4}
    assert there.parent().uri == home and there.name == "run"


@pytest.mark.parametrize(
    "uri", ["s3://b/runs?endpoint_override=http://h:1&scheme=http", "s3://b/x", "file:///nfs/runs", "gs://b/x"]
)
def test_a_uri_is_one(uri):
    assert storage.is_uri(uri)


def test_a_plain_path_is_no_uri():
    assert not any(map(storage.is_uri, ("/nfs/runs", "runs", Path("a/b"), "./x.py:f", None)))


# -- a run's folder


def test_only_what_is_new_is_sent(home, tmp_path):
    run = make_run(tmp_path / "here", iterations=(1, 2))
    sender = Mirror(run, storage.place(home).child("run"))
    assert sender.send() == ""
    files = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert sender.there.listing().keys() == files and sender.uploads == len(files)
    (run / "run.json").write_text("{}")
    assert sender.send() == "" and sender.uploads == len(files) + 1
    again = Mirror(run, sender.there)
    assert again.send() == ""
    assert again.uploads == 2, "config.yaml and run.json: whole checkpoints are known by their cards"


def test_what_is_pruned_here_goes_there_and_nothing_else(home, tmp_path):
    run = make_run(tmp_path / "here", iterations=(1, 2, 3))
    sender = Mirror(run, storage.place(home).child("run"))
    sender.there.write("notes.txt", b"mine")
    sender.send()
    store.prune(run, 1)
    sender.send()
    kept = {name.split("/")[1] for name in sender.there.listing() if name.startswith("checkpoints/")}
    assert kept == {"iteration_000003"}
    assert sender.there.read("notes.txt") == b"mine"


def test_a_run_comes_back_bit_for_bit_and_a_checkpoint_without_its_card_does_not(home, tmp_path):
    run = make_run(tmp_path / "here", iterations=(1, 2))
    there = storage.place(home).child("run")
    Mirror(run, there).send()
    there.delete("checkpoints/iteration_000002/card.json")
    back = tmp_path / "back"
    assert mirror.bring(there, back, whole=True)
    found = store.newest(back)
    assert found.iteration == 1
    store.trusted(found, trust=False)
    for name, value in store.newest(run).weights().items():
        np.testing.assert_array_equal(found.weights()[name], value)
    assert not mirror.bring(there, run, whole=True), "what lies here is further"


def test_altered_state_is_refused_as_it_is_on_a_disk(home, tmp_path):
    run = make_run(tmp_path / "here", iterations=(1,))
    there = storage.place(home).child("run")
    Mirror(run, there).send()
    there.write("checkpoints/iteration_000001/rllib/state.pkl", b"evil")
    mirror.bring(there, tmp_path / "back", whole=True)
    with pytest.raises(ValueError, match="unpickles"):
        store.trusted(store.newest(tmp_path / "back"), trust=False)


def test_a_checkpoint_that_is_written_again_is_not_whole_meanwhile(tmp_path, monkeypatch):
    run = make_run(tmp_path / "here", iterations=(1,))
    sender = Mirror(run, storage.place((tmp_path / "store").as_uri()).child("run"))
    sender.send()
    add_checkpoint(run, spec.open_folder(run).full(), 1, shift=0.5)
    whole, put = [], storage.Place.put

    def watched(self, source, name):
        if name.startswith("checkpoints/"):
            whole.append((self.has("checkpoints/iteration_000001/card.json"), name.endswith("card.json")))
        put(self, source, name)

    monkeypatch.setattr(storage.Place, "put", watched)
    sender.send()
    assert whole and all(not there for there, _ in whole) and whole[-1][1], "the card comes last"


KILLED = """
import sys
from pathlib import Path
from rayft import storage
from rayft.mirror import Mirror
import time
print("ready", flush=True)
storage.CHUNK = 1000
Mirror(Path(sys.argv[1]), storage.place(sys.argv[2]).child("run")).send()
print("done", flush=True)
"""


@pytest.mark.parametrize(
    "after", [0.02, pytest.param(0.1, marks=pytest.mark.slow), pytest.param(0.2, marks=pytest.mark.slow)]
)
def test_a_process_killed_while_it_sends_leaves_nothing_half_there(home, tmp_path, after):
    run = make_run(tmp_path / "here", iterations=(1,))
    there = storage.place(home).child("run")
    Mirror(run, there).send()
    tell = spec.open_folder(run).full()
    add_checkpoint(run, tell, 2, state=lambda path: (path / "state.pkl").write_bytes(os.urandom(20_000_000)))
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(run), home], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    time.sleep(after)
    process.kill()
    process.wait()
    mirror.bring(there, tmp_path / "back", whole=True)
    found = store.newest(tmp_path / "back")
    store.trusted(found, trust=False)
    assert found.weights().keys() == store.newest(run).weights().keys()
    assert Mirror(run, there).send() == ""
    mirror.bring(there, tmp_path / "back", whole=True)
    assert store.newest(tmp_path / "back").iteration == 2
    assert not [path for path in (tmp_path / "back").rglob("*") if path.name.endswith((".part", ".tmp"))]


# -- what goes wrong


def test_an_upload_that_fails_is_told_and_made_up_for(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "PAUSE", 0.01)
    run = make_run(tmp_path / "here", iterations=(1,))
    there = storage.place((tmp_path / "store").as_uri()).child("run")
    (tmp_path / "store").write_text("a file in the way")
    sender = Mirror(run, there)
    assert "could not be sent to file://" in sender.send()
    (tmp_path / "store").unlink()
    assert sender.send() == "" and store.newest(run) is not None
    assert "checkpoints/iteration_000001/card.json" in there.listing()


def test_an_error_that_may_pass_is_tried_again_and_one_that_will_not_is_not(monkeypatch):
    monkeypatch.setattr(storage, "PAUSE", 0.001)
    for error, attempts in (("AWS Error SLOW_DOWN", 3), ("AWS Error ACCESS_DENIED", 1)):
        asked = []

        def fail(error=error, asked=asked):
            asked.append(1)
            raise OSError(error)

        with pytest.raises(OSError, match=error):
            storage.patiently(fail)
        assert len(asked) == attempts


@pytest.mark.parametrize(
    "uri",
    [
        "s3://nobodys/runs?{query}",
        pytest.param("s3://b/x?endpoint_override=127.0.0.1:1&scheme=http", marks=pytest.mark.slow),
        "swift://b/x",
        "/proc/x",
    ],
)
def test_a_storage_without_rights_is_refused_in_one_sentence_before_anything_starts(bucket, tmp_path, capfd, uri):
    home, began = uri.format(query=bucket.partition("?")[2]), time.monotonic()
    assert main(["run", "toy_ppo", f"storage={home}", f"output={tmp_path / 'runs'}"]) == 2
    said = capfd.readouterr().err
    assert said.startswith("rayft: storage is ") and said.count("\n") == 1, said
    assert time.monotonic() - began < 25
    assert not list(tmp_path.glob("runs/*"))


# -- runs


@pytest.mark.parametrize("where", ["s3", pytest.param("disk", marks=pytest.mark.slow)])
def test_a_run_resumed_on_another_machine_has_the_bits_of_one_that_was_never_stopped(
    ray_session, bucket, tmp_path, monkeypatch, capfd, where
):
    home = bucket.format("bits") if where == "s3" else (tmp_path / "store").as_uri()
    monkeypatch.setenv("RAYFT_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    assert main(["run", "toy_ppo", *TOLD, "iterations=4", "name=whole", "--quiet"]) == 0
    assert main(["run", "toy_ppo", *TOLD, "iterations=2", "name=part", f"storage={home}", "--quiet"]) == 0
    shutil.rmtree("runs/part")
    mark, query = ("?", home.partition("?")[2]) if "?" in home else ("", "")
    uri = f"{home.partition('?')[0]}/part{mark}{query}"
    told = ["run", "toy_ppo", *TOLD, "iterations=4", "name=part", f"storage={home}", "--quiet", "--resume"]
    assert main(told) == 0, capfd.readouterr().err
    one, other = store.newest(Path("runs/whole")), store.newest(Path("runs/part"))
    assert one.iteration == other.iteration == 4
    for name, value in one.weights().items():
        np.testing.assert_array_equal(value, other.weights()[name])
    shutil.rmtree("runs/part")
    assert main(["run", "--resume", uri, "--quiet"]) == 0, "by its URI alone"
    assert store.newest(Path("runs/part")).iteration == 4
    capfd.readouterr()
    assert main(["sample", uri, "--num", "3", "--out", "x.npz"]) == 0, capfd.readouterr().err
    assert main(["export", uri, "x.pt"]) == 0 and Path("x.pt").is_file()
    assert main(["report", uri]) == 0
    events = storage.place(uri).read("run.json")
    assert json.loads(events)["status"] == "finished"


@pytest.mark.slow
def test_a_sweep_shares_its_bank_at_the_storage_and_leaves_its_results_there(ray_session, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYFT_DATA", str(tmp_path / "data"))
    told = ["search.trials=2", "iterations=2", "evaluate.every=1", f"output={tmp_path / 'runs'}", "name=sweep"]
    assert main(["tune", "toy_rgdm_asha", *told, f"storage={tmp_path / 'store'}", "--quiet"]) == 0
    there = storage.place(tmp_path / "store/sweep").listing()
    assert {"report.html", "trials.csv", "best.yaml", "bank/manifest.json", "best/card.json"} <= there.keys()
    assert any(name.startswith("bank/shard_") for name in there)
    assert not (tmp_path / "runs/sweep/bank").exists()
