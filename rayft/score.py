"""Decode events and call rewards on them, in whatever process this is imported; numpy only, so that it stays small.

Work is done in chunks of about 0.1 s, each announced before it begins: who watches the process knows at any moment
which samples it is busy with, and can blame the right ones when it dies.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np

from rayft import imports
from rayft.reward import Reward, arity, build, digest, itself, label

DECODE = -1  # in place of a part's number
UNREADABLE = object()  # in place of a sample where the decoder itself failed
CHUNK_SECONDS, LARGEST_CHUNK = 0.2, 4096
CALLS_HELD = 2  # calls whose decoded samples are kept, for a second pass over the same events


# -- what a scoring process is told


@dataclass(frozen=True)
class Part:
    """One black box: a reward, where it is found and what it is built with."""

    name: str
    path: Any  # short name, import path, packed bytes, or an object (this process only)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    identity: str = ""  # what cache keys begin with


@dataclass(frozen=True)
class Told:
    """All that a scoring process knows: its rewards, and how a domain's events become samples."""

    parts: tuple[Part, ...]
    decoder: str | None = None  # import path of (x_0, context) -> samples; None: events are samples already
    canonical: Any = "rayft.reward:itself"  # import path of sample -> canonical form
    short_names: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """Rows of a work that one part, or the decoder, is asked for."""

    part: int
    rows: np.ndarray  # indices into the work's events
    single: bool = False  # one sample a call: how the culprit among suspects is found


@dataclass(frozen=True)
class Work:
    """A slice of a call's events and what is asked about them."""

    call: int  # decoded samples are kept by (call, event)
    numbers: np.ndarray  # the events' numbers in the call
    events: Any  # [row, *event], or a list of samples
    context: Mapping[str, np.ndarray]
    tasks: tuple[Task, ...]
    keys: bool = False  # return labels and digests of what is decoded
    metadata: Mapping[str, Any] = field(default_factory=dict)


# -- what it says while it works


@dataclass(frozen=True)
class Begin:
    """These rows of this part are being worked on now."""

    part: int
    rows: np.ndarray


@dataclass(frozen=True)
class Done:
    """They are finished. ``values`` NaN where ``errors`` has a reason; of a decoder: 1 found, 0 undecodable."""

    part: int
    rows: np.ndarray
    values: np.ndarray
    seconds: float
    errors: Mapping[int, str] = field(default_factory=dict)  # row -> "kind: detail"
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)  # name -> number per row
    labels: Sequence[str] = ()  # of a decoder that was asked for keys
    digests: Sequence[tuple[bytes | None, ...]] = ()  # per row, one for each part; None: not to be cached
    called: bool = True  # False: undecodable events, whose value is the reward's constant


