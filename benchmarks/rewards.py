"""What scoring in isolated Ray actors costs, and what it survives: side by side with plain pools, in one run.

    speed-up = time of one process / ours      efficiency = perfect time / ours      1 = nothing is lost

QED is of 20,000 real molecules on two actors; the sleeping reward takes 50 ms a sample. What is compared takes turns.
"""

from __future__ import annotations

import os

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # read when ray is imported; otherwise it writes ~/.ray/auth_token

import contextlib
import gzip
import logging
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import torch
from ray.util import ActorPool

from benchmarks import _result
from rayft.algorithms.ppo import PPOConfig
from rayft.algorithms.rwmle import RWMLEConfig
from rayft.rewards.cache import SharedCache
from rayft.rewards.pool import Placement, RewardPool
from rayft.rewards.shelf import Entry
from rayft.rewards.worker import Limits, Outcome
from rayft.score import Part, Told

MOLECULES = Path(__file__).parent / "data" / "qm9_20000.smi.gz"
QED, SLEEP, POISONED = "envs.molecules.reward:QED", "benchmarks._mischief:Sleep", "benchmarks._mischief:PoisonedQED"
MISCHIEF = "benchmarks._mischief:Mischief"
BATCH = 64
KINDS = {"segfault": "crashed", "exit": "crashed", "hang": "timed out", "raise": "raised", "type": "returned"}
TARGETS = {
    "qed/isolated": 1.8,
    "qed/vs_best_pool": 0.95,
    "sleep/32": 0.97,
    "sleep/64": 0.94,
    "sleep/start_seconds": 60.0,
    "cache/20k_seconds": 0.2,
    "poison/exact": 1,
    "poison/extra_seconds": 6.0,
    "overlap/ratio": 1.15,
    "mischief/gap": 0.02,
}
AT_MOST = ("sleep/start_seconds", "cache/20k_seconds", "poison/extra_seconds", "overlap/ratio", "mischief/gap")


