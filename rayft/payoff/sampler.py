"""Pay-off samplers: how candidates in the ball are found. Each asks for rewards and waits, whoever computes them.

    importance    uniform draws, weighted by exp(r/tau) when they are read: any (tau, d) later on
    annealing     simulated annealing inside the ball, for black boxes: all rows ask together at every step
    gradient      projected ascent, for differentiable rewards

A sampler is a generator: it yields a ``Question``, is sent ``[event, 1 + part]`` (rewards first, NaN = failed) and
returns ``Candidates``. The last two give draws (annealing at tau) or maximisers, which carry no weight of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rayft.chain import PIECE, expand
from rayft.payoff.ball import radius_at, shell_of, uniform_shell
from rayft.payoff.pairs import Aim, Pairs, Question
from rayft.space import Context, squared_norm

Search = Generator[Question, np.ndarray, "Candidates"]
Slope = Callable[[Tensor, Context], Tensor]  # r(x_0) [batch], differentiable
FIRST_STEP, LAST_STEP = 0.5, 0.003  # of the radius
ACCEPTED = 0.3  # share of proposals that annealing steers its step towards


@dataclass(frozen=True)
class Candidates:
    """K shifts per pair, what was said of them, and the rewards of uniform draws where a search began with some."""

    eps_star: Float[Tensor, "row cand *event"]
    told: Float[np.ndarray, "row cand part"]
    start: Float[np.ndarray, "row cand"] | None = None


def importance(pairs: Pairs, aim: Aim, generator: torch.Generator) -> Search:
    """Uniform in each shell."""
    shift = _uniform(pairs, aim, generator)
    answer = yield pairs.question(shift, aim)
    return Candidates(shift, _per_pair(answer, pairs))


def annealing(pairs: Pairs, aim: Aim, generator: torch.Generator) -> Search:
    """K searches per pair by Metropolis steps, from the rewards' own spread down to ``temperature``.

    Without one (0) proposals are pulled back onto the ball and the best that was seen is returned: a maximiser, as in
    R. With one they are refused outside it, the second half stays at it, and the end is a draw from q_pd.
    """
    shift, limit = _uniform(pairs, aim, generator), _limit(pairs, aim)
    told = _per_pair((yield pairs.question(shift, aim)), pairs)
    start, best, best_shift = told[..., 0], told, shift
    hot = float(np.nanstd(start)) if np.isfinite(start).any() else 0.0
    cold = aim.temperature or 1e-4 * hot
    hot, size = max(hot, cold, 1e-12), FIRST_STEP
    dim = torch.as_tensor(pairs.bench.reference.space.dim(pairs.x_0, pairs.context), dtype=shift.dtype)
    for step in range(aim.sampler_steps):
        done = step / max(1, aim.sampler_steps - 1)
        tau = hot * (max(cold, 1e-12) / hot) ** min(1.0, 2 * done if aim.temperature else done)
        scale = expand(size * limit / dim.sqrt().clamp(min=1), pairs.x_0).unsqueeze(1)
        proposal = shift + scale * _normal(pairs, shift, generator)
        proposal = proposal if aim.temperature else _pulled(proposal, limit)
        inside = (_length(proposal) <= limit.unsqueeze(1)).cpu().numpy() | (aim.temperature is None)
        heard = _per_pair((yield pairs.question(proposal, aim)), pairs)
        gain = np.where(np.isfinite(told[..., 0]), heard[..., 0] - told[..., 0], np.inf)
        luck = torch.rand(gain.shape, dtype=torch.float64, generator=generator).numpy()
        taken = inside & np.isfinite(heard[..., 0]) & (np.log(luck) < gain / tau)
        shift, told = _chosen(taken, proposal, shift), np.where(taken[..., None], heard, told)
        better = inside & (heard[..., 0] > np.where(np.isfinite(best[..., 0]), best[..., 0], -np.inf))
        best_shift, best = _chosen(better, proposal, best_shift), np.where(better[..., None], heard, best)
        size = min(1.0, max(LAST_STEP, size * float(np.exp(taken.mean() - ACCEPTED))))
    return Candidates(shift, told, start) if aim.temperature else Candidates(best_shift, best, start)


def gradient(pairs: Pairs, aim: Aim, generator: torch.Generator, slope: Slope) -> Search:
    """K ascents per pair along grad r, pulled back onto the ball; the best point of each is scored, once."""
    space, limit = pairs.bench.reference.space, _limit(pairs, aim)
    shift = _uniform(pairs, aim, generator)
    context = {k: v.repeat_interleave(shift.shape[1], 0) for k, v in pairs.context.items()}
    best_shift, best = shift, torch.full(shift.shape[:2], -torch.inf, dtype=shift.dtype, device=shift.device)
    for step in range(aim.sampler_steps + 1):
        value, uphill = _uphill(pairs, shift, aim, slope)
        better = (value > best) & torch.isfinite(value)
        best = torch.where(better, value, best)
        best_shift = torch.where(_like(better, shift), shift, best_shift)
        uphill = torch.nan_to_num(space.project(uphill.flatten(0, 1), context)).unflatten(0, shift.shape[:2])
        size = FIRST_STEP * (LAST_STEP / FIRST_STEP) ** (step / max(1, aim.sampler_steps))
        towards = uphill / _like(_length(uphill).clamp(min=1e-30), shift)
        shift = _pulled(shift + size * expand(limit, pairs.x_0).unsqueeze(1) * towards, limit)
    answer = yield pairs.question(best_shift, aim)
    return Candidates(best_shift, _per_pair(answer, pairs))


def _uphill(pairs: Pairs, shift: Tensor, aim: Aim, slope: Slope) -> tuple[Tensor, Tensor]:
    """r [row, cand] and its gradient, in pieces that stay in the cache; 0 where r is that of the data."""
    value, uphill = shift.new_zeros(shift.shape[:2]), torch.zeros_like(shift)
    early = (~aim.late(pairs.t)).nonzero().squeeze(1)
    size = max(1, PIECE // shift[0].numel()) if shift.device.type == "cpu" else len(shift)
    for rows in early.split(size):
        part = pairs.take(rows)
        context = {k: v.repeat_interleave(shift.shape[1], 0) for k, v in part.context.items()}
        with torch.enable_grad():
            point = shift[rows].detach().requires_grad_(True)
            found = slope(part.read(point, aim, context), context)
            (uphill[rows],) = torch.autograd.grad(found.sum(), point)
        value[rows] = found.detach().reshape(len(rows), -1).to(value.dtype)
    return value, uphill


def begin(pairs: Pairs, aim: Aim, generator: torch.Generator, slope: Slope | None = None) -> Search:
    """The search that the aim names."""
    if aim.sampler == "gradient":
        assert slope is not None, "a gradient sampler is given the reward's"
        return gradient(pairs, aim, generator, slope)
    return {"importance": importance, "annealing": annealing}[aim.sampler](pairs, aim, generator)


def questions(aim: Aim) -> int:
    """Events per pair that a search asks about."""
    return aim.num_candidates * (1 + aim.sampler_steps * (aim.sampler == "annealing"))


# -- what they share


def _radii(pairs: Pairs, aim: Aim) -> list[Tensor]:
    process, dim = pairs.bench.reference.process, pairs.bench.reference.space.dim(pairs.x_0, pairs.context)
    return [radius_at(process, pairs.t, radius, aim.radius_unit, dim) for radius in aim.radii]


def _limit(pairs: Pairs, aim: Aim) -> Tensor:
    return _radii(pairs, aim)[-1].to(pairs.x_0.dtype)


def _uniform(pairs: Pairs, aim: Aim, generator: torch.Generator) -> Tensor:
    outer, space = _radii(pairs, aim), pairs.bench.reference.space
    inner = [torch.zeros_like(outer[0]), *outer]
    drawn = [
        uniform_shell(space, pairs.x_0, inner[shell], outer[shell], pairs.context, generator)
        for shell in shell_of(aim.num_candidates, len(aim.radii))
    ]
    return torch.stack(drawn, 1)


def _normal(pairs: Pairs, like: Tensor, generator: torch.Generator) -> Tensor:
    drawn = [pairs.bench.reference.noise(pairs.x_0, pairs.context, generator) for _ in range(like.shape[1])]
    return torch.stack(drawn, 1)


def _length(shift: Tensor) -> Tensor:
    return squared_norm(shift.flatten(0, 1)).sqrt().unflatten(0, shift.shape[:2])


def _pulled(shift: Tensor, limit: Tensor) -> Tensor:
    """Onto the ball where it lies outside."""
    return shift * _like((limit.unsqueeze(1) / _length(shift).clamp(min=1e-30)).clamp(max=1), shift)


def _chosen(taken: np.ndarray, one: Tensor, other: Tensor) -> Tensor:
    return torch.where(_like(torch.from_numpy(taken).to(one.device), one), one, other)


def _like(values: Tensor, shift: Tensor) -> Tensor:
    return values.reshape(*values.shape, *[1] * (shift.ndim - 2))


def _per_pair(answer: np.ndarray, pairs: Pairs) -> np.ndarray:
    return answer.reshape(len(pairs.t), -1, answer.shape[-1])
