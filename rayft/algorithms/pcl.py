"""Path consistency (T Alg. 5, Eq. 33-36): policy and value meet where every piece of every path balances.

    residual = (v(x_t, t) - v(x_s, s)) / alpha + sum_{s < u <= t} log p_theta / p_pre (x_{u-1} | x_u),    v(x_0, 0) = r

Pieces of ``steps`` transitions; with all T it is trajectory balance, v(x_T, T) / alpha being its learned log Z of each
start. It holds for any path, so chains may be learned from again long after the policy that drew them (``replay``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from torch import Tensor

from rayft import credit, losses
from rayft.algorithms.chains import ChainRL
from rayft.algorithms.config import DiffusionConfig, Settings
from rayft.chain import Chains
from rayft.domain import value_network
from rayft.draws import Draw, DrawFunction, Fate, draw_mixed
from rayft.rl.learner import DiffusionLearner
from rayft.rl.near import Credit
from rayft.seeds import numpy_generator
from rayft.settings import Count, CountOrZero, Positive, ShareOrAll
from rayft.space import squared_norm


@dataclass(frozen=True)
class PCLSettings(Settings):
    """Path consistency's numbers."""

    alpha: Positive = 0.1
    """Temperature of J = E[r] - alpha KL(p || p_pre)."""
    steps: Count | None = None
    """Transitions in a piece, a divisor of T: 1, k, or all T where none are given (trajectory balance)."""
    chains: Count = 256
    """Chains drawn in one iteration."""
    minibatch_size: Count = 256
    """Pieces per optimizer step; a piece of K transitions costs K calls of the network."""
    value_lr: Positive = 1e-3
    """AdamW's step size for the value network; it falls as ``lr`` does."""
    explore: ShareOrAll = 0.0
    """Share of an iteration's chains that the pretrained model draws: it still knows the modes that a policy left."""
    explore_end: ShareOrAll = 1.0
    """Share of ``explore`` that is left at the last of a run's iterations; it falls there as ``lr`` does. Its own
    chains then tell it more exactly what it lacks."""
    replay: CountOrZero = 0
    """Older chains that are learned from beside those of an iteration."""
    replay_size: Count = 4096
    """Chains that are kept for that, the newest ones."""


@dataclass(frozen=True)
class Kept:
    """Whole chains with all that path consistency reads of them. numpy."""

    x: np.ndarray  # [T + 1, chain, *event]
    log_ref: np.ndarray  # [T, chain]: -|x_prev - mu_pre|^2 / (2 sigma_t^2)
    rewards: np.ndarray
    context: dict[str, np.ndarray]

    def take(self, index: np.ndarray) -> Kept:
        context = {k: v[index] for k, v in self.context.items()}
        return Kept(self.x[:, index], self.log_ref[:, index], self.rewards[index], context)

    @staticmethod
    def join(parts: list[Kept]) -> Kept:
        context = {k: np.concatenate([p.context[k] for p in parts]) for k in parts[0].context}
        x, log_ref = (np.concatenate([getattr(p, name) for p in parts], 1) for name in ("x", "log_ref"))
        return Kept(x, log_ref, np.concatenate([p.rewards for p in parts]), context)


