"""The books of a pool: what is sent to actors, how long it takes, and what has come back."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rayft.rewards.worker import Outcome
from rayft.score import DECODE, Task, Work

NOBODY = -1  # no actor has decoded this event
LARGEST, HEAVIEST = 4096, 16 * 2**20  # rows and bytes of one work
PIECES = 256  # a suspect falls into so many: milliseconds for each, against seconds for a new actor
SMOOTHING = 0.3  # weight of the newest work in the averages


@dataclass(eq=False)
class Job:
    """Events that travel together, and what is asked about them."""

    asked: dict[int, np.ndarray]  # part -> event numbers, ascending
    whole: bool = False  # a group, which only means something together
    alone: bool = False  # a suspect: nothing waits behind it
    deaths: int = 0  # of actors, while it was under way
    copies: int = 0  # with an actor now
    resent: bool = False
    settled: bool = False  # answered, failed or in pieces: another answer changes nothing
    rows: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.rows = np.unique(np.concatenate(list(self.asked.values())))

    def work(self, call: int, events: Any, context: Mapping[str, np.ndarray], **told: Any) -> Work:
        """As a worker gets it: rows counted from its own first event."""
        tasks = tuple(Task(part, np.searchsorted(self.rows, rows)) for part, rows in self.asked.items())
        own = events[self.rows] if isinstance(events, np.ndarray) else [events[row] for row in self.rows]
        return Work(call, self.rows, own, {k: v[self.rows] for k, v in context.items()}, tasks, **told)

    def pieces(self) -> list[Job]:
        """Smaller jobs, to find the culprit among them; none where it cannot be divided."""
        if self.whole:
            return []
        if len(self.rows) == 1:
            parts = self.asked.items() if len(self.asked) > 1 else ()
            return [Job({part: rows}, alone=True) for part, rows in parts]
        shares = np.array_split(self.rows, min(PIECES, len(self.rows)))
        within = [{p: r[(r >= share[0]) & (r <= share[-1])] for p, r in self.asked.items()} for share in shares]
        return [Job({part: rows for part, rows in asked.items() if len(rows)}, alone=True) for asked in within]


@dataclass
class Pace:
    """Seconds per sample of each part, and beside them per work, learnt from every answer."""

    seconds: dict[int, float] = field(default_factory=dict)
    handing: float = 0.0  # seconds of a work that were no reward's

    def learn(self, outcome: Outcome, took: float | None = None) -> None:
        """``took``: seconds of the whole work, where an actor had it."""
        if took is not None and not outcome.errors and not outcome.restarts:
            own = sum(float(np.nansum(column)) for column in outcome.seconds.values())
            self.handing += SMOOTHING * (max(took - own, 0.0) - self.handing)
        for part, column in outcome.seconds.items():
            failed = [row for number, row in outcome.errors if number == part]
            known = column == column
            if failed and known.sum() > known[failed].sum():  # time-outs say nothing about the others
                known[failed] = False
            if known.any():
                mean = float(column[known].sum() / known.sum())
                self.seconds[part] = mean + (1 - SMOOTHING) * (self.seconds.get(part, mean) - mean)

    def of(self, counts: Mapping[int, int]) -> float | None:
        """Seconds for so many samples of each part; None before all of them are known."""
        if not counts.keys() <= self.seconds.keys():
            return None
        return sum(self.seconds[part] * count for part, count in counts.items())


def merge(whole: Outcome, rows: np.ndarray, part: Outcome) -> None:
    """Writes the outcome of some rows into that of all."""
    known = np.isfinite(part.found)
    whole.found[rows[known]] = part.found[known]
    both: list[tuple[dict[Any, np.ndarray], dict[Any, np.ndarray]]]
    both = [(whole.values, part.values), (whole.seconds, part.seconds), (whole.extras, part.extras)]
    for into, columns in both:
        for key, column in columns.items():
            if key not in into:
                into[key] = np.full(whole.num_rows, np.nan)
            known = np.isfinite(column)
            into[key][rows[known]] = column[known]
    whole.errors |= {(number, int(rows[row])): reason for (number, row), reason in part.errors.items()}
    whole.labels |= {int(rows[row]): label for row, label in part.labels.items()}
    whole.digests |= {int(rows[row]): digests for row, digests in part.digests.items()}


class Run:
    """One run: which rows are not yet sent, which jobs are to be sent again, and what is known."""

    def __init__(
        self, told: dict[str, Any], wanted: Mapping[int, np.ndarray], groups: set[int], owners: np.ndarray
    ) -> None:
        num_rows = len(told["events"])
        self.told, self.owners, self.whole = told, owners, Outcome(num_rows)
        self.whole.values = {part: np.full(num_rows, np.nan) for part in wanted if part != DECODE}
        self.largest = max(1, min(LARGEST, HEAVIEST * num_rows // max(1, getattr(told["events"], "nbytes", 0))))
        self.again: deque[Job] = deque()
        self.open = self.heard = 0  # jobs made and not settled; answers
        self.asked: dict[int, np.ndarray] = {}  # part -> [event] whether it is asked for
        for part, rows in wanted.items():
            if part in groups:
                self.put([Job({part: np.unique(rows)}, whole=True)])
            else:
                self.asked[part] = np.zeros(num_rows, dtype=bool)
                self.asked[part][rows] = True
        some = np.flatnonzero(np.any(list(self.asked.values()), axis=0)) if self.asked else np.zeros(0, dtype=int)
        self.piles = {int(owner): some[owners[some] == owner] for owner in np.unique(owners[some])}

    def put(self, jobs: list[Job]) -> None:
        """To be sent before anything new."""
        self.again.extendleft(reversed(jobs))
        self.open += len(jobs)

    def over(self) -> bool:
        return not self.open and not self.piles

    def pile(self, number: int) -> int:
        """Whose rows an actor takes next: its own, then nobody's, then those of who has most left."""
        own = [owner for owner in (number, NOBODY) if owner in self.piles]
        return own[0] if own else max(self.piles, key=lambda owner: len(self.piles[owner]))

    def ahead(self, number: int, pile: int, size: int) -> np.ndarray:
        """The rows an actor would take off a pile: another's is eaten from its far end."""
        rows = self.piles[pile]
        return rows[:size] if pile in (number, NOBODY) else rows[-size:]

    def take(self, number: int, pile: int, size: int) -> Job:
        """So many rows off a pile."""
        rows = self.ahead(number, pile, size)
        rest = self.piles.pop(pile)
        rest = rest[len(rows) :] if rest[0] == rows[0] else rest[: -len(rows)]
        if len(rest):
            self.piles[pile] = rest
        self.open += 1
        return Job({part: rows[mask[rows]] for part, mask in self.asked.items() if mask[rows].any()})

    def hear(self, number: int, job: Job, outcome: Outcome) -> None:
        """The first answer counts; calls count however often they were made."""
        for part, calls in outcome.calls.items():
            self.whole.calls[part] += calls
        self.whole.restarts += outcome.restarts
        self.heard += 1
        if not job.settled:
            merge(self.whole, job.rows, outcome)
            self.owners[job.rows] = number
            self.settle(job)

    def fail(self, job: Job, reason: str) -> None:
        """No answer will come."""
        for part, rows in job.asked.items():
            self.whole.errors |= {(part, row): reason for row in rows.tolist()}
            if part != DECODE:
                self.whole.calls[part] += len(rows)
        self.settle(job)

    def settle(self, job: Job) -> None:
        job.settled = True
        self.open -= 1
