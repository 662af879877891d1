"""What was attainable, and how much of it was attained. numpy only; arrays in, numbers with an interval out.

    J* = E_c [alpha log E_pre(.|c) exp(r/alpha)]        attained = (J_alpha(p) - E_pre[r]) / (J* - E_pre[r])
    F(KL) = min_alpha [J*_alpha + alpha KL]             frontier share = (E_p[r] - E_pre[r]) / (F(KL_p) - E_pre[r])

F is the sweep of E_{p*}[r] against KL(p*||p_pre), read off its tangents: E_p[r] - alpha KL <= J*_alpha for every p and
alpha, with equality at p*. Too few alphas only raise F, and past the last trusted alpha F is a tangent: a share read
there is a bound. c is a sample's group (atom count, class), which no policy can change; its law is taken as given.
A reward that is not finite has failed: it leaves every number, its KL with it, and is counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

Array = np.ndarray

MIN_SAMPLE_SIZE = 100  # effective: J* - E_pre[r] is about 1% low there
MIN_GROUP_SIZE = 30  # effective, within a typical group: about 3% low
MIN_CHAINS = 20  # the bootstrap interval of fewer is too narrow
NUM_RESAMPLES = 1000
MAX_LEFT_OUT = 0.1  # of samples whose group the other set lacks
CHUNK = 2**20  # resampled rows held at once


@dataclass(frozen=True)
class Estimate:
    """A value with its bootstrap 95% interval. ``note`` says how to read it, or why it is not there (value NaN)."""

    value: float
    low: float
    high: float
    note: str = ""

    def __str__(self) -> str:
        if math.isnan(self.value):
            return self.note or "undefined"
        width = self.high - self.low
        digits = min(max(1 - math.floor(math.log10(width)), 0), 6) if 0 < width < math.inf else 3
        text = f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"
        return f"{text} ({self.note})" if self.note else text


@dataclass(frozen=True)
class Tilted:
    """p* ~ exp(r/alpha) p_pre within each group, as the pretrained samples see it.

    ``effective_sample_size`` is (sum w)^2 / sum w^2 with w of mean 1 in every group: it sets the error of J*.
    ``group_size`` is the harmonic mean, over samples, of their own group's: J* - E_pre[r] is low by about 1/group_size.
    """

    optimum: float
    reward: float
    kl: float
    effective_sample_size: float
    group_size: float

    @property
    def doubt(self) -> str | None:
        """Why J* is not to be trusted here."""
        size, floor, where = self.effective_sample_size, MIN_SAMPLE_SIZE, ""
        if size >= floor:
            size, floor, where = self.group_size, MIN_GROUP_SIZE, "within a typical group "
        text = f"the effective sample size of exp(r/alpha) {where}is {size:.0f} and at least {floor} is needed"
        return f"{text}: draw more pretrained samples, or raise alpha" if size < floor else None


@dataclass(frozen=True)
class Attained:
    """How near a policy is to the best that alpha allows. ``share`` is None exactly where ``refused`` says why."""

    share: Estimate | None
    objective: Estimate
    optimum: Estimate
    baseline: Estimate
    alpha: float
    effective_sample_size: float
    num_failed: int
    refused: str | None

    @property
    def note(self) -> str:
        """What to print beside the share: the error that no number here can show."""
        failed = f" {self.num_failed} rewards failed and are left out of every number." if self.num_failed else ""
        return (
            "Neither the effective sample size nor the interval sees high rewards that the pretrained samples never "
            "drew. Such a tail makes J* too low and the share too high: with r/alpha normal and 5,000 samples, J* is "
            "low by 0.03 alpha at sd 2, and by more than 0.5 alpha at sd 3 in the few runs that find 100 effective "
            f"samples.{failed}"
        )


@dataclass(frozen=True)
class Frontier:
    """The most reward for a given KL: points of p*, KL rising and alpha falling; none where nothing can be trusted.

    Up to ``trusted_kl`` the pretrained samples can vouch for it; infinity where the reward's maximum was reached.
    """

    alpha: Array
    kl: Array
    reward: Array
    effective_sample_size: Array
    baseline: float
    trusted_kl: float

    def reward_at(self, kl: float) -> float:
        """F(kl): the lowest tangent. Beyond ``trusted_kl`` that is the last one, which lies above the true frontier."""
        return float(np.min(self.reward + self.alpha * (max(kl, 0.0) - self.kl))) if len(self.kl) else math.nan


def optimum(rewards: ArrayLike, alpha: float, groups: ArrayLike | None = None) -> float:
    """J*: one log-mean-exp per group, averaged by group frequency."""
    return tilted(rewards, alpha, groups).optimum


def effective_sample_size(rewards: ArrayLike, alpha: float, groups: ArrayLike | None = None) -> float:
    """(sum w)^2 / sum w^2, w = exp(r/alpha) scaled to mean 1 within each group (see ``Tilted``)."""
    return tilted(rewards, alpha, groups).effective_sample_size


def tilted(rewards: ArrayLike, alpha: float, groups: ArrayLike | None = None) -> Tilted:
    """J*, E_{p*}[r], KL(p*||p_pre) = (E_{p*}[r] - J*)/alpha and the effective sample sizes, at one alpha."""
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha is {alpha}; a tilt exp(r/alpha) needs a finite alpha > 0")
    columns, groups, _ = _scored(rewards, groups)
    r = columns[:, 0]
    if not len(r):
        raise ValueError("there is no finite reward; give at least one pretrained sample that was scored")
    _, index, count = np.unique(groups, return_inverse=True, return_counts=True)
    top = np.full(len(count), -np.inf)
    np.maximum.at(top, index, r)

    def mean(values: Array) -> Array:
        return np.bincount(index, values, len(count)) / count

    shifted = r - top[index]
    excess = np.expm1(shifted / alpha)  # expm1 and log1p: exact for large alpha too, where J* - E_pre[r] is small
    gain, weight = alpha * np.log1p(mean(excess)), 1 + mean(excess)
    climb = mean((1 + excess) * shifted) / weight
    spread = mean((1 + excess) ** 2) / weight**2  # n / effective sample size
    return Tilted(
        optimum=float(count @ (top + gain) / len(r)),
        reward=float(count @ (top + climb) / len(r)),
        kl=max(float(count @ (climb - gain) / len(r) / alpha), 0.0),
        effective_sample_size=float(len(r) ** 2 / (count @ spread)),
        group_size=float(len(r) / spread.sum()),
    )


def objective(rewards: ArrayLike, kl: ArrayLike, alpha: float, seed: int = 0) -> Estimate:
    """J_alpha = E_p[r] - alpha E_p[KL], over chains: ``rewards[i]`` and ``kl[i]`` belong together."""
    columns, _, _ = _scored(rewards, None, kl)
    if not len(columns):
        return _undefined("no chain has a finite reward")
    rows = bootstrap(columns, np.random.default_rng(seed))
    return _estimate(rows[:, 0] - alpha * rows[:, 1])


def bootstrap(columns: Array, rng: np.random.Generator, num_resamples: int = NUM_RESAMPLES) -> Array:
    """Means of the columns over resampled rows [num_resamples + 1, column]; row 0 holds the sample's own means."""
    n = len(columns)
    rows = [columns.mean(0, keepdims=True)]
    for start in range(0, num_resamples, step := max(1, CHUNK // n)):
        offset = n * np.arange(min(step, num_resamples - start))[:, None]
        drawn = rng.integers(n, size=(len(offset), n)) + offset
        counts = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
        rows.append(counts.astype(columns.dtype) @ columns / n)
    return np.concatenate(rows)


def attained(
    rewards_pre: ArrayLike,
    rewards: ArrayLike,
    kl: ArrayLike,
    alpha: float,
    groups_pre: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    seed: int = 0,
) -> Attained:
    """(J_alpha(p) - E_pre[r]) / (J* - E_pre[r]), refused with a sentence where it would mislead.

    Both sample sets must come from the same chain (respacing, sigma) with eta = 1 and the same reward. Groups are
    weighted by their frequency among the pretrained samples in all three terms, so that chance in c cancels.
    """
    paired = _paired(rewards_pre, rewards, kl, groups_pre, groups)
    nothing = _undefined(paired.refused or "alpha is not positive")
    if paired.refused:
        return Attained(None, nothing, nothing, nothing, alpha, 0.0, paired.num_failed, paired.refused)
    rng = np.random.default_rng(seed)
    tilts = 0 < alpha < math.inf
    best, base = _pretrained_rows(paired, np.array([alpha] if tilts else []), rng)
    reached = _policy_rows(paired, rng) @ [1.0, -alpha]
    baseline, goal = _estimate(base), _estimate(reached)
    if not tilts:
        why = f"alpha is {alpha}; a share needs a finite alpha > 0: set one, or read the frontier share"
        return Attained(None, goal, nothing, baseline, alpha, 0.0, paired.num_failed, why)
    gap = best[:, 0] - base
    tilt = tilted(paired.pre, alpha, paired.groups_pre)
    refused = tilt.doubt or _too_small("J* - E_pre[r]", gap[0], baseline, "lower alpha, or draw more samples")
    share = None if refused else _estimate((reached - base) / gap)
    size = tilt.effective_sample_size
    best_known = _estimate(best[:, 0], tilt.doubt or "")
    return Attained(share, goal, best_known, baseline, alpha, size, paired.num_failed, refused)


def frontier(rewards_pre: ArrayLike, groups: ArrayLike | None = None) -> Frontier:
    """Sweeps alpha from 10^4 down to 10^-5 of the reward's spread within groups, 40 a decade, while J* is trusted."""
    columns, groups, _ = _scored(rewards_pre, groups)
    r, points, doubt = columns[:, 0], [], None
    enough = len(r) >= MIN_SAMPLE_SIZE
    scale = float(np.concatenate([part - part.mean() for part in _split(r, groups)]).std()) if enough else 0.0
    for alpha in scale * np.logspace(4, -5, 361) if scale > 1e-12 * np.abs(r).max(initial=0.0) else ():
        tilt = tilted(r, float(alpha), groups)
        if doubt := tilt.doubt:
            break
        points.append((alpha, tilt.kl, tilt.reward, tilt.effective_sample_size))
    alphas, kl, reward, size = np.array(points, dtype=np.float64).reshape(-1, 4).T
    trusted_kl = 0.0 if not points else float(kl[-1]) if doubt else math.inf
    return Frontier(alphas, kl, reward, size, float(r.mean()) if len(r) else math.nan, trusted_kl)


def frontier_share(
    rewards_pre: ArrayLike,
    rewards: ArrayLike,
    kl: ArrayLike,
    groups_pre: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    seed: int = 0,
) -> Estimate:
    """(E_p[r] - E_pre[r]) / (F(KL_p) - E_pre[r]): for policies trained without an alpha. NaN, with a note, if refused.

    Where KL_p exceeds the frontier's ``trusted_kl`` the note calls the share a bound.
    """
    paired = _paired(rewards_pre, rewards, kl, groups_pre, groups)
    if paired.refused:
        return _undefined(paired.refused)
    curve, rng = frontier(paired.pre, paired.groups_pre), np.random.default_rng(seed)
    if not len(curve.kl):
        n = len(paired.pre)
        return _undefined(f"no frontier: the {n} pretrained rewards are too few (draw more) or constant in each group")
    reached = _policy_rows(paired, rng)
    spent = np.maximum(reached[:, 1], 0.0)
    nearest = int(np.argmin(curve.reward + curve.alpha * (spent[0] - curve.kl)))
    alphas = curve.alpha[max(nearest - 20, 0) : nearest + 21]
    best, base = _pretrained_rows(paired, alphas, rng)
    gap = np.min(best + alphas * spent[:, None], axis=1) - base
    remedy = "the policy has hardly moved; train longer, or draw more samples"
    if small := _too_small("F(KL) - E_pre[r]", gap[0], _estimate(base), remedy):
        return _undefined(small)
    share = (reached[:, 0] - base) / gap
    side = "at least" if share[0] > 0 else "at most"
    far = f"{side}: its KL of {spent[0]:.3g} is past {curve.trusted_kl:.3g}, the last the pretrained samples vouch for"
    return _estimate(share, far if spent[0] > curve.trusted_kl else "")


def diversity(x_0: ArrayLike, seed: int = 0, max_pairs: int = 4096) -> float:
    """Mean Euclidean distance over pairs of flattened events: all pairs, or ``max_pairs`` random ones.

    0 for fewer than two events: what is not there does not differ. Events that are not finite are left out.
    """
    events = np.asarray(x_0)
    events = events.reshape(len(events), math.prod(events.shape[1:]))
    events = events[np.isfinite(events).all(1)]
    n = len(events)
    if n < 2:
        return 0.0
    if n * (n - 1) // 2 <= max_pairs:
        first, second = np.triu_indices(n, 1)
    else:
        rng = np.random.default_rng(seed)
        first = rng.integers(n, size=max_pairs)
        second = (first + rng.integers(1, n, size=max_pairs)) % n
    return float(np.mean([np.linalg.norm(events[i] - events[j]) for i, j in zip(first, second, strict=True)]))


def undecodable_share(undecodable: ArrayLike) -> Estimate:
    """The share of samples that decode to nothing (True in the mask), with Wilson's 95% interval."""
    mask = np.asarray(undecodable, dtype=bool).ravel()
    if not (n := mask.size):
        return _undefined("there are no samples")
    p, z2 = float(mask.mean()), 1.959964**2
    centre, half = p + z2 / (2 * n), math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n)))
    low, high = (centre - half) / (1 + z2 / n), (centre + half) / (1 + z2 / n)
    return Estimate(p, min(p, max(low, 0.0)), max(p, min(high, 1.0)))


