"""What one iteration collects before anything is scored: transitions, and the events whose reward they wait for.

Every algorithm names one of these functions; the runner that calls it does not know which. torch only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rayft.chain import Chains, Policy, forward_noise, posterior_mean, sample, sample_roll_in
from rayft.domain import Domain
from rayft.payoff import radius_at, uniform_ball


@dataclass(frozen=True)
class Bench:
    """Where draws are made: a domain, the policy being trained and the pretrained one, on one device."""

    domain: Domain
    policy: Policy
    reference: Policy
    device: torch.device
    dtype: torch.dtype

    def start(self, num_chains: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """x_T and the context of new chains. All draws are made on the CPU, the same for every device."""
        context = {k: v.to(self.device) for k, v in self.domain.context(num_chains, generator).items()}
        shape = torch.empty(num_chains, *self.domain.event_shape, dtype=self.dtype, device=self.device)
        return self.policy.noise(shape, context, generator), context


@dataclass(frozen=True)
class Draw:
    """Transitions, and the events to score with their contexts; event i may stand for many rows."""

    chains: Chains
    events: Any  # [event, *shape]
    context: dict[str, Any]

    def numpy(self) -> Draw:
        as_numpy = {k: v.cpu().numpy() for k, v in self.context.items()}
        return Draw(self.chains.numpy(), self.events.cpu().numpy(), as_numpy)


DrawFunction = Callable[[Bench, int, torch.Generator, Mapping[str, Any]], Draw]


def draw_current(bench: Bench, num_chains: int, generator: torch.Generator, settings: Mapping[str, Any]) -> Draw:
    """Whole chains of the policy, with the pretrained model's means and the KL to it."""
    x_T, context = bench.start(num_chains, generator)  # noqa: N806
    chains = sample(bench.policy, x_T, context, generator, reference=bench.reference)
    return Draw(chains, chains.x_0, chains.context)


def draw_pretrained(bench: Bench, num_chains: int, generator: torch.Generator, settings: Mapping[str, Any]) -> Draw:
    """Whole chains of the pretrained model. Its own means are the anchor, so none are evaluated twice."""
    x_T, context = bench.start(num_chains, generator)  # noqa: N806
    chains = sample(bench.reference, x_T, context, generator, reference=bench.reference)
    return Draw(chains, chains.x_0, chains.context)


def draw_roll_in(bench: Bench, num_chains: int, generator: torch.Generator, settings: Mapping[str, Any]) -> Draw:
    """T Alg. 3: policy down to a random t, pretrained model from there; one transition a chain."""
    x_T, context = bench.start(num_chains, generator)  # noqa: N806
    num_steps = bench.policy.process.num_steps
    t = torch.randint(1, num_steps + 1, (num_chains,), generator=generator).to(x_T.device)
    chains, x_0 = sample_roll_in(bench.policy, bench.reference, x_T, t, context, generator)
    return Draw(chains, x_0, chains.context)


@torch.no_grad()
def draw_payoff(bench: Bench, num_chains: int, generator: torch.Generator, settings: Mapping[str, Any]) -> Draw:
    """RGDM: data x_0, forward noise to a random t, candidates in a ball around the posterior mean (R Eq. 14).

    Events are the candidates themselves, or the pretrained model's x0_hat of them. Without a data set, x_0 is drawn
    from the pretrained model.
    """
    process, space = bench.policy.process, bench.policy.space
    found = bench.domain.data(num_chains, generator)
    if found is None:
        x_T, context = bench.start(num_chains, generator)  # noqa: N806
        x_0 = sample(bench.reference, x_T, context, generator).x_0
    else:
        x_0, context = found[0].to(bench.device, bench.dtype), {k: v.to(bench.device) for k, v in found[1].items()}
    t = torch.randint(1, process.num_steps + 1, (num_chains,), generator=generator).to(x_0.device)
    noise = bench.policy.noise(x_0, context, generator)
    x_t = forward_noise(process.schedule, x_0, t, noise)
    x_tilde = posterior_mean(process, x_t, x_0, t)
    radius = radius_at(process, t, settings["radius"], settings["radius_unit"], space.dim(x_0, context))
    num_candidates = settings["num_candidates"]
    candidates = x_tilde + uniform_ball(space, x_0, radius, num_candidates, context, generator)
    candidates = candidates.transpose(0, 1)  # [row, cand, *event]
    repeated = {k: v.repeat_interleave(num_candidates, 0) for k, v in context.items()}
    events = candidates.flatten(0, 1)
    if settings["reward_at"] == "x0_hat":
        events = bench.reference.x0_hat(events, (t - 1).repeat_interleave(num_candidates), repeated)
    mean_ref = bench.reference.mean(x_t, t, context)
    columns = {"mean_ref": mean_ref.unsqueeze(0), "candidates": candidates.unsqueeze(0)}
    return Draw(Chains(torch.stack([x_tilde, x_t]), t.unsqueeze(0), context, columns), events, repeated)


def join(draws: list[Draw]) -> Draw:
    """Several runners' draws as one, chains side by side in the order given (numpy)."""
    import numpy as np

    if len(draws) == 1:
        return draws[0]
    chains = [draw.chains for draw in draws]
    columns = {k: np.concatenate([c.columns[k] for c in chains], axis=1) for k in chains[0].columns}
    context = {k: np.concatenate([c.context[k] for c in chains]) for k in chains[0].context}
    x, t = np.concatenate([c.x for c in chains], axis=1), np.concatenate([c.t for c in chains], axis=1)
    scored = {k: np.concatenate([d.context[k] for d in draws]) for k in draws[0].context}
    return Draw(Chains(x, t, context, columns), np.concatenate([d.events for d in draws]), scored)
