"""The denoising chain: forward noise, reverse transitions, exact densities, and sampling of whole batches.

    p_theta(x_prev | x_t) = N(mu_theta(x_t, t), sigma_t^2 P),    t = T .. 1

The reverse mean is linear in x_t and in what the network predicts, whatever it predicts (noise, x_0 or v), so one
pair of tables covers all three:    mu_theta = keep[t] x_t + gain[t] network(x_t, t).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rayft.schedule import Schedule
from rayft.space import Context, Space, squared_norm

Prediction = Literal["eps", "x0", "v"]
Network = Callable[[Tensor, Tensor, Context], Tensor]


@dataclass(frozen=True)
class Process:
    """q(x_prev | x_t, x_0) = N(from_x0[t] x_0 + from_xt[t] x_t, sigma[t]^2). Indexed by t; row 0 is not used."""

    schedule: Schedule
    from_x0: Float[Tensor, " T_plus_1"]
    from_xt: Float[Tensor, " T_plus_1"]
    sigma: Float[Tensor, " T_plus_1"]
    kind: tuple[str, float] = ("beta", 1.0)  # of sigma, and eta

    def respaced(self, num_steps: int) -> Process:
        """The same kind of transitions between fewer timesteps."""
        return reverse_process(self.schedule, *self.kind, num_steps)

    @property
    def num_steps(self) -> int:
        """T."""
        return self.schedule.num_steps

    def linear_in(self, prediction: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(keep, gain) of the mean and of x0_hat, both linear in x_t and in the network's output."""
        ab = self.schedule.alpha_bar
        if prediction == "eps":
            if ab[-1] <= 0:
                raise ValueError(
                    "alpha_bar is 0 at T, where predicted noise says nothing of x_0; use an x0 or v network"
                )
            keep, gain = 1 / ab.sqrt(), -((1 - ab) / ab).sqrt()
        elif prediction == "x0":
            keep, gain = torch.zeros_like(ab), torch.ones_like(ab)
        elif prediction == "v":
            keep, gain = ab.sqrt(), -(1 - ab).sqrt()
        else:
            raise ValueError(f"a denoiser predicts 'eps', 'x0' or 'v'; this one says {prediction!r}")
        return self.from_xt + self.from_x0 * keep, self.from_x0 * gain, keep, gain

    @property
    def eps_gain(self) -> Float[Tensor, " T_plus_1"]:
        """c_t: mu_theta moves by -c_t per unit of predicted noise (math: beta_t / sqrt(alpha_t (1 - alpha_bar_t)))."""
        return -self.linear_in("eps")[1]

    def even_in(self, prediction: str) -> Float[Tensor, " T_plus_1"]:
        """What turns |mu - mu'|^2 / (2 sigma_t^2) into |out - out'|^2 of a network that predicts ``prediction``.

        Noise that says nothing of x_0, where alpha_bar is 0, has weight 0.
        """
        if prediction == "eps":
            ab = self.schedule.alpha_bar
            return 2 * self.sigma**2 / (self.from_x0**2 * (1 - ab) / ab)
        return 2 * self.sigma**2 / self.linear_in(prediction)[1] ** 2


def reverse_process(schedule: Schedule, sigma: str = "beta", eta: float = 1.0, num_steps: int | None = None) -> Process:
    """Reverse transitions with noise ``sigma_t^2 = beta_t`` or ``eta^2 gamma_t`` (DDIM's mean for eta < 1), respaced.

    Where ``gamma_1 = 0``, sigma_1 = sigma_2 in sampler, density and KL alike: no step is sampled without noise and
    scored with it.
    """
    if sigma not in ("beta", "gamma"):
        raise ValueError(f"sigma is {sigma!r}; choose 'beta' (beta_t) or 'gamma' (the posterior's variance)")
    if not 0 < eta <= 1:
        raise ValueError(f"eta is {eta}; a chain with a density needs 0 < eta <= 1 (at eta = 0 its KL is undefined)")
    if sigma == "beta" and eta != 1:
        raise ValueError(f"eta is {eta} with sigma 'beta'; DDIM's eta scales gamma_t, so set sigma to 'gamma'")
    if num_steps is not None:
        schedule = schedule.respace(num_steps)
    ab, ab_prev = schedule.alpha_bar[1:], schedule.alpha_bar[:-1]
    beta = 1 - ab / ab_prev
    variance = eta**2 * beta * (1 - ab_prev) / (1 - ab)
    from_xt = ((1 - ab_prev - variance).clamp(min=0) / (1 - ab)).sqrt()
    from_x0 = ab_prev.sqrt() - ab.sqrt() * from_xt
    noise = beta if sigma == "beta" else variance.clone()
    if noise[0] < 1e-12:
        noise[0] = noise[1] if len(noise) > 1 else beta[0]
    tables = (torch.cat([x.new_zeros(1), x]) for x in (from_x0, from_xt, noise.sqrt()))
    return Process(schedule, *tables, kind=(sigma, eta))