class PCLLearner(DiffusionLearner):
    """Rows are pieces of paths. Policy and value net have an optimizer each."""

    def build(self) -> None:
        super().build()
        self._module[DEFAULT_MODULE_ID].unwrapped().through = self.pieces

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        module = self._module[module_id].unwrapped()
        for name, net, lr in (
            ("policy", module.denoiser, self.config.lr),
            ("value", module.critic, self.config.value_lr),
        ):
            params = [p for p in net.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(params, weight_decay=self.config.weight_decay)
            told = {"optimizer_name": name, "optimizer": optimizer, "params": params, "lr_or_lr_schedule": lr}
            self.register_optimizer(module_id=module_id, **told)

    def step_sizes(self, lr: float) -> dict[Any, float]:
        value = dict(self.get_optimizers_for_module(DEFAULT_MODULE_ID))["value"]
        return {**super().step_sizes(lr), value: self.config.value_lr * lr / self.config.lr}

    def transitions(self, chains: Chains) -> Chains:
        """All of every piece: its first alone, at T of a whole chain, would say little of the others."""
        x = np.moveaxis(chains.columns["path"][0][:, ::-1], 1, 0)
        return Chains(x, chains.t - np.arange(len(x) - 1)[::-1, None], chains.context)

    def pieces(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """Values at both ends, and the log-ratio of each piece, from one call of the policy for all its transitions."""
        module, path = self._module[DEFAULT_MODULE_ID].unwrapped(), rows["path"]
        policy, (num, length) = module.policies["current"], (path.shape[0], path.shape[1] - 1)
        context = {k.removeprefix("context/"): v for k, v in rows.items() if k.startswith("context/")}
        every = {k: v.repeat_interleave(length, 0) for k, v in context.items()}
        t = (rows["t"][:, None] - torch.arange(length, device=path.device)).flatten()
        x_t, x_prev = path[:, :-1].flatten(0, 1), path[:, 1:].flatten(0, 1)
        mean, sigma = policy.mean(x_t, t, every), policy.sigma(t).to(path.dtype)
        own = -squared_norm(policy.space.project(x_prev - mean, every)) / (2 * sigma**2)
        end, times = rows["t"] - length, module.process.schedule.timestep.to(path.device)
        value = module.critic(path[:, 0], times[rows["t"]], context)
        later = torch.where(end == 0, rows["reward"], module.critic(path[:, -1], times[end], context))
        return {"value": value, "value_end": later, "log_ratio": own.view(num, length).sum(1) - rows["log_ref"]}

    def row_loss(self, rows: dict[str, Tensor], out: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        told = out["value"], out["value_end"], out["log_ratio"]
        loss = rows["alive"] * losses.path_consistency_loss(*told, self.config.alpha)
        return loss, {"residual": loss, "value": out["value"]}


class PCL(ChainRL):
    """T Alg. 5 on RLlib."""

    @classmethod
    def get_default_config(cls) -> PCLConfig:
        return PCLConfig()

    def setup(self, config: Any) -> None:
        super().setup(config)
        self.kept: list[Kept] = []  # the newest chains, where they are to be replayed

    def draw_function(self) -> DrawFunction:
        return draw_mixed

    def draw_settings(self, iteration: int) -> dict[str, Any]:
        told = super().draw_settings(iteration)
        return told | {"explore": told["explore"] * self.left(self.settings.explore_end, iteration)}

    def fate(self) -> Fate:
        """The replay is the driver's own, so that no lost runner takes chains with it: they are sent to be kept."""
        return "sent" if self.settings.replay else super().fate()

    def credit(self, draw: Draw, rewards: np.ndarray) -> Credit:
        """With a replay, of older chains beside the new ones."""
        sigma = self.env_runner.module.process.sigma.numpy()[1:]
        if not self.settings.replay:
            return self.beside(draw, partial(credited, rewards=rewards, sigma=sigma, length=self.settings.steps))
        fresh = kept(draw.chains, rewards, sigma)
        found = Kept.join([fresh, *self.replayed()])
        return Credit(pieces(found, self.settings.steps), {}, self.keep(fresh))

    def replayed(self) -> list[Kept]:
        """Older chains, drawn evenly from those that are kept."""
        if not self.kept:
            return []
        every = Kept.join(self.kept)
        generator = numpy_generator(self.config.seed or 0, self.iteration, "replay")
        return [every.take(generator.integers(0, len(every.rewards), self.settings.replay))]

    def keep(self, fresh: Kept) -> dict[str, float]:
        """Puts this iteration's chains with the others, and lets the oldest go."""
        self.kept.append(fresh)
        while len(self.kept) > 1 and sum(len(k.rewards) for k in self.kept[1:]) >= self.settings.replay_size:
            self.kept.pop(0)
        return {"replay_chains": float(sum(len(k.rewards) for k in self.kept))}

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {**super().get_state(*args, **kwargs), "kept": [vars(one) for one in self.kept]}

    def set_state(self, state: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        super().set_state(dict(state), *args, **kwargs)
        if "kept" in state:
            self.kept = [Kept(**one) for one in state["kept"]]


def kept(chains: Chains, rewards: np.ndarray, sigma: np.ndarray) -> Kept:
    """What path consistency reads of whole chains."""
    gap = chains.x[:-1] - chains.columns["mean_ref"]
    square = np.square(gap).reshape(*gap.shape[:2], -1).sum(-1)
    log_ref = (-square / (2 * sigma[:, None] ** 2)).astype(square.dtype)
    return Kept(chains.x, log_ref, rewards, dict(chains.context))


def pieces(found: Kept, length: int | None) -> Chains:
    """Chains in pieces of ``length`` transitions that follow each other; whole where none is given."""
    num_steps, num = found.log_ref.shape
    size: int = length or num_steps
    starts = np.arange(size, num_steps + 1, size)  # t of each piece's first event
    path = np.stack([found.x[start - size : start + 1][::-1] for start in starts], 1)  # [size + 1, piece, chain]
    log_ref = np.stack([found.log_ref[start - size : start].sum(0) for start in starts])
    path = np.moveaxis(path, 0, 2).reshape(1, -1, size + 1, *found.x.shape[2:])
    told = {"reward": np.nan_to_num(found.rewards), "alive": credit.alive(found.rewards)}
    columns = {k: np.tile(v, len(starts)).astype(found.x.dtype)[None] for k, v in told.items()}
    columns |= {"path": path, "log_ref": log_ref.reshape(1, -1).astype(found.x.dtype)}
    context = {k: np.concatenate([v] * len(starts)) for k, v in found.context.items()}
    ends = np.stack([path[0, :, 1], path[0, :, 0]])
    return Chains(ends, np.repeat(starts, num)[None], context, columns)


def credited(chains: Chains, rewards: np.ndarray, sigma: np.ndarray, length: int | None) -> Credit:
    """New chains as pieces."""
    return Credit(pieces(kept(chains, rewards, sigma), length))


class PCLConfig(DiffusionConfig):
    """``PCLConfig().domain(...).reward(...).training(alpha=..., steps=...)``."""

    settings_class = PCLSettings
    wants_critic = True

    def __init__(self, algo_class: Any = None) -> None:
        super().__init__(algo_class=algo_class or PCL)

    def num_rows(self, num_steps: int) -> int:
        told = self.settings()
        return (told.chains + told.replay) * (num_steps // (told.steps or num_steps))

    def validate(self) -> None:
        steps, num_steps = self.settings().steps, self.process().num_steps
        if steps is not None and num_steps % steps:
            allowed = ", ".join(str(n) for n in range(1, num_steps + 1) if num_steps % n == 0)
            raise ValueError(f"training.steps is {steps}; pieces of a chain of {num_steps} may have {allowed}")
        super().validate()
        (first, last), size = self.settings().timesteps or (1, num_steps), steps or num_steps
        if first > last // size * size:
            raise ValueError(
                f"training.timesteps is [{first}, {last}], where no piece starts: they start at every {size}th t of "
                f"{num_steps}; give shorter pieces (training.steps) or later timesteps"
            )
        value_network(self.build_domain())

    def get_default_learner_class(self) -> type[PCLLearner]:
        return PCLLearner
