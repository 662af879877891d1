"""Whole chains as a differentiable function of the policy's weights: reward backpropagation's forward pass.

    x_prev = mu_theta(x_t, t) + sigma_t z_t,    d r(x_0) / d theta through the last K transitions

Noise is addressed by timestep, so no step's activations need be kept: with ``checkpoint`` a transition is computed
again when its gradient is wanted, and memory is K events beside one transition, whatever T is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rayft.chain import Policy, expand
from rayft.space import Context, squared_norm

Noise = Callable[[int], Tensor]  # timestep -> z_t [batch, *event], the same whenever it is asked


@dataclass(frozen=True)
class Cut:
    """How far gradients go: through transitions ``steps`` .. 1, each kept or ``again`` computed."""

    steps: int
    again: bool


def climb(
    policy: Policy,
    reference: Policy,
    x_T: Float[Tensor, "batch *event"],  # noqa: N803
    context: Context,
    noise: Noise,
    cut: Cut,
    early: Int[Tensor, " batch"],
) -> tuple[Float[Tensor, "batch *event"], Float[Tensor, " batch"]]:
    """(x_0, KL of the chain to the reference), differentiable through the last ``cut.steps`` transitions.

    Those before the cut leave no trace in x_0, but the weights that make them are the same, and their KL must be paid
    too: it is estimated at one of them, ``early``, drawn evenly from cut.steps + 1 .. T.
    """
    num_steps = policy.process.num_steps
    x, kl = x_T, x_T.new_zeros(len(x_T))
    kept = x_T
    with torch.no_grad():
        for step in range(num_steps, cut.steps, -1):
            kept = torch.where(expand((early == step).to(x.dtype), x).bool(), x, kept)
            x = policy.mean_at(x, step, context) + policy._rows[step][4] * noise(step)
    if cut.steps < num_steps:
        gap = policy.mean(kept, early, context) - reference.mean(kept, early, context)
        kl = (num_steps - cut.steps) * squared_norm(gap) / (2 * policy.sigma(early).to(x.dtype) ** 2)
    for step in range(cut.steps, 0, -1):
        told = policy, reference, x, step, context
        mean, paid = checkpoint(_transition, *told, use_reentrant=False) if cut.again else _transition(*told)
        x, kl = mean + policy._rows[step][4] * noise(step), kl + paid
    return x, kl


def finite(slope: Float[Tensor, "batch *event"]) -> Tensor:
    """d loss / d x_0 without the chains where it is no number: one of them would be in every weight's gradient.

    A reward that failed has such a slope however it is weighed: 0 times NaN is NaN.
    """
    known = slope.flatten(1).isfinite().all(1)
    return torch.where(expand(known.to(slope.dtype), slope).bool(), slope, 0.0)


def _transition(
    policy: Policy, reference: Policy, x: Tensor, step: int, context: Context
) -> tuple[Tensor, Float[Tensor, " batch"]]:
    """(mu_theta, KL of the transition)."""
    mean = policy.mean_at(x, step, context)
    gap = mean - reference.mean_at(x, step, context)
    return mean, squared_norm(gap) / (2 * policy._rows[step][4] ** 2)
