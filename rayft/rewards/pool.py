"""The reward pool: events are split over Ray actors, or scored in this process where there are none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError

from rayft.score import Scorer, Scores


class RewardPool:
    """``num_actors`` actors with the placement asked for. A lost actor costs its share of one batch, as NaN."""

    def __init__(
        self, scorer_arguments: tuple[Any, ...], num_actors: int = 0, num_cpus: float = 1.0, num_gpus: float = 0.0
    ) -> None:
        self.local = Scorer(*scorer_arguments) if num_actors == 0 else None
        placed: Any = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, max_restarts=-1, max_task_retries=2)(Scorer)
        self.actors: list[Any] = [placed.remote(*scorer_arguments) for _ in range(num_actors)]

    def score(self, events: np.ndarray, context: Mapping[str, np.ndarray]) -> Scores:
        """One score per event, in order."""
        if self.local is not None:
            return self.local.score(events, context)
        shares = np.array_split(np.arange(len(events)), len(self.actors))
        waiting = [
            (share, actor.score.remote(events[share], {k: v[share] for k, v in context.items()}))
            for actor, share in zip(self.actors, shares, strict=True)
            if len(share)
        ]
        return Scores.join([_collect(ref, len(share)) for share, ref in waiting])

    def stop(self) -> None:
        """Ends the actors."""
        for actor in self.actors:
            ray.kill(actor)
        self.actors = []


def _collect(ref: Any, expected: int) -> Scores:
    try:
        return ray.get(ref)
    except RayActorError as error:
        reason = f"reward actor lost: {str(error).splitlines()[0]}"[:200]
        return Scores(np.full(expected, np.nan), np.zeros(expected, dtype=bool), 0, (reason,))
