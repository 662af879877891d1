"""Reward backpropagation (T Alg. 2, Eq. 22): J's own gradient, through the chain and the reward.

    theta <- theta + lr d/dtheta [ r(x_0(theta)) - alpha sum_t KL_t(theta) ]

Whole (T), through the last K transitions (DRaFT-K), or through a random number of them (AlignProp). The reward must be
a torch function of x_0; where it is a black box, ``surrogate`` learns one beside it from what the policy draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from torch import Tensor

from rayft import reward
from rayft.algorithms.base import DiffusionRL, spoken
from rayft.algorithms.config import DiffusionConfig, Settings
from rayft.domain import value_network
from rayft.draws import draw_current, draw_starts
from rayft.pathwise import Cut, climb, finite
from rayft.rl.learner import DiffusionLearner
from rayft.rl.module import DTYPES
from rayft.rl.near import Credit
from rayft.seeds import numpy_generator, torch_generator
from rayft.settings import Count, CountOrZero, NonNegative, Positive
from rayft.surrogate import Seen, Surrogate


@dataclass(frozen=True)
class BackpropSettings(Settings):
    """Reward backpropagation's numbers."""

    alpha: NonNegative = 0.1
    """Temperature of J = E[r] - alpha KL(p || p_pre); 0 asks for reward alone."""
    chains: Count = 512
    """Chains per iteration."""
    minibatch_size: Count = 512
    """Chains per optimizer step; ``microbatches`` splits the memory of one."""
    steps: Count | None = None
    """K, the transitions that gradients go through, counted from x_0; all of them where none is given."""
    random_steps: bool = False
    """Draws that number evenly from 1 .. K at every iteration (AlignProp)."""
    checkpoint: bool = False
    """Computes each transition again when its gradient is wanted: a third more time, memory of one transition."""
    target_kl: Positive | None = None
    """Off: a pathwise gradient is not the noise that a trust region guards against, and its rows are whole chains."""
    surrogate: CountOrZero = 0
    """Networks that learn the reward from scored chains, for a black box; 0 asks the reward itself for its gradient."""
    surrogate_chains: Count = 512
    """Chains that are scored for them in an iteration."""
    surrogate_steps: Count = 200
    """Steps they learn for in an iteration, from all that was scored so far."""
    pessimism: NonNegative = 1.0
    """Deviations of those networks that are taken off their mean (T Sec. 7): where they disagree nobody has been."""


