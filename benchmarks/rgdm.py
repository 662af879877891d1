"""What learning from a pay-off bank costs, and what sharing one saves: ``rayft tune`` with a bank and without.

step/vs_ddpm         a learner's step from a finished bank over a plain DDPM training step of the same network
wait/*               share of the time in which the learner has nothing to learn from
bank/rss_gb          most resident memory while 10 GB of shards are read
sweep/*, frontier/*  a sweep over temperature and radius: calls, time, and the best cell on fresh seeds
"""

from __future__ import annotations

import os

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # read when ray is imported; otherwise it writes ~/.ray/auth_token

import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor, nn

from benchmarks import _result, _sweep
from benchmarks.overhead import LR, WIDE, Plane
from rayft.algorithms.rgdm import RGDMConfig
from rayft.chain import reverse_process
from rayft.payoff.bank import Bank, Shard, load, save
from rayft.payoff.pairs import Aim
from rayft.payoff.reading import View, cut, read
from rayft.payoff.weight import Running

SLEEP = "benchmarks._mischief:Sleep"
SHARD_BYTES, BANK_BYTES = 64 * 2**20, 10 * 10**9
TARGETS = {"step/vs_ddpm": 1.10, "wait/finished_bank": 0.02, "bank/rss_gb": 1.5}
AT_LEAST = {"frontier/rgdm/quadratic": 0.95, "frontier/rgdm/stripes": 0.95}


