"""Every algorithm on molecules (QED) and on shapes (helicopters), from the shipped weights, one seed each.

    python -m benchmarks.table_every                     works the queue off; a finished run is not run again
    python -m benchmarks.table_every --only shapes       runs whose names contain a word
    python -m benchmarks.table_every --show              prints what is there

A row is a shipped config as it is, but for the size of its last evaluation. valid: of all that was drawn, the share
that decodes; unique: of the molecules, the share of different ones; of the clouds, the share whose nearest other is not
under half as far as the pretrained model's clouds lie from theirs, in the median.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import _result
from envs.shapes import decode
from envs.shapes.distances import pairwise_chamfer
from envs.shapes.metrics import boxed
from rayft import store
from rayft.verdict import Samples

RUNS, RESULTS = Path("runs/table_every"), _result.RESULTS / "table_every"
ALGORITHMS = ("rgdm", "rwmle", "ppo", "grpo", "pcl", "forward", "backprop")
SAMPLERS = ("rgdm_importance", "rgdm_gradient", "rgdm_annealing")  # R's candidates, of x0_hat; of clouds alone
TASKS = {
    "molecules_qed": (2000, 2000),
    "shapes_helicopter": (512, 1024),
}  # chains of an evaluation, and pretrained ones
QUICK = ["iterations=1", "training.chains=64", "training.minibatch_size=64", "training.microbatches=1"]
SHOWN = ("reward", "frontier_share", "kl", "valid", "unique", "diversity", "calls", "minutes")
COMPARED = 256  # clouds that are held against each other


@dataclass(frozen=True)
class Row:
    """A shipped config, and the file that its numbers are kept in."""

    task: str
    algorithm: str

    @property
    def name(self) -> str:
        return f"{self.task}_{self.algorithm}"

    @property
    def file(self) -> Path:
        return RESULTS / f"{self.name}.json"


QUEUE = (
    *(Row(task, algorithm) for task in TASKS for algorithm in ALGORITHMS),
    *(Row("shapes_helicopter", sampler) for sampler in SAMPLERS),
)


def main() -> None:
    parser = _result.arguments(__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="runs whose names contain one of these words")
    parser.add_argument("--show", action="store_true", help="print what is there, run nothing")
    told = parser.parse_args()
    for row in QUEUE:
        wanted = not told.only or any(word in row.name for word in told.only)
        if wanted and not told.show and (told.quick or not row.file.is_file()):
            print(row.name, flush=True)
            found = work(row, told.quick)
            if told.quick:
                print(found)
                return
            RESULTS.mkdir(parents=True, exist_ok=True)
            store.write_text(row.file, json.dumps(found, indent=1) + "\n")
    result = _result.Result("table_every", tell())
    result.write(_result.folder(told) if result.figures and not told.show else None)


def work(row: Row, quick: bool) -> dict[str, Any]:
    """The run, begun or resumed, and its last numbers beside the pretrained model's."""
    run, chains = RUNS / f"{row.name}{'_quick' * quick}", (32, 64) if quick else TASKS[row.task]
    if quick:
        shutil.rmtree(run, ignore_errors=True)
    told = [f"evaluate.chains={chains[0]}", f"evaluate.pretrained_chains={chains[1]}", *(QUICK if quick else [])]
    begun = ["--resume", str(run)] if (run / "config.yaml").is_file() else [row.name, f"name={run.name}", *told]
    output = [] if begun[0] == "--resume" else [f"output={run.parent}"]
    subprocess.run([sys.executable, "-m", "rayft.cli", "run", *begun, *output, "--quiet"], check=True)
    with (run / "metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    before, after = (Samples.load(path) for path in evaluations(run))
    distance = scale(before) if row.task.startswith("shapes") else None
    found = {"after": looked_at(after, distance), "before": looked_at(before, distance)}
    share = float(last.get("evaluate/frontier_share") or "nan")  # none where the pretrained weights were kept
    found["after"] |= {"frontier_share": share, "calls": float(last["reward_calls"])}
    found = {name: {k: v for k, v in told.items() if math.isfinite(v)} for name, told in found.items()}
    return {**found, "minutes": float(last["time_s"]) / 60, "versions": store.versions()}


def evaluations(run: Path) -> tuple[Path, Path]:
    """(the pretrained model's, the last one of the policy)."""
    folder = run / "evaluations"
    return folder / "pretrained.npz", max(folder.glob("iteration_*.npz"))


def looked_at(samples: Samples, distance: float | None) -> dict[str, float]:
    """What a person asks of a set; ``distance`` under which two clouds are one."""
    told = {"reward": float(np.nanmean(samples.rewards)), "kl": float(samples.kl.mean())}
    told |= {"valid": 1 - float(samples.undecodable.mean()), "diversity": samples.metrics["diversity"]}
    told["unique"] = samples.metrics["uniqueness"] if distance is None else float((nearest(samples) >= distance).mean())
    told |= {name: float(np.nanmean(column)) for name, column in samples.beside.items() if name.startswith("watch/")}
    return told


def nearest(samples: Samples) -> np.ndarray:
    """From each cloud to the nearest other, in the box."""
    clouds = [cloud for cloud in decode.clouds(samples.x_0[:COMPARED], {}) if cloud is not None]
    some = boxed(clouds)
    between = pairwise_chamfer(some, some, 1)
    np.fill_diagonal(between, np.inf)
    return between.min(1)


def scale(pretrained: Samples) -> float:
    """Half the median of the pretrained model's."""
    return float(np.median(nearest(pretrained))) / 2


def tell() -> dict[str, _result.Figure]:
    """A table for each task; figures are ``shapes_helicopter/ppo/reward`` and so on."""
    figures: dict[str, _result.Figure] = {}
    for task in TASKS:
        done = {
            row.algorithm: json.loads(row.file.read_text()) for row in QUEUE if row.task == task and row.file.is_file()
        }
        lines: list[list[Any]] = []
        for algorithm, found in done.items():
            new = {algorithm: {**found["after"], "minutes": found["minutes"]}}
            for name, told in (new if lines else {"pretrained": found["before"], **new}).items():
                lines.append([name, *(f"{told[column]:.4g}" if column in told else "" for column in SHOWN)])
                figures |= {f"{task}/{name}/{column}": _result.Figure(value) for column, value in told.items()}
        if lines:
            _result.show(task, ("", *SHOWN), lines, "One seed. unique, of clouds: no other nearer than half the usual.")
    return figures


if __name__ == "__main__":
    main()
