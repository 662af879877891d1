"""The reward pool: events are cut into works of about ``TARGET`` seconds and spread over Ray actors.

    rows of a work = seconds / sum over its parts of seconds per sample,
    seconds = min(TARGET, what is left / (2 actors)),    so that all actors finish together

Actors, nodes and answers may be lost: what was not answered is sent again, and only the work that was under way is held
to blame. It falls into pieces that run alone, down to the one sample under which actors die.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import cloudpickle
import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError

from rayft import imports, reward
from rayft.rewards.actor import RewardActor, worker
from rayft.rewards.book import NOBODY, Job, Pace, Run
from rayft.rewards.roster import TICK, Roster, Seat, Terms, ray_options
from rayft.rewards.settings import Placement
from rayft.rewards.worker import Limits, Outcome, Worker
from rayft.score import CALLS_HELD, DECODE, Told

PER_WORK = 0.02  # seconds of work per actor that one sending and answering is worth: about 5 ms of processor each
HANDING = 0.03  # share of an actor's time that may go into receiving and answering
TARGET = 0.2  # seconds of one work; more where many actors, or busy processors, make handing it over dear
SHORTEST, LONGEST, OVER = 0.02, 1.0, 1.2  # seconds of one work; a last row may take it a little over them
IN_FLIGHT = 2  # works with an actor at a time, so that it need not wait for the driver
DEEP = 1.5  # works of more seconds do not queue behind others: whoever is idle first takes them
BACKLOG = 1.0  # seconds of work per actor above which a pool grows
GRACE = 3.0  # seconds that a work may take beyond its own
PLACING = 120.0  # seconds in which Ray must find room for one actor at least
ATTEMPTS = 3  # actors that may die under one sample before it is given up
STOPPED = "the reward pool was stopped while it was at work"


class RewardPool:
    """Owns the actors of some rewards. One ``run`` at a time, from any thread."""

    def __init__(self, told: Told, limits: Limits, placement: Placement) -> None:
        found = [reward.target(part.path, told.short_names) for part in told.parts]
        gpus = placement.num_gpus_per_actor or max(float(getattr(one, "num_gpus", 0.0)) for one in found)
        self.isolate = placement.isolate and not gpus
        if placement.actors or self.isolate:
            parts = tuple(replace(part, path=imports.portable(part.path)) for part in told.parts)
            told = replace(told, parts=parts, canonical=imports.portable(told.canonical))
        self.told, self.limits, self.placement = told, limits, placement
        self.groups = {i for i, one in enumerate(found) if getattr(one, "groupwise", False)}
        self.batches = {i: int(getattr(one, "batch_size", None) or 1) for i, one in enumerate(found)} | {DECODE: 1}
        self.local: Worker | None = None
        self.roster = self._roster(placement.reserved(gpus))
        self.flying: dict[Any, Seat] = {}  # in the order of sending, so that no answer waits long to be heard
        self.pace = Pace()
        self.owners: OrderedDict[int, np.ndarray] = OrderedDict()  # call -> [event] which actor has it decoded
        self.counts: Counter[str] = Counter()
        self.ticked = 0.0
        self.lock, self.stopping = threading.RLock(), False

    def _roster(self, resources: Mapping[str, float]) -> Roster:
        most, fewest = self.placement.actors, self.placement.min_actors
        building = self.limits.startup + 10 * GRACE  # a worker with a child gives up by itself, before that
        fewest = max(1, most if fewest is None else fewest)
        terms = Terms(most, fewest, resources, PLACING, building, ATTEMPTS)
        asked = {**ray_options(resources), "max_restarts": 0, "max_task_retries": 0}
        actor: Any = ray.remote(RewardActor)
        told = (cloudpickle.dumps(self.told), self.limits, self.isolate) if most else ()

        def make() -> Any:
            return actor.options(max_concurrency=1, enable_task_events=False, **asked).remote(*told)

        return Roster(make, terms)

    # -- life

    def start(self) -> None:
        """Returns when rewards are built somewhere. A ``ValueError`` says why they cannot be, or find no room."""
        self.stopping = False
        if not self.placement.actors:
            self.local = self.local or worker(self.told, self.limits, self.isolate)
            return
        with self.lock:
            try:
                self.roster.begin()
                while not self.roster.up:
                    self.roster.wait()
            except BaseException:
                self.stop()
                raise

    def stop(self) -> None:
        """Ends actors and children; a run under way on another thread ends with an exception."""
        self.stopping = True
        waited = self.lock.acquire(timeout=GRACE)
        try:
            if self.local is not None:
                self.local.stop()
            self.roster.stop()
            self.local, self.flying = None, {}
        finally:
            if waited:
                self.lock.release()

    @property
    def actors(self) -> list[Any]:
        """Handles of the actors there are, also of those not yet up."""
        return [seat.actor for seat in self.roster.seats]

    @property
    def num_actors(self) -> int:
        """Actors whose rewards are built."""
        if self.lock.acquire(blocking=False):
            try:
                self.roster.look()
            finally:
                self.lock.release()
        return len(self.roster.up)

    @property
    def lost(self) -> int:
        """Actors lost so far, by whatever cause."""
        return self.roster.counts["lost"]

    @property
    def stats(self) -> dict[str, int]:
        """Over the pool's life: works, resent, divided; actors made, stopped, refused, lost; restarts of children."""
        return dict(self.counts + self.roster.counts)

    # -- work

    def run(
        self,
        events: Any,
        context: Mapping[str, np.ndarray],
        wanted: Mapping[int, np.ndarray],
        *,
        call: int,
        keys: bool = False,
        metadata: Mapping[str, Any] = {},
    ) -> Outcome:
        """What parts (``DECODE`` among them) say about the rows they are wanted for; other rows stay NaN."""
        told = {"call": call, "events": events, "context": dict(context), "keys": keys, "metadata": dict(metadata)}
        wanted = {part: np.asarray(rows, dtype=int) for part, rows in wanted.items() if len(rows)}
        with self.lock:
            under_way = Run(told, wanted, self.groups, self._owners(call, len(events)))
            if not self.placement.actors:
                self._run_here(under_way)
                return under_way.whole
            try:
                self._begin(under_way)
                while not under_way.over():
                    self._fill(under_way)
                    self._listen(under_way)
                    self._tick(under_way)
            finally:
                for _, job in (entry for seat in self.roster.seats for entry in seat.sent):
                    job.settled = True  # another has answered, or the run is cut short: nobody waits for these
            self.roster.shrink(0)
            return under_way.whole

    def _run_here(self, run: Run) -> None:
        local = self.local
        assert local is not None, "start() comes first"
        while not run.over():
            job = run.again.popleft() if run.again else run.take(NOBODY, NOBODY, self._size(run, NOBODY, NOBODY)[0])
            outcome = local.work(job.work(**run.told))
            if self.stopping:
                local.stop()
                raise RuntimeError(STOPPED)
            self._learn(outcome)
            run.hear(NOBODY, job, outcome)

    def _owners(self, call: int, num_events: int) -> np.ndarray:
        """Which actor has each event decoded, of those that are there."""
        owners = self.owners.setdefault(call, np.full(num_events, NOBODY))
        self.owners.move_to_end(call)
        while len(self.owners) > CALLS_HELD:
            self.owners.popitem(last=False)
        owners[~np.isin(owners, [seat.number for seat in self.roster.up])] = NOBODY
        return owners

    def _begin(self, run: Run) -> None:
        self.roster.begin()
        self.roster.look()
        needed = self._needed(run)
        self.roster.shrink(needed)
        self.roster.grow(needed)

    def _needed(self, run: Run) -> int:
        """Actors that have no more than ``BACKLOG`` seconds of work each."""
        asked = {part: sum(int(mask[rows].sum()) for rows in run.piles.values()) for part, mask in run.asked.items()}
        jobs = [*run.again, *(job for seat in self.roster.seats for _, job in seat.sent if not job.settled)]
        seconds = (self.pace.of(asked) or 0.0) + sum(self._expected(job) or 0.0 for job in jobs)
        return max(self.roster.terms.fewest, math.ceil(seconds / BACKLOG))

    # -- sending

    def _fill(self, run: Run) -> None:
        """Gives every actor what it may hold, the idle first."""
        for depth in range(IN_FLIGHT):
            for seat in self.roster.up:
                if len(seat.sent) == depth and (run.again or run.piles):
                    job = self._next(run, seat)
                    if job is not None:
                        self._send(run, seat, job)

    def _next(self, run: Run, seat: Seat) -> Job | None:
        """What this actor is sent now. While suspects wait, which run alone, only idle actors are sent anything."""
        while run.again and run.again[0].settled:
            run.again.popleft()
        if seat.sent and (seat.sent[-1][1].alone or any(job.alone for job in run.again)):
            return None
        if run.again:
            return run.again.popleft()
        if not run.piles:
            return None
        pile = run.pile(seat.number)
        size, seconds = self._size(run, seat.number, pile)
        return None if seat.sent and seconds > DEEP else run.take(seat.number, pile, size)

    def _size(self, run: Run, number: int, pile: int) -> tuple[int, float]:
        """(rows, seconds) of the next work: probes until the pace is known, less and less towards the end."""
        batch = max(self.batches[part] for part in run.asked)
        if not run.asked.keys() <= self.pace.seconds.keys():
            return batch * min(64, 1 + run.heard), 0.0  # many answers without a pace: nothing there to be called with
        rows = run.ahead(number, pile, run.largest)
        decoded = number != NOBODY and pile == number
        costs = np.full(len(rows), 0.0 if decoded else self.pace.seconds.get(DECODE, 0.0))
        for part in run.asked.keys() - {DECODE}:
            costs += self.pace.seconds[part] * run.asked[part][rows]
        num_up = max(1, len(self.roster.up))
        worth = max(PER_WORK * num_up, self.pace.handing / HANDING)
        target = min(LONGEST, max(TARGET, worth))
        left = float(costs.mean()) * sum(map(len, run.piles.values()))
        share = left / (2 * num_up) if num_up > 1 else left  # the last works are small, so that all end together
        seconds = max(SHORTEST, min(target, share))
        ends = np.cumsum(costs)
        size = int(np.searchsorted(ends, OVER * seconds, side="right"))
        size = max(batch, size // batch * batch)
        return size, float(ends[min(size, len(ends)) - 1])

    def _send(self, run: Run, seat: Seat, job: Job) -> None:
        self.flying[seat.send(job, job.work(**run.told))] = seat
        self.counts["works"] += 1

    # -- hearing

    def _listen(self, run: Run) -> None:
        """Waits for one answer, a moment at most."""
        if not self.flying:
            self.roster.wait()
            return
        for ref in ray.wait(list(self.flying), num_returns=1, timeout=TICK)[0]:
            self._hear(run, self.flying[ref], ref)

    def _hear(self, run: Run, seat: Seat, ref: Any) -> None:
        try:
            job, outcome = seat.take(ref)
        except RayError as error:
            self._lose(run, seat)
            if isinstance(error, RayTaskError) and not isinstance(error.cause, MemoryError):
                raise  # no sample's doing: a worker lets nothing else through
            return
        del self.flying[ref]
        self._learn(outcome, seat.took)
        run.hear(seat.number, job, outcome)

    def _learn(self, outcome: Outcome, seconds: float | None = None) -> None:
        self.pace.learn(outcome, seconds)
        self.counts["restarts"] += outcome.restarts

    def _lose(self, run: Run, seat: Seat, late: bool = False) -> None:
        """Replaces an actor and has its works done by others. Only what was under way can be to blame."""
        for ref in seat.answers():  # it may have answered one before it died over the next
            with suppress(RayError):
                run.hear(seat.number, *seat.take(ref))
        self.flying = {ref: other for ref, other in self.flying.items() if other is not seat}
        for position, job in enumerate(self.roster.dismiss(seat, "lost")):
            if position == 0 and not job.settled:
                self._blame(run, job, late)
            elif not job.settled and not job.copies:
                job.alone = True  # innocent, but the next actor shall not lose anything with it if it is not
                run.again.appendleft(job)
        self.roster.grow(len(self.roster.seats) + 1)

    def _blame(self, run: Run, job: Job, late: bool) -> None:
        """Divides a job, at once where rewards share the actor's process; a single sample has several attempts."""
        job.deaths += 1
        attempts = 1 + self.limits.retries if late and not self.isolate else ATTEMPTS
        pieces = job.pieces() if job.deaths >= attempts or not self.isolate else []
        if pieces:
            self.counts["divided"] += 1
            run.settle(job)
            run.put(pieces)
        elif job.deaths < attempts and not job.copies:
            job.alone = True
            run.again.appendleft(job)
        elif not job.copies and late:
            run.fail(job, f"timed out: no answer within {self._allowed(job):g} s")
        elif not job.copies:
            run.fail(job, f"lost: the reward actor died {job.deaths} times under this sample")

    # -- what does not announce itself

    def _tick(self, run: Run) -> None:
        now = time.monotonic()
        if now - self.ticked < TICK:
            return
        self.ticked = now
        if self.stopping:
            raise RuntimeError(STOPPED)
        self.roster.look()
        for seat in [seat for seat in self.roster.up if seat.sent]:
            if now - seat.since > self._allowed(seat.sent[0][1]):
                self._lose(run, seat, late=True)
        if not run.piles and not run.again:
            self._resend(run, now)
        self.roster.grow(self._needed(run))

    def _resend(self, run: Run, now: float) -> None:
        """Stragglers are sent once more, to who has nothing to do."""
        idle = [seat for seat in self.roster.up if not seat.sent]
        for seat in self.roster.up:
            expected = 0.0
            for _, job in list(seat.sent):
                expected += self._expected(job) or math.inf
                spared = job.settled or job.resent or (job.alone and not self.isolate)
                if idle and not spared and now - seat.since > 3 * expected + 1:
                    job.resent = True
                    self.counts["resent"] += 1
                    self._send(run, idle.pop(), job)

    def _expected(self, job: Job) -> float | None:
        return self.pace.of({DECODE: len(job.rows), **{part: len(rows) for part, rows in job.asked.items()}})

    def _allowed(self, job: Job) -> float:
        """Seconds after which an actor is given up: long where its child is watched, and outlived, by the actor."""
        if self.isolate:
            each = (1 + self.limits.retries) * self.limits.timeout + GRACE
            return each * sum(map(len, job.asked.values())) + self.limits.startup + GRACE
        together = len(job.rows) if job.whole else min(len(job.rows), max(self.batches[part] for part in job.asked))
        return self.limits.timeout * together * len(job.asked) + 10 * (self._expected(job) or 0.0) + GRACE
