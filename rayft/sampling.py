"""``rayft sample``: events of a checkpoint or of a pretrained model, scored, the best of them chosen, and written.

Every domain is written as .npz; what else there is, its ``formats`` say. Nothing here needs Ray or opens a pickle.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from rayft import domain as domains
from rayft import imports, spec, store
from rayft.aggregate import Recipe
from rayft.bench import Bench
from rayft.chain import Policy, reverse_process, sample
from rayft.compose import recipe
from rayft.offline import scoring
from rayft.reward import digest
from rayft.seeds import torch_generator

BATCH = 256
OWN = ".npz"
Writer = Callable[[Path, Sequence[Any], Mapping[str, np.ndarray]], int]


@dataclass(frozen=True)
class Source:
    """A model to draw from, and what its samples are scored by."""

    bench: Bench
    recipe: Recipe | None
    scoring: Mapping[str, Any]

    @property
    def domain(self) -> domains.Domain:
        return self.bench.domain


@dataclass(frozen=True)
class Drawn:
    """Finished events and a number or more for each: its index among those drawn, reward, part/NAME."""

    x_0: np.ndarray
    context: dict[str, np.ndarray]
    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.x_0)

    def take(self, rows: Any) -> Drawn:
        context, columns = ({k: v[rows] for k, v in told.items()} for told in (self.context, self.columns))
        return Drawn(self.x_0[rows], context, columns)

    def samples(self, domain: domains.Domain) -> list[Any]:
        """Decoded."""
        return domains.decoded(domain, self.x_0, self.context)


# -- what is drawn from


def find(what: str, scored: bool, reward: str | None, overrides: Sequence[str], num_steps: int | None) -> Source:
    """A run, a checkpoint, or a domain's pretrained model by its short name or import path.

    ``reward`` takes the place of the run's own; ``overrides`` are reward.KEY=value and, of a domain, domain.KEY=value.
    """
    path = Path(what)
    if (path / "card.json").is_file() or (path / "checkpoints").is_dir():
        return _checkpoint(store.load(path), scored, reward, overrides, num_steps)
    if what in domains.builtin() or ":" in what:
        return _pretrained(what, scored, reward, overrides, num_steps)
    if path.exists():
        store.load(path)  # says what is wrong with it
    known = ", ".join(sorted(domains.builtin()))
    hint = imports.nearest(what, domains.builtin())
    raise ValueError(f"there is no run or checkpoint {what}, and no domain of that name{hint}; the domains are {known}")


def _checkpoint(
    checkpoint: store.Checkpoint, scored: bool, reward: str | None, overrides: Sequence[str], num_steps: int | None
) -> Source:
    if num_steps is not None:
        raise ValueError("--num-steps is for a domain: a checkpoint is sampled with the chain that it was trained on")
    told = checkpoint.card["config"]
    tree = _overridden({"reward": dict(told["reward"])} | ({"reward": reward} if reward else {}), overrides)
    made = _recipe(tree, checkpoint.domain()) if scored else None
    if made is not None and tree["reward"] == told["reward"]:
        made = made.with_state(checkpoint.card.get("recipe", made.state()))
    return Source(checkpoint.bench(), made, told["scoring"])


def _pretrained(name: str, scored: bool, reward: str | None, overrides: Sequence[str], num_steps: int | None) -> Source:
    tree = _overridden({"domain": name} | ({"reward": reward} if reward else {}), overrides)
    world = domains.build(*spec.split(_named(tree["domain"]), "domain"))
    if scored and "reward" not in tree:
        known = ", ".join(world.rewards) or "package.module:Name"
        raise ValueError(f"{name} is a domain and has no reward of its own; give one with --reward: {known}")
    net = domains.pretrained(world).requires_grad_(False)
    domains.try_out(world)
    process = reverse_process(world.schedule(), num_steps=num_steps)
    policy = Policy(net, process, world.space, net.prediction)
    bench = Bench(world, policy, policy, torch.device("cpu"), torch.float32)
    return Source(bench, _recipe(tree, world) if scored else None, {})


def _overridden(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    known = list(tree) if "domain" not in tree else ["domain", "reward"]
    for text in overrides:
        if text.partition("=")[0].partition(".")[0] not in known:
            allowed = " and ".join(f"{key}.KEY=value" for key in known)
            raise ValueError(f"{text!r} is not for sampling; it takes {allowed}")
    return spec.override(tree, overrides)


def _named(told: Any) -> Mapping[str, Any]:
    return told if isinstance(told, Mapping) else {"name": told}


def _recipe(tree: Mapping[str, Any], world: domains.Domain) -> Recipe:
    name, arguments = spec.split(_named(tree["reward"]), "reward")
    return recipe(name, arguments, None, world.rewards)


# -- drawing, scoring, choosing


def draw(source: Source, num: int, seed: int) -> Drawn:
    """``num`` events, in bounded batches, with their rewards where they are asked for."""
    x_0, context = [], []
    with _told() as progress:
        bar = progress.add_task("drawing", total=num)
        for start in range(0, num, BATCH):
            generator = torch_generator(seed, start, "sample")
            x_T, given = source.bench.start(min(BATCH, num - start), generator)  # noqa: N806
            x_0.append(sample(source.bench.policy, x_T, given, generator).x_0.numpy())
            context.append({k: v.numpy() for k, v in given.items()})
            progress.update(bar, advance=len(x_T))
        joined = {k: np.concatenate([part[k] for part in context]) for k in context[0]}
        drawn = Drawn(np.concatenate(x_0), joined, {"index": np.arange(num)})
        if source.recipe is None:
            return drawn
        progress.add_task("scoring", total=None)
        return _scored(source, source.recipe, drawn)


def _scored(source: Source, recipe: Recipe, drawn: Drawn) -> Drawn:
    with scoring(recipe, source.domain, source.scoring) as rewards:
        scores = rewards.score(drawn.x_0, drawn.context, "evaluate")
    parts = {f"part/{name}": column for name, column in scores.parts.items() if len(scores.parts) > 1}
    return Drawn(drawn.x_0, drawn.context, {**drawn.columns, "reward": scores.rewards, **parts})


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


# -- writing


def writer(domain: domains.Domain, out: Path) -> Writer | None:
    """What writes this suffix; None for .npz, which a name without a suffix is too."""
    suffix = out.suffix.lower()
    if suffix in ("", OWN):
        return None
    if suffix not in domain.formats:
        known = ", ".join([*domain.formats, OWN])
        raise ValueError(f"{out} ends in {out.suffix}; samples of {type(domain).__name__} are written as {known}")
    return imports.load(domain.formats[suffix])


def save(domain: domains.Domain, drawn: Drawn, out: Path, write: Writer | None, whole: bool) -> str:
    """Writes the samples in one piece, and says what was written. Only a choice of those drawn needs their index."""
    with _in_one_piece(out) as place:
        if write is None:
            columns = {name: column for name, column in drawn.columns.items() if name != "index" or not whole}
            columns = {"x_0": drawn.x_0, **{f"context/{k}": v for k, v in drawn.context.items()}, **columns}
            with place.open("wb") as file:  # given a path, numpy would add .npz to it
                np.savez_compressed(file, allow_pickle=False, **columns)
            return f"{len(drawn)} samples in {out}: {', '.join(columns)}"
        samples = drawn.samples(domain)
        written, blank = write(place, samples, drawn.columns), sum(one is None for one in samples)
    shown = f"{written} of {len(drawn)}" if isinstance(written, int) and written < len(drawn) else f"{len(drawn)}"
    lacking = f"; {blank} decode to nothing" if blank else ""
    return f"{shown} samples in {out}: {', '.join(drawn.columns)}{lacking}"


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
