"""R's Table 1 on real shapes: from a model of a whole category to one sub-category, every method from the same weights.

    python -m benchmarks.table1 --data shapes2048.npz        works the queue off; finished rows are not run again
    python -m benchmarks.table1 --show                       prints what is there

The shapes are the Princeton Shape Benchmark's and SHREC'12's, for research only, so they are not part of the package:
an npz with points, label, classes, class_group and name. A row is one process: its model or run, 200 clouds of it, and
their distance to the real shapes of the sub-category; results/table1/ keeps the rows.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import _result
from envs.shapes import decode, metrics
from envs.shapes.data import normalised, split
from envs.shapes.domain import ConditionalShapes, Shapes
from envs.shapes.formats import read
from envs.shapes.reward import LogProbability, Margin
from rayft import domain as domains
from rayft import store
from rayft.bench import Bench
from rayft.chain import Policy, reverse_process, sample
from rayft.guidance.gradient import Guided
from rayft.seeds import torch_generator

DATA = os.environ.get("RAYFT_SHAPES", "shapes2048.npz")
RUNS, RESULTS = Path("runs/table1"), _result.RESULTS / "table1"
NUM, NUM_POINTS, BATCH = 200, 512, 40
GUIDANCE = 0.2  # alpha of TPM
TARGETS = {"aircraft": "Helicopter", "vehicle": "Bus", "seat": "WheelChair"}
TRAINED = ("rgdm", "rgdm_importance", "rgdm_gradient", "rgdm_annealing", "ppo", "rwmle")
METHODS = ("pretrained", "conditional", "tpm", *TRAINED)
OWN = {"rgdm": ["training.lr=1e-3"]}  # real shapes take larger steps than the shipped model
SEEDS = {"aircraft": 3, "vehicle": 1, "seat": 1}
SHORT = {
    "MMD, CD": "mmd_cd",
    "COV, CD": "cov_cd",
    "MMD, EMD": "mmd_emd",
    "COV, EMD": "cov_emd",
    "JSD": "jsd",
    "1-NN, CD": "one_nn",
}
SHOWN = {  # column -> heading, factor, and whether more is better
    "all/mmd_cd": ("MMD CD x10", 10, False),
    "all/mmd_emd": ("EMD x10", 10, False),
    "all/cov_cd": ("COV CD %", 100, True),
    "all/cov_emd": ("EMD %", 100, True),
    "all/jsd": ("JSD", 1, False),
    "hit/voxnet": ("hit %", 100, True),
    "test/mmd_cd": ("test MMD CD x10", 10, False),
    "test/cov_cd": ("COV %", 100, True),
}
PAID = ("evaluate/kl", "evaluate/frontier_share", "reward_calls", "time_s")


@dataclass(frozen=True)
class Row:
    """A method on a category, and one seed of it."""

    category: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.category}-{self.method}-{self.seed}"

    @property
    def file(self) -> Path:
        return RESULTS / f"{self.name}.json"

    @property
    def run(self) -> Path:
        return RUNS / self.name


QUEUE = tuple(Row(c, m, s) for s in range(3) for c, seeds in SEEDS.items() if s < seeds for m in METHODS)


def main() -> None:
    parser = _result.arguments(__doc__)
    parser.add_argument("--data", default=DATA, help="npz of the shapes ($RAYFT_SHAPES)")
    parser.add_argument("--show", action="store_true", help="print what is there, run nothing")
    parser.add_argument("--only", nargs="*", default=[], help="rows whose names contain one of these words")
    parser.add_argument("--row", help="this row, in this process")
    told = parser.parse_args()
    rows = {row.name: row for row in QUEUE}
    if told.row:
        work(rows[told.row], told.data)
        return
    wanted = [row for row in QUEUE if not told.only or any(word in row.name for word in told.only)]
    for row in wanted if not (told.show or told.quick) else ():
        if not row.file.is_file():
            print(row.name, flush=True)
            subprocess.run(
                [sys.executable, "-m", "benchmarks.table1", "--data", told.data, "--row", row.name], check=True
            )
    show()
    result = _result.Result("table1", figures())
    result.write(_result.folder(told) if result.figures and not told.show else None)


# -- one row


def work(row: Row, data: str) -> None:
    """What the method draws, measured against the real shapes of the target."""
    start = time.perf_counter()
    policy, told, domain = policy_of(row, data)
    clouds = drawn(policy, domain, row.seed)
    sound = np.stack([cloud for cloud in clouds if cloud is not None])
    hit = {f"hit/{network}": [hits(clouds, row.category, network, data)] for network in ("pointnet", "voxnet")}
    found: dict[str, Any] = {"num": len(clouds), "broken": len(clouds) - len(sound), **told, "draws": hit}
    for name, reference in references(row.category, data).items():
        entries = metrics.compare(sound, reference, seed=row.seed).entries
        found["draws"] |= {f"{name}/{SHORT[e.name]}": list(e.draws) for e in entries if e.name in SHORT}
    found |= {"seconds": time.perf_counter() - start, "versions": store.versions()}
    RESULTS.mkdir(parents=True, exist_ok=True)
    store.write_text(row.file, json.dumps(found, indent=1) + "\n")
    np.savez_compressed(RUNS / f"{row.name}.npz", clouds=sound.astype(np.float16))


def policy_of(row: Row, data: str) -> tuple[Policy, dict[str, float], Shapes]:
    """The chain that the method samples, and what was paid for it."""
    label = TARGETS[row.category]
    if row.method == "conditional":
        weights = str(model(row.category, data, "shapes_conditional"))
        domain: Shapes = ConditionalShapes(label, NUM_POINTS, weights, data, row.category)
        return plain(domain), {}, domain
    domain = Shapes(NUM_POINTS, str(model(row.category, data, "shapes")), data, row.category)
    if row.method == "pretrained":
        return plain(domain), {}, domain
    if row.method == "tpm":
        reward = LogProbability(label, str(classifier(row.category, data, "pointnet")))
        return Guided(plain(domain), reward.value, GUIDANCE), {}, domain
    told = finished(row, data)
    return store.load(row.run).bench().policy, told, domain


def plain(domain: Shapes) -> Policy:
    net = domains.pretrained(domain).requires_grad_(False)
    return Policy(net, reverse_process(domain.schedule()), domain.space, net.prediction, torch.bfloat16)


def drawn(policy: Policy, domain: Shapes, seed: int) -> list[Any]:
    """Decoded clouds; None where there is none."""
    bench, found = Bench(domain, policy, policy, torch.device("cpu"), torch.float32), []
    for start in range(0, NUM, BATCH):
        generator = torch_generator(1000 + seed, start, "sample")
        x_T, context = bench.start(BATCH, generator)  # noqa: N806
        x_0 = sample(policy, x_T, context, generator).x_0.numpy()
        found += decode.clouds(x_0, {})
    return found


def references(category: str, data: str) -> dict[str, np.ndarray]:
    """All real shapes of the target, and those that nothing was trained on, as many points of each as are generated."""
    shapes = read(data, 2048, category)
    target = TARGETS[category]
    parts = {"all": shapes.subset([target]), "test": split(shapes)["test"].subset([target])}
    return {name: normalised(part.points[:, :NUM_POINTS]) for name, part in parts.items()}


def hits(clouds: list[Any], category: str, network: str, data: str) -> float:
    """The share of clouds that a classifier says are of the target; one that is no cloud is none of them."""
    margin = Margin(TARGETS[category], str(classifier(category, data, network)))
    kept = [cloud for cloud in clouds if cloud is not None]
    return float((margin(kept) > 0).sum() / len(clouds)) if kept else 0.0


# -- what rows share, made once


def model(category: str, data: str, domain: str) -> Path:
    """Weights of a model of the category, trained where nobody has: forty minutes of a core."""
    folder = RUNS / f"{category}-{domain}"
    if not (folder / "card.json").is_file():
        again = ["--resume"] if (folder / "state.pt").is_file() else []
        told = [f"domain.data={data}", f"domain.group={category}", f"name={folder.name}", f"output={RUNS}"]
        rayft("pretrain", f"{domain}_pretrain", *told, "--quiet", *again)
    return folder / "weights.safetensors"


def classifier(category: str, data: str, network: str) -> Path:
    """Its file, with a card beside it."""
    file = RUNS / f"{category}-{network}.safetensors"
    if not file.is_file():
        told = ["--network", network, "--data", data, "--group", category, "--seed", str(int(network == "voxnet"))]
        subprocess.run([sys.executable, "-m", "envs.shapes.recognise", str(file), *told], check=True)
    return file


def finished(row: Row, data: str) -> dict[str, float]:
    """The run of this row, begun, resumed or already there; the last numbers of its table."""
    marks = row.run / "run.json"
    if not (marks.is_file() and json.loads(marks.read_text()).get("status") == "finished"):
        label, watched = TARGETS[row.category], str(classifier(row.category, data, "voxnet"))
        told = [f"seed={row.seed}", f"name={row.run.name}", f"output={row.run.parent}"]
        told += [f"domain.data={data}", f"domain.group={row.category}"]
        told += [f"domain.weights={model(row.category, data, 'shapes')}", f"reward.label={label}"]
        told += OWN.get(row.method, [])
        told += [f"reward.classifier={classifier(row.category, data, 'pointnet')}"]
        told += [f"watch.held_out.label={label}", f"watch.held_out.classifier={watched}"]
        begun = (row.run / "config.yaml").is_file()
        rayft("run", *(["--resume", str(row.run)] if begun else [f"shapes_helicopter_{row.method}", *told]), "--quiet")
    with (row.run / "metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    told_last = {name.removeprefix("evaluate/"): float(last[name]) for name in PAID if last.get(name)}
    return {name: value for name, value in told_last.items() if np.isfinite(value)}


def rayft(*told: str) -> None:
    subprocess.run([sys.executable, "-m", "rayft.cli", *told], check=True)


# -- the table


def show() -> None:
    """A table for each category; the best, and all that cannot be told from it, carry a star."""
    for category in TARGETS:
        found = draws_of(category)
        if not found:
            continue
        rows = []
        for method, told in found.items():
            cells = [
                f"{factor * np.mean(told[c]):.3g}{'*' * (method in best(found, c))}"
                for c, (_, factor, _) in SHOWN.items()
            ]
            rows.append([method, *cells])
        _result.show(f"{category} -> {TARGETS[category]}", ("method", *(told[0] for told in SHOWN.values())), rows)


def draws_of(category: str) -> dict[str, dict[str, np.ndarray]]:
    """Method -> column -> its value at every draw of every seed."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in QUEUE:
        if row.category == category and row.file.is_file():
            columns = found.setdefault(row.method, {})
            for name, values in json.loads(row.file.read_text())["draws"].items():
                columns.setdefault(name, []).extend(values)
    return {method: {name: np.array(v) for name, v in columns.items()} for method, columns in found.items()}


def best(found: dict[str, dict[str, np.ndarray]], column: str) -> list[str]:
    """The method with the best mean, and those whose difference to it has an interval that holds 0."""
    more = SHOWN[column][2]
    means = {method: float(np.mean(told[column])) for method, told in found.items()}
    first = (max if more else min)(means, key=lambda method: means[method])
    return [method for method in found if method == first or tied(found[method][column], found[first][column])]


def tied(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether the differences of a draw of each lie on both sides of 0: 95 % of all pairs of draws."""
    low, high = np.percentile(np.subtract.outer(one, other), [2.5, 97.5])
    return bool(low <= 0 <= high)


def figures() -> dict[str, _result.Figure]:
    """``aircraft/rgdm/mmd_cd`` and so on, as means with the interval of the draws."""
    told = {}
    for category in TARGETS:
        for method, columns in draws_of(category).items():
            for name, values in columns.items():
                low, high = np.percentile(values, [2.5, 97.5])
                told[f"{category}/{method}/{name.removeprefix('all/')}"] = _result.Figure(
                    float(values.mean()), low, high
                )
    return told


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
