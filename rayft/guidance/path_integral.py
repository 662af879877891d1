"""Guidance without a gradient (T Eq. 32, corrected): where the base's own next states would lead.

    mu = mu_base + sum_m w_m (x_prev_m - mu_base),    w_m ~ exp(r_m/alpha),    x_prev_m ~ p_base(. | x_t)

With w_m of v(x_prev_m) this is the exact mean of p*, so no further 1/alpha (T prints one). Without a value r is read at
x0_hat(x_prev_m). Candidates come in pairs mu_base +- z: equal weights shift nothing, and a slope is met without noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from rayft.chain import Policy, expand
from rayft.guidance.base import Ground, Reward, Shifted, Temperature, repeated
from rayft.guidance.keep import opened
from rayft.guidance.value import Value
from rayft.seeds import torch_generator
from rayft.settings import NUMBER, ShareOrAll
from rayft.space import Context

Even = Annotated[int, NUMBER, Field(ge=2, multiple_of=2)]


@dataclass(frozen=True)
class Settings(Temperature):
    """Path integral guidance's numbers."""

    candidates: Even = 32
    """Next states per transition; each is a reward call where no value is given."""
    least_signal: ShareOrAll = 0.1
    """sqrt(alpha_bar_t) from which on it guides where no value is given: below, x0_hat is the denoiser's error,
    magnified."""
    value: str | None = None
    """A file that mc or soft_q kept: candidates are weighed by v, and only the last transition asks the reward."""


class PathIntegral(Shifted):
    """Draws candidates of its own from ``generator``, so a mean is an estimate, and two of one x_t differ a little."""

    def __init__(
        self,
        base: Policy,
        reward: Reward,
        alpha: float,
        num_candidates: int,
        generator: torch.Generator,
        value: Value | None = None,
        least_signal: float = 0.0,
    ) -> None:
        super().__init__(base, alpha)
        self.reward, self.num_candidates, self.generator, self.value = reward, num_candidates, generator, value
        self.legible = base.process.schedule.alpha_bar.sqrt() >= (least_signal if value is None else 0.0)

    @torch.no_grad()
    def moved(self, x_t: Tensor, t: Int[Tensor, " batch"], context: Context) -> tuple[Tensor, Tensor]:
        """mu_base and the weighted mean of the candidates' own shifts."""
        mean, num = self.base.mean(x_t, t, context), self.num_candidates
        legible = self.legible.to(t.device)[t]
        if not bool(legible.any()):
            return mean, torch.zeros_like(mean)
        wide = repeated(context, num)
        z = self._pairs(mean, context) * expand(self.sigma(t), mean).unsqueeze(1)
        x_prev = (mean.unsqueeze(1) + z).flatten(0, 1)
        r = self._read(x_prev, t.repeat_interleave(num) - 1, wide).to(mean.dtype).unflatten(0, (-1, num))
        weight = torch.where(r.isfinite(), r / self.alpha, -torch.inf).softmax(1).nan_to_num(1 / num)
        shift = (weight.reshape(*weight.shape, *[1] * (mean.ndim - 1)) * z).sum(1)
        return mean, shift * expand(legible.double(), shift)

    def _pairs(self, mean: Tensor, context: Context) -> Float[Tensor, "batch cand *event"]:
        """Standard normal in the space, and its mirror image."""
        half = self.num_candidates // 2
        like = mean.repeat_interleave(half, 0)
        z = self.noise(like, repeated(context, half), self.generator).unflatten(0, (-1, half))
        return torch.stack([z, -z], 2).flatten(1, 2)

    def _read(self, x: Tensor, t: Int[Tensor, " batch"], context: Context) -> Float[Tensor, " batch"]:
        """What promises a next state makes; at t = 0 it is the event itself."""
        if self.value is None:
            return self.reward(self.base.x0_hat(x, t, context), context)
        found = self.value(x, t.clamp(min=1), context)
        last = t == 0
        if bool(last.any()):
            found[last] = self.reward(x[last], {k: v[last] for k, v in context.items()}).to(found)
        return found


def build(settings: Settings, ground: Ground) -> Policy:
    """The guided policy."""
    value = None if settings.value is None else opened(Path(settings.value), settings.alpha, ground)
    generator = torch_generator(ground.seed, 0, "candidates")
    base, alpha, num = ground.bench.policy, settings.alpha, settings.candidates
    return PathIntegral(base, ground.reward, alpha, num, generator, value, settings.least_signal)
