"""Molecules: what the network and the metrics cost, and how good the shipped model's molecules are.

sample/*   EDM's network at 9 x 256 on QM9's sizes: milliseconds per molecule and step, batches of 1, 16 and 64
train/*    molecules per second of a training step at batch 64
metrics/*  milliseconds per molecule and core of decoding, stability and QED on QM9's own geometries
heavy/*    10,000 samples of the shipped heavy-atom model; qm9/*: the same numbers of QM9's test split
tilt/*     10,000 draws of QM9's training molecules in proportion to exp(QED/tau), tau such that their mean QED is 0.55
qed/*      QED of valid samples after fine-tuning, by algorithm; synth/best: the best synth. From ``benchmarks.table2``
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.optimize import root_scalar
from torch import Tensor

from benchmarks import _result
from benchmarks._result import Figure
from envs.molecules import bonds, decode, metrics
from envs.molecules.domain import Molecules
from envs.molecules.egnn import EGNN
from envs.molecules.qm9 import qm9
from envs.molecules.reward import QED
from rayft.chain import Policy, reverse_process, sample

STEPS, ELEMENTS = 1000, (1, 6, 7, 8, 9)
MOST = {"sample/ms_per_mol_step/b16": 10.7, "metrics/ms_per_mol": 0.8, "heavy/seconds_per_1000": 60.0}
AT_LEAST = {"train/mols_per_s": 16.8, "heavy/validity_strict": 0.85, "heavy/uniqueness": 0.98}
AT_LEAST |= {"qed/rgdm": 0.55, "qed/ppo": 0.55, "qed/rwmle": 0.55, "synth/best": 0.75}
BATCH = 500  # chains at a time
QED_ASKED, TUNED = 0.55, ("qed", "synth")
ALSO = ("validity", "uniqueness", "diversity", "novelty", "num_scaffolds", "kl", "frontier_share")  # beside the mean


def main() -> None:
    parser = _result.arguments(__doc__)
    parser.add_argument("--only", nargs="*", choices=BENCHES, default=list(BENCHES), help="these parts alone")
    parser.add_argument("--data", help="folder of the QM9 cache; $RAYFT_DATA by default")
    told = parser.parse_args()
    result = _result.Result("molecules", partial=set(told.only) != set(BENCHES))
    for name in told.only:
        result.figures |= BENCHES[name](told.quick, told.data)
    rows = [[name, figure, _asked(name)] for name, figure in result.figures.items()]
    _result.show("molecules", ("figure", "measured", "asked"), rows)
    result.write(_result.folder(told))


def _asked(name: str) -> str:
    most, least = MOST.get(name), AT_LEAST.get(name)
    return f"<= {most:g}" if most is not None else f">= {least:g}" if least is not None else ""


# -- what things cost


def batch(num: int, data: str | None, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Molecules with hydrogens whose sizes are those of QM9's training split, as the network gets them."""
    table = qm9("train", data)
    chosen = table.take(np.random.default_rng(seed).integers(len(table), size=num))
    positions, numbers, mask = chosen.padded(29)
    features = np.concatenate([(numbers[..., None] == np.array(ELEMENTS)) / 4, numbers[..., None] / 10], -1)
    x = np.concatenate([positions, features * mask[..., None]], -1).astype(np.float32)
    return torch.from_numpy(x), {"mask": torch.from_numpy(mask.astype(np.float32))}


def sampling(quick: bool, data: str | None) -> dict[str, Figure]:
    """Both precisions; sizes differ from batch to batch, so several are drawn."""
    net, found = EGNN(6, STEPS).eval(), {}
    for size in (1, 16, 64):
        batches = [batch(size, data, seed) for seed in range(2 if quick else 12 if size > 1 else 40)]
        for name, low in (("", False), ("bf16/", True)):
            found[f"sample/{name}ms_per_mol_step/b{size}"] = Figure(1e3 * _forward(net, batches, low) / size)
    return found


@torch.no_grad()
def _forward(net: EGNN, batches: list[tuple[Tensor, dict[str, Tensor]]], low: bool) -> float:
    """Seconds of one call, the mean over batches of the better of two calls each."""
    taken = []
    for x, context in batches:
        t, times = torch.full((len(x),), 500), []
        for _ in range(3):
            start = time.perf_counter()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
                net(x, t, context)
            times.append(time.perf_counter() - start)
        taken.append(min(times[1:]))
    return float(np.mean(taken))