@dataclass(frozen=True)
class _Paired:
    """Scored samples of the groups both sets hold; per group ``parts`` has (pretrained frequency, r_pre, [r, kl])."""

    pre: Array
    groups_pre: Array
    parts: list[tuple[float, Array, Array]]
    num_failed: int
    refused: str | None


def _paired(
    rewards_pre: ArrayLike, rewards: ArrayLike, kl: ArrayLike, groups_pre: ArrayLike | None, groups: ArrayLike | None
) -> _Paired:
    if (groups_pre is None) != (groups is None):
        raise ValueError("groups were given for one of the two sample sets; give groups_pre and groups, or neither")
    pre, c_pre, failed_pre = _scored(rewards_pre, groups_pre)
    new, c_new, failed_new = _scored(rewards, groups, kl)
    common_pre, common_new = np.isin(c_pre, c_new), np.isin(c_new, c_pre)
    sets = ("pretrained", failed_pre, len(pre), 1), ("fine-tuned", failed_new, len(new), MIN_CHAINS)
    reasons = [
        f"{failed} of {failed + kept} {name} rewards failed and at most half may: mend the reward first"
        for name, failed, kept, _ in sets
        if failed > kept
    ]
    reasons += [
        f"{kept} {name} samples were scored and at least {floor} are needed: draw more"
        for name, _, kept, floor in sets
        if kept < floor
    ]
    if wild := int((~np.isfinite(new[:, 1])).sum()):
        reasons.append(
            f"the KL of {wild} of {len(new)} chains is not finite: the policy diverged, go back a checkpoint"
        )
    out = max(1 - common.sum() / max(len(common), 1) for common in (common_pre, common_new))
    if out > MAX_LEFT_OUT:
        reasons.append(f"{out:.0%} of samples are in groups the other set lacks: draw both from the same contexts")
    pre, c_pre, new, c_new = pre[common_pre, 0], c_pre[common_pre], new[common_new], c_new[common_new]
    pairs = zip(_split(pre, c_pre), _split(new, c_new), strict=True)
    parts = [(len(a) / len(pre), a, b) for a, b in pairs if len(a)]
    return _Paired(pre, c_pre, parts, failed_pre + failed_new, next(iter(reasons), None))


