"""Every command of ``rayft`` on one small run, from an empty folder, in terminals and pipes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

from rayft import domain, spec, store
from rayft.cli import main
from rayft.table import Table

SMALL = [
    "iterations=2",
    "training.chains=64",
    "training.minibatch_size=128",
    "chain.num_steps=10",
    "evaluate.every=0",
    "evaluate.chains=512",
    "evaluate.pretrained_chains=2048",
]
COMMANDS = ["run", "evaluate", "sample", "score", "import", "export", "report", "pretrain", "configs", "doctor"]
COMMANDS += ["submit", "status", "stop", "logs"]


@pytest.fixture(scope="module")
def finished(ray_session, tmp_path_factory):
    """(run folder, standard output, standard error) of `rayft run toy_ppo` in an empty folder."""
    here = tmp_path_factory.mktemp("empty")
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(here)
        assert main(["run", "toy_ppo", *SMALL]) == 0, err.getvalue()
    assert [path.name for path in here.iterdir()] == ["runs"]
    return here / "runs/toy_ppo", out.getvalue(), err.getvalue()


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    """The run's folder, seen from another one."""
    monkeypatch.chdir(tmp_path)
    return finished[0]


# -- rayft run


def test_a_run_leaves_everything_in_its_folder(finished):
    run, _, said = finished
    here = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    wanted = {"config.yaml", "run.json", "metrics.csv", "metrics.parquet", "report.html"}
    wanted |= {f"checkpoints/iteration_000002/{name}" for name in ("card.json", "weights.safetensors")}
    wanted |= {"checkpoints/iteration_000002/ema.safetensors", "checkpoints/best.json"}
    wanted |= {"evaluations/pretrained.npz", "evaluations/iteration_000002.npz"}
    assert wanted <= here
    assert any(name.startswith("tensorboard/events.out.tfevents") for name in here)
    assert any(name.startswith("checkpoints/iteration_000002/rllib/") for name in here)
    told = json.loads((run / "run.json").read_text())
    assert (told["status"], told["seed"], told["algorithm"], told["domain"]) == ("finished", 0, "ppo", "toy")
    assert {"python", "rayft", "ray", "torch"} <= set(told["versions"]) and told["seconds"] > 0
    assert said == "report: runs/toy_ppo/report.html\n"


def test_without_a_terminal_every_iteration_is_a_line_of_json_and_the_end_a_table(finished):
    _, out, _ = finished
    lines, table = out.splitlines()[:2], out.splitlines()[2:]
    rows = [json.loads(line) for line in lines]
    assert [row["iteration"] for row in rows] == [1, 2]
    assert all(row["iterations"] == 2 and np.isfinite(row["reward_mean"]) for row in rows)
    assert rows[-1]["evaluate/kl"] > 0 and rows[-1]["evaluate/effective_sample_size"] > 0
    assert "before and after" in table[0]
    for word in ("reward", "KL", "attained", "J*", "diversity"):
        assert any(word in line for line in table), word
    assert "\x1b" not in out


def test_the_parquet_file_holds_the_rows_of_the_csv(finished):
    run = finished[0]
    rows, found = Table(run / "metrics.csv").rows, pq.read_table(run / "metrics.parquet")
    assert found.num_rows == len(rows) == 2
    for number, line in enumerate(found.to_pylist()):
        kept = {k: v for k, v in line.items() if v is not None}
        assert kept.keys() == rows[number].keys()
        np.testing.assert_array_equal(list(kept.values()), [rows[number][k] for k in kept])


def test_the_run_keeps_the_whole_config(finished):
    told = yaml.safe_load((finished[0] / "config.yaml").read_text())
    assert told == spec.read("toy_ppo", SMALL).full()
    assert told["training"]["clip"] == 0.2, "defaults are written too"


def test_resuming_what_is_finished_changes_nothing(run, capfd):
    weights = store.newest(run).weights()
    rows = (run / "metrics.csv").read_text()
    assert main(["run", "--resume", str(run), "--quiet"]) == 0
    assert "resumed toy_ppo at iteration 2" in capfd.readouterr().err
    assert (run / "metrics.csv").read_text() == rows
    for name, value in store.newest(run).weights().items():
        np.testing.assert_array_equal(value, weights[name])


def test_a_finished_run_goes_on_with_more_iterations_and_an_override_may_follow_an_option(run, tmp_path, capfd):
    shutil.copytree(run, tmp_path / "more/toy_ppo")
    told = ["run", "toy_ppo", "--quiet", *SMALL[1:], "--resume", "--trust", "output=more", "iterations=3"]
    assert main(told) == 0
    out, err = capfd.readouterr()
    assert out.lstrip().startswith("before and after"), "quiet: only the table"
    assert re.fullmatch(r"(.*differ.*\n)?resumed toy_ppo at iteration 2\nreport: more/toy_ppo/report.html\n", err)
    assert [row["iteration"] for row in Table(tmp_path / "more/toy_ppo/metrics.csv").rows] == [1, 2, 3]


