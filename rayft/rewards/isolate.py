"""``Isolated``: rewards in a child process that may crash, hang, leak or scribble, and exact blame for it.

The child announces each chunk before it begins, so that a death falls on known rows. They are tried again one by one:
a row is blamed for a crash only when it crashes a fresh child all alone, and for silence when it was silent alone. What
was done before the death is kept.
"""

from __future__ import annotations

import os
import pickle
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import cloudpickle
import numpy as np

from rayft import imports
from rayft.rewards.line import STALL, Died, Line
from rayft.rewards.worker import Limits, Outcome
from rayft.score import CHUNK_SECONDS, DECODE, Begin, Done, Task, Told, Work, words

ATTEMPTS = 3  # to build a child again, and deaths that fall on no row, before the rest of a work is given up
SILENT = 10  # samples that time out in a row before the rest of a work is not tried


class _HopelessError(Exception):
    """What is left of a work cannot be carried out; says why."""


class Isolated:
    """A worker whose rewards live in a child process."""

    def __init__(self, told: Told, limits: Limits = Limits()) -> None:  # noqa: B008 - frozen
        if not hasattr(os, "fork"):
            raise ValueError(f"{sys.platform} has no fork, which isolated rewards need; set scoring.isolate: false")
        parts = tuple(replace(part, path=imports.portable(part.path)) for part in told.parts)
        try:
            packed = cloudpickle.dumps(replace(told, parts=parts, canonical=imports.portable(told.canonical)))
        except Exception as error:
            raise ValueError(f"the rewards cannot be sent to a process of their own: {words(error)}") from error
        self.line, self.limits, self.starts = Line(packed, limits), limits, 0
        self.silent = 0  # samples that timed out since one was answered

    def start(self) -> None:
        """Builds the rewards, unless they are there. A ``ValueError`` says which one cannot be built, and why."""
        if not self.line.alive():
            self.line.open()
            self.starts += 1

    def work(self, work: Work) -> Outcome:
        """All of it, whatever its samples do to the child."""
        if not self.starts:
            self.start()
        starts, job, tasks = self.starts, _Job(work), work.tasks
        try:
            job.packed = cloudpickle.dumps(replace(work, tasks=()), pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            job.give_up(tasks, f"not called: samples that cannot be pickled: {words(error)}")
            return job.outcome
        try:
            for attempt in range(self.limits.retries + 1):
                if attempt:
                    tasks = job.again([groupwise for groupwise, _ in self.line.kinds])
                self._carry_out(job, tasks)
        except _HopelessError as error:
            job.give_up(tasks, str(error))
        except BaseException:  # Ctrl-C: what the child is busy with is nobody's any more
            self.stop()
            raise
        job.outcome.restarts = self.starts - starts
        return job.outcome

    def stop(self) -> None:
        """Ends all processes; ``work`` would start them again."""
        self.line.close()

    def _carry_out(self, job: _Job, tasks: Sequence[Task]) -> None:
        """The tasks through as many children as it takes; ``_HopelessError`` when that leads nowhere."""
        trials, unexplained = deque([_Trial(tuple(tasks))]), 0
        while trials:
            trial = trials.popleft()
            left = job.left(trial.tasks)
            if not left:
                continue
            if trial.alone:
                self.line.end()
            try:
                self._rebuild()
                self._follow(job, left)
                job.give_up(left, "lost: the scoring process went past it")  # nothing is left, if we are right
            except Died as died:
                trials.appendleft(trial)
                begun = job.begun
                unexplained = 0 if begun else unexplained + 1
                if unexplained == ATTEMPTS:
                    raise _HopelessError(died.reason) from None
                if begun is None:
                    continue
                one = len(begun.rows) == 1 or self._kind(begun.part)[0]
                if one and (trial.alone or died.late):
                    job.blame(begun, died.reason)
                    self._patience(died.late)
                else:
                    trials.appendleft(_Trial(self._suspects(job, begun, left), alone=one))

    def _patience(self, late: bool) -> None:
        """A reward that has stopped answering must not cost the time-out of every sample."""
        self.silent += late
        if late and self.silent >= SILENT:
            raise _HopelessError(f"timed out: {self.silent} samples in a row gave no answer, so this one was not tried")

    def _suspects(self, job: _Job, begun: Begin, left: tuple[Task, ...]) -> tuple[Task, ...]:
        """What a child was busy with when it died, one by one. Each of these tasks brings the work forward."""
        if begun.part != DECODE:
            return (Task(begun.part, begun.rows, single=True),)
        first = job.left((Task(DECODE, begun.rows, single=True),))
        if first:
            return first
        found = []  # decoded before, by a child that died since
        for task in left:
            rows = task.rows if self._kind(task.part)[0] else np.intersect1d(task.rows, begun.rows)
            found += [Task(task.part, rows, single=True)] if len(rows) else []
        return tuple(found)

    def _rebuild(self) -> None:
        """A child, if there is none."""
        for attempt in range(ATTEMPTS):
            try:
                return self.start()
            except ValueError as error:
                if attempt == ATTEMPTS - 1:
                    raise _HopelessError(f"not called: {error}") from None
        return None

    def _follow(self, job: _Job, tasks: tuple[Task, ...]) -> None:
        """The child through these tasks, to the end or to its death."""
        job.begun = None
        packed = pickle.dumps(tasks, pickle.HIGHEST_PROTOCOL)
        if self.line.holds is job:
            self.line.say(packed)
        else:
            self.line.say(job.packed, packed)
            self.line.holds = job
        seconds = STALL
        while True:
            kind, said = self.line.hear(seconds)
            if kind == "heard":
                for one in said:
                    if one is None:
                        return
                    seconds = self._note(job, one)
            elif kind == "memory":
                self.line.end()
                most = self.limits.memory_gb
                told = said if most is None else f"more than {most:g} GB beyond what was built (scoring.memory_gb)"
                raise Died(f"out of memory: {told}")
            else:
                self.line.holds = None
                raise _HopelessError(f"not called: the scoring process cannot read the samples: {said}")

    def _note(self, job: _Job, said: Begin | Done) -> float:
        """The seconds in which something more must be heard."""
        if isinstance(said, Begin):
            job.begin(said)
            return self._allowed(said)
        job.take(said)
        if said.part != DECODE:
            self.silent = 0
        return STALL

    def _kind(self, part: int) -> tuple[bool, bool]:
        """(is it groupwise, does it declare a batch size)."""
        return (False, False) if part == DECODE else self.line.kinds[part]

    def _allowed(self, begun: Begin) -> float:
        if any(self._kind(begun.part)):
            return self.limits.timeout * len(begun.rows)
        return self.limits.timeout + (2 * CHUNK_SECONDS if len(begun.rows) > 1 else 0.0)  # all of it, if none is slow


@dataclass(frozen=True)
class _Trial:
    """Tasks that are carried out one after the other; ``alone``: in a fresh child, as all that it has ever done."""

    tasks: tuple[Task, ...]
    alone: bool = False


@dataclass(eq=False)
class _Job:
    """A Work under way: what is done, and what the child is busy with."""

    work: Work
    packed: bytes = b""
    outcome: Outcome = field(init=False)
    done: dict[int, np.ndarray] = field(init=False)  # part -> [row], in this attempt
    unreadable: np.ndarray = field(init=False)  # [row] the decoder failed, in this attempt
    begun: Begin | None = None
    since: float = 0.0

    def __post_init__(self) -> None:
        self.outcome = Outcome(len(self.work.numbers))
        self._nothing_done()

    def again(self, groupwise: Sequence[bool]) -> tuple[Task, ...]:
        """Another attempt at what failed."""
        self._nothing_done()
        return self.outcome.again(self.work, groupwise)

    def begin(self, said: Begin) -> None:
        """The child is busy with these rows."""
        self.begun, self.since = said, time.monotonic()

    def take(self, said: Done) -> None:
        """The child has finished these rows."""
        self.begun = None
        self.outcome.take(said)
        self.done[said.part][said.rows] = True
        if said.part == DECODE and said.errors:
            self.unreadable[list(said.errors)] = True

    def blame(self, begun: Begin, reason: str) -> None:
        """These rows have failed, and are done with."""
        reason = f"decoder {reason}" if begun.part == DECODE else reason
        values, errors = np.full(len(begun.rows), np.nan), dict.fromkeys(begun.rows.tolist(), reason)
        self.take(Done(begun.part, begun.rows, values, time.monotonic() - self.since, errors))

    def left(self, tasks: Sequence[Task]) -> tuple[Task, ...]:
        """The tasks without what is done, and without events that the decoder fails on."""
        found = []
        for task in tasks:
            over = self.done[task.part] if task.part == DECODE else self.done[task.part] | self.unreadable
            rows = task.rows[~over[task.rows]]
            if len(rows):
                found.append(Task(task.part, rows, task.single))
        return tuple(found)

    def _nothing_done(self) -> None:
        parts = {DECODE, *(task.part for task in self.work.tasks)}
        self.done = {part: np.zeros(len(self.work.numbers), dtype=bool) for part in parts}
        self.unreadable = np.zeros(len(self.work.numbers), dtype=bool)

    def give_up(self, tasks: Sequence[Task], reason: str) -> None:
        """What is left of the tasks has failed."""
        for task in self.left(tasks):
            self.outcome.fail(task.part, task.rows, reason)
            self.done[task.part][task.rows] = True
