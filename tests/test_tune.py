"""Sweeps on a real Ray: what they leave, what they pay, what pbt changes, and what becomes of those that are killed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from ray.rllib.core import DEFAULT_MODULE_ID

from rayft import storage, store, sweep
from rayft.cli import main
from rayft.objective import Objective
from rayft.table import Table
from rayft.trial import UNKNOWN, Told, Trial

RUN = {
    "algorithm": "ppo",
    "domain": "toy",
    "reward": "quadratic",
    "iterations": 4,
    "resources": {"torch_threads": 1},
    "training": {"alpha": 0.5, "chains": 64, "minibatch_size": 128},
    "chain": {"num_steps": 10},
    "evaluate": {"every": 2, "chains": 256, "pretrained_chains": 1024},
    "track": {"tensorboard": False},
}
LR = {"training.lr": {"loguniform": [1e-4, 1e-2]}}
REWARD = """
import numpy as np
from rayft.reward import Reward

class Moody(Reward):
    def __init__(self, mood="fine"):
        self.mood = mood

    def __call__(self, events):
        if self.mood == "bad":
            raise KeyError("no such receptor")
        return [0.0 if self.mood == "dull" else float(-np.square(x).sum()) for x in events]
"""


def written(folder, search, **more):
    """The YAML of a small sweep."""
    path = folder / "small.yaml"
    at_once = (
        {} if search.get("scheduler") == "pbt" else {"max_concurrent": 2}
    )  # each is a process with torch and RLlib
    path.write_text(yaml.safe_dump({**RUN, **more, "search": {**at_once, **search}}))
    return path


def tuned(folder, search, *overrides, **more):
    """(exit code, standard output, standard error) of a sweep in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(folder)
        code = main(["tune", str(written(folder, search, **more)), *overrides])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def asha(ray_session, tmp_path_factory):
    """(folder of the sweep, standard output) of four trials that are evaluated twice, the worse stopped in between."""
    here = tmp_path_factory.mktemp("asha")
    search = {"space": {**LR, "training.clip": {"choice": [0.1, 0.2]}}, "trials": 4, "max_concurrent": 1}
    code, out, err = tuned(here, {**search, "objective": "attained"}, track={"tensorboard": True})
    assert code == 0 and err.endswith("report: runs/small/report.html\n"), err
    return here / "runs/small", out


def test_a_sweep_leaves_everything_in_its_folder(asha):
    folder, _ = asha
    wanted = {"config.yaml", "sweep.json", "rows.jsonl", "trials.csv", "trials.parquet", "best.yaml", "report.html"}
    assert wanted <= {path.name for path in folder.iterdir()}
    assert len(list(folder.glob("trials/trial_*/events.out.tfevents*"))) == 4
    told = json.loads((folder / "sweep.json").read_text())
    assert told["status"] == "finished" and told["seconds"] > 0 and "ray" in told["versions"]
    page = (folder / "report.html").read_text()
    for word in ("training.lr", "the frontier", "trial_00003", "rayft tune", "stopped early"):
        assert word in page, word
    assert "could not be made" not in page


def test_every_trial_that_ends_is_a_line_and_all_are_ranked_below(asha):
    folder, out = asha
    lines = [json.loads(line) for line in out.splitlines()[:4]]
    assert {line["trial"] for line in lines} == {f"trial_{number:05d}" for number in range(4)}
    assert all({"training.lr", "training.clip", "objective", "status"} <= line.keys() for line in lines)
    table = pq.read_table(folder / "trials.parquet").to_pylist()
    objectives = [line["objective"] for line in table]
    assert objectives == sorted(objectives, reverse=True) and np.isfinite(objectives).all()
    ranked = re.findall(r"│ (trial_\d+)", out)
    assert ranked == [line["trial"] for line in table]
    assert {line["status"] for line in table} == {"finished", "stopped early"}
    assert table[0]["status"] == "finished", "asha stops what is behind"


def test_the_pretrained_model_is_drawn_once_and_evaluations_are_metered_apart(asha):
    folder, out = asha
    rows = [row for row in sweep.read_rows(folder) if "ended" not in row]
    paid = sweep.paid(rows)
    assert paid == {"pretrained": 1024, "evaluate": 256 * len(rows), "train": 2 * 64 * len(rows)}
    assert f"{paid['train']:,} training, {paid['evaluate']:,} evaluation, 1,024 of the pretrained model, once" in out
    assert {row["evaluate"]["optimum"] for row in rows} == {rows[0]["evaluate"]["optimum"]}, "one J* for all trials"


