"""`rayft submit | status | logs | stop` on a real head with its job server."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time

import heads
import numpy as np
import pytest
import yaml
from ray._private.runtime_env import packaging
from users import SMALL

from rayft import follow, jobs, store
from rayft.cli import main

TREE = {"algorithm": "ppo", "domain": "toy", "reward": "./mine.py:score", "iterations": 2}
REWARD = "def score(samples):\n    return [float(x[0]) for x in samples]\n"


@pytest.fixture(scope="module")
def head():
    with heads.head({"RAY_AUTH_MODE": "disabled"}) as up, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_API_SERVER_ADDRESS", up.dashboard)
        yield up


def make_tree(folder):
    """A working tree with a config and the user's own reward."""
    (folder / "configs").mkdir(parents=True)
    (folder / "configs/mine.yaml").write_text(yaml.safe_dump(TREE))
    (folder / "configs/mine.py").write_text(REWARD)
    return folder


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Such a tree, from within."""
    monkeypatch.chdir(make_tree(tmp_path / "tree"))
    return tmp_path / "tree"


@pytest.fixture(scope="module")
def job(head, tmp_path_factory):
    """(name, folder of its runs) of a job that has just been submitted."""
    here = tmp_path_factory.mktemp("job")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(make_tree(here / "tree"))
        told = ["submit", "configs/mine.yaml", *SMALL, f"storage={here / 'store'}", f"output={here / 'runs'}"]
        assert main([*told, "--no-follow"]) == 0
    return "mine", here


class Gate:
    """A connection's way to ``port``, which is cut once a log is being followed through it, until somebody knocks."""

    def __init__(self, port):
        self.port, self.listener, self.pairs, self.open = port, socket.create_server(("127.0.0.1", 0)), [], True
        self.knocks, self.following = 0, threading.Event()
        threading.Thread(target=self.serve, daemon=True).start()
        threading.Thread(target=self.cut, daemon=True).start()

    def serve(self):
        while True:
            near = self.listener.accept()[0]
            if not self.open:
                self.knocks += 1
                near.close()
                continue
            far = socket.create_connection(("127.0.0.1", self.port))
            self.pairs += [near, far]
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self.pump, args=(one, other), daemon=True).start()

    def pump(self, one, other):
        with contextlib.suppress(OSError):
            while some := one.recv(65536):
                other.sendall(some)
                if b"/logs/tail" in some:
                    self.following.set()
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self):
        self.following.wait()
        time.sleep(1)
        self.open = False
        for end in self.pairs:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        while self.knocks < 3:
            time.sleep(0.05)
        self.open = True


# -- one job, from its submission to its end; in this order


def test_a_name_in_use_is_refused_with_what_to_do(job, tree, capfd):
    for more in ([], ["--name", "mine"]):
        assert main(["submit", "configs/mine.yaml", "--no-follow", *more]) == 2
        said = capfd.readouterr().err
        assert re.search(r"rayft: the job name mine is in use there \((pending|running)\)", said), said
        assert "rayft logs mine --follow" in said and "rayft stop mine" in said and "--name" in said


def test_status_tells_of_all_jobs_or_of_one(job, capfd):
    for command in (["status"], ["status", "mine"]):
        assert main(command) == 0
        out = capfd.readouterr().out
        assert "mine" in out and ("running" in out or "pending" in out)


def test_a_job_is_followed_like_a_run_of_ones_own_though_the_connection_drops(head, job, capfd):
    name, here = job
    gate = Gate(int(head.dashboard.rpartition(":")[2]))
    address = f"http://127.0.0.1:{gate.listener.getsockname()[1]}"
    assert main(["logs", name, "--follow", "--address", address]) == 0
    out, said = capfd.readouterr()
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [row["iteration"] for row in rows if "iteration" in row] == [1, 2], "each once"
    assert sum("connection to the cluster was lost" in row.get("event", "") for row in rows) == 1, out
    assert out.count("before and after") == 1 and "report: " in said
    assert (here / "runs/mine/report.html").is_file() and (here / "store/mine/report.html").is_file()


def test_a_finished_job_keeps_its_log_and_its_status(job, capfd):
    assert main(["logs", "mine"]) == 0 and "before and after" in capfd.readouterr().out
    assert main(["status", "mine"]) == 0 and "succeeded" in capfd.readouterr().out
    assert main(["stop", "mine"]) == 0 and "over already: succeeded" in capfd.readouterr().out


