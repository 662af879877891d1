"""The benchmarks run, and write what they promise."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def figures(name: str, out: Path) -> dict[str, float]:
    """The numbers of ``python -m benchmarks.NAME --quick``, every one of them finite."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads((out / f"{name}.json").read_text())
    assert told.pop("machine")["cpus"] >= 1
    assert told.pop("versions")["ray"].startswith("2.")
    assert all(math.isfinite(value) for value in told.values())
    for figure in (key.removesuffix("/low") for key in told if key.endswith("/low")):
        assert told[f"{figure}/low"] <= told[figure] <= told[f"{figure}/high"]
    return told


def test_the_overhead_benchmark_runs_and_no_ratio_is_absurd(tmp_path: Path):
    told = figures("overhead", tmp_path)
    assert told["runner/local/wide"] > 0.6 and told["learner/update"] > 0.5
    assert told["runner/remote/wide"] > 0.2
    assert told["runner/local/small"] > 0.5


@pytest.mark.slow
def test_the_optimum_benchmark_runs_and_nothing_exceeds_the_ceiling(tmp_path: Path):
    told = figures("optimum", tmp_path)
    ceiling = told["attained/exact_ceiling/0.5"]
    assert ceiling == pytest.approx(0.983, abs=0.003)
    for algorithm in ("ceiling", "ppo", "rwmle"):
        assert 0 < told[f"attained/{algorithm}/0.5"] < ceiling + 0.005
        assert told[f"seconds/{algorithm}"] > 0
    assert told["frontier/rgdm/best"] > 0
    assert "<svg" in (tmp_path / "optimum.svg").read_text()
