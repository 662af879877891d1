"""R's Table 1 on real shapes: from a model of a whole category to one sub-category, every method from the same weights.

    python -m benchmarks.table1 --data shapes2048.npz        works the queue off; finished rows are not run again
    python -m benchmarks.table1 --show                       prints what is there

The shapes are the Princeton Shape Benchmark's and SHREC'12's, for research only, so they are not part of the package:
an npz with points, label, classes, class_group and name. A row is one process: its model or run, 200 clouds of it, and
their distance to the real shapes of the sub-category; results/table1/ keeps the rows and what the classifiers are
worth, and table1_CATEGORY.svg draws the clouds of the first seed that are at hand.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import _result, _strips
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
TRAINED = ("rgdm", "rgdm_importance", "rgdm_gradient", "rgdm_annealing", "ppo", "rwmle", "backprop")
METHODS = ("pretrained", "conditional", "tpm", *TRAINED)
OWN = {"rgdm": ["training.lr=1e-3"]}  # real shapes take larger steps than the shipped model
TRIED = {  # second settings, of aircraft on one seed
    "rgdm_longer": ("rgdm", [*OWN["rgdm"], "iterations=28"]),
    "importance_slow": ("rgdm_importance", ["training.lr=2e-4"]),
    "annealing_slow": ("rgdm_annealing", ["training.lr=1e-4"]),
}
NETWORKS = ("pointnet", "voxnet")  # the reward, and the one that watches it
UP = {"aircraft": "z", "vehicle": "z", "seat": "y"}  # the axis that stands upright in the files
SEEDS = {"aircraft": 3, "vehicle": 1, "seat": 1}
SHORT = {
    "MMD, CD": "mmd_cd",
    "COV, CD": "cov_cd",
    "MMD, EMD": "mmd_emd",
    "COV, EMD": "cov_emd",
    "JSD": "jsd",
    "1-NN, CD": "one_nn",
}
SHOWN = {  # column -> heading, factor, and the value that it is best near
    "all/mmd_cd": ("MMD CD x10", 10, 0.0),
    "all/mmd_emd": ("EMD x10", 10, 0.0),
    "all/cov_cd": ("COV CD %", 100, 1.0),
    "all/cov_emd": ("EMD %", 100, 1.0),
    "all/jsd": ("JSD", 1, 0.0),
    "all/one_nn": ("1-NN %", 100, 0.5),
    "hit/voxnet": ("hit %", 100, 1.0),
    "test/mmd_cd": ("test MMD CD x10", 10, 0.0),
    "test/cov_cd": ("COV %", 100, 1.0),
}
Z = 1.96  # half a 95 % interval, in standard deviations
REACHED, PAID = ("evaluate/kl", "evaluate/frontier_share"), ("reward_calls", "time_s")


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
QUEUE += tuple(Row("aircraft", m, 0) for m in TRIED)


def main() -> None:
    parser = _result.arguments(__doc__)
    parser.add_argument("--data", default=DATA, help="npz of the shapes ($RAYFT_SHAPES)")
    parser.add_argument("--show", action="store_true", help="print what is there, run nothing")
    parser.add_argument("--only", nargs="*", default=[], help="rows whose names contain one of these words")
    rows = {row.name: row for row in QUEUE}
    parser.add_argument("--row", help="this row, in this process", choices=rows, metavar="NAME")
    told = parser.parse_args()
    if told.row:
        work(rows[told.row], told.data)
        return
    wanted = [row for row in QUEUE if not told.only or any(word in row.name for word in told.only)]
    if not wanted:
        parser.error(f"no row's name contains {' or '.join(told.only)}; they are {', '.join(rows)}")
    for row in wanted if not (told.show or told.quick) else ():
        if not row.file.is_file():
            print(row.name, flush=True)
            called("-m", "benchmarks.table1", "--data", told.data, "--row", row.name)
    show()
    result = _result.Result("table1", figures())
    folder = _result.folder(told) if result.figures and not told.show else None
    if folder:
        result.write(folder)
        for category in TARGETS:
            picture(category, folder / f"table1_{category}.svg")


# -- one row


def work(row: Row, data: str) -> None:
    """What the method draws, measured against the real shapes of the target."""
    start = time.perf_counter()
    policy, told, domain = policy_of(row, data)
    clouds = drawn(policy, domain, row.seed)
    sound = np.stack([cloud for cloud in clouds if cloud is not None])
    hit = {f"hit/{network}": [hits(clouds, row.category, network, data)] for network in NETWORKS}
    real = references(row.category, data)
    card = json.loads(Path(str(domain.weights)).with_name("card.json").read_text())
    found: dict[str, Any] = {"num": len(clouds), "broken": len(clouds) - len(sound), "weights": card["sha256"]}
    found |= {"references": {name: len(reference) for name, reference in real.items()}, **told, "draws": hit}
    for name, reference in real.items():
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
    """The share of clouds that a classifier gives more than even odds of the target; what is no cloud has none."""
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
    """Its file, with a card beside it that the results keep."""
    file = RUNS / f"{category}-{network}.safetensors"
    if not file.is_file():
        told = ["--network", network, "--data", data, "--group", category, "--seed", str(int(network == "voxnet"))]
        called("-m", "envs.shapes.recognise", str(file), *told)
    RESULTS.mkdir(parents=True, exist_ok=True)
    shutil.copy(file.with_suffix(".json"), RESULTS)
    return file


def finished(row: Row, data: str) -> dict[str, float]:
    """The run of this row, begun, resumed or already there."""
    marks = row.run / "run.json"
    if not (marks.is_file() and json.loads(marks.read_text()).get("status") == "finished"):
        label, watched = TARGETS[row.category], str(classifier(row.category, data, "voxnet"))
        told = [f"seed={row.seed}", f"name={row.run.name}", f"output={row.run.parent}"]
        told += [f"domain.data={data}", f"domain.group={row.category}"]
        told += [f"domain.weights={model(row.category, data, 'shapes')}", f"reward.label={label}"]
        config, own = TRIED.get(row.method) or (row.method, OWN.get(row.method, []))
        told += own
        told += [f"reward.classifier={classifier(row.category, data, 'pointnet')}"]
        told += [f"watch.held_out.label={label}", f"watch.held_out.classifier={watched}"]
        begun = (row.run / "config.yaml").is_file()
        rayft("run", *(["--resume", str(row.run)] if begun else [f"shapes_helicopter_{config}", *told]), "--quiet")
    return paid(row.run)


def paid(run: Path) -> dict[str, float]:
    """What the weights that are sampled reached, if they were evaluated, and what the whole run cost."""
    kept = store.load(run).iteration
    with (run / "metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    at = next((line for line in lines if float(line["iteration"]) == kept), {})
    told = {name.removeprefix("evaluate/"): at.get(name) for name in REACHED} | {name: lines[-1][name] for name in PAID}
    return {name: float(value) for name, value in told.items() if value and np.isfinite(float(value))}


def rayft(*told: str) -> None:
    called("-m", "rayft.cli", *told)


def called(*told: str) -> None:
    """Another process of this Python; what it says is enough where it fails."""
    code = subprocess.run([sys.executable, *told], check=False).returncode
    if code:
        sys.exit(code)


# -- the table


def show() -> None:
    """A table for each category."""
    for category in TARGETS:
        found = measured(category)
        if not found:
            continue
        rows = []
        for method, told in found.items():
            starred = [(c, "*" * (method in best(found, c))) for c in SHOWN]
            rows.append([method, *(f"{SHOWN[c][1] * told[c].value:.3g}{star}" for c, star in starred)])
        heading = ("method", *(told[0] for told in SHOWN.values()))
        _result.show(f"{category} -> {TARGETS[category]}", heading, rows, "* the best, and all that tie with it")


@dataclass(frozen=True)
class Measured:
    """A mean over seeds, and the variance of that mean."""

    value: float
    variance: float

    @property
    def figure(self) -> _result.Figure:
        half = Z * self.variance**0.5
        return _result.Figure(self.value, self.value - half, self.value + half)


def measured(category: str) -> dict[str, dict[str, Measured]]:
    """Method -> column -> what its seeds found."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in QUEUE:
        if row.category == category and row.file.is_file():
            found.setdefault(row.method, []).append(json.loads(row.file.read_text()))
    return {method: {name: over_seeds(rows, name) for name in rows[0]["draws"]} for method, rows in found.items()}


