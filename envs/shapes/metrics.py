"""How good a set of generated clouds S is beside a set of references R, in the numbers that papers report.

MMD = mean_r min_s d(s, r),    COV = |{argmin_r d(s, r) : s}| / |R|,    JSD = H((p + q) / 2) - (H(p) + H(q)) / 2

d is Chamfer's or the earth mover's distance; p and q are the shares of all points at each node of a grid, and H is in
bits. ``compare`` scales every cloud to the box [-1, 1]^3 first, as R Sec. 5.1 does; the other functions take clouds as
they are. MMD and COV depend on how many samples there are, so ``compare`` draws subsets as large as R.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from envs.shapes.distances import Bar, Clouds, clouds, pairwise_chamfer, pairwise_emd

RESOLUTION = 28  # nodes along an edge of the grid
MEASURES = {"chamfer": ("CD", pairwise_chamfer), "emd": ("EMD", pairwise_emd)}
NUM_COMPARED, NUM_POINTS = 64, 512  # of a set, and of each of its clouds, for ``numbers``: 2,016 pairs, half a second
NEIGHBOUR, STRAY = 4, 3.0  # a stray point is so many times as far from its fourth neighbour as is usual in its cloud


@dataclass(frozen=True)
class Entry:
    """A number: its mean over the draws, and between what 95 % of them lie."""

    name: str
    value: float
    low: float
    high: float
    better: str  # "higher", "lower", "0.5"
    draws: tuple[float, ...] = ()  # each of them


@dataclass(frozen=True)
class Comparison:
    """All numbers of a set beside a reference set."""

    num_samples: int
    num_references: int
    num_draws: int
    entries: tuple[Entry, ...]

    def __getitem__(self, name: str) -> Entry:
        return {entry.name: entry for entry in self.entries}[name]

    def __str__(self) -> str:
        head = f"{self.num_samples:,} samples, {self.num_references:,} references, {self.num_draws} draws"
        lines = (f"{e.name:<22}{e.value:>9.4f}   {e.low:.4f} .. {e.high:.4f}   {e.better}" for e in self.entries)
        return "\n".join([head, *lines])


def compare(
    samples: Clouds,
    references: Clouds,
    measures: Sequence[str] = ("chamfer", "emd"),
    one_nn: Collection[str] = ("chamfer",),
    num_draws: int = 20,
    seed: int = 0,
    num_workers: int | None = None,
    bar: Bar | None = None,
) -> Comparison:
    """Every number, on ``num_draws`` random subsets of the samples, each as large as the reference set.

    A pair that several draws have is measured once. The interval is of the drawing alone: other references would move
    the numbers too. With as many samples as references there is one draw. ``one_nn`` by the earth mover's distance
    needs it between samples too, which may be most of the work; ``bar`` is told of each measure's pairs.
    """
    if not measures or not {*measures, *one_nn} <= set(MEASURES) or not set(one_nn) <= set(measures):
        raise ValueError(f"measures are {measures} and one_nn {one_nn}; choose {' and '.join(MEASURES)}, and of them")
    made, real = (boxed(clouds(some, name)) for some, name in ((samples, "sample"), (references, "reference")))
    draws = _draws(len(made), len(real), num_draws, seed)
    told: dict[str, tuple[str, list[float]]] = {}
    for name in measures:
        short, pairwise = MEASURES[name]
        needed = np.zeros((len(made), len(real)), bool)
        needed[np.unique(draws)] = True
        sr = pairwise(made, real, num_workers, bar, needed)
        both = [mmd_cov(sr[draw]) for draw in draws]
        told[f"MMD, {short}"], told[f"COV, {short}"] = ("lower", [m for m, _ in both]), ("higher", [c for _, c in both])
        if name in one_nn:
            ss = pairwise(made, made, num_workers, bar, _together(draws, len(made)))
            rr = pairwise(real, real, num_workers, bar)
            told[f"1-NN, {short}"] = "0.5", [one_nn_accuracy(ss[np.ix_(d, d)], sr[d], rr) for d in draws]
    for name, half in (("JSD", 1.0), ("JSD, inner grid", 0.5)):
        of_made, of_real = _nodes(made, RESOLUTION, half), _nodes(real, RESOLUTION, half)
        told[name] = "lower", [_divergence(of_made[draw], of_real) for draw in draws]
    entries = tuple(_entry(name, better, values) for name, (better, values) in told.items())
    return Comparison(len(made), len(real), len(draws), entries)


def boxed(given: Clouds) -> np.ndarray:
    """Each cloud moved and scaled as a whole: the centre of its bounding box is 0, its longest half-edge 1."""
    found = clouds(given)
    low, high = found.min(1, keepdims=True), found.max(1, keepdims=True)
    half = (high - low).max(2, keepdims=True) / 2
    return (found - (low + high) / 2) / np.where(half > 0, half, 1.0)


def mmd_cov(sr: np.ndarray) -> tuple[float, float]:
    """Of distances [sample, reference]: how near the nearest sample is, and the share of references that are a sample's
    nearest."""
    _measured(sr=sr)
    return float(sr.min(0).mean()), len(np.unique(sr.argmin(1))) / sr.shape[1]


def one_nn_accuracy(ss: np.ndarray, sr: np.ndarray, rr: np.ndarray) -> float:
    """The share of all clouds whose nearest other is of their own set: 0.5 where the sets are alike, 1 where apart.

    Below 0.5, samples lie nearer to references than sets of one kind would: they are copies.
    """
    _measured(ss=ss, sr=sr, rr=rr)
    if ss.shape != (len(sr), len(sr)) or rr.shape != (sr.shape[1], sr.shape[1]):
        raise ValueError(f"distances {ss.shape}, {sr.shape}, {rr.shape}; give [S, S], [S, R] and [R, R]")
    every = np.block([[ss, sr], [sr.T, rr]])
    np.fill_diagonal(every, np.inf)
    own = np.arange(len(every)) < len(ss)
    return float((own[every.argmin(1)] == own).mean())


def jsd(samples: Clouds, references: Clouds, resolution: int = RESOLUTION, half: float = 1.0) -> float:
    """Between where the points of all samples and of all references lie: 0 alike, 1 nowhere together.

    The grid has ``resolution`` nodes along each edge of [-half, half]^3, of which those in the ball of radius ``half``
    count, and a point is at its nearest. Public code takes ``half`` = 0.5 also for clouds in [-1, 1]^3: what lies
    farther out then falls on the ball's surface.
    """
    if resolution < 3 or not half > 0:
        raise ValueError(f"resolution is {resolution} and half {half}; take at least 3 nodes and a length above 0")
    both = (clouds(some, name) for some, name in ((samples, "sample"), (references, "reference")))
    return _divergence(*(_nodes(some, resolution, half) for some in both))


# -- beside every evaluation


def numbers(samples: Sequence[Any]) -> dict[str, float]:
    """A few numbers of a set without references, for ``Domain.metrics``; None among the samples is passed over.

    diversity: mean Chamfer's distance between different samples, in the box. flatness: the bounding box's shortest edge
    over its longest. stray points: the share that lies alone, as noise does.
    """
    found = [sample for sample in samples if sample is not None]
    rng = np.random.default_rng(0)
    kept = [found[i] for i in np.sort(rng.permutation(len(found))[:NUM_COMPARED])]
    names = "diversity", "flatness", "stray points"
    if not found:
        return dict.fromkeys(names, math.nan)
    some = boxed(kept)
    some = some[:, np.sort(rng.permutation(some.shape[1])[:NUM_POINTS])]
    edges = np.sort(np.ptp(clouds(found), axis=1), axis=1)
    flatness = float((edges[:, 0] / np.where(edges[:, 2] > 0, edges[:, 2], 1.0)).mean())
    pairs = np.triu_indices(len(some), 1)
    diversity = float(pairwise_chamfer(some, some, 1)[pairs].mean()) if len(some) > 1 else math.nan
    return dict(zip(names, (diversity, flatness, stray(some)), strict=True))


def stray(given: np.ndarray) -> float:
    """The share of points STRAY times as far from their fourth neighbour as the median point of their cloud."""
    from scipy.spatial import KDTree

    if given.shape[1] <= NEIGHBOUR:
        return math.nan
    far = np.stack([np.asarray(KDTree(cloud).query(cloud, NEIGHBOUR + 1)[0])[:, -1] for cloud in given])
    return float((far > STRAY * np.median(far, axis=1, keepdims=True)).mean())


# -- small things


def _draws(num_samples: int, num_references: int, num_draws: int, seed: int) -> np.ndarray:
    """Rows of the samples [draw, reference]."""
    if num_samples < num_references:
        told = f"{num_samples} samples and {num_references} references"
        raise ValueError(f"{told}; draw at least as many samples, or leave references out")
    if num_draws < 1:
        raise ValueError(f"num_draws is {num_draws}; draw at least once")
    rng, several = np.random.default_rng(seed), num_draws if num_samples > num_references else 1
    return np.stack([np.sort(rng.permutation(num_samples)[:num_references]) for _ in range(several)])


def _together(draws: np.ndarray, num_samples: int) -> np.ndarray:
    """Which samples are in one draw [sample, sample]."""
    found = np.zeros((num_samples, num_samples), bool)
    for draw in draws:
        found[np.ix_(draw, draw)] = True
    return found


def _measured(**told: np.ndarray) -> None:
    for name, matrix in told.items():
        if matrix.ndim != 2 or not matrix.size:
            raise ValueError(f"{name} has shape {matrix.shape}; give distances between at least one and one cloud")
        if np.isnan(matrix).any():
            raise ValueError(f"{name} has distances that are NaN; measure every pair, and leave broken clouds out")


def _entry(name: str, better: str, values: Sequence[float]) -> Entry:
    low, high = np.percentile(values, [2.5, 97.5])
    return Entry(name, float(np.mean(values)), float(low), float(high), better, tuple(map(float, values)))


def _nodes(given: np.ndarray, resolution: int, half: float) -> np.ndarray:
    """The node at which each point is [cloud, n]."""
    tree, number = _grid(resolution)
    scaled = given / half
    cell = np.rint((np.clip(scaled, -1, 1) + 1) / 2 * (resolution - 1)).astype(int)
    found = number[tuple(np.moveaxis(cell, -1, 0))]
    outside = (found < 0) | (np.abs(scaled) > 1).any(-1)
    found[outside] = tree.query(scaled[outside])[1]
    return found


@cache
def _grid(resolution: int) -> tuple[Any, np.ndarray]:
    """The nodes in the unit ball, and their numbers [x, y, z], -1 where there is none."""
    from scipy.spatial import KDTree

    edge = np.linspace(-1, 1, resolution)
    places = np.stack(np.meshgrid(edge, edge, edge, indexing="ij"), -1)
    inside = np.square(places).sum(-1) <= 1
    number = np.full(inside.shape, -1)
    number[inside] = np.arange(inside.sum())
    return KDTree(places[inside]), number


def _divergence(nodes: np.ndarray, others: np.ndarray) -> float:
    size = max(nodes.max(), others.max()) + 1
    p, q = (np.bincount(some.ravel(), minlength=size) / some.size for some in (nodes, others))
    return max(0.0, _entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2)


def _entropy(shares: np.ndarray) -> float:
    found = shares[shares > 0]
    return float(-(found * np.log2(found)).sum())
