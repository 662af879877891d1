"""``rayft sample``: events of a checkpoint or of a pretrained model, scored, the best of them chosen, and written.

Every domain is written as .npz; what else there is, and what an .npz has besides, its ``formats`` say. Nothing here
needs Ray or opens a pickle.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from rayft import domain as domains
from rayft import imports
from rayft.guidance import registry
from rayft.guidance.base import Tell, by_chains
from rayft.guided import guide
from rayft.offline import scoring
from rayft.reward import digest
from rayft.rewards.service import RewardService
from rayft.seeds import torch_generator
from rayft.source import Source

BATCH = 256
OWN = ".npz"
Writer = Callable[[Path, Sequence[Any], Mapping[str, np.ndarray]], int]


@dataclass(frozen=True)
class Drawn:
    """Finished events and a number or more for each: its index among those drawn, reward, part/NAME."""

    x_0: np.ndarray
    context: dict[str, np.ndarray]
    columns: dict[str, np.ndarray]
    guided: str = ""  # by what, and at what cost

    def __len__(self) -> int:
        return len(self.x_0)

    def take(self, rows: Any) -> Drawn:
        context, columns = ({k: v[rows] for k, v in told.items()} for told in (self.context, self.columns))
        return Drawn(self.x_0[rows], context, columns, self.guided)

    def samples(self, domain: domains.Domain) -> list[Any]:
        """Decoded."""
        return domains.decoded(domain, self.x_0, self.context)


# -- drawing, scoring, choosing


def draw(source: Source, num: int, seed: int) -> Drawn:
    """``num`` events, in bounded batches, with their rewards where they are asked for."""
    x_0, context, guided, bench = [], [], "", source.bench
    with contextlib.ExitStack() as stack:
        tell = _teller(stack.enter_context(_told()))
        rewards = _rewards(source, stack)
        take, reward = by_chains(bench, bench.policy), None
        if source.guide is not None and rewards is not None:
            take, reward = guide(source.guide, bench, rewards, seed, tell)
        for start in range(0, num, BATCH):
            tell("drawing", start, num)
            events, given = take(min(BATCH, num - start), torch_generator(seed, start, "sample"))
            x_0.append(events.numpy())
            context.append({k: v.numpy() for k, v in given.items()})
        if reward is not None:
            guided = f"guided by {registry.name_of(source.guide)}, {reward.calls:,} reward calls"
        joined = {k: np.concatenate([part[k] for part in context]) for k in context[0]}
        drawn = Drawn(np.concatenate(x_0), joined, {"index": np.arange(num)}, guided)
        tell("drawing", num, num)
        return drawn if rewards is None or not source.scored else _scored(rewards, drawn)


def _rewards(source: Source, stack: contextlib.ExitStack) -> RewardService | None:
    if source.recipe is None:
        return None
    return stack.enter_context(scoring(source.recipe, source.domain, source.scoring))


def _scored(rewards: RewardService, drawn: Drawn) -> Drawn:
    scores = rewards.score(drawn.x_0, drawn.context, "evaluate")
    parts = {f"part/{name}": column for name, column in scores.parts.items() if len(scores.parts) > 1}
    return replace(drawn, columns={**drawn.columns, "reward": scores.rewards, **parts})


def best(domain: domains.Domain, drawn: Drawn, num: int) -> Drawn:
    """The ``num`` highest scores, the highest first. Equal samples count once, those without a score never."""
    canonical, rewards = imports.load(domain.canonical), drawn.columns["reward"]
    order = np.argsort(-rewards, kind="stable")
    order, chosen, seen = order[np.isfinite(rewards[order])], [], set()
    for start in range(0, len(order), BATCH):
        block = order[start : start + BATCH]
        for row, found in zip(block.tolist(), drawn.take(block).samples(domain), strict=True):
            key = None if found is None else digest(canonical(found))
            if key is not None and key not in seen:
                seen.add(key)
                chosen.append(row)
        if len(chosen) >= num:
            break
    return drawn.take(np.array(chosen[:num], dtype=int))


@contextlib.contextmanager
def _told() -> Iterator[Progress]:
    """A bar on a terminal, nothing elsewhere."""
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress:
        yield progress


def _teller(progress: Progress) -> Tell:
    """A bar for each thing that is done."""
    bars: dict[str, Any] = {}

    def tell(what: str, done: int, total: int) -> None:
        if what not in bars:
            bars[what] = progress.add_task(what, total=total)
        progress.update(bars[what], completed=done)

    return tell


# -- writing


def writer(domain: domains.Domain, out: Path) -> Writer | None:
    """What writes this suffix; None for .npz, which a name without a suffix is too, where the domain has no own."""
    suffix = _suffix(out)
    if suffix not in domain.formats and suffix == OWN:
        return None
    if suffix not in domain.formats:
        known = ", ".join(dict.fromkeys([*domain.formats, OWN]))
        raise ValueError(f"{out} ends in {out.suffix}; samples of {type(domain).__name__} are written as {known}")
    return imports.load(domain.formats[suffix])


def save(domain: domains.Domain, drawn: Drawn, out: Path, write: Writer | None, whole: bool) -> str:
    """Writes the samples in one piece, and says what was written. Only a choice of those drawn needs their index."""
    guided = f"; {drawn.guided}" if drawn.guided else ""
    columns = drawn.columns
    if _suffix(out) == OWN:
        columns = {name: column for name, column in columns.items() if name != "index" or not whole}
        columns = {"x_0": drawn.x_0, **{f"context/{k}": v for k, v in drawn.context.items()}, **columns}
    with _in_one_piece(out) as place:
        if write is None:
            with place.open("wb") as file:  # given a path, numpy would add .npz to it
                np.savez_compressed(file, allow_pickle=False, **columns)
            return f"{len(drawn)} samples in {out}: {', '.join(columns)}{guided}"
        samples = drawn.samples(domain)
        written, blank = write(place, samples, columns), sum(one is None for one in samples)
    shown = f"{written} of {len(drawn)}" if isinstance(written, int) and written < len(drawn) else f"{len(drawn)}"
    lacking = f"; {blank} decode to nothing" if blank else ""
    return f"{shown} samples in {out}: {', '.join(columns)}{lacking}{guided}"


def _suffix(out: Path) -> str:
    return out.suffix.lower() or OWN


@contextlib.contextmanager
def _in_one_piece(out: Path) -> Iterator[Path]:
    """A file beside ``out``, of the same suffix, that takes its place when all is well."""
    target = out.resolve()
    temporary = target.with_name(f".{target.stem}.tmp{target.suffix}")
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
