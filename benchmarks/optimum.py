"""How near each algorithm comes to the toy's known optimum, and in how many seconds of one core.

    attained = (J(p) - E_pre[r]) / (J* - E_pre[r]),    frontier share = (E_p[r] - E_pre[r]) / (F(KL_p) - E_pre[r])

First the ceiling of Gaussian transitions (_ceiling.py), then PPO and reward-weighted MLE through RLlib at two alphas,
then RGDM, which knows no alpha, over temperature and radius. Settings were chosen on seeds 100 to 102, the same for
both alphas; seeds 0 to 4 are reported. J* and E_pre[r] are solved on a grid, the frontier is read off 200,000
pretrained samples, and every policy meets the same noise, so a share is good to about 0.001.
"""

from __future__ import annotations

import os

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # read when ray is imported; otherwise it writes ~/.ray/auth_token

import dataclasses
import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from benchmarks import _ceiling, _every, _picture, _result
from rayft import domain as domains
from rayft import evaluate
from rayft.algorithms.config import DiffusionConfig
from rayft.algorithms.ppo import PPOConfig
from rayft.algorithms.rgdm import RGDMConfig
from rayft.algorithms.rwmle import RWMLEConfig
from rayft.chain import Policy, log_normal, reverse_process, sample
from rayft.seeds import torch_generator

ALPHAS = (0.5, 0.2)
TEMPERATURES, RADII = (0.1, 0.3, 0.5, 1.0, 3.0), (0.0, 0.5, 1.0, 1.5, 2.0)
CONFIGS: dict[str, type[DiffusionConfig]] = {"ppo": PPOConfig, "rwmle": RWMLEConfig, "rgdm": RGDMConfig}
SETTINGS: dict[str, dict[str, Any]] = {
    "ppo": {"iterations": 200, "lr": 5e-4, "chains": 512, "ema": 0.99},
    "rwmle": {"iterations": 200, "lr": 1e-3, "chains": 1024, "ema": 0.995},
    "rgdm": {"iterations": 36, "lr": 1e-3, "ema": 0.97, "timestep_weight": "simple", "x_0_above": 20},
    "ceiling": {"iterations": 1000},
}
MAX_KL = (
    3.0  # p* at alpha 0.2 is at 2.1 nats; far beyond, nearly all reward is won at any price and a share says little
)
BATCH = 10_000


@dataclass(frozen=True)
class Plan:
    """What is run, and how closely it is looked at."""

    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    alphas: Sequence[float] = ALPHAS
    temperatures: Sequence[float] = TEMPERATURES
    radii: Sequence[float] = RADII
    chains: int = 100_000
    pretrained_chains: int = 200_000
    spacing: float = 0.05
    shorter: int = 1  # iterations are divided by this


QUICK = Plan((0,), (0.5,), (0.3,), (0.0, 1.5), 10_000, 20_000, 0.1, 25)


@dataclass(frozen=True)
class Job:
    """One training run."""

    algorithm: str
    seed: int
    training: dict[str, Any]

    @property
    def name(self) -> str:
        return " ".join([self.algorithm, f"seed {self.seed}", *(f"{k} {v}" for k, v in self.training.items())])


@dataclass(frozen=True)
class Row:
    """What a policy does on average, and what it cost to train."""

    reward: float
    kl: float
    log_ratio: float
    seconds: float

    def objective(self, alpha: float) -> float:
        """J. The sampled log p/p_pre has the KL's mean, and near p* nearly cancels the reward's scatter."""
        return self.reward - alpha * self.log_ratio


