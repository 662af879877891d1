"""The iteration every algorithm shares: gain experience, learn, sync. Blind to which algorithm it runs.

experience  transitions with a number for each        (each algorithm's own: chains, or a pay-off bank)
learn       minibatches -> weights                    (learners)
sync        weights -> runners                        (where experience is the policy's own)
"""

from __future__ import annotations

import contextlib
import math
from abc import abstractmethod
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core import COMPONENT_LEARNER, COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from ray.rllib.core.learner.training_data import TrainingData
from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    LEARNER_RESULTS,
    LEARNER_UPDATE_TIMER,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
    SYNCH_WORKER_WEIGHTS_TIMER,
    TIMERS,
    WEIGHTS_SEQ_NO,
)
from ray.tune.execution.placement_groups import PlacementGroupFactory

from rayft import adapt
from rayft.algorithms.config import DiffusionConfig
from rayft.chain import Chains
from rayft.domain import Domain
from rayft.draws import Draw, DrawFunction, Fate, draw_current, draw_pretrained, join
from rayft.rewards.service import RewardService
from rayft.rl.gather import gather
from rayft.rl.near import Credit
from rayft.score import Scores
from rayft.verdict import Samples, Verdict, judge, known_mean, remember


def spoken(rewards: np.ndarray, parts: Mapping[str, np.ndarray]) -> dict[str, float]:
    """What is told of a batch's rewards: mean, spread, and each part where there are several."""
    return {
        "reward_mean": known_mean(rewards),
        "reward_std": float(np.nanstd(rewards)) if np.isfinite(rewards).any() else 0.0,
        "guard_no_spread": float(not np.isfinite(rewards).any() or np.nanstd(rewards) < 1e-8),
        **{f"part/{name}": known_mean(column) for name, column in parts.items() if len(parts) > 1},
    }


def open_service(config: Any, domain: Domain) -> RewardService:
    """The rewards of a configuration, not yet started."""
    return RewardService(
        config.recipe(domain), domain.decoder, domain.canonical, domain.rewards, config.section("scoring")
    )


