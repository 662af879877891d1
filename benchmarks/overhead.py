"""What RLlib's runner and learner cost, against bare torch loops that do the same work by hand.

    ratio = median time of the bare loop / median time of ours,    1 = no overhead

The two take turns, and change who is first, within one process: a busy machine slows both. A chain is 32-dimensional
with T = 100, a draw has 256 of them; "small" is a perceptron of hidden width 128, "wide" one of 1280 (with --quick
320, and without stock RLlib). Everything runs on one torch thread. Before it is timed, a pair must agree in its
numbers, stock RLlib excepted.
"""

from __future__ import annotations

import os

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # read when ray is imported; otherwise it writes ~/.ray/auth_token

import logging
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import ray
import torch
from ray.rllib.algorithms.ppo import PPOConfig as StockPPOConfig
from ray.rllib.core.columns import Columns
from ray.rllib.core.distribution.torch.torch_distribution import TorchDiagGaussian
from ray.rllib.core.learner.training_data import TrainingData
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchRLModule
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.utils.metrics import NUM_ENV_STEPS_SAMPLED_LIFETIME
from torch import Tensor, nn

from benchmarks import _result
from rayft.algorithms.ppo import PPOConfig
from rayft.bench import Bench
from rayft.chain import sample
from rayft.domain import Denoiser, Domain
from rayft.draws import Draw, draw_current
from rayft.reward import Reward
from rayft.rl.near import Credit
from rayft.schedule import Schedule, linear
from rayft.seeds import numpy_generator, torch_generator

DIM, NUM_STEPS, NUM_CHAINS = 32, 100, 256
SMALL, WIDE = 128, 1280
MINIBATCH, LR, ALPHA = 4096, 1e-5, 0.1
TARGETS = {"runner/local/wide": 0.95, "runner/remote/wide": 0.90, "learner/update": 0.93}