class BackpropLearner(DiffusionLearner):
    """Rows are whole chains: x_T, and the number that addresses their noise."""

    def build(self) -> None:
        super().build()
        self.world = self.config.build_domain()
        self.surrogate = Surrogate(self.world, self.config.surrogate, self.config.pessimism)
        self.surrogate.to(self._device, DTYPES[self.config.precision])
        part = self.config.recipe(self.world).parts[0]
        told = part.path, part.arguments, self.world.rewards
        self.slope: Any = self.surrogate.value if self.config.surrogate else reward.build(*told).value  # type: ignore[attr-defined]
        self._module[DEFAULT_MODULE_ID].unwrapped().through = self.chain

    def chain(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """(reward, KL) of every row."""
        module, told = self._module[DEFAULT_MODULE_ID].unwrapped(), self.scalars
        context = {k.removeprefix("context/"): v for k, v in rows.items() if k.startswith("context/")}
        seed, iteration, like = int(told["seed"]), int(told["iteration"]), rows["x_t"]

        def noise(step: int) -> Tensor:
            """Drawn for all chains of the iteration: a row's is its own, whoever computes it."""
            drawn = torch_generator(seed, iteration, "path", step)
            whole = torch.randn(int(told["chains"]), *like.shape[1:], generator=drawn, dtype=like.dtype)
            return self.world.space.project(whole[rows["number"].cpu()].to(like.device), context)

        cut = Cut(int(told["steps"]), self.config.checkpoint)
        policies = module.policies["current"], module.policies["reference"]
        x_0, kl = climb(*policies, like, context, noise, cut, rows["early"])
        if x_0.requires_grad:
            x_0.register_hook(finite)
        return {"reward": self.slope(x_0, context), "kl": kl}

    def row_loss(self, rows: dict[str, Tensor], out: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        known = torch.isfinite(out["reward"])
        reward = torch.where(known, out["reward"], 0.0)
        loss = torch.where(known, self.config.alpha * out["kl"], 0.0) - reward
        return loss, {"reward": reward, "square": reward**2, "kl": out["kl"], "failed": 1.0 - known.to(loss.dtype)}


class Backprop(DiffusionRL):
    """T Alg. 2 on RLlib."""

    def setup(self, config: Any) -> None:
        super().setup(config)
        self.seen: list[Seen] = []  # all that was scored, for the surrogate
        self.surrogate = Surrogate(self.domain, self.settings.surrogate, self.settings.pessimism)

    @classmethod
    def get_default_config(cls) -> BackpropConfig:
        return BackpropConfig()

    def experience(self) -> tuple[Credit, dict[str, float]]:
        told = self.study() if self.settings.surrogate else {}
        draw = self.collect("train", draw_starts, self.settings.chains)
        num_steps, seed = self.env_runner.module.process.num_steps, self.config.seed or 0
        generator, steps = numpy_generator(seed, self.iteration, "cut"), self.settings.steps or num_steps
        if self.settings.random_steps:
            steps = int(generator.integers(1, steps + 1))
        early = generator.integers(min(steps + 1, num_steps), num_steps + 1, self.settings.chains)
        columns = {"number": np.arange(self.settings.chains), "early": early}
        chains = draw.chains.with_columns(**{name: column[None] for name, column in columns.items()})
        address = {"seed": seed, "iteration": self.iteration, "chains": self.settings.chains, "steps": steps}
        return Credit(chains, {k: float(v) for k, v in address.items()}), told

    def study(self) -> dict[str, float]:
        """One round of the surrogate: score what the policy draws now, fit on all of it, tell the learners."""
        draw = self.collect("study", draw_current, self.settings.surrogate_chains, chains="dropped")
        scores = self.score(draw)
        self.seen.append(Seen(draw.events, scores.rewards, dict(draw.context)))
        generator = torch_generator(self.config.seed or 0, self.iteration, "surrogate")
        gap = self.surrogate.fit(self.seen, self.settings.surrogate_steps, generator)
        state = self.surrogate.numpy()
        self.learner_group.foreach_learner(lambda learner: learner.surrogate.load_numpy(state))
        told = {"undecodable": float(scores.undecodable.mean()), "reward_failed": float(scores.num_failed)}
        return told | {"surrogate_r2": gap} | spoken(scores.rewards, scores.parts)

    def learn(self, credit: Credit) -> dict[str, float]:
        super().learn(credit)
        mean = {name: float(self.metrics.peek(("learners", "default_policy", name))) for name in LOGGED}
        told = {"kl": mean["kl"]}
        if self.settings.surrogate:
            return told
        self.counts["reward_calls"] += self.settings.chains * self.settings.num_epochs
        num_failed = round(mean["failed"] * self.settings.chains * self.settings.num_epochs)
        self.counts["failed"] += num_failed
        first, second = (mean[name] / max(1 - mean["failed"], 1e-12) for name in ("reward", "square"))
        spread = max(second - first**2, 0.0) ** 0.5
        told |= {"reward_mean": first, "reward_std": spread, "reward_failed": float(num_failed)}
        return told | {"undecodable": 0.0, "guard_no_spread": float(spread < 1e-8)}

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        told = {"seen": [vars(one) for one in self.seen], "surrogate": self.surrogate.numpy()}
        told["moments"] = self.surrogate.moments()
        return {**super().get_state(*args, **kwargs), "backprop": told}

    def set_state(self, state: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().set_state(state, *args, **kwargs)
        if "backprop" in state:
            self.seen = [Seen(**one) for one in state["backprop"]["seen"]]
            self.surrogate.load_numpy(state["backprop"]["surrogate"])
            self.surrogate.load_moments(state["backprop"].get("moments", {}))


LOGGED = ("reward", "square", "kl", "failed")


class BackpropConfig(DiffusionConfig):
    """``BackpropConfig().domain(...).reward(...).training(alpha=..., steps=...)``."""

    settings_class = BackpropSettings

    def __init__(self, algo_class: Any = None) -> None:
        super().__init__(algo_class=algo_class or Backprop)

    def num_rows(self, num_steps: int) -> int:
        return self.settings().chains

    def num_events(self) -> int:
        told = self.settings()
        return told.surrogate_chains if told.surrogate else told.chains * told.num_epochs

    def validate(self) -> None:
        told, num_steps = self.settings(), self.process().num_steps
        if told.steps is not None and told.steps > num_steps:
            raise ValueError(f"training.steps is {told.steps}; the chain has only {num_steps} transitions")
        if told.target_kl is not None:
            raise ValueError("training.target_kl is for algorithms that learn from single transitions; lower lr here")
        if told.timesteps is not None:
            raise ValueError("training.timesteps is for algorithms that learn from single transitions; see steps")
        if not told.surrogate:
            self.differentiable("backpropagation", "set training.surrogate to 2 or more, or take ppo, grpo or rwmle")
        super().validate()
        if told.surrogate:
            value_network(self.build_domain())

    def get_default_learner_class(self) -> type[BackpropLearner]:
        return BackpropLearner
