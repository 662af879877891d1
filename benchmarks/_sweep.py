"""A sweep over temperature and radius as a user runs it, with one pay-off bank and with a bank for each trial.

sweep/reward_calls_ratio  pay-off calls of the shared sweep over those of one whole trial (1: paid once)
sweep/calls_saved         pay-off calls of the sweep without a shared bank over those with one
sweep/speedup             its wall time over that of the shared sweep; /dear: with a reward of DEAR seconds a candidate
frontier/rgdm/TARGET      frontier share of the best (temperature, radius) found, trained anew on seeds it has not seen
shipped/NAME/*            the other sweeps of tune_configs as they are, seed 0: seconds and the best trial's objective
signal/TARGET             how much of a sample's reward is read at x0_hat, by timestep (payoff/signal.py)
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks import _result
from rayft.payoff.sampler import questions
from rayft.spec import parse
from rayft.sweep import outcomes, read_rows

CONFIG = "toy_rgdm_asha"
FRESH = (101, 102, 103, 104, 105)
WHERE_READ = ("training.x_0_above=15", "training.lr=1e-2", "training.ema=0.995", "training.chains=2048")
TARGETS: dict[str, tuple[str, ...]] = {  # what differs from the YAML; x0_hat: r is read there at all timesteps
    "quadratic/x0_hat": ("reward=quadratic",),
    "quadratic": ("reward=quadratic", "training.x_0_above=20"),
    "stripes/x0_hat": ("reward=stripes",),
    "stripes": ("reward=stripes", *WHERE_READ, "training.minibatch_size=256", "iterations=800", "evaluate.every=100"),
}
DEAR = 2e-5
SHORT = ["iterations=8", "evaluate.every=4", "search.trials=4", "evaluate.chains=256"]
SHIPPED = ("grid", "optuna", "pbt")


@dataclass(frozen=True)
class Swept:
    """A finished sweep."""

    folder: Path
    seconds: float

    @property
    def payoff_calls(self) -> int:
        return int(json.loads((self.folder / "sweep.json").read_text())["calls"].get("payoff", 0))

    @property
    def objective(self) -> float:
        found = outcomes(read_rows(self.folder), ended=True)
        return found[0].objective

    @property
    def best(self) -> dict[str, Any]:
        return yaml.safe_load((self.folder / "best.yaml").read_text())


def sweep(quick: bool) -> dict[str, _result.Figure]:
    """Each sweep is a command of its own, with the machine to itself."""
    short = SHORT if quick else []
    rounds = 1 if quick else 2
    told: dict[str, _result.Figure] = {}
    with tempfile.TemporaryDirectory() as place:
        cheap = [_pair(Path(place), f"cheap{number}", short) for number in range(rounds)]
        told |= _compared("", cheap)
        if not quick:
            dear = f"reward={{name: benchmarks._mischief:Dear, seconds: {DEAR}}}"
            told |= _compared("/dear", [_pair(Path(place), "dear", [dear])])
        for name in () if quick else SHIPPED:
            ran = _tune(Path(place), name, [], f"toy_rgdm_{name}")
            told[f"shipped/{name}/seconds"] = _result.Figure(ran.seconds)
            told[f"shipped/{name}/objective"] = _result.Figure(ran.objective)
    return told


def frontier(reward: str, quick: bool) -> dict[str, _result.Figure]:
    """A toy reward by sweeps of its own."""
    told: dict[str, _result.Figure] = {}
    with tempfile.TemporaryDirectory() as place:
        for target in (reward,) if quick else (one for one in TARGETS if one.startswith(reward)):
            told |= _frontier(Path(place), target, SHORT if quick else [], FRESH[:1] if quick else FRESH)
    return told


def _pair(place: Path, name: str, overrides: Sequence[str]) -> tuple[Swept, Swept]:
    """(with a shared bank, with a bank for each trial)."""
    shared, own = (_tune(place, f"{name}-{bank}", [*overrides, f"search.bank={bank}"]) for bank in ("shared", "own"))
    return shared, own


def _tune(place: Path, name: str, overrides: Sequence[str], config: str = CONFIG) -> Swept:
    """``rayft tune``, timed from the command to its end."""
    command = [sys.executable, "-m", "rayft.cli", "tune", config, f"output={place}", f"name={name}", *overrides]
    before = time.perf_counter()
    ran = subprocess.run([*command, "--quiet"], capture_output=True, text=True)
    seconds = time.perf_counter() - before
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{ran.stdout[-2000:]}{ran.stderr[-4000:]}")
    return Swept(place / name, seconds)


def _compared(name: str, pairs: Sequence[tuple[Swept, Swept]]) -> dict[str, _result.Figure]:
    shared, own = pairs[0]
    told = {
        f"sweep/seconds/shared{name}": _result.over_seeds([one.seconds for one, _ in pairs]),
        f"sweep/seconds/own{name}": _result.over_seeds([other.seconds for _, other in pairs]),
        f"sweep/speedup{name}": _result.over_seeds([other.seconds / one.seconds for one, other in pairs]),
        f"sweep/calls_saved{name}": _result.Figure(own.payoff_calls / shared.payoff_calls),
    }
    ratio = shared.payoff_calls / _one_trial(shared.best)
    return told if name else {"sweep/reward_calls_ratio": _result.Figure(ratio), **told}


def _one_trial(tree: dict[str, Any]) -> int:
    """Pay-off calls of a trial that is not stopped early."""
    settings = parse(tree).checked().settings()
    return int(tree["iterations"]) * settings.chains * questions(settings.aim())


def _frontier(place: Path, target: str, short: Sequence[str], seeds: Sequence[int]) -> dict[str, _result.Figure]:
    """The best cell of a sweep by its own frontier share, and what it reaches on other seeds."""
    goal = ["search.objective=frontier_share", "search.kl=null", "evaluate.chains=8192"]
    swept = _tune(place, f"frontier-{target.replace('/', '-')}", [*goal, *TARGETS[target], *short])
    best, (signal,) = swept.best, swept.folder.glob("signal-*.json")
    chains = (2048, 16384) if short else (32768, 131072)
    pretrained, shares, costs = None, [], []
    for seed in seeds:
        algo: Any = _algo(best, seed, *chains)
        algo.pretrained = pretrained
        for _ in range(int(best["iterations"])):
            algo.train()
        verdict = algo.evaluate_policy()
        pretrained = algo.pretrained
        shares.append(verdict.scalars()["frontier_share"])
        costs.append(verdict.scalars()["kl"])
        algo.stop()
    training = best["training"]
    return {
        f"frontier/rgdm/{target}": _result.over_seeds(shares),
        f"frontier/rgdm/{target}/kl": _result.over_seeds(costs),
        f"frontier/rgdm/{target}/temperature": _result.Figure(training["temperature"]),
        f"frontier/rgdm/{target}/radius": _result.Figure(training["radius"]),
        **{f"signal/{target}/{t}": _result.Figure(value) for t, value in json.loads(signal.read_text()).items()},
    }


def _algo(tree: dict[str, Any], seed: int, chains: int, pretrained_chains: int) -> Any:
    """The best trial's run at another seed, to be evaluated at its end alone."""
    evaluate = {**tree["evaluate"], "every": 0, "chains": chains, "pretrained_chains": pretrained_chains}
    spec = parse({**tree, "seed": seed, "evaluate": evaluate})
    algo: Any = spec.checked().build_algo()
    algo.horizon = spec.iterations
    return algo
