"""``rayft score``: what a reward says of samples, and whether there is anything in it to learn from.

spread of the scores, failures with their reasons, ties, seconds per sample, and what a run would pay.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from rayft import domain as domains
from rayft import evaluate
from rayft.algorithms.config import DiffusionConfig
from rayft.bench import Bench
from rayft.chain import Policy, reverse_process
from rayft.draws import draw_pretrained
from rayft.rewards.service import RewardService
from rayft.score import Scores
from rayft.seeds import torch_generator
from rayft.spec import RunSpec

SAMPLES = ("points", "x_0")  # of an npz: as they are decoded, else as they are drawn
FILES = (".smi", ".txt", ".csv", ".jsonl", ".npy", ".npz")
MANY_TIES, FEW_SCORES = 0.95, 100


@dataclass(frozen=True)
class Finding:
    """What was found of a reward on one set of samples."""

    scores: Scores
    metered: Mapping[str, Any]
    alpha: float | None
    cost: Mapping[str, float] | None  # calls and hours of the run that was asked about

    @property
    def known(self) -> np.ndarray:
        return self.scores.rewards[np.isfinite(self.scores.rewards)]

    @property
    def ties(self) -> float:
        """Share of the commonest score."""
        return Counter(self.known.tolist()).most_common(1)[0][1] / len(self.known) if len(self.known) else 0.0

    @property
    def effective(self) -> float | None:
        """Effective sample size of exp(r/alpha): how many of these samples p* would really use."""
        if self.alpha is None or not len(self.known):
            return None
        return evaluate.effective_sample_size(self.known, self.alpha)

    def problems(self) -> list[str]:
        """Sentences that speak against training on this reward, the gravest first; none: it is learnable."""
        num, known = len(self.scores.rewards), self.known
        failed, blank = self.scores.num_failed / num, float(self.scores.undecodable.mean())
        told = []
        if failed:
            few = "; ".join(f"{reason} ({count})" for reason, count in self.scores.reasons[:3])
            if failed > 0.1:
                told.append(f"the reward fails on {failed:.0%} of the samples: {few}")
        if blank > 0.9:
            told.append(
                f"{blank:.0%} of the samples decode to nothing: the pretrained model is not fit for this domain"
            )
        if len(known) and known.std() < 1e-12:
            told.append(f"all {len(known)} scores are equal ({known[0]:g}): there is nothing to learn from")
        elif self.ties > MANY_TIES:
            told.append(f"{self.ties:.0%} of the samples have one and the same score: most of a batch teaches nothing")
        told += self._temperature(known)
        return told

    def _temperature(self, known: np.ndarray) -> list[str]:
        effective = self.effective
        if effective is None or len(known) < FEW_SCORES or known.std() < 1e-12:
            return []
        if effective < 0.002 * len(known):
            better = f"try alpha near {known.std() / 2:.2g}"
            return [
                f"alpha {self.alpha:g} is small for this spread: p* would use {effective:.0f} of the samples; {better}"
            ]
        if known.std() < 0.02 * float(self.alpha or 0):
            return [
                f"alpha {self.alpha:g} is large for this spread ({known.std():.2g}): p* is nearly the pretrained model"
            ]
        return []

    def told(self) -> dict[str, Any]:
        """As plain numbers, for --json."""
        known, spread = self.known, {}
        if len(known):
            places = {"min": 0.0, "p5": 0.05, "median": 0.5, "p95": 0.95, "max": 1.0}
            spread = {name: float(np.quantile(known, place)) for name, place in places.items()}
        return {
            "samples": len(self.scores.rewards),
            "failed": self.scores.num_failed,
            "reasons": dict(self.scores.reasons[:10]),
            "undecodable": int(self.scores.undecodable.sum()),
            "mean": float(known.mean()) if len(known) else None,
            "std": float(known.std()) if len(known) else None,
            **spread,
            "ties": self.ties,
            "components": {k: _mean(v) for k, v in {**self.scores.parts, **self.scores.watch}.items()},
            "calls": self.scores.num_calls,
            "cache_hits": self.scores.num_hits,
            "metered": self.metered,
            "effective_sample_size": self.effective,
            "cost": self.cost,
            "learnable": not self.problems(),
            "problems": self.problems(),
        }


def inspect(spec: RunSpec, what: str | int, seed: int = 0, whole: bool = True) -> Finding:
    """Scores ``what``, a number of the pretrained model's samples or a file of samples, as the run's rewards do.

    Unless the spec is ``whole``, nobody has said what the run would be, and nothing is told of it.
    """
    config = spec.checked()
    world, told = config.build_domain(), replace(config.section("scoring"), max_failed=1.0)
    samples = None if isinstance(what, int) else read(Path(what))
    decoder = world.decoder if samples is None else None
    rewards = RewardService(config.recipe(world), decoder, world.canonical, world.rewards, told)
    try:
        rewards.start()
        if samples is None:
            draw = draw_pretrained(bench(config, world), int(what), torch_generator(seed, 0, "score"), {}).numpy()
            scores = rewards.score(draw.events, draw.context, watch=True)
        else:
            scores = rewards.score(samples, {}, watch=True)
        metered = rewards.meter.summary()
    finally:
        rewards.stop()
    alpha = config.evaluation_alpha() if whole else config.section("evaluate").alpha
    return Finding(scores, metered, alpha, projected(spec, config, scores, metered) if whole else None)


def bench(config: DiffusionConfig, world: domains.Domain) -> Bench:
    """The pretrained model, in this process and without Ray."""
    chain, net = config.section("chain"), domains.pretrained(world).requires_grad_(False)
    process = reverse_process(world.schedule(), chain.sigma, chain.eta, chain.num_steps)
    policy = Policy(net, process, world.space, net.prediction)
    return Bench(world, policy, policy, torch.device("cpu"), torch.float32)


def projected(spec: RunSpec, config: DiffusionConfig, scores: Scores, metered: Mapping[str, Any]) -> dict[str, float]:
    """Calls and hours of the whole run, at the price per sample and the share of repeats seen here."""
    told, num = config.section("evaluate"), len(scores.rewards)
    own = len(scores.parts)
    every = math.ceil(spec.iterations / told.every) if told.every else 1
    events = config.num_events() * spec.iterations + told.pretrained_chains + every * told.chains
    seconds = sum(part["seconds"]["total"] for part in _parts(metered)) / max(1, num)
    workers = max(1, config.section("scoring").actors)
    return {"samples": events, "calls": events * max(1, own), "hours": events * seconds / workers / 3600}


def read(path: Path) -> list[Any]:
    """Samples in a file: one a line (.smi, .txt: its first word; .csv: first column; .jsonl), or rows of an array."""
    if not path.is_file():
        raise ValueError(f"no file {path}; give a number of samples, a YAML, or a file ({', '.join(FILES)})")
    if path.suffix in (".npy", ".npz"):
        return _rows(path)
    lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if path.suffix == ".jsonl":
        import json

        return [json.loads(line) for line in lines]
    if path.suffix == ".csv":
        import csv

        return [row[0] for row in csv.reader(lines)][1:]
    if path.suffix not in (".smi", ".txt"):
        raise ValueError(f"{path} is no file of samples that rayft reads; it reads {', '.join(FILES)}")
    return [line.split()[0] for line in lines]


def _rows(path: Path) -> list[np.ndarray]:
    try:
        found = np.load(path, allow_pickle=False)
        if path.suffix == ".npz":
            found = found[next((name for name in SAMPLES if name in found.files), found.files[0])]
    except (ValueError, OSError, KeyError, IndexError) as error:
        raise ValueError(f"{path} is not a plain numpy file ({error}); write it with numpy.save") from None
    return list(found)


def table(finding: Finding) -> Table:
    """What a person reads."""
    told = finding.told()
    shown = Table(title=f"{told['samples']} samples", title_justify="left", show_header=False)
    shown.add_column()
    shown.add_column(justify="right")
    if told["mean"] is not None:
        shown.add_row("score", f"{told['mean']:.4g} +- {told['std']:.3g}")
        shown.add_row("min, median, max", f"{told['min']:.4g}, {told['median']:.4g}, {told['max']:.4g}")
        shown.add_row("commonest score", f"{told['ties']:.1%}")
    for name, value in told["components"].items() if len(told["components"]) > 1 else ():
        shown.add_row(f"  {name}", f"{value:.4g}")
    shown.add_row("undecodable", f"{told['undecodable']}")
    shown.add_row("failed", f"{told['failed']}")
    for reason, count in told["reasons"].items():
        shown.add_row(f"  {reason}"[:80], f"{count}")
    for part in _parts(finding.metered):
        times = ", ".join(f"{part['seconds'][name]:.2g}" for name in ("p50", "p95", "p99"))
        shown.add_row(f"seconds a sample, {part['part']}: p50, p95, p99", times)
    if told["effective_sample_size"] is not None:
        shown.add_row(f"samples p* would use, alpha {finding.alpha:g}", f"{told['effective_sample_size']:.0f}")
    if finding.cost is not None:
        shown.add_row("the run: reward calls", f"{finding.cost['calls']:,.0f}")
        shown.add_row("the run: hours of scoring", f"{finding.cost['hours']:.2g}")
    return shown


def verdict(finding: Finding) -> Sequence[str]:
    """Learnable or not, and why."""
    problems = finding.problems()
    return [f"not learnable as it is: {problems[0]}", *problems[1:]] if problems else ["learnable"]


def _parts(metered: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every reward that was called, with its name."""
    purposes = metered["purposes"].values()
    return [{"part": name, **part} for told in purposes for name, part in told["parts"].items() if part["calls"]]


def _mean(column: np.ndarray) -> float:
    known = column[np.isfinite(column)]
    return float(known.mean()) if len(known) else float("nan")
