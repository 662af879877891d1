"""Before a run joins a cluster: is it there, may we in, are the versions the same, has it room."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import heads
import pytest
import ray

from rayft import cluster, spec
from rayft.cli import main

TOKEN = "a" * 64


# -- room, as arithmetic


@pytest.mark.parametrize(
    ("kinds", "nodes", "words"),
    [
        ({"runner": [{"CPU": 1}] * 4}, [{"CPU": 2}, {"CPU": 2}], ""),
        ({"runner": [{"CPU": 1}] * 5}, [{"CPU": 2}, {"CPU": 2}], "ask for 5 CPU, Ray has 4"),
        ({"learner": [{"CPU": 4}]}, [{"CPU": 2}] * 4, "each learner asks for 4 CPU on one node and no node has"),
        ({"runner": [{"CPU": 3}] * 2}, [{"CPU": 5}, {"CPU": 1}], "there is no room left for one: nodes have 5 CPU; 1"),
        ({"learner": [{"GPU": 1, "CPU": 1}]}, [{"CPU": 8}], "ask for 1 GPU, Ray has 0"),
        ({"learner": [{"GPU": 1, "CPU": 1}]}, [{"GPU": 1}, {"CPU": 8}], "no node has that much"),
        ({"reward actor": [{"CPU": 1, "reward": 1}]}, [{"CPU": 8}], "ask for 1 reward, Ray has 0"),
        ({"reward actor": [{"CPU": 1, "reward": 1}] * 2}, [{"CPU": 8, "reward": 1}] * 2, ""),
        # what anybody could hold is not taken from those who need the one node that has a GPU
        ({"runner": [{"CPU": 1}] * 2, "learner": [{"CPU": 1, "GPU": 1}]}, [{"CPU": 1, "GPU": 1}, {"CPU": 2}], ""),
        ({}, [], ""),
    ],
)
def test_what_is_missing_is_told_in_all_and_on_one_node(kinds, nodes, words):
    said = cluster.lacking(kinds, nodes)
    assert words in said and bool(words) == bool(said)


def test_a_run_asks_for_what_its_yaml_says():
    told = ["resources.num_learners=2", "resources.num_gpus_per_learner=0.5", "scoring.actors=3"]
    kinds = cluster.wanted(spec.read("toy_ppo", told))
    assert kinds == {"learner": [{"CPU": 1, "GPU": 0.5}] * 2, "reward actor": [{"CPU": 1}] * 3}


def test_a_node_that_comes_in_time_is_waited_for(ray_session):
    said, kinds = [], {"runner": [{"CPU": 2}]}
    arrives = time.monotonic() + 0.7
    cluster.has_room(kinds, 5, said.append, lambda: [{"CPU": 2 if time.monotonic() > arrives else 1}], list)
    assert len(said) == 1 and "ask for 2 CPU, Ray has 1; waiting up to 5 s, no node is announced" in said[0]


def test_one_that_could_come_is_asked_for_and_waited_for_longer(ray_session):
    said, kinds = [], {"runner": [{"CPU": 2}]}
    arrives = time.monotonic() + 0.7
    now = lambda: [{"CPU": 2 if time.monotonic() > arrives else 1}]  # noqa: E731
    cluster.has_room(kinds, None, said.append, now, lambda: [{"CPU": 8}])
    assert "waiting up to 600 s, the cluster may start nodes for it" in said[0]


def test_a_cluster_without_room_refuses_within_the_wait_and_leaves_nothing(ray_session, tmp_path, capfd):
    address, began = ray.get_runtime_context().gcs_address, time.monotonic()
    told = ["scoring.actors=9", f"output={tmp_path}", "--address", address, "--wait", "1"]
    assert main(["run", "toy_ppo", *told]) == 2
    said = capfd.readouterr().err.splitlines()
    assert said[0].startswith("this run's actors ask for 9 CPU, Ray has 4; waiting up to 1 s")
    assert said[1].startswith("rayft: this run's actors ask for 9 CPU, Ray has 4, also after 1 s: lower resources")
    assert time.monotonic() - began < 20 and not list(tmp_path.iterdir())


def test_room_that_others_have_taken_is_waited_for_and_said(ray_session):
    @ray.remote(num_cpus=3)
    class Other:
        """Someone else's work."""

        def here(self):
            return True

    other = Other.remote()
    assert ray.get(other.here.remote())
    end, said, kinds = time.monotonic() + 20, [], {"runner": [{"CPU": 2}]}
    while cluster.lacking({"other": [{"CPU": 4}]}, cluster.free_now()) == "" and time.monotonic() < end:
        time.sleep(0.05)  # the head hears of it a moment later
    with pytest.raises(ValueError, match=r"ask for 2 CPU, Ray has 1 free, also after 0.3 s: wait for the others"):
        cluster.has_room(kinds, 0.3, said.append)
    threading.Timer(0.5, ray.kill, (other,)).start()
    cluster.has_room(kinds, None, said.append)
    assert said[0].endswith("Ray has 1 free; waiting up to 0.3 s") and "until others leave room" in said[1]


