"""``RewardActor``: the rewards of a pool, where Ray places them. Loads neither torch nor RLlib unless a reward does."""

from __future__ import annotations

import cloudpickle

from rayft.rewards.isolate import Isolated
from rayft.rewards.worker import Inline, Limits, Outcome, Worker
from rayft.score import Told, Work


def worker(told: Told, limits: Limits, isolate: bool) -> Worker:
    """The rewards, built: in a child that may die, or in this process. A ``ValueError`` says why they cannot be."""
    if not isolate:
        return Inline(told, limits)
    child = Isolated(told, limits)
    child.start()
    return child


class RewardActor:
    """A worker in a process of its own."""

    def __init__(self, told: bytes, limits: Limits, isolate: bool) -> None:
        self.told, self.limits, self.isolate = told, limits, isolate
        self.worker: Worker | None = None

    def ready(self) -> None:
        """Builds the rewards: here, because of an exception in ``__init__`` Ray only says that the actor died."""
        self.worker = worker(cloudpickle.loads(self.told), self.limits, self.isolate)

    def work(self, work: Work) -> Outcome:
        """What became of it."""
        assert self.worker is not None, "ready() comes first"
        return self.worker.work(work)

    def stop(self) -> None:
        """Ends the child, if there is one."""
        if self.worker is not None:
            self.worker.stop()
