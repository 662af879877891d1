"""The configuration every algorithm shares, in RLlib's own grammar.

    RGDMConfig().domain("toy").reward("quadratic").training(temperature=0.3, radius=1.5).build_algo()

Sections are frozen dataclasses; their fields lie flat on the config (``lr``, ``chain_sigma``, ``evaluate_every``), so
that Tune and PBT can search and mutate them, and are checked together in ``validate``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import gymnasium as gym
import numpy as np
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.util.debug import log_once

from rayft import domain as domains
from rayft import imports, reward
from rayft.aggregate import Recipe
from rayft.chain import Process, reverse_process
from rayft.compose import differentiable, recipe
from rayft.rewards.service import gpus_wanted
from rayft.rewards.settings import ScoringSettings
from rayft.rl.learner import gloo_where_nccl_is_missing
from rayft.rl.module import DenoiserModule
from rayft.rl.runner import ChainRunner
from rayft.settings import STRICT, Count, CountOrZero, NonNegative, Positive, Share, ShareOrAll, check, defaults


@dataclass(frozen=True)
class Settings:
    """What every algorithm is told about training."""

    __pydantic_config__ = STRICT

    chains: Count = 512
    """Chains (or data points, for RGDM) drawn in one iteration, over all runners."""
    minibatch_size: Count = 4096
    """Transitions per optimizer step, over all learners; a batch that holds fewer is one minibatch."""
    num_epochs: Count = 1
    """Passes over the batch of one iteration."""
    timesteps: tuple[Count, Count] | list[Count] | None = None
    """First and last t that are learned at; all where none are given. Where x_t says nothing of the reward yet, or
    nothing more, an update is noise."""
    row_share: Positive = 1.0
    """Share of an iteration's transitions that are learned from, drawn at random: neighbours on a chain are alike."""
    lr: Positive = 1e-3
    """AdamW's step size. The trust region below bounds what a wrong one can do."""
    lr_end: ShareOrAll = 1.0
    """Share of ``lr`` that is left at the last of a run's iterations; it falls there along half a cosine."""
    weight_decay: NonNegative = 0.0
    """Off: fine-tuning should not forget what no reward speaks of."""
    grad_clip: Positive | None = 1.0
    """Largest norm of one step's gradient, all parameters together."""
    microbatches: Count = 1
    """Equal pieces a minibatch is computed in; the step is the same, the memory smaller."""
    precision: Literal["float32", "float64", "bfloat16"] = "float32"
    """bfloat16 runs the network in autocast; noise, log-probabilities and KL stay float32."""
    ema: Share = 0.0
    """Decay of a moving average of the weights; where it is on, the average is evaluated and exported."""
    lora_rank: CountOrZero = 0
    """Above 0, only adapters W + scale B A of this rank are trained; a weight with a smaller side has that for rank."""
    lora_scale: Positive | None = None
    """Factor of B A; 16 / lora_rank where none is given. A larger one lets the same ``lr`` go further."""
    trainable: list[str] | None = None
    """Patterns such as ``net.0.*`` of what is trained (or adapted), by the names in an export; all without them."""
    target_kl: Positive | None = 1.0
    """Trust region: nats per chain that one iteration may move the policy; a larger update is shrunk back to it."""


@dataclass(frozen=True)
class ChainSettings:
    """The chain that is trained, sampled and evaluated: one and the same."""

    __pydantic_config__ = STRICT

    num_steps: Count | None = None
    """T after respacing; the model's own where none is given."""
    sigma: Literal["beta", "gamma"] = "beta"
    """Noise of a reverse step. gamma (the posterior's) lets the last steps dominate the KL when T is small."""
    eta: Positive = 1.0
    """DDIM's noise scale, with sigma gamma only."""


@dataclass(frozen=True)
class EvaluateSettings:
    """How the policy is held against what is attainable, and when a run must stop."""

    __pydantic_config__ = STRICT

    every: CountOrZero = 10
    """Iterations between evaluations; 0 evaluates at the end only."""
    chains: Count = 1024
    """Chains of the policy per evaluation."""
    pretrained_chains: Count = 8192
    """Chains of the pretrained model, drawn once: they price J*, the frontier and the baseline."""
    alpha: Positive | None = None
    """Temperature of J and J*; the algorithm's own where it has one. Without any, only the frontier share is told."""
    max_kl: Positive | None = 50.0
    """Budget of chain KL to the pretrained model; past it the run stops and goes back to the best checkpoint within."""
    min_diversity: Share = 0.05
    """Share of the pretrained model's diversity below which the collapse detector speaks."""


SECTIONS: dict[str, type] = {"chain": ChainSettings, "evaluate": EvaluateSettings, "scoring": ScoringSettings}


