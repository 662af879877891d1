"""Decode events and score them, in whatever process this is imported; numpy only, so an actor stays small.

An event that decodes to nothing has the reward's ``undecodable`` value; a call that fails gives NaN, never 0, and the
rest of its batch is scored one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayft import imports
from rayft.reward import Reward, build


@dataclass(frozen=True)
class Scores:
    """Rewards in the order of the events; NaN where scoring failed."""

    rewards: np.ndarray  # [event] float64
    undecodable: np.ndarray  # [event] bool
    num_calls: int
    reasons: tuple[str, ...] = ()  # a few, for the log

    @property
    def num_failed(self) -> int:
        return int(np.isnan(self.rewards).sum())

    @staticmethod
    def join(parts: Sequence[Scores]) -> Scores:
        rewards, undecodable = (np.concatenate([getattr(p, k) for p in parts]) for k in ("rewards", "undecodable"))
        reasons = tuple(reason for part in parts for reason in part.reasons)[:5]
        return Scores(rewards, undecodable, sum(p.num_calls for p in parts), reasons)


class Scorer:
    """One reward and its domain's decoder."""

    def __init__(
        self, path: Any, arguments: Mapping[str, Any], short_names: Mapping[str, str], decoder: str, undecodable: Any
    ) -> None:
        self.reward: Reward = build(path, arguments, short_names)
        self.decode: Callable[..., list[Any]] = imports.load(decoder)
        self.undecodable = self.reward.undecodable if undecodable is None else float(undecodable)

    def score(self, events: np.ndarray, context: Mapping[str, np.ndarray]) -> Scores:
        samples = self.decode(events, context)
        found = np.array([sample is not None for sample in samples], dtype=bool)
        rewards = np.full(len(samples), self.undecodable)
        reasons: tuple[str, ...] = ()
        if found.any():
            rewards[found], reasons = call(self.reward, [s for s in samples if s is not None])
        return Scores(rewards, ~found, int(found.sum()), reasons)


def call(reward: Reward, samples: list[Any]) -> tuple[np.ndarray, tuple[str, ...]]:
    """(one score per sample, reasons): where the call fails, one by one, so that NaN marks the samples it failed on."""
    try:
        return _numbers(reward(samples), len(samples)), ()
    except Exception as error:
        if len(samples) == 1:
            return np.array([np.nan]), (f"{type(error).__name__}: {error}"[:200],)
    parts = [call(reward, [sample]) for sample in samples]
    return np.concatenate([p[0] for p in parts]), tuple(r for p in parts for r in p[1])[:5]


def _numbers(scores: Any, expected: int) -> np.ndarray:
    """What a reward returned, as float64; infinities count as failed."""
    values = np.array([np.nan if s is None else s for s in scores], dtype=np.float64)
    if values.shape != (expected,):
        raise ValueError(f"the reward returned {values.shape} for {expected} samples; return one number per sample")
    return np.where(np.isfinite(values), values, np.nan)
