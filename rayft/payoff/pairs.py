"""Pairs (x_0, t) under forward noise, and what a candidate next to one is judged by.

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps,    x_tilde ~ q(x_prev | x_t, x_0), its mean or a draw

The noise is a seed: whoever knows (x_0, t, seed) has x_t and x_tilde again, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rayft.bench import Bench
from rayft.chain import Process, expand, forward_noise, posterior_mean, sample
from rayft.payoff.ball import RadiusUnit
from rayft.space import Context, Space

RewardAt = Literal["x_prev", "x0_hat", "x_0"]
Centre = Literal["mean", "sample"]
SamplerName = Literal["importance", "annealing", "gradient"]


@dataclass(frozen=True)
class Aim:
    """All that decides which candidates are drawn and what is said of them: two banks of one aim hold the same."""

    num_candidates: int
    radii: tuple[float, ...]  # outer radii of the shells, ascending; one is the whole ball
    radius_unit: RadiusUnit
    reward_at: RewardAt
    centre: Centre
    sampler: SamplerName
    sampler_steps: int  # of a search
    temperature: float | None  # that a search ends at, None for 0; importance does not know any
    x_0_above: int | None = None  # timestep past which the data are judged instead

    def late(self, t: Any) -> Any:
        """Where the reward is that of x_0, one for all candidates."""
        first = 0 if self.reward_at == "x_0" else self.x_0_above
        return t > (10**9 if first is None else first)


@dataclass(frozen=True)
class Question:
    """Events whose reward a sampler waits for, with the contexts they belong to."""

    events: Any  # [event, *shape]: torch where it is asked, numpy on the way
    context: dict[str, Any]
    asked: np.ndarray | None = None  # [row * cand] -> event, where one answer is for several candidates


@dataclass(frozen=True)
class Pairs:
    """(x_0, t) with x_t, the centre of its candidates, and the largest radius they may have."""

    bench: Bench
    x_0: Float[Tensor, "row *event"]
    t: Int[Tensor, " row"]
    x_t: Float[Tensor, "row *event"]
    centre: Float[Tensor, "row *event"]
    context: dict[str, Any]

    def question(self, shift: Float[Tensor, "row cand *event"], aim: Aim) -> Question:
        """The events that r is read at. Where those are the data themselves, one is asked for all candidates."""
        num = shift.shape[1]
        context = {k: v.repeat_interleave(num, 0) for k, v in self.context.items()}
        events, late = self.read(shift, aim, context), aim.late(self.t).cpu().numpy()
        if not late.any():
            return Question(events, context)
        kept = (~late[:, None] | (np.arange(num) == 0)).ravel()
        chosen = torch.from_numpy(np.flatnonzero(kept)).to(events.device)
        return Question(events[chosen], {k: v[chosen] for k, v in context.items()}, np.cumsum(kept) - 1)

    def read(self, shift: Tensor, aim: Aim, context: Context) -> Tensor:
        """Candidates, the pretrained model's x_0 of them (differentiable in ``shift``), or the data themselves."""
        num, own = shift.shape[1], aim.late(self.t).repeat_interleave(shift.shape[1])
        events = (self.centre.unsqueeze(1) + shift).flatten(0, 1)
        if own.any():
            whole = own.reshape(-1, *[1] * (events.ndim - 1))
            events = torch.where(whole, self.x_0.repeat_interleave(num, 0), events)
        if aim.reward_at != "x0_hat" or own.all():
            return events
        early = (~own).nonzero().squeeze(1)
        t, told = (self.t - 1).repeat_interleave(num), {k: v[early] for k, v in context.items()}
        found = self.bench.reference.x0_hat(events[early], t[early], told)
        return found if len(early) == len(events) else events.index_copy(0, early, found)

    def take(self, rows: Int[Tensor, " some"]) -> Pairs:
        """Some of them."""
        context = {k: v[rows] for k, v in self.context.items()}
        return Pairs(self.bench, self.x_0[rows], self.t[rows], self.x_t[rows], self.centre[rows], context)


def place(
    process: Process, space: Space, x_0: Tensor, t: Tensor, context: Context, seed: int, centre: Centre
) -> tuple[Tensor, Tensor]:
    """(x_t, x_tilde) at this seed."""
    generator = torch.Generator().manual_seed(seed)

    def noise() -> Tensor:
        return space.project(torch.randn(x_0.shape, dtype=x_0.dtype, generator=generator).to(x_0.device), context)

    x_t = forward_noise(process.schedule, x_0, t, noise())
    x_tilde = posterior_mean(process, x_t, x_0, t)
    if centre == "sample":
        ab = process.schedule.alpha_bar.to(t.device)
        spread = ((1 - ab[t - 1]) / (1 - ab[t]) * (1 - ab[t] / ab[t - 1])).clamp(min=0).sqrt()
        x_tilde = x_tilde + expand(spread, x_0) * noise()
    return x_t, x_tilde


@torch.no_grad()
def draw_pairs(bench: Bench, num_pairs: int, generator: torch.Generator, seed: int, centre: Centre) -> Pairs:
    """Data under noise at timesteps drawn evenly; without a data set, x_0 comes from the pretrained model."""
    process, space = bench.reference.process, bench.reference.space
    found = bench.domain.data(num_pairs, generator)
    if found is None:
        x_T, context = bench.start(num_pairs, generator)  # noqa: N806
        x_0 = sample(bench.reference, x_T, context, generator).x_0
    else:
        x_0, context = found[0].to(bench.device, bench.dtype), {k: v.to(bench.device) for k, v in found[1].items()}
    if len(x_0) != num_pairs:
        raise ValueError(f"the domain's data set gave {len(x_0)} of {num_pairs} events: is it empty?")
    t = torch.randint(1, process.num_steps + 1, (num_pairs,), generator=generator).to(x_0.device)
    x_t, x_tilde = place(process, space, x_0, t, context, seed, centre)
    return Pairs(bench, x_0, t, x_t, x_tilde, context)