class DiffusionRL(Algorithm):
    """Base of every algorithm. A subclass says what it learns from."""

    config: Any  # DiffusionConfig; RLlib's own annotations are Optional until setup() has run
    env_runner: Any
    env_runner_group: Any
    learner_group: Any
    pays_for = "train"  # what its training scores are metered as
    rolls_out = True  # learns from its own policy's chains, so that runners need its weights after every update

    @abstractmethod
    def experience(self) -> tuple[Credit, dict[str, float]]:
        """What this iteration learns from, and what is told of it."""

    # -- life

    def setup(self, config: Any) -> None:
        super().setup(config)
        self.domain = self.config.build_domain()
        self.settings = self.config.settings()
        self.scoring = self.config.section("scoring")
        self.rewards = open_service(self.config, self.domain)
        self.rewards.start()
        self.pretrained: Samples | None = None
        self.verdict: Verdict | None = None
        self.counts = {"reward_calls": 0, "cache_hits": 0, "failed": 0, "chains": 0}
        self.horizon: int | None = None  # the last iteration, where somebody knows it
        self.synced = 0  # times that remote runners have been given weights

    def cleanup(self) -> None:
        if hasattr(self, "rewards"):
            self.rewards.stop()
        super().cleanup()
        with contextlib.suppress(OSError):  # outside Tune, Ray leaves an empty folder in ~/ray_results per algorithm
            Path(str(self.logdir)).rmdir()

    def training_step(self) -> None:
        self.verdict = None
        if refused := self.refusal():
            raise ValueError(refused)
        if self.rewards.recipe.needs_fit:
            self.draw_pretrained()
        credit, told = self.experience()
        with self.metrics.log_time((TIMERS, LEARNER_UPDATE_TIMER)):
            told |= self.learn(credit)
        if self.rolls_out:
            with self.metrics.log_time((TIMERS, SYNCH_WORKER_WEIGHTS_TIMER)):
                self.sync()
        self._log(told | credit.logged)
        every = self.config.section("evaluate").every
        if every and (self.iteration + 1) % every == 0:
            self.evaluate_policy()

    # -- the acts

    def collect(
        self,
        purpose: str,
        draw: DrawFunction,
        num_chains: int,
        which: str = "current",
        iteration: int | None = None,
        piece: tuple[int, int] = (0, 1),
        chains: Fate = "sent",
    ) -> Draw:
        """One draw (or one piece of it: number, of how many), made in parts by the runners.

        A part lost with its runner is drawn again by another: same bits. ``chains`` says where those of remote runners
        are left.
        """
        num_runners, (number, num_pieces) = max(1, self.config.num_env_runners), piece
        sizes = [len(part) for part in np.array_split(np.arange(num_chains), num_runners * num_pieces)]
        when: int = self.iteration if iteration is None else iteration
        shared = {"draw": draw, "iteration": when, "purpose": purpose, "which": which}
        shared |= {"settings": self.draw_settings(when)}
        parts = range(number * num_runners, (number + 1) * num_runners)
        calls = [{**shared, "part": part, "num_chains": sizes[part]} for part in parts]
        self.counts["chains"] += sum(call["num_chains"] for call in calls)
        if self.config.num_env_runners == 0:
            drawn = join([self.env_runner.sample(**call) for call in calls])
            self.metrics.aggregate([self.env_runner.get_metrics()], key=ENV_RUNNER_RESULTS)
            return drawn
        return self.gather([{**call, "chains": chains} for call in calls])

    def gather(self, calls: list[dict[str, Any]]) -> Draw:
        """What remote runners draw, called so, with the weights that they have been given last."""
        calls = [{**call, "synced": self.synced} for call in calls]
        parts, statistics = gather(self.env_runner_group, calls, self._heal)
        self.metrics.aggregate(statistics, key=ENV_RUNNER_RESULTS)
        return join(parts)

    def draw_settings(self, iteration: int) -> dict[str, Any]:
        """What a draw may read of the settings, as they are in that iteration."""
        return dict(vars(self.settings))

    def _heal(self) -> None:
        self.restore_env_runners(self.env_runner_group)
        self._hand_out()

    def score(self, draw: Draw, purpose: str = "train", watch: bool = False) -> Scores:
        """Rewards of the draw's events, counted. Only training follows a curriculum: J and J* are of one reward."""
        iteration = self.iteration if purpose == self.pays_for else None
        return self.settled([self.rewards.submit(draw.events, draw.context, purpose, iteration, watch)])

    def settled(self, waiting: list[Future[Scores]]) -> Scores:
        """The answers, joined and counted."""
        scores = Scores.join([one.result() for one in waiting])
        self.count(scores)
        return scores

    def count(self, scores: Scores) -> None:
        """What they cost."""
        self.counts["reward_calls"] += scores.num_calls
        self.counts["cache_hits"] += scores.num_hits
        self.counts["failed"] += scores.num_failed

    def learn(self, credit: Credit) -> dict[str, float]:
        """One update over the whole batch; every learner reads the same rows and takes its share of each minibatch.

        Returns what only learning could tell.
        """
        told = {
            "scalars": {**credit.scalars, "lr": self.lr()},
            "num_epochs": self.settings.num_epochs,
            "minibatch_size": self.settings.minibatch_size,
            "address": (self.config.seed or 0, self.iteration),
            "timesteps": {NUM_ENV_STEPS_SAMPLED_LIFETIME: 0},
        }
        if self.config.num_learners == 0:
            batch: Any = credit.chains  # RLlib's annotation wants its own batch; ours goes through untouched
            results = self.learner_group.update(training_data=TrainingData(batch=batch), **told)
        else:
            here = isinstance(credit.chains, Chains)
            refs = [ray.put(credit.chains)] * self.config.num_learners if here else credit.chains
            results = self.learner_group.update(batch_refs=refs, **told)
        self.metrics.aggregate(results, key=LEARNER_RESULTS)
        return {}

    def lr(self) -> float:
        """This iteration's step size: ``training.lr``, or less where it falls and the last iteration is known."""
        return self.settings.lr * self.left(self.settings.lr_end, self.iteration)

    def left(self, end: float, iteration: int) -> float:
        """Share that is left, in an iteration, of what falls to a share ``end`` along half a cosine."""
        if self.horizon is None:
            return 1.0
        done = min(iteration / max(self.horizon - 1, 1), 1.0)
        return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * done))

    def sync(self) -> None:
        """Weights from the learners to every runner, the local one included; returns when all have them.

        RLlib's own ``sync_weights`` drops what it is given while a runner still works on the weights before.
        """
        self.synced += 1
        self._hand_out()

    def _hand_out(self) -> None:
        path = f"{COMPONENT_LEARNER}/{COMPONENT_RL_MODULE}"
        state = self.learner_group.get_state(components=[path], inference_only=True)[COMPONENT_LEARNER]
        state = {key: state[key] for key in (COMPONENT_RL_MODULE, WEIGHTS_SEQ_NO) if key in state}
        self.env_runner.set_state(state)
        if self.config.num_env_runners:
            told = {"state": ray.put({**state, "synced": self.synced})}  # travels to each node once
            self.env_runner_group.foreach_env_runner("set_state", kwargs=told, local_env_runner=False)

    # -- how near the optimum

    def evaluate_policy(self) -> Verdict:
        """Holds the policy against J* and the frontier (math, Sec. 2); the pretrained model is drawn once."""
        if not self.rolls_out:
            self.sync()
        which = "ema" if self.settings.ema else "current"
        chains = self.config.section("evaluate").chains
        draw = self.collect("evaluate", draw_current, chains, which=which, chains="dropped")
        policy = remember(self.domain, draw, self.score(draw, "evaluate", watch=True))
        self.verdict = judge(self.draw_pretrained(), policy, self.config.evaluation_alpha())
        for name, value in self.verdict.scalars().items():
            self.metrics.log_value(("evaluation", name), value, window=1)
        return self.verdict

    def draw_pretrained(self) -> Samples:
        """Samples of the pretrained model, drawn and scored once in a run."""
        if self.pretrained is None:
            chains = self.config.section("evaluate").pretrained_chains
            draw = self.collect("pretrained", draw_pretrained, chains, chains="dropped")
            self.pretrained = remember(self.domain, draw, self.score(draw, "pretrained", watch=True))
        return self.pretrained

    def signal(self) -> dict[str, float]:
        """By timestep, how much of a sample's reward can be read on the way; of algorithms that read it there."""
        return {}

    # -- state

    def policy_state(self, which: str = "denoiser") -> dict[str, np.ndarray]:
        """The trained network's weights (``ema`` for their moving average), as numpy."""
        state = self.learner_group.get_weights()[DEFAULT_MODULE_ID]
        own = {k.removeprefix(f"{which}."): v for k, v in state.items() if k.startswith(f"{which}.")}
        return adapt.plain(getattr(self.env_runner.module, which), own)

    def set_policy(self, weights: dict[str, np.ndarray]) -> None:
        """Puts weights into the trained network (and its average) on every learner and runner."""

        def put(learner: Any) -> None:
            module = learner.module[DEFAULT_MODULE_ID].unwrapped()
            for net in filter(None, (module.denoiser, module.ema)):
                adapt.put(net, {k: torch.from_numpy(np.array(v)) for k, v in weights.items()})

        self.learner_group.foreach_learner(put)
        self.sync()

    def reset_policy(self) -> None:
        """Back to the pretrained weights."""
        self.set_policy(self.policy_state("reference"))

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        told = {"pretrained": self.pretrained, "counts": self.counts}
        told |= {"recipe": self.rewards.recipe.state(), "meter": self.rewards.meter.state()}
        return {**super().get_state(*args, **kwargs), "rayft": told}

    def set_state(self, state: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().set_state(state, *args, **kwargs)
        if "rayft" in state:
            told = state["rayft"]
            self.pretrained, self.counts = told["pretrained"], dict(told["counts"])
            self.rewards.recipe = self.rewards.recipe.with_state(told["recipe"])
            self.rewards.meter.load_state(told["meter"])

    def _log(self, told: dict[str, float]) -> None:
        values = {
            **told,
            **{f"{k}_lifetime": float(v) for k, v in self.counts.items()},
        }
        for name, value in values.items():
            self.metrics.log_value(name, value, window=1)

    def refusal(self) -> str | None:
        """Why the next iteration, and the evaluations that must follow it, would pay more than the run may."""
        if self.scoring.max_reward_calls is None:
            return None
        recipe, told = self.rewards.recipe, self.config.section("evaluate")
        own = sum(not part.watched for part in recipe.components)
        needed = self.events_ahead() * own + told.chains * len(recipe.components)
        if self.pretrained is None:
            needed += told.pretrained_chains * len(recipe.components)
        used = self.counts["reward_calls"]
        if used + needed <= self.scoring.max_reward_calls:
            return None
        return (
            f"scoring.max_reward_calls is {self.scoring.max_reward_calls}: {used} are paid, and another iteration with "
            f"the evaluation after it may take {needed}"
        )

    def events_ahead(self) -> int:
        """Events that the next iteration has scored."""
        return self.config.num_events()

    @classmethod
    @abstractmethod
    def get_default_config(cls) -> DiffusionConfig:
        """Its config class, with defaults."""

    @classmethod
    def default_resource_request(cls, config: Any) -> PlacementGroupFactory:
        """RLlib's bundles and one for each actor of ours, so that Tune places them too."""
        request = super().default_resource_request(config)
        full = cls.get_default_config().update_from_dict(config)
        actors = [reserved for _, num, reserved in full.own_actors() for _ in range(num)]
        return PlacementGroupFactory([*request.bundles, *actors], strategy=str(full.placement_strategy))
