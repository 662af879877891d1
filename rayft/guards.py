"""Watches over a run, on by default, each spoken about when it trips. A guard reads rows of the table, nothing else.

A trip stops the run (and it goes back to its best checkpoint); what a guard merely says is logged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from rayft.algorithms.config import EvaluateSettings

Row = Mapping[str, float]


@dataclass(frozen=True)
class Trip:
    """Why a run must stop."""

    guard: str
    message: str


@dataclass
class Guard:
    """One rule: ``rule(row)`` yields a Trip to stop, or a sentence to be said once per spell."""

    rule: Callable[[Row], Iterator[Trip | str]]
    words: list[str] = field(default_factory=list)
    speaking: bool = False

    def __call__(self, row: Row) -> Iterator[Trip]:
        found = list(self.rule(row))
        sentences = [one for one in found if isinstance(one, str)]
        if sentences and not self.speaking:
            self.words += sentences
        self.speaking = bool(sentences)
        yield from (one for one in found if isinstance(one, Trip))

    def said(self) -> list[str]:
        """What is new since the last call."""
        words, self.words = self.words, []
        return words


def watch(told: EvaluateSettings) -> list[Guard]:
    """Every guard of a run."""

    def kl_budget(row: Row) -> Iterator[Trip | str]:
        kl = max(row.get("kl", 0.0), row.get("evaluate/kl", 0.0))
        if told.max_kl is not None and not kl <= told.max_kl:
            said = f"KL to the pretrained model is {kl:.3g} nats, over the budget evaluate.max_kl = {told.max_kl:g}"
            yield Trip("kl_budget", said)

    def finite(row: Row) -> Iterator[Trip | str]:
        if not math.isfinite(row.get("learner/total_loss", 0.0)) or row.get("learner/guard_non_finite", 0.0) > 0:
            yield "a loss was not finite; those steps were thrown away"

    def ratio(row: Row) -> Iterator[Trip | str]:
        gap = row.get("learner/guard_ratio", 0.0)
        if gap > 0.05 and not row.get("stale", 0.0):  # one update old, they differ by design
            yield f"probabilities differ by {gap:.2g} before the first step: runner and learner do not compute the same"

    def spread(row: Row) -> Iterator[Trip | str]:
        if row.get("guard_no_spread", 0.0) > 0:
            yield "all rewards of the batch are equal: there is nothing to learn from"

    def silent(row: Row) -> Iterator[Trip | str]:
        if row.get("silent_timesteps", 0.0) > 0:
            yield (
                f"every candidate failed at {row['silent_timesteps']:.0f} timesteps, so nothing is learned there: let "
                "the reward take such samples, or read it elsewhere with training.reward_at"
            )

    def shrunk(row: Row) -> Iterator[Trip | str]:
        if row.get("learner/update_shrunk_to", 1.0) < 0.2:
            yield "updates are shrunk to less than a fifth to stay within training.target_kl: lower training.lr"

    def collapse(row: Row) -> Iterator[Trip | str]:
        if "evaluate/diversity" not in row:
            return
        diversity, before = row["evaluate/diversity"], row["evaluate/diversity_pretrained"]
        if diversity < told.min_diversity * before:
            yield f"samples are nearly one and the same: diversity {diversity:.3g}, {before:.3g} before"
        if row["evaluate/reward"] < row["evaluate/reward_pretrained"] and row["evaluate/kl"] > 1:
            yield "the reward fell below the pretrained model's: lower training.lr or raise alpha"

    return [Guard(rule) for rule in (kl_budget, finite, ratio, spread, silent, shrunk, collapse)]
