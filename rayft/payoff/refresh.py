"""Rows whose reward is that of x_0, drawn again: data in proportion to their weight, at a new t, under new noise.

    E_{x_0} w(x_0) f(x_0) = E_{x_0 ~ w} f(x_0):   the same expected gradient, but a row's weight of 14 becomes 14 rows
    of weight 1 with 14 draws of (t, noise). Nothing is paid: r(x_0) is known and depends on neither.

Rows that carry weights repeat one (x_t, t) at every reading of the bank, and their noise grows with the square of the
weight; under a tilt that leaves 7% of the rows effective, that is fourteen times the noise of plain training.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from rayft.bench import Bench
from rayft.chain import Chains, Process
from rayft.payoff.pairs import Aim, place
from rayft.payoff.reading import Reading, View

SEED_RANGE = 2**62


@torch.no_grad()
def refreshed(
    reading: Reading, x_0: np.ndarray, view: View, aim: Aim, bench: Bench, generator: torch.Generator
) -> Reading:
    """The reading with its late rows drawn again; the others, and what is said of effective sizes, stay."""
    chains, process = reading.chains, bench.reference.process
    late = np.flatnonzero(aim.late(chains.t[0]))
    weight = reading.weight[late].mean(axis=1)
    if not len(late) or weight.sum() <= 0:
        return reading
    chosen = late[_systematic(weight, generator)]
    first = int(np.argmax(aim.late(np.arange(1, process.num_steps + 1)))) + 1  # the smallest late timestep
    t = torch.randint(first, process.num_steps + 1, (len(late),), generator=generator)
    context = {k: torch.from_numpy(np.ascontiguousarray(v[chosen])) for k, v in chains.context.items()}
    seed = int(torch.randint(SEED_RANGE, (), generator=generator))
    data = torch.from_numpy(np.ascontiguousarray(x_0[chosen]))
    x_t, centre = place(process, bench.reference.space, data, t, context, seed, aim.centre)
    told = (x_t.numpy(), centre.numpy(), _mean(bench, x_t, t, context))
    return replace(reading, chains=_with(chains, late, chosen, t.numpy(), *told, _factor(view, process, t.numpy())))


def _systematic(weight: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """As many draws as weights, each as often as its weight says, rounded up or down: the least noise there is."""
    steps = (torch.rand((), generator=generator, dtype=torch.float64).item() + np.arange(len(weight))) / len(weight)
    return np.searchsorted(np.cumsum(weight) / weight.sum(), steps).clip(max=len(weight) - 1)


def _mean(bench: Bench, x_t: torch.Tensor, t: torch.Tensor, context: dict[str, torch.Tensor]) -> np.ndarray:
    """mu_pre, on the network's own device."""
    told = {k: v.to(bench.device) for k, v in context.items()}
    return bench.reference.mean(x_t.to(bench.device), t.to(bench.device), told).cpu().numpy()


def _factor(view: View, process: Process, t: np.ndarray) -> np.ndarray:
    if view.timestep_weight == "simple":
        return (2 * process.sigma**2 / process.eps_gain**2).numpy()[t]
    return np.ones(len(t))


def _with(
    chains: Chains,
    late: np.ndarray,
    chosen: np.ndarray,
    t: np.ndarray,
    x_t: np.ndarray,
    centre: np.ndarray,
    mean_ref: np.ndarray,
    factor: np.ndarray,
) -> Chains:
    """The chains with these rows in place of the late ones, each of weight 1."""
    wide = factor.reshape(-1, *[1] * (centre.ndim - 1))
    columns = {"mean_ref": mean_ref, "weight": factor, "factor": factor, "shift": wide * (centre - mean_ref)}
    x, steps = chains.x.copy(), chains.t.copy()
    x[0, late], x[1, late], steps[0, late] = centre, x_t, t
    context = {k: v.copy() for k, v in chains.context.items()}
    for name, value in context.items():
        value[late] = chains.context[name][chosen]
    told = {k: v.copy() for k, v in chains.columns.items()}
    for name, value in told.items():
        value[0, late] = columns[name]
    return Chains(x, steps, context, told)
