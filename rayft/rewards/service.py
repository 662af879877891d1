"""Events in, rewards out: cache, pool, recipe, meter and the policy for failures behind one call.

decode -> keys -> what the cache has -> what equal samples share -> what only a call can tell -> one reward
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rayft import imports, reward
from rayft.aggregate import Recipe
from rayft.rewards.cache import SharedCache
from rayft.rewards.call import Call, Labels
from rayft.rewards.meter import Meter
from rayft.rewards.pool import RewardPool
from rayft.rewards.settings import ScoringSettings
from rayft.rewards.shelf import Entry
from rayft.rewards.worker import Limits, Outcome
from rayft.score import DECODE, Part, Scores, Told


@dataclass(frozen=True)
class Crew:
    """A pool and the components it is for; rewards that want a GPU have a pool of their own."""

    pool: RewardPool
    parts: tuple[int, ...]


class RewardService:
    """A recipe of rewards over one domain's events. Calls are answered one at a time, in order."""

    def __init__(
        self,
        recipe: Recipe,
        decoder: str | None,
        canonical: Any,
        short_names: Mapping[str, str],
        settings: ScoringSettings,
    ) -> None:
        self.recipe, self.settings = recipe, settings
        self.crews = _crews(recipe, decoder, canonical, short_names, settings)
        place = settings.cache
        self.cache = None if place is None else SharedCache(place, settings.cache_mb, keep_failures=True)
        self.meter = Meter()
        self.numbers = itertools.count()
        self.background = ThreadPoolExecutor(1, thread_name_prefix="rayft-score")

    def start(self) -> None:
        """Builds the rewards where they will run; a ``ValueError`` says what is wrong with them."""
        for crew in self.crews:
            crew.pool.start()

    def stop(self) -> None:
        """Ends actors and children; what was scored is in the cache."""
        self.background.shutdown(wait=False, cancel_futures=True)
        for crew in self.crews:
            crew.pool.stop()
        if self.cache is not None:
            self.cache.close()

    def submit(
        self,
        events: Any,
        context: Mapping[str, np.ndarray],
        purpose: str = "score",
        iteration: int | None = None,
        watch: bool = False,
    ) -> Future[Scores]:
        """Rewards of the events. ``iteration`` picks a curriculum's weights (None: the final ones), ``watch`` adds the
        held-out rewards."""
        metadata = {"purpose": purpose, "iteration": iteration}
        call = Call(next(self.numbers), events, context, purpose, metadata)
        return self.background.submit(self._score, call, iteration, watch)

    def score(self, *asked: Any, **told: Any) -> Scores:
        """What ``submit`` promises, waited for."""
        return self.submit(*asked, **told).result()

    # -- one call

    def _score(self, call: Call, iteration: int | None, watch: bool) -> Scores:
        if self.cache is not None:
            for crew in self.crews:
                self._take(call, crew, self._run(call, crew, {DECODE: np.arange(len(call.events))}, keys=True))
        for stage in self.recipe.stages:
            self._stage(call, [i for i in stage if watch or not self.recipe.components[i].watched])
        undecodable = int((call.found == 0).sum())
        self.meter.undecodable(call.purpose, undecodable)
        return self._finished(call, iteration)

    def _stage(self, call: Call, stage: list[int]) -> None:
        """Components that wait for nothing but earlier stages, all in one trip."""
        asked: dict[int, np.ndarray] = {}
        twins: dict[int, dict[int, int]] = {}
        for index in stage:
            name = self.recipe.components[index].name
            call.called[name] = self.recipe.passing(index, call.raw) & ~call.broken
            call.raw[name] = np.full(len(call.events), np.nan)
            rows = np.flatnonzero(call.called[name])
            asked[index], twins[index] = (rows, {}) if self.cache is None else self._unpaid(call, index, rows)
        for crew in self.crews:
            wanted = {crew.parts.index(i): rows for i, rows in asked.items() if i in crew.parts and len(rows)}
            if wanted:
                self._take(call, crew, self._run(call, crew, wanted))
        for index, copies in twins.items():
            self._share(call, index, copies)

    def _run(self, call: Call, crew: Crew, wanted: Mapping[int, np.ndarray], keys: bool = False) -> Outcome:
        told = {"call": call.number, "keys": keys, "metadata": call.metadata}
        return crew.pool.run(call.events, call.context, wanted, **told)

    def _take(self, call: Call, crew: Crew, outcome: Outcome) -> None:
        """What a pool found out, under the components' names; metered, and kept for the next time."""
        fresh = np.isfinite(outcome.found)
        call.found[fresh] = outcome.found[fresh]
        call.labels |= outcome.labels
        for row, digests in outcome.digests.items():
            call.digests |= {(crew.parts[k], row): found for k, found in enumerate(digests) if found is not None}
        names = {DECODE: "decoder"} | {k: self.recipe.components[i].name for k, i in enumerate(crew.parts)}
        call.reasons |= {(names[part], row): reason for (part, row), reason in outcome.errors.items()}
        call.broken[[row for part, row in outcome.errors if part == DECODE]] = True
        for part, values in outcome.values.items():
            told = np.isfinite(values)
            call.raw[names[part]][told] = values[told]
        for (part, name), column in outcome.extras.items():
            told = np.isfinite(column)
            call.extra(names[part], name)[told] = column[told]
        if self.cache is not None:
            for part in outcome.values:
                self.cache.put(self._entries(call, crew.parts[part], part, outcome))
        for part, name in names.items():
            paid = outcome.calls.get(part, 0)
            call.paid += paid
            errors = {row: reason for (p, row), reason in outcome.errors.items() if p == part}
            if paid or errors:
                seconds = outcome.seconds.get(part, np.zeros(0))
                told = {"calls": paid, "seconds": seconds, "errors": errors, "labels": Labels(call)}
                self.meter.add(self._purpose(call, name), name, **told)

    def _purpose(self, call: Call, name: str) -> str:
        return "watch" if any(c.watched and c.name == name for c in self.recipe.components) else call.purpose

    # -- what need not be paid

    def _unpaid(self, call: Call, index: int, rows: np.ndarray) -> tuple[np.ndarray, dict[int, int]]:
        """(rows to ask, {row: the asked row it equals}); what the cache has is filled in."""
        assert self.cache is not None
        name = self.recipe.components[index].name
        keys = {row: call.digests[index, row] for row in rows.tolist() if (index, row) in call.digests}
        known = self.cache.lookup(list(dict.fromkeys(keys.values())))
        asked: list[int] = []
        first: dict[bytes, int] = {}
        twins: dict[int, int] = {}
        for row in rows.tolist():
            key = keys.get(row)
            if key is not None and key in known:
                entry = known[key]
                call.raw[name][row] = entry.value
                if entry.error:
                    call.reasons[name, row] = entry.error
                for extra, number in json.loads(entry.extras or "{}").items():
                    call.extra(name, extra)[row] = number
            elif key is not None and key in first:
                twins[row] = first[key]
            else:
                asked.append(row)
                if key is not None:
                    first[key] = row
        hits = len(rows) - len(asked) - len(twins)
        call.spared += hits + len(twins)
        self.meter.add(self._purpose(call, name), name, calls=0, hits=hits, duplicates=len(twins))
        return np.array(asked, dtype=int), twins

    def _share(self, call: Call, index: int, twins: Mapping[int, int]) -> None:
        name = self.recipe.components[index].name
        for row, twin in twins.items():
            call.raw[name][row] = call.raw[name][twin]
            for column in (column for extra, column in call.extras.items() if extra.startswith(f"{name}.")):
                column[row] = column[twin]
            if (name, twin) in call.reasons:
                call.reasons[name, row] = call.reasons[name, twin]

    def _entries(self, call: Call, index: int, part: int, outcome: Outcome) -> dict[bytes, Entry]:
        """What one part said, under its keys."""
        values, extras = outcome.values[part], {k: c for (p, k), c in outcome.extras.items() if p == part}
        found = {}
        for row in (row for row in range(len(values)) if (index, row) in call.digests):
            error = outcome.errors.get((part, row), "")
            beside = {name: float(column[row]) for name, column in extras.items() if np.isfinite(column[row])}
            if error or np.isfinite(values[row]):
                told = json.dumps(beside) if beside else ""
                found[call.digests[index, row]] = Entry(float(values[row]), error, told)
        return found

    # -- one reward

    def _finished(self, call: Call, iteration: int | None) -> Scores:
        components = self.recipe.components
        if self.recipe.needs_fit:  # z-scores are of the first samples there are, the pretrained model's, for good
            self.recipe = self.recipe.fitted({k: np.where(call.found == 0, np.nan, v) for k, v in call.raw.items()})
        rewards, wrong = self.recipe.total(call.raw, iteration, call.called)
        blank, told = call.found == 0, self.settings
        constant = told.undecodable if told.undecodable is not None else self.recipe.undecodable
        if constant is not None:
            rewards[blank] = constant
        own = [part.name for part in components if not part.watched]
        errors = {}
        for row in np.flatnonzero(~np.isfinite(rewards)).tolist():
            found = next((call.reasons[name, row] for name in ("decoder", *own) if (name, row) in call.reasons), None)
            errors[row] = found or wrong.get(row, "failed: no reason is known")
        self._policy(errors, len(rewards))
        if told.on_failure == "floor":
            rewards[list(errors)] = told.floor
        parts = {name: call.raw[name] for name in own if name in call.raw} | call.extras
        watch = {part.name: call.raw[part.name] for part in components if part.watched and part.name in call.raw}
        return Scores(rewards, blank, errors, parts, watch, call.paid, call.spared)

    def _policy(self, errors: Mapping[int, str], num_events: int) -> None:
        if len(errors) > self.settings.max_failed * num_events:
            few = "; ".join(f"{reason} ({count})" for reason, count in Counter(errors.values()).most_common(3))
            allowed = f"scoring.max_failed = {self.settings.max_failed:g}"
            some = f"{len(errors)} of {num_events} samples, more than {allowed}"
            which = f"all {num_events} samples" if len(errors) == num_events else some
            raise ValueError(f"the reward failed on {which}: {few}")


