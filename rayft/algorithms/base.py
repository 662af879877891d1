"""The iteration every algorithm shares: draw, score, credit, learn, sync. Blind to which algorithm it runs.

draw    transitions and the events they wait for      (runners; each algorithm names its draw)
score   events -> rewards                             (reward actors; NaN = failed)
credit  rewards -> one number per transition          (here, over the whole batch, before it is sharded)
learn   minibatches -> weights                        (learners)
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayError
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core import COMPONENT_LEARNER, COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from ray.rllib.core.learner.training_data import TrainingData
from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    ENV_RUNNER_SAMPLING_TIMER,
    LEARNER_RESULTS,
    LEARNER_UPDATE_TIMER,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
    SYNCH_WORKER_WEIGHTS_TIMER,
    TIMERS,
    WEIGHTS_SEQ_NO,
)
from ray.tune.execution.placement_groups import PlacementGroupFactory

from rayft.algorithms.config import DiffusionConfig
from rayft.chain import Chains
from rayft.draws import Draw, DrawFunction, draw_current, draw_pretrained, join
from rayft.rewards.pool import RewardPool
from rayft.score import Scores
from rayft.verdict import Samples, Verdict, judge, remember


@dataclass(frozen=True)
class Credit:
    """What learners get: transitions with their columns, a few scalars, and what credit wants logged."""

    chains: Chains
    scalars: dict[str, float] = field(default_factory=dict)
    logged: dict[str, float] = field(default_factory=dict)


class DiffusionRL(Algorithm):
    """Base of PPO, RWMLE, RGDM. A subclass names its draw and turns rewards into credit."""

    config: Any  # DiffusionConfig; RLlib's own annotations are Optional until setup() has run
    env_runner: Any
    env_runner_group: Any
    learner_group: Any

    @abstractmethod
    def credit(self, draw: Draw, rewards: np.ndarray) -> Credit:
        """Transitions with the columns that the learner's ``row_loss`` reads."""

    def draw_function(self) -> DrawFunction:
        """What one iteration draws; whole chains of the policy unless an algorithm says otherwise."""
        return draw_current

    # -- life

    def setup(self, config: Any) -> None:
        super().setup(config)
        scoring = self.config.section("scoring")
        self.domain = self.config.build_domain()
        self.settings = self.config.settings()
        told = (self.config.reward_path, self.config.reward_arguments, dict(self.domain.rewards), self.domain.decoder)
        self.pool = RewardPool(
            (*told, scoring.undecodable), scoring.actors, scoring.num_cpus_per_actor, scoring.num_gpus_per_actor
        )
        self.pretrained: Samples | None = None
        self.verdict: Verdict | None = None
        self.counts = {"reward_calls": 0, "failed": 0, "chains": 0}

    def cleanup(self) -> None:
        self.pool.stop()
        super().cleanup()
        with contextlib.suppress(OSError):  # outside Tune, Ray leaves an empty folder in ~/ray_results per algorithm
            Path(str(self.logdir)).rmdir()

    def training_step(self) -> None:
        self.verdict = None
        with self.metrics.log_time((TIMERS, ENV_RUNNER_SAMPLING_TIMER)):
            draw = self.collect("train", self.draw_function(), self.settings.chains)
        with self.metrics.log_time((TIMERS, "score")):
            scores = self.score(draw)
        with self.metrics.log_time((TIMERS, "credit")):
            credit = self.credit(draw, scores.rewards)
        with self.metrics.log_time((TIMERS, LEARNER_UPDATE_TIMER)):
            self.learn(credit)
        with self.metrics.log_time((TIMERS, SYNCH_WORKER_WEIGHTS_TIMER)):
            self.sync()
        self._log(draw, scores, credit)
        every = self.config.section("evaluate").every
        if every and (self.iteration + 1) % every == 0:
            self.evaluate_policy()

    # -- the four acts

    def collect(self, purpose: str, draw: DrawFunction, num_chains: int, which: str = "current") -> Draw:
        """One draw, made in parts by the runners. A part lost with its runner is drawn again by another: same bits."""
        num_parts = max(1, self.config.num_env_runners)
        sizes = [len(part) for part in np.array_split(np.arange(num_chains), num_parts)]
        settings = {name: getattr(self.settings, name) for name in vars(self.settings)}
        shared = {"draw": draw, "iteration": self.iteration, "purpose": purpose, "which": which, "settings": settings}
        calls = [{**shared, "part": part, "num_chains": size} for part, size in enumerate(sizes)]
        self.counts["chains"] += num_chains
        if self.config.num_env_runners == 0:
            drawn = join([self.env_runner.sample(**call) for call in calls])
            self.metrics.aggregate([self.env_runner.get_metrics()], key=ENV_RUNNER_RESULTS)
            return drawn
        return join(self._collect_remote(calls))

    def _collect_remote(self, calls: list[dict[str, Any]]) -> list[Draw]:
        group, done, idle_rounds = self.env_runner_group, {}, 0
        error: Any = None
        while len(done) < len(calls):
            waiting = [call for call in calls if call["part"] not in done]
            workers = group.healthy_worker_ids()[: len(waiting)]
            sent = waiting[: len(workers)]
            before = len(done)
            if workers:
                results = group._worker_manager.foreach_actor(
                    ["sample_part"] * len(sent), kwargs=sent, remote_actor_ids=workers, timeout_seconds=None
                )
                for result in results:
                    if not result.ok:
                        error = result.get()
                        continue
                    part, ref, stats = result.get()
                    with contextlib.suppress(RayError):  # the runner died with its draw: another draws it again
                        done[part] = ray.get(ref)
                        self.metrics.aggregate([stats], key=ENV_RUNNER_RESULTS)
            idle_rounds = 0 if len(done) > before else idle_rounds + 1
            if idle_rounds > 20:
                raise ValueError(f"no runner could draw: {str(error).strip().splitlines()[-1]}") from None
            if idle_rounds:
                self.restore_env_runners(group)
                self.sync()
        return [done[part] for part in range(len(calls))]

    def score(self, draw: Draw) -> Scores:
        """Rewards of the draw's events, failures counted."""
        scores = self.pool.score(draw.events, draw.context)
        self.counts["reward_calls"] += scores.num_calls
        self.counts["failed"] += scores.num_failed
        if scores.num_failed == len(scores.rewards):
            why = f": {scores.reasons[0]}" if scores.reasons else ""
            raise ValueError(f"the reward failed on all {scores.num_failed} samples of iteration {self.iteration}{why}")
        return scores

    def learn(self, credit: Credit) -> None:
        """One update over the whole batch; every learner reads the same rows and takes its share of each minibatch."""
        told = {
            "scalars": credit.scalars,
            "num_epochs": self.settings.num_epochs,
            "minibatch_size": self.settings.minibatch_size,
            "address": (self.config.seed or 0, self.iteration),
            "timesteps": {NUM_ENV_STEPS_SAMPLED_LIFETIME: 0},
        }
        if self.config.num_learners == 0:
            batch: Any = credit.chains  # RLlib's annotation wants its own batch; ours goes through untouched
            results = self.learner_group.update(training_data=TrainingData(batch=batch), **told)
        else:
            refs = [ray.put(credit.chains)] * self.config.num_learners
            results = self.learner_group.update(batch_refs=refs, **told)
        self.metrics.aggregate(results, key=LEARNER_RESULTS)

    def sync(self) -> None:
        """Weights from the learners to every runner, the local one included; returns when all have them.

        RLlib's own ``sync_weights`` drops what it is given while a runner still works on the weights before.
        """
        path = f"{COMPONENT_LEARNER}/{COMPONENT_RL_MODULE}"
        state = self.learner_group.get_state(components=[path], inference_only=True)[COMPONENT_LEARNER]
        state = {key: state[key] for key in (COMPONENT_RL_MODULE, WEIGHTS_SEQ_NO) if key in state}
        self.env_runner.set_state(state)
        if self.config.num_env_runners:
            told = {"state": ray.put(state)}
            self.env_runner_group.foreach_env_runner("set_state", kwargs=told, local_env_runner=False)

    # -- how near the optimum

    def evaluate_policy(self) -> Verdict:
        """Holds the policy against J* and the frontier (math, Sec. 2); the pretrained model is drawn once."""
        which = "ema" if self.settings.ema else "current"
        draw = self.collect("evaluate", draw_current, self.config.section("evaluate").chains, which=which)
        policy = remember(self.domain, draw, self.score(draw))
        self.verdict = judge(self.draw_pretrained(), policy, self.config.evaluation_alpha())
        for name, value in self.verdict.scalars().items():
            self.metrics.log_value(("evaluation", name), value, window=1)
        return self.verdict

    def draw_pretrained(self) -> Samples:
        """Samples of the pretrained model, drawn and scored once in a run."""
        if self.pretrained is None:
            draw = self.collect("pretrained", draw_pretrained, self.config.section("evaluate").pretrained_chains)
            self.pretrained = remember(self.domain, draw, self.score(draw))
        return self.pretrained

    # -- state

    def policy_state(self, which: str = "denoiser") -> dict[str, np.ndarray]:
        """The trained network's weights (``ema`` for their moving average), as numpy."""
        state = self.learner_group.get_weights()[DEFAULT_MODULE_ID]
        return {k.removeprefix(f"{which}."): v for k, v in state.items() if k.startswith(f"{which}.")}

    def set_policy(self, weights: dict[str, np.ndarray]) -> None:
        """Puts weights into the trained network (and its average) on every learner and runner."""

        def put(learner: Any) -> None:
            module = learner.module[DEFAULT_MODULE_ID].unwrapped()
            for net in filter(None, (module.denoiser, module.ema)):
                net.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in weights.items()})

        self.learner_group.foreach_learner(put)
        self.sync()

    def reset_policy(self) -> None:
        """Back to the pretrained weights."""
        self.set_policy(self.policy_state("reference"))

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {**super().get_state(*args, **kwargs), "rayft": {"pretrained": self.pretrained, "counts": self.counts}}

    def set_state(self, state: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().set_state(state, *args, **kwargs)
        if "rayft" in state:
            self.pretrained, self.counts = state["rayft"]["pretrained"], dict(state["rayft"]["counts"])

    def _log(self, draw: Draw, scores: Scores, credit: Credit) -> None:
        kl = draw.chains.columns.get("kl")
        values = {
            "reward_mean": float(np.nanmean(scores.rewards)),
            "reward_std": float(np.nanstd(scores.rewards)),
            "reward_failed": float(scores.num_failed),
            "undecodable": float(scores.undecodable.mean()),
            "guard_no_spread": float(np.nanstd(scores.rewards) < 1e-8),
            **({"kl": float(kl.sum(0).mean())} if kl is not None else {}),
            **{f"{k}_lifetime": float(v) for k, v in self.counts.items()},
            **credit.logged,
        }
        for name, value in values.items():
            self.metrics.log_value(name, value, window=1)

    @classmethod
    def get_default_config(cls) -> DiffusionConfig:
        raise NotImplementedError

    @classmethod
    def default_resource_request(cls, config: Any) -> PlacementGroupFactory:
        """RLlib's bundles and one for each reward actor, so that Tune places them too."""
        request = super().default_resource_request(config)
        full = cls.get_default_config().update_from_dict(config)
        scoring = full.section("scoring")
        one = {"CPU": scoring.num_cpus_per_actor, "GPU": scoring.num_gpus_per_actor}
        return PlacementGroupFactory(
            [*request.bundles, *[dict(one)] * scoring.actors], strategy=str(full.placement_strategy)
        )
