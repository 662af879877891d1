"""Rows whose reward is that of x_0, drawn again: data in proportion to their weight, at a new t, under new noise.

    E_{x_0} w(x_0) f(x_0) = E_{x_0 ~ w} f(x_0):   the same expected gradient, but a row's weight of 14 becomes 14 rows
    of weight 1 with 14 draws of (t, noise). Nothing is paid: r(x_0) is known and depends on neither.

Rows that carry weights repeat one (x_t, t) at every reading of the bank, and their noise grows with the square of the
weight; under a tilt that leaves 7% of the rows effective, that is fourteen times the noise of plain training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from rayft.bench import Bench
from rayft.chain import Chains
from rayft.payoff.pairs import Aim, Centre, place
from rayft.payoff.reading import Reading, TimestepWeight, View, timestep_factor

SEED_RANGE = 2**62


@dataclass(frozen=True)
class Weighted:
    """Finished events, each with its weight (0: never drawn) and its context. numpy."""

    x_0: np.ndarray
    weight: np.ndarray
    context: Mapping[str, np.ndarray]


def refreshed(
    reading: Reading,
    x_0: np.ndarray,
    view: View,
    aim: Aim,
    bench: Bench,
    generator: torch.Generator,
    timesteps: tuple[int, int] | None = None,
) -> Reading:
    """The reading with its late rows drawn again; the others, and what is said of effective sizes, stay."""
    chains, steps = reading.chains, bench.reference.process.num_steps
    t, (lowest, last) = chains.t[0], timesteps or (1, steps)
    judged = np.flatnonzero(aim.late(t))
    late = judged[(t[judged] >= lowest) & (t[judged] <= last)]  # the learner leaves out the others
    weight = reading.weight[judged].mean(axis=1)
    if not len(late) or weight.sum() <= 0:
        return reading
    scored = Weighted(x_0[judged], weight, {k: v[judged] for k, v in chains.context.items()})
    first = int(np.argmax(aim.late(np.arange(1, steps + 1)))) + 1  # the smallest late timestep
    drawn = draw(scored, len(late), bench, generator, aim.centre, view.timestep_weight, (max(first, lowest), last))
    return replace(reading, chains=drawn if len(late) == chains.num_chains else _put(chains, late, drawn))


@torch.no_grad()
def draw(
    scored: Weighted,
    num: int,
    bench: Bench,
    generator: torch.Generator,
    centre: Centre = "mean",
    timestep_weight: TimestepWeight = "vlb",
    timesteps: tuple[int, int] | None = None,
) -> Chains:
    """``num`` rows of weight 1 at timesteps from first to last, pulled to the posterior of an x_0 drawn by weight."""
    process = bench.reference.process
    first, last = timesteps or (1, process.num_steps)
    chosen = _systematic(scored.weight, num, generator)
    t = torch.randint(first, last + 1, (num,), generator=generator)
    context = {k: torch.from_numpy(np.ascontiguousarray(v[chosen])) for k, v in scored.context.items()}
    seed = int(torch.randint(SEED_RANGE, (), generator=generator))
    data = torch.from_numpy(np.ascontiguousarray(scored.x_0[chosen]))
    x_t, towards = place(process, bench.reference.space, data, t, context, seed, centre)
    told = {k: v.to(bench.device) for k, v in context.items()}
    mean_ref = bench.reference.mean(x_t.to(bench.device), t.to(bench.device), told).cpu()
    factor = torch.from_numpy(timestep_factor(timestep_weight, process, t.numpy())).to(x_t.dtype)
    shift = factor.reshape(-1, *[1] * (x_t.ndim - 1)) * (towards - mean_ref)
    columns = {"mean_ref": mean_ref, "weight": factor, "factor": factor, "shift": shift}
    rows = {k: v.unsqueeze(0) for k, v in columns.items()}
    return Chains(torch.stack([towards, x_t]), t.unsqueeze(0), context, rows).numpy()


def _systematic(weight: np.ndarray, num: int, generator: torch.Generator) -> np.ndarray:
    """Each as often as its weight says, rounded up or down: the least noise there is."""
    steps = (torch.rand((), generator=generator, dtype=torch.float64).item() + np.arange(num)) / num
    return np.searchsorted(np.cumsum(weight) / weight.sum(), steps).clip(max=len(weight) - 1)


def _put(chains: Chains, late: np.ndarray, drawn: Chains) -> Chains:
    """The chains with the drawn rows in place of the late ones."""
    x, t = chains.x.copy(), chains.t.copy()
    x[:, late], t[:, late] = drawn.x, drawn.t
    context = {k: v.copy() for k, v in chains.context.items()}
    columns = {k: v.copy() for k, v in chains.columns.items()}
    for name, value in context.items():
        value[late] = drawn.context[name]
    for name, value in columns.items():
        value[:, late] = drawn.columns[name]
    return Chains(x, t, context, columns)
