"""What a sweep found, from its folder alone: outcomes of trials, the best of them, what was paid.

    sweep/  config.yaml  sweep.json  rows.jsonl  trials.csv  trials.parquet  best/  best.yaml  report.html  trials/

rows.jsonl has a line for each step of a trial and one for its end. A step that a resumed sweep repeats is there twice,
with the same numbers, and was paid for twice.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

NUMBERS = ("reward", "kl", "frontier_share", "attained", "diversity", "undecodable")
CALLS = ("reward_calls", "payoff_calls", "evaluate_calls")


@dataclass(frozen=True)
class Outcome:
    """A trial: its best evaluation, where it got to, and why it ended."""

    name: str
    status: str  # finished, stopped early (by the scheduler), stopped (by a guard), failed, unfinished
    reason: str
    best: dict[str, Any]  # the row with the highest objective, or the last where none has one
    last: dict[str, Any]
    steps: list[dict[str, Any]]

    @property
    def objective(self) -> float:
        return number(self.best, "objective")

    @property
    def values(self) -> dict[str, Any]:
        """The searched keys' values when it was best."""
        return self.best["values"]


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Every whole line of rows.jsonl."""
    path = folder / "rows.jsonl"
    *whole, _ = path.read_text("utf-8").split("\n") if path.is_file() else [""]
    return [json.loads(line) for line in whole]


def outcomes(rows: Iterable[Mapping[str, Any]], ended: bool) -> list[Outcome]:
    """Trials from the best objective to the worst, then those without. ``ended``: nothing runs any more."""
    steps: dict[str, list[dict[str, Any]]] = {}
    ends: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if "ended" in row:
            ends[row["trial"]] = row
        else:
            steps.setdefault(row["trial"], []).append(dict(row))
            ends.pop(row["trial"], None)
    names = sorted({*steps, *ends})
    found = [_outcome(name, steps.get(name, []), ends.get(name), ended) for name in names]
    return sorted(found, key=lambda one: -one.objective if math.isfinite(one.objective) else math.inf)


def _outcome(name: str, steps: list[dict[str, Any]], end: Mapping[str, Any] | None, ended: bool) -> Outcome:
    last = steps[-1] if steps else {"iteration": 0, "values": (end or {}).get("values", {})}
    known = [row for row in steps if math.isfinite(number(row, "objective"))]
    best = max(known, key=lambda row: row["objective"]) if known else last
    status, reason = last.get("status", "running"), last.get("reason") or ""
    if end is not None and end["ended"] == "failed":
        status, reason = "failed", end["reason"]
    elif status == "running" and end is not None:
        status = "stopped early"
    elif status == "running" and ended:
        status = "unfinished"
    return Outcome(name, status, reason, best, last, steps)


def winner(found: Sequence[Outcome]) -> Outcome | None:
    """The trial with the highest objective."""
    return found[0] if found and math.isfinite(found[0].objective) else None


def failure(found: Sequence[Outcome]) -> str:
    """Why there is no winner: the commonest reason."""
    reasons = Counter(one.reason or "it was ended before its first evaluation" for one in found)
    if not reasons:
        return "no trial came to an evaluation"
    commonest = reasons.most_common(1)[0][0]
    if all(one.status == "failed" for one in found):
        return f"all {len(found)} trials failed: {commonest}"
    return f"none of {len(found)} trials has an objective: {commonest}"


def paid(rows: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """Reward calls of the whole sweep by purpose."""
    total: Counter[str] = Counter()
    for row in rows:
        total.update(row.get("paid") or {})
    return total


def cost_line(calls: Mapping[str, int], seconds: float, num: int) -> str:
    """What a sweep cost, in one line."""
    known = {
        "pay-off": calls.get("payoff", 0),
        "training": calls.get("train", 0),
        "evaluation": calls.get("evaluate", 0) + calls.get("watch", 0),
        "of the pretrained model, once": calls.get("pretrained", 0),
    }
    told = ", ".join(f"{count:,} {name}" for name, count in known.items() if count)
    return f"{num} trials in {seconds:.0f} s; reward calls: {told or 'none'}"


def table(found: Sequence[Outcome]) -> pa.Table:
    """A line for each trial."""
    keys = list(dict.fromkeys(key for one in found for key in one.values))
    columns: dict[str, list[Any]] = {
        "trial": [one.name for one in found],
        "status": [one.status for one in found],
        "objective": [number(one.best, "objective") for one in found],
        "best_iteration": [one.best.get("iteration") for one in found],
        "iterations": [one.last.get("iteration") for one in found],
        **{name: [number(one.best, name) for one in found] for name in NUMBERS},
        **{key: [one.values.get(key) for one in found] for key in keys},
        **{name: [one.last.get(name, 0) for one in found] for name in CALLS},
        "seconds": [number(one.last, "seconds") for one in found],
        "reason": [one.reason for one in found],
    }
    return pa.table({name: _column(values) for name, values in columns.items()})


def write_tables(folder: Path, found: Sequence[Outcome]) -> None:
    """trials.csv and trials.parquet."""
    told = table(found)
    pq.write_table(told, folder / "trials.parquet")
    csv.write_csv(told, folder / "trials.csv")


def number(row: Mapping[str, Any], name: str) -> float:
    """A number of a row; NaN where it has none."""
    value = row.get(name)
    return float(value) if isinstance(value, int | float) else math.nan


def _column(values: list[Any]) -> pa.Array:
    plain = all(isinstance(value, int | float | str | None) for value in values)
    kinds = {str if isinstance(value, str) else float for value in values if value is not None}
    if plain and len(kinds) <= 1:
        return pa.array([float(v) if isinstance(v, int | float) else v for v in values])
    return pa.array([None if value is None else json.dumps(value) for value in values])
