"""``rayft pretrain``: plain denoising on a domain's data, the first line of R's Algorithm 1.

    L = E_{x_0, t, noise} |target - network(x_t, t)|^2,    target = noise, x_0 or v = sqrt(ab) noise - sqrt(1 - ab) x_0

Every batch has its own address, so a resumed training sees the batches it would have seen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.progress import Progress
from safetensors.torch import save_file
from torch import Tensor

from rayft import domain as domains
from rayft import imports, store
from rayft.chain import expand, forward_noise
from rayft.schedule import Schedule
from rayft.seeds import torch_generator
from rayft.settings import STRICT, Count, CountOrZero, NonNegative, Positive, Share, check, sentence
from rayft.space import squared_norm
from rayft.spec import FolderName, Named, load_tree, override, split


@dataclass(frozen=True)
class PretrainSettings:
    """Numbers of a denoising training."""

    __pydantic_config__ = STRICT

    steps: Count = 10_000
    """Optimizer steps."""
    batch_size: Count = 1024
    """Events per step."""
    lr: Positive = 2e-3
    """AdamW's first step size; it falls to nothing along half a cosine."""
    weight_decay: NonNegative = 0.0
    """AdamW's weight decay."""
    grad_clip: Positive | None = 1.0
    """Largest norm of one step's gradient."""
    ema: Share = 0.999
    """Decay of the average of the weights, which is what is kept."""
    checkpoint_every: Count = 1000
    """Steps between states that ``--resume`` can go on from."""


class PretrainSpec(BaseModel):
    """A pretraining as YAML."""

    model_config = ConfigDict(extra="forbid")

    domain: Named
    pretrain: dict[str, Any] = Field(default_factory=dict)
    name: FolderName = "pretrain"
    seed: CountOrZero = 0
    output: str = "runs"


def main(file: str, overrides: Sequence[str], resume: bool, quiet: bool) -> str:
    """Reads the YAML, trains, and says where the weights are."""
    tree, name = load_tree(file)
    tree = override({"name": name, **tree}, overrides)
    for key in tree:
        if key not in PretrainSpec.model_fields:
            hint = imports.nearest(key, PretrainSpec.model_fields)
            raise ValueError(f"no key {key!r}{hint}; a pretraining has {', '.join(PretrainSpec.model_fields)}")
    try:
        spec = PretrainSpec.model_validate({k: v for k, v in tree.items() if v is not None})
    except ValidationError as error:
        raise ValueError(sentence("", error)) from None
    settings = check("pretrain", PretrainSettings, spec.pretrain)
    domain = domains.build(*split(spec.domain, "domain"))
    folder = Path(spec.output) / spec.name
    domains.try_out(domain)
    weights, loss = train(domain, settings, spec.seed, folder / "state.pt", resume, quiet)
    out = folder / "weights.safetensors"
    save_file(weights, out)
    card = {"domain": spec.domain, "pretrain": asdict(settings), "seed": spec.seed, "loss": loss}
    store.write_text(folder / "card.json", json.dumps({**card, "versions": store.versions()}, indent=1))
    return f"weights in {out}, last mean loss {loss:.4f}"


def target(prediction: str, schedule: Schedule, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What a network of this kind should say at x_t."""
    if prediction == "eps":
        return noise
    if prediction == "x0":
        return x_0
    ab = schedule.alpha_bar[t]
    return expand(ab.sqrt(), x_0) * noise - expand((1 - ab).sqrt(), x_0) * x_0


def train(
    domain: domains.Domain, settings: PretrainSettings, seed: int, state: Path, resume: bool, quiet: bool
) -> tuple[dict[str, Tensor], float]:
    """(averaged weights, mean loss over the last hundred steps)."""
    torch.manual_seed(seed)
    schedule, net = domain.schedule(), domain.denoiser()
    if domain.data(1, torch_generator(seed, 0, "pretrain")) is None:
        raise ValueError(f"{type(domain).__name__} has no data set to pretrain on: implement Domain.data")
    average = {k: v.detach().clone() for k, v in net.state_dict().items()}
    optimizer = torch.optim.AdamW(net.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    first, recent = 0, []
    if resume:
        if not state.is_file():
            raise ValueError(f"nothing to resume: no {state}")
        try:
            found = torch.load(state, weights_only=True)
            net.load_state_dict(found["net"])
            optimizer.load_state_dict(found["optimizer"])
        except Exception:
            raise ValueError(f"{state} is damaged or of another network; start again without --resume") from None
        average, first, recent = found["average"], found["step"], found["recent"]
    state.parent.mkdir(parents=True, exist_ok=True)
    with Progress(disable=quiet, transient=True) as progress:
        bar = progress.add_task("pretrain", total=settings.steps, completed=first)
        for step in range(first, settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
            loss = denoising_loss(domain, schedule, net, settings.batch_size, torch_generator(seed, step, "pretrain"))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), settings.grad_clip or float("inf"))
            optimizer.step()
            decay = min(settings.ema, (1 + step) / (10 + step))
            for key, value in net.state_dict().items():
                average[key].lerp_(value, 1 - decay) if value.is_floating_point() else average[key].copy_(value)
            recent = [*recent[-99:], loss.item()]
            progress.update(bar, advance=1)
            if (step + 1) % settings.checkpoint_every == 0:
                told = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
                torch.save({**told, "step": step + 1, "recent": recent}, state.with_suffix(".tmp"))
                state.with_suffix(".tmp").replace(state)
    return average, sum(recent) / max(len(recent), 1)


def denoising_loss(
    domain: domains.Domain, schedule: Schedule, net: domains.Denoiser, batch_size: int, generator: torch.Generator
) -> Tensor:
    """One batch, one t each; mean over the space's axes."""
    found = domain.data(batch_size, generator)
    assert found is not None
    x_0, context = found
    t = torch.randint(1, schedule.num_steps + 1, (len(x_0),), generator=generator)
    noise = domain.space.project(torch.randn(x_0.shape, generator=generator), context)
    x_t = forward_noise(schedule, x_0, t, noise)
    wrong = domain.space.project(net(x_t, schedule.timestep[t], context), context)
    wrong = wrong - target(net.prediction, schedule, x_0, noise, t)
    return (squared_norm(wrong) / domain.space.dim(x_0, context)).mean()