def gpus_wanted(recipe: Recipe, short_names: Mapping[str, str], settings: ScoringSettings) -> list[float]:
    """The GPU fraction that each component's actors reserve; there is one pool for each fraction."""
    found = [reward.target(part.path, short_names) for part in recipe.components]
    return [settings.num_gpus_per_actor or float(getattr(one, "num_gpus", 0.0)) for one in found]


def _crews(
    recipe: Recipe, decoder: str | None, canonical: Any, short_names: Mapping[str, str], settings: ScoringSettings
) -> list[Crew]:
    """One pool for the components without a GPU, and one for each fraction of one."""
    limits = Limits(
        timeout=settings.timeout,
        startup=settings.startup_timeout,
        memory_gb=settings.memory_gb,
        retries=settings.retries,
        threads=max(1, int(settings.num_cpus_per_actor)),
    )
    gpus = gpus_wanted(recipe, short_names, settings)
    crews = []
    for fraction in sorted(set(gpus)):
        members = tuple(i for i, wanted in enumerate(gpus) if wanted == fraction)
        parts = []
        for i in members:
            part = recipe.components[i]
            identity = reward.identity(part.path, part.arguments, short_names)
            parts.append(Part(part.name, imports.portable(part.path), dict(part.arguments), identity))
        told = Told(tuple(parts), decoder, imports.portable(canonical), dict(short_names))
        crews.append(Crew(RewardPool(told, limits, replace(settings, num_gpus_per_actor=fraction)), members))
    return crews