def test_a_dry_run_starts_and_writes_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    asked = ["resources.num_env_runners=2", "scoring.actors=3", "scoring.num_cpus_per_actor=0.5"]
    assert main(["run", "toy_ppo", "--dry-run", *asked]) == 0
    out, err = capfd.readouterr()
    assert "2 x runners: 1 CPU, 0 GPU each" in out and "3 x reward actors: 0.5 CPU" in out
    assert "learners: in the driver" in out and "9,218 weights" in out
    assert err == ""
    assert main(["run", "toy_rgdm", "--dry-run", "training.payoff_actors=2"]) == 0
    assert "2 x pay-off actors: 1 CPU, 0 GPU each" in capfd.readouterr().out
    assert main(["run", "toy_rgdm", "--dry-run", "training.payoff_actors=2", "scoring.resources={reward: 0.5}"]) == 0
    assert "2 x pay-off actors: 1 CPU, 0 GPU, 0.5 reward each" in capfd.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_in_a_terminal_a_bar_shows_how_far_it_is(tmp_path):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "rayft.cli", "run", "toy_ppo", *SMALL, "output=out"]
    told = {**os.environ, "TERM": "xterm", "COLUMNS": "160"}
    process = subprocess.Popen(command, cwd=tmp_path, stdout=theirs, stderr=theirs, stdin=theirs, env=told)
    os.close(theirs)
    seen = read_all(ours, process)
    assert process.wait() == 0, seen
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen)
    assert "2/2" in plain and "━" in plain
    assert re.search(r"reward -\d\.\d+ +kl ", plain) and "chains/s" in plain
    assert "before and after" in plain and "report: out/toy_ppo/report.html" in plain
    assert '{"iteration"' not in plain
    assert seen.count("\x1b[") > 10, "colours and a bar that is drawn again"


def read_all(terminal, process):
    seen, deadline = b"", time.monotonic() + 120
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                seen += os.read(terminal, 65536)
            except OSError:  # the other end is closed
                break
        elif process.poll() is not None:
            break
    return seen.decode(errors="replace")


# -- what is done with a run afterwards


def test_evaluate_prints_its_numbers_as_json_and_as_a_table(run, capfd):
    told = ["evaluate", str(run), "--chains", "1024", "--pretrained-chains", "2048"]
    assert main([*told, "--json"]) == 0
    first = json.loads(capfd.readouterr().out)
    assert first["attained_low"] <= first["attained"] <= first["attained_high"]
    assert first["kl"] > 0 and first["undecodable"] == 0
    row = Table(run / "metrics.csv").rows[-1]
    for name in ("reward", "reward_pretrained", "optimum"):
        assert first[name] == pytest.approx(row[f"evaluate/{name}"], abs=0.2), name
    assert main([*told, "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == first, "the same seed draws the same samples"
    assert main([*told, "--json", "--seed", "1"]) == 0
    assert json.loads(capfd.readouterr().out)["reward"] != first["reward"]
    assert main([*told, "--alpha", "2"]) == 0
    out = capfd.readouterr().out
    assert "before and after" in out and f"{first['reward']:.4f}" in out and f"{first['optimum']:.4f}" not in out


def test_sample_writes_what_the_reward_says_of_each(run, tmp_path, capfd):
    assert main(["sample", str(run), "--num", "20", "--score", "--out", "drawn.npz"]) == 0
    assert capfd.readouterr().out == "20 samples in drawn.npz: x_0, reward\n"
    with np.load("drawn.npz") as found:
        x_0, rewards = found["x_0"], found["reward"]
    assert x_0.shape == (20, 2) and x_0.std() > 0.1
    np.testing.assert_allclose(rewards, -0.5 * np.square(x_0 - [0.8, 0.6]).sum(-1), rtol=1e-6)
    assert main(["sample", str(run / "checkpoints/iteration_000002"), "--num", "20", "--out", "again"]) == 0
    with np.load("again") as found:
        assert found.files == ["x_0"]
        np.testing.assert_array_equal(found["x_0"], x_0)
    assert {path.name for path in tmp_path.iterdir()} == {"drawn.npz", "again"}


def test_a_checkpoint_may_be_scored_with_another_reward_and_other_arguments(run, capfd):
    for out, more in (("own", ["--score"]), ("moved", ["--score", "reward.centre=[0,0]"])):
        assert main(["sample", str(run), "--num", "20", "--out", f"{out}.npz", *more]) == 0
    assert main(["sample", str(run), "--num", "20", "--out", "other.npz", "--reward", "stripes"]) == 0
    with np.load("own.npz") as own, np.load("moved.npz") as moved, np.load("other.npz") as other:
        np.testing.assert_array_equal(own["x_0"], moved["x_0"])
        np.testing.assert_allclose(moved["reward"], -0.5 * np.square(moved["x_0"]).sum(-1), rtol=1e-6)
        assert not np.allclose(own["reward"], other["reward"])


def test_a_checkpoint_is_guided_by_its_own_reward_which_need_not_score_what_is_drawn(run, capfd):
    told = ["sample", str(run), "--num", "20", "--out"]
    assert main([*told, "plain.npz", "--score"]) == 0
    assert main([*told, "best.npz", "--guide", "best_of_n", "guide.n=8", "--score"]) == 0
    assert main([*told, "one.npz", "--guide", "best_of_n", "guide.n=1"]) == 0
    said = "20 samples in best.npz: x_0, reward; guided by best_of_n, 160 reward calls\n"
    assert capfd.readouterr().out.endswith(f"{said}20 samples in one.npz: x_0; guided by best_of_n, 20 reward calls\n")
    with np.load("plain.npz") as plain, np.load("best.npz") as best, np.load("one.npz") as one:
        assert best["reward"].mean() > plain["reward"].mean() + 0.5
        np.testing.assert_array_equal(one["x_0"], plain["x_0"])


def test_a_checkpoint_keeps_its_chain_and_a_device_is_not_replaced_by_a_file(run, capfd):
    assert main(["sample", str(run), "--num-steps", "5"]) == 2
    assert "a checkpoint is sampled with the chain that it was trained on" in capfd.readouterr().err
    assert main(["sample", str(run), "--num", "4", "--out", os.devnull]) == 2
    assert "it is a device; give the name of a file" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "read"), [("net.pt", lambda p: torch.load(p, weights_only=True)), ("net.safetensors", load_file)]
)
def test_export_gives_a_state_dict_that_the_network_loads(run, name, read):
    assert main(["export", str(run), name]) == 0
    net = domain.build("toy", {}).denoiser()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net.load_state_dict(read(name))
    for key, value in store.load(run).weights().items():
        np.testing.assert_array_equal(net.state_dict()[key].numpy(), value)
    assert any(not torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert main(["run", "toy_ppo", f"weights={name}", "--dry-run"]) == 0, "a run can start from it"


def test_report_writes_the_page_again_from_the_files(run, tmp_path, capfd):
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "report.html").unlink()
    shutil.rmtree(copy / "checkpoints")
    assert main(["report", str(copy)]) == 0
    assert capfd.readouterr().out.strip() == str(copy / "report.html")
    page = (copy / "report.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html") and "toy_ppo" in page


