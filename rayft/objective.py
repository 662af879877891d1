"""What a sweep calls best: one number of an evaluation, or a weighted sum of several.

    objective = sum_i weight_i scalar_i,    validity = 1 - undecodable

Over a budget of KL, or where a scalar is refused, there is no objective, and a sentence says why.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayft.domain import Domain
from rayft.imports import nearest
from rayft.verdict import Samples, Verdict, judge

NAMED = ("attained", "frontier_share", "reward", "reward_at_kl")


@dataclass(frozen=True)
class Objective:
    """Weights by the name of a scalar, and the KL past which nothing counts."""

    weights: dict[str, float]
    max_kl: float | None = None

    def read(self, verdict: Verdict) -> tuple[float, str]:
        """(the number, "") or (nan, why there is none)."""
        told = verdict.scalars()
        told["validity"] = 1 - told["undecodable"]
        if self.max_kl is not None and not told["kl"] <= self.max_kl:
            return math.nan, f"its KL of {told['kl']:.3g} nats is over search.kl = {self.max_kl:g}"
        for name in self.weights:
            if not math.isfinite(told.get(name, math.nan)):
                return math.nan, f"no {name}: {_refusal(verdict, name, told)}"
        return sum(weight * told[name] for name, weight in self.weights.items()), ""

    def __str__(self) -> str:
        if self.max_kl is not None:
            return f"reward within {self.max_kl:g} nats"
        if list(self.weights.values()) == [1.0]:
            return next(iter(self.weights)).replace("_", " ")
        return " + ".join(f"{weight:g} {name}" for name, weight in self.weights.items())


def objective(told: str | Mapping[str, float] | None, kl: float | None, config: Any) -> Objective:
    """The objective of a ``search:`` block, or a ``ValueError`` where this run will not have its numbers."""
    alpha = config.evaluation_alpha()
    told = told if told is not None else "frontier_share" if alpha is None else "attained"
    if (told == "reward_at_kl") != (kl is not None):
        raise ValueError("search.objective: reward_at_kl and a budget search.kl in nats go together; give both or none")
    if isinstance(told, str):
        if told not in NAMED:
            mix = "a mix such as {reward: 0.7, diversity: 0.3}"
            allowed = f"it should be {', '.join(NAMED)} or {mix}"
            raise ValueError(f"search.objective is {told!r}{nearest(told, NAMED)}; {allowed}")
        told = {"reward" if told == "reward_at_kl" else told: 1.0}
    if not told:
        raise ValueError("search.objective is empty; give it weights such as {reward: 0.7, diversity: 0.3}")
    if "attained" in told and alpha is None:
        raise ValueError(
            "search.objective needs an alpha for the attained share: set evaluate.alpha (with chain.eta 1), or take "
            "objective: frontier_share"
        )
    domain = config.build_domain()
    known = names(config, domain)
    open_ended = tuple(f"{part}." for part in known if part.startswith("part/"))
    open_ended += ("metric/",) if domain.measures() else ()  # its names are known once it has measured
    for name in told:
        if name not in known and not name.startswith(open_ended):
            raise ValueError(f"search.objective has no {name!r}{nearest(name, known)}; there are {', '.join(known)}")
    return Objective({name: float(weight) for name, weight in told.items()}, kl)


def names(config: Any, domain: Domain) -> list[str]:
    """The scalars that evaluations of this run will have."""
    parts = config.recipe(domain).components
    own = [part.name for part in parts if not part.watched]
    beside = [f"watch/{part.name}" for part in parts if part.watched]
    beside += [f"part/{name}" for name in own if len(own) > 1]
    column = np.linspace(-1.0, 1.0, 64)
    some = Samples(
        column, column**2, None, np.zeros(64, dtype=bool), column[:, None], {}, dict.fromkeys(beside, column)
    )
    return [*judge(some, some, config.evaluation_alpha()).scalars(), "validity"]


def _refusal(verdict: Verdict, name: str, told: Mapping[str, float]) -> str:
    if name.startswith("attained") and verdict.attained is not None:
        return verdict.attained.refused or "it is not a number"
    if name.startswith("frontier_share"):
        return verdict.frontier_share.note or "it is not a number"
    if name.startswith("metric/") and name not in told:
        return f"the domain measures {', '.join(key for key in told if key.startswith('metric/')) or 'nothing'}"
    return "it is not a number"