def over_seeds(rows: list[dict[str, Any]], name: str) -> Measured:
    """Of one column. One seed tells what its clouds scatter; several also how runs differ, and the larger counts."""
    means = [float(np.mean(row["draws"][name])) for row in rows]
    variance = float(np.mean([within(row, name) for row in rows]))
    if len(rows) > 1:
        variance = max(variance, float(np.var(means, ddof=1)))
    return Measured(float(np.mean(means)), variance / len(rows))


def within(row: dict[str, Any], name: str) -> float:
    """The variance of one row's mean, had other clouds been generated.

    Draws of m of the same n clouds have 1 - m/n of the variance that independent sets of m would have, and the mean of
    all draws has m/n of that; what a few draws miss comes on top. A share of hits is binomial (one of each added).
    """
    kind, draws = name.split("/")[0], row["draws"][name]
    if kind == "hit":
        share = (draws[0] * row["num"] + 1) / (row["num"] + 2)
        return share * (1 - share) / row["num"]
    part = row["references"][kind] / (row["num"] - row["broken"])
    return float(np.var(draws, ddof=1)) * (part / (1 - part) + 1 / len(draws))


def best(found: dict[str, dict[str, Measured]], column: str) -> list[str]:
    """The method that comes nearest to the best there is, and those whose difference to it has an interval with 0."""
    aim = SHOWN[column][2]
    first = min(found, key=lambda method: abs(found[method][column].value - aim))
    return [method for method in found if method == first or tied(found[method][column], found[first][column])]


