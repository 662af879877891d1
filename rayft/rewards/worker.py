"""What carries out work: ``Inline`` in this process, ``Isolated`` (isolate.py) in a child that may die.

Both turn the stream of Begin and Done into an ``Outcome``; neither raises for what a sample does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from rayft.score import DECODE, Done, Task, Told, Work, Workbench


@dataclass(frozen=True)
class Limits:
    """What a reward may take before it is given up on; ``ScoringSettings`` (settings.py) has a sentence for each."""

    timeout: float = 60.0
    startup: float = 300.0
    memory_gb: float | None = None
    retries: int = 0
    threads: int = 1
    """Threads for numpy and torch within one process."""


@dataclass
class Outcome:
    """What became of one work, aligned with its events. A row that was not asked for stays NaN, without an error."""

    num_rows: int
    found: np.ndarray = field(init=False)  # [row] 1 decoded, 0 undecodable, NaN failed or decoded in an earlier pass
    values: dict[int, np.ndarray] = field(init=False)  # part -> [row] float64
    seconds: dict[int, np.ndarray] = field(init=False)  # part (DECODE too) -> [row] seconds of one sample
    errors: dict[tuple[int, int], str] = field(default_factory=dict)  # (part, row) -> "kind: detail"
    extras: dict[tuple[int, str], np.ndarray] = field(default_factory=dict)  # (part, name) -> [row]
    labels: dict[int, str] = field(default_factory=dict)  # row -> label, where keys were asked for
    digests: dict[int, tuple[bytes | None, ...]] = field(default_factory=dict)
    calls: dict[int, int] = field(default_factory=lambda: defaultdict(int))  # part -> samples it was called with
    restarts: int = 0

    def __post_init__(self) -> None:
        self.found = np.full(self.num_rows, np.nan)
        self.values, self.seconds = {}, {}

    def take(self, said: Done) -> None:
        """Adds what is finished."""
        if said.part == DECODE:
            self.found[said.rows] = said.values
        else:
            self._column(self.values, said.part)[said.rows] = said.values
            self.calls[said.part] += len(said.rows) * said.called
        if said.called:
            self._column(self.seconds, said.part)[said.rows] = said.seconds / len(said.rows)
        for row in said.rows.tolist() if self.errors else ():
            self.errors.pop((said.part, row), None)  # an earlier attempt's
        self.errors |= {(said.part, row): reason for row, reason in said.errors.items()}
        for name, column in said.extras.items():
            self._column(self.extras, (said.part, name))[said.rows] = column
        self.labels |= dict(zip(said.rows.tolist(), said.labels, strict=False))
        self.digests |= dict(zip(said.rows.tolist(), said.digests, strict=False))

    def fail(self, part: int, rows: np.ndarray, reason: str) -> None:
        """Rows that were given up without a call."""
        if part != DECODE:
            self._column(self.values, part)
        for row in rows.tolist():
            self.errors.setdefault((part, row), reason)  # why an earlier attempt failed says more

    def again(self, work: Work, groupwise: Sequence[bool]) -> tuple[Task, ...]:
        """What deserves another attempt, singly: what raised, crashed or timed out, but not what answered NaN or None.

        A group is scored anew as a whole.
        """
        failed = {key for key, reason in self.errors.items() if not reason.startswith("returned")}
        tasks = []
        for task in work.tasks if failed else ():
            rows = [row for row in task.rows.tolist() if {(task.part, row), (DECODE, row)} & failed]
            whole = task.part != DECODE and groupwise[task.part]
            if rows:
                tasks.append(Task(task.part, task.rows if whole else np.array(rows), single=True))
        return tuple(tasks)

    def _column(self, columns: dict, key: object) -> np.ndarray:
        if key not in columns:
            columns[key] = np.full(self.num_rows, np.nan)
        return columns[key]


class Worker(Protocol):
    """Whoever carries out work."""

    def work(self, work: Work) -> Outcome: ...

    def stop(self) -> None: ...


class Inline:
    """The rewards in this process: nothing is survived but exceptions. For GPU rewards, and for debuggers."""

    def __init__(self, told: Told, limits: Limits = Limits()) -> None:
        self.bench, self.limits = Workbench(told), limits
        self.groupwise = [reward.groupwise for reward in self.bench.rewards]

    def work(self, work: Work) -> Outcome:
        """All of it, here and now. A ``KeyboardInterrupt`` is taken for Ctrl-C, whoever raises it."""
        outcome, tasks = Outcome(len(work.numbers)), work.tasks
        for attempt in range(self.limits.retries + 1):
            tasks = outcome.again(work, self.groupwise) if attempt else tasks
            for said in self.bench.run(replace(work, tasks=tasks)):
                if isinstance(said, Done):
                    outcome.take(said)
        return outcome

    def stop(self) -> None:
        """Nothing to end."""
