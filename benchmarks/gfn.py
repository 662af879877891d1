"""Path consistency over whole chains against torchgfn's trajectory balance, on its own targets and with its budget.

    gap = J* - J = E_p[log p / p_pre - r],    J* = log Z = 0

``--theirs COMMAND`` is run as ``COMMAND TARGET SEED``, once beside each run of ours. Its standard input tells it a line
at a time, and it answers each with a number on a line: a count N (N more iterations; the seconds they took), and at
the end ``gap``. The two train in turns, so that a busy machine is as busy for both. Without it our half alone is told.
Settings were chosen on seeds 100 to 102; 0 to 2 are told.
"""

from __future__ import annotations

import logging
import math
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks import _mixture, _result
from rayft import domain as domains
from rayft.chain import Policy, log_normal, reverse_process, sample
from rayft.reward import Reward
from rayft.seeds import torch_generator

SEEDS, ITERATIONS, TURN, BATCH, PATHS = (0, 1, 2), 1500, 50, 10_000, 100_000
TRAINING: dict[str, Any] = {
    "alpha": 1.0,
    "chains": 200,
    "minibatch_size": 200,
    "lr": 1e-2,
    "lr_end": 0.03,
    "value_lr": 3e-2,
    "explore": 0.2,
    "explore_end": 0.0,
    "ema": 0.99,
    "target_kl": None,
}


@dataclass(frozen=True)
class Pair:
    """Of one target and seed: both gaps, and the seconds of each turn. ``theirs`` is NaN where there are none."""

    ours: float
    theirs: float
    seconds: list[tuple[float, float]]


def main() -> None:
    parser = _result.arguments(__doc__)
    parser.add_argument("--theirs", metavar="COMMAND", help="what trains their half, as this module's text says")
    parser.add_argument("--seeds", type=int, nargs="*", help="instead of 0, 1 and 2")
    told = parser.parse_args()
    import ray

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    torch.set_num_threads(1)
    ray.init("local", num_cpus=1, include_dashboard=False, logging_level=logging.ERROR)
    result, lines, turns = _result.Result("gfn", partial=told.theirs is None), [], []
    iterations, paths = (2 * TURN, BATCH) if told.quick else (ITERATIONS, PATHS)
    for target in _mixture.TARGETS:
        pairs = []
        for seed in told.seeds or (SEEDS[:1] if told.quick else SEEDS):
            pairs.append(pair(target, seed, told.theirs, iterations, paths))
            print(target, seed, f"ours {pairs[-1].ours:.4f}, theirs {pairs[-1].theirs:.4f}", flush=True)
        turns += [seconds for one in pairs for seconds in one.seconds]
        lines.append(tell(target, pairs, gap(exact(target), target, paths), result))
    columns = np.array(turns) / TURN * 1e3
    result.figures["torchgfn/ms_ours"] = _result.Figure(float(np.median(columns[:, 0])))
    if told.theirs is not None:
        result.figures["torchgfn/ms_theirs"] = _result.Figure(float(np.median(columns[:, 1])))
        result.figures["torchgfn/time_ratio"] = _result.over_rounds(columns.tolist(), ratio)
    times = ", ".join(f"{k.removeprefix('torchgfn/')} {v}" for k, v in result.figures.items() if "gap" not in k)
    _result.show("J* - J", ("", "ours", "theirs", "exact means"), lines, f"an iteration: {times}")
    result.write(_result.folder(told))
    ray.shutdown()


def ratio(turns: np.ndarray) -> float:
    """How long ours takes to what theirs does, in the middle turn."""
    return float(np.median(turns[:, 0] / turns[:, 1]))


def tell(target: str, pairs: list[Pair], reachable: float, result: _result.Result) -> list[Any]:
    """One line of the table and its figures; those of the tutorial's target need no name."""
    name = "" if target == "tutorial" else f"/{target}"
    found = {"ours": [one.ours for one in pairs], "theirs": [one.theirs for one in pairs], "exact": [reachable]}
    told = {who: _result.over_seeds(gaps) for who, gaps in found.items() if not np.isnan(gaps).any()}
    result.figures |= {f"torchgfn/elbo_gap_{who}{name}": figure for who, figure in told.items()}
    return [target, *(str(told.get(who, "")) for who in found)]


def pair(target: str, seed: int, command: str | None, iterations: int, paths: int) -> Pair:
    """Both trained, turn by turn."""
    with ours(target, seed, iterations) as algo, theirs(command, target, seed) as ask:
        seconds = []
        for _ in range(iterations // TURN):
            start = time.perf_counter()
            for _ in range(TURN):
                algo.train()
            seconds.append((time.perf_counter() - start, ask(str(TURN))))
        algo.sync()
        return Pair(gap(algo.env_runner.module.policies["ema"], target, paths), ask("gap"), seconds)


@contextmanager
def ours(target: str, seed: int, iterations: int) -> Iterator[Any]:
    """Path consistency in pieces of T."""
    from rayft.algorithms.pcl import PCLConfig

    config = PCLConfig().domain(_mixture.Gaussian).reward("log_ratio", target=target).training(**TRAINING)
    config = config.evaluate(every=0).scoring(isolate=False).debugging(seed=seed, log_level="ERROR")
    algo: Any = config.build_algo()
    algo.horizon = iterations
    yield algo
    algo.stop()


@contextmanager
def theirs(command: str | None, target: str, seed: int) -> Iterator[Callable[[str], float]]:
    """Their process, as a function from a line to its answer."""
    if command is None:
        yield lambda line: math.nan
        return
    told = [*shlex.split(command), target, str(seed)]
    with subprocess.Popen(told, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        asked, answers = process.stdin, process.stdout
        assert asked is not None and answers is not None

        def ask(line: str) -> float:
            print(line, file=asked, flush=True)
            return float(answers.readline())

        yield ask
        asked.close()


def gap(policy: Policy, target: str, paths: int) -> float:
    """E_p[log p / p_pre - r] over that many paths."""
    domain = _mixture.Gaussian()
    process, net = reverse_process(domain.schedule()), domains.pretrained(domain).requires_grad_(False)
    reference = Policy(net, process, domain.space, net.prediction)
    reward: Reward = _mixture.LogRatio(target)
    found = []
    for batch in range(max(paths // BATCH, 1)):
        generator = torch_generator(0, batch, "benchmark gfn")
        chains = sample(policy, torch.randn(BATCH, 2, generator=generator), {}, generator, reference=reference)
        log_ratio = chains.columns["log_prob"].double().sum(0)
        for row, mean in enumerate(chains.columns["mean_ref"]):
            log_ratio -= log_normal(domain.space, chains.x[row], mean, float(process.sigma[row + 1]), {})
        found.append(float(log_ratio.mean()) - float(reward(list(chains.x_0.numpy())).mean()))
    return float(np.mean(found))


def exact(target: str) -> Policy:
    """The same chain with the target's own E[x_0 | x_t], which transitions of this width can hardly do better than."""
    domain = _mixture.Gaussian()
    denoiser = _mixture.Exact(_mixture.TARGETS[target], domain.schedule())
    return Policy(denoiser, reverse_process(domain.schedule()), domain.space, denoiser.prediction)


if __name__ == "__main__":
    main()