class Workbench:
    """The decoder and the rewards of one process, and the samples decoded last.

    Whatever user code raises is that sample's failure, ``SystemExit`` too; only ``fatal`` goes through.
    """

    def __init__(
        self,
        told: Told,
        fatal: tuple[type[BaseException], ...] = (KeyboardInterrupt,),
        announce: Callable[[Part], None] = lambda part: None,
    ) -> None:
        self.decode: Callable[..., Sequence[Any]] | None = None if told.decoder is None else imports.load(told.decoder)
        made = {str: imports.load, bytes: imports.unpack}.get(type(told.canonical))
        self.canonical = told.canonical if made is None else made(told.canonical)
        self.told, self.fatal = told, fatal
        self.rewards: list[Reward] = []
        for part in told.parts:
            announce(part)
            path = imports.unpack(part.path) if isinstance(part.path, bytes) else part.path
            self.rewards.append(build(path, part.arguments, told.short_names))
        self.arity = [arity(reward) for reward in self.rewards]
        self.sizes = dict.fromkeys(range(DECODE, len(self.rewards)), 1)
        self.held: OrderedDict[int, dict[int, Any]] = OrderedDict()

    def run(self, work: Work) -> Iterator[Begin | Done]:
        """Begin, Done, Begin, Done ... through the tasks. Only single tasks retry what the decoder failed on."""
        samples = self._held_for(work)
        for task in work.tasks:
            rows = list(zip(task.rows.tolist(), work.numbers[task.rows].tolist(), strict=True))
            held = samples.keys()
            if task.single:
                held = {number for _, number in rows if samples.get(number, UNREADABLE) is not UNREADABLE}
            missing = np.array([row for row, number in rows if number not in held], dtype=int)
            yield from self._decode(work, missing, samples, task.single)
            if task.part != DECODE:
                decoded = {row: samples[number] for row, number in rows}
                empty = np.array([row for row, sample in decoded.items() if sample is None], dtype=int)
                if len(empty):  # no call: what an undecodable event scores is the reward's own constant
                    values = np.full(len(empty), float(self.rewards[task.part].undecodable))
                    yield Done(task.part, empty, values, 0.0, called=False)
                found = [row for row, sample in decoded.items() if sample is not None and sample is not UNREADABLE]
                yield from self._score(work, task.part, np.array(found, dtype=int), samples, task.single)

    def _held_for(self, work: Work) -> dict[int, Any]:
        samples = self.held.setdefault(work.call, {})
        self.held.move_to_end(work.call)
        while len(self.held) > CALLS_HELD:
            self.held.popitem(last=False)
        return samples

    def _decode(self, work: Work, rows: np.ndarray, samples: dict[int, Any], single: bool) -> Iterator[Begin | Done]:
        for chunk in self._chunks(DECODE, rows, single):
            yield Begin(DECODE, chunk)
            start = time.perf_counter()
            try:
                found, errors = self._decoded(work, chunk), {}
                pairs = zip(found, chunk.tolist(), strict=True)
                keys = [self._keys(sample, row, work) for sample, row in pairs] if work.keys else []
            except self.fatal:
                raise
            except BaseException as error:
                if len(chunk) > 1:
                    yield from self._decode(work, chunk, samples, single=True)
                    continue
                found, errors = [UNREADABLE], {int(chunk[0]): f"decoder {failure(error)}"}
                keys = [("undecodable", (None,) * len(self.rewards))] if work.keys else []
            samples.update(zip(work.numbers[chunk].tolist(), found, strict=True))
            values = np.array([np.nan if errors else float(sample is not None) for sample in found])
            seconds = self._timed(DECODE, start, len(chunk), single)
            labels, digests = [key[0] for key in keys], [key[1] for key in keys]
            yield Done(DECODE, chunk, values, seconds, errors, {}, labels, digests)

    def _decoded(self, work: Work, rows: np.ndarray) -> list[Any]:
        if self.decode is None:
            return [work.events[row] for row in rows]
        found = list(self.decode(work.events[rows], {k: v[rows] for k, v in work.context.items()}))
        if len(found) != len(rows):
            raise ValueError(f"the decoder returned {len(found)} samples for {len(rows)} events")
        return found

    def _keys(self, sample: Any, row: int, work: Work) -> tuple[str, tuple[bytes | None, ...]]:
        if sample is None:
            return "undecodable", (None,) * len(self.rewards)
        plain = self.canonical(sample)
        digests = []
        for part, reward, takes in zip(self.told.parts, self.rewards, self.arity, strict=True):
            own = reward.canonical(sample) if reward.canonical is not None else plain
            context = {k: v[row] for k, v in work.context.items()} if takes > 1 else {}
            keyed = not reward.groupwise and part.identity
            digests.append(digest(own, part.identity, context) if keyed else None)
        return label(plain), tuple(digests)

    def _score(
        self, work: Work, part: int, rows: np.ndarray, samples: dict[int, Any], single: bool
    ) -> Iterator[Begin | Done]:
        reward = self.rewards[part]
        for chunk in self._chunks(part, rows, single):
            yield Begin(part, chunk)
            start = time.perf_counter()
            try:
                values, errors, extras = self._called(work, part, chunk, samples)
            except self.fatal:
                raise
            except BaseException as error:
                if len(chunk) > 1 and not reward.groupwise:
                    yield from self._score(work, part, chunk, samples, single=True)
                    continue
                values, extras = np.full(len(chunk), np.nan), {}
                errors = dict.fromkeys(range(len(chunk)), failure(error))
            seconds = self._timed(part, start, len(chunk), single or reward.groupwise)
            yield Done(part, chunk, values, seconds, {int(chunk[i]): text for i, text in errors.items()}, extras)

    def _called(
        self, work: Work, part: int, rows: np.ndarray, samples: dict[int, Any]
    ) -> tuple[np.ndarray, dict[int, str], dict[str, np.ndarray]]:
        given: list[Any] = [[samples[number] for number in work.numbers[rows].tolist()]]
        if self.arity[part] > 1:
            given.append([{k: v[row] for k, v in work.context.items()} for row in rows])
        if self.arity[part] > 2:
            given.append([dict(work.metadata) for _ in rows])
        return read(self.rewards[part](*given), len(rows))

    def _chunks(self, part: int, rows: np.ndarray, single: bool) -> Iterator[np.ndarray]:
        reward = None if part == DECODE else self.rewards[part]
        while len(rows):
            size = self.sizes[part] if reward is None or reward.batch_size is None else reward.batch_size
            size = len(rows) if reward is not None and reward.groupwise else 1 if single else size
            yield rows[:size]
            rows = rows[size:]

    def _timed(self, part: int, start: float, num: int, fixed: bool) -> float:
        """Seconds since ``start``; the next chunk of this part is larger or smaller accordingly."""
        seconds = time.perf_counter() - start
        if not fixed and num >= self.sizes[part] and seconds < CHUNK_SECONDS / 2:
            self.sizes[part] = min(LARGEST_CHUNK, 2 * self.sizes[part])
        elif not fixed and seconds > 2 * CHUNK_SECONDS:
            self.sizes[part] = max(1, self.sizes[part] // 2)
        return seconds


# -- what a reward may return


class MisfitError(ValueError):
    """A reward's answer that is not one number per sample."""


def words(error: BaseException) -> str:
    """An exception in a few words, also one that cannot be printed."""
    try:
        return imports.reason(error)
    except BaseException:
        return f"{type(error).__name__}, which cannot be printed"


def failure(error: BaseException) -> str:
    """The reason of a sample on which user code raised."""
    if isinstance(error, MemoryError):
        return f"out of memory: {words(error)}"
    kind = "returned" if isinstance(error, MisfitError) else getattr(type(error), "kind", "raised")
    return f"{kind}: {words(error)}"


def read(answer: Any, expected: int) -> tuple[np.ndarray, dict[int, str], dict[str, np.ndarray]]:
    """(values, reasons by position, extras) of what a reward returned; ``MisfitError`` where it has the wrong shape."""
    told: Mapping[str, Any] = {}
    if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], Mapping):
        answer, told = answer
    values, errors = _numbers(answer, expected)
    extras = {}
    for name, column in told.items():
        try:
            extras[str(name)] = np.broadcast_to(np.asarray(column, dtype=np.float64), (expected,)).copy()
        except (TypeError, ValueError):
            continue  # pictures, texts: not for a log of numbers
    return values, errors, extras


