"""What can be done with a checkpoint without Ray and without its pickles: sample, judge, export."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayft.compose import recipe
from rayft.draws import Draw, DrawFunction, draw_current, draw_pretrained
from rayft.rewards.service import RewardService
from rayft.rewards.settings import ScoringSettings
from rayft.seeds import torch_generator
from rayft.settings import check
from rayft.store import Checkpoint
from rayft.verdict import Verdict, judge, remember

BATCH = 4096


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


def sampled(checkpoint: Checkpoint, num: int, seed: int, score: bool) -> dict[str, np.ndarray]:
    """x_0 and context of ``num`` samples, in bounded batches, with their rewards where asked for."""
    bench = checkpoint.bench()
    parts: list[dict[str, np.ndarray]] = []
    with _rewards(checkpoint) if score else contextlib.nullcontext() as rewards:
        for start in range(0, num, BATCH):
            drawn = _batch(bench, draw_current, min(BATCH, num - start), torch_generator(seed, start, "sample"))
            part = {"x_0": drawn.events, **{f"context/{k}": v for k, v in drawn.context.items()}}
            if rewards is not None:
                part["reward"] = rewards.score(drawn.events, drawn.context, "evaluate").rewards
            parts.append(part)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


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


@contextlib.contextmanager
def _rewards(checkpoint: Checkpoint) -> Iterator[RewardService]:
    """The run's rewards, beside this process, as they were fitted."""
    told, domain = checkpoint.card["config"], checkpoint.domain()
    arguments = {k: v for k, v in told["reward"].items() if k != "name"}
    made = recipe(told["reward"]["name"], arguments, told.get("watch"), domain.rewards)
    made = made.with_state(checkpoint.card.get("recipe", made.state()))
    settings = check("scoring", ScoringSettings, {**told["scoring"], "actors": 0, "min_actors": None})
    service = RewardService(made, domain.decoder, domain.canonical, domain.rewards, settings)
    try:
        service.start()
        yield service
    finally:
        service.stop()
