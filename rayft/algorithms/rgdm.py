"""RGDM (R Sec. 4): learn from a pay-off distribution that does not depend on the policy, so nothing is rolled out.

    L = E_D E_t E_{eps_star ~ U(ball)} [ w |x_tilde + eps_star - mu_theta(x_t, t)|^2 / (2 sigma_t^2) ],   w = exp(r/tau)

Candidates come from the base, not from q_pd, so they carry the weight (R Eq. 12-13; math, Sec. 3).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from torch import Tensor

from rayft import credit, losses, payoff
from rayft.algorithms.base import Credit, DiffusionRL
from rayft.algorithms.config import DiffusionConfig, Settings
from rayft.draws import Draw, DrawFunction, draw_payoff
from rayft.rl.learner import DiffusionLearner
from rayft.settings import Count, NonNegative, Positive


@dataclass(frozen=True)
class RGDMSettings(Settings):
    """RGDM's numbers."""

    chains: Count = 4096
    """Pairs (x_0, t) per iteration; each gives ``num_candidates`` events to score."""
    minibatch_size: Count = 512
    """Pairs per optimizer step."""
    temperature: Positive = 0.3
    """tau of exp(r/tau). R writes 1; with unit-sized rewards that hardly tilts."""
    radius: NonNegative = 1.0
    """d, in ``radius_unit``."""
    radius_unit: Literal["absolute", "sigma", "kl"] = "sigma"
    """absolute: R's; sigma: times sigma_t sqrt(dim); kl: a budget of nats for the whole chain (use it in high dim)."""
    num_candidates: Count = 8
    """K draws of eps_star per pair."""
    reward_at: Literal["x_prev", "x0_hat"] = "x0_hat"
    """Where r is read: the candidate itself (R), or the pretrained model's x_0 of it, which has meaning at any t."""
    normalise: Literal["batch", "candidates", "timestep", "none"] = "batch"
    """What w is compared with: all of the batch (R Eq. 13), its own candidates (R Eq. 12), its timestep, or nothing."""
    timestep_weight: Literal["vlb", "simple"] = "vlb"
    """vlb: the likelihood's 1/(2 sigma_t^2); simple: as in noise prediction with equal weights."""


class RGDMLearner(DiffusionLearner):
    """Weighted cross-entropy to the folded candidates."""

    def row_loss(self, rows: dict[str, Tensor], out: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        loss = losses.weighted_mle_loss(out["mean"], rows["x_prev"], out["sigma"], rows["weight"])
        return loss, {"kl_rows": losses.transition_kl(out["mean"], rows["mean_ref"], out["sigma"])}


class RGDM(DiffusionRL):
    """R Alg. 1 after pretraining, on RLlib."""

    pays_for = "payoff"

    @classmethod
    def get_default_config(cls) -> RGDMConfig:
        return RGDMConfig()

    def draw_function(self) -> DrawFunction:
        return draw_payoff

    def credit(self, draw: Draw, rewards: np.ndarray) -> Credit:
        chains, told = draw.chains, self.settings
        t = chains.t[0]
        by_candidate = rewards.reshape(len(t), told.num_candidates).T
        weight = payoff.candidate_weight(by_candidate, t, told.temperature, told.normalise)
        x_prev, row_weight = payoff.fold(chains.columns["candidates"][0].swapaxes(0, 1), weight)
        if told.timestep_weight == "simple":
            process = self.env_runner.module.process
            row_weight = row_weight * (2 * process.sigma**2 / process.eps_gain**2).numpy()[t]
        share = {"effective_share": credit.effective_share(weight.ravel())}
        rows = replace(chains.keep("mean_ref"), x=np.stack([x_prev, chains.x[1]]))
        return Credit(rows.with_columns(weight=row_weight[None].astype(x_prev.dtype)), {}, share)


class RGDMConfig(DiffusionConfig):
    """``RGDMConfig().domain(...).reward(...).training(temperature=..., radius=...)``."""

    settings_class = RGDMSettings

    def __init__(self, algo_class: Any = None) -> None:
        super().__init__(algo_class=algo_class or RGDM)

    def num_events(self) -> int:
        return self.settings().chains * self.settings().num_candidates

    def num_rows(self, num_steps: int) -> int:
        return self.settings().chains

    def get_default_learner_class(self) -> type[RGDMLearner]:
        return RGDMLearner
