"""The reward pool: events are split over Ray actors, or scored in this process where there are none.

An actor is replaced when it is lost, never asked to repeat: what killed it once would kill it again.
"""

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
        self.arguments = scorer_arguments
        self.local = Scorer(*scorer_arguments) if num_actors == 0 else None
        self.placed: Any = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, max_restarts=0, max_task_retries=0)(Scorer)
        self.actors: list[Any] = [self.placed.remote(*scorer_arguments) for _ in range(num_actors)]

    def score(self, events: np.ndarray, context: Mapping[str, np.ndarray]) -> Scores:
        """One score per event, in order."""
        if self.local is not None:
            return self.local.score(events, context)
        shares = [share for share in np.array_split(np.arange(len(events)), len(self.actors)) if len(share)]
        sent = [
            actor.score.remote(events[share], {k: v[share] for k, v in context.items()})
            for actor, share in zip(self.actors, shares, strict=False)
        ]
        return Scores.join([self._collect(number, ref, len(shares[number])) for number, ref in enumerate(sent)])

    def stop(self) -> None:
        """Ends the actors."""
        for actor in self.actors:
            ray.kill(actor)
        self.actors = []

    def _collect(self, number: int, ref: Any, expected: int) -> Scores:
        try:
            return ray.get(ref)
        except RayActorError as error:
            self.actors[number] = self.placed.remote(*self.arguments)
            reason = f"reward actor lost: {str(error).splitlines()[0]}"[:200]
            return Scores(np.full(expected, np.nan), np.zeros(expected, dtype=bool), 0, (reason,))