def tied(one: Measured, other: Measured) -> bool:
    """Whether the 95 % interval of the difference holds 0."""
    return abs(one.value - other.value) <= Z * (one.variance + other.variance) ** 0.5


def figures() -> dict[str, _result.Figure]:
    """``aircraft/rgdm/mmd_cd`` and so on, with intervals; ``aircraft/pointnet/accuracy`` of the classifiers."""
    found = {
        f"{category}/{method}/{name.removeprefix('all/')}": told.figure
        for category in TARGETS
        for method, columns in measured(category).items()
        for name, told in columns.items()
    }
    for category in TARGETS:
        for network in NETWORKS:
            found |= {f"{category}/{network}/{name}": told for name, told in worth(category, network).items()}
    return found


def worth(category: str, network: str) -> dict[str, _result.Figure]:
    """A classifier's accuracy and calibration on shapes that it was not trained on, each in one of five folds."""
    file = RESULTS / f"{category}-{network}.json"
    if not file.is_file():
        return {}
    card = json.loads(file.read_text())
    folds, raw = card["folds"], card["folds_uncalibrated"]
    found = {
        "accuracy": Measured(folds["accuracy"], folds["standard_error"] ** 2).figure,
        "calibration_error": _result.Figure(folds["calibration_error"]),
        "calibration_error/uncalibrated": _result.Figure(raw["calibration_error"]),
    }
    return {name: figure for name, figure in found.items() if np.isfinite(figure.value)}


def picture(category: str, path: Path) -> None:
    """What each method drew, as far as it is at hand."""
    strips = []
    for method, told in measured(category).items():
        file = RUNS / f"{category}-{method}-0.npz"
        if method in METHODS and file.is_file():
            note = f"MMD x10 {10 * told['all/mmd_cd'].value:.3f}, {told['hit/voxnet'].value:.0%} hit"
            strips.append(_strips.Strip(method, note, np.load(file)["clouds"]))
    if strips:
        _strips.write(path, f"{category} -> {TARGETS[category]}, clouds at random", strips, UP[category])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