OFFLINE = """
import json, sys
found = []
own = ("rayft", "numpy")  # what the process that scores says
def note(event, told):
    if event == "pickle.find_class" and not told[0].startswith(own):
        found.append(told)
sys.addaudithook(note)
from rayft.cli import main

run, card = sys.argv[1:]
codes = [
    main(["evaluate", card, "--chains", "64", "--pretrained-chains", "64", "--json"]),
    main(["sample", card, "--num", "4", "--score"]),
    main(["export", card, "net.pt"]),
    main(["report", run]),
]
assert codes == [0, 0, 0, 0], codes
assert found == [], found
import pickle
pickle.loads(pickle.dumps(json.JSONDecoder))
assert found == [("json.decoder", "JSONDecoder")], "the hook is deaf"
"""


def test_everything_but_resuming_opens_no_pickle_and_needs_no_yaml(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    alone = shutil.copytree(run / "checkpoints/iteration_000002", tmp_path / "checkpoint")
    shutil.rmtree(alone / "rllib")
    command = [sys.executable, "-c", OFFLINE, str(copy), str(alone)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""


# -- the rest


def test_configs_are_listed_and_copied_and_run_from_the_copy(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(["configs"]) == 0
    listed = {line.split()[0]: line.split(maxsplit=1)[1] for line in capfd.readouterr().out.splitlines()}
    assert listed.keys() == spec.configs().keys() and "toy_ppo" in listed
    assert "PPO on a mixture of Gaussians" in listed["toy_ppo"]
    assert main(["configs", "--copy", "a/b"]) == 0
    assert {path.stem for path in (tmp_path / "a/b").iterdir()} == set(listed)
    assert main(["run", "a/b/toy_ppo.yaml", "--dry-run"]) == 0
    (tmp_path / "a/b/toy_ppo.yaml").rename(tmp_path / "a/toy_ppo.yaml")
    before = {path: path.read_bytes() for path in (tmp_path / "a").rglob("*.yaml")}
    assert main(["configs", "--copy", "a"]) == 2, "one is there already: none is copied"
    assert {path: path.read_bytes() for path in (tmp_path / "a").rglob("*.yaml")} == before


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: rayft {command}") and len(out.splitlines()) > 4


def test_the_module_explains_itself_at_once(tmp_path):
    done = subprocess.run([sys.executable, "-m", "rayft.cli", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    for command in COMMANDS:
        assert command in done.stdout


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "rayft.cli", "configs"], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")
