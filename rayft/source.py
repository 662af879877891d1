"""What ``rayft sample`` draws from: a run, a checkpoint or a domain's pretrained model, with its rewards and its guide.

Nothing here needs Ray or opens a pickle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rayft import domain as domains
from rayft import imports, spec, store
from rayft.aggregate import Recipe
from rayft.bench import Bench
from rayft.chain import Policy, reverse_process
from rayft.compose import recipe
from rayft.conditioned import Conditioned
from rayft.guidance import registry


@dataclass(frozen=True)
class Asked:
    """What a command says beside the model: overrides are reward.KEY, guide.KEY and, of a domain, domain.KEY.

    Of a checkpoint of a conditioned domain, domain.probabilities: which classes are drawn.
    """

    scored: bool = False
    reward: str | None = None  # in place of the run's own
    guide: str | None = None
    num_steps: int | None = None
    overrides: Sequence[str] = ()

    @property
    def needs_reward(self) -> bool:
        """To score with, or to be guided by."""
        return self.scored or self.guide is not None


@dataclass(frozen=True)
class Source:
    """A model to draw from, what its samples are scored by, and the settings of what guides them."""

    bench: Bench
    recipe: Recipe | None
    scoring: Mapping[str, Any]
    scored: bool
    guide: Any = None

    @property
    def domain(self) -> domains.Domain:
        return self.bench.domain


def find(what: str, asked: Asked) -> Source:
    """A run, a checkpoint, or a domain's pretrained model by its short name or import path."""
    path = Path(what)
    if (path / "card.json").is_file() or (path / "checkpoints").is_dir():
        return _checkpoint(store.load(path), asked)
    if what in domains.builtin() or ":" in what:
        return _pretrained(what, asked)
    if path.exists():
        store.load(path)  # says what is wrong with it
    known = ", ".join(sorted(domains.builtin()))
    hint = imports.nearest(what, domains.builtin())
    raise ValueError(f"there is no run or checkpoint {what}, and no domain of that name{hint}; the domains are {known}")


def _checkpoint(checkpoint: store.Checkpoint, asked: Asked) -> Source:
    if asked.num_steps is not None:
        raise ValueError("--num-steps is for a domain: a checkpoint is sampled with the chain that it was trained on")
    told, world = checkpoint.card["config"], checkpoint.card["domain"]
    tree: dict[str, Any] = {"reward": dict(told["reward"])}
    if domains.find(world["name"]) is Conditioned:
        tree["domain"] = dict(world)
    tree, guide = _overridden(tree, asked)
    checkpoint = replace(checkpoint, card=checkpoint.card | {"domain": _drawn_as(tree.get("domain", world), world)})
    made = _recipe(tree, checkpoint.domain()) if asked.needs_reward else None
    if made is not None and tree["reward"] == told["reward"]:
        made = made.with_state(checkpoint.card.get("recipe", made.state()))
    return Source(checkpoint.bench(), made, told["scoring"], asked.scored, guide)


def _drawn_as(given: Mapping[str, Any], own: Mapping[str, Any]) -> Mapping[str, Any]:
    """A checkpoint's domain, of which only the classes that are drawn may be another."""
    for key in {**own, **given}:
        if key != "probabilities" and given.get(key) != own.get(key):
            raise ValueError(f"domain.{key} is as the checkpoint was trained; only domain.probabilities may change")
    return given


def _pretrained(name: str, asked: Asked) -> Source:
    tree, guide = _overridden({"domain": name}, asked)
    world = domains.build(*spec.split(_named(tree["domain"]), "domain"))
    if asked.needs_reward and "reward" not in tree:
        known = ", ".join(world.rewards) or "package.module:Name"
        raise ValueError(f"{name} is a domain and has no reward of its own; give one with --reward: {known}")
    net = domains.pretrained(world).requires_grad_(False)
    domains.try_out(world)
    process = reverse_process(world.schedule(), num_steps=asked.num_steps)
    policy = Policy(net, process, world.space, net.prediction)
    bench = Bench(world, policy, policy, torch.device("cpu"), torch.float32)
    return Source(bench, _recipe(tree, world) if asked.needs_reward else None, {}, asked.scored, guide)


def _overridden(tree: dict[str, Any], asked: Asked) -> tuple[dict[str, Any], Any]:
    """(the tree as it was asked for, the checked settings of its guide)."""
    known = [*tree] if "domain" not in tree else ["domain", "reward"]
    known += ["guide"] if asked.guide is not None else []
    tree |= {"reward": asked.reward} if asked.reward else {}
    tree |= {"guide": {"name": asked.guide}} if asked.guide is not None else {}
    for text in asked.overrides:
        key = text.partition("=")[0].partition(".")[0]
        if key == "guide" and key not in known:
            raise ValueError(f"{text!r} needs a guide: add --guide NAME, of {', '.join(registry.names())}")
        if key not in known:
            allowed = " and ".join(f"{key}.KEY=value" for key in known)
            raise ValueError(f"{text!r} is not for sampling; it takes {allowed}")
    tree = spec.override(tree, asked.overrides)
    guide = tree.pop("guide", None)
    return tree, None if guide is None else registry.settings(*spec.split(_named(guide), "guide"))


def _named(told: Any) -> Mapping[str, Any]:
    return told if isinstance(told, Mapping) else {"name": told}


def _recipe(tree: Mapping[str, Any], world: domains.Domain) -> Recipe:
    name, arguments = spec.split(_named(tree["reward"]), "reward")
    return recipe(name, arguments, None, world.rewards)