def _numbers(answer: Any, expected: int) -> tuple[np.ndarray, dict[int, str]]:
    if hasattr(answer, "detach"):
        answer = answer.detach().cpu().numpy()
    if isinstance(answer, str | bytes | Mapping | Set) or not hasattr(answer, "__len__"):
        raise MisfitError(f"{type(answer).__name__} {str(answer)[:60]!r}; return one number per sample")
    if isinstance(answer, np.ndarray) and answer.ndim != 1:
        raise MisfitError(f"an array of shape {answer.shape} for {expected} samples; return one number per sample")
    if len(answer) != expected:
        raise MisfitError(f"{len(answer)} scores for {expected} samples; return one number per sample")
    if isinstance(answer, np.ndarray) and answer.dtype.kind in "biuf":
        values = np.ma.filled(answer.astype(np.float64), np.nan)  # masked: no number
    else:
        values = np.array([_number(score) for score in answer], dtype=np.float64)
    wrong = np.flatnonzero(~np.isfinite(values))
    errors = {int(i): f"returned: {answer[i]}" for i in wrong}
    values[wrong] = np.nan
    return values, errors


def _number(score: Any) -> float:
    if score is None:
        return np.nan
    if hasattr(score, "item"):
        score = score.item()
    if not isinstance(score, Real):
        raise MisfitError(f"{type(score).__name__} {str(score)[:60]!r} as a score; return numbers")
    return float(score)


def call(
    reward: Reward, samples: list[Any], context: Mapping[str, np.ndarray] | None = None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """(one score per sample, a few reasons), in this process: NaN marks the samples it failed on."""
    bench = Workbench(Told((Part("reward", reward),), None, itself))
    numbers = np.arange(len(samples))
    work = Work(0, numbers, samples, context or {}, (Task(0, numbers),))
    values, errors = np.full(len(samples), np.nan), {}
    for said in bench.run(work):
        if isinstance(said, Done) and said.part != DECODE:
            values[said.rows] = said.values
            errors |= said.errors
    return values, tuple(errors.values())[:5]


# -- what the engine gets


@dataclass(frozen=True)
class Scores:
    """Rewards in the order of the events; NaN where scoring failed, with the reason in ``errors``."""

    rewards: np.ndarray  # [event] float64
    undecodable: np.ndarray  # [event] bool
    errors: Mapping[int, str] = field(default_factory=dict)  # event -> "kind: detail"
    parts: Mapping[str, np.ndarray] = field(default_factory=dict)  # component -> [event], NaN where not called
    watch: Mapping[str, np.ndarray] = field(default_factory=dict)  # held-out reward -> [event]
    num_calls: int = 0  # samples that a reward was called with, every component counted
    num_hits: int = 0  # scores that the cache, or an equal sample of the same call, had

    @staticmethod
    def join(scores: Sequence[Scores]) -> Scores:
        """Several calls' scores as one, in their order."""
        if len(scores) == 1:
            return scores[0]
        starts = np.cumsum([0, *(len(one.rewards) for one in scores)])
        errors = {
            start + row: e for start, one in zip(starts.tolist(), scores, strict=False) for row, e in one.errors.items()
        }

        def joined(columns: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
            sizes = [len(one.rewards) for one in scores]
            blank = [np.full(size, np.nan) for size in sizes]
            names = dict.fromkeys(name for told in columns for name in told)
            return {k: np.concatenate([c.get(k, b) for c, b in zip(columns, blank, strict=True)]) for k in names}

        return Scores(
            np.concatenate([one.rewards for one in scores]),
            np.concatenate([one.undecodable for one in scores]),
            errors,
            joined([one.parts for one in scores]),
            joined([one.watch for one in scores]),
            sum(one.num_calls for one in scores),
            sum(one.num_hits for one in scores),
        )

    @property
    def num_failed(self) -> int:
        return len(self.errors)

    @property
    def reasons(self) -> list[tuple[str, int]]:
        """Reasons with their counts, the most common first."""
        return Counter(self.errors.values()).most_common()
