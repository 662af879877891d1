"""Kill what can be killed, at the worst moment: the run ends with the numbers it would have had."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rayft import loop, spec, store
from rayft.table import Table

SMALL = [
    "iterations=8",
    "training.chains=128",
    "training.minibatch_size=256",
    "chain.num_steps=10",
    "evaluate.every=4",
    "evaluate.chains=128",
    "evaluate.pretrained_chains=256",
    "checkpoint.every=2",
    "checkpoint.keep=9",
]

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # as this process: thread counts change bits


def command(folder, *more):
    return [sys.executable, "-m", "rayft.cli", "run", "toy_ppo", *SMALL, f"output={folder}", *more]


def finish(folder, *more):
    """Runs in a process of its own to the end; its folder."""
    done = subprocess.run(command(folder, *more), capture_output=True, text=True, env=ONE_THREAD, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "toy_ppo"


def kill_when(folder, moment, *more):
    """Starts a run and kills its driver with SIGKILL as soon as ``moment(folder, rows so far)`` holds."""
    folder.mkdir()
    log = folder / "log"
    process = subprocess.Popen(command(folder, *more), stdout=log.open("w"), stderr=subprocess.DEVNULL, env=ONE_THREAD)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if moment(folder / "toy_ppo", log.read_text().count('"iteration"')):
            process.kill()
            break
        time.sleep(0.001)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "the run ended before the moment came"


def weights_of(run):
    return {
        p.name: (run / "checkpoints/iteration_000008" / p.name).read_bytes()
        for p in map(Path, ("weights.safetensors", "ema.safetensors"))
    }


MOMENTS = {
    "before the first checkpoint": lambda run, rows: rows >= 1,
    "between two checkpoints": lambda run, rows: rows >= 5,
    "while a checkpoint is written": lambda run, rows: any(run.glob("checkpoints/.iteration_000006.tmp")),
}


def check_resume(tmp_path, moment, *more):
    whole, _ = run_here(tmp_path / "whole", None, *more)
    kill_when(tmp_path / "killed", MOMENTS[moment], *more)
    killed = finish(tmp_path / "killed", "--resume", *more)
    assert weights_of(killed) == weights_of(whole)
    rows, expected = Table(killed / "metrics.csv").rows, Table(whole / "metrics.csv").rows
    assert [row["iteration"] for row in rows] == list(range(1, 9))
    for name in ("reward_mean", "kl", "reward_calls", "chains", "learner/total_loss"):
        assert [row[name] for row in rows] == [row[name] for row in expected], name


def test_a_killed_driver_resumes_bit_for_bit(ray_session, tmp_path):
    check_resume(tmp_path, "between two checkpoints")


@pytest.mark.slow
@pytest.mark.parametrize("num_env_runners", [0, 2])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_driver_killed_at_any_moment_resumes_bit_for_bit(ray_session, tmp_path, moment, num_env_runners):
    check_resume(tmp_path, moment, f"resources.num_env_runners={num_env_runners}")


class Assassin:
    """A display that kills a process of the run when the second row is shown."""

    def __init__(self, find):
        self.find, self.run, self.said = find, None, []

    def row(self, row, total):
        if row["iteration"] == 3 and self.find is not None:
            os.kill(self.find(self.run.algo), signal.SIGKILL)
            self.find = None

    def event(self, text):
        self.said.append(text)


def run_here(folder, find, *more):
    """The same run inside this process, with a victim."""
    told = spec.read("toy_ppo", [*SMALL, f"output={folder}", *more])
    display = Assassin(find)
    display.run = loop.Run(told, loop.create_folder(told), display)
    display.run.execute(resume=False)
    return display.run.folder, display.said


def runner_pid(algo):
    return algo.env_runner_group.foreach_env_runner(lambda r: os.getpid(), local_env_runner=False)[0]


def learner_pid(algo):
    return next(iter(algo.learner_group.foreach_learner(lambda learner: os.getpid()))).get()


@pytest.mark.parametrize(
    ("find", "resources"),
    [
        pytest.param(runner_pid, "resources.num_env_runners=2", id="runner"),
        pytest.param(learner_pid, "resources.num_learners=1", id="learner", marks=pytest.mark.slow),
    ],
)
def test_a_killed_actor_costs_time_and_nothing_else(ray_session, tmp_path, find, resources):
    whole, _ = run_here(tmp_path / "whole", None, resources)
    killed, said = run_here(tmp_path / "killed", find, resources)
    rows, expected = Table(killed / "metrics.csv").rows, Table(whole / "metrics.csv").rows
    assert [row["iteration"] for row in rows] == list(range(1, 9))
    assert [row["reward_mean"] for row in rows] == [row["reward_mean"] for row in expected]
    assert [row["reward_calls"] for row in rows] == [row["reward_calls"] for row in expected], said
    assert weights_of(killed) == weights_of(whole)


def test_ctrl_c_saves_and_says_how_to_resume(tmp_path):
    process = subprocess.Popen(
        command(tmp_path, "iterations=5000"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if json.loads(line).get("iteration") == 3.0:
            process.send_signal(signal.SIGINT)
            break
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert f"rayft run --resume {tmp_path / 'toy_ppo'}" in err
    assert "Traceback" not in err
    reached = store.newest(tmp_path / "toy_ppo").iteration
    assert reached >= 3
    assert json.loads((tmp_path / "toy_ppo/run.json").read_text())["status"] == "interrupted"
