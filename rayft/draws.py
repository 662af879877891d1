"""What one iteration collects before anything is scored: transitions, and the events whose reward they wait for.

Every algorithm names one of these functions; the runner that calls it does not know which. torch only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from rayft.bench import Bench
from rayft.chain import Chains, sample, sample_roll_in


@dataclass(frozen=True)
class Afar:
    """Chains that stay with the runners that drew them, part by part; who learns from them reads them there."""

    refs: list[Any]
    calls: list[dict[str, Any]]  # what each was asked for: a lost one is drawn again


@dataclass(frozen=True)
class Draw:
    """Transitions, and the events to score with their contexts; event i may stand for many rows."""

    chains: Any  # Chains; Afar; None where nobody will read them
    events: Any  # [event, *shape]
    context: dict[str, Any]
    kl: Any = None  # [chain], to the pretrained model, of whole chains

    def numpy(self) -> Draw:
        """On the CPU, each chain's KL added up."""
        as_numpy = {k: v.cpu().numpy() for k, v in self.context.items()}
        chains = self.chains.numpy()
        kl = chains.columns["kl"].sum(0) if "kl" in chains.columns else None
        return Draw(chains, self.events.cpu().numpy(), as_numpy, kl)


DrawFunction = Callable[[Bench, int, torch.Generator, Mapping[str, Any]], Draw]
Fate = Literal["sent", "stay", "dropped"]  # of a draw's chains, where the runner is remote


def draw_current(bench: Bench, num_chains: int, generator: torch.Generator, settings: Mapping[str, Any]) -> Draw:
    """Whole chains of the policy, with the pretrained model's means and the KL to it."""
    x_T, context = bench.start(num_chains, generator)  # noqa: N806
    chains = sample(bench.policy, x_T, context, generator, reference=bench.reference)
    return Draw(chains, chains.x_0, chains.context)


def draw_grouped(bench: Bench, num_chains: int, generator: torch.Generator, settings: Mapping[str, Any]) -> Draw:
    """The same in groups of neighbours that share their context and, where ``share`` says so, x_T."""
    size = settings["group_size"]
    x_T, context = bench.start(num_chains // size, generator)  # noqa: N806
    context = {k: v.repeat_interleave(size, 0) for k, v in context.items()}
    x_T = x_T.repeat_interleave(size, 0)  # noqa: N806
    if settings["share"] == "context":
        x_T = bench.policy.noise(x_T, context, generator)  # noqa: N806
    chains = sample(bench.policy, x_T, context, generator, reference=bench.reference)
    return Draw(chains, chains.x_0, chains.context)


def draw_mixed(bench: Bench, num_chains: int, generator: torch.Generator, settings: Mapping[str, Any]) -> Draw:
    """Whole chains: a share ``explore`` of the pretrained model, the rest of the policy, of neighbouring contexts."""
    x_T, context = bench.start(num_chains, generator)  # noqa: N806
    num = round(settings["explore"] * num_chains)
    parts = [(slice(0, num), bench.reference), (slice(num, num_chains), bench.policy)]
    drawn = [
        sample(policy, x_T[rows], {k: v[rows] for k, v in context.items()}, generator, reference=bench.reference)
        for rows, policy in parts
        if rows.stop > rows.start
    ]
    x, t = torch.cat([c.x for c in drawn], 1), torch.cat([c.t for c in drawn], 1)
    columns = {k: torch.cat([c.columns[k] for c in drawn], 1) for k in drawn[0].columns}
    chains = Chains(x, t, context, columns)
    return Draw(chains, chains.x_0, context)


def draw_pretrained(bench: Bench, num_chains: int, generator: torch.Generator, settings: Mapping[str, Any]) -> Draw:
    """Whole chains of the pretrained model. Its own means are the anchor, so none are evaluated twice."""
    x_T, context = bench.start(num_chains, generator)  # noqa: N806
    chains = sample(bench.reference, x_T, context, generator, reference=bench.reference)
    return Draw(chains, chains.x_0, chains.context)


def draw_events(bench: Bench, num_chains: int, generator: torch.Generator, settings: Mapping[str, Any]) -> Draw:
    """Finished events of the policy, by a chain of ``sampling_steps`` where that is told; the way is not kept."""
    policy, reference = bench.policy, bench.reference
    if settings["sampling_steps"] is not None:
        policy, reference = policy.respaced(settings["sampling_steps"]), None
    x_T, context = bench.start(num_chains, generator)  # noqa: N806
    chains = sample(policy, x_T, context, generator, reference=reference)
    kl = {} if reference is None else {"kl": chains.columns["kl"].sum(0, keepdim=True)}
    return Draw(Chains(chains.x[:2], chains.t[:1], chains.context, kl), chains.x_0, chains.context)


def draw_starts(bench: Bench, num_chains: int, generator: torch.Generator, settings: Mapping[str, Any]) -> Draw:
    """x_T and context alone, for what makes its chains where it learns from them."""
    x_T, context = bench.start(num_chains, generator)  # noqa: N806
    t = torch.full((1, num_chains), bench.policy.process.num_steps, device=x_T.device)
    return Draw(Chains(x_T.expand(2, *x_T.shape), t, context), x_T[:0], {k: v[:0] for k, v in context.items()})


def draw_roll_in(bench: Bench, num_chains: int, generator: torch.Generator, settings: Mapping[str, Any]) -> Draw:
    """T Alg. 3: policy down to a random t, pretrained model from there; one transition a chain."""
    x_T, context = bench.start(num_chains, generator)  # noqa: N806
    num_steps = bench.policy.process.num_steps
    t = torch.randint(1, num_steps + 1, (num_chains,), generator=generator).to(x_T.device)
    chains, x_0 = sample_roll_in(bench.policy, bench.reference, x_T, t, context, generator)
    return Draw(chains, x_0, chains.context)


def join(draws: list[Draw]) -> Draw:
    """Several runners' draws as one, chains side by side in the order given (numpy)."""
    if len(draws) == 1:
        return draws[0]
    context = {k: np.concatenate([draw.context[k] for draw in draws]) for k in draws[0].context}
    kl = None if draws[0].kl is None else np.concatenate([draw.kl for draw in draws])
    return Draw(_joined([d.chains for d in draws]), np.concatenate([d.events for d in draws]), context, kl)


def _joined(parts: list[Any]) -> Any:
    if parts[0] is None:
        return None
    if isinstance(parts[0], Afar):
        return Afar([ref for part in parts for ref in part.refs], [call for part in parts for call in part.calls])
    return Chains.join(parts)
