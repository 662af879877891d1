"""What the reward that RGDM reads on the way says of the sample that the chain ends in, by timestep.

    signal = rank correlation of  r(x_0)  and  r(x0_hat(x_prev, t - 1))  over pretrained samples,  x_prev ~ q(. | x_0)

Near 0, candidates are pulled towards what is not there: KL is paid and no reward gained, at any temperature and radius.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.stats import spearmanr

from rayft.bench import Bench
from rayft.payoff.pairs import Aim, Pairs, Question, place
from rayft.payoff.weight import NUM_BINS, bin_of, name_of

NUM_PROBES, MIN_PROBES = 100, 20  # samples for each tenth of the timesteps; fewer than the second tell nothing


@torch.no_grad()
def probe(
    bench: Bench,
    x_0: Float[torch.Tensor, "row *event"],
    context: dict[str, torch.Tensor],
    aim: Aim,
    seed: int,
) -> tuple[Question, Int[np.ndarray, " probe"]]:
    """What to score, an event for each sample, and the timestep it is read at: evenly over the chain."""
    process = bench.reference.process
    num = min(len(x_0), NUM_PROBES * NUM_BINS)
    x_0, context = x_0[:num], {k: v[:num] for k, v in context.items()}
    t = (torch.arange(num) * process.num_steps // num + 1).to(x_0.device)
    x_t, x_prev = place(process, bench.reference.space, x_0, t, context, seed, "sample")
    pairs, told = Pairs(bench, x_0, t, x_t, x_prev, context), replace(aim, x_0_above=None)
    return pairs.question(torch.zeros_like(x_0).unsqueeze(1), told), t.cpu().numpy()


def signal(
    known: Float[np.ndarray, " row"], read: Float[np.ndarray, " row"], t: Int[np.ndarray, " row"], num_steps: int
) -> dict[str, float]:
    """Timesteps -> correlation; 0 where what is read does not differ, nothing where too few rewards are known."""
    told, bins = {}, bin_of(t, num_steps)
    for label in np.unique(bins):
        rows = (bins == label) & np.isfinite(known) & np.isfinite(read)
        if rows.sum() >= MIN_PROBES and np.ptp(known[rows]) > 0:
            found: Any = spearmanr(known[rows], read[rows]) if np.ptp(read[rows]) > 0 else (0.0, 1.0)
            told[name_of(int(label), num_steps)] = float(found[0])
    return told
