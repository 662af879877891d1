"""One self-contained HTML page per run, from its files alone: what was reached, at what price, and what to beware of.

This file makes numbers and text, report.html beside it lays them out and draws. What is missing or damaged is said on
the page; nothing here stops a run. All text of a user's passes through ``_safe`` or, in figures, through ``_json``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import yaml

from rayft import evaluate
from rayft.domain import Domain
from rayft.table import Table
from rayft.verdict import Samples, Verdict, judge

CURVES = {  # title: what training logs, what evaluations log
    "reward": ("reward_mean", "evaluate/reward"),
    "KL to the pretrained model, nats": ("kl", "evaluate/kl"),
    "attained": ("", "evaluate/attained"),
    "frontier share": ("", "evaluate/frontier_share"),
    "loss": ("learner/total_loss", ""),
    "KL of one update, nats": ("learner/update_kl", ""),
    "diversity": ("", "evaluate/diversity"),
}
NUM_BINS = 60
NUM_BATCHES = 20  # for the interval of the diversity


@dataclass
class Found:
    """What a run folder holds, what it lacks, and what is made of it."""

    path: Path
    alpha: float | None
    missing: list[str] = field(default_factory=list)
    run: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, float]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    pretrained: Samples | None = None
    policies: dict[int, Samples] = field(default_factory=dict)
    verdict: Verdict | None = None
    tilt: evaluate.Tilted | None = None

    def attempt(self, what: str, make: Callable[[], Any], otherwise: Any) -> Any:
        """``make()``, or ``otherwise`` and a sentence on the page."""
        try:
            return make()
        except FileNotFoundError:
            self.missing.append(f"{what} is not there.")
        except Exception as error:
            self.missing.append(f"{what} could not be used ({type(error).__name__}: {str(error)[:200]}).")
        return otherwise


def write(run: Path, domain: Domain | None, alpha: float | None) -> Path:
    """Writes ``run/report.html`` and returns its path. ``domain`` draws the samples, ``alpha`` prices J and J*."""
    from plotly.offline import get_plotlyjs

    found = read(run, alpha)
    drawn = {"frontier": _frontier, "curves": _curves, "histogram": _histogram}
    data = {
        name: found.attempt(f"The data of the {name}", lambda make=make: make(found), None)
        for name, make in drawn.items()
    }
    picture = found.attempt("The picture of the samples", lambda: _picture(found, domain), "null")
    text = {name: found.attempt(name, lambda make=make: make(found), "") for name, make in TEXT.items()}
    text["head"] = _head(found)  # last: it says what is missing
    told = {
        **text,
        "title": _safe(found.run.get("name", run.name)),
        "plotly": get_plotlyjs(),
        "data": _json(data),
        "picture": picture,
        **{f"has_{name}": "" if value else "hidden" for name, value in data.items()},
        "has_picture": "hidden" if picture == "null" else "",
    }
    temporary = run / ".report.html.tmp"
    frame = Template(Path(__file__).with_name("report.html").read_text("utf-8"))
    temporary.write_text(frame.substitute(told), "utf-8", errors="replace")
    return temporary.replace(run / "report.html")


def read(run: Path, alpha: float | None) -> Found:
    """Everything a report needs, as far as it is there."""
    found = Found(run, alpha)

    def mapping(name: str, parse: Callable[[str], Any]) -> dict[str, Any]:
        told = parse((run / name).read_text("utf-8", errors="replace"))
        assert isinstance(told, dict), f"it holds {type(told).__name__}, not a mapping"
        return told

    def events() -> list[dict[str, Any]]:
        path = run / "events.jsonl"  # there only once a guard has spoken
        lines = path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    found.run = found.attempt("run.json", lambda: mapping("run.json", json.loads), {})
    found.config = found.attempt("config.yaml", lambda: mapping("config.yaml", yaml.safe_load), {})
    found.events = found.attempt("events.jsonl", events, [])
    found.rows = found.attempt("metrics.csv", lambda: Table(run / "metrics.csv").rows, [])
    if not found.rows:
        found.missing.append("There is no iteration in metrics.csv.")
    chain = found.config.get("chain") or {}
    if alpha is not None and chain.get("sigma") == "gamma" and chain.get("eta", 1) != 1:
        found.missing.append(f"The attained share is left out: chain.eta is {chain['eta']}, and J* is for eta = 1.")
        found.alpha = None
    _read_evaluations(found)
    return found


def _read_evaluations(found: Found) -> None:
    def load(path: Path) -> Samples | None:
        samples = found.attempt(f"evaluations/{path.name}", lambda: Samples.load(path), None)
        return samples if samples is not None and np.isfinite(samples.rewards).any() else None

    folder = found.path / "evaluations"
    found.pretrained = load(folder / "pretrained.npz")
    read = {path.stem.removeprefix("iteration_"): load(path) for path in sorted(folder.glob("iteration_*.npz"))}
    found.policies = {int(name): samples for name, samples in read.items() if samples and name.isdigit()}
    if not found.policies:
        found.missing.append("There is no evaluation of the policy yet.")
    pretrained, last = found.pretrained, found.policies.get(max(found.policies, default=-1))
    if pretrained is not None and found.alpha is not None:
        told = (pretrained.rewards, found.alpha, pretrained.groups)
        found.tilt = found.attempt("p*", lambda: evaluate.tilted(*told), None)
    if pretrained is not None and last is not None:
        found.verdict = found.attempt("The verdict", lambda: judge(pretrained, last, found.alpha), None)


# -- numbers for the figures


def _frontier(found: Found) -> dict[str, Any] | None:
    if found.pretrained is None or found.verdict is None:
        return None
    curve, tilt = found.verdict.frontier, found.tilt
    path = [(i, _mean(s.kl, s.rewards), _mean(s.rewards)) for i, s in found.policies.items()]
    far = 1.25 * max([kl.value for _, kl, _ in path] + ([tilt.kl] if tilt else []) + [0.01])
    kl = far * np.linspace(0, 1, 200) ** 2  # the frontier starts like a square root
    told: dict[str, Any] = {
        "kl": kl,
        "reward": [curve.reward_at(float(x)) for x in kl] if len(curve.kl) else [],
        "trusted": min(curve.trusted_kl, far),
        "before": _mean(found.pretrained.rewards).value,
        "path": [{"iteration": i, "kl": kl.value, "reward": reward.value} for i, kl, reward in path],
        "error": [[abs(e.value - e.low), abs(e.high - e.value)] for e in path[-1][1:]],
    }
    if tilt is not None:
        told["best"] = {"kl": tilt.kl, "reward": tilt.reward, "optimum": tilt.optimum, "alpha": found.alpha}
    return told


def _curves(found: Found) -> list[dict[str, Any]]:
    def column(*names: str) -> list[list[float]]:
        rows = [[row.get(name, math.nan) for name in ("iteration", *names)] for row in found.rows if names[0] in row]
        return [row for row in rows if math.isfinite(row[1])]

    last, tilt = (found.rows or [{}])[-1], found.tilt
    before = {"reward": found.pretrained and _mean(found.pretrained.rewards).value, "diversity": None}
    before["diversity"] = next(
        (r["evaluate/diversity_pretrained"] for r in found.rows if "evaluate/diversity_pretrained" in r), None
    )
    best = {"attained": 1.0, "frontier share": 1.0}
    if tilt:
        best |= {"reward": tilt.reward, "KL to the pretrained model, nats": tilt.kl}
    hidden = "frontier share" if found.alpha else "attained"
    return [
        {
            "title": title,
            "line": column(line),
            "dots": column(dots, f"{dots}_low", f"{dots}_high"),
            "before": before.get(title),
            "best": best.get(title),
        }
        for title, (line, dots) in CURVES.items()
        if title != hidden and last
    ]