def training(quick: bool, data: str | None) -> dict[str, Figure]:
    """Forward, backward and AdamW's step, each in both precisions."""
    net, found = EGNN(6, STEPS), {}
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5)
    for name, low in (("", False), ("bf16/", True)):
        times = []
        for seed in range(2 if quick else 6):
            x, context = batch(64, data, seed)
            start = time.perf_counter()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
                loss = (net(x, torch.full((64,), 500), context) - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            times.append(time.perf_counter() - start)
        found[f"train/{name}mols_per_s"] = Figure(64 / float(np.median(times[1:])))
    return found


def measuring(quick: bool, data: str | None) -> dict[str, Figure]:
    """Decoding, stability and QED, one core."""
    positions, numbers, mask = qm9("test", data)[: 200 if quick else 2000].padded(29)
    scores = (numbers[..., None] == np.array(ELEMENTS)).astype(np.float32)
    x_0, parts = np.concatenate([positions, scores], -1), {}
    start = time.perf_counter()
    found = decode.full(x_0, {"mask": mask})
    parts["decode"] = time.perf_counter() - start
    start = time.perf_counter()
    bonds.stability(positions, numbers, mask)
    parts["stability"] = time.perf_counter() - start
    start = time.perf_counter()
    QED()([mol for mol in found if mol is not None])
    parts["qed"] = time.perf_counter() - start
    each = {f"metrics/{name}_ms": Figure(1e3 * seconds / len(x_0)) for name, seconds in parts.items()}
    return {**each, "metrics/ms_per_mol": Figure(1e3 * sum(parts.values()) / len(x_0))}


# -- how good molecules are


def drawn(domain: Molecules, num: int, sigma: str, seed: int = 0, of: int = 1) -> tuple[np.ndarray, np.ndarray, float]:
    """(x_0, mask, seconds) of the domain's own model, ``of`` chains in a row with each context."""
    generator, parts = torch.Generator().manual_seed(seed), []
    net = domain.denoiser().eval()
    policy = Policy(net, reverse_process(domain.schedule(), sigma), domain.space, net.prediction, torch.bfloat16)
    start = time.perf_counter()
    size = BATCH // of * of
    for first in range(0, num, size):
        contexts = domain.context(min(size, num - first) // of, generator)
        context = {name: part.repeat_interleave(of, 0) for name, part in contexts.items()}
        shape = torch.empty(len(context["mask"]), *domain.event_shape)
        chains = sample(policy, policy.noise(shape, context, generator), context, generator)
        parts.append((chains.x_0.numpy(), context["mask"].numpy()))
    seconds = time.perf_counter() - start
    return np.concatenate([x for x, _ in parts]), np.concatenate([mask for _, mask in parts]), seconds


def shipped(quick: bool, data: str | None) -> dict[str, Figure]:
    """The heavy-atom model as it is fine-tuned (noise beta), and with the posterior's noise."""
    known, found = metrics.training_set(qm9("train", data).smiles), {}
    for sigma, name in (("beta", ""), ("gamma", "gamma/")):
        x_0, mask, seconds = drawn(Molecules(), 200 if quick else 10_000, sigma)
        told = metrics.summarise(decode.heavy(x_0, {"mask": mask}), known=known)
        found |= {f"heavy/{name}{key}": figure for key, figure in _quality(told).items()}
        found[f"heavy/{name}seconds_per_1000"] = Figure(1e3 * seconds / len(x_0))
    return found


def reference(quick: bool, data: str | None) -> dict[str, Figure]:
    """QM9's test split: with hydrogens by EDM's rules, its heavy atoms alone, and its published SMILES."""
    table, found = qm9("test", data)[: 300 if quick else None], {}
    positions, numbers, mask = table.padded(29)
    scores = (numbers[..., None] == np.array(ELEMENTS)).astype(np.float32)
    atoms = decode.atoms(np.concatenate([positions, scores], -1), {"mask": mask})
    told = metrics.summarise(decode.molecules(atoms), atoms)
    found |= {"qm9/molecule_stability": Figure(told.molecule_stability), **_prefixed("qm9/", _quality(told))}
    bare = table.heavy().take(np.flatnonzero(table.heavy().num_atoms > 0))
    places, elements, real = bare.padded(9)
    one_hot = (elements[..., None] == decode.ELEMENTS[1:]).astype(np.float32)
    told = metrics.summarise(decode.heavy(np.concatenate([places, one_hot], -1), {"mask": real}))
    found |= _prefixed("qm9/heavy/", _quality(told))
    return found | _prefixed("qm9/smiles/", _quality(metrics.summarise(list(table.smiles))))


def tilted(quick: bool, data: str | None) -> dict[str, Figure]:
    """What the exact tilt costs, exactly: KL, and the expected share of unique ones, sum 1 - (1 - p)^n over n."""
    scored = QED()(list(qm9("train", data).smiles[: 3000 if quick else None]))
    qed, num = np.array([value for value in scored if value is not None]), 10_000

    def share(tau: float) -> np.ndarray:
        weight = np.exp((qed - qed.max()) / tau)
        return weight / weight.sum()

    p = share(root_scalar(lambda tau: float(share(tau) @ qed) - QED_ASKED, bracket=(0.005, 5.0)).root)
    unique = {"tilt/uniqueness": p, "tilt/none/uniqueness": np.full(len(p), 1 / len(p))}
    found = {name: Figure(float(-np.expm1(num * np.log1p(-q)).sum() / num)) for name, q in unique.items()}
    return {"tilt/qed": Figure(float(p @ qed)), "tilt/kl": Figure(float(p @ np.log(p * len(p)))), **found}


def tuned(quick: bool, data: str | None) -> dict[str, Figure]:
    """What is there of ``results/table2``: means over seeds, with their interval."""
    found: dict[str, list[dict[str, float]]] = {}
    for path in sorted((_result.RESULTS / "table2").glob("*_*-*.json")):
        found.setdefault(path.stem.rpartition("-")[0], []).append(json.loads(path.read_text()))
    figures: dict[str, Figure] = {}
    for name, runs in found.items():
        if name.startswith("best_of"):
            target = "qed" if "qed" in name else "synth"
            figures |= {
                f"{name}/{key}": _result.over_seeds([run[key] for run in runs]) for key in (target, "uniqueness")
            }
        if name.startswith("conditional"):
            there = [key for key in ("qed", *ALSO) if key in runs[0]]
            figures |= {f"{name}/{key}": _result.over_seeds([run[key] for run in runs]) for key in there}
        target, _, algorithm = name.partition("_")
        if target in TUNED and algorithm in ("rgdm", "ppo", "rwmle"):
            numbers = {"": target, **{f"/{key}": key for key in ALSO}}
            told = {end: [run[key] for run in runs if key in run] for end, key in numbers.items()}
            figures |= {f"{target}/{algorithm}{end}": _result.over_seeds(v) for end, v in told.items() if v}
    best = [figures[f"synth/{name}"].value for name in ("rgdm", "ppo", "rwmle") if f"synth/{name}" in figures]
    return figures | ({"synth/best": Figure(max(best))} if best else {})


def _prefixed(prefix: str, figures: dict[str, Figure]) -> dict[str, Figure]:
    return {f"{prefix}{name}": figure for name, figure in figures.items()}


def _quality(told: Any) -> dict[str, Figure]:
    """What there is of the numbers that papers report."""
    names = {
        "validity_strict": "validity",
        "uniqueness": "uniqueness",
        "novelty": "novelty",
        "qed": "qed",
        "sa": "sa",
        "synth": "synth",
        "diversity": "diversity",
    }
    found = {name: float(getattr(told, field)) for name, field in names.items()}
    return {name: Figure(value) for name, value in found.items() if np.isfinite(value)}


BENCHES: dict[str, Callable[[bool, str | None], dict[str, Figure]]] = {
    "sample": sampling,
    "train": training,
    "metrics": measuring,
    "heavy": shipped,
    "qm9": reference,
    "tilt": tilted,
    "tuned": tuned,
}

if __name__ == "__main__":
    main()
