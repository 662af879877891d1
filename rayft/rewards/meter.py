"""What rewards cost, by purpose (payoff, train, evaluate, pretrained, watch, score) and part: counts and seconds.

    asked = calls + hits + duplicates,    failed <= asked

Memory is bounded whatever is metered: durations lie in log-spaced bins, samples and reasons are kept up to a number.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import ray
from ray.util import metrics

SHORTEST, STEP, BINS = 1e-7, 1.05, 600  # the longest bin ends at 5e5 seconds
SAMPLES, REASONS = 20, 100  # slowest and failed samples, and reasons, that are kept
OBSERVED = 200  # durations of one call that a Prometheus histogram is told
BOUNDARIES = [1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 1000.0]  # seconds


class Seconds:
    """Durations. A percentile is within 2.5% of the exact one: half a bin, sqrt(STEP) - 1."""

    def __init__(self, bins: Mapping[str, int] | None = None, total: float = 0.0) -> None:
        self.counts, self.total = np.zeros(BINS, dtype=np.int64), total
        for place, count in (bins or {}).items():
            self.counts[int(place)] = count

    def add(self, seconds: np.ndarray) -> None:
        """More durations, all finite."""
        places = np.floor(np.log(np.maximum(seconds, SHORTEST) / SHORTEST) / math.log(STEP)).astype(int)
        self.counts += np.bincount(np.minimum(places, BINS - 1), minlength=BINS)
        self.total += float(seconds.sum())

    def percentile(self, percent: float) -> float | None:
        """The duration that ``percent`` of them do not exceed; None where there is none."""
        upto = np.cumsum(self.counts)
        if not upto[-1]:
            return None
        place = int(np.searchsorted(upto, max(1, math.ceil(percent / 100 * upto[-1]))))
        return SHORTEST * STEP ** (place + 0.5)

    def bins(self) -> dict[str, int]:
        """The bins that are not empty."""
        return {str(place): int(self.counts[place]) for place in np.flatnonzero(self.counts)}


class Counts(NamedTuple):
    """What was paid, in five numbers."""

    calls: int = 0
    hits: int = 0
    duplicates: int = 0
    failed: int = 0
    seconds: float = 0.0

    def minus(self, other: Counts) -> Counts:
        calls, hits, duplicates, failed = (int(mine - its) for mine, its in zip(self[:4], other[:4], strict=True))
        return Counts(calls, hits, duplicates, failed, self.seconds - other.seconds)


@dataclass
class Tally:
    """All about one part of the reward for one purpose."""

    calls: int = 0
    hits: int = 0
    duplicates: int = 0
    kinds: Counter[str] = field(default_factory=Counter)  # the text of a reason before its ":"
    reasons: dict[str, tuple[int, str]] = field(default_factory=dict)  # reason -> (count, label of one sample)
    seconds: Seconds = field(default_factory=Seconds)
    slowest: list[tuple[float, str]] = field(default_factory=list)  # (seconds, label), the slowest first
    failed: deque[tuple[str, str]] = field(default_factory=lambda: deque(maxlen=SAMPLES))  # the last: (reason, label)

    @property
    def counts(self) -> Counts:
        return Counts(self.calls, self.hits, self.duplicates, self.kinds.total(), self.seconds.total)

    def fail(self, reason: str, label: str) -> None:
        """One more sample without a score."""
        kind = reason.partition(":")[0]
        self.kinds[kind] += 1
        self.failed.append((reason, label))
        known = reason if reason in self.reasons or len(self.reasons) < REASONS else f"{kind}: other reasons"
        count, first = self.reasons.get(known, (0, label))
        self.reasons[known] = (count + 1, first)

    def time(self, seconds: np.ndarray, labels: Mapping[int, str]) -> None:
        """Seconds of each sample; NaN where it was not called."""
        rows = np.flatnonzero(np.isfinite(seconds))
        self.seconds.add(seconds[rows])
        longest = rows[np.argsort(-seconds[rows], kind="stable")[:SAMPLES]].tolist()
        new = [(float(seconds[row]), labels.get(row, "")) for row in longest]
        self.slowest = sorted(self.slowest + new, key=lambda one: -one[0])[:SAMPLES]

    def summary(self) -> dict[str, Any]:
        by_count = sorted(self.reasons.items(), key=lambda item: -item[1][0])
        return {
            **self.counts._asdict(),
            "seconds": {"total": self.seconds.total, **{f"p{q}": self.seconds.percentile(q) for q in (50, 95, 99)}},
            "failures": dict(self.kinds.most_common()),
            "reasons": [{"reason": text, "count": count, "label": label} for text, (count, label) in by_count],
            "slowest": [{"seconds": seconds, "label": label} for seconds, label in self.slowest],
            "last_failed": [{"reason": reason, "label": label} for reason, label in self.failed],
        }

    def state(self) -> dict[str, Any]:
        """JSON-able."""
        plain = {"calls": self.calls, "hits": self.hits, "duplicates": self.duplicates, "kinds": dict(self.kinds)}
        kept = {"slowest": self.slowest, "failed": list(self.failed), "reasons": self.reasons}
        return {**plain, **kept, "bins": self.seconds.bins(), "total": self.seconds.total}

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Tally:
        """The tally again."""
        return cls(
            calls=state["calls"],
            hits=state["hits"],
            duplicates=state["duplicates"],
            kinds=Counter(state["kinds"]),
            reasons={reason: (count, label) for reason, (count, label) in state["reasons"].items()},
            seconds=Seconds(state["bins"], state["total"]),
            slowest=[(seconds, label) for seconds, label in state["slowest"]],
            failed=deque(((reason, label) for reason, label in state["failed"]), maxlen=SAMPLES),
        )


class Meter:
    """The tallies of a run. What a resumed run counts goes on from the state of its checkpoint."""

    def __init__(self) -> None:
        self.tallies: dict[tuple[str, str], Tally] = {}  # (purpose, part)
        self.num_undecodable: Counter[str] = Counter()  # purpose -> events
        self.told: dict[str, Counter[str]] = {}  # part -> failures by kind, when they were last spoken of
        self.exporter = Exporter()

    def add(
        self,
        purpose: str,
        part: str,
        *,
        calls: int = 0,
        hits: int = 0,
        duplicates: int = 0,
        seconds: np.ndarray | None = None,
        errors: Mapping[int, str] | None = None,
        labels: Mapping[int, str] | None = None,
    ) -> None:
        """Adds what one pass over some samples cost; ``seconds``, ``errors`` and ``labels`` go by the same rows."""
        tally = self.tallies.setdefault((purpose, part), Tally())
        labels, durations = labels or {}, np.asarray([] if seconds is None else seconds, dtype=np.float64)
        tally.calls += int(calls)
        tally.hits += int(hits)
        tally.duplicates += int(duplicates)
        tally.time(durations, labels)
        for row, reason in (errors or {}).items():
            tally.fail(reason, labels.get(row, ""))
        kinds = Counter(reason.partition(":")[0] for reason in (errors or {}).values())
        self.exporter.tell(purpose, part, calls, hits, kinds, durations[np.isfinite(durations)])

    def undecodable(self, purpose: str, num: int) -> None:
        """Events that decoded to nothing: no call was paid for them."""
        self.num_undecodable[purpose] += int(num)

    @property
    def total_calls(self) -> int:
        """Samples that a reward was called with, for all purposes and parts."""
        return sum(tally.calls for tally in self.tallies.values())

    def mark(self) -> dict[tuple[str, str], Counts]:
        """Where the counts stand, for ``since``."""
        return {place: tally.counts for place, tally in self.tallies.items()}

    def since(self, mark: Mapping[tuple[str, str], Counts]) -> dict[tuple[str, str], Counts]:
        """(purpose, part) -> what was paid since; those without any are left out."""
        found = {place: now.minus(mark.get(place, Counts())) for place, now in self.mark().items()}
        return {place: counts for place, counts in found.items() if any(counts)}

    def sentences(self) -> list[str]:
        """What a person should be told now: failures of a new kind, or twice as many of a kind as when last told."""
        said = []
        for part in dict.fromkeys(part for _, part in self.tallies):
            tallies = [tally for (_, name), tally in self.tallies.items() if name == part]
            kinds = sum((tally.kinds for tally in tallies), Counter())
            told = self.told.get(part, Counter())
            if any(count >= 2 * told[kind] for kind, count in kinds.items()):
                self.told[part] = kinds
                said.append(_sentence(part, tallies, " so far" if told else ""))
        return said

    def summary(self) -> dict[str, Any]:
        """Everything for a person, JSON-able: purpose -> part -> counts, seconds, reasons, samples."""
        purposes: dict[str, Any] = {}
        for purpose in dict.fromkeys([*(purpose for purpose, _ in self.tallies), *self.num_undecodable]):
            parts = {part: tally.summary() for (name, part), tally in self.tallies.items() if name == purpose}
            purposes[purpose] = {"undecodable": self.num_undecodable[purpose], "parts": parts}
        return {"total_calls": self.total_calls, "purposes": purposes}

    def state(self) -> dict[str, Any]:
        """Everything for a checkpoint, JSON-able."""
        tallies = [[purpose, part, tally.state()] for (purpose, part), tally in self.tallies.items()]
        told = {part: dict(kinds) for part, kinds in self.told.items()}
        return {"tallies": tallies, "undecodable": dict(self.num_undecodable), "told": told}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes the place of all that was counted here."""
        self.tallies = {(purpose, part): Tally.restored(tally) for purpose, part, tally in state["tallies"]}
        self.num_undecodable = Counter(state["undecodable"])
        self.told = {part: Counter(kinds) for part, kinds in state["told"].items()}


