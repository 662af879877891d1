"""From one reward at the end of a chain to a number for each of its transitions. numpy; whole batch at once.

Everything here is normalised once, over the whole batch, before the batch is sharded or split into minibatches.
Rows are transitions t = 1 .. T in that order (row 0 ends the chain), columns are chains. Failed rewards are NaN:
their chains get weight 0 and enter no statistic.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

Rows = Float[np.ndarray, "row batch"]
NO_SPREAD = 1e-8  # a deviation at which all returns are the same


def later(penalty: Rows) -> Rows:
    """Sum of ``penalty`` over the transitions that come after each: smaller t, so smaller row; its own left out."""
    return np.cumsum(penalty, axis=0) - penalty


def reward_to_go(rewards: Float[np.ndarray, " batch"], kl: Rows, alpha: float) -> Rows:
    """G_t = r - alpha * (closed-form KL of the LATER transitions); step t's own KL belongs in the loss.

    A closed-form KL of step t depends on x_t only: inside a detached advantage it would act as a baseline and the
    penalty on step t would vanish (math, Sec. 4; T Eq. 21 as printed does that).
    """
    return rewards[None] - alpha * later(kl)


def advantage(returns: Rows) -> tuple[Rows, float]:
    """(A_t, scale): returns minus their mean at each timestep, over one standard deviation for the whole batch.

    ``scale`` is that deviation: a KL term beside A must be divided by it too.
    """
    alive = np.isfinite(returns[0])
    if not alive.any():
        return np.zeros_like(returns), 0.0
    centred = returns - returns[:, alive].mean(axis=1, keepdims=True)
    scale = float(centred[:, alive].std())
    if scale < NO_SPREAD:
        return np.zeros_like(returns), scale
    return np.where(alive, centred / scale, 0.0), scale


def price(alpha: float, scale: Float[np.ndarray, " batch"]) -> Float[np.ndarray, " batch"]:
    """alpha / s, what a KL costs beside A = (..) / s; where nothing differs, as much as beside those that do."""
    spread = scale > NO_SPREAD
    usual = scale[spread].mean() if spread.any() else 1.0
    return alpha / np.where(spread, scale, usual)


def group_advantage(returns: Rows, size: int, own_scale: bool) -> tuple[Rows, Float[np.ndarray, " batch"]]:
    """(A_t, scale of each chain): returns minus the mean of the group's others at each timestep, over a deviation.

    Groups are ``size`` neighbours. A chain is not in its own baseline: with n in a group that would shrink the reward's
    gradient by 1/n and leave the KL's as it is, a larger alpha than was asked for. With ``own_scale`` each group is
    divided by its own deviation, otherwise all by one. A chain that failed, or has no fellow left, says nothing.
    """
    grouped = returns.reshape(len(returns), -1, size)
    alive = np.isfinite(grouped[0])
    known, num = np.where(alive, grouped, 0.0), alive.sum(1)[None, :, None]
    others = (known.sum(2, keepdims=True) - known) / np.maximum(num - 1, 1)
    centred = np.where(alive & (num > 1), known - others, 0.0)
    square, count = np.square(centred).sum((0, 2)), alive.sum(1) * len(returns)
    if not own_scale:
        square, count = np.full_like(square, square.sum()), np.full_like(count, count.sum())
    scale = np.sqrt(square / np.maximum(count, 1))
    spread = scale > NO_SPREAD
    advantage = centred * (spread / np.where(spread, scale, 1.0))[None, :, None]
    return advantage.reshape(returns.shape), np.repeat(scale, size)


def alive(rewards: Float[np.ndarray, " batch"]) -> Float[np.ndarray, " batch"]:
    """1 for chains whose reward is known, 0 for failed ones, scaled to mean 1."""
    known = np.isfinite(rewards).astype(np.float64)
    return known / max(known.mean(), 1e-12)


def exponential_weight(
    rewards: Float[np.ndarray, " batch"], alpha: float, groups: np.ndarray | None = None
) -> Float[np.ndarray, " batch"]:
    """w = exp(r / alpha) with mean 1 within each group c (T Alg. 3; p* is tilted within c, never across)."""
    weight = np.zeros(len(rewards))
    labels = np.zeros(len(rewards), dtype=int) if groups is None else np.asarray(groups)
    for label in np.unique(labels):
        members = (labels == label) & np.isfinite(rewards)
        if members.any():
            scaled = rewards[members] / alpha
            raw = np.exp(scaled - scaled.max())
            weight[members] = raw / raw.mean()
    return weight / max(weight.mean(), 1e-12)


def effective_share(weight: np.ndarray) -> float:
    """Effective sample size over sample size, (sum w)^2 / (n sum w^2)."""
    return float(weight.sum() ** 2 / max(len(weight) * np.square(weight).sum(), 1e-300))