@pytest.mark.slow
def test_the_same_config_again_is_a_job_of_another_name_and_too_large_a_one_says_what_there_is(job, tree, capfd):
    assert main(["logs", "mine", "--follow"]) == 0
    began = time.monotonic()
    told = [*SMALL, "scoring.actors=50", f"output={tree / 'runs'}", "--wait", "1"]
    assert main(["submit", "configs/mine.yaml", *told]) == 2
    said = capfd.readouterr().err
    assert "submitted mine-2" in said
    assert "this run's actors ask for 50 CPU, Ray has 4, also after 1 s" in said
    assert "job mine-2 failed" in said and time.monotonic() - began < 60
    assert not list(tree.glob("runs/*")), "nothing is left of it"


@pytest.mark.slow
def test_a_stopped_job_is_saved_and_goes_on_by_name_elsewhere_with_the_same_bits(head, tree, tmp_path, capfd):
    told = ["configs/mine.yaml", *SMALL, "name=long", "--no-follow", f"storage={tmp_path / 'store'}"]
    assert main(["submit", *told, "iterations=400", f"output={tmp_path / 'one'}"]) == 0
    end = time.monotonic() + 90
    while not list(tmp_path.glob("store/long/checkpoints/*/card.json")):
        assert time.monotonic() < end
        time.sleep(0.2)
    assert main(["stop", "long"]) == 0
    assert main(["logs", "long", "--follow"]) == 130
    reached = store.newest(tmp_path / "store/long").iteration
    assert 0 < reached < 400
    last = reached + 2
    again = ["submit", *told, f"iterations={last}", f"output={tmp_path / 'two'}", "--resume", "long"]
    assert main(again) == 0
    assert "submitted long-2" in capfd.readouterr().err
    assert main(["logs", "long-2", "--follow"]) == 0
    whole = ["submit", *told[:-2], f"iterations={last}", f"output={tmp_path / 'whole'}", "--name", "whole"]
    assert main(whole) == 0
    one, other = store.newest(tmp_path / "two/long"), store.newest(tmp_path / "whole/whole")
    assert one.iteration == other.iteration == last
    for key, value in one.weights().items():
        np.testing.assert_array_equal(value, other.weights()[key])


@pytest.mark.slow
def test_a_sweep_is_a_job_too_and_the_config_alone_can_be_sent(head, tree, tmp_path, capfd):
    search = ["search.trials=2", "iterations=2", "evaluate.every=1", f"storage={tmp_path / 'store'}"]
    sweep = ["submit", "toy_rgdm_asha", *search, "--tune", "--installed"]
    assert main([*sweep, f"output={tmp_path / 'one'}", "--name", "sweep"]) == 0
    assert "best: " in capfd.readouterr().out
    assert (tmp_path / "one/sweep/report.html").is_file() and (tmp_path / "store/sweep/trials/tuner.pkl").is_file()
    assert main([*sweep, f"output={tmp_path / 'two'}", "--resume", "sweep"]) == 0
    assert (tmp_path / "two/sweep/rows.jsonl").read_bytes() == (tmp_path / "one/sweep/rows.jsonl").read_bytes()


@pytest.mark.slow
def test_ctrl_c_leaves_the_job_running_and_says_how_to_come_back(head, tree, tmp_path):
    told = ["configs/mine.yaml", *SMALL, "name=left", f"output={tmp_path / 'runs'}", "iterations=400"]
    command = [sys.executable, "-m", "rayft.cli", "submit", *told]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    assert any('"iteration": 1' in line for line in iter(process.stdout.readline, ""))
    process.send_signal(2)
    assert "left goes on; come back with: rayft logs left --follow" in process.communicate(timeout=20)[1]
    assert process.returncode == 130
    client = jobs.connect(None)
    assert str(jobs.known(client, "left").status) == "RUNNING"
    assert main(["stop", "left"]) == 0
    assert main(["logs", "left", "--follow"]) == 130


# -- what goes wrong before anything is sent

