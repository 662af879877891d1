"""Algorithms that learn from whole chains: draw, score, credit. One piece is scored while the next is drawn.

draw    transitions and the events they wait for      (runners; each algorithm names its draw)
score   events -> rewards                             (reward actors; NaN = failed)
credit  rewards -> one number per transition          (here, over the whole batch, before it is sharded)
"""

from __future__ import annotations

from abc import abstractmethod
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray.rllib.utils.metrics import ENV_RUNNER_SAMPLING_TIMER, TIMERS

from rayft.algorithms.base import Credit, DiffusionRL, spoken
from rayft.draws import Draw, DrawFunction, draw_current, join
from rayft.score import Scores


@dataclass(frozen=True)
class Scored:
    """A piece of a draw and the scores it waits for."""

    draw: Draw
    scores: Future[Scores]


class ChainRL(DiffusionRL):
    """Base of PPO and RWMLE. A subclass names its draw and turns rewards into credit."""

    def setup(self, config: Any) -> None:
        super().setup(config)
        self.ahead: list[Scored] | None = None  # with staleness, the next iteration, drawn and being scored

    @abstractmethod
    def credit(self, draw: Draw, rewards: np.ndarray) -> Credit:
        """Transitions with the columns that the learner's ``row_loss`` reads."""

    def draw_function(self) -> DrawFunction:
        """What one iteration draws; whole chains of the policy unless an algorithm says otherwise."""
        return draw_current

    def experience(self) -> tuple[Credit, dict[str, float]]:
        """This iteration's chains, scored and credited."""
        with self.metrics.log_time((TIMERS, ENV_RUNNER_SAMPLING_TIMER)):
            pieces = self.ahead or self.draw_scored(self.iteration)
            last = self.horizon is not None and self.iteration + 1 >= self.horizon
            self.ahead = self.draw_scored(self.iteration + 1) if self.scoring.staleness and not last else None
        with self.metrics.log_time((TIMERS, "score")):
            draw, scores = join([piece.draw for piece in pieces]), self.settled([piece.scores for piece in pieces])
        with self.metrics.log_time((TIMERS, "credit")):
            credit = self.credit(draw, scores.rewards)
        kl = draw.chains.columns.get("kl")
        told = {"undecodable": float(scores.undecodable.mean()), "reward_failed": float(scores.num_failed)}
        told |= {"stale": float(self.scoring.staleness)}
        told |= {} if kl is None else {"kl": float(kl.sum(0).mean())}
        return credit, told | spoken(scores.rewards, scores.parts)

    def draw_scored(self, iteration: int) -> list[Scored]:
        """An iteration's draw in pieces, each being scored while the next is drawn."""
        told = ("train", self.draw_function(), self.settings.chains)
        num_pieces = self.scoring.micro_batches
        scored = []
        for piece in range(num_pieces):
            draw = self.collect(*told, iteration=iteration, piece=(piece, num_pieces))
            scored.append(Scored(draw, self.rewards.submit(draw.events, draw.context, self.pays_for, iteration)))
        return scored

    def set_state(self, state: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().set_state(state, *args, **kwargs)
        self.ahead = None  # drawn anew
