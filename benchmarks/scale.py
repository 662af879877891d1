"""A run on 1, 2, 4 and 8 nodes: how much of perfect is left, what passes through the driver, and a model of more nodes.

    nodes/N = time of its drawing and scoring on N nodes, if nothing else took any / time of an iteration

Nodes are Ray's own, all on this machine; denoiser and reward sleep, so that they do not fight over its cores. Runners,
reward actors and the learner are what a real run has. ``--predict N`` says what N nodes would take and cost.
"""

from __future__ import annotations

import os

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # read when ray is imported; otherwise it writes ~/.ray/auth_token

import contextlib
import logging
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray
import torch
from ray._private.worker import global_worker
from ray.cluster_utils import Cluster

from benchmarks import _result
from benchmarks._scale import Parts, Price, cost, efficiency, seconds
from rayft.algorithms.ppo import PPOConfig

NODES, LONG = (1, 2, 4, 8), (100, 1000)
CHAINS, ITERATIONS, SLEEP = 320, 3, 0.05  # SLEEP: seconds of a chain, and of a sample's reward
ASKED = {"nodes/1": 0.95, "nodes/2": 0.93, "nodes/4": 0.90, "nodes/8": 0.85, "model/error": 0.1}
HALF: Any = 0.5  # CPUs of each actor, so that a runner and a reward actor fit on a node of one


def main() -> None:
    """Every figure, a table, and results/scale.json."""
    parser = _result.arguments(__doc__)
    parser.add_argument("--predict", type=int, nargs="*", default=[16, 64], help="numbers of nodes to predict (16 64)")
    parser.add_argument("--head-price", type=float, default=0.2, help="of the head, an hour (0.2)")
    parser.add_argument("--node-price", type=float, default=0.1, help="of every other node, an hour (0.1)")
    told = parser.parse_args()
    torch.set_num_threads(1)
    result = _result.Result("scale")
    nodes, chains, iterations = (NODES[:2], 40, 1) if told.quick else (NODES, CHAINS, ITERATIONS)
    rows, parts = [], None
    for number in nodes:
        found = measured(number, chains, iterations)
        parts = parts or found
        took = seconds(found, 1) if number == 1 else found.rest + chains / number * (found.chain + found.sample)
        share = chains * 2 * SLEEP / number / took
        result.figures[f"nodes/{number}"] = _result.Figure(share)
        rows.append((number, took, share, seconds(parts, number), ASKED[f"nodes/{number}"]))
    assert parts is not None
    error = max(abs(guess - took) / took for _, took, _, guess, _ in rows)
    result.figures["model/error"] = _result.Figure(error)
    _result.show("one iteration", ("nodes", "seconds", "of perfect", "predicted", "asked"), rows)
    for steps in LONG[:1] if told.quick else LONG:
        result.figures[f"driver_bytes/T{steps}"] = _result.Figure(through_driver(steps))
    guesses = [(n, seconds(parts, n), efficiency(parts, n), cost(parts, n, 100, price(told))) for n in told.predict]
    _result.show("predicted", ("nodes", "seconds", "of perfect", "100 iterations cost"), guesses)
    _result.show("figures", ("", ""), [(name, str(figure)) for name, figure in result.figures.items()])
    result.write(_result.folder(told))


def price(told: Any) -> Price:
    """As it was asked."""
    return Price(told.head_price, told.node_price)


@contextlib.contextmanager
def cluster(number: int) -> Iterator[None]:
    """A head with room for the learner, and nodes with room for a runner and a reward actor each."""
    with tempfile.TemporaryDirectory(prefix="ray") as apart:  # or another Ray on this machine would join
        os.environ["RAY_TMPDIR"] = apart
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        try:
            for _ in range(number):
                made.add_node(num_cpus=1)
            ray.init(address=made.address, logging_level=logging.ERROR, log_to_driver=False)
            yield
        finally:
            ray.shutdown()
            made.shutdown()
            del os.environ["RAY_TMPDIR"]


def config(number: int, chains: int) -> Any:
    """PPO on so many nodes."""
    told = PPOConfig().training(chains=chains, minibatch_size=chains, num_epochs=1, target_kl=None)
    told.evaluate(every=0).env_runners(num_env_runners=number, num_cpus_per_env_runner=HALF)
    return told.learners(num_learners=1, num_cpus_per_learner=1)


def measured(number: int, chains: int, iterations: int) -> Parts:
    """Medians of the parts of iterations on so many nodes, the first of them left out."""
    with cluster(number):
        asked = config(number, chains).domain("benchmarks._sleepers:SleepyToy", chain_seconds=SLEEP)
        asked.reward("benchmarks._mischief:Sleep", seconds=SLEEP)
        algo = asked.scoring(actors=number, num_cpus_per_actor=HALF, cache=None).build_algo()
        try:
            algo.train()
            found = np.array([_parts(algo) for _ in range(iterations)])
        finally:
            algo.stop()
    draw, score, whole = np.median(found, axis=0)
    share = chains / number
    return Parts(float(draw / share), float(score / share), float(whole - draw - score), chains)


def _parts(algo: Any) -> tuple[float, float, float]:
    """(drawing, scoring, all) of one iteration, in seconds."""
    took = {"draw_scored": 0.0, "settled": 0.0}

    def timed(name: str) -> None:
        work = getattr(type(algo), name)

        def timing(*given: Any) -> Any:
            before = time.perf_counter()
            try:
                return work(algo, *given)
            finally:
                took[name] += time.perf_counter() - before

        setattr(algo, name, timing)

    for name in took:
        timed(name)
    before = time.perf_counter()
    algo.train()
    whole = time.perf_counter() - before
    for name in took:
        delattr(algo, name)
    return took["draw_scored"], took["settled"], whole


def through_driver(num_steps: int) -> float:
    """Bytes that the driver packs and unpacks in one iteration: all that it gives to Ray, and all that it gets."""
    with cluster(1):
        algo = config(1, 64).domain("toy", num_steps=num_steps, weights=None).reward("quadratic").build_algo()
        try:
            algo.train()
            with counted() as total:
                algo.train()
            return float(total[0])
        finally:
            algo.stop()


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """What passes through Ray's packing in this process: values put, arguments, and whatever is got."""
    packing: Any = global_worker.get_serialization_context()
    total = [0]
    pack, unpack = packing.serialize, packing.deserialize_objects

    def packed(value: Any) -> Any:
        found = pack(value)
        total[0] += found.total_bytes
        return found

    def unpacked(found: Any, *given: Any, **named: Any) -> Any:
        total[0] += sum(len(one.data or b"") for one in found)
        return unpack(found, *given, **named)

    packing.serialize, packing.deserialize_objects = packed, unpacked
    try:
        yield total
    finally:
        del packing.serialize, packing.deserialize_objects


if __name__ == "__main__":
    main()
