"""Reward actors at both ends (``RewardActor`` where Ray places it, ``Seat`` here) and the books of what they are sent.

Ray never restarts an actor: its owner must know which work it died under. It answers in the order it was asked, so of
the works it holds only the first is under way; the rest have only waited.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import cloudpickle
import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError

from rayft import imports
from rayft.rewards.isolate import Isolated
from rayft.rewards.worker import Inline, Limits, Outcome, Worker
from rayft.score import DECODE, Task, Told, Work

NOBODY = -1  # no actor has decoded this event
LARGEST, HEAVIEST = 4096, 16 * 2**20  # rows and bytes of one work
PIECES = 256  # a suspect falls into so many: milliseconds for each, against seconds for a new actor
TICK = 0.1  # seconds between looks at what does not announce itself
SMOOTHING = 0.3  # weight of the newest work in the average seconds per sample
STOPPING = 3.0  # seconds that children may take to end
IDLE = 30.0  # seconds without work after which an actor may be ended


def worker(told: Told, limits: Limits, isolate: bool) -> Worker:
    """The rewards, built: in a child that may die, or in this process. A ``ValueError`` says why they cannot be."""
    if not isolate:
        return Inline(told, limits)
    child = Isolated(told, limits)
    child.start()
    return child


class RewardActor:
    """A worker in a process of its own. Loads neither torch nor RLlib unless a reward does."""

    def __init__(self, told: bytes, limits: Limits, isolate: bool) -> None:
        self.told, self.limits, self.isolate = told, limits, isolate
        self.worker: Worker | None = None

    def ready(self) -> None:
        """Builds the rewards: here, because of an exception in ``__init__`` Ray only says that the actor died."""
        self.worker = worker(cloudpickle.loads(self.told), self.limits, self.isolate)

    def work(self, work: Work) -> Outcome:
        """What became of it."""
        assert self.worker is not None, "ready() comes first"
        return self.worker.work(work)

    def stop(self) -> None:
        """Ends the child, if there is one."""
        if self.worker is not None:
            self.worker.stop()


# -- what is sent


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
    """Seconds per sample of each part, learnt from every answer."""

    seconds: dict[int, float] = field(default_factory=dict)

    def learn(self, outcome: Outcome) -> None:
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


class Call:
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


# -- who it is sent to


class Seat:
    """The driver's end of one actor: what it was sent, in order."""

    def __init__(self, number: int, make: Callable[[], Any]) -> None:
        self.number, self.actor = number, make()
        self.placing, self.building = self.actor.__ray_ready__.remote(), self.actor.ready.remote()
        self.placed = self.up = False
        self.sent: deque[tuple[Any, Job]] = deque()
        self.since = time.monotonic()  # what it does now: starting, working on the first job, or idling

    def look(self) -> None:
        """Notices whether it is placed and up; a ``RayError`` where it died, or its rewards could not be built."""
        if not self.placed and ray.wait([self.placing], timeout=0)[0]:
            ray.get(self.placing)
            self.placed, self.since = True, time.monotonic()
        if self.placed and not self.up and ray.wait([self.building], timeout=0)[0]:
            ray.get(self.building)
            self.up, self.since = True, time.monotonic()

    def idle(self) -> bool:
        """Up, with nothing to do."""
        return self.up and not self.sent

    def send(self, job: Job, work: Work) -> Any:
        """Asks; the answer will be found under the reference."""
        ref = self.actor.work.remote(work)
        if not self.sent:
            self.since = time.monotonic()
        self.sent.append((ref, job))
        job.copies += 1
        return ref

    def take(self, ref: Any) -> tuple[Job, Outcome]:
        """An answer that has come; a ``RayError`` where it is none."""
        outcome: Any = ray.get(ref)
        entry = next(entry for entry in self.sent if entry[0] == ref)
        self.sent.remove(entry)
        self.since = time.monotonic()
        entry[1].copies -= 1
        return entry[1], outcome

    def answers(self) -> list[Any]:
        """References under which something has come."""
        refs = [ref for ref, _ in self.sent]
        return ray.wait(refs, num_returns=len(refs), timeout=0)[0] if refs else []

    def leave(self) -> list[Job]:
        """Ends the actor at once; what it has not answered, first what was under way."""
        end([self])
        jobs = [job for _, job in self.sent]
        for job in jobs:
            job.copies -= 1
        self.sent.clear()
        return jobs


def end(seats: list[Seat]) -> None:
    """Kills actors, and looks at what those that were starting have said: Ray prints what nobody has looked at."""
    for seat in seats:
        ray.kill(seat.actor, no_restart=True)
    building = [seat.building for seat in seats if not seat.up]
    for ref in ray.wait(building, num_returns=len(building), timeout=1)[0] if building else ():
        with suppress(RayError):
            ray.get(ref)


