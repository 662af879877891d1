"""A shard read at one temperature and radius: rows to learn from, and how far they can be trusted.

    anchored:  L = (a |mu - mu_pre|^2 - 2 c (mu - mu_pre)) / (2 sigma_t^2),
               a = W - B + 1,    c = W (x_w - mu_pre) - B (x_b - mu_pre),

x_w, W the candidates folded with their weights and x_b, B with their base weights alone: in expectation the last two
cancel against mu_pre, and with them the noise of a policy that the reward tells nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from rayft.chain import Chains, Process
from rayft.payoff.ball import base_log_weight, relative, shell_of
from rayft.payoff.bank import PART, Shard
from rayft.payoff.pairs import Aim, place
from rayft.payoff.weight import Normalise, Running, bin_of, candidate_weight, effective_size, fold
from rayft.space import Space

TimestepWeight = Literal["vlb", "simple", "v"]
MIN_ASKED = 16  # candidates at a timestep before it may be called silent


@dataclass(frozen=True)
class View:
    """How candidates are read: all of it can be changed without paying for a reward again."""

    temperature: float
    radius: float
    normalise: Normalise
    timestep_weight: TimestepWeight
    anchor: bool


@dataclass(frozen=True)
class Reading:
    """Rows for the learner, with what a person wants to know of them."""

    chains: Chains
    weight: np.ndarray  # [row, cand]
    rewards: np.ndarray  # [row, cand]
    parts: dict[str, np.ndarray]
    effective: dict[int, float]  # bin of timesteps -> effective sample size
    silent: list[int]  # timesteps at which every candidate failed
    running: Running  # means of the weights, these rows included


def cut(shard: Shard, rows: slice, process: Process, space: Space, aim: Aim) -> dict[str, np.ndarray]:
    """Some rows of a shard as plain arrays, with x_t and the centre of the candidates from the seed."""
    context = {k: torch.from_numpy(np.array(v)) for k, v in shard.context.items()}
    x_0, t = torch.from_numpy(np.array(shard.x_0)), torch.from_numpy(shard.t.astype(np.int64))
    x_t, centre = place(process, space, x_0, t, context, shard.seed, aim.centre)
    dim = np.broadcast_to(np.asarray(space.dim(x_0, context), dtype=np.float64), (shard.num_pairs,))
    found = {
        "x_0": shard.x_0,
        "x_t": x_t.numpy(),
        "centre": centre.numpy(),
        "t": t.numpy(),
        "dim": dim,
        "mean_ref": shard.mean_ref,
    }
    found |= {"mean_ref": shard.mean_ref, "eps_star": shard.eps_star, "rewards": shard.rewards}
    found |= {} if shard.start is None else {"start": shard.start}
    found |= {f"context/{k}": v for k, v in shard.context.items()} | {PART + k: v for k, v in shard.parts.items()}
    return {k: v[rows] for k, v in found.items()}


def read(
    pieces: Sequence[dict[str, np.ndarray]],
    view: View,
    aim: Aim,
    process: Process,
    running: Running,
) -> Reading:
    """Rows at a temperature and radius, normalised over all pieces together."""
    rows = {k: np.concatenate([piece[k] for piece in pieces]) for k in pieces[0]}
    t, rewards = rows["t"], rows["rewards"]
    shift, running = rows["eps_star"], running.copy()
    base = _base(rows, view, aim, process)
    weight = _weight(rows, base, view, aim, process, running)
    towards, total = fold(shift, weight)
    x_w = rows["centre"] + towards
    factor = timestep_factor(view.timestep_weight, process, t)
    dtype, mean_ref = x_w.dtype, rows["mean_ref"]
    columns = {"mean_ref": mean_ref}
    if view.anchor:
        around, level = (0.0, np.ones(len(t))) if base is None else fold(shift, np.exp(base))
        pull = _times(total, x_w - mean_ref) - _times(level, rows["centre"] + around - mean_ref)
        columns |= {"weight": factor * (total - level + 1), "shift": _times(factor, pull), "factor": factor}
    else:
        columns |= {"weight": factor * total, "factor": factor}
    columns = {k: v[None].astype(dtype) for k, v in columns.items()}
    context = {k.removeprefix("context/"): v for k, v in rows.items() if k.startswith("context/")}
    chains = Chains(np.stack([x_w, rows["x_t"]]), t[None], context, columns)
    dead = ~np.isfinite(rewards).any(axis=1)
    asked = Counter(t.tolist())
    silent = sorted({n for n in asked if asked[n] * rewards.shape[1] >= MIN_ASKED} - set(t[~dead].tolist()))
    single = aim.late(t)[:, None] & (np.arange(weight.shape[1]) > 0)  # candidates of one reward say one thing
    worth = np.where(aim.late(t)[:, None], weight.mean(axis=1, keepdims=True), weight)
    effective = effective_size(np.where(single, 0.0, worth), bin_of(t, process.num_steps))
    parts = {k.removeprefix(PART): v for k, v in rows.items() if k.startswith(PART)}
    return Reading(chains, weight, rewards, parts, effective, silent, running)


def timestep_factor(weight: TimestepWeight, process: Process, t: np.ndarray) -> np.ndarray:
    """What a row's 1/(2 sigma_t^2) is multiplied with."""
    if weight == "vlb":
        return np.ones(len(t))
    return process.even_in("eps" if weight == "simple" else weight).numpy()[t]


def _base(rows: dict[str, np.ndarray], view: View, aim: Aim, process: Process) -> np.ndarray | None:
    """log base weights at this radius; ``None`` for candidates whose density is unknown."""
    if aim.sampler != "importance":
        return None
    if aim.radii == (view.radius,):
        return np.zeros(rows["rewards"].shape)  # one shell: the ball itself
    flat = rows["eps_star"].reshape(*rows["rewards"].shape, -1)
    lengths = np.sqrt(np.einsum("rkd,rkd->rk", flat, flat))
    unit = unit_length(aim, process, rows["t"], rows["dim"])
    edges = relative(aim.radii, aim.radius_unit)
    d = float(relative([view.radius], aim.radius_unit)[0])
    reach = lengths / np.maximum(unit, 1e-300)[:, None]
    return base_log_weight(reach, shell_of(aim.num_candidates, len(aim.radii)), edges, d, rows["dim"])


def unit_length(aim: Aim, process: Process, t: np.ndarray, dim: np.ndarray) -> np.ndarray:
    """The length that 1 of ``relative`` stands for, row by row."""
    sigma = process.sigma.numpy()[t].astype(np.float64)
    if aim.radius_unit == "absolute":
        return np.ones(len(t))
    return sigma * (np.sqrt(dim) if aim.radius_unit == "sigma" else np.sqrt(2 / process.num_steps))


def _weight(
    rows: dict[str, np.ndarray],
    base: np.ndarray | None,
    view: View,
    aim: Aim,
    process: Process,
    running: Running,
) -> np.ndarray:
    """Of candidates, by their rewards; where those are draws already, of pairs, by what their search began with."""
    told = (view.temperature, view.normalise)
    if base is not None:
        return candidate_weight(rows["rewards"], rows["t"], *told, base, running, process.num_steps)
    alive = np.isfinite(rows["rewards"]).astype(np.float64)
    if "start" not in rows or view.normalise == "candidates":
        return alive
    by_pair = candidate_weight(rows["start"], rows["t"], *told, 0.0, running, process.num_steps)
    return alive * by_pair.mean(axis=1, keepdims=True)


def _times(scale: np.ndarray, arrays: np.ndarray) -> np.ndarray:
    return scale.reshape(-1, *[1] * (arrays.ndim - 1)) * arrays
