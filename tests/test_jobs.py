"""`rayft submit | status | logs | stop` on a real head with its job server."""

from __future__ import annotations

import json

import heads
import pytest
import yaml

from rayft.cli import main

SMALL = [
    "iterations=2",
    "training.chains=16",
    "training.minibatch_size=32",
    "chain.num_steps=4",
    "evaluate.every=0",
    "evaluate.chains=64",
    "evaluate.pretrained_chains=128",
]
TREE = {"algorithm": "ppo", "domain": "toy", "reward": "./mine.py:score"}
REWARD = "def score(samples):\n    return [float(x[0]) for x in samples]\n"


@pytest.fixture(scope="module")
def head():
    with heads.head({"RAY_AUTH_MODE": "disabled"}) as up:
        yield up


@pytest.fixture
def door(head, monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head.dashboard)
    return head.dashboard


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A working tree with a config and the user's own reward; runs go elsewhere."""
    tree = tmp_path / "tree"
    (tree / "configs").mkdir(parents=True)
    (tree / "configs/mine.yaml").write_text(yaml.safe_dump(TREE))
    (tree / "configs/mine.py").write_text(REWARD)
    monkeypatch.chdir(tree)
    return tree


def test_a_job_ships_the_tree_runs_and_shows_what_a_run_here_would_show(door, tree, tmp_path, capfd):
    code = main(["submit", "configs/mine.yaml", *SMALL, f"output={tmp_path / 'runs'}"])
    out, said = capfd.readouterr()
    assert code == 0, said
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [row["iteration"] for row in rows if "iteration" in row] == [1, 2]
    assert "before and after" in out and "submitted mine; come back with: rayft logs mine --follow" in said
    assert (tmp_path / "runs/mine/report.html").is_file()
    assert main(["status", "mine"]) == 0
    assert "succeeded" in capfd.readouterr().out
    assert main(["logs", "mine"]) == 0
    assert "before and after" in capfd.readouterr().out
