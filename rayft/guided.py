"""``--guide NAME``: a guide on a model's own chains, asking the rewards that score its samples.

Black-box guides ask the scoring service, with its decoder, limits and failures; gradients are taken in this process.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rayft import reward as rewards
from rayft.aggregate import Component, Recipe
from rayft.bench import Bench
from rayft.compose import differentiable
from rayft.domain import Domain
from rayft.guidance import registry
from rayft.guidance.base import Draw, Ground, Reward, Slope, Tell, by_chains
from rayft.rewards.service import RewardService
from rayft.seeds import torch_generator
from rayft.space import Context

NUM_FITTED = 256  # samples of the pretrained model for a zscore that was never fitted


def guide(settings: Any, bench: Bench, service: RewardService, seed: int, tell: Tell) -> tuple[Draw, Reward]:
    """What draws guided events, and the reward that counts what it is asked."""
    reward = asked(service, bench.domain)
    if service.recipe.needs_fit:
        reward(*by_chains(bench, bench.reference)(NUM_FITTED, torch_generator(seed, 0, "zscore")))
    reward.identity = _identity(service, bench.domain)
    ground = Ground(bench, reward, seed, tell)
    return registry.drawing(registry.build(settings, ground), ground), reward


def asked(service: RewardService, domain: Domain) -> Reward:
    """The service's recipe as a guide has it."""

    def score(x_0: Tensor, context: Context) -> tuple[Tensor, int]:
        events = x_0.detach().cpu().numpy(), {k: v.cpu().numpy() for k, v in context.items()}
        found = service.score(*events, "guide")
        return torch.from_numpy(found.rewards).to(x_0.device), found.num_calls

    part = service.recipe.parts[0]
    name = str(part.path) if service.recipe.plain else "a composition"
    return Reward(name, score, _slope(service.recipe, domain))


def _slope(recipe: Recipe, domain: Domain) -> Slope | None:
    """The reward's torch function, where it has one; built when it is first asked."""
    part = differentiable(recipe, domain.rewards)
    if part is None:
        return None

    @cache
    def built() -> Any:
        return rewards.build(part.path, part.arguments, domain.rewards)

    return lambda x_0, context: built().value(x_0, context)


def _identity(service: RewardService, domain: Domain) -> str:
    """What tells these rewards from others: their code and arguments, how they are made one, and failures' value."""
    told, recipe = service.settings, service.recipe
    own = [[rewards.identity(part.path, part.arguments, domain.rewards), _beside(part)] for part in recipe.parts]
    beside: Mapping[str, Any] = {"undecodable": told.undecodable, "on_failure": told.on_failure, "floor": told.floor}
    made = [recipe.aggregate, recipe.undecodable, recipe.floor, recipe.state()]
    return json.dumps([own, made, beside], sort_keys=True, default=str)


def _beside(part: Component) -> dict[str, Any]:
    """What becomes of its scores."""
    return {k: v for k, v in asdict(part).items() if k not in ("path", "arguments")}