class Perceptron(Denoiser):
    """Noise prediction by three layers, the timestep as one more input."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        first, last = nn.Linear(DIM + 1, hidden), nn.Linear(hidden, DIM)
        self.net = nn.Sequential(first, nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), last)

    def forward(self, x_t: Tensor, timestep: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        return self.net(torch.cat([x_t, (timestep / NUM_STEPS).unsqueeze(-1)], -1))


class Norm(Reward):
    """r(x) = -|x|: costs nothing."""

    def __call__(self, samples: Any) -> np.ndarray:
        return -np.linalg.norm(np.stack(samples), axis=-1)


class Plane(Domain):
    """32 free numbers and an untrained network: only its size matters here."""

    event_shape = (DIM,)
    rewards: Mapping[str, str] = {"norm": "benchmarks.overhead:Norm"}

    def __init__(self, hidden: int = 128, num_steps: int = NUM_STEPS) -> None:
        self.hidden, self.num_steps = hidden, num_steps

    def schedule(self) -> Schedule:
        return linear(self.num_steps)

    def denoiser(self) -> Denoiser:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return Perceptron(self.hidden)


def draw_plain(bench: Bench, num_chains: int, generator: torch.Generator, settings: Mapping[str, Any]) -> Draw:
    """Chains of the policy alone, without the pretrained model beside it: what the bare loop does."""
    x_T, context = bench.start(num_chains, generator)  # noqa: N806
    chains = sample(bench.policy, x_T, context, generator)
    return Draw(chains, chains.x_0, chains.context)


class StockModule(TorchRLModule):
    """The same policy as stock RLlib wants it: flat observations in, a diagonal Gaussian out."""

    def setup(self) -> None:
        domain = Plane(self.model_config["hidden"])
        self.net, self.told = domain.denoiser(), Coefficients(domain.schedule())

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        x_t, t = batch[Columns.OBS][:, :DIM], (batch[Columns.OBS][:, DIM] * NUM_STEPS).round().long()
        mean = self.told.keep[t, None] * x_t + self.told.gain[t, None] * self.net(x_t, t, {})
        log_sigma = self.told.sigma[t.clamp(min=1), None].log().expand_as(mean)
        return {Columns.ACTION_DIST_INPUTS: torch.cat([mean, log_sigma], -1)}

    def get_exploration_action_dist_cls(self) -> type[TorchDiagGaussian]:
        return TorchDiagGaussian


# -- the bare loops


class Coefficients:
    """The chain's numbers, written out from math.md 1 without rayft's Policy."""

    def __init__(self, schedule: Schedule) -> None:
        ab, ab_prev = schedule.alpha_bar[1:], schedule.alpha_bar[:-1]
        beta = 1 - ab / ab_prev
        nothing = ab.new_zeros(1)
        self.keep = torch.cat([nothing, 1 / (1 - beta).sqrt()]).float()
        self.gain = torch.cat([nothing, -beta / ((1 - beta) * (1 - ab)).sqrt()]).float()
        self.sigma = torch.cat([nothing, beta.sqrt()]).float()
        self.rows = torch.stack([self.keep, self.gain, self.sigma]).T.tolist()


@torch.no_grad()
def bare_chains(net: nn.Module, told: Coefficients, generator: torch.Generator) -> tuple[np.ndarray, np.ndarray]:
    """All x_t and the log-probs of 256 chains: T times mean, noise, log-prob, kept."""
    x = torch.empty(NUM_STEPS + 1, NUM_CHAINS, DIM)
    log_prob = torch.empty(NUM_STEPS, NUM_CHAINS)
    x[NUM_STEPS] = torch.randn(NUM_CHAINS, DIM, generator=generator)
    for t in range(NUM_STEPS, 0, -1):
        keep, gain, sigma = told.rows[t]
        mean = keep * x[t] + gain * net(x[t], torch.full((NUM_CHAINS,), t), {})
        x[t - 1] = mean + sigma * torch.randn(NUM_CHAINS, DIM, generator=generator)
        square = (x[t - 1] - mean).square().sum(1)
        log_prob[t - 1] = -square / (2 * sigma**2) - DIM * (math.log(sigma) + 0.5 * math.log(2 * math.pi))
    return x.numpy(), log_prob.numpy()


class BareUpdate:
    """PPO's update by hand: shuffle, gather, clipped surrogate plus this step's KL, clip the gradient, AdamW."""

    def __init__(self, net: nn.Module, told: Coefficients) -> None:
        self.net, self.told = net, told
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.0)

    def __call__(self, credit: Credit, address: tuple[int, int]) -> None:
        x, t = torch.from_numpy(credit.chains.x), torch.from_numpy(np.array(credit.chains.t))
        names = ("log_prob", "advantage", "mean_ref", "alive", "kl_weight")
        told = {name: torch.from_numpy(np.ascontiguousarray(credit.chains.columns[name])) for name in names}
        total = t.numel()
        order = torch.from_numpy(numpy_generator(*address, "shuffle", 0).permutation(total))
        for start in range(0, total - MINIBATCH + 1, MINIBATCH):
            chosen = order[start : start + MINIBATCH]
            row, chain = chosen // NUM_CHAINS, chosen % NUM_CHAINS
            rows = {name: column[row, chain] for name, column in told.items()}
            self.step(x[row + 1, chain], x[row, chain], t[row, chain], rows)

    def step(self, x_t: Tensor, x_prev: Tensor, t: Tensor, rows: dict[str, Tensor]) -> None:
        told, sigma = self.told, self.told.sigma[t]
        mean = told.keep[t, None] * x_t + told.gain[t, None] * self.net(x_t, t, {})
        constant = DIM * (sigma.log() + 0.5 * math.log(2 * math.pi))
        log_prob = -(x_prev - mean).square().sum(1) / (2 * sigma**2) - constant
        ratio, advantage = (log_prob - rows["log_prob"]).exp(), rows["advantage"]
        surrogate = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        kl = (mean - rows["mean_ref"]).square().sum(1) / (2 * sigma**2)
        loss = (rows["alive"] * (surrogate + rows["kl_weight"] * kl)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()


# -- the rows


def built(hidden: int, runners: int = 0) -> Any:
    """The algorithm as a user builds it."""
    config = PPOConfig().domain("benchmarks.overhead:Plane", hidden=hidden).reward("norm")
    config.training(alpha=ALPHA, chains=NUM_CHAINS, minibatch_size=MINIBATCH, num_epochs=1, lr=LR)
    return config.evaluate(every=0).env_runners(num_env_runners=runners).build_algo()


def in_turn(ours: Callable[[], Any], bare: Callable[[], Any], rounds: int) -> _result.Figure:
    """The ratio of medians over alternating rounds, after one untimed turn of each."""
    ours()
    bare()
    times = []
    for number in range(rounds):
        pair = (ours, bare) if number % 2 else (bare, ours)
        taken = [_seconds(one) for one in pair]
        times.append(taken if number % 2 else taken[::-1])
    return _result.over_rounds(times, lambda table: float(np.median(table[:, 1]) / np.median(table[:, 0])))


def runner_local(hidden: int, rounds: int) -> _result.Figure:
    """``ChainRunner.sample`` in this process."""
    algo = built(hidden)
    runner, told = algo.env_runner, Coefficients(algo.env_runner.module.process.schedule)
    address = {"iteration": 0, "purpose": "train"}
    net = runner.module.denoiser

    def ours() -> Draw:
        return runner.sample(draw=draw_plain, num_chains=NUM_CHAINS, **address)

    def bare() -> tuple[np.ndarray, np.ndarray]:
        return bare_chains(net, told, torch_generator(0, 0, "train", 0))

    _check_same(ours(), bare())
    ratio = in_turn(ours, bare, rounds)
    algo.stop()
    return ratio


def runner_remote(hidden: int, rounds: int) -> _result.Figure:
    """One remote runner; the chains arrive in this process as numpy arrays, and it idles while the bare loop runs."""
    algo = built(hidden, runners=1)
    algo.env_runner_group.foreach_env_runner(_one_thread, local_env_runner=False)
    module = algo.env_runner.module
    told = Coefficients(module.process.schedule)

    def ours() -> Draw:
        return algo.collect("train", draw_plain, NUM_CHAINS)

    def bare() -> tuple[np.ndarray, np.ndarray]:
        return bare_chains(module.denoiser, told, torch_generator(0, 0, "train", 0))

    _check_same(ours(), bare())
    ratio = in_turn(ours, bare, rounds)
    algo.stop()
    return ratio


def runner_stock(hidden: int, rounds: int) -> _result.Figure:
    """Stock RLlib's runner and episodes on the vector environment, which evaluates the pretrained model as well."""
    world = {"domain": "benchmarks.overhead:Plane", "domain_arguments": {"hidden": hidden}, "flat": True}
    gym.register(f"Plane{hidden}-v0", entry_point="rayft.env:make", vector_entry_point="rayft.env:make_vector")
    config = StockPPOConfig().environment(f"Plane{hidden}-v0", env_config=world)
    config.env_runners(
        num_env_runners=0, num_envs_per_env_runner=NUM_CHAINS, gym_env_vectorize_mode="vector_entry_point"
    )
    config.rl_module(rl_module_spec=RLModuleSpec(module_class=StockModule, model_config={"hidden": hidden}))
    runner = SingleAgentEnvRunner(config=config, worker_index=0)
    domain = Plane(hidden)
    net, told = domain.denoiser(), Coefficients(domain.schedule())

    def ours() -> list[Any]:
        return runner.sample(num_episodes=NUM_CHAINS)

    assert [len(episode) for episode in ours()] == [NUM_STEPS] * NUM_CHAINS
    ratio = in_turn(ours, lambda: bare_chains(net, told, torch_generator(0, 0, "train", 0)), rounds)
    runner.stop()
    return ratio


