"""What can be done with a checkpoint without Ray and without its pickles: sample, judge, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayft.draws import Draw, DrawFunction, draw_current, draw_pretrained
from rayft.score import Scorer
from rayft.seeds import torch_generator
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
    bench, scorer = checkpoint.bench(), _scorer(checkpoint)
    samples = []
    for draw, count, purpose in ((draw_pretrained, pretrained, "pretrained"), (draw_current, chains, "evaluate")):
        drawn = _batch(bench, draw, count, torch_generator(seed, checkpoint.iteration, purpose))
        samples.append(remember(bench.domain, drawn, scorer.score(drawn.events, drawn.context)))
    return judge(samples[0], samples[1], alpha)


def sampled(checkpoint: Checkpoint, num: int, seed: int, score: bool) -> dict[str, np.ndarray]:
    """x_0 and context of ``num`` samples, in bounded batches, with their rewards where asked for."""
    bench = checkpoint.bench()
    scorer = _scorer(checkpoint) if score else None
    parts: list[dict[str, np.ndarray]] = []
    for start in range(0, num, BATCH):
        drawn = _batch(bench, draw_current, min(BATCH, num - start), torch_generator(seed, start, "sample"))
        part = {"x_0": drawn.events, **{f"context/{k}": v for k, v in drawn.context.items()}}
        if scorer is not None:
            part["reward"] = scorer.score(drawn.events, drawn.context).rewards
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


def _scorer(checkpoint: Checkpoint) -> Scorer:
    told = checkpoint.card["config"]
    arguments = {k: v for k, v in told["reward"].items() if k != "name"}
    domain = checkpoint.domain()
    return Scorer(told["reward"]["name"], arguments, domain.rewards, domain.decoder, told["scoring"]["undecodable"])