# -- versions


def test_a_node_with_another_rayft_is_named(ray_session, monkeypatch):
    cluster.same_versions()
    monkeypatch.setattr(cluster, "versions", lambda: {"rayft": "99.1"})
    with pytest.raises(ValueError, match=r"node [0-9.]+ has rayft .* and this process 99.1: install the same"):
        cluster.same_versions()


def test_a_job_submitted_by_another_version_ends_at_once(monkeypatch, capfd, tmp_path):
    monkeypatch.setenv(cluster.CLIENT, cluster.own_versions())
    cluster.same_as_client()
    monkeypatch.setenv(cluster.CLIENT, "rayft 0.0.1, ray 2.1, python 3.8")
    assert main(["run", "toy_ppo", f"output={tmp_path}"]) == 2
    assert "submitted by rayft 0.0.1, ray 2.1, python 3.8, and the cluster has rayft" in capfd.readouterr().err


# -- files


def test_local_files_are_found_wherever_they_stand_and_what_is_shipped_is_not(tmp_path):
    (tmp_path / "w.pt").write_bytes(b"")
    (tmp_path / "r.py").write_text("")
    here = str(tmp_path)
    tree = {"weights": f"{here}/w.pt", "reward": {"name": f"{here}/r.py:f", "parts": [{"file": f"{here}/w.pt"}]}}
    tree |= {"output": here, "storage": here, "domain": {"name": "toy", "note": "/no/such/file", "other": "w.pt"}}
    found = dict(cluster.hidden_files(tree, []))
    assert found == {"weights": f"{here}/w.pt", "reward.name": f"{here}/r.py", "reward.parts[0].file": f"{here}/w.pt"}
    assert not list(cluster.hidden_files(tree, [tmp_path]))


# -- the token


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """(head that wants a token, file that holds it)."""
    file = tmp_path_factory.mktemp("token") / "auth_token"
    file.write_text(TOKEN)
    file.chmod(0o600)
    with heads.head({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)}) as up:
        yield up, file


COMMANDS = {
    "run": "run toy_ppo output={folder}/runs --address {up.address}",
    "status": "status --address {up.dashboard}",
}
WRONG = "b" * 64
REFUSED = [  # command, environment, what is said
    ("run", {"RAY_AUTH_TOKEN_PATH": "{folder}/wrong"}, "is read from {folder}/wrong: put"),
    ("run", {"RAY_AUTH_TOKEN_PATH": "/nowhere/token"}, "/nowhere/token, which does not exist"),
    ("status", {"RAY_AUTH_MODE": "disabled"}, "RAY_AUTH_MODE=disabled sends none"),
    ("status", {"RAY_AUTH_TOKEN": WRONG}, "the environment variable RAY_AUTH_TOKEN"),
]


@pytest.mark.parametrize("cases", [REFUSED[:3], pytest.param(REFUSED[3:], marks=pytest.mark.slow)])
def test_a_wrong_token_is_one_sentence_that_says_where_it_is_read_and_never_the_token(guarded, tmp_path, cases):
    up, _ = guarded
    (tmp_path / "wrong").write_text(WRONG)
    own = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    started = []
    for command, told, words in cases:
        told = {name: value.format(folder=tmp_path) for name, value in told.items()}
        environment = own | {"RAY_AUTH_MODE": "token", "OMP_NUM_THREADS": "1", **told}
        line = [sys.executable, "-m", "rayft.cli", *COMMANDS[command].format(up=up, folder=tmp_path).split()]
        process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=environment)
        started.append((process, words.format(folder=tmp_path)))
    for process, words in started:
        said = process.communicate(timeout=60)[1]
        assert (process.returncode, said.count("\n")) == (2, 1), said
        assert words in said and "token" in said, said
        assert WRONG not in said and TOKEN not in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_with_the_right_token_one_comes_in(guarded):
    up, file = guarded
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)}
    done = subprocess.run(
        [sys.executable, "-m", "rayft.cli", "status", "--address", up.dashboard],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0 and "jobs at" in done.stdout, done.stderr


@pytest.mark.slow
def test_a_port_that_speaks_something_else_is_refused(guarded, monkeypatch):
    up, _ = guarded
    dashboard = up.dashboard.removeprefix("http://")
    began = time.monotonic()
    monkeypatch.setattr(cluster, "PROBE_TIMEOUT", 4.0)
    with pytest.raises(ValueError, match="is no Ray that can be joined"):
        cluster.reachable(dashboard)
    assert time.monotonic() - began < 15
