"""Plain denoising: a batch, its loss, and one step of any number of learners.

    L = E_{x_0, t, noise} |target - network(x_t, t)|^2,    target = noise, x_0 or v = sqrt(ab) noise - sqrt(1 - ab) x_0

A step's batch is one draw with its own address, made on the CPU. Learner k of n takes the k-th slice of it, gradients
are summed over events and divided by the size of the whole batch: the update is the same for every n, up to rounding.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, distributed

from rayft.chain import expand, forward_noise
from rayft.domain import Denoiser, Domain, fit
from rayft.muon import Muon
from rayft.schedule import Schedule
from rayft.seeds import address, torch_generator
from rayft.settings import STRICT, Count, CountOrZero, NonNegative, Positive, Share
from rayft.space import squared_norm

MUON_SIZE = 32  # rows and columns from which a matrix is orthogonalised as a whole
LEVELS = 5  # parts of 1..T whose losses are told apart
CPU = torch.device("cpu")

Draw = Callable[[int, torch.Generator], tuple[Tensor, dict[str, Tensor]] | None]  # Domain.data, or one like it


@dataclass(frozen=True)
class Sampled:
    """What is sampled from the finished weights, to be measured."""

    __pydantic_config__ = STRICT

    num: Count = 1000
    """Events whose ``Domain.metrics`` go on the card."""


@dataclass(frozen=True)
class PretrainSettings:
    """Numbers of a denoising training."""

    __pydantic_config__ = STRICT

    steps: Count = 10_000
    """Optimizer steps."""
    batch_size: Count = 1024
    """Events per step, over all learners."""
    lr: Positive = 2e-3
    """AdamW's largest step size; it falls to nothing along half a cosine."""
    muon_lr: NonNegative = 0.0
    """Above 0, Muon (Jordan et al. 2024) moves the large matrices with this step size, and AdamW the rest."""
    warmup: CountOrZero = 0
    """Steps over which the step size rises to its largest."""
    weight_decay: NonNegative = 0.0
    """AdamW's weight decay, and Muon's."""
    grad_clip: Positive | None = 1.0
    """Largest norm of one step's gradient."""
    ema: Share = 0.999
    """Decay of the average of the weights, which is what is kept."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the network in autocast; the weights stay float32."""
    compile: bool = False
    """torch.compile the network: about twice as fast on small ones, after a minute of waiting and where g++ is."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is cuda where torch sees a GPU. Batches are drawn on the CPU: the same numbers for both."""
    num_learners: Count = 1
    """Processes of this machine that share each batch, each with a GPU of its own on cuda."""
    checkpoint_every: Count = 1000
    """Steps between states that ``--resume`` can go on from; the last step is always one."""
    log_every: Count = 100
    """Steps that are averaged into one row of metrics.csv."""
    weights_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of the weights as they are stored; a network of float32 loads any of them."""
    evaluate: Sampled | None = None
    """``{num: N}`` samples N events at the end and puts the domain's metrics of them on the card."""


@dataclass(frozen=True)
class Batch:
    """One learner's slice of a step: events, timesteps, noise; ``whole`` counts the events of all learners."""

    x_0: Float[Tensor, "batch *event"]
    t: Int[Tensor, " batch"]
    noise: Float[Tensor, "batch *event"]
    context: dict[str, Tensor]
    whole: int

    def to(self, device: torch.device) -> Batch:
        context = {k: v.to(device) for k, v in self.context.items()}
        return Batch(self.x_0.to(device), self.t.to(device), self.noise.to(device), context, self.whole)