def _sentence(part: str, tallies: list[Tally], so_far: str) -> str:
    reasons: Counter[str] = Counter()
    for tally in tallies:
        reasons.update({reason: count for reason, (count, _) in tally.reasons.items()})
    failed = sum(tally.kinds.total() for tally in tallies)
    asked = max(failed, sum(tally.calls + tally.hits + tally.duplicates for tally in tallies))
    listed = ", ".join(f"{' '.join(reason.split())[:120]} ({count:,})" for reason, count in reasons.most_common(3))
    others = f" and {len(reasons) - 3} other reasons" if len(reasons) > 3 else ""
    return f"{part} failed on {failed:,} of {asked:,} samples{so_far}: {listed}{others}"


class Exporter:
    """The same as Prometheus metrics of this process, once Ray is up; silent for good if that fails."""

    def __init__(self) -> None:
        self.made: tuple[metrics.Counter, metrics.Counter, metrics.Counter, metrics.Histogram] | None = None
        self.failed = False

    def tell(
        self, purpose: str, part: str, calls: int, hits: int, kinds: Mapping[str, int], seconds: np.ndarray
    ) -> None:
        """Of many durations, evenly spaced ones are told."""
        if self.failed or not ray.is_initialized():
            return
        tags = {"purpose": purpose, "part": part}
        try:
            self.made = self.made or self._make()
            told = [(self.made[0], calls, tags), (self.made[1], hits, tags)]
            told += [(self.made[2], count, {**tags, "kind": kind}) for kind, count in kinds.items()]
            for counter, count, tagged in told:
                if count:
                    counter.inc(count, tagged)
            for duration in seconds[:: max(1, math.ceil(len(seconds) / OBSERVED))].tolist():
                self.made[3].observe(duration, tags)
        except Exception:  # whatever Ray's exporter raises: a run is not lost for want of its metrics
            self.failed = True

    @staticmethod
    def _make() -> tuple[metrics.Counter, metrics.Counter, metrics.Counter, metrics.Histogram]:
        tags = ("purpose", "part")
        return (
            metrics.Counter("rayft_reward_calls_total", "Samples that a reward was called with.", tags),
            metrics.Counter("rayft_reward_cache_hits_total", "Scores that the cache had.", tags),
            metrics.Counter("rayft_reward_failures_total", "Samples without a score.", (*tags, "kind")),
            metrics.Histogram("rayft_reward_seconds", "Seconds for one sample.", BOUNDARIES, tags),
        )