def main() -> None:
    """Every figure, a table, and results/rewards.json."""
    parser = _result.arguments(__doc__)
    parser.add_argument("--only", nargs="*", choices=BENCHES, default=list(BENCHES), help="these parts alone")
    told = parser.parse_args()
    torch.set_num_threads(1)
    ray.init("local", num_cpus=128, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    result = _result.Result("rewards", partial=set(told.only) != set(BENCHES))
    for name in told.only:
        for figure, value in BENCHES[name](told.quick).items():
            result.figures[figure] = value
            print(f"{figure:24} {value}", flush=True)
    ray.shutdown()
    rows = [(name, str(figure), _asked(name)) for name, figure in result.figures.items()]
    _result.show("rewards", ("figure", "measured", "asked"), rows)
    result.write(_result.folder(told))


def _asked(name: str) -> str:
    if name not in TARGETS:
        return ""
    return f"{'<=' if name in AT_MOST else '>='} {TARGETS[name]:g}"


# -- QED


def qed(quick: bool) -> dict[str, _result.Figure]:
    """Molecules a second: one process, two processes, two plain actors, and two actors with a child each."""
    molecules = read_molecules()[: 2000 if quick else 20000]
    reward = make_qed()
    expected = np.array(reward(molecules))
    made_actor: Any = ray.remote(num_cpus=1)(Plain)
    plain = [made_actor.remote() for _ in range(2)]
    ray.get([actor.score.remote(molecules[:BATCH]) for actor in plain])
    batches = [molecules[i : i + BATCH] for i in range(0, len(molecules), BATCH)]
    with multiprocessing.get_context("spawn").Pool(2, initializer=_start_qed) as pool, made(QED, actors=2) as ours:
        pool.map(_score_qed, batches[:4])

        def score_ours() -> np.ndarray:
            return run(ours, molecules).values[0]

        ways: dict[str, Callable[[], Any]] = {
            "one": lambda: [reward([molecule])[0] for molecule in molecules],
            "ours": score_ours,
            "multiprocessing": lambda: [s for some in pool.imap(_score_qed, batches) for s in some],
            "actor_pool": lambda: [
                s for some in ActorPool(plain).map(lambda a, b: a.score.remote(b), batches) for s in some
            ],
        }
        for name, way in ways.items():
            assert np.array_equal(np.asarray(way()), expected), name
        rounds = interleaved(list(ways.values()), 2 if quick else 5)
    for actor in plain:
        ray.kill(actor)
    one, own, processes, actors = range(4)
    return {
        "qed/one_process_rate": _result.over_rounds(rounds, lambda r: len(molecules) / float(np.median(r[:, one]))),
        "qed/isolated": _result.over_rounds(rounds, lambda r: float(np.median(r[:, one]) / np.median(r[:, own]))),
        "qed/multiprocessing": _result.over_rounds(
            rounds, lambda r: float(np.median(r[:, one]) / np.median(r[:, processes]))
        ),
        "qed/actor_pool": _result.over_rounds(rounds, lambda r: float(np.median(r[:, one]) / np.median(r[:, actors]))),
        "qed/vs_best_pool": _result.over_rounds(
            rounds, lambda r: float(min(np.median(r[:, processes]), np.median(r[:, actors])) / np.median(r[:, own]))
        ),
    }


def make_qed() -> Any:
    """The reward, in this process."""
    from envs.molecules import reward

    return reward.QED()


def read_molecules() -> list[str]:
    """20,000 SMILES of QM9."""
    with gzip.open(MOLECULES, "rt") as file:
        return file.read().split()


_own: Any = None


def _start_qed() -> None:
    global _own
    _own = make_qed()


def _score_qed(molecules: Sequence[str]) -> list[float]:
    return list(_own(molecules))


class Plain:
    """What anybody would write as an actor."""

    def __init__(self) -> None:
        self.reward = make_qed()

    def score(self, molecules: Sequence[str]) -> list[float]:
        return list(self.reward(molecules))


# -- a reward that sleeps


def sleep(quick: bool) -> dict[str, _result.Figure]:
    """Efficiency of many actors on two cores, with the memory that they and their children take."""
    told: dict[str, _result.Figure] = {}
    started = taken = shared = 0.0
    for num in (4,) if quick else (32, 64):
        start = time.perf_counter()
        with made(SLEEP, actors=num) as pool:
            while pool.num_actors < num:
                time.sleep(0.1)
            started = time.perf_counter() - start
            items = list(range(80 if quick else 12800))
            run(pool, items[: 4 * num])
            perfect = 0.05 * len(items) / num
            times = [timed(lambda pool=pool, items=items: run(pool, items)) for _ in range(2 if quick else 3)]
            taken, shared = memory()
        told[f"sleep/{num}"] = _result.over_seeds([perfect / seconds for seconds in times])
    return {
        **told,
        "sleep/start_seconds": _result.Figure(started),
        "sleep/rss_gb": _result.Figure(taken / 1e9),
        "sleep/pss_gb": _result.Figure(shared / 1e9),
    }


def memory() -> tuple[float, float]:
    """Bytes of all reward actors and of the processes under them: resident, and with shared pages counted once."""
    found: dict[int, tuple[int, int]] = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "RewardActor" in " ".join(process.cmdline()):
                for one in (process, *process.children(recursive=True)):
                    told: Any = one.memory_full_info()
                    found[one.pid] = told.rss, told.pss
    resident, proportional = zip(*found.values(), strict=True)
    return sum(resident), sum(proportional)


# -- scores that are known already


def cache(quick: bool) -> dict[str, _result.Figure]:
    """Seconds to find 20,000 keys through the named actor, from a file."""
    import tempfile

    num = 2000 if quick else 20000
    entries = {os.urandom(16): Entry(float(i)) for i in range(num)}
    with tempfile.TemporaryDirectory() as folder:
        client = SharedCache(str(Path(folder) / "scores.sqlite"), 1024)
        client.put(entries)
        client.flush()
        times = []
        for _ in range(10):
            start = time.perf_counter()
            found = client.lookup(list(entries))
            times.append(time.perf_counter() - start)
            assert found == entries
        client.close()
    rounds = [[seconds] for seconds in times]
    return {"cache/20k_seconds": _result.over_rounds(rounds, lambda r: float(np.median(r)))}


# -- ten bad samples among 5,000


def poison(quick: bool) -> dict[str, _result.Figure]:
    """Whether exactly the bad ones are blamed, each with its reason, and what they cost."""
    molecules = read_molecules()[: 1000 if quick else 5000]
    rng = np.random.default_rng(0)
    extra, exact = [], True
    with made(POISONED, actors=2, timeout=1.0) as pool:
        run(pool, molecules)
        for _ in range(1 if quick else 5):
            places = rng.choice(len(molecules), 10, replace=False)
            bad = {int(place): list(KINDS)[i % 5] for i, place in enumerate(places)}
            items = [f"{bad[i]}{i}" if i in bad else molecule for i, molecule in enumerate(molecules)]
            start = time.perf_counter()
            clean = run(pool, molecules)
            between = time.perf_counter()
            found = run(pool, items)
            extra.append((time.perf_counter() - between) - (between - start))
            blamed = {row: reason.partition(":")[0] for (_, row), reason in found.errors.items()}
            kept = [i for i in range(len(items)) if i not in bad]
            right = np.array_equal(found.values[0][kept], clean.values[0][kept])
            exact = exact and right and blamed == {row: KINDS[kind] for row, kind in bad.items()}
    return {"poison/exact": _result.Figure(float(exact)), "poison/extra_seconds": _result.over_seeds(extra)}


# -- drawing while scoring


def overlap(quick: bool) -> dict[str, _result.Figure]:
    """An iteration whose scoring takes as long as its sampling: with 8 micro-batches, and without.

    A wide network, so that an eighth of the chains takes an eighth of the time; 200 steps, of which learning is about
    2%; and one thread for torch, so that the reward actor has the other core.
    """
    chains, hidden, num_steps = (128, 256, 50) if quick else (512, 1280, 200)

    def draw_all(algo: Any, pieces: int) -> None:
        for number in range(pieces):
            algo.collect("train", algo.draw_function(), chains, piece=(number, pieces))

    def built(pieces: int, seconds: float) -> Any:
        return (
            RWMLEConfig()
            .domain("benchmarks.overhead:Plane", hidden=hidden, num_steps=num_steps)
            .reward(SLEEP, seconds=seconds / chains)
            .training(chains=chains, minibatch_size=chains, roll_in="current")
            .scoring(actors=1, micro_batches=pieces)
            .evaluate(every=0, chains=64, pretrained_chains=64)
            .build_algo()
        )

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    probe = built(8, 1e-3)
    sampling = float(np.median([timed(lambda: draw_all(probe, 8)) for _ in range(3)]))
    probe.stop()
    rounds: list[list[float]] = []
    algos = {pieces: built(pieces, sampling) for pieces in (1, 8)}
    for algo in algos.values():
        algo.train()
    events = np.random.default_rng(0).standard_normal((chains, *algos[1].domain.event_shape)).astype(np.float32)
    for _ in range(2 if quick else 6):
        drawn = timed(lambda: draw_all(algos[8], 8))
        scored = timed(lambda: algos[8].rewards.score(events, {}))
        rounds.append([timed(algo.train) / max(drawn, scored) for algo in algos.values()])
    for algo in algos.values():
        algo.stop()
    torch.set_num_threads(threads)
    return {
        "overlap/ratio": _result.over_rounds(rounds, lambda r: float(np.median(r[:, 1]))),
        "overlap/without": _result.over_rounds(rounds, lambda r: float(np.median(r[:, 0]))),
        "overlap/sampling_seconds": _result.Figure(sampling),
    }


# -- a whole run among bad samples


def mischief(quick: bool) -> dict[str, _result.Figure]:
    """Attained share of PPO on the toy, with 5% of all samples bad in every way, and without."""
    shares: dict[float, list[float]] = {0.0: [], 0.05: []}
    failed = 0
    for seed in range(1 if quick else 3):
        for share, attained in shares.items():
            algo: Any = (
                PPOConfig()
                .domain("toy")
                .reward(MISCHIEF, share=share)
                .training(alpha=0.5, lr=1e-3, chains=256, minibatch_size=4096)
                .scoring(actors=4, timeout=1.0, memory_gb=1.0)
                .evaluate(every=0, chains=512 if quick else 4096, pretrained_chains=1024 if quick else 8192)
                .debugging(seed=seed)
                .build_algo()
            )
            for _ in range(3 if quick else 40):
                algo.train()
            found = algo.evaluate_policy().attained
            attained.append(float("nan") if found is None or found.share is None else found.share.value)
            failed += algo.counts["failed"]
            algo.stop()
    gaps = [clean - bad for clean, bad in zip(*shares.values(), strict=True)]
    return {
        "mischief/clean": _result.over_seeds(shares[0.0]),
        "mischief/attained": _result.over_seeds(shares[0.05]),
        "mischief/gap": _result.over_seeds(gaps),
        "mischief/failed": _result.Figure(failed),
    }


# -- what they share


@contextlib.contextmanager
def made(reward: str, actors: int, timeout: float = 60.0, **arguments: Any) -> Iterator[RewardPool]:
    """A pool of isolated actors, all of them up."""
    told = Told((Part("reward", reward, arguments),))
    pool = RewardPool(told, Limits(timeout=timeout), Placement(actors=actors))
    try:
        pool.start()
        yield pool
    finally:
        pool.stop()


calls = iter(range(10**9))


def run(pool: RewardPool, items: list[Any]) -> Outcome:
    """One call over all items."""
    return pool.run(items, {}, {0: np.arange(len(items))}, call=next(calls))


def timed(act: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def interleaved(ways: Sequence[Callable[[], Any]], num_rounds: int) -> list[list[float]]:
    """Seconds [round, way]; who is first changes from round to round."""
    rounds = []
    for number in range(num_rounds):
        order = np.roll(np.arange(len(ways)), number).tolist()
        seconds = {i: timed(ways[i]) for i in order}
        rounds.append([seconds[i] for i in range(len(ways))])
    return rounds


BENCHES: dict[str, Callable[[bool], dict[str, _result.Figure]]] = {
    "qed": qed,
    "cache": cache,
    "poison": poison,
    "overlap": overlap,
    "mischief": mischief,
    "sleep": sleep,
}

if __name__ == "__main__":
    main()
