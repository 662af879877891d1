"""Guidance that reads a differentiable reward at the x_0 that the denoiser expects (T Eq. 30-31).

    mu = mu_base(x_t, t) + sigma_t^2 grad r(x0_hat(x_t)) / alpha

r(x0_hat) is not v: where x_0 is uncertain a mean of r's bends is lost. Nothing is fitted; one gradient per transition.
"""

from __future__ import annotations

from dataclasses import dataclass

from rayft.chain import Policy
from rayft.guidance.base import Ground, Temperature
from rayft.guidance.gradient import Guided
from rayft.settings import ShareOrAll


@dataclass(frozen=True)
class Settings(Temperature):
    """Tweedie guidance's numbers."""

    least_signal: ShareOrAll = 0.1
    """sqrt(alpha_bar_t) from which on it guides. Below, x0_hat is the denoiser's error, magnified, and v is
    nearly flat; 0 guides everywhere."""


def build(settings: Settings, ground: Ground) -> Policy:
    """The guided policy."""
    slope = ground.reward.differentiable("tweedie")
    return Guided(ground.bench.policy, slope, settings.alpha, least_signal=settings.least_signal)