def test_the_best_checkpoint_and_its_yaml_are_a_runs(asha, monkeypatch, capfd):
    folder, _ = asha
    best = sweep.outcomes(sweep.read_rows(folder), ended=True)[0]
    card = store.load(folder / "best").card
    assert card["config"]["training"]["lr"] == best.values["training.lr"]
    assert card["row"]["objective"] == best.objective and card["iteration"] == best.best["iteration"]
    monkeypatch.chdir(folder.parents[1])
    assert main(["evaluate", str(folder / "best"), "--chains", "256", "--pretrained-chains", "1024", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["reward"] == pytest.approx(best.best["reward"], abs=0.3)
    assert main(["run", str(folder / "best.yaml"), "--quiet", "iterations=2"]) == 0
    told = yaml.safe_load((folder.parent / "small-best/config.yaml").read_text())
    assert told["training"]["lr"] == best.values["training.lr"] and "search" not in told
    assert Table(folder.parent / "small-best/metrics.csv").rows[-1]["iteration"] == 2


def test_the_page_is_written_again_from_the_folder(asha, capfd, monkeypatch):
    folder, _ = asha
    monkeypatch.chdir(folder.parents[1])  # the commands on the page name it from where it is written
    before = (folder / "report.html").read_text()
    (folder / "report.html").unlink()
    assert main(["report", "runs/small"]) == 0
    assert (folder / "report.html").read_text() == before


def test_a_finished_sweep_that_is_resumed_stays_as_it_is(asha, capfd):
    folder, _ = asha
    before = sweep.read_rows(folder)
    assert main(["tune", "--resume", str(folder), "--quiet"]) == 0
    assert sweep.read_rows(folder) == before


@pytest.mark.slow
def test_pbt_trains_with_what_it_copied_and_changed(ray_session, tmp_path):
    space = {**LR, "training.clip": {"uniform": [0.05, 0.4]}}
    search = {"space": space, "trials": 4, "scheduler": "pbt", "objective": "attained"}
    code, _, err = tuned(tmp_path, search, iterations=6)
    assert code == 0, err
    rows = [row for row in sweep.read_rows(tmp_path / "runs/small") if "ended" not in row]
    assert all(row["lr_used"] == pytest.approx(row["values"]["training.lr"]) for row in rows)
    assert all(0.05 <= row["values"]["training.clip"] <= 0.4 for row in rows)
    tried = {
        name: {row["values"]["training.lr"] for row in rows if row["trial"] == name}
        for name in {r["trial"] for r in rows}
    }
    assert len(tried) == 4 and any(len(values) > 1 for values in tried.values()), "somebody copied somebody"


def test_a_restored_optimizer_has_the_learning_rate_of_its_own_trial(ray_session, tmp_path):
    tree, home = {k: v for k, v in RUN.items() if k != "track"}, storage.place(str(tmp_path))
    told = Told({**tree, "iterations": 2}, home, os.getcwd(), Objective({"reward": 1.0}))
    donor, copier = Trial.__new__(Trial), Trial.__new__(Trial)
    try:
        donor.setup({"training.lr": 1e-2, "training.weight_decay": 0.1}, told=told)
        donor._iteration = 1
        donor.row = donor.step()
        donor.save_checkpoint(str(tmp_path / "donor"))
        copier.setup({"training.lr": 1e-4}, told=told)
        copier.load_checkpoint(str(tmp_path / "donor"))
        assert copier.wrong is None and copier.algo.iteration == 2
        learner = copier.algo.learner_group._learner
        for name in ("denoiser.", "reference."):
            pair = [trial.algo.learner_group.get_weights()[DEFAULT_MODULE_ID] for trial in (donor, copier)]
            for key in (key for key in pair[0] if key.startswith(name)):
                np.testing.assert_array_equal(pair[0][key], pair[1][key])
        group = learner.get_optimizers_for_module(DEFAULT_MODULE_ID)[0][1].param_groups[0]
        assert (group["lr"], group["weight_decay"]) == (1e-4, 0.0)
        assert copier.step()["lr_used"] == 1e-4
        assert copier.row["paid"] == {"evaluate": 256} and "again" not in copier.row, (
            "what the donor paid is the donor's"
        )
        donor.load_checkpoint(str(tmp_path / "donor"))
        assert donor.step()["again"] and donor.row["done"] and not donor.row["paid"], "its end was told already"
    finally:
        donor.cleanup()
        copier.cleanup()


def test_trials_of_a_shared_bank_pay_for_one(ray_session, tmp_path):
    training = {"chains": 128, "minibatch_size": 128, "num_candidates": 4, "radius": 1.0}
    space = {"training.temperature": {"grid": [1.0, 3.0]}, "training.radius": {"grid": [0.5, 1.0]}}
    more = {"algorithm": "rgdm", "training": training, "reward": "quadratic", "iterations": 8}
    code, out, err = tuned(
        tmp_path, {"space": space, "objective": "reward"}, **more, evaluate={**RUN["evaluate"], "every": 4}
    )
    assert code == 0, out + err
    rows = sweep.read_rows(tmp_path / "runs/small")
    assert sweep.paid(rows)["payoff"] == 8 * 128 * 4, "as many calls as one run makes"
    assert len(list((tmp_path / "runs/small/bank").glob("shard_*.arrow"))) == 8
    radii = json.loads((tmp_path / "runs/small/bank/manifest.json").read_text())["radii"]
    assert radii == [0.5, 1.0]
    (told,) = (tmp_path / "runs/small").glob("signal-*.json")
    assert len(json.loads(told.read_text())) == 10
    assert "What limits a pay-off" in (tmp_path / "runs/small/report.html").read_text()
    calls = sweep.paid(rows)["pretrained"] - RUN["evaluate"]["pretrained_chains"]
    assert 0 < calls <= 1000, "the signal is read once"
    best = yaml.safe_load((tmp_path / "runs/small/best.yaml").read_text())
    assert "bank" not in best["training"] and "radii" not in best["training"]


def test_a_trial_that_fails_says_why_and_the_others_go_on(ray_session, tmp_path):
    (tmp_path / "moods.py").write_text(REWARD)
    reward = {"name": "./moods.py:Moody"}
    space = {"reward.mood": {"grid": ["fine", "dull", "bad"]}}
    code, out, _ = tuned(tmp_path, {"space": space, "scheduler": "none", "objective": "attained"}, reward=reward)
    assert code == 0, out
    found = {one.values["reward.mood"]: one for one in sweep.outcomes(sweep.read_rows(tmp_path / "runs/small"), True)}
    assert found["fine"].status == "finished" and np.isfinite(found["fine"].objective)
    assert found["bad"].status == "failed" and "no such receptor" in found["bad"].reason
    assert np.isnan(found["dull"].objective) and found["dull"].reason.startswith("no attained: ")
    assert out.count("no such receptor") >= 2, "in its line and below the table"


def test_where_all_trials_fail_the_command_fails_with_the_reason(ray_session, tmp_path):
    (tmp_path / "moods.py").write_text(REWARD)
    reward = {"name": "./moods.py:Moody", "mood": "bad"}
    code, _, err = tuned(tmp_path, {"space": LR, "trials": 1, "objective": "reward"}, reward=reward)
    assert code == 2
    assert err.splitlines()[-1].startswith("rayft: all 1 trials failed: ") and "no such receptor" in err


def test_a_trial_past_its_kl_budget_is_stopped(ray_session, tmp_path):
    tree = {**RUN, "evaluate": {**RUN["evaluate"], "max_kl": 1e-6}}
    trial = Trial.__new__(Trial)
    try:
        trial.setup({}, told=Told(tree, storage.place(str(tmp_path)), os.getcwd(), Objective({"reward": 1.0})))
        row = trial.step()
    finally:
        trial.cleanup()
    assert (row["done"], row["status"], row["score"]) == (True, "stopped", UNKNOWN)
    assert row["iteration"] <= 2 and "over the budget evaluate.max_kl" in row["reason"]


def test_fewer_cpus_than_a_trial_needs_are_said_at_once(ray_session, tmp_path):
    began = time.monotonic()
    code, _, err = tuned(tmp_path, {"space": LR, "trials": 2}, resources={"num_env_runners": 8})
    assert code == 2 and "one trial needs 9 CPU and Ray has 4 CPU" in err
    assert time.monotonic() - began < 10 and not (tmp_path / "runs").exists()
    more = {"algorithm": "rgdm", "training": {"payoff_actors": 7, "chains": 64, "minibatch_size": 64}}
    code, _, err = tuned(tmp_path, {"space": LR, "trials": 2}, **more)
    assert code == 2 and "one trial needs 8 CPU and Ray has 4 CPU" in err


# -- what is killed


def begun(folder, ready, *overrides):
    """A sweep in a process of its own, as soon as ``ready(rows)`` holds."""
    search = {"space": LR, "trials": 4, "scheduler": "none", "max_concurrent": 2, "objective": "attained"}
    path = written(folder, search, iterations=12)
    command = [sys.executable, "-m", "rayft.cli", "tune", str(path), f"output={folder / 'runs'}", *overrides]
    told = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": folder}
    process = subprocess.Popen(command, env={**os.environ, "RAY_ADDRESS": "local"}, **told)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if ready(sweep.read_rows(folder / "runs/small")):
            return process
        time.sleep(0.02)
    process.kill()
    raise AssertionError("the sweep ended before the moment came: " + "".join(process.communicate()))


def in_the_middle(rows):
    """One trial has ended and another is on its way."""
    ended = {row["trial"] for row in rows if "ended" in row}
    return ended and any(row["step"] >= 2 for row in rows if "ended" not in row and row["trial"] not in ended)


def check_resumed(folder, num_before):
    rows = sweep.read_rows(folder)
    before, after = rows[:num_before], rows[num_before:]
    found = sweep.outcomes(rows, ended=True)
    assert [one.status for one in found] == ["finished"] * 4
    steps = {one.name: {row["step"] for row in one.steps} for one in found}
    assert steps == {name: set(range(1, 7)) for name in steps}, "every trial, every step"
    reached = {
        name: max(row["step"] for row in before if row["trial"] == name and "step" in row)
        for name in {r["trial"] for r in before}
    }
    again = {name: [row["step"] for row in after if row["trial"] == name and "step" in row] for name in reached}
    for name, numbers in again.items():
        assert not numbers or min(numbers) >= reached[name] - 1, f"{name} began again"
    twice = {(row["trial"], row["step"]): row["objective"] for row in before if "step" in row}
    repeated = [row for row in after if (row["trial"], row.get("step")) in twice]
    assert all(twice[row["trial"], row["step"]] == row["objective"] for row in repeated)
    assert len(pq.read_table(folder / "trials.parquet")) == 4


@pytest.mark.slow
def test_a_killed_sweep_resumes_and_counts_every_trial_once(ray_session, tmp_path, capfd):
    process = begun(tmp_path, in_the_middle)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    folder = tmp_path / "runs/small"
    num = len(sweep.read_rows(folder))
    assert main(["tune", "--resume", str(folder)]) == 0, capfd.readouterr().err
    check_resumed(folder, num)
    assert json.loads((folder / "sweep.json").read_text())["status"] == "finished"


@pytest.mark.slow
def test_ctrl_c_saves_a_sweep_and_says_how_to_resume(ray_session, tmp_path, capfd):
    process = begun(tmp_path, in_the_middle)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    folder = tmp_path / "runs/small"
    assert process.returncode == 130 and f"rayft tune --resume {folder}" in err and "Traceback" not in err
    assert json.loads((folder / "sweep.json").read_text())["status"] == "interrupted"
    num = len(sweep.read_rows(folder))
    assert main(["tune", str(tmp_path / "small.yaml"), f"output={tmp_path / 'runs'}", "--resume"]) == 0
    check_resumed(folder, num)


@pytest.mark.slow
def test_a_trial_whose_process_is_killed_goes_on_from_its_checkpoint(ray_session, tmp_path):
    import threading

    folder = tmp_path / "runs/small"

    def kill():
        while len(rows := [row for row in sweep.read_rows(folder) if "ended" not in row]) < 3:
            time.sleep(0.02)
        os.kill(rows[-1]["process"], signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    code, _, err = tuned(tmp_path, {"space": LR, "trials": 1, "objective": "attained"}, iterations=20)
    assert code == 0, err
    only = sweep.outcomes(sweep.read_rows(folder), ended=True)[0]
    assert only.status == "finished" and {row["step"] for row in only.steps} == set(range(1, 11))
    assert len({row["process"] for row in only.steps}) == 2


@pytest.mark.slow
def test_optuna_suggests_within_the_space(ray_session, tmp_path):
    pytest.importorskip("optuna")
    search = {
        "space": LR,
        "trials": 5,
        "scheduler": "none",
        "sampler": "optuna",
        "objective": {"reward": 0.7, "diversity": 0.3},
    }
    code, _, err = tuned(tmp_path, search, "search.max_concurrent=2")
    assert code == 0, err
    found = sweep.outcomes(sweep.read_rows(tmp_path / "runs/small"), ended=True)
    assert len(found) == 5 and len({one.values["training.lr"] for one in found}) == 5
    for one in found:
        assert 1e-4 <= one.values["training.lr"] <= 1e-2
        assert one.objective == pytest.approx(0.7 * one.best["reward"] + 0.3 * one.best["diversity"])
    assert Path(tmp_path / "runs/small/best/card.json").is_file()
