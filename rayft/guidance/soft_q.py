"""Guidance by a value that is fitted by soft Q iteration (T Eq. 29, in the log domain). Any reward will do.

    exp(v_t/alpha) = E_base[ exp(v_{t-k}(x_{t-k})/alpha) | x_t ],    v_0 = r

All timesteps are fitted at once against a moving average of the network. T's k = 1 passes an error on T times; a larger
k passes it on T/k times and sees more of the reward's scatter, and k = T is ``mc``.
"""

from __future__ import annotations

from dataclasses import dataclass

from rayft.chain import Policy
from rayft.guidance.base import Ground
from rayft.guidance.fit import FitSettings, fitted
from rayft.guidance.keep import kept
from rayft.guidance.value import Climbing
from rayft.settings import Count


@dataclass(frozen=True)
class Settings(FitSettings):
    """Soft Q iteration's numbers."""

    ahead: Count = 10
    """k, the transitions between a value and the one that it is fitted to; of a chain longer than 64 the kept ones."""


def build(settings: Settings, ground: Ground) -> Policy:
    """The guided policy, once v is fitted or read."""
    return Climbing(kept(settings, ground, lambda: fitted(settings, ground, settings.ahead)))
