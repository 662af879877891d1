"""The README does what it says: its examples run, its map leads to code and tests that exist."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rayft import imports
from rayft.table import Table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def example(name):
    """The code block that follows ``<!-- example: name -->``."""
    found = re.search(rf"<!-- example: {re.escape(name)} -->\n```\w+\n(.*?)```", README, re.DOTALL)
    assert found, f"the README has no example {name!r}"
    return found.group(1)


def run(*command, cwd):
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_python_example_runs_and_learns(tmp_path):
    (tmp_path / "example.py").write_text(example("python"))
    lines = run("example.py", cwd=tmp_path).splitlines()
    rewards = [float(line) for line in lines if re.fullmatch(r"-?\d+\.\d+", line)]
    assert len(rewards) == 10
    assert rewards[-1] > rewards[0] + 0.5
    assert any(line.startswith("attained:") for line in lines)


def test_the_yaml_example_runs(tmp_path):
    (tmp_path / "my.yaml").write_text(example("yaml"))
    small = ["iterations=2", "training.chains=512", "evaluate.chains=256", "evaluate.pretrained_chains=512"]
    run("-m", "rayft.cli", "run", "my.yaml", *small, cwd=tmp_path)
    assert (tmp_path / "runs/my/report.html").is_file()


def test_the_conditions_example_runs(tmp_path):
    (tmp_path / "asked.yaml").write_text(example("conditions"))
    small = ["iterations=2", "training.chains=256", "evaluate.chains=256", "evaluate.pretrained_chains=512", "--quiet"]
    run("-m", "rayft.cli", "run", "asked.yaml", *small, cwd=tmp_path)
    assert (tmp_path / "runs/asked/report.html").is_file()


def test_the_rewards_example_runs_and_pays_nothing_the_second_time(tmp_path):
    (tmp_path / "mine.yaml").write_text(example("rewards"))
    small = ["iterations=2", "training.chains=128", "training.minibatch_size=256"]
    small += ["evaluate.chains=128", "evaluate.pretrained_chains=256", "--quiet"]
    for _ in range(2):
        run("-m", "rayft.cli", "run", "mine.yaml", *small, cwd=tmp_path)
    tables = [Table(tmp_path / "runs" / name / "metrics.csv") for name in ("mine", "mine-2")]
    first, second = (table.last("reward_calls", -1.0) for table in tables)
    assert first > 2 * (256 + 2 * 128)
    assert second == 0


@pytest.mark.slow
def test_the_sweep_example_runs_and_its_best_trial_is_a_run(tmp_path):
    (tmp_path / "my.yaml").write_text(example("sweep"))
    small = ["training.chains=512", "evaluate.chains=512", "evaluate.pretrained_chains=2048", "--quiet"]
    run("-m", "rayft.cli", "tune", "my.yaml", *small, cwd=tmp_path)
    assert (tmp_path / "runs/my/report.html").is_file() and (tmp_path / "runs/my/best/card.json").is_file()
    run("-m", "rayft.cli", "run", "runs/my/best.yaml", "iterations=2", cwd=tmp_path)


def test_a_plain_module_and_a_reward_function_in_one_file_are_fine_tuned_and_exported(tmp_path):
    source = example("file digits.py")
    assert len(source.splitlines()) <= 40
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    (home / "digits.py").write_text(source)
    net = imports.load(f"{home / 'digits.py'}:Net")()
    torch.save(net.state_dict(), home / "net.pt")
    small = ["iterations=2", "training.chains=16", "chain.num_steps=8", "training.minibatch_size=64"]
    small += ["evaluate.chains=32", "evaluate.pretrained_chains=64"]
    run("-m", "rayft.cli", "run", str(home / "digits.py"), *small, cwd=elsewhere)
    run("-m", "rayft.cli", "export", "runs/digits", "tuned.pt", cwd=elsewhere)
    tuned = torch.load(elsewhere / "tuned.pt", weights_only=True)
    assert any((tuned[k] != v).any() for k, v in net.state_dict().items()), "nothing was trained"
    net.load_state_dict(tuned)
    again = [*small, "iterations=1", "weights=./tuned.pt", "name=again"]
    run("-m", "rayft.cli", "run", str(home / "digits.py"), "--dry-run", *again, cwd=elsewhere)


def test_every_line_of_the_paper_map_leads_to_a_function_and_its_test():
    rows = re.findall(r"^\| [RT] .*? \| `(.+?)` \| `(.+?)` \|$", README, re.MULTILINE)
    assert len(rows) >= 12
    for path, test in rows:
        module, _, names = path.partition(":")
        first, _, rest = names.partition(".")
        found = imports.load(f"{module}:{first}")
        for name in filter(None, rest.split(".")):
            found = getattr(found, name)
        assert callable(found), path
        text = (ROOT / test).read_text()
        assert (rest or first) in text or module.rpartition(".")[2] in text, f"{test} does not speak of {path}"


def test_every_measured_figure_of_the_readme_is_the_benchmark_s():
    figures = {}
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        figures |= json.loads(path.read_text())
    rows = re.findall(r"^\| .+? \| `([a-z/0-9._]+)` \| ([0-9.]+) \|", README, re.MULTILINE)
    assert len(rows) >= 10
    for name, printed in rows:
        digits = len(printed.partition(".")[2])
        assert float(printed) == pytest.approx(figures[name], abs=0.51 * 10**-digits), name


def test_every_figure_of_a_table_with_several_columns_is_too():
    figures, num = {}, 0
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        figures |= json.loads(path.read_text())
    tables = re.findall(r"^\| [^|]+((?: \| `[a-z_/]+`){2,}) \|\n\|[-|]+\|\n((?:\|.+\n)+)", README, re.MULTILINE)
    for head, body in tables:
        columns = re.findall(r"`([a-z_/]+)`", head)
        rows = re.findall(r"^\| .*`([a-z_/]+)/\.\.\.` \| (.+) \|$", body, re.MULTILINE)
        assert len(rows) == body.count("\n"), body
        for prefix, cells in rows:
            for column, printed in zip(columns, cells.split(" | "), strict=True):
                digits, num = len(printed.partition(".")[2]), num + 1
                assert float(printed) == pytest.approx(figures[f"{prefix}/{column}"], abs=0.51 * 10**-digits), prefix
    assert num >= 60


@pytest.mark.parametrize("target", re.findall(r"^    make ([a-z-]+)", README, re.MULTILINE))
def test_every_make_target_of_the_readme_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