class Cloud(Plane):
    """The same world with data: standard normal numbers."""

    def data(self, num_events: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.randn(num_events, *self.event_shape, generator=generator), {}


def main() -> None:
    parser = _result.arguments(__doc__)
    parser.add_argument("--only", nargs="*", choices=BENCHES, default=list(BENCHES), help="these parts alone")
    told = parser.parse_args()
    torch.set_num_threads(1)
    root = str(Path(__file__).parents[1])
    environment = {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"}
    quiet: dict[str, Any] = {"include_dashboard": False, "logging_level": logging.ERROR, "log_to_driver": False}
    ray.init("local", num_cpus=8, runtime_env={"env_vars": environment}, **quiet)
    result = _result.Result("rgdm", partial=set(told.only) != set(BENCHES))
    for name in told.only:
        for figure, value in BENCHES[name](told.quick).items():
            result.figures[figure] = value
            print(f"{figure:28} {value}", flush=True)
    ray.shutdown()
    asked = {k: f"<= {v:g}" for k, v in TARGETS.items()} | {k: f">= {v:g}" for k, v in AT_LEAST.items()}
    rows = [(name, str(figure), asked.get(name, "")) for name, figure in result.figures.items()]
    _result.show("rgdm", ("figure", "measured", "asked"), rows)
    result.write(_result.folder(told))


# -- a step


def step(quick: bool) -> dict[str, _result.Figure]:
    """One iteration from a finished bank, trust region and averages of weights left out, over as many DDPM steps."""
    told = {}
    for name, hidden in (("step/vs_ddpm", 256 if quick else WIDE), ("step/vs_ddpm/512", 512), ("step/vs_ddpm/64", 64)):
        told[name] = _step(hidden, 3 if quick else 15)
    return told


def _step(hidden: int, rounds: int) -> _result.Figure:
    pairs, size = 8192, 512
    with tempfile.TemporaryDirectory() as folder:
        algo = _built(hidden, bank=folder, bank_pairs=pairs, chains=pairs, minibatch_size=size)
        algo.train()
        domain, module = algo.domain, algo.env_runner.module
        bare = Bare(domain.denoiser(), domain, module.process.schedule.alpha_bar)

        def ours() -> None:
            algo.learn(algo.experience()[0])

        def plain() -> None:
            for _ in range(pairs // size):
                bare.step(size)

        ratio = _in_turn(plain, ours, rounds)
        algo.stop()
    return ratio


class Bare:
    """DDPM training by hand: data, noise, network, squared error, clipped gradient, AdamW."""

    def __init__(self, net: nn.Module, domain: Any, alpha_bar: Tensor) -> None:
        self.net, self.domain, self.generator = net, domain, torch.Generator().manual_seed(0)
        self.signal, self.noise = alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.0)

    def step(self, size: int) -> None:
        x_0, _ = self.domain.data(size, self.generator)
        t = torch.randint(1, len(self.signal), (size,), generator=self.generator)
        eps = torch.randn(x_0.shape, generator=self.generator)
        x_t = self.signal[t, None] * x_0 + self.noise[t, None] * eps
        loss = (self.net(x_t, t, {}) - eps).square().sum(-1).mean()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()


# -- waiting


def wait(quick: bool) -> dict[str, _result.Figure]:
    """A learner of a wide network, 2 ms a reward: with one pay-off actor, with two, and from a finished bank."""
    pairs, told = 32 if quick else 64, {}
    with tempfile.TemporaryDirectory() as folder:
        bank = str(Path(folder) / "bank")
        for name, actors in (("one_actor", 1), ("two_actors", 2), ("finished_bank", 0)):
            own = {} if actors else {"bank": bank, "bank_pairs": 4 * pairs, "temperature": 1e6}
            algo = _built(
                512,
                reward=(SLEEP, {"seconds": 0.002}),
                scoring={"actors": actors, "num_cpus_per_actor": 0.5},
                payoff_actors=actors,
                chains=pairs,
                minibatch_size=pairs,
                **own,
            )
            shares = []
            for number in range(5 + (3 if quick else 10)):
                before = time.perf_counter()
                algo.train()
                if number >= 5:  # by then actors are up, and the bank is finished
                    shares.append(algo.waited / (time.perf_counter() - before))
            told[f"wait/{name}"] = _result.over_rounds([[s] for s in shares], lambda r: float(np.mean(r)))
            algo.stop()
    return told


# -- memory


def bank(quick: bool) -> dict[str, _result.Figure]:
    """10 GB of shards (one of 64 MB under many names) read in a process of its own."""
    num = 20 if quick else BANK_BYTES // SHARD_BYTES + 1
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "shard_000000.arrow"
        save(_shard(), first)
        for number in range(1, num):
            os.link(first, first.with_name(f"shard_{number:06d}.arrow"))
        size = first.stat().st_size
        start = time.perf_counter()
        code = "from benchmarks.rgdm import read_through; import sys; print(read_through(sys.argv[1]))"
        ran = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
        seconds = time.perf_counter() - start
    return {
        "bank/rss_gb": _result.Figure(float(ran.stdout)),
        "bank/size_gb": _result.Figure(num * size / 1e9),
        "bank/gb_per_s": _result.Figure(num * size / 1e9 / seconds),
    }


def _shard() -> Shard:
    """Pairs in 64 numbers with 8 candidates."""
    dim, num = 64, SHARD_BYTES // (4 * 64 * (8 + 2))
    rng = np.random.default_rng(0)
    x_0, mean_ref = rng.standard_normal((2, num, dim), dtype=np.float32)
    eps_star = rng.standard_normal((num, 8, dim), dtype=np.float32)
    t = rng.integers(1, 101, num).astype(np.int32)
    return Shard(0, 7, x_0, t, eps_star, rng.standard_normal((num, 8)), mean_ref)


def read_through(folder: str) -> float:
    """Every shard read at a temperature; the most memory that was resident, in GB."""
    torch.set_num_threads(1)
    world, aim = Cloud(), Aim(8, (1.0,), "absolute", "x_prev", "mean", "importance", 0, None)
    process = reverse_process(world.schedule())
    view = View(0.5, 1.0, "batch", "vlb", True)
    found = Bank(Path(folder), {"shard_pairs": 0})
    for number in found.numbers:
        rows = cut(load(found.path(number)), slice(0, 4096), process, world.space, aim)
        read([rows], view, aim, process, Running())
    told = Path("/proc/self/status").read_text()  # getrusage would count the parent's memory too, from before exec
    return int(told.partition("VmHWM:")[2].split()[0]) / 1e6


def _built(hidden: int, reward: Any = None, scoring: Any = None, **training: Any) -> Any:
    path, arguments = reward or ("norm", {})
    return (
        RGDMConfig()
        .domain("benchmarks.rgdm:Cloud", hidden=hidden)
        .reward(path, **arguments)
        .training(**{"lr": LR, "temperature": 100.0, **training})
        .scoring(**(scoring or {}))
        .evaluate(every=0, chains=64, pretrained_chains=64)
        .build_algo()
    )


def _in_turn(first: Callable[[], Any], second: Callable[[], Any], rounds: int) -> _result.Figure:
    """Time of the second over that of the first, in alternating rounds."""
    first()
    second()
    times = []
    for number in range(rounds):
        pair = (first, second) if number % 2 else (second, first)
        taken = []
        for one in pair:
            start = time.perf_counter()
            one()
            taken.append(time.perf_counter() - start)
        times.append(taken if number % 2 else taken[::-1])
    return _result.over_rounds(times, lambda table: float(np.median(table[:, 1]) / np.median(table[:, 0])))


BENCHES: dict[str, Callable[[bool], dict[str, _result.Figure]]] = {
    "step": step,
    "wait": wait,
    "bank": bank,
    "sweep": _sweep.sweep,
    "quadratic": partial(_sweep.frontier, "quadratic"),
    "stripes": partial(_sweep.frontier, "stripes"),
}

if __name__ == "__main__":
    main()
