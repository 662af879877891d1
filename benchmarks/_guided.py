"""Guidance on the toy: what a guide makes of the pretrained model, and what that costs in reward calls.

    attained = (J - E_pre[r]) / (J* - E_pre[r]),    J = E[r] - alpha KL

``guided`` gives a policy, whose chain KL optimum.py measures, or the events of what chooses among whole ones.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayft import domain as domains
from rayft import reward as rewards
from rayft.bench import Bench
from rayft.chain import Policy, reverse_process
from rayft.guidance import registry
from rayft.guidance.base import Ground, Reward
from rayft.seeds import torch_generator

NUM_EVENTS, BATCH = 10_000, 1_000
Asked = tuple[str, Mapping[str, Any]]  # a reward of the toy's and its arguments


def guided(name: str, reward: Asked, alpha: float, seed: int, **told: Any) -> tuple[Policy | Tensor, float, int]:
    """(the guided policy or ``NUM_EVENTS`` events, core seconds, reward calls); both of fitting and of these events."""
    bench, before = pretrained(), time.process_time()
    known = asked(bench, *reward)
    ground = Ground(bench, known, seed)
    values = {**told} if name == "best_of_n" else {"alpha": alpha, **told}
    found = registry.build(registry.settings(name, values), ground)
    events = drawn(registry.drawing(found, ground), seed)
    seconds, calls = time.process_time() - before, known.calls
    return found if isinstance(found, Policy) else events, seconds, calls


def pretrained() -> Bench:
    """The toy's own model, of 50 steps."""
    domain = domains.build("toy", {})
    net = domains.pretrained(domain).requires_grad_(False)
    policy = Policy(net, reverse_process(domain.schedule()), domain.space, net.prediction)
    return Bench(domain, policy, policy, torch.device("cpu"), torch.float32)


def asked(bench: Bench, name: str, arguments: Mapping[str, Any]) -> Reward:
    """A reward of the toy's, in this process."""
    made = rewards.build(name, arguments, bench.domain.rewards)
    slope = made.value if isinstance(made, rewards.DifferentiableReward) else None
    return Reward(name, lambda x, _: (torch.from_numpy(np.asarray(made(list(x.numpy())))), len(x)), slope)


def drawn(draw: Any, seed: int) -> Tensor:
    """``NUM_EVENTS`` events."""
    starts = range(0, NUM_EVENTS, BATCH)
    return torch.cat([draw(BATCH, torch_generator(seed, start, "guided"))[0] for start in starts])