class DiffusionConfig(AlgorithmConfig):
    """Base of PPOConfig, RWMLEConfig, RGDMConfig."""

    settings_class: ClassVar[type[Settings]] = Settings
    wants_critic: ClassVar[bool] = False

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class)
        for name, value in defaults(self.settings_class).items():
            setattr(self, name, value)
        for section, cls in SECTIONS.items():
            for name, value in defaults(cls).items():
                setattr(self, f"{section}_{name}", value)
        self.domain_path: Any = None
        self.domain_arguments: dict[str, Any] = {}
        self.reward_path: Any = None
        self.reward_arguments: dict[str, Any] = {}
        self.watched: Any = None
        self.initial_weights: str | None = None
        self.env_runner_cls = ChainRunner
        self.num_env_runners = 0
        self.num_learners = 0
        self.seed = 0
        self.sample_timeout_s = None
        self.restart_failed_env_runners = True
        self.delay_between_env_runner_restarts_s = 0.5
        self.torch_ddp_kwargs = {"broadcast_buffers": False}
        space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.observation_space, self.action_space = space, space

    # -- the grammar

    def domain(self, path: Any, **arguments: Any) -> DiffusionConfig:
        """A short name, an import path or a Domain class, and its arguments."""
        self.domain_path, self.domain_arguments = path, arguments
        return self

    def start_from(self, weights: str | None) -> DiffusionConfig:
        """Begins with fine-tuned weights; the reference stays the domain's pretrained network."""
        self.initial_weights = weights
        return self

    def reward(self, path: Any, *, actors: int | None = None, **arguments: Any) -> DiffusionConfig:
        """A domain's short name, an import path, a class or a function, and its arguments; ``combine`` for several."""
        self.reward_path, self.reward_arguments = path, arguments
        return self if actors is None else self.scoring(actors=actors)

    def watch(self, *rewards: Any, **named: Any) -> DiffusionConfig:
        """Rewards that are told beside the one that is optimised, so that its being hacked shows."""
        self.watched = {**{f"{i}": one for i, one in enumerate(rewards)}, **named} if named else list(rewards)
        return self

    def chain(self, **settings: Any) -> DiffusionConfig:
        """``ChainSettings``."""
        return self._set("chain", ChainSettings, settings)

    def evaluate(self, **settings: Any) -> DiffusionConfig:
        """``EvaluateSettings``."""
        return self._set("evaluate", EvaluateSettings, settings)

    def scoring(self, **settings: Any) -> DiffusionConfig:
        """``ScoringSettings``."""
        return self._set("scoring", ScoringSettings, settings)

    def training(self, **settings: Any) -> DiffusionConfig:
        """The algorithm's own settings; RLlib's other training keys pass through."""
        known = defaults(self.settings_class)
        for name in [key for key in settings if key in known]:
            setattr(self, name, settings.pop(name))
        for name in settings:
            if not hasattr(self, name):
                hint = imports.nearest(name, known)
                raise ValueError(f"training has no key {name!r}{hint}; {self.algorithm_name} has {', '.join(known)}")
        return super().training(**settings) if settings else self

    def environment(self, env: Any = None, **kwargs: Any) -> DiffusionConfig:
        """``rayft/Toy-v0`` means the same as ``.domain("toy")``, with the reward its env_config names."""
        name = env.removeprefix("rayft.env:") if isinstance(env, str) else ""
        if not name.startswith("rayft/"):
            return super().environment(env, **kwargs)
        from rayft import env as environments  # registers the names

        told = {**gym.spec(name).kwargs, **kwargs.pop("env_config", {})}
        imports.check_arguments(environments.named, {k: v for k, v in told.items() if k != "flat"}, name)
        if "reward" in told:
            self.reward(told["reward"], **told.get("reward_arguments", {}))
        self.chain(**{k: told[k] for k in ("num_steps", "sigma", "eta") if k in told})
        return self.domain(told["domain"], **told.get("domain_arguments", {}))

    def _set(self, section: str, cls: type, values: Mapping[str, Any]) -> DiffusionConfig:
        known = defaults(cls)
        for name, value in values.items():
            if name not in known:
                hint = imports.nearest(name, known)
                raise ValueError(f"{section} has no key {name!r}{hint}; it has {', '.join(known)}")
            setattr(self, f"{section}_{name}", value)
        return self

    # -- checked views

    @property
    def algorithm_name(self) -> str:
        """ppo, rwmle, rgdm ..."""
        return type(self).__name__.removesuffix("Config").lower()

    def settings(self) -> Any:
        """The algorithm's numbers, checked."""
        return check("training", self.settings_class, {k: getattr(self, k) for k in defaults(self.settings_class)})

    def section(self, name: str) -> Any:
        """``chain``, ``evaluate`` or ``scoring``, checked."""
        cls = SECTIONS[name]
        return check(name, cls, {k: getattr(self, f"{name}_{k}") for k in defaults(cls)})

    def build_domain(self) -> domains.Domain:
        """The domain, without its network."""
        if self.domain_path is None:
            raise ValueError("no domain is given; choose one with domain: NAME (see `rayft configs`)")
        return domains.build(self.domain_path, self.domain_arguments)

    def evaluation_alpha(self) -> float | None:
        """Where J and J* are read: ``evaluate.alpha``, else the algorithm's alpha, else nowhere.

        Nor for eta < 1, where x_T decides too much of x_0 for J* to be attainable (math, Sec. 2).
        """
        if self.section("chain").eta != 1:
            return None
        own = getattr(self, "alpha", None)
        return self.section("evaluate").alpha or (float(own) if own else None)

    def recipe(self, domain: domains.Domain) -> Recipe:
        """The rewards and how they become one."""
        if self.reward_path is None:
            raise ValueError(f"no reward is given; this domain has {', '.join(domain.rewards) or 'none of its own'}")
        return recipe(self.reward_path, self.reward_arguments, self.watched, domain.rewards)

    def process(self) -> Process:
        """The chain's transitions."""
        chain = self.section("chain")
        return reverse_process(self.build_domain().schedule(), chain.sigma, chain.eta, chain.num_steps)

    def differentiable(self, what: str, instead: str) -> None:
        """Refuses a reward that is no torch function of x_0, for ``what``, and says what to take ``instead``."""
        world = self.build_domain()
        told = self.recipe(world)
        if differentiable(told, world.rewards) is None:
            named = told.parts[0].path if told.plain else "a composition"
            raise ValueError(
                f"{what} needs one differentiable reward and {named} is none: subclass DifferentiableReward, or "
                f"{instead}"
            )

    def own_actors(self) -> list[tuple[str, int, dict[str, float]]]:
        """(what they are, how many, what each reserves) of the actors beside RLlib's."""
        scoring, world = self.section("scoring"), self.build_domain()
        fractions = sorted(set(gpus_wanted(self.recipe(world), world.rewards, scoring)))
        return [("reward actors", scoring.actors, scoring.reserved(gpus)) for gpus in fractions]

    def num_events(self) -> int:
        """Events that one iteration scores."""
        return self.settings().chains

    def num_rows(self, num_steps: int) -> int:
        """Transitions of one iteration."""
        return self.settings().chains * num_steps

    def validate(self) -> None:
        settings = self.settings()
        for name in defaults(self.settings_class):
            setattr(self, name, getattr(settings, name))
        for section in SECTIONS:
            self.section(section)
        domain = self.build_domain()
        self._check_rewards(domain)
        process = self.process()
        rows, learners = self.num_rows(process.num_steps), max(1, self.num_learners)
        if settings.minibatch_size > rows:
            raise ValueError(
                f"training.minibatch_size is {settings.minibatch_size}, but one iteration has {rows} transitions "
                f"({settings.chains} chains); lower it or raise training.chains"
            )
        first, last = settings.timesteps or (1, process.num_steps)
        if not first <= last <= process.num_steps:
            raise ValueError(
                f"training.timesteps is [{first}, {last}]; give the first and the last of t = 1 .. {process.num_steps}"
            )
        if settings.lora_scale is not None and not settings.lora_rank:
            raise ValueError(
                f"training.lora_scale is {settings.lora_scale} without adapters; set training.lora_rank too"
            )
        if settings.trainable == []:
            raise ValueError("training.trainable is empty, so nothing would be trained; leave it out to train all")
        if settings.row_share > 1:
            raise ValueError(f"training.row_share is {settings.row_share}; it is a share, above 0 and at most 1")
        if settings.minibatch_size % (learners * settings.microbatches):
            raise ValueError(
                f"training.minibatch_size is {settings.minibatch_size}; it must be a multiple of num_learners x "
                f"microbatches = {learners * settings.microbatches}"
            )
        if settings.chains < max(1, self.num_env_runners):
            raise ValueError(f"training.chains is {settings.chains}, fewer than the {self.num_env_runners} runners")
        log_once(f"{self.algo_class.__name__}_on_new_api_stack")  # RLlib would advertise its old stack here
        super().validate()

    def _check_rewards(self, domain: domains.Domain) -> None:
        components = self.recipe(domain).components
        for part in components:
            reward.check(part.path, part.arguments, domain.rewards)
        grouped = [p.name for p in components if getattr(reward.target(p.path, domain.rewards), "groupwise", False)]
        pieces = self.section("scoring").micro_batches
        if pieces > 1 and grouped:
            raise ValueError(
                f"{grouped[0]} scores a sample by all others of its batch, and scoring.micro_batches = {pieces} would "
                "show it only a piece; leave micro_batches at 1"
            )
        if pieces > self.settings().chains:
            raise ValueError(f"scoring.micro_batches is {pieces}, more than training.chains = {self.settings().chains}")

    def build_learner_group(self, *args: Any, **kwargs: Any) -> Any:
        with gloo_where_nccl_is_missing():
            return super().build_learner_group(*args, **kwargs)

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        chain = self.section("chain")
        told = {
            "domain": self.domain_path,
            "domain_arguments": self.domain_arguments,
            "weights": self.initial_weights,
            "precision": self.precision,
            "ema": self.ema,
            "lora_rank": self.lora_rank,
            "lora_scale": self.lora_scale,
            "trainable": self.trainable,
            "num_steps": chain.num_steps,
            "sigma": chain.sigma,
            "eta": chain.eta,
            "critic": self.wants_critic,
        }
        return RLModuleSpec(module_class=DenoiserModule, model_config=told)

    @property
    def _model_config_auto_includes(self) -> dict[str, Any]:
        return {}
