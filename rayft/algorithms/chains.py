"""Algorithms that learn from whole chains: draw, score, credit. One piece is scored while the next is drawn.

draw    transitions and the events they wait for      (runners; each algorithm names its draw)
score   events -> rewards                             (reward actors; NaN = failed)
credit  rewards -> one number per transition          (over the whole batch, before it is sharded)

Where runners and learners both are actors, credit is made by the learners and the driver sees no chain.
"""

from __future__ import annotations

from abc import abstractmethod
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray.rllib.utils.metrics import ENV_RUNNER_SAMPLING_TIMER, TIMERS

from rayft.algorithms.base import DiffusionRL, spoken
from rayft.draws import Afar, Draw, DrawFunction, Fate, draw_current, join
from rayft.rl.near import Credit, Creditor, Lost, credited, homes_of, same_events
from rayft.score import Scores

LOSSES = 5  # times in a row that an iteration's chains may be lost


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
        self.homes: list[str] = []  # the learners' nodes

    @abstractmethod
    def credit(self, draw: Draw, rewards: np.ndarray) -> Credit:
        """Transitions with the columns that the learner's ``row_loss`` reads.

        The draw's chains may be elsewhere: what reads them goes through ``beside``.
        """

    def draw_function(self) -> DrawFunction:
        """What one iteration draws; whole chains of the policy unless an algorithm says otherwise."""
        return draw_current

    def fate(self) -> Fate:
        """What becomes of chains that remote runners draw: a driver that learns itself has them sent."""
        return "stay" if self.config.num_learners else "sent"

    def experience(self) -> tuple[Credit, dict[str, float]]:
        """This iteration's chains, scored and credited."""
        with self.metrics.log_time((TIMERS, ENV_RUNNER_SAMPLING_TIMER)):
            pieces = self.ahead or self.draw_scored(self.iteration)
            last = self.horizon is not None and self.iteration + 1 >= self.horizon
            self.ahead = self.draw_scored(self.iteration + 1) if self.scoring.staleness and not last else None
        with self.metrics.log_time((TIMERS, "score")):
            draw, scores = join([piece.draw for piece in pieces]), self.settled([piece.scores for piece in pieces])
        with self.metrics.log_time((TIMERS, "credit")):
            credit, draw, scores = self.credit_whole(draw, scores)
        told = {"undecodable": float(scores.undecodable.mean()), "reward_failed": float(scores.num_failed)}
        told |= {"stale": float(self.scoring.staleness)}
        told |= {} if draw.kl is None else {"kl": float(draw.kl.mean())}
        return credit, told | spoken(scores.rewards, scores.parts)

    def draw_scored(self, iteration: int) -> list[Scored]:
        """An iteration's draw in pieces, each being scored while the next is drawn."""
        told = ("train", self.draw_function(), self.settings.chains)
        num_pieces = self.scoring.micro_batches
        scored = []
        for piece in range(num_pieces):
            draw = self.collect(*told, iteration=iteration, piece=(piece, num_pieces), chains=self.fate())
            scored.append(Scored(draw, self.rewards.submit(draw.events, draw.context, self.pays_for, iteration)))
        return scored

    def credit_whole(self, draw: Draw, scores: Scores) -> tuple[Credit, Draw, Scores]:
        """Credit, and what it is of: chains that were lost meanwhile are drawn again, and scored again if they differ.

        They do where weights have changed since (``staleness``).
        """
        for _ in range(LOSSES):
            try:
                return self.credit(draw, scores.rewards), draw, scores
            except Lost:
                again = self.gather(draw.chains.calls)
                if not same_events(again.events, draw.events):
                    scores = self.score(again, self.pays_for)
                draw = again
        raise ValueError(f"an iteration's chains were lost {LOSSES} times with the runners that held them")

    def beside(self, draw: Draw, creditor: Creditor) -> Credit:
        """``creditor`` of a draw's chains: here, or by the learners where the chains stay with runners."""
        if not isinstance(draw.chains, Afar):
            return creditor(draw.chains)
        self.homes = self.homes or homes_of(self.learner_group)
        return credited(self.learner_group, creditor, draw.chains.refs, self.homes)

    def set_state(self, state: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().set_state(state, *args, **kwargs)
        self.ahead = None  # drawn anew