def learner_update(hidden: int, rounds: int, num_minibatches: int) -> _result.Figure:
    """``Learner.update`` of PPO, its trust region included, against the bare loop, which has none."""
    algo = built(hidden)
    draw = algo.collect("train", draw_current, NUM_CHAINS)
    credit = algo.credit(draw, algo.score(draw).rewards)
    steps = num_minibatches * MINIBATCH // NUM_CHAINS  # rows of the chains that are learned from
    chains = credit.chains
    columns = {name: column[:steps] for name, column in chains.columns.items()}
    credit = Credit(type(chains)(chains.x[: steps + 1], chains.t[:steps], chains.context, columns), credit.scalars)
    module = algo.env_runner.module
    bare = BareUpdate(module.domain.denoiser(), Coefficients(module.process.schedule))
    scalars = {**credit.scalars, "lr": algo.lr()}
    told = {"scalars": scalars, "num_epochs": 1, "minibatch_size": MINIBATCH, "address": (0, 0)}
    told["timesteps"] = {NUM_ENV_STEPS_SAMPLED_LIFETIME: 0}

    batch: Any = credit.chains

    def ours() -> dict[str, Any]:
        return algo.learner_group.update(training_data=TrainingData(batch=batch), **told)[0]["default_policy"]

    done = ours()
    assert done["num_minibatches"].peek() == num_minibatches, "the trust region ended the update early"
    bare(credit, (0, 0))
    learned = algo.learner_group.get_weights()["default_policy"]
    for name, value in bare.net.state_dict().items():
        np.testing.assert_allclose(learned[f"denoiser.{name}"], value.numpy(), atol=2e-6)
    ratio = in_turn(ours, partial(bare, credit, (0, 0)), rounds)
    algo.stop()
    return ratio


