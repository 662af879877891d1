"""Guidance by a value that is fitted by Monte Carlo on the base's own chains (T Eq. 27, 28). Any reward will do.

    v = argmin_h E[ exp((r - h)/alpha) + h/alpha ] = alpha log E_base[ exp(r/alpha) | x_t ]

and mu = mu_base + sigma_t^2 grad v / alpha as value.py takes it. All is paid before the first sample, once.
"""

from __future__ import annotations

from dataclasses import dataclass

from rayft.chain import Policy
from rayft.guidance.base import Ground
from rayft.guidance.fit import FitSettings, fitted
from rayft.guidance.keep import kept
from rayft.guidance.value import Climbing


@dataclass(frozen=True)
class Settings(FitSettings):
    """The numbers of guidance by Monte Carlo."""


def build(settings: Settings, ground: Ground) -> Policy:
    """The guided policy, once v is fitted or read."""
    return Climbing(kept(settings, ground, lambda: fitted(settings, ground)))