WRONG = {
    "a file outside the tree": ("../else.yaml", "is not in the working tree", "--working-dir"),
    "a file elsewhere": (
        "configs/mine.yaml domain.weights=/etc/passwd",
        "domain.weights is /etc/passwd",
        "working tree",
    ),
    "a file by its path here": ("configs/mine.yaml weights={here}/w.pt", "weights is", "write it", "./../w.pt"),
    "a search without --tune": ("toy_rgdm_asha", "has a search: block", "with --tune"),
    "no search with --tune": ("configs/mine.yaml --tune", "has no search: block", "without --tune"),
    "a tree that is not shipped": ("configs/mine.yaml --installed --working-dir .", "--installed ships no"),
    "a reward that is not shipped": ("configs/mine.yaml --installed", "reward.name is", "mine.py", "storage"),
    "no folder": ("configs/mine.yaml --working-dir nowhere", "no folder"),
    "a name with a slash": ("configs/mine.yaml --name a/b", "'a/b'", "letters"),
    "nothing": ("", "nothing to submit", "YAML"),
    "a misspelt key": ("configs/mine.yaml trainig.lr=1", "did you mean 'training'"),
    "an output at a URI": (
        "configs/mine.yaml output=s3://b/runs",
        "output",
        "'s3://b/runs' is a URI",
        "storage=s3://b/runs",
    ),
    "a storage at no URI": ("configs/mine.yaml storage=here", "storage", "'here' is no URI", "s3://BUCKET"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_run_there_is_refused_before_it_is_sent(head, tree, capfd, what):
    command, *words = WRONG[what]
    (tree.parent / "else.yaml").write_text(yaml.safe_dump(TREE))
    (tree / "w.pt").write_bytes(b"weights")
    jobs_before = len(jobs.connect(None).list_jobs())
    assert main(["submit", *command.format(here=tree).split()]) == 2
    said = capfd.readouterr().err
    assert said.startswith("rayft: ") and said.count("\n") == 1, said
    assert [word for word in words if word not in said] == [], said
    assert len(jobs.connect(None).list_jobs()) == jobs_before


def test_a_tree_that_ray_would_not_take_is_refused_with_its_largest_files(head, tree, monkeypatch, capfd):
    (tree / "data.bin").write_bytes(os.urandom(30_000))
    (tree / "ignored.bin").write_bytes(os.urandom(90_000))
    (tree / ".gitignore").write_text("ignored.bin\n")
    monkeypatch.setattr(packaging, "GCS_STORAGE_MAX_SIZE", 20_000)
    assert main(["submit", "configs/mine.yaml", "--no-follow"]) == 2
    said = capfd.readouterr().err
    assert "Ray ships 20 kB at most" in said and "data.bin (30 kB)" in said and ".gitignore" in said


def test_what_is_ignored_and_what_runs_leave_is_not_shipped(tree, tmp_path):
    from zipfile import ZipFile

    (tree / ".gitignore").write_text("big/\n")
    for name in ("big/x", "runs/a/x", ".git/x", "configs/__pycache__/x", "deep/y"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("x")
    found = {name for name in ZipFile(jobs.packed(tree, ["/runs"], tmp_path / "t.zip")).namelist() if name[-1] != "/"}
    assert found == {"configs/mine.yaml", "configs/mine.py", "deep/y", ".gitignore"}


def test_an_unknown_job_is_refused_with_the_nearest(job, capfd):
    for command in ("logs", "stop", "status"):
        assert main([command, "mien"]) == 2
        assert "no job 'mien' (did you mean 'mine'?)" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("address", "words"),
    [
        (None, "which cluster? give --address http://HEAD:8265"),
        ("127.0.0.1:6379", "--address is 127.0.0.1:6379: jobs go to the head's dashboard"),
        ("http://127.0.0.1:1", "no Ray dashboard answers at http://127.0.0.1:1 (Connection refused)"),
    ],
)
def test_an_address_that_leads_nowhere_is_refused(monkeypatch, capfd, address, words):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert main(["status", *(["--address", address] if address else [])]) == 2
    assert words in capfd.readouterr().err


def test_a_log_read_again_from_its_start_shows_nothing_twice(capfd):
    seen = []
    view = type(
        "View", (), {"row": lambda s, row, n: seen.append(row["iteration"]), "event": lambda s, t: seen.append(t)}
    )
    reader = follow.Reader(view())
    lines = [
        '{"iteration": 1.0, "kl": null, "iterations": 3}',
        "plain",
        '{"event": "e"}',
        '{"iteration": 2, "iterations": 3}',
    ]
    text = "\n".join(lines) + "\n"
    for cut in (10, 60, 70, len(text)):
        reader.again()
        for start in range(0, cut, 7):
            reader.feed(text[start : min(cut, start + 7)])
    reader.close()
    assert seen == [1.0, "e", 2]
    assert capfd.readouterr().out == "plain\n"
