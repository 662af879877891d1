"""A run folder as numbers: what it holds, what it lacks, and what its figures show.

Nothing here needs a model or a reward, and nothing raises: what is missing or damaged becomes a sentence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from rayft import evaluate
from rayft.evaluate import Estimate
from rayft.table import Table
from rayft.verdict import Samples, Verdict, judge

CURVES = {  # title: unit, column of training, column of the evaluations
    "reward": ("", "reward_mean", "evaluate/reward"),
    "KL": ("nats", "kl", "evaluate/kl"),
    "attained share": ("", "", "evaluate/attained"),
    "frontier share": ("", "", "evaluate/frontier_share"),
    "loss": ("", "learner/total_loss", ""),
    "KL of one update": ("nats", "learner/update_kl", ""),
    "diversity": ("", "", "evaluate/diversity"),
}
NUM_BINS = 60
NUM_BATCHES, STUDENT = 10, 2.26  # for the interval of the diversity: batches, and t's 97.5% quantile at 9
CLEAR = 2.0  # standard errors of the change by which a mean must have moved to be spoken of


@dataclass
class Found:
    """What a run folder holds, and what it lacks."""

    path: Path
    alpha: float | None
    missing: list[str] = field(default_factory=list)
    run: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, float]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    meter: dict[str, Any] = field(default_factory=dict)  # what rewards cost, as rewards.json has it
    pretrained: Samples | None = None
    policy: Samples | None = None  # as last evaluated
    reached: dict[int, tuple[float, float]] = field(default_factory=dict)  # iteration: (KL, reward)
    verdict: Verdict | None = None
    tilt: evaluate.Tilted | None = None  # p*, where it can be trusted

    def attempt(self, what: str, make: Callable[[], Any], otherwise: Any) -> Any:
        """``make()``, or ``otherwise`` and a sentence on the page."""
        try:
            return make()
        except FileNotFoundError:
            self.missing.append(f"{what} is not there.")
        except Exception as error:
            self.missing.append(f"{what} could not be used ({type(error).__name__}: {str(error)[:200]}).")
        return otherwise


def read(run: Path, alpha: float | None) -> Found:
    """Everything a report needs, as far as it is there."""
    found = Found(run, alpha)

    def checked(told: Any) -> dict[str, Any]:
        if not isinstance(told, dict):
            raise ValueError(f"{type(told).__name__} where a mapping should be")
        return told

    def text(name: str) -> str:
        return (run / name).read_text("utf-8", errors="replace")

    def meter() -> dict[str, Any]:
        return checked(json.loads(text("rewards.json"))) if (run / "rewards.json").is_file() else {}

    def events() -> list[dict[str, Any]]:
        if not (run / "events.jsonl").is_file():  # there only once a guard has spoken
            return []
        *whole, _ = text("events.jsonl").split("\n")
        return [checked(json.loads(line)) for line in whole]

    found.run = found.attempt("run.json", lambda: checked(json.loads(text("run.json"))), {})
    found.config = found.attempt("config.yaml", lambda: checked(yaml.safe_load(text("config.yaml"))), {})
    found.events = found.attempt("events.jsonl", events, [])
    found.meter = found.attempt("rewards.json", meter, {})
    found.rows = found.attempt("metrics.csv", lambda: Table(run / "metrics.csv").rows, [])
    if not found.rows:
        found.missing.append("There is no iteration in metrics.csv.")
    chain = found.config.get("chain")
    if alpha is not None and isinstance(chain, Mapping) and chain.get("sigma") == "gamma" and chain.get("eta", 1) != 1:
        found.missing.append(f"The attained share is left out: chain.eta is {chain['eta']}, and J* is for eta = 1.")
        found.alpha = None
    found.attempt("A file of evaluations/", lambda: _read_evaluations(found, run / "evaluations"), None)
    return found


def _read_evaluations(found: Found, folder: Path) -> None:
    def at(path: Path) -> tuple[float, float]:
        with np.load(path, allow_pickle=False) as told:  # not Samples.load: the events of every evaluation may be many
            kept = np.isfinite(told["rewards"])
            return float(told["kl"][kept].mean()), float(told["rewards"][kept].mean())

    for path in sorted(folder.glob("iteration_*.npz")):
        if (pair := found.attempt(f"evaluations/{path.name}", lambda path=path: at(path), None)) is not None:
            found.reached[int(path.stem.removeprefix("iteration_"))] = pair
    if not found.reached:
        found.missing.append("There is no evaluation of the policy yet.")
    last = folder / f"iteration_{max(found.reached, default=0):06d}.npz"
    before = found.attempt("evaluations/pretrained.npz", lambda: Samples.load(folder / "pretrained.npz"), None)
    after = found.attempt(f"evaluations/{last.name}", lambda: Samples.load(last), None) if found.reached else None
    found.pretrained, found.policy = before, after
    if before is not None and found.alpha is not None:
        alpha = found.alpha
        tilt = found.attempt("p*", lambda: evaluate.tilted(before.rewards, alpha, before.groups), None)
        found.tilt = None if tilt is None or tilt.doubt else tilt
    if before is not None and after is not None:
        found.verdict = found.attempt("The verdict", lambda: judge(before, after, found.alpha), None)


def frontier(found: Found) -> dict[str, Any] | None:
    """F, how far it is trusted, p* and its tangent, and the evaluations as points under it."""
    if found.verdict is None:
        return None
    curve, tilt, after = found.verdict.frontier, found.tilt, found.verdict.policy
    far = 1.25 * max([kl for kl, _ in found.reached.values()] + ([tilt.kl] if tilt else []) + [0.01])
    kl = (far * np.linspace(0, 1, 200) ** 2).tolist()  # the frontier starts like a square root
    return {
        "kl": kl,
        "reward": [curve.reward_at(x) for x in kl],
        "trusted": min(curve.trusted_kl, far),
        "before": float(np.nanmean(found.verdict.pretrained.rewards)),
        "trail": [[row["kl"], row["reward_mean"]] for row in found.rows if "kl" in row and "reward_mean" in row],
        "path": [[kl, reward, iteration] for iteration, (kl, reward) in found.reached.items()],
        "error": [e.high - e.value for e in (mean(after.kl, after.rewards), mean(after.rewards))],
        "best": tilt and [tilt.kl, tilt.reward, tilt.optimum, found.alpha],
    }


def curves(found: Found) -> list[dict[str, Any]]:
    """Columns of metrics.csv over iterations, with the levels of the pretrained model and of p*."""

    def column(*names: str) -> list[list[float]]:
        return [[row.get(name, math.nan) for name in ("iteration", *names)] for row in found.rows if names[0] in row]

    before: dict[str, float] = {}
    if found.pretrained is not None:
        before = {
            "reward": float(np.nanmean(found.pretrained.rewards)),
            "diversity": evaluate.diversity(found.pretrained.x_0),
        }
    best = {"attained share": 1.0, "frontier share": 1.0}
    if found.tilt is not None:
        best |= {"reward": found.tilt.reward, "KL": found.tilt.kl}
    told = []
    for title, (unit, line, dots) in CURVES.items():
        if title != ("attained share" if found.alpha is None else "frontier share"):
            lines, points = column(line), column(dots, f"{dots}_low", f"{dots}_high")
            marks = {"before": before.get(title), "best": best.get(title)}
            told.append({"title": title, "unit": unit, "line": lines, "dots": points, **marks})
    return told if found.rows else []


# -- rewards beside the optimised one


class Means(NamedTuple):
    """A reward's mean among samples of the pretrained model and of the policy, and how sure the change is."""

    before: float
    after: float
    error: float  # standard error of after - before
    spread: float  # standard deviation among the pretrained samples

    @property
    def num_errors(self) -> float:
        """The change in standard errors; 0 where it is unknown, or no more than rounding."""
        change = self.after - self.before
        if not abs(change) > 1e-9 * max(abs(self.before), abs(self.after)):
            return 0.0
        return math.copysign(math.inf, change) if self.error < 1e-9 * abs(change) else change / self.error