class Toy:
    """The pretrained toy: its chain, samples of its rewards, and what is known of it without sampling."""

    def __init__(self, plan: Plan) -> None:
        domain = domains.build("toy", {})
        net = domain.denoiser().requires_grad_(False)
        self.reference = Policy(net, reverse_process(domain.schedule()), domain.space)
        self.plane = _ceiling.Plane(self.reference, plan.spacing)
        self.base = self.plane.expected(_ceiling.quadratic(self.plane.points))
        self.optimum = {alpha: self.plane.optimum(alpha) for alpha in plan.alphas}
        parts = [
            _ceiling.quadratic(sample(self.reference, *_start(batch, "pretrained")).x_0)
            for batch in range(plan.pretrained_chains // BATCH)
        ]
        self.rewards = torch.cat(parts).double().numpy()

    def attained(self, objective: float, alpha: float) -> float:
        """The share of J* - E_pre[r]."""
        return (objective - self.base) / (self.optimum[alpha] - self.base)

    def measure(self, policy: Policy, num_chains: int, seconds: float) -> Row:
        """Means over ``num_chains`` chains, the same x_T and the same noise for every policy."""
        parts = [self._batch(policy, batch) for batch in range(num_chains // BATCH)]
        reward, kl, log_ratio = np.mean(parts, axis=0).tolist()
        return Row(reward, kl, log_ratio, seconds)

    @torch.no_grad()
    def _batch(self, policy: Policy, batch: int) -> list[float]:
        chains = sample(policy, *_start(batch, "evaluate"), reference=self.reference)
        before, columns = torch.zeros(BATCH), chains.columns
        for row in range(chains.num_rows):
            sigma = float(policy.process.sigma[row + 1])
            before += log_normal(policy.space, chains.x[row], columns["mean_ref"][row], sigma, {})
        log_ratio = columns["log_prob"].sum(0) - before
        told = (_ceiling.quadratic(chains.x_0), columns["kl"].sum(0), log_ratio)
        return [float(value.double().mean()) for value in told]


def _start(batch: int, purpose: str) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Generator]:
    generator = torch_generator(0, batch, f"benchmark {purpose}")
    return torch.randn(BATCH, 2, generator=generator), {}, generator


def train(job: Job) -> tuple[Policy, float]:
    """The policy after training as a user would, and the seconds that ``algo.train()`` took."""
    told = {**job.training}
    iterations = told.pop("iterations")
    config = CONFIGS[job.algorithm]().domain("toy").reward("quadratic").training(**told).evaluate(every=0)
    algo: Any = config.debugging(seed=job.seed, log_level="ERROR").build_algo()
    seconds = 0.0
    for _ in range(iterations):
        before = time.perf_counter()
        algo.train()
        seconds += time.perf_counter() - before
    algo.sync()
    policy = algo.env_runner.module.policies["ema" if algo.settings.ema else "current"]
    algo.stop()
    return policy, seconds


def climb(job: Job, reference: Policy) -> tuple[Policy, float]:
    """The ceiling's own training."""
    before = time.perf_counter()
    policy = _ceiling.backpropagated(reference, job.training["alpha"], job.seed, job.training["iterations"])
    return policy, time.perf_counter() - before


class Ledger:
    """Finished rows, by job; with a file, an interrupted benchmark goes on where it was."""

    def __init__(self, toy: Toy, plan: Plan, path: Path | None) -> None:
        self.toy, self.plan, self.path = toy, plan, path
        lines = path.read_text().splitlines() if path is not None and path.is_file() else []
        self.rows = {told.pop("job"): Row(**told) for told in map(json.loads, lines)}

    def row(self, job: Job) -> Row:
        """From the ledger, or trained and measured now."""
        key = f"{job.name}, {self.plan.chains} chains"
        if key not in self.rows:
            policy, seconds = climb(job, self.toy.reference) if job.algorithm == "ceiling" else train(job)
            row = self.rows[key] = self.toy.measure(policy, self.plan.chains, seconds)
            print(f"{job.name}: reward {row.reward:.4f}, KL {row.kl:.3f}, {seconds:.1f} s", flush=True)
            if self.path is not None:
                with self.path.open("a") as file:
                    file.write(json.dumps({"job": key, **dataclasses.asdict(row)}) + "\n")
        return self.rows[key]

    def job(self, algorithm: str, seed: int, **training: float) -> Job:
        """With the settings above."""
        settings = SETTINGS[algorithm]
        iterations = math.ceil(settings["iterations"] / self.plan.shorter)
        return Job(algorithm, seed, {**settings, "iterations": iterations, **training})


def attained_rows(ledger: Ledger, algorithm: str, result: _result.Result) -> tuple[list[Any], list[_picture.Point]]:
    """One line of the table, and one point of the picture, per alpha: means over seeds."""
    lines, points, longest = [], [], 0.0
    for alpha in ledger.plan.alphas:
        rows = [ledger.row(ledger.job(algorithm, seed, alpha=alpha)) for seed in ledger.plan.seeds]
        share = _result.over_seeds([ledger.toy.attained(row.objective(alpha), alpha) for row in rows])
        taken = max(row.seconds for row in rows)
        longest = max(longest, taken)
        result.figures[f"attained/{algorithm}/{alpha}"] = share
        kl, reward = (float(np.mean([getattr(row, name) for row in rows])) for name in ("kl", "reward"))
        lines.append([algorithm, alpha, str(share), kl, f"{taken:.1f}"])
        points.append(_picture.Point(f"{algorithm}, by alpha", kl, reward, str(alpha)))
    result.figures[f"seconds/{algorithm}"] = _result.Figure(longest)
    return lines, points


def exact_rows(toy: Toy, result: _result.Result) -> list[list[object]]:
    """The ceiling that no network can exceed, and J* beside what the pretrained samples make of it."""
    lines = []
    for alpha, best in toy.optimum.items():
        share = toy.attained(toy.plane.ceiling(alpha), alpha)
        # the pretrained model against itself: only its J* and interval are read
        sampled = evaluate.attained(toy.rewards, toy.rewards, np.zeros_like(toy.rewards), alpha).optimum
        result.figures[f"attained/exact_ceiling/{alpha}"] = _result.Figure(share)
        result.figures[f"optimum/exact/{alpha}"] = _result.Figure(best)
        result.figures[f"optimum/sampled/{alpha}"] = _result.Figure(sampled.value, sampled.low, sampled.high)
        lines.append(["ceiling, any mean", alpha, f"{share:.4g}", "", ""])
    return lines


def grid(ledger: Ledger, frontier: evaluate.Frontier, result: _result.Result) -> tuple[list[Any], list[_picture.Point]]:
    """RGDM's frontier share at every temperature (a line) and radius; the best cell again on the reported seeds."""
    base = frontier.baseline

    def share(row: Row) -> float:
        return (row.reward - base) / (frontier.reward_at(row.kl) - base)

    lines, points, cells = [], [], {}
    for temperature in ledger.plan.temperatures:
        rows = [ledger.row(ledger.job("rgdm", 100, temperature=temperature, radius=r)) for r in ledger.plan.radii]
        for radius, row in zip(ledger.plan.radii, rows, strict=True):
            cells[temperature, radius] = share(row) if row.kl <= MAX_KL else -math.inf
            result.figures[f"frontier/rgdm/{temperature:g}/{radius:g}"] = _result.Figure(share(row))
            points.append(_picture.Point(f"RGDM tau {temperature:g}, by radius", row.kl, row.reward, f"{radius:g}"))
        lines.append([f"tau {temperature:g}", *(f"{share(row):.3f} (KL {row.kl:.1f})" for row in rows)])
    temperature, radius = max(cells, key=cells.__getitem__)
    best = [ledger.row(ledger.job("rgdm", s, temperature=temperature, radius=radius)) for s in ledger.plan.seeds]
    result.figures["frontier/rgdm/best"] = _result.over_seeds([share(row) for row in best])
    chosen = {"temperature": temperature, "radius": radius, "kl": float(np.mean([row.kl for row in best]))}
    result.figures |= {f"frontier/rgdm/best/{name}": _result.Figure(value) for name, value in chosen.items()}
    result.figures["seconds/rgdm"] = _result.Figure(max(row.seconds for row in best))
    return lines, points


def tell(plan: Plan, result: _result.Result, lines: list[Any], cells: list[Any]) -> None:
    """Two tables."""
    said = f"95% of the mean over {len(plan.seeds)} seeds; seconds of the longest run. Targets: ceiling - 0.01, 0.975."
    _result.show("optimum: the toy, T = 50", ("", "alpha", "attained", "KL", "seconds"), lines, said)
    names = ("frontier/rgdm/best", *(f"frontier/rgdm/best/{name}" for name in ("temperature", "radius", "kl")))
    best, temperature, radius, kl = (str(result.figures[name]) for name in names)
    said = (
        f"Seed 100. Best within {MAX_KL:g} nats: tau {temperature}, radius {radius}; on the reported seeds {best} at "
    )
    said += f"KL {kl}, at most {result.figures['seconds/rgdm']} s. Target: 0.93 within 5 s."
    radii = [f"radius {radius:g}" for radius in plan.radii]
    _result.show("RGDM: frontier share, radius in sigma_t sqrt(dim)", ("", *radii), cells, said)


def main() -> None:
    parser = _result.arguments(__doc__)
    parser.add_argument("--parts", type=Path, help="file that keeps finished runs: start again and it goes on")
    parser.add_argument("--seeds", type=int, nargs="+", help="other seeds than 0 to 4")
    parser.add_argument("--all", action="store_true", help="every algorithm and guide on two targets; see _every.py")
    parser.add_argument("--show", action="store_true", help="with --all: tells what is there, runs nothing")
    parser.add_argument("--grid", action="store_true", help="RGDM's grid alone; the picture stays as it is")
    told = parser.parse_args()
    torch.set_num_threads(1)
    if told.all:
        _every.main(told)
        return
    ray.init("local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR)
    plan = QUICK if told.quick else Plan()
    plan = dataclasses.replace(plan, seeds=told.seeds) if told.seeds else plan
    toy, result = Toy(plan), _result.Result("optimum", partial=told.grid)
    ledger, frontier = Ledger(toy, plan, told.parts), evaluate.frontier(toy.rewards)
    lines, points = exact_rows(toy, result), []
    for algorithm in () if told.grid else ("ceiling", "ppo", "rwmle"):
        more, found = attained_rows(ledger, algorithm, result)
        lines, points = lines + more, points + found
    cells, found = grid(ledger, frontier, result)
    tell(plan, result, lines, cells)
    folder = _result.folder(told)
    result.write(folder)
    if folder is not None and not told.grid:
        _picture.write(folder / "optimum.svg", "The toy: reward against KL", frontier, points + found)


if __name__ == "__main__":
    main()
