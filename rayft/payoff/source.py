"""Where shards come from: pairs, a search, and what the pretrained model says of them. torch only, in any process.

begin(n) -> events -> [rewards] -> go_on(n, rewards) -> events | Shard
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from rayft.bench import Bench
from rayft.payoff.bank import Shard
from rayft.payoff.pairs import Aim, Pairs, Question, draw_pairs
from rayft.payoff.sampler import Search, Slope, begin
from rayft.seeds import address, torch_generator


@dataclass(frozen=True)
class Answer:
    """What was said of a question's events, in their order; NaN = failed."""

    rewards: np.ndarray
    parts: Mapping[str, np.ndarray]
    num_calls: int = 0

    def columns(self) -> np.ndarray:
        """[event, 1 + part], rewards first."""
        return np.stack([self.rewards, *self.parts.values()], axis=-1)


@dataclass
class _Making:
    pairs: Pairs
    seed: int
    search: Search
    num_calls: int = 0
    asked: np.ndarray | None = None  # of the question that is out

    def ask(self, question: Question) -> Question:
        self.asked = question.asked
        return Question(question.events.cpu().numpy(), {k: v.cpu().numpy() for k, v in question.context.items()})


class Source:
    """Makes the shards of one aim. A shard depends on (seed, number) and nothing that was made before it."""

    def __init__(self, bench: Bench, aim: Aim, shard_pairs: int, seed: int, slope: Slope | None = None) -> None:
        self.bench, self.aim, self.shard_pairs, self.seed, self.slope = bench, aim, shard_pairs, seed, slope
        self.making: dict[int, _Making] = {}

    @torch.no_grad()
    def begin(self, number: int) -> Question:
        """The first events of shard ``number`` that are to be scored (numpy)."""
        generator = torch_generator(self.seed, number, "payoff")
        seed = address(self.seed, number, "noise")
        pairs = draw_pairs(self.bench, self.shard_pairs, generator, seed, self.aim.centre)
        search = begin(pairs, self.aim, generator, self.slope)
        making = self.making[number] = _Making(pairs, seed, search)
        return making.ask(next(search))

    @torch.no_grad()
    def go_on(self, number: int, answer: Answer) -> Question | Shard:
        """More events, or the shard."""
        making = self.making[number]
        making.num_calls += answer.num_calls
        try:
            columns = answer.columns()
            return making.ask(making.search.send(columns if making.asked is None else columns[making.asked]))
        except StopIteration as finished:
            found = finished.value
        del self.making[number]
        pairs = making.pairs
        return Shard(
            number=number,
            seed=making.seed,
            x_0=_array(pairs.x_0),
            t=_array(pairs.t).astype(np.int32),
            eps_star=_array(found.eps_star),
            rewards=found.told[..., 0],
            mean_ref=_array(self.bench.reference.mean(pairs.x_t, pairs.t, pairs.context)),
            start=found.start,
            context={k: _array(v) for k, v in pairs.context.items()},
            parts={name: found.told[..., 1 + i] for i, name in enumerate(answer.parts)},
            num_calls=making.num_calls,
        )


def _array(values: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(values.detach().cpu().numpy())
