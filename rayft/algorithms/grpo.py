"""GRPO: PPO whose baseline is the mean of the other chains that began alike, instead of the mean of the batch.

    A_t = (G_t - mean over the others of the group of G_t) / s,    G_t = r - alpha sum_{later} KL

A group shares x_T, or only its condition. Where what is fixed decides much of the reward, the group's mean takes that
out, and no value network is needed. Loss and KL are PPO's (ppo.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from rayft import credit
from rayft.algorithms.config import DiffusionConfig
from rayft.algorithms.ppo import PPO, Advantage, PPOLearner, PPOSettings
from rayft.draws import DrawFunction, draw_grouped
from rayft.settings import Count


@dataclass(frozen=True)
class GRPOSettings(PPOSettings):
    """GRPO's numbers."""

    group_size: Count = 8
    """Chains in a group."""
    share: Literal["x_T", "context"] = "x_T"
    """What a group has in common: noise and context, or context alone."""
    scale: Literal["batch", "group"] = "batch"
    """s. group: each group's own spread, as the papers have it, which counts a group the more the less its chains
    differ and so optimises another J; batch: one spread for all."""


class GRPO(PPO):
    """PPO with groups."""

    @classmethod
    def get_default_config(cls) -> DiffusionConfig:
        return GRPOConfig()

    def draw_function(self) -> DrawFunction:
        return draw_grouped

    def advantage_of(self) -> Advantage:
        told = {"size": self.settings.group_size, "own_scale": self.settings.scale == "group"}
        return partial(credit.group_advantage, **told)


class GRPOConfig(DiffusionConfig):
    """``GRPOConfig().domain(...).reward(...).training(alpha=..., group_size=...)``."""

    settings_class = GRPOSettings

    def __init__(self, algo_class: Any = None) -> None:
        super().__init__(algo_class=algo_class or GRPO)

    def validate(self) -> None:
        told = self.settings()
        parts = max(1, self.num_env_runners) * self.section("scoring").micro_batches
        if told.group_size < 2:
            raise ValueError("training.group_size is 1; a chain alone is compared with nobody, so give 2 or more")
        if told.chains % (told.group_size * parts):
            raise ValueError(
                f"training.chains is {told.chains}; whole groups of {told.group_size} for each of {parts} "
                f"{'runners and micro-batches' if parts > 1 else 'runner'} need a multiple of {told.group_size * parts}"
            )
        super().validate()

    def get_default_learner_class(self) -> type[PPOLearner]:
        return PPOLearner