def means(before: np.ndarray, after: np.ndarray) -> Means:
    """Over samples that did not fail; NaN where there are too few."""
    sets = [values[np.isfinite(values)] for values in (before, after)]
    centres = [float(np.mean(kept)) if len(kept) else math.nan for kept in sets]
    errors = [float(np.std(kept, ddof=1)) / math.sqrt(len(kept)) if len(kept) > 1 else math.nan for kept in sets]
    return Means(centres[0], centres[1], math.hypot(*errors), float(np.std(sets[0])) if len(sets[0]) else math.nan)


def beside(found: Found, prefix: str) -> dict[str, Means]:
    """The rewards that were scored beside the optimised one, ``watch/`` or ``part/``, by name."""
    before, after, unknown = found.pretrained, found.policy, np.full(1, np.nan)
    return {
        name.removeprefix(prefix): means(column, unknown if after is None else after.beside.get(name, unknown))
        for name, column in (before.beside.items() if before else ())
        if name.startswith(prefix)
    }


def optimised(found: Found) -> Means:
    """The same of the reward itself."""
    before, after = (np.full(1, np.nan) if one is None else one.rewards for one in (found.pretrained, found.policy))
    return means(before, after)


def against(found: Found) -> dict[str, Means]:
    """The watched rewards that clearly fell while the optimised one clearly rose."""
    rose = optimised(found).num_errors > CLEAR
    return {name: told for name, told in beside(found, "watch/").items() if rose and told.num_errors < -CLEAR}


