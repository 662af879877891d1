"""One pure function per objective. Each takes rows of transitions and returns one loss per row, unreduced.

The learner averages over the global minibatch; ``weight`` columns have mean 1 over the whole batch.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from rayft.space import squared_norm

Row = Float[Tensor, " row"]
Events = Float[Tensor, "row *event"]


def ppo_loss(log_prob: Row, log_prob_old: Row, advantage: Row, clip: float) -> Row:
    """Clipped surrogate (T Alg. 1), one transition a row.

    L = -min(rho A, clip(rho, 1 - c, 1 + c) A),    rho = p_theta / p_old
    """
    ratio = (log_prob - log_prob_old).exp()
    return -torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def transition_kl(mean: Events, mean_ref: Events, sigma: Row) -> Row:
    """KL(p_theta || p_pre) of one transition, |mu - mu_pre|^2 / (2 sigma^2)."""
    return squared_norm(mean - mean_ref) / (2 * sigma**2)


def weighted_mle_loss(mean: Events, x_prev: Events, sigma: Row, weight: Row) -> Row:
    """Cross-entropy to weighted transitions (T Eq. 24; RGDM Eq. 13 with several candidates folded into one).

        L = w |x_prev - mu|^2 / (2 sigma^2)

    Terms that do not depend on theta are dropped: the gradient is the likelihood's, the value is not. K candidates
    with weights w_k have the same gradient as their weighted mean with weight sum_k w_k.
    """
    return weight * squared_norm(x_prev - mean) / (2 * sigma**2)


def anchored_loss(mean: Events, x_prev: Events, mean_ref: Events, sigma: Row, weight: Row) -> Row:
    """The same in expectation, without the noise that w = 1 carries: zero gradient where mu = mu_pre and w = 1.

        L = (w |x_prev - mu|^2 - |x_prev - mu|^2 + |mu - mu_pre|^2) / (2 sigma^2)

    E[x_prev | x_t] = mu_pre under the pretrained model, so the two added terms cancel in expectation.
    """
    pull = (weight - 1) * squared_norm(x_prev - mean) + squared_norm(mean - mean_ref)
    return pull / (2 * sigma**2)


def pull_loss(mean: Events, mean_ref: Events, shift: Events, weight: Row, sigma: Row) -> Row:
    """A quadratic around the pretrained mean (RGDM's anchored form): y = mu - mu_pre goes to shift / weight.

    L = (weight |y|^2 - 2 shift y) / (2 sigma^2)
    """
    y = mean - mean_ref
    return (weight * squared_norm(y) - 2 * (shift * y).flatten(1).sum(1)) / (2 * sigma**2)


def path_consistency_loss(value: Row, value_end: Row, log_ratio: Row, alpha: float) -> Row:
    """A soft Bellman residual over one or more transitions, squared (T Eq. 33 to 36).

        L = [ (v_t - v_s) / alpha + sum_{u = s + 1 .. t} log p_theta / p_pre (x_{u-1} | x_u) ]^2 / 2,    v_0 = r

    It is 0 at p* and its v for every path, whoever drew it; with s = 0, t = T it is trajectory balance.
    """
    return 0.5 * ((value - value_end) / alpha + log_ratio).square()


def forward_loss(y_old: Events, y_ref: Events, pull: Events, kl_weight: float, sigma: Row) -> Row:
    """From the policy's old mean towards data that did better than the average, by one denoising loss.

        L = (|y_old - w g|^2 - |w g|^2 + k |y_ref|^2) / (2 sigma^2),    y = mu - mu_old or mu - mu_pre

    ``pull`` is w g: a weight of mean 1 times what the datum's posterior mean is away from mu_old.
    """
    square = squared_norm(y_old) - 2 * (pull * y_old).flatten(1).sum(1)
    return (square + kl_weight * squared_norm(y_ref)) / (2 * sigma**2)