def draw_batch(
    domain: Domain, draw: Draw, num_steps: int, num: int, generator: torch.Generator, rank: int = 0, of: int = 1
) -> Batch:
    """Slice ``rank`` of ``of`` of one draw on the CPU. Every learner draws the whole: no number depends on n."""
    found = draw(num, generator)
    assert found is not None
    x_0, context = found
    whole = len(x_0)
    t = torch.randint(1, num_steps + 1, (whole,), generator=generator)
    noise = torch.randn(x_0.shape, generator=generator)
    part = slice(whole * rank // of, whole * (rank + 1) // of)
    context = {k: v[part] for k, v in context.items()}
    return Batch(x_0[part], t[part], domain.space.project(noise[part], context), context, whole)


def target(prediction: str, schedule: Schedule, x_0: Tensor, noise: Tensor, t: Int[Tensor, " batch"]) -> Tensor:
    """What a network of this kind should say at x_t."""
    if prediction == "eps":
        return noise
    if prediction == "x0":
        return x_0
    ab = schedule.alpha_bar[t]
    return expand(ab.sqrt(), x_0) * noise - expand((1 - ab).sqrt(), x_0) * x_0


def event_losses(domain: Domain, schedule: Schedule, net: Denoiser, batch: Batch) -> Float[Tensor, " batch"]:
    """|target - network|^2 of each event, mean over the space's axes (R Eq. 5), as the network weights its levels."""
    x_0, t, noise, context = batch.x_0, batch.t, batch.noise, batch.context
    x_t = forward_noise(schedule, x_0, t, noise)
    wrong = domain.space.project(net(x_t, schedule.timestep[t], context), context)
    wrong = wrong - target(net.prediction, schedule, x_0, noise, t)
    return squared_norm(wrong) / domain.space.dim(x_0, context) * net.loss_weight(schedule.timestep[t])


def denoising_loss(
    domain: Domain,
    schedule: Schedule,
    net: Denoiser,
    batch_size: int,
    generator: torch.Generator,
    draw: Draw | None = None,
) -> Float[Tensor, ""]:
    """The mean over one batch, one t each, of ``draw`` or else of the domain's data."""
    device = next((p.device for p in net.parameters()), CPU)
    batch = draw_batch(domain, draw or domain.data, schedule.num_steps, batch_size, generator)
    return event_losses(domain, on(schedule, device), net, batch.to(device)).mean()


def on(schedule: Schedule, device: torch.device) -> Schedule:
    """The schedule's tables on a device."""
    return Schedule(schedule.alpha_bar.to(device), schedule.timestep.to(device))


def lr_share(step: int, settings: PretrainSettings) -> float:
    """The share of the largest step size: a linear rise over the warm-up, times half a cosine over all steps."""
    rise = min(1.0, (step + 1) / (settings.warmup + 1))
    return rise * 0.5 * (1 + math.cos(math.pi * step / settings.steps))


def optimizers_of(net: torch.nn.Module, settings: PretrainSettings) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the large matrices and AdamW for the rest."""
    params = [p for p in net.parameters() if p.requires_grad]
    large = [p for p in params if settings.muon_lr and p.ndim == 2 and min(p.shape) >= MUON_SIZE]
    rest = [p for p in params if all(p is not other for other in large)]
    found: list[torch.optim.Optimizer] = []
    if rest:
        adam = {"params": rest, "largest": settings.lr}
        found.append(torch.optim.AdamW([adam], lr=settings.lr, weight_decay=settings.weight_decay))
    if large:
        muon = {"params": large, "largest": settings.muon_lr}
        found.append(Muon([muon], lr=settings.muon_lr, weight_decay=settings.weight_decay))
    return found


class Learner:
    """A network, its optimizers and its slice of every batch. Learner 0 keeps the average of the weights as well."""

    def __init__(
        self, domain: Domain, settings: PretrainSettings, seed: int, device: torch.device = CPU, rank: int = 0
    ) -> None:
        self.domain, self.settings, self.seed, self.device, self.rank = domain, settings, seed, device, rank
        torch.manual_seed(seed)
        self.schedule = on(domain.schedule(), device)
        self.net = domain.denoiser().to(device).train()
        self.params = [p for p in self.net.parameters() if p.requires_grad]
        if not self.params:
            raise ValueError(f"{type(self.net).__name__} has no parameters to train")
        self.average = copy.deepcopy(self.net).requires_grad_(False).eval() if rank == 0 else None
        self.slow = [] if self.average is None else list(self.average.state_dict().values())
        self.optimizers = optimizers_of(self.net, settings)
        if settings.compile:
            self.net.compile()

    def state(self) -> dict[str, Any]:
        """All that the next steps depend on, as tensors and plain numbers."""
        average = {} if self.average is None else self.average.state_dict()
        told = [optimizer.state_dict() for optimizer in self.optimizers]
        return {"net": self.net.state_dict(), "average": average, "optimizers": told}

    def load(self, state: Mapping[str, Any], source: str) -> None:
        """Goes on from ``state``; a ``ValueError`` names what does not fit the network."""
        fit(self.net, state["net"], source)
        if self.average is not None:
            fit(self.average, state["average"], source)
        for optimizer, told in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(told)

    def step(self, number: int) -> tuple[Float[Tensor, ""], Float[Tensor, "2 level"]]:
        """One update: (mean loss of the whole batch, sum and count of its losses by level of noise).

        What the network itself draws (dropout) has its address too, another for every learner.
        """
        settings, of = self.settings, self.settings.num_learners
        generator = torch_generator(self.seed, number, "pretrain")
        mine = settings.batch_size, generator, self.rank, of
        batch = draw_batch(self.domain, self.domain.data, self.schedule.num_steps, *mine).to(self.device)
        reseed(address(self.seed, number, "network", self.rank), self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=settings.precision == "bfloat16"):
            losses = event_losses(self.domain, self.schedule, self.net, batch)
        loss = losses.sum() / batch.whole
        self.net.zero_grad()
        loss.backward()
        loss, levels = loss.detach(), losses.new_zeros(2, LEVELS)
        level = (batch.t - 1) * LEVELS // self.schedule.num_steps
        levels[0].index_add_(0, level, losses.detach())
        levels[1].index_add_(0, level, torch.ones_like(losses))
        gradients = [_gradient(p) for p in self.params]
        if of > 1:
            add_up([*gradients, loss, levels])
        self._update(number)
        return loss, levels

    def _update(self, number: int) -> None:
        """Clips, steps, averages."""
        torch.nn.utils.clip_grad_norm_(self.params, self.settings.grad_clip or float("inf"))
        share = lr_share(number, self.settings)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["largest"] * share
            optimizer.step()
        decay = min(self.settings.ema, (1 + number) / (10 + number))
        for slow, fast in zip(self.slow, self.net.state_dict().values(), strict=False):  # a peer keeps no average
            slow.lerp_(fast, 1 - decay) if fast.is_floating_point() else slow.copy_(fast)


def add_up(tensors: list[Tensor]) -> None:
    """Each becomes its sum over the learners, in one message."""
    whole = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(whole)
    for tensor, part in zip(tensors, whole.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def reseed(seed: int, device: torch.device) -> None:
    """The generators a network draws from; ``torch.manual_seed`` does it for every backend, which takes 0.1 ms."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    """Its gradient; 0 where the batch, or this learner's slice of it, did not use the parameter."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
