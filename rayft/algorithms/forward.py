"""Forward-process fine-tuning: finished events under new noise, the good ones counted more; no log-probabilities.

    L = E_t (|y - (a + A) g|^2 + (alpha / s) |mu - mu_pre|^2) / (2 sigma_t^2),    y = mu - mu_old,
    g = (posterior mean of x_0 and x_t) - mu_old,    A = (r - mean) / s, at least -1

Good events draw in one denoising loss. With a = 1 (``average``) bad ones hold less than an average one would; with less
they push. Only x_0 is read of a chain, so any sampler may make it, a shorter one too (``sampling_steps``). What a keeps
the policy to is the denoiser of its own events, which costs KL where the pretrained model is not quite that; at a = 0
bad events drive it away even from that, without end. Where it comes to rest, mu - mu_pre = Cov(r, g | x_t) / alpha
under the policy: p*'s own condition to first order in r / alpha.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayft import credit, losses
from rayft.algorithms.chains import ChainRL
from rayft.algorithms.config import DiffusionConfig, Settings
from rayft.chain import Chains, reverse_process
from rayft.draws import Draw, DrawFunction, Fate, draw_events
from rayft.payoff.pairs import place
from rayft.payoff.reading import TimestepWeight, timestep_factor
from rayft.rl.learner import DiffusionLearner
from rayft.rl.near import Credit
from rayft.seeds import torch_generator
from rayft.settings import Count, NonNegative, Positive

SEED_RANGE = 2**62
WORST = -1.0  # advantage: an average event's weight of 1 leaves the worst with none


@dataclass(frozen=True)
class ForwardSettings(Settings):
    """The forward process's numbers."""

    alpha: NonNegative = 0.1
    """Temperature of J = E[r] - alpha KL(p || p_pre); 0 asks for reward alone."""
    rows: Count | None = None
    """Transitions that an iteration learns from; as many as its chains have where none are given."""
    sampling_steps: Count | None = None
    """Transitions of the chain that draws the events, fewer than it is trained on; the same where none are given."""
    timestep_weight: TimestepWeight = "simple"
    """vlb: the likelihood's; simple: even in predicted noise; v: even in v, more where noise is."""
    advantage_clip: Positive = 5.0
    """Largest A, in deviations; its smallest is -1."""
    average: NonNegative = 1.0
    """Weight of an event of average reward: 1 learns from good events alone, below it bad ones are negative samples."""


class ForwardLearner(DiffusionLearner):
    """Towards the good more than the bad, and back to the pretrained model."""

    def row_loss(self, rows: dict[str, Tensor], out: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        y_old, y_ref = out["mean"] - rows["mean_old"], out["mean"] - rows["mean_ref"]
        loss = losses.forward_loss(y_old, y_ref, rows["pull"], self.scalars["kl_weight"], out["sigma"])
        loss = rows["weight"] * loss
        return loss, {"kl_rows": losses.transition_kl(out["mean"], rows["mean_ref"], out["sigma"])}


class Forward(ChainRL):
    """Reward-weighted denoising of the policy's own events, on RLlib."""

    @classmethod
    def get_default_config(cls) -> ForwardConfig:
        return ForwardConfig()

    def draw_function(self) -> DrawFunction:
        return draw_events

    def fate(self) -> Fate:
        return "dropped"

    def credit(self, draw: Draw, rewards: np.ndarray) -> Credit:
        advantage, scale = credit.advantage(rewards[None])
        share = self.settings.average + np.clip(advantage[0], WORST, self.settings.advantage_clip)
        known = np.flatnonzero(np.isfinite(rewards))
        if not len(known):
            raise ValueError("every reward of this iteration has failed, and there is nothing to learn from")
        told = {k: v[known] for k, v in draw.context.items()}
        chains = self.noised(np.asarray(draw.events)[known], share[known], told)
        kl_weight = float(credit.price(self.settings.alpha, np.array([scale]))[0])
        return Credit(chains, {"kl_weight": kl_weight}, {"advantage_scale": scale})

    @torch.no_grad()
    def noised(self, x_0: np.ndarray, share: np.ndarray, context: Mapping[str, np.ndarray]) -> Chains:
        """Rows (x_t, t) of these events under new noise, each event equally often."""
        bench, told = self.env_runner.module.bench(), self.settings
        process = bench.reference.process
        num, (first, last) = self.config.num_rows(process.num_steps), told.timesteps or (1, process.num_steps)
        generator = torch_generator(self.config.seed or 0, self.iteration, "forward")
        chosen = torch.arange(num).remainder(len(x_0)).numpy()
        t = torch.randint(first, last + 1, (num,), generator=generator)
        seed = int(torch.randint(SEED_RANGE, (), generator=generator))
        given = {k: torch.from_numpy(np.ascontiguousarray(v[chosen])) for k, v in context.items()}
        data = torch.from_numpy(np.ascontiguousarray(x_0[chosen]))
        x_t, towards = place(process, bench.reference.space, data, t, given, seed, "mean")
        there = x_t.to(bench.device), t.to(bench.device), {k: v.to(bench.device) for k, v in given.items()}
        mean_old, mean_ref = (policy.mean(*there).cpu() for policy in (bench.policy, bench.reference))
        gain = torch.from_numpy(share[chosen]).to(x_t.dtype).reshape(-1, *[1] * (x_t.ndim - 1))
        weight = torch.from_numpy(timestep_factor(told.timestep_weight, process, t.numpy())).to(x_t.dtype)
        columns = {"mean_old": mean_old, "mean_ref": mean_ref, "pull": gain * (towards - mean_old), "weight": weight}
        rows = {k: v.unsqueeze(0) for k, v in columns.items()}
        return Chains(torch.stack([towards, x_t]), t.unsqueeze(0), given, rows).numpy()


class ForwardConfig(DiffusionConfig):
    """``ForwardConfig().domain(...).reward(...).training(alpha=...)``."""

    settings_class = ForwardSettings

    def __init__(self, algo_class: Any = None) -> None:
        super().__init__(algo_class=algo_class or Forward)

    def num_rows(self, num_steps: int) -> int:
        return self.settings().rows or self.settings().chains * num_steps

    def validate(self) -> None:
        steps, chain = self.settings().sampling_steps, self.section("chain")
        if steps is not None:
            if steps > self.process().num_steps:
                raise ValueError(
                    f"training.sampling_steps is {steps}; the chain has only {self.process().num_steps} transitions"
                )
            reverse_process(self.process().schedule, chain.sigma, chain.eta, steps)
        super().validate()

    def get_default_learner_class(self) -> type[ForwardLearner]:
        return ForwardLearner
