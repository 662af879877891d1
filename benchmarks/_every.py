"""``python -m benchmarks.optimum --all``: every algorithm and every guide on two targets of the toy.

    attained = (J(p) - E_pre[r]) / (J* - E_pre[r]),    J = E[r] - alpha KL

quadratic (alpha 0.5) is smooth and pulls four modes into one; stripes (alpha 0.2) is 0 or 1, many modes, no gradient;
narrow, stripes of half that width, is told of a few, one seed. A job is one process, so that its peak memory is its
own, and a file in results/every/, so that a finished one is not run again. Seconds are those of a core: a quiet
machine's wall time. Settings were chosen on seeds 100 to 102; 0 to 4 are told.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import _ceiling, _guided, _picture, _result
from rayft import domain as domains
from rayft import evaluate
from rayft.chain import Policy, log_normal, reverse_process, sample
from rayft.seeds import torch_generator
from rayft.store import write_text

SEEDS, BATCH, CHAINS, PRETRAINED = (0, 1, 2, 3, 4), 10_000, 100_000, 400_000
RESULTS, FAILED_S = _result.RESULTS / "every", 1800  # seconds after which a job is given up


@dataclass(frozen=True)
class Target:
    """A reward of the toy and its arguments, the same in torch, the alpha, and how fine its ceiling is solved."""

    reward: _guided.Asked
    value: Callable[[Tensor], Tensor]
    alpha: float
    spacing: float


def _striped(width: float, spacing: float) -> Target:
    return Target(("stripes", {"width": width}), partial(_ceiling.stripes, width=width), 0.2, spacing)


TARGETS = {
    "quadratic": Target(("quadratic", {}), _ceiling.quadratic, 0.5, 0.05),
    "stripes": _striped(1.0, 0.05),
    "narrow": _striped(0.5, 0.025),
}
TRAINED: dict[str, dict[str, Any]] = {  # name -> iterations, algorithm and its settings, for both targets
    "backprop": {"iterations": 250, "lr": 1e-3, "chains": 512, "ema": 0.98},
    "pcl": {"iterations": 250, "lr": 1e-3, "chains": 256, "ema": 0.97},
    "pcl_replay": {"algorithm": "pcl", "iterations": 250, "lr": 1e-3, "chains": 128, "replay": 128, "ema": 0.97},
    "pcl_pieces": {"algorithm": "pcl", "iterations": 250, "lr": 1e-3, "chains": 256, "steps": 10, "ema": 0.97},
    "grpo": {"iterations": 300, "lr": 1e-3, "chains": 512, "ema": 0.99},
    "ppo": {"iterations": 200, "lr": 5e-4, "chains": 512, "ema": 0.99},
    "rwmle": {"iterations": 200, "lr": 1e-3, "chains": 1024, "ema": 0.995},
    "forward": {"iterations": 60, "lr": 1e-3, "chains": 512, "ema": 0.97},
    "rgdm": {"iterations": 36, "lr": 1e-3, "ema": 0.97, "timestep_weight": "simple", "x_0_above": 20},
}
FAST: dict[str, Any] = {"lr_end": 0.01, "ema": 0.98}  # for edges: large steps that fall to nothing
PIECES: dict[str, Any] = {"chains": 256, "minibatch_size": 32, "lr": 8e-3, "value_lr": 8e-3, **FAST}
WHOLE: dict[str, Any] = {"chains": 512, "minibatch_size": 64, "lr": 8e-3, "value_lr": 1e-2, **FAST}
GRADIENT: dict[str, Any] = {"lr": 6e-3, "num_epochs": 1, **FAST}
EDGES: dict[str, dict[str, Any]] = {  # what the stripes need
    "backprop": {"iterations": 250, "lr": 4e-3, "chains": 128, "minibatch_size": 128, **FAST}
    | {"surrogate": 3, "surrogate_chains": 256, "surrogate_steps": 100, "pessimism": 0.0},
    "pcl": {"iterations": 300, **WHOLE},
    "pcl_replay": {"iterations": 300, **WHOLE, "chains": 256, "replay": 256},
    "pcl_pieces": {"iterations": 500, **PIECES},
    "grpo": {"iterations": 300, "chains": 512, "minibatch_size": 512, **GRADIENT},
    "ppo": {"iterations": 200, "chains": 1024, "minibatch_size": 1024, **GRADIENT},
    "rwmle": {"iterations": 150, "lr": 1e-2, "chains": 2048, "minibatch_size": 1024, **FAST},
    "forward": {"iterations": 100, "lr": 2e-3, "lr_end": 0.1, "chains": 1024, "minibatch_size": 512},
    "rgdm": {"iterations": 200, "lr": 1e-2, "chains": 2048, "minibatch_size": 512, **FAST}
    | {"temperature": 0.5, "radius": 0.5, "x_0_above": 25},
}
OWN: dict[str, dict[str, dict[str, Any]]] = {  # what a target needs beside TRAINED
    "quadratic": {"rgdm": {"temperature": 0.5, "radius": 1.5}},
    "stripes": EDGES,
    "narrow": EDGES,
}
FITTED = {"chains": 16384, "steps": 6000}  # a value of the stripes
GUIDES: dict[str, dict[str, dict[str, Any]]] = {
    "quadratic": {name: {} for name in ("mc", "soft_q", "tweedie", "path_integral", "smc", "best_of_n")},
    "stripes": {"mc": FITTED, "soft_q": FITTED, "path_integral": {}, "smc": {}, "best_of_n": {}},
    "narrow": {"smc": {}, "best_of_n": {}},  # mc and soft_q refuse: no value can be fitted
}
NARROW = ("pcl_pieces", "ppo", "rwmle", "backprop", *GUIDES["narrow"])  # of all, what is tried there


@dataclass(frozen=True)
class Job:
    """One training or one guide, and a seed."""

    name: str
    target: str
    seed: int

    @property
    def file(self) -> Path:
        return RESULTS / f"{self.name}-{self.target}-{self.seed}.json"


@dataclass(frozen=True)
class Row:
    """What it came to. ``kl`` and ``objective``, J, are missing where a method has no density."""

    reward: float
    kl: float | None
    objective: float | None
    seconds: float
    calls: int
    memory_mb: float


@dataclass(frozen=True)
class Known:
    """E_pre[r], J*, and the J of the best Gaussian transitions that a search from mu_pre finds."""

    base: float
    optimum: float
    ceiling: float

    def share(self, objective: float) -> float:
        return (objective - self.base) / (self.optimum - self.base)


class Ground:
    """The pretrained toy, its rewards, and what is known of a target without training: E_pre[r], J*, the ceiling."""

    def __init__(self, name: str, pretrained: int = PRETRAINED) -> None:
        domain, self.target = domains.build("toy", {}), TARGETS[name]
        net = domain.denoiser().requires_grad_(False)
        self.reference = Policy(net, reverse_process(domain.schedule()), domain.space)
        drawn = (self.chains(self.reference, n, "pretrained").x_0 for n in range(pretrained // BATCH))
        parts = [self.target.value(x_0) for x_0 in drawn]
        self.rewards = torch.cat(parts).double().numpy()

    def chains(self, policy: Policy, batch: int, purpose: str) -> Any:
        """The same x_T and the same noise for every policy."""
        generator = torch_generator(0, batch, f"benchmark {purpose}")
        x_T = torch.randn(BATCH, 2, generator=generator)  # noqa: N806
        return sample(policy, x_T, {}, generator, reference=self.reference)

    def measure(self, policy: Policy, num: int) -> tuple[float, float, float]:
        """(reward, KL, J); J by the sampled log-ratio, whose scatter nearly cancels the reward's near p*."""
        told = np.mean([self._batch(policy, batch) for batch in range(max(num // BATCH, 1))], axis=0)
        reward, kl, log_ratio = told.tolist()
        return reward, kl, reward - self.target.alpha * log_ratio

    def _batch(self, policy: Policy, batch: int) -> list[float]:
        chains, before = self.chains(policy, batch, "evaluate"), torch.zeros(BATCH)
        for row in range(chains.num_rows):
            sigma = float(policy.process.sigma[row + 1])
            before += log_normal(policy.space, chains.x[row], chains.columns["mean_ref"][row], sigma, {})
        told = (self.target.value(chains.x_0), chains.columns["kl"].sum(0), chains.columns["log_prob"].sum(0) - before)
        return [float(value.double().mean()) for value in told]

    def known(self, quick: bool) -> Known:
        """Solved on a grid; with ``quick`` read off the rewards, and no ceiling."""
        if quick:
            return Known(float(self.rewards.mean()), evaluate.optimum(self.rewards, self.target.alpha), math.nan)
        plane = _ceiling.Plane(self.reference, self.target.spacing, reward=self.target.value)
        base, alpha = plane.expected(self.target.value(plane.points)), self.target.alpha
        return Known(base, plane.optimum(alpha), plane.ceiling(alpha))


# -- one job, in its own process


def work(job: Job, quick: bool) -> Row:
    """Trains or guides, and measures."""
    torch.set_num_threads(1)
    num = BATCH if quick else CHAINS
    ground = Ground(job.target, num)
    before = _from_here()
    if job.name not in TRAINED:
        return guided(job, ground, before)
    policy, seconds, calls = train(job, quick)
    memory = _peak() - before
    reward, kl, objective = ground.measure(policy, num)
    return Row(reward, kl, objective, seconds, calls, memory)


def guided(job: Job, ground: Ground, before: float) -> Row:
    """A guide's chain has a KL; what chooses among events has none, but for best-of-N's known bound."""
    told = GUIDES[job.target][job.name]
    found, seconds, calls = _guided.guided(job.name, ground.target.reward, ground.target.alpha, job.seed, **told)
    memory = _peak() - before
    if isinstance(found, Policy):
        reward, kl, objective = ground.measure(found, BATCH)
        return Row(reward, kl, objective, seconds, calls, memory)
    reward = float(ground.target.value(found).mean())
    if job.name != "best_of_n":
        return Row(reward, None, None, seconds, calls, memory)
    num = calls / len(found)
    kl = math.log(num) - (num - 1) / num
    return Row(reward, kl, reward - ground.target.alpha * kl, seconds, calls, memory)


def train(job: Job, quick: bool) -> tuple[Policy, float, int]:
    """(the policy, seconds of a core that training took, reward calls)."""
    import ray

    from rayft.spec import algorithm

    told = TRAINED[job.name] | OWN[job.target].get(job.name, {})
    iterations, name = told.pop("iterations"), told.pop("algorithm", job.name)
    cls = algorithm(name)
    (reward, arguments), alpha = TARGETS[job.target].reward, TARGETS[job.target].alpha
    told |= {"alpha": alpha} if hasattr(cls.settings_class, "alpha") else {}
    ray.init("local", num_cpus=1, include_dashboard=False, logging_level=logging.ERROR)
    config = cls().domain("toy").reward(reward, **arguments).training(**told).evaluate(every=0)
    algo: Any = config.debugging(seed=job.seed, log_level="ERROR").build_algo()
    algo.horizon = math.ceil(iterations / (25 if quick else 1))
    start = time.process_time()
    for _ in range(algo.horizon):
        algo.train()
    seconds = time.process_time() - start
    algo.sync()
    policy, calls = algo.env_runner.module.policies["ema"], algo.counts["reward_calls"]
    algo.stop()
    ray.shutdown()
    return policy, seconds, calls


def _from_here() -> float:
    """Memory that this process has now, in MB. Linux forgets the peak before: what has been freed hides nothing."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> float:
    """Most memory that this process has had, in MB."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.is_file() else None
    return int(found[1]) / 1024 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# -- all of them


def main(told: argparse.Namespace) -> None:
    """Works the jobs off, one seed after the other, tells a table for each target, and draws the frontiers."""
    seeds = tuple(told.seeds or ((0,) if told.quick else SEEDS))
    result, folder = _result.Result("every"), _result.folder(told)
    asked = [job for job in jobs(seeds) if not told.show or job.file.is_file()]
    done = {job: finished(job, told.quick) for job in asked}
    for name, target in TARGETS.items():
        if not any(job.target == name for job in done):
            continue
        ground = Ground(name, BATCH if told.quick else PRETRAINED)
        frontier, points, lines = evaluate.frontier(ground.rewards), [], []
        known = ground.known(told.quick)
        if not told.quick:
            result.figures[f"ceiling/{name}"] = _result.Figure(known.share(known.ceiling))
        for method in methods(name):
            rows = [row for job, row in done.items() if (job.name, job.target) == (method, name)]
            if not rows:
                continue
            lines.append(tell(method, name, rows, known, result))
            point = _mean(rows, "kl"), _mean(rows, "reward")
            points += [] if math.isnan(point[0]) else [_picture.Point(method, *point)]
        headings = ("", "seeds", "attained", "reward", "KL", "seconds", "calls", "MB")
        _result.show(f"{name}, alpha {target.alpha}", headings, lines, _caption(name, known, result))
        if folder is not None:
            _picture.write(folder / f"every_{name}.svg", f"The toy, {name}: reward against KL", frontier, points)
    result.write(folder)


def methods(target: str) -> tuple[str, ...]:
    """What is tried on it."""
    return NARROW if target == "narrow" else (*TRAINED, *GUIDES[target])


def jobs(seeds: Sequence[int]) -> list[Job]:
    """All of them, in the order they are worked."""
    targets = [(seed, target) for seed in seeds for target in TARGETS if target != "narrow" or seed == seeds[0]]
    return [Job(method, target, seed) for seed, target in targets for method in methods(target)]


def finished(job: Job, quick: bool) -> Row:
    """From its file, or worked now in a process of its own."""
    if quick or not job.file.is_file():
        told = [sys.executable, "-m", "benchmarks._every", job.name, job.target, str(job.seed)]
        told += ["--quick"] if quick else []
        done = subprocess.run(told, capture_output=True, text=True, timeout=FAILED_S, check=False)
        if done.returncode:
            raise SystemExit(f"{job} failed: {done.stderr[-2000:]}")
        row = done.stdout.splitlines()[-1]
        print(job.name, job.target, job.seed, row, flush=True)
        if quick:
            return Row(**json.loads(row))
        RESULTS.mkdir(parents=True, exist_ok=True)
        write_text(job.file, row + "\n")
    return Row(**json.loads(job.file.read_text()))


def tell(method: str, target: str, rows: list[Row], known: Known, result: _result.Result) -> list[Any]:
    """One line of the table and its figures."""
    shares = [known.share(row.objective) for row in rows if row.objective is not None]
    if shares:
        result.figures[f"attained/{method}/{target}"] = _result.over_seeds(shares)
    for name in ("reward", "kl", "seconds", "calls", "memory_mb"):
        if not math.isnan(found := _mean(rows, name)):  # what chooses among events has no kl
            result.figures[f"{name}/{method}/{target}"] = _result.Figure(found)
    share = str(result.figures[f"attained/{method}/{target}"]) if shares else "no density"
    numbers = [_mean(rows, name) for name in ("reward", "kl", "seconds")]
    return [method, len(rows), share, *numbers, f"{_mean(rows, 'calls'):,.0f}", f"{_mean(rows, 'memory_mb'):.0f}"]


def _mean(rows: list[Row], name: str) -> float:
    told = [getattr(row, name) for row in rows if getattr(row, name) is not None]
    return float(np.mean(told)) if told else math.nan


def _caption(name: str, known: Known, result: _result.Result) -> str:
    ceiling = result.figures.get(f"ceiling/{name}")
    told = f"E_pre[r] {known.base:.4f}, J* {known.optimum:.4f}"
    return told if ceiling is None else f"{told}; ceiling of Gaussian transitions {ceiling}"


if __name__ == "__main__":
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    asked = Job(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    print(json.dumps(asdict(work(asked, "--quick" in sys.argv))))
