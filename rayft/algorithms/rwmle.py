"""Reward-weighted maximum likelihood (T Alg. 3, Eq. 24-26): imitate the pretrained model's own chains, weighted.

    L = E_{roll-in} [ w |x_prev - mu_theta(x_t, t)|^2 / (2 sigma_t^2) ],    w = exp(r(x_0)/alpha) / mean,

with x_0 continued from x_t under the pretrained model. Any roll-in is valid (T Lemma 3); with ``noised`` it is forward
noise, x_t ~ q(x_t | x_0) and x_prev the posterior's mean, as far as the pretrained chain reverses q: then x_0 alone is
kept, serves any number of (t, noise), and never goes stale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rayft import credit, losses
from rayft.algorithms.chains import ChainRL
from rayft.algorithms.config import DiffusionConfig, Settings
from rayft.chain import Chains
from rayft.draws import Draw, DrawFunction, Fate, draw_pretrained, draw_roll_in
from rayft.payoff import refresh
from rayft.payoff.reading import TimestepWeight
from rayft.rl.learner import DiffusionLearner
from rayft.rl.near import Credit
from rayft.seeds import torch_generator
from rayft.settings import Count, Positive
from rayft.surrogate import Seen


@dataclass(frozen=True)
class RWMLESettings(Settings):
    """Reward-weighted MLE's numbers."""

    alpha: Positive = 0.1
    """Temperature of the weights exp(r/alpha) and of J."""
    roll_in: Literal["pretrained", "current", "noised"] = "pretrained"
    """pretrained: one pretrained chain serves all t; current: T Alg. 3, one usable transition per chain; noised: x_0
    of every pretrained chain so far, drawn by weight, under new noise."""
    rows: Count | None = None
    """Transitions that an iteration learns from, with ``noised``; as many as its chains have where none are given."""
    timestep_weight: TimestepWeight = "vlb"
    """With ``noised``. vlb: the likelihood's; simple: even in predicted noise; v: even in v, more where noise is."""
    anchor: bool = True
    """Subtracts the noise that a weight of 1 would carry: same expected gradient, far less of it wandering."""


class RWMLELearner(DiffusionLearner):
    """Weighted cross-entropy, anchored or plain."""

    def row_loss(self, rows: dict[str, Tensor], out: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        if "shift" in rows:
            loss = losses.pull_loss(out["mean"], rows["mean_ref"], rows["shift"], rows["weight"], out["sigma"])
        elif self.config.anchor:
            loss = losses.anchored_loss(out["mean"], rows["x_prev"], rows["mean_ref"], out["sigma"], rows["weight"])
        else:
            loss = losses.weighted_mle_loss(out["mean"], rows["x_prev"], out["sigma"], rows["weight"])
        return loss, {"kl_rows": losses.transition_kl(out["mean"], rows["mean_ref"], out["sigma"])}


class RWMLE(ChainRL):
    """T Alg. 3 on RLlib."""

    @classmethod
    def get_default_config(cls) -> RWMLEConfig:
        return RWMLEConfig()

    def setup(self, config: Any) -> None:
        super().setup(config)
        self.seen: list[Seen] = []  # with roll_in noised, all that was scored

    def draw_function(self) -> DrawFunction:
        return draw_roll_in if self.settings.roll_in == "current" else draw_pretrained

    def fate(self) -> Fate:
        return "dropped" if self.settings.roll_in == "noised" else super().fate()

    def credit(self, draw: Draw, rewards: np.ndarray) -> Credit:
        """With ``noised``, rows from everything that was scored so far."""
        if self.settings.roll_in != "noised":
            return self.beside(draw, partial(credited, weight=self.weight(draw.context, rewards)))
        self.seen.append(Seen(np.array(draw.events), rewards, dict(draw.context)))
        x_0, known = np.concatenate([s.x_0 for s in self.seen]), np.concatenate([s.rewards for s in self.seen])
        context = {k: np.concatenate([s.context[k] for s in self.seen]) for k in draw.context}
        weight, module = self.weight(context, known), self.env_runner.module
        share = {"effective_share": credit.effective_share(weight)}
        if not weight.any():
            raise ValueError("every reward has failed so far, and there is nothing to learn from: look at the errors")
        generator = torch_generator(self.config.seed or 0, self.iteration, "refresh")
        num, settings = self.config.num_rows(module.process.num_steps), self.settings
        told = num, module.bench("reference"), generator, "mean", settings.timestep_weight, settings.timesteps
        return Credit(refresh.draw(refresh.Weighted(x_0, weight, context), *told), {}, share)

    def weight(self, context: Mapping[str, np.ndarray], rewards: np.ndarray) -> np.ndarray:
        """exp(r / alpha), of mean 1 within each group of contexts."""
        groups = self.domain.groups({k: torch.from_numpy(v) for k, v in context.items()})
        return credit.exponential_weight(rewards, self.settings.alpha, None if groups is None else groups.numpy())

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {**super().get_state(*args, **kwargs), "seen": [vars(one) for one in self.seen]}

    def set_state(self, state: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().set_state(state, *args, **kwargs)
        if "seen" in state:
            self.seen = [Seen(**one) for one in state["seen"]]


def credited(chains: Chains, weight: np.ndarray) -> Credit:
    """Rows with their chain's weight."""
    every = np.broadcast_to(weight, chains.t.shape).astype(chains.x.dtype)
    share = {"effective_share": credit.effective_share(weight)}
    return Credit(chains.keep("mean_ref").with_columns(weight=every), {}, share)


class RWMLEConfig(DiffusionConfig):
    """``RWMLEConfig().domain(...).reward(...).training(alpha=...)``."""

    settings_class = RWMLESettings

    def __init__(self, algo_class: Any = None) -> None:
        super().__init__(algo_class=algo_class or RWMLE)

    def num_rows(self, num_steps: int) -> int:
        if self.roll_in == "noised" and self.rows is not None:
            return self.rows
        return self.settings().chains * (1 if self.roll_in == "current" else num_steps)

    def validate(self) -> None:
        if self.rows is not None and self.roll_in != "noised":
            raise ValueError(f"training.rows is for roll_in noised; {self.roll_in} learns from every transition it has")
        super().validate()

    def get_default_learner_class(self) -> type[RWMLELearner]:
        return RWMLELearner
