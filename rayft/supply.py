"""The pay-off supply: an endless row of shards for the learner, drawn by actors that run ahead of it by a few.

    actors draw and search (torch)  ->  the reward service scores  ->  bank, or memory  ->  the learner

What a shard holds does not depend on the policy, so running ahead changes nothing but the time that is waited.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import Queue
from typing import Any

import cloudpickle
import ray
import torch
from ray.exceptions import RayError, RayTaskError

from rayft.payoff.bank import Bank, Shard
from rayft.payoff.pairs import Question
from rayft.payoff.source import Answer, Source
from rayft.rewards.roster import ray_options
from rayft.rewards.service import RewardService
from rayft.score import Scores
from rayft.seeds import numpy_generator

PURPOSE = "payoff"
LOSSES = 5  # actors in a row that may be lost over one shard


@dataclass(frozen=True)
class Terms:
    """How shards are come by."""

    actors: int  # 0 draws in this process, when a shard is needed
    lead: int  # shards that may be under way or ready beyond the one that is needed
    num_shards: int | None  # after which they are read again, in another order; endless where none is given
    seed: int  # of that order
    num_cpus: float = 1.0
    custom: Mapping[str, float] = field(default_factory=dict)  # what else an actor reserves

    def reserved(self) -> dict[str, float]:
        """Resource -> how much one actor asks for."""
        return {"CPU": self.num_cpus, **self.custom}


class PayoffActor:
    """A source in a process of its own."""

    def __init__(self, make: bytes, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self.packed, self.made = make, None

    @property
    def source(self) -> Source:
        """Built when it is first asked: of an exception in ``__init__`` Ray only says that the actor died."""
        self.made = self.made or cloudpickle.loads(self.packed)()
        return self.made

    def begin(self, number: int) -> Question:
        """As ``Source.begin``."""
        return self.source.begin(number)

    def go_on(self, number: int, answer: Answer) -> Question | Shard:
        """As ``Source.go_on``."""
        return self.source.go_on(number, answer)


class Supply:
    """Shards in the order they are learnt from. What scoring them cost is in ``drain``."""

    def __init__(self, make: Callable[[], Source], service: RewardService, bank: Bank | None, terms: Terms) -> None:
        self.make, self.service, self.bank, self.terms = make, service, bank, terms
        self.coming: dict[int, Future[Shard]] = {}  # number -> being made, or made and waiting (without a bank)
        self.paid: list[Scores] = []
        self.held: tuple[int, Shard] | None = None  # the one that was taken last: iterations may be shorter than shards
        self.last: int | None = None  # position after which nothing will be asked for
        self.lock, self.local = threading.Lock(), None
        self.idle: Queue[Any] = Queue()
        self.crew = ThreadPoolExecutor(max(1, min(terms.actors, 1 + terms.lead)), thread_name_prefix="rayft-payoff")
        self.actors: list[Any] = []

    def close(self) -> None:
        """Ends the actors; shards that are written stay."""
        self.crew.shutdown(wait=False, cancel_futures=True)
        for actor in self.actors:
            ray.kill(actor)
        self.actors = []

    def number_at(self, position: int) -> int:
        """Which shard stands at this position: 0, 1, 2 ..., and from the second reading on in another order each."""
        if self.terms.num_shards is None:
            return position
        reading, place = divmod(position, self.terms.num_shards)
        if reading == 0:
            return place
        return int(numpy_generator(self.terms.seed, reading, "bank order").permutation(self.terms.num_shards)[place])

    def missing(self, first: int, last: int) -> int:
        """Shards of positions [first, last) that are nowhere yet, nor under way."""
        numbers = {self.number_at(position) for position in range(first, last)}
        return sum(
            not (number in self.coming or (self.bank is not None and self.bank.has(number))) for number in numbers
        )

    def take(self, position: int) -> Shard:
        """The shard at this position; those after it are begun. Waits for it where it must."""
        number = self.number_at(position)
        if self.held is not None and self.held[0] == number:
            return self.held[1]
        ahead = position + self.terms.lead if self.terms.actors else position
        for later in range(position, ahead + 1):
            if self.last is None or later < self.last or later == position:
                self._order(self.number_at(later))
        kept = self.terms.num_shards is not None and self.bank is None
        future = self.coming[number] if kept else self.coming.pop(number)
        shard = future.result()
        self.held = (number, shard)
        return shard

    def drain(self) -> list[Scores]:
        """What was paid since the last call."""
        with self.lock:
            paid, self.paid = self.paid, []
        return paid

    # -- one shard

    def _order(self, number: int) -> None:
        if number in self.coming:
            return
        if self.bank is not None and self.bank.has(number):
            self.coming[number] = Future()
            self.coming[number].set_result(self.bank.read(number))
        elif self.terms.actors:
            self.coming[number] = self.crew.submit(self._found, number)
        else:
            self.coming[number] = Future()
            self.coming[number].set_result(self._found(number))

    def _found(self, number: int) -> Shard:
        """The shard from the bank, made and written first where it is not there."""
        if self.bank is None:
            return self._made(number)
        with self.bank.claim(number):
            if not self.bank.has(number):
                self.bank.write(self._made(number))
        return self.bank.read(number)

    def _made(self, number: int) -> Shard:
        answers: list[Answer] = []  # paid for; whoever begins again asks the same questions
        for loss in range(LOSSES):
            try:
                with self._source() as ask:
                    return self._scored(number, ask, answers)
            except RayTaskError as error:
                raise error.cause from None  # the source's own, which another actor would repeat
            except RayError:
                if loss == LOSSES - 1:
                    raise
        raise AssertionError

    def _scored(self, number: int, ask: Callable[..., Any], answers: list[Answer]) -> Shard:
        said, known = ask("begin", number), iter(tuple(answers))
        while isinstance(said, Question):
            answer = next(known, None)
            if answer is None:
                answers.append(answer := self._answer(said))
            said = ask("go_on", number, answer)
        return said

    def _answer(self, question: Question) -> Answer:
        scores = self.service.submit(question.events, question.context, PURPOSE).result()
        with self.lock:
            self.paid.append(scores)
        return Answer(scores.rewards, scores.parts if len(scores.parts) > 1 else {}, scores.num_calls)

    @contextlib.contextmanager
    def _source(self) -> Iterator[Callable[..., Any]]:
        """Somebody who draws: this process, or an actor that nobody else asks meanwhile. A lost one is replaced."""
        if not self.terms.actors:
            self.local = self.local or self.make()
            yield lambda method, *told: getattr(self.local, method)(*told)
            return
        with self.lock:
            if len(self.actors) < self.terms.actors and self.idle.empty():
                self._hire()
        actor = self.idle.get()
        try:
            yield lambda method, *told: ray.get(getattr(actor, method).remote(*told))
        except RayError as error:
            if not isinstance(error, RayTaskError):
                with self.lock:
                    self.actors.remove(actor)
                    self._hire()
                raise
            self.idle.put(actor)
            raise
        except BaseException:
            self.idle.put(actor)
            raise
        else:
            self.idle.put(actor)

    def _hire(self) -> None:
        made: Any = ray.remote(PayoffActor)
        threads = max(1, int(self.terms.num_cpus))
        options = {**ray_options(self.terms.reserved()), "max_restarts": 0}
        actor = made.options(**options).remote(cloudpickle.dumps(self.make), threads)
        self.actors.append(actor)
        self.idle.put(actor)
