"""Nodes that go while a run samples, scores, pays, learns and saves: its weights and counts are as if none had."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("lost_nodes.py")


def told(folder: Path, *phases: str) -> list[dict]:
    """What the program tells of whole runs, and of those with these nodes lost."""
    with tempfile.TemporaryDirectory(prefix="ray") as apart:  # or another Ray on this machine would join the cluster
        env = os.environ | {"RAY_TMPDIR": apart, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(PROGRAM), str(folder), *phases]
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check(folder: Path, *phases: str) -> None:
    whole: dict[str, dict] = {}
    for row in told(folder, *phases):
        print(row["run"], row["lost"], f"{row['seconds']:.1f} s")
        if not row["lost"]:
            whole[row["run"]] = row
            continue
        expected = whole[row["run"]]
        assert row["weights"] == expected["weights"], row["said"]
        assert [line[0] for line in row["rows"]] == [1, 2, 3, 4, 5]
        assert row["rows"][-1] == expected["rows"][-1], row["said"]  # counts of a bank's rows come when they come
        if row["run"] != "toy_rgdm":
            assert row["rows"] == expected["rows"], row["said"]
    assert len(whole) == len({"payoff" in lost for lost in phases})


def test_nodes_lost_while_sampling_scoring_learning_and_saving_cost_time_alone(tmp_path):
    check(tmp_path, "sampling,scoring,learning,checkpointing")


def test_a_node_lost_while_candidates_are_drawn_costs_time_alone(tmp_path):
    check(tmp_path, "payoff")


@pytest.mark.slow
def test_each_loss_alone_costs_time_alone(tmp_path):
    check(tmp_path, "sampling", "scoring", "learning", "checkpointing")


@pytest.mark.slow
def test_a_node_that_goes_after_a_spot_warning_costs_time_alone(tmp_path):
    check(tmp_path, "warned")