def together(found: Found, prefix: str) -> dict[str, Any] | None:
    """The optimised reward and those ``beside`` it over the evaluations: changes from the pretrained model's mean, in
    units of the pretrained samples' standard deviation. ``flat`` names those that have no such unit."""
    others = beside(found, prefix)
    if not others or not found.reached:
        return None
    lines, flat = [], []
    for name, told in {None: optimised(found), **others}.items():
        column = "evaluate/reward" if name is None else f"evaluate/{prefix}{name}"
        values = {0.0: told.before}
        values |= {row["iteration"]: row[column] for row in found.rows if column in row and "iteration" in row}
        if found.policy is not None:  # a run that stops is evaluated once more, after its last row
            values[float(max(found.reached))] = told.after
        if told.spread > 1e-9 * abs(told.before):
            rows = [[i, (v - told.before) / told.spread, v] for i, v in sorted(values.items()) if math.isfinite(v)]
            error = 1.96 * told.error / told.spread
            lines.append({"name": name, "rows": rows, "error": error if math.isfinite(error) else 0.0})
        else:
            flat.append(name or "the reward")
    return {"lines": lines, "flat": flat}


def elapsed(found: Found) -> float | None:
    """Seconds of the whole run, the start included where it was not resumed."""
    run, known = found.run, [found.rows[-1].get("time_s", 0.0)] if found.rows else []
    known += [float(run["seconds"])] if "seconds" in run else []
    if "started" in run and "finished" in run:
        known.append((datetime.fromisoformat(run["finished"]) - datetime.fromisoformat(run["started"])).total_seconds())
    return max(known, default=0.0) or None


# -- distributions


def histogram(found: Found) -> dict[str, Any] | None:
    """Shares of samples by reward. The ends hold what lies beyond them, so that outliers do not squeeze the rest.

    Undecodable samples count, and are in no bin: what they score is a constant, which would stand out as a peak.
    """
    sets = {"before": found.pretrained, "run": found.policy}
    told = {name: one for name, one in sets.items() if one is not None}
    drawn = [one.rewards[np.isfinite(one.rewards) & ~one.undecodable] for one in told.values()]
    if found.pretrained is None or not sum(map(len, drawn)):
        return None
    low, high = np.percentile(np.concatenate(drawn), [0.1, 99.9])
    edges = np.linspace(low, high, NUM_BINS + 1) if high > low else np.linspace(low - 0.5, low + 0.5, NUM_BINS + 1)

    def shares(samples: Samples, weights: np.ndarray) -> list[float]:
        scored = np.isfinite(samples.rewards)
        kept = scored & ~samples.undecodable
        counts, _ = np.histogram(samples.rewards[kept].clip(low, high), edges, weights=weights[kept])
        return (counts / weights[scored].sum()).tolist()

    bars = {name: shares(one, np.ones(len(one.rewards))) for name, one in told.items()}
    if found.tilt is not None and found.alpha is not None:
        bars["best"] = shares(found.pretrained, _weights(found.pretrained, found.alpha))
    return {"edges": edges.tolist(), **bars}


def mean(values: np.ndarray, where: np.ndarray | None = None) -> Estimate:
    """With its bootstrap interval; over samples whose reward did not fail."""
    kept = values if where is None else np.where(np.isfinite(where), values, np.nan)
    return evaluate.objective(kept, np.zeros(len(kept)), 0.0)


def spread(x_0: np.ndarray) -> Estimate:
    """Diversity; the interval is from its spread over disjoint batches of samples."""
    value, batches = evaluate.diversity(x_0), np.array_split(x_0, NUM_BATCHES)
    if len(x_0) < 2 * NUM_BATCHES:
        return Estimate(value, value, value)
    half = STUDENT * float(np.std([evaluate.diversity(batch) for batch in batches], ddof=1)) / math.sqrt(NUM_BATCHES)
    return Estimate(value, value - half, value + half)


def _weights(samples: Samples, alpha: float) -> np.ndarray:
    """exp(r/alpha), of mean 1 in each group; 0 where the reward failed."""
    r = np.where(np.isfinite(samples.rewards), samples.rewards, -np.inf)
    weights, groups = np.zeros(len(r)), np.zeros(len(r)) if samples.groups is None else samples.groups
    for group in np.unique(groups[np.isfinite(r)]):
        mine = groups == group
        tilt = np.exp((r[mine] - r[mine].max()) / alpha)
        weights[mine] = tilt * np.isfinite(r[mine]).sum() / tilt.sum()
    return weights


def optimum(samples: Samples, alpha: float) -> np.ndarray:
    """Kept events of the pretrained model, drawn again with the weights of p*."""
    weights = _weights(samples, alpha)[: len(samples.x_0)]
    rng = np.random.default_rng(0)
    return samples.x_0[rng.choice(len(weights), len(weights), p=weights / weights.sum())]