def expand(values: Float[Tensor, " batch"], like: Float[Tensor, "batch *event"]) -> Tensor:
    """One value per chain, shaped to multiply events, in their dtype."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def forward_noise(schedule: Schedule, x_0: Tensor, t: Int[Tensor, " batch"], noise: Tensor) -> Tensor:
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise."""
    ab = schedule.alpha_bar.to(x_0.device)[t]
    return expand(ab.sqrt(), x_0) * x_0 + expand((1 - ab).sqrt(), x_0) * noise


def posterior_mean(process: Process, x_t: Tensor, x_0: Tensor, t: Int[Tensor, " batch"]) -> Tensor:
    """The mean of q(x_prev | x_t, x_0); R calls it x_tilde."""
    from_x0, from_xt = process.from_x0.to(x_t.device)[t], process.from_xt.to(x_t.device)[t]
    return expand(from_x0, x_t) * x_0 + expand(from_xt, x_t) * x_t


PIECE = 32_768  # numbers that a network is given at a time on a CPU, when it samples


class Policy:
    """p_theta(x_prev | x_t): a network, a process and a space. Holds no weights of its own.

    ``network(x_t, timestep, context)`` gets the timestep it was trained with, one per chain; its output is projected
    into the space, so a network need not know of padding.
    """

    def __init__(
        self, network: Network, process: Process, space: Space, prediction: Prediction = "eps", autocast: Any = None
    ) -> None:
        self.network, self.process, self.space, self.autocast = network, process, space, autocast
        self.prediction: Prediction = prediction
        tables = [*process.linear_in(prediction), process.sigma]
        self._cpu = torch.stack(tables)
        self._rows: list[list[float]] = self._cpu.T.tolist()
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def respaced(self, num_steps: int) -> Policy:
        """The same network on fewer timesteps, its noise made anew in the same way."""
        return Policy(self.network, self.process.respaced(num_steps), self.space, self.prediction, self.autocast)

    def _output(self, x_t: Tensor, t: Int[Tensor, " batch"], context: Context) -> Tensor:
        """In pieces where nobody asks for a gradient: what a piece of a network computes then stays in the cache."""
        if torch.is_grad_enabled() or x_t.numel() <= PIECE or x_t.device.type != "cpu":
            return self._piece(x_t, t, context)
        rows = max(1, PIECE * len(x_t) // x_t.numel())
        pieces = [slice(start, start + rows) for start in range(0, len(x_t), rows)]
        return torch.cat([self._piece(x_t[p], t[p], {k: v[p] for k, v in context.items()}) for p in pieces])

    def _piece(self, x_t: Tensor, t: Int[Tensor, " batch"], context: Context) -> Tensor:
        timestep = self.timestep(t)
        if self.autocast is None:
            return self.space.project(self.network(x_t, timestep, context), context)
        with torch.autocast(x_t.device.type, dtype=self.autocast):
            out = self.network(x_t, timestep, context)
        return self.space.project(out.to(x_t.dtype), context)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._tables:
            self._tables[device] = (self._cpu.to(device), self.process.schedule.timestep.to(device))
        return self._tables[device]

    def mean(self, x_t: Tensor, t: Int[Tensor, " batch"], context: Context) -> Tensor:
        """mu_theta(x_t, t)."""
        keep, gain = self._on(x_t.device)[0][:2, t]
        return expand(keep, x_t) * x_t + expand(gain, x_t) * self._output(x_t, t, context)

    def mean_at(self, x_t: Tensor, step: int, context: Context) -> Tensor:
        """mu_theta with the whole batch at one timestep: scalars instead of gathered tables."""
        t = torch.full((len(x_t),), step, device=x_t.device)
        keep, gain = self._rows[step][:2]
        return torch.add(x_t * keep, self._output(x_t, t, context), alpha=gain)

    def x0_hat(self, x_t: Tensor, t: Int[Tensor, " batch"], context: Context) -> Tensor:
        """E[x_0 | x_t] as the network sees it (Tweedie); at t = 0, where it was never trained, the event itself."""
        keep, gain = self._on(x_t.device)[0][2:4, t.clamp(min=1)]
        x_0 = expand(keep, x_t) * x_t + expand(gain, x_t) * self._output(x_t, t.clamp(min=1), context)
        return torch.where(expand((t == 0).to(x_t.dtype), x_t).bool(), x_t, x_0)

    def sigma(self, t: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """sigma_t, one per row."""
        return self._on(t.device)[0][4, t]

    def timestep(self, t: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """What networks were trained to call these t."""
        return self._on(t.device)[1][t]

    def log_prob(self, x_prev: Tensor, mean: Tensor, t: Int[Tensor, " batch"], context: Context) -> Tensor:
        """log p(x_prev | x_t), summed over the event's axes, exact in the space."""
        return log_normal(self.space, x_prev, mean, self.sigma(t).to(mean.dtype), context)

    def kl(self, mean: Tensor, mean_ref: Tensor, t: Int[Tensor, " batch"]) -> Tensor:
        """KL of two transitions with equal sigma_t: |mu - mu_ref|^2 / (2 sigma_t^2)."""
        return squared_norm(mean - mean_ref) / (2 * self.sigma(t).to(mean.dtype) ** 2)

    def noise(self, like: Tensor, context: Context, generator: torch.Generator) -> Tensor:
        """Standard normal in the space, drawn on the CPU: the same numbers for every device."""
        drawn = torch.randn(like.shape, dtype=like.dtype, generator=generator)
        return self.space.project(drawn.to(like.device, non_blocking=True), context)


def log_normal(space: Space, x: Tensor, mean: Tensor, sigma: Tensor | float, context: Context) -> Tensor:
    """log N(x; mean, sigma^2 P) summed over the event's axes."""
    log_sigma = sigma.log() if isinstance(sigma, Tensor) else math.log(sigma)
    constant = space.dim(mean, context) * (log_sigma + 0.5 * math.log(2 * math.pi))
    return -squared_norm(space.project(x - mean, context)) / (2 * sigma**2) - constant


@dataclass(frozen=True)
class Chains:
    """A batch of transitions: row l takes ``x[l + 1]`` to ``x[l]`` at timestep ``t[l]``.

    A whole chain has T rows, ``t[l] = l + 1``, and ``x[t]`` is x_t. Off-policy transitions are chains of one row.
    What stays fixed along a chain is its context. Arrays are torch or numpy, all alike.
    """

    x: Any  # [row + 1, batch, *event]
    t: Any  # [row, batch]
    context: dict[str, Any] = field(default_factory=dict)  # [batch, ...]
    columns: dict[str, Any] = field(default_factory=dict)  # [row, batch, ...]: log_prob, mean_ref, kl, weight ...

    @property
    def num_rows(self) -> int:
        return self.t.shape[0]

    @property
    def num_chains(self) -> int:
        return self.t.shape[1]

    @property
    def x_0(self) -> Any:
        """The finished events (of whole chains)."""
        return self.x[0]

    def map(self, fn: Callable[[Any], Any]) -> Chains:
        """Every array through ``fn``."""
        over = {k: fn(v) for k, v in self.context.items()}, {k: fn(v) for k, v in self.columns.items()}
        return Chains(fn(self.x), fn(self.t), *over)

    def with_columns(self, **columns: Any) -> Chains:
        """The same transitions with more said about each."""
        return replace(self, columns={**self.columns, **columns})

    def keep(self, *names: str) -> Chains:
        """The same transitions with only these columns: what is not read need not travel."""
        return replace(self, columns={name: self.columns[name] for name in names})

    @staticmethod
    def join(parts: Sequence[Chains]) -> Chains:
        """Side by side (numpy)."""
        if len(parts) == 1:
            return parts[0]
        x, t = np.concatenate([p.x for p in parts], axis=1), np.concatenate([p.t for p in parts], axis=1)
        context = {k: np.concatenate([p.context[k] for p in parts]) for k in parts[0].context}
        columns = {k: np.concatenate([p.columns[k] for p in parts], axis=1) for k in parts[0].columns}
        return Chains(x, t, context, columns)

    def numpy(self) -> Chains:
        return self.map(lambda a: a.detach().cpu().numpy())

    def gather(self, index: Int[Any, " n"]) -> dict[str, Any]:
        """Transitions ``index`` of the ``num_rows * num_chains``, as rows: x_t, t, x_prev, context and columns."""
        row, chain = index // self.num_chains, index % self.num_chains
        rows = {"x_t": self.x[row + 1, chain], "t": self.t[row, chain], "x_prev": self.x[row, chain]}
        rows |= {f"context/{k}": v[chain] for k, v in self.context.items()}
        return rows | {k: v[row, chain] for k, v in self.columns.items()}


@torch.no_grad()
def sample(
    policy: Policy,
    x_T: Float[Tensor, "batch *event"],  # noqa: N803
    context: Context,
    generator: torch.Generator,
    reference: Policy | None = None,
) -> Chains:
    """Whole chains from x_T under ``policy``, with log-probs; with a reference also its means and the KL to it."""
    num_steps = policy.process.num_steps
    x = x_T.new_empty(num_steps + 1, *x_T.shape)
    log_prob = x_T.new_empty(num_steps, len(x_T))
    mean_ref = torch.empty_like(x[1:]) if reference is not None else None
    kl = torch.empty_like(log_prob)
    x[num_steps] = x_T
    for step in range(num_steps, 0, -1):
        sigma = policy._rows[step][4]
        mean = policy.mean_at(x[step], step, context)
        torch.add(mean, policy.noise(mean, context, generator), alpha=sigma, out=x[step - 1])
        log_prob[step - 1] = log_normal(policy.space, x[step - 1], mean, sigma, context)
        if reference is not None and mean_ref is not None:
            mean_ref[step - 1] = mean if reference is policy else reference.mean_at(x[step], step, context)
            kl[step - 1] = squared_norm(mean - mean_ref[step - 1]) / (2 * sigma**2)
    t = torch.arange(1, num_steps + 1, device=x.device).unsqueeze(1).expand(-1, len(x_T))
    columns = {"log_prob": log_prob}
    if mean_ref is not None:
        columns |= {"mean_ref": mean_ref, "kl": kl}
    return Chains(x, t, dict(context), columns)


@torch.no_grad()
def sample_roll_in(
    policy: Policy,
    reference: Policy,
    x_T: Float[Tensor, "batch *event"],  # noqa: N803
    t: Int[Tensor, " batch"],
    context: Context,
    generator: torch.Generator,
) -> tuple[Chains, Tensor]:
    """T Alg. 3: roll in under ``policy`` down to t, go on under ``reference``; the transition at t and the final x_0.

    Any roll-in is valid (T Lemma 3); each chain gives the one transition whose continuation is the reference's.
    """
    x, kept, prev, mean_ref = x_T, torch.empty_like(x_T), torch.empty_like(x_T), torch.empty_like(x_T)
    for step in range(policy.process.num_steps, 0, -1):
        current = t < step
        mean = torch.empty_like(x)
        for chosen, mover in ((current, policy), (~current, reference)):
            if bool(chosen.any()):
                part = {k: v[chosen] for k, v in context.items()}
                mean[chosen] = mover.mean_at(x[chosen], step, part)
        x_prev = mean + policy._rows[step][4] * policy.noise(x, context, generator)
        here = expand((t == step).to(x.dtype), x).bool()
        kept, prev = torch.where(here, x, kept), torch.where(here, x_prev, prev)
        mean_ref = torch.where(here, mean, mean_ref)
        x = x_prev
    chains = Chains(torch.stack([prev, kept]), t.unsqueeze(0), dict(context), {"mean_ref": mean_ref.unsqueeze(0)})
    return chains, x
