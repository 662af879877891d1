"""The driver's ends of reward actors: begun, noticed, asked, replaced, ended.

Ray never restarts an actor: its owner must know which work it died under. It answers in the order it was asked, so of
the works it holds only the first is under way; the rest have only waited.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from rayft import imports
from rayft.rewards.book import Job
from rayft.rewards.worker import Outcome
from rayft.score import Work

TICK = 0.1  # seconds between looks at what does not announce itself
STOPPING = 3.0  # seconds that children may take to end
IDLE = 30.0  # seconds without work after which an actor may be ended


class Seat:
    """The driver's end of one actor: what it was sent, in order."""

    def __init__(self, number: int, make: Callable[[], Any]) -> None:
        self.number, self.actor = number, make()
        self.placing, self.building = self.actor.__ray_ready__.remote(), self.actor.ready.remote()
        self.placed = self.up = False
        self.sent: deque[tuple[Any, Job]] = deque()
        self.since = time.monotonic()  # what it does now: starting, working on the first job, or idling
        self.took = 0.0  # seconds between its last two answers, or from being asked to answering

    def look(self) -> None:
        """Notices whether it is placed and up; a ``RayError`` where it died, or its rewards could not be built."""
        if not self.placed and ray.wait([self.placing], timeout=0)[0]:
            ray.get(self.placing)
            self.placed, self.since = True, time.monotonic()
        if self.placed and not self.up and ray.wait([self.building], timeout=0)[0]:
            ray.get(self.building)
            self.up, self.since = True, time.monotonic()

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
        now = time.monotonic()
        self.took, self.since = now - self.since, now
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


def ray_options(resources: Mapping[str, float]) -> dict[str, Any]:
    """Resources as ``.options`` takes them: CPU and GPU have keywords of their own."""
    custom = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
    return {"num_cpus": resources.get("CPU", 0.0), "num_gpus": resources.get("GPU", 0.0), "resources": custom}


@dataclass(frozen=True)
class Terms:
    """What a roster may ask of Ray, and for how long it waits."""

    most: int
    fewest: int
    resources: Mapping[str, float]  # what one actor asks for: CPU, GPU, custom ones
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
        kinds = self.terms.resources
        there = " and ".join(f"{has.get(kind, 0):g} {kind} ({free.get(kind, 0):g} free)" for kind in kinds)
        return (
            f"no reward actor could be placed within {self.terms.startup:g} s: each asks for {asked or 'nothing'}, "
            f"and the cluster has {there}; ask for less per actor, or leave more free"
        )