def _scored(rewards: ArrayLike, groups: ArrayLike | None, kl: ArrayLike | None = None) -> tuple[Array, Array, int]:
    """Columns [r, kl] and groups of the samples with a finite reward, and how many had none."""
    r = np.asarray(rewards, dtype=np.float64)
    k = np.zeros_like(r) if kl is None else np.asarray(kl, dtype=np.float64)
    c = np.zeros(r.shape, dtype=np.int64) if groups is None else np.asarray(groups)
    if r.ndim != 1 or k.shape != r.shape or c.shape != r.shape:
        raise ValueError(f"rewards, kl and groups hold one number per sample; got {r.shape}, {k.shape}, {c.shape}")
    kept = np.isfinite(r)
    return np.stack([r, k], axis=1)[kept], c[kept], int((~kept).sum())


def _split(values: Array, groups: Array) -> list[Array]:
    counts = np.unique(groups, return_counts=True)[1]
    return np.split(values[np.argsort(groups, kind="stable")], np.cumsum(counts)[:-1])


def _pretrained_rows(paired: _Paired, alphas: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """J* [row, alpha] and E_pre[r] [row], resampled within groups; row 0 is the estimate."""
    best, base = np.zeros((NUM_RESAMPLES + 1, len(alphas))), np.zeros(NUM_RESAMPLES + 1)
    for frequency, r, _ in paired.parts:
        shifted = (r - r.max())[:, None]
        rows = bootstrap(np.concatenate([shifted, np.expm1(shifted / alphas)], axis=1), rng)
        with np.errstate(divide="ignore"):  # a resample without the best sample may underflow: J* >= E[r] holds still
            gain = np.maximum(alphas * np.log1p(np.maximum(rows[:, 1:], -1.0)), rows[:, :1])
        best += frequency * (r.max() + gain)
        base += frequency * (r.max() + rows[:, 0])
    return best, base


def _policy_rows(paired: _Paired, rng: np.random.Generator) -> Array:
    """E_p[r] and the KL [row, 2], resampled within groups that weigh as they do among the pretrained samples."""
    return sum((f * bootstrap(columns, rng) for f, _, columns in paired.parts), np.zeros((NUM_RESAMPLES + 1, 2)))


def _too_small(name: str, gap: float, baseline: Estimate, remedy: str) -> str | None:
    """Jensen makes the gap positive in every resample, so it is held against the error of E_pre[r] instead."""
    if gap <= 1e-12 * abs(baseline.value):
        return f"{name} is 0: the reward is constant within each group, and no policy can change it"
    error = max(baseline.high - baseline.value, baseline.value - baseline.low)
    return f"{name} = {gap:.2g} is within the error {error:.2g} of E_pre[r]: {remedy}" if gap <= error else None


def _estimate(rows: Array, note: str = "") -> Estimate:
    low, high = np.percentile(rows[1:], [2.5, 97.5])
    return Estimate(float(rows[0]), float(low), float(high), note)


def _undefined(why: str) -> Estimate:
    return Estimate(math.nan, math.nan, math.nan, why)