@dataclass(frozen=True)
class Terms:
    """What a roster may ask of Ray, and for how long it waits."""

    most: int
    fewest: int
    resources: Mapping[str, float]  # CPU and GPU of one actor
    startup: float  # seconds in which one actor at least must find room
    building: float  # seconds in which it must build its rewards
    attempts: int  # actors in a row that may die over that


class Roster:
    """The actors of a pool: begun, noticed, replaced, ended."""

    def __init__(self, make: Callable[[], Any], terms: Terms) -> None:
        self.make, self.terms = make, terms
        self.seats: list[Seat] = []
        self.counts: Counter[str] = Counter()
        self.failure: str | None = None  # why rewards could not be built
        self.false_starts = 0  # actors in a row that died over it
        self.without = time.monotonic()  # when an actor was last up

    @property
    def up(self) -> list[Seat]:
        return [seat for seat in self.seats if seat.up]

    def begin(self) -> None:
        """The fewest actors there may be; what went wrong before is forgotten where there are none."""
        if not self.seats:
            self.without, self.failure, self.false_starts = time.monotonic(), None, 0
            self.counts["refused"] = 0
        self.grow(self.terms.fewest)

    def grow(self, number: int) -> None:
        """At least so many, or as many as there may be; what failed to build its rewards is not tried again."""
        while len(self.seats) < min(number, max(1, self.terms.most - self.counts["refused"])):
            self.seats.append(Seat(self.counts["made"], self.make))
            self.counts["made"] += 1

    def shrink(self, number: int) -> None:
        """At most so many, as far as they have been idle for long; requests that were long in vain go first."""
        now = time.monotonic()
        for seat in sorted(self.seats, key=lambda seat: (seat.up, -seat.number)):
            if len(self.seats) > max(number, self.terms.fewest) and not seat.sent and now - seat.since > IDLE:
                self.dismiss(seat, "stopped")

    def dismiss(self, seat: Seat, why: str) -> list[Job]:
        """Ends an actor; what it has not answered."""
        self.seats.remove(seat)
        self.counts[why] += 1
        return seat.leave()

    def stop(self) -> None:
        """Ends them all. Those with nothing to do end their children first, which others' notice by themselves."""
        told = [seat.actor.stop.remote() for seat in self.up if not seat.sent]
        if told:
            ray.wait(told, num_returns=len(told), timeout=STOPPING)
        end(self.seats)
        self.counts["stopped"] += len(self.seats)
        self.seats = []

    def wait(self) -> None:
        """A moment, or until all that start have; a ``ValueError`` where waiting is in vain."""
        pending = [ref for seat in self.seats if not seat.up for ref in (seat.placing, seat.building)]
        ray.wait(pending, num_returns=len(pending), timeout=TICK)
        self.look()
        if not self.up:
            self._check()

    def look(self) -> None:
        """Notices actors that are up, and those that never will be."""
        for seat in [seat for seat in self.seats if not seat.up]:
            try:
                seat.look()
            except RayError as error:
                self._refuse(seat, error)
            self.false_starts = 0 if seat.up else self.false_starts
        if self.up:
            self.without, self.failure = time.monotonic(), None

    def _refuse(self, seat: Seat, error: RayError) -> None:
        """An actor without rewards: their constructor failed, or it died over it, which may be chance."""
        if isinstance(error, RayTaskError):
            self.failure = imports.reason(error.cause) if error.cause is not None else str(error)
        else:
            self.false_starts += 1
            if self.false_starts >= self.terms.attempts:
                first = str(error).splitlines()[0]
                self.failure = f"reward actors died {self.false_starts} times while they built the rewards: {first}"
        self.dismiss(seat, "refused" if self.failure else "lost")
        if not self.failure:
            self.grow(len(self.seats) + 1)

    def _check(self) -> None:
        """Nobody is up: whether anybody will be."""
        now = time.monotonic()
        if self.failure:
            raise ValueError(self.failure)
        if not any(seat.placed for seat in self.seats) and now - self.without > self.terms.startup:
            raise ValueError(self._no_room())
        if any(seat.placed and now - seat.since > self.terms.building for seat in self.seats):
            raise ValueError(f"the rewards were not built within {self.terms.building:g} s")

    def _no_room(self) -> str:
        has, free = ray.cluster_resources(), ray.available_resources()
        asked = " and ".join(f"{amount:g} {kind}" for kind, amount in self.terms.resources.items() if amount)
        there = " and ".join(f"{has.get(kind, 0):g} {kind} ({free.get(kind, 0):g} free)" for kind in ("CPU", "GPU"))
        return (
            f"no reward actor could be placed within {self.terms.startup:g} s: each asks for {asked or 'nothing'}, "
            f"and the cluster has {there}; ask for less per actor, or leave more free"
        )
