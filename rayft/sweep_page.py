"""One self-contained HTML page per sweep, from its folder alone: where the objective is high, and at what KL.

This file makes the numbers and the text, sweep.html lays them out and draws. A user's words pass through ``safe``.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.stats import spearmanr

from rayft import evaluate, sweep
from rayft.report import in_units, lay_out, safe, to_json
from rayft.search import Distribution, Search, read
from rayft.spec import open_folder
from rayft.sweep import Outcome, number
from rayft.verdict import Samples

CELLS = 36  # a side of the smoothed map


@dataclass
class Found:
    """A sweep's folder, read; what is missing is a sentence on the page."""

    folder: Path
    told: dict[str, Any]
    outcomes: list[Outcome]
    search: Search | None = None
    before: Samples | None = None
    missing: list[str] = field(default_factory=list)

    def attempt(self, what: str, make: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return make()
        except Exception as error:
            self.missing.append(f"{what} could not be made ({type(error).__name__}: {str(error)[:200]}).")
        return otherwise

    @property
    def ranked(self) -> list[Outcome]:
        """Trials with an objective."""
        return [one for one in self.outcomes if math.isfinite(one.objective)]

    @property
    def space(self) -> dict[str, Distribution]:
        return {} if self.search is None else self.search.space

    def numeric(self) -> list[str]:
        """Searched numbers, what moves the objective most first."""
        keys = [key for key, drawn in self.space.items() if drawn.numeric and len(set(drawn.values)) > 1]
        goal = [one.objective for one in self.ranked]

        def weight(key: str) -> float:
            values = [number(one.values, key) for one in self.ranked]
            told: Any = spearmanr(values, goal) if len(set(values)) > 1 and len(set(goal)) > 1 else (0.0, 1.0)
            return -abs(float(told[0]))

        return sorted(keys, key=weight) if len(keys) > 2 else keys


def write(folder: Path) -> Path:
    """Writes ``folder/report.html`` and returns its path."""
    path = folder / "sweep.json"
    told = json.loads(path.read_text()) if path.is_file() else {}
    found = Found(folder, told, sweep.outcomes(sweep.read_rows(folder), ended=told.get("status") != "running"))
    found.search = found.attempt("The search", lambda: read(open_folder(folder)), None)
    found.before = found.attempt("The pretrained model's samples", lambda: _pretrained(folder), None)
    signal = found.attempt("The signal", lambda: _signal(folder), "")
    drawn = {"map": heat_map, "front": front, "parallel": parallel}
    data = {name: found.attempt(f"The {name}", lambda make=make: make(found), None) for name, make in drawn.items()}
    shown = {**data, "signal": signal, "missing": found.missing}
    page = {
        "title": safe(folder.name),
        "head": found.attempt("The head", lambda: _head(found), ""),
        "table": found.attempt("The table", lambda: _table(found), ""),
        "search": found.attempt("The search", lambda: _search(found), ""),
        "again": _again(found),
        "signal": signal,
        "objective": safe(found.search.objective if found.search else "objective"),
        "missing": "".join(f"<p>{safe(sentence)}</p>" for sentence in found.missing),
        "data": to_json(data),
        **{f"has_{name}": "" if value else "hidden" for name, value in shown.items()},
    }
    return lay_out("sweep.html", page, folder)


def _pretrained(folder: Path) -> Samples | None:
    """The first file of them: trials with another chain or domain have their own, and no frontier in common."""
    files = sorted(folder.glob("pretrained-*.npz"))
    return Samples.load(files[0]) if len(files) == 1 else None


def _signal(folder: Path) -> str:
    """What the reward on the way says of the sample's own, by timestep; of the one setting that all trials share."""
    files = sorted(folder.glob("signal-*.json"))
    told = json.loads(files[0].read_text()) if len(files) == 1 else {}
    head = "".join(f"<th>{safe(name)}</th>" for name in ("t", *told))
    body = "".join(f"<td>{value:.2f}</td>" for value in told.values())
    table = f"<table class=costs><thead><tr>{head}</tr></thead><tbody><tr><th>signal</th>{body}</tr></tbody></table>"
    return f'<div class="wide">{table}</div>' if told else ""


# -- figures


def heat_map(found: Found) -> dict[str, Any] | None:
    """The objective over two searched numbers: cells of a grid, or trials over a smoothed background."""
    keys = found.numeric()[:2]
    if not keys or len(found.ranked) < 2:
        return None
    axes = [_axis(found, key) for key in keys]
    rows = [[*(number(one.values, key) for key in keys), one.objective, one.name] for one in found.ranked]
    others = [key for key in found.space if key not in keys]
    told: dict[str, Any] = {"axes": axes, "points": rows, "others": others}
    if len(keys) == 2:
        exact = all(found.space[key].kind in ("grid", "choice") for key in keys)
        told["cells"] = _cells(rows) if exact else _smoothed(rows, axes)
    return told


def _axis(found: Found, key: str) -> dict[str, Any]:
    drawn = found.space[key]
    ends = [float(end) for end in drawn.ends]
    return {"key": key, "log": drawn.logarithmic, "low": min(ends), "high": max(ends)}


def _cells(rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """The best objective at each point of a grid."""
    x, y = sorted({row[0] for row in rows}), sorted({row[1] for row in rows})
    best = {(a, b): max(row[2] for row in rows if (row[0], row[1]) == (a, b)) for a, b in {(r[0], r[1]) for r in rows}}
    return {"exact": True, "x": x, "y": y, "z": [[best.get((a, b)) for a in x] for b in y]}


def _smoothed(rows: Sequence[Sequence[Any]], axes: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Kernel regression on unit axes, left blank where no trial is near."""
    if len(rows) < 6:
        return None

    def unit(values: np.ndarray, axis: dict[str, Any]) -> np.ndarray:
        low, high = (math.log(axis[end]) if axis["log"] else axis[end] for end in ("low", "high"))
        return ((np.log(values) if axis["log"] else values) - low) / (high - low)

    def ticks(axis: dict[str, Any]) -> np.ndarray:
        make = np.geomspace if axis["log"] else np.linspace
        return make(axis["low"], axis["high"], CELLS)

    points = np.stack([unit(np.array([row[i] for row in rows]), axes[i]) for i in (0, 1)], axis=1)
    goal, width = np.array([row[2] for row in rows]), max(0.08, 0.5 * len(rows) ** (-1 / 3))
    where = [ticks(axis) for axis in axes]
    mesh = np.stack(np.meshgrid(*(unit(t, a) for t, a in zip(where, axes, strict=True))), axis=-1)
    distance = np.square(mesh[:, :, None] - points).sum(-1)
    weight = np.exp(-distance / (2 * width**2))
    z = (weight @ goal) / np.maximum(weight.sum(-1), 1e-300)
    far = distance.min(-1) > (2.5 * width) ** 2
    shown = np.where(far, np.nan, z).astype(object)
    shown[far] = None
    return {"exact": False, "x": where[0].tolist(), "y": where[1].tolist(), "z": shown.tolist()}


def front(found: Found) -> dict[str, Any] | None:
    """Every evaluation by its KL and reward, those that no other beats in both, and the frontier."""
    rows = [
        [number(row, "kl"), number(row, "reward"), row["trial"], row.get("iteration", 0), number(row, "objective")]
        for one in found.outcomes
        for row in one.steps
        if math.isfinite(number(row, "kl") + number(row, "reward"))
    ]
    if not rows:
        return None
    best = [[number(one.best, "kl"), number(one.best, "reward"), one.name, one.objective] for one in found.ranked]
    told: dict[str, Any] = {"rows": rows, "best": best, "pareto": pareto([(row[0], row[1]) for row in rows])}
    if found.before is not None:
        curve = evaluate.frontier(found.before.rewards, found.before.groups)
        far = 1.15 * max(row[0] for row in rows)
        kl = (far * np.linspace(0, 1, 160) ** 2).tolist()
        told["frontier"] = [[x, curve.reward_at(x)] for x in kl] if len(curve.kl) else None
        told["before"] = float(np.nanmean(found.before.rewards))
    return told


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that no other has both less KL and more reward than, by KL."""
    kept: list[tuple[float, float]] = []
    for kl, reward in sorted(points, key=lambda pair: (pair[0], -pair[1])):
        if not kept or reward > kept[-1][1]:
            kept.append((kl, reward))
    return kept


def parallel(found: Found) -> dict[str, Any] | None:
    """One axis for each searched key and one for the objective; a line for each trial."""
    if len(found.ranked) < 2:
        return None
    axes = []
    for key, drawn in found.space.items():
        values = [one.values.get(key) for one in found.ranked]
        names = None if drawn.numeric else list(dict.fromkeys(str(value) for value in drawn.values))
        numbers = values if names is None else [names.index(str(value)) for value in values]
        axes.append({"key": key, "log": drawn.logarithmic, "values": numbers, "names": names})
    goal = [one.objective for one in found.ranked]
    return {"axes": axes, "objective": goal, "kl": [number(one.best, "kl") for one in found.ranked]}


# -- text


def _head(found: Found) -> str:
    told, best = found.told, sweep.winner(found.outcomes)
    status = str(told.get("status", "status unknown"))
    warn = "" if status in ("finished", "running") else " warn"
    facts = [f"{told.get('algorithm', '?')} on {told.get('domain', '?')}", f"seed {told.get('seed', '?')}"]
    facts += [in_units(told.get("seconds"))] if told.get("seconds") else []
    facts.append(str(told.get("finished") or told.get("started") or "")[:10])
    spans = "".join(f"<span>{safe(fact)}</span>" for fact in facts if fact)
    badge = f'<span class="badge{warn}">{safe(status)}</span>'
    head = f'<header class="top"><h1>{safe(found.folder.name)}</h1>{badge}{spans}</header>'
    goal = found.search.objective if found.search else "objective"
    if best is None:
        return f'{head}<p class="verdict">No best trial <span>{safe(sweep.failure(found.outcomes))}.</span></p>'
    values = ", ".join(f"{key.rpartition('.')[2]} {_short(value)}" for key, value in best.values.items())
    cost = sweep.cost_line(told.get("calls") or {}, float(told.get("seconds") or 0.0), len(found.outcomes))
    return (
        f'{head}<p class="verdict">{safe(goal)} {best.objective:.4g} <span>at {safe(values)}, KL '
        f"{number(best.best, 'kl'):.3g} nats.</span></p>"
        f'<p class="soft">{safe(best.name)}, iteration {best.best["iteration"]}. {safe(cost)}.</p>'
    )


def _table(found: Found) -> str:
    keys = list(dict.fromkeys(key for one in found.outcomes for key in one.values))
    heads = ["trial", *keys, "objective", "reward", "KL", "frontier share", "diversity", "iteration", "status"]
    body = ""
    for one in found.outcomes:
        numbers = [number(one.best, name) for name in ("objective", "reward", "kl", "frontier_share", "diversity")]
        cells = [one.name, *(_short(one.values.get(key)) for key in keys), *map(_short, numbers)]
        row = "".join(f"<td>{safe(cell)}</td>" for cell in [*cells, one.last.get("iteration", 0), one.status])
        why = f"<tr><td></td><td colspan={len(heads) - 1}><small>{safe(one.reason)}</small></td></tr>"
        body += f"<tr>{row}</tr>{why if one.reason else ''}"
    head = "".join(f"<th>{safe(name)}</th>" for name in heads)
    return f'<div class="wide"><table class=costs><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _search(found: Found) -> str:
    if found.search is None:
        return '<p class="soft">There is no readable config.yaml.</p>'
    told = found.search.told
    lines = {key: str(drawn) for key, drawn in found.search.space.items()}
    lines |= {"trials": found.search.trials, "scheduler": told.scheduler, "sampler": found.search.sampler}
    lines |= {"objective": str(found.search.objective)}
    lines["bank"] = "shared by all trials" if found.search.shared else "each trial its own"
    rows = "".join(f"<tr><td><code>{safe(k)}</code></td><td>{safe(v)}</td></tr>" for k, v in lines.items())
    config = found.attempt("config.yaml", lambda: yaml.safe_load((found.folder / "config.yaml").read_text()), {})
    shown = safe(yaml.safe_dump({k: v for k, v in config.items() if k != "search"}, sort_keys=False))
    details = f"<details><summary>Show the run that was varied</summary><pre>{shown}</pre></details>"
    return f"<table class=settings>{rows}</table>{details}"


def _again(found: Found) -> str:
    where, first = shlex.quote(str(found.folder)), [str(word) for word in found.told.get("command") or ["rayft"]]
    name = "rayft" if first[0].endswith("cli.py") else first[0]
    lines = {
        "The command that made it": shlex.join([name, *first[1:]]),
        "The same sweep again": f"rayft tune {shlex.quote(str(found.folder / 'config.yaml'))}",
        "The best trial as a run of its own": f"rayft run {shlex.quote(str(found.folder / 'best.yaml'))}",
        "Its checkpoint, held against J* and the frontier": f"rayft evaluate {shlex.quote(str(found.folder / 'best'))}",
        "Go on where it was stopped": f"rayft tune --resume {where}",
    }
    return "".join(f'<p class="soft">{label}:</p><pre>{safe(text)}</pre>' for label, text in lines.items())


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "-"
    return "-" if value is None else str(value)
