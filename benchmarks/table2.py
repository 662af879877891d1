"""R's Table 2 on the heavy-atom model: every way to a higher QED or synth, from the same weights, in one table.

A queue: each row is a run of a shipped config with one seed, resumed where it was stopped, then 10,000 samples of what
came out. A finished row is a file in results/table2/ and is not run again. ``make molecules`` works the queue off, and
``--show`` prints what is there.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks import _result
from benchmarks.molecules import drawn
from envs.molecules import decode, metrics
from envs.molecules.conditional import ConditionalMolecules
from envs.molecules.domain import Molecules
from envs.molecules.qm9 import qm9
from envs.molecules.reward import QED, Synth
from rayft import store

RUNS, NUM, CALLS = Path("runs/table2"), 10_000, 12_288
COLUMNS = ("validity", "uniqueness", "novelty", "qed", "qed_of_all", "sa", "synth", "diversity", "num_scaffolds")
SHOWN = {  # column -> heading
    "validity": "valid",
    "uniqueness": "unique",
    "novelty": "novel",
    "qed": "QED",
    "synth": "synth",
    "diversity": "divers.",
    "kl": "KL",
}
RUN = ("evaluate/kl", "evaluate/frontier_share", "evaluate/attained", "reward_calls", "time_s")


@dataclass(frozen=True)
class Row:
    """One line of the table and one seed of it."""

    name: str
    seed: int
    config: str | None = None  # a shipped config; None: the pretrained model
    of: int = 1  # the best of so many samples, by ``reward``
    reward: str = "qed"
    run: str | None = None  # the row whose run it looks at; its own where none is named
    at: float | None = None  # the conditional model, asked for this QED

    @property
    def folder(self) -> Path:
        return RUNS / f"{self.run or self.name}-{self.seed}"

    @property
    def file(self) -> Path:
        return _result.RESULTS / "table2" / f"{self.name}-{self.seed}.json"


QUEUE = (
    Row("pretrained", 0),
    Row("best_of_12_qed", 0, of=12),
    Row("best_of_12_synth", 0, of=12, reward="synth"),
    *(Row("qed_rgdm", seed, "molecules_qed_rgdm") for seed in range(3)),
    Row("best_of_4_qed_rgdm", 0, "molecules_qed_rgdm", of=4, run="qed_rgdm"),
    *(Row("qed_ppo", seed, "molecules_qed_ppo") for seed in range(3)),
    Row("qed_rwmle", 0, "molecules_qed_rwmle"),
    *(Row(f"synth_{name}", 0, f"molecules_synth_{name}") for name in ("rgdm", "ppo", "rwmle")),
    *(Row(f"conditional_qed_{at}", 0, at=at) for at in (0.55, 0.6)),
)


def main() -> None:
    parser = _result.arguments(__doc__)
    parser.add_argument("--show", action="store_true", help="print what is there, run nothing")
    parser.add_argument("--only", nargs="*", help="names of rows")
    told = parser.parse_args()
    for row in QUEUE:
        if told.show or row.file.is_file() or (told.only and row.name not in told.only):
            continue
        print(f"{row.name}, seed {row.seed}", flush=True)
        found = work(row, 200 if told.quick else NUM)
        if not told.quick:
            row.file.parent.mkdir(parents=True, exist_ok=True)
            store.write_text(row.file, json.dumps(found, indent=1) + "\n")
    show()


def work(row: Row, num: int) -> dict[str, Any]:
    """Runs what has to be run, and looks at the samples of what came out."""
    start, told = time.perf_counter(), {}
    weights = None
    if row.config is not None:
        folder = row.folder
        told = _finished(row, folder)
        weights = folder / "policy.safetensors"
        checkpoint = store.load(folder)
        state = checkpoint.network(checkpoint.domain()).state_dict()
        save_file({k: v.contiguous() for k, v in state.items()}, weights)
    domain = Molecules() if weights is None else Molecules(weights=str(weights))
    if row.at is not None:
        domain = ConditionalMolecules(at=row.at)
    x_0, mask, _ = drawn(domain, num if row.of == 1 else CALLS, "beta", seed=1000 + row.seed, of=row.of)
    samples = decode.heavy(x_0, {"mask": mask})
    if row.of > 1:
        samples = best(samples, row.of, row.reward)
    known = metrics.training_set(qm9("train").smiles)
    summary = metrics.summarise(samples, known=known)
    measured = {name: float(getattr(summary, name)) for name in COLUMNS} | {"num_samples": len(samples)}
    return {**measured, **told, "seconds": time.perf_counter() - start, "versions": store.versions()}


def best(samples: list[Any], of: int, reward: str) -> list[Any]:
    """Of each ``of`` samples, which are of one size, the one that scores most: no training, every sample paid for."""
    score = {"qed": QED, "synth": Synth}[reward]()
    values = np.array([np.nan if v is None else v for v in score([s if s is not None else "" for s in samples])])
    groups = np.nan_to_num(values, nan=0.0)[: len(samples) // of * of].reshape(-1, of)
    return [samples[i * of + j] for i, j in enumerate(groups.argmax(1))]


def _finished(row: Row, folder: Path) -> dict[str, float]:
    """The run of this row, begun, resumed or already there; the last numbers of its table."""
    marks = folder / "run.json"
    if not (marks.is_file() and json.loads(marks.read_text()).get("status") == "finished"):
        told = ["--resume", str(folder)] if (folder / "config.yaml").is_file() else [str(row.config)]
        told += [] if told[0] == "--resume" else [f"seed={row.seed}", f"name={folder.name}", f"output={folder.parent}"]
        subprocess.run([sys.executable, "-m", "rayft.cli", "run", *told, "--quiet"], check=True)
    with (folder / "metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    told = {name.removeprefix("evaluate/"): float(last[name]) for name in RUN if last.get(name)}
    return {name: value for name, value in told.items() if np.isfinite(value)}


def show() -> None:
    """Rows with several seeds as a mean and the half of its 95% interval; ``results/table2`` has the rest."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in QUEUE:
        if row.file.is_file():
            found.setdefault(row.name, []).append(json.loads(row.file.read_text()))
    table = [
        [name, f"{runs[0]['num_samples']:,}", *(_cell([run[c] for run in runs if c in run]) for c in SHOWN)]
        for name, runs in found.items()
    ]
    _result.show("Table 2, heavy atoms", ("row", "samples", *SHOWN.values()), table)


def _cell(values: list[float]) -> str:
    if not values:
        return "-"
    figure = _result.over_seeds(values)
    half = "" if figure.high is None else f" ±{figure.high - figure.value:.2g}"
    return f"{figure.value:.3g}{half}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
