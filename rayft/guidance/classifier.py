"""Guidance that reads a differentiable reward at the noisy event itself (T Sec. 8.1): a classifier's log p(y | x_t).

    mu = mu_base(x_t, t) + sigma_t^2 grad r(x_t) / alpha

For rewards that were trained on noise, or do not mind it; the denoiser is not differentiated.
"""

from __future__ import annotations

from dataclasses import dataclass

from rayft.chain import Policy
from rayft.guidance.base import Ground, Temperature
from rayft.guidance.gradient import Guided


@dataclass(frozen=True)
class Settings(Temperature):
    """Classifier guidance's numbers."""


def build(settings: Settings, ground: Ground) -> Policy:
    """The guided policy."""
    return Guided(ground.bench.policy, ground.reward.differentiable("classifier"), settings.alpha, read_at="x_t")
