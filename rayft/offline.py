"""What can be done with a checkpoint without Ray and without its pickles: judge, export, and score what it draws."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from rayft.aggregate import Recipe
from rayft.compose import recipe
from rayft.domain import Domain
from rayft.draws import Draw, DrawFunction, draw_current, draw_pretrained
from rayft.rewards.service import RewardService
from rayft.rewards.settings import ScoringSettings
from rayft.seeds import torch_generator
from rayft.settings import check
from rayft.store import Checkpoint
from rayft.verdict import Verdict, judge, remember


def judged(checkpoint: Checkpoint, chains: int, pretrained: int, alpha: float | None, seed: int) -> Verdict:
    """A verdict on fresh samples; ``alpha`` defaults to the run's own."""
    told = checkpoint.card["config"]
    if alpha is not None and told["chain"]["eta"] != 1:
        raise ValueError("J* is not attainable for eta < 1, where x_T decides too much of x_0: leave --alpha out")
    alpha = alpha or told["evaluate"]["alpha"] or told["training"].get("alpha")
    if told["chain"]["eta"] != 1:
        alpha = None  # x_T decides too much of x_0 for J* to be attainable (math, Sec. 2)
    bench, samples = checkpoint.bench(), []
    with _rewards(checkpoint) as rewards:
        for draw, count, purpose in ((draw_pretrained, pretrained, "pretrained"), (draw_current, chains, "evaluate")):
            drawn = _batch(bench, draw, count, torch_generator(seed, checkpoint.iteration, purpose))
            scores = rewards.score(drawn.events, drawn.context, purpose, watch=True)
            samples.append(remember(bench.domain, drawn, scores))
    return judge(samples[0], samples[1], alpha)


def exported(checkpoint: Checkpoint, out: Path) -> Path:
    """The network's state dict, keyed as the user's own module has it."""
    if out.suffix not in (".safetensors", ".pt", ".pth"):
        raise ValueError(f"{out} ends in {out.suffix or 'nothing'}; export to .safetensors or .pt")
    net = checkpoint.network(checkpoint.domain()).exported()
    state = {k: v.detach().contiguous().clone() for k, v in net.state_dict().items()}
    if out.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, out)
    else:
        torch.save(state, out)
    return out


def _batch(bench: Any, draw: DrawFunction, count: int, generator: torch.Generator) -> Draw:
    return draw(bench, count, generator, {}).numpy()


def _rewards(checkpoint: Checkpoint) -> contextlib.AbstractContextManager[RewardService]:
    """The run's rewards, as they were fitted."""
    told, domain = checkpoint.card["config"], checkpoint.domain()
    arguments = {k: v for k, v in told["reward"].items() if k != "name"}
    made = recipe(told["reward"]["name"], arguments, told.get("watch"), domain.rewards)
    return scoring(made.with_state(checkpoint.card.get("recipe", made.state())), domain, told["scoring"])


@contextlib.contextmanager
def scoring(recipe: Recipe, domain: Domain, told: Mapping[str, Any]) -> Iterator[RewardService]:
    """These rewards, beside this process."""
    settings = check("scoring", ScoringSettings, {**told, "actors": 0, "min_actors": None})
    service = RewardService(recipe, domain.decoder, domain.canonical, domain.rewards, settings)
    try:
        service.start()
        yield service
    finally:
        service.stop()