def main() -> None:
    parser = _result.arguments(__doc__)
    told = parser.parse_args()
    torch.set_num_threads(1)
    root = str(Path(__file__).parents[1])
    environment = {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"}
    quiet: dict[str, Any] = {"include_dashboard": False, "logging_level": logging.ERROR}
    ray.init("local", num_cpus=4, runtime_env={"env_vars": environment}, **quiet)
    wide, many, few, minibatches = (WIDE // 4, 5, 3, 2) if told.quick else (WIDE, 200, 21, 6)
    result = _result.Result("overhead")
    measured = {
        "runner/local/wide": partial(runner_local, wide, few),
        "runner/remote/wide": partial(runner_remote, wide, few),
        "runner/local/small": partial(runner_local, SMALL, many),
        "learner/update": partial(learner_update, wide, few, minibatches),
        "learner/update/small": partial(learner_update, SMALL, 2 * few, minibatches),
    }
    if not told.quick:
        measured["runner/stock"] = partial(runner_stock, SMALL, few)
        measured["runner/remote/small"] = partial(runner_remote, SMALL, many)
        measured["runner/stock/wide"] = partial(runner_stock, wide, few)
    for name, measure in measured.items():
        result.figures[name] = measure()
        print(name, result.figures[name], flush=True)
    ray.shutdown()
    rows = [
        (name, figure.value, f"{figure.low:.3f} .. {figure.high:.3f}", TARGETS.get(name, ""))
        for name, figure in result.figures.items()
    ]
    _result.show("overhead: speed of ours over that of a bare torch loop", ("", "ratio", "95%", "target"), rows)
    result.write(_result.folder(told))


def _check_same(ours: Draw, bare: tuple[np.ndarray, np.ndarray]) -> None:
    """Both loops make the same chains and densities, so the comparison is fair."""
    np.testing.assert_allclose(ours.chains.x, bare[0], atol=2e-3, rtol=1e-3)
    np.testing.assert_allclose(ours.chains.columns["log_prob"], bare[1], atol=2e-2, rtol=1e-3)


def _one_thread(runner: Any) -> None:
    torch.set_num_threads(1)


def _seconds(call: Callable[[], Any]) -> float:
    before = time.perf_counter()
    call()
    return time.perf_counter() - before


if __name__ == "__main__":
    from benchmarks.overhead import main as run  # by this name classes and functions reach the remote runner

    run()
