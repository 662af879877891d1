"""Runs on several nodes of one machine, of which one goes at the worst moment. A program: test_lost_nodes.py reads it.

Every line told is a run and what became of it: whose nodes went, its last weights, and what its rows counted.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from rayft import loop, spec
from rayft.rl.near import node_of
from rayft.table import Table

COMMON = [
    "iterations=5",
    "chain.num_steps=10",
    "evaluate.every=3",
    "evaluate.chains=64",
    "evaluate.pretrained_chains=64",
    "checkpoint.every=1",
    "scoring.actors=1",
    "scoring.num_cpus_per_actor=0.5",
    "resources.num_learners=1",
]
PPO = ["toy_ppo", "training.chains=64", "training.minibatch_size=64", "resources.num_env_runners=1"]
OFF_POLICY = ["training.payoff_actors=1", "training.payoff_lead=1", "training.x_0_above=5"]
RGDM = ["toy_rgdm", "training.chains=64", "training.minibatch_size=64", *OFF_POLICY]
NODES, NUM_NODES = {"num_cpus": 2}, 2  # a run asks for 2.5
WARNING = 2.0  # seconds from a spot warning to the end
HEALTH = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_failure_threshold": 4}


class Ground:
    """A head without room for actors, and nodes that come and go."""

    def __init__(self) -> None:
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": HEALTH}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes: list[Any] = []
        self.complete(0)
        ray.init(address=self.cluster.address, logging_level=50, log_to_driver=False)

    def lose(self, name: str) -> None:
        """The node of this id goes without a word."""
        node = next(node for node in self.nodes if node.node_id == name)
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def warn(self, name: str) -> None:
        """The node of this id is taken back soon: Ray is told as a cloud would tell it, and places nothing there."""
        deadline = int(1000 * (time.time() + WARNING))
        preemption = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        accepted, why = GcsClient(address=self.cluster.address).drain_node(name, preemption, "spot", deadline)
        assert accepted, why
        time.sleep(WARNING)
        self.lose(name)

    def complete(self, losses: int) -> None:
        """Enough nodes to lose so many. They are started here: Ray's starting takes the main thread."""
        while len(self.nodes) < NUM_NODES + losses:
            self.nodes.append(self.cluster.add_node(**NODES))


class Watch:
    """A display that keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def row(self, row, total) -> None:
        """Nothing is shown."""

    def event(self, text) -> None:
        self.said.append(text)


class Meddler:
    """In an iteration of each phase, the node of whoever does that work goes while it is done."""

    def __init__(self, ground: Ground, run: loop.Run, phases: dict[int, str]) -> None:
        self.ground, self.run, self.phases = ground, run, dict(phases)
        self.opened, self.done = run.open, []
        self.losses, self.going = ThreadPoolExecutor(), list[Future[None]]()
        run.open = self.open

    def open(self, resume: bool) -> None:
        """Whatever is made anew is meddled with too."""
        self.opened(resume)
        algo = self.run.algo
        self.wrap("sampling", algo, "collect", lambda: runner_node(algo))
        self.wrap("warned", algo, "collect", lambda: runner_node(algo))
        self.wrap("scoring", algo.rewards, "submit", lambda: node(algo.rewards.crews[0].pool.roster.seats[0].actor))
        self.wrap("learning", algo, "learn", lambda: learner_node(algo))
        self.wrap("checkpointing", algo, "save_to_path", lambda: learner_node(algo))
        if hasattr(algo, "supply"):
            self.wrap("payoff", algo.supply, "take", lambda: node(algo.supply.actors[0]))

    def wrap(self, phase: str, owner: Any, name: str, where: Callable[[], str]) -> None:
        """The work, disturbed once."""
        work = getattr(owner, name)

        def disturbed(*told: Any, **named: Any) -> Any:
            if self.phases.get(self.run.algo.iteration) != phase:
                return work(*told, **named)
            del self.phases[self.run.algo.iteration]
            self.done.append(phase)
            warned = phase == "warned"
            going = self.losses.submit(self.ground.warn if warned else self.ground.lose, where())
            self.going.append(going)
            try:
                return work(*told, **named)
            finally:
                if not warned:
                    going.result()

        setattr(owner, name, disturbed)


def runner_node(algo: Any) -> str:
    return algo.env_runner_group.foreach_env_runner(node_of, local_env_runner=False)[0]


def learner_node(algo: Any) -> str:
    return next(iter(algo.learner_group.foreach_learner(node_of))).get()


def node(actor: Any) -> str:
    return ray.get(actor.__ray_call__.remote(node_of))


def run_through(ground: Ground, folder: Path, told: list[str], phases: dict[int, str]) -> dict[str, object]:
    """One run to its end, with these phases disturbed after so many iterations."""
    file, *more = told
    asked = spec.read(file, [*COMMON, *more, f"output={folder}", f"name={'lost' if phases else 'whole'}"])
    ground.complete(len(phases))
    view = Watch()
    run = loop.Run(asked, loop.create_folder(asked), view)
    meddler = Meddler(ground, run, phases)
    before = time.monotonic()
    run.execute(resume=False)
    for going in meddler.going:
        going.result()  # a node that did not go is an error
    weights = run.folder / f"checkpoints/iteration_{asked.iterations:06d}/weights.safetensors"
    rows = Table(run.folder / "metrics.csv").rows
    counted = ("iteration", "reward_mean", "reward_calls", "chains")
    return {
        "run": file,
        "lost": meddler.done,
        "seconds": time.monotonic() - before,
        "weights": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "rows": [[row.get(name) for name in counted] for row in rows],
        "said": view.said,
    }


def main(folder: Path, *asked: str) -> None:
    """``PHASE,PHASE`` of one run each; a run is made whole first."""
    ground, whole = Ground(), set()
    for number, phases in enumerate(text.split(",") for text in asked):
        told = RGDM if phases == ["payoff"] else PPO
        if told[0] not in whole:
            print(json.dumps(run_through(ground, folder / "whole", told, {})), flush=True)
            whole.add(told[0])
        lost = dict(enumerate(phases, 1))
        print(json.dumps(run_through(ground, folder / str(number), told, lost)), flush=True)
    ray.shutdown()
    ground.cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
