"""The Gymnasium face of the chain: one contract over every domain, with the batch runner as its twin."""

from __future__ import annotations

import copy
import re
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import nn

from envs.molecules import edm
from rayft import domain as domains
from rayft import reward as rewards
from rayft.algorithms.ppo import PPOConfig
from rayft.chain import Policy
from rayft.draws import Bench, Draw, draw_current, draw_pretrained
from rayft.env import DenoisingEnv, DenoisingVectorEnv, make, make_vector, named
from rayft.rl.runner import ChainRunner
from rayft.score import DECODE, Done, Part, Task, Told, Work, Workbench
from rayft.seeds import torch_generator

NUM_CHAINS = 4


class Tiny(nn.Module):
    """A plain net(x, t) for matrices of 2 x 3; the same weights whenever it is built."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(7, 6)
        with torch.no_grad():
            self.layer.weight.copy_(torch.linspace(-0.5, 0.5, 42).reshape(6, 7))
            self.layer.bias.zero_()

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        told = torch.cat([x.flatten(1), t.to(x.dtype).unsqueeze(1) / 30], 1)
        return self.layer(told).reshape(x.shape)


def mean_of_each(samples: Sequence[np.ndarray]) -> list[float]:
    return [float(sample.mean()) for sample in samples]


def raises(samples: Sequence[Any]) -> list[float]:
    raise RuntimeError("no licence")


def fails_left_of_zero(samples: Sequence[np.ndarray]) -> list[float]:
    if any(sample[0] < 0 for sample in samples):
        raise RuntimeError("left of zero")
    return [1.0 for _ in samples]


GOLDEN = Path(__file__).parent / "golden"


def calm() -> str:
    """The golden checkpoint on a chain that starts with signal: on its own, untrained, errors grow 300 times."""
    model, folder = edm.read(GOLDEN / "edm/conditional"), tempfile.mkdtemp()
    told = {**model.arguments, "diffusion_noise_precision": 0.1}
    edm.write(folder, edm.EDMModel(model.denoiser, edm.schedule_of(told), told))
    return folder


SMALL = {"data": str(GOLDEN / "molecules/dsgdb9nsd")}  # five molecules, not all of QM9
TOLD: dict[str, dict[str, Any]] = {  # what a domain needs to be told; the others stand alone
    "plain": {
        "domain_arguments": {"network": Tiny, "event_shape": [2, 3], "betas": {"num_steps": 30}},
        "reward": mean_of_each,
    },
    "conditioned": {"domain_arguments": {"domain": "toy_masked", "classes": ["a", "b"]}},
    "molecules_conditional": {"domain_arguments": {"weights": None, **SMALL}},
    "molecules_edm": {"domain_arguments": {"model": calm(), "at": {"alpha": 0, "gap": 0}, **SMALL}},
    "shapes": {"domain_arguments": {"num_points": 16}},
    "shapes_conditional": {"domain_arguments": {"num_points": 16, "weights": None}},
}
LOG_PROB = 1e-3  # x - mu rounds to 1e-7 and is divided by a sigma of 0.006 where molecules end, in sixty dimensions
BUILTIN = sorted({"toy", "toy_masked", *domains.builtin()})


@dataclass(frozen=True)
class Twin:
    """A domain by the environment's names, and what the runner's side makes of the same."""

    told: dict[str, Any]
    bench: Bench
    judge: Workbench

    def score(self, draw: Draw) -> np.ndarray:
        """What a scoring process says of the draw."""
        numbers, rewards = np.arange(len(draw.events)), np.full(len(draw.events), np.nan)
        for said in self.judge.run(Work(0, numbers, draw.events, draw.context, (Task(0, numbers),))):
            if isinstance(said, Done) and said.part != DECODE:
                rewards[said.rows] = said.values
        return rewards


def twin(name: str) -> Twin:
    told = {"domain": name, **TOLD.get(name, {})}
    domain, _, process = named(**told)
    if process.num_steps > 50:
        told["num_steps"] = 50
        domain, _, process = named(**told)
    reference = domains.pretrained(domain)
    moved = copy.deepcopy(reference)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.mul_(1.02).add_(0.01)
    prediction: Any = reference.prediction
    current, pretrained = (Policy(net, process, domain.space, prediction) for net in (moved, reference))
    chosen = told.get("reward", next(iter(domain.rewards), None))
    judge = Workbench(Told((Part("reward", chosen),), domain.decoder, domain.canonical, domain.rewards))
    return Twin(told, Bench(domain, current, pretrained, torch.device("cpu"), torch.float32), judge)


def close(found: Any, expected: Any, atol: float = 1e-5) -> None:
    np.testing.assert_allclose(np.asarray(found, np.float64), np.asarray(expected, np.float64), rtol=1e-5, atol=atol)


def options_of(draw: Draw) -> dict[str, Any]:
    chains = draw.chains
    return {"x_T": chains.x[-1], **({"context": chains.context} if chains.context else {})}


def log_prob_under(reference: Policy, draw: Draw) -> np.ndarray:
    """[row, chain] from the runner's own mean_ref."""
    chains, context = draw.chains, {k: torch.as_tensor(v) for k, v in draw.chains.context.items()}
    x, t, mean = (torch.as_tensor(a) for a in (chains.x, chains.t, chains.columns["mean_ref"]))
    rows = [reference.log_prob(x[row], mean[row], t[row], context) for row in range(len(t))]
    return torch.stack(rows).numpy()


def assert_replays(env: Any, draw: Draw, scores: np.ndarray, log_prob: np.ndarray) -> None:
    """Every chain of the draw through a vector environment or, one by one, through a single one."""
    chains, options = draw.chains, options_of(draw)
    context = {"context": chains.context} if chains.context else {}
    single = isinstance(env, gym.Env)
    for pick in range(chains.num_chains) if single else [slice(None)]:
        take = {k: {n: a[pick] for n, a in v.items()} if isinstance(v, dict) else v[pick] for k, v in options.items()}
        seen, info = env.reset(options=take)
        for row in reversed(range(chains.num_rows)):
            assert_observed(seen, {"x_t": chains.x[row + 1], "t": chains.t[row], **context}, pick)
            close(info["next_mean"], chains.columns["mean_ref"][row, pick])
            seen, value, ended, cut, info = env.step(chains.x[row, pick])
            close(info["log_prob"], log_prob[row, pick], LOG_PROB)
            close(info["mean"], chains.columns["mean_ref"][row, pick])
            close(value, scores[pick] if row == 0 else 0 * scores[pick])
            assert np.all(np.asarray(ended) == (row == 0))
            assert not np.any(cut)
        assert_observed(seen, {"x_t": chains.x[0], "t": 0 * chains.t[0], **context}, pick)


def assert_observed(seen: dict[str, Any], expected: dict[str, Any], pick: Any) -> None:
    assert seen.keys() == expected.keys()
    close(seen["x_t"], expected["x_t"][pick])
    np.testing.assert_array_equal(seen["t"], expected["t"][pick])
    for key, value in expected.get("context", {}).items():
        np.testing.assert_array_equal(seen["context"][key], value[pick])


@pytest.mark.parametrize("draw_function", [draw_pretrained, draw_current])
@pytest.mark.parametrize("name", BUILTIN)
def test_replaying_drawn_chains_gives_the_same_observations_rewards_and_log_probs(name: str, draw_function: Any):
    world = twin(name)
    draw = draw_function(world.bench, NUM_CHAINS, torch_generator(0, 0, "test"), {}).numpy()
    log_prob = log_prob_under(world.bench.reference, draw)
    if draw_function is draw_pretrained:
        close(draw.chains.columns["log_prob"], log_prob)
    scores = world.score(draw)
    assert_replays(make(**world.told), draw, scores, log_prob)
    assert_replays(make_vector(NUM_CHAINS, **world.told), draw, scores, log_prob)


@pytest.mark.parametrize("name", ["toy", "toy_masked"])
def test_chains_of_the_real_runner_replay_through_the_environment(name: str):
    world = twin(name)
    config = PPOConfig().domain(name).reward(next(iter(world.bench.domain.rewards))).training(minibatch_size=8)
    runner = ChainRunner(config=config.chain(num_steps=10, sigma="gamma"), worker_index=0, num_workers=0)
    draw = runner.sample(draw=draw_current, num_chains=NUM_CHAINS, iteration=0, purpose="train")
    scores = world.score(draw)
    env = make(num_steps=10, sigma="gamma", **world.told)
    assert_replays(env, draw, scores, draw.chains.columns["log_prob"])


@pytest.mark.parametrize("name", BUILTIN)
def test_the_vector_environment_is_its_single_environments_side_by_side(name: str):
    told = {**twin(name).told, "num_steps": 3}
    vector = make_vector(NUM_CHAINS, **told)
    singles = SyncVectorEnv([lambda: make(**told)] * NUM_CHAINS, autoreset_mode=AutoresetMode.NEXT_STEP)
    assert vector.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    assert (vector.observation_space, vector.action_space) == (singles.observation_space, singles.action_space)
    both = [env.reset(seed=7) for env in (vector, singles)]
    singles.action_space.seed(0)
    for _ in range(10):  # two chains, their ends and their new beginnings
        assert_same(*both)
        actions = singles.action_space.sample()
        both = [env.step(actions) for env in (vector, singles)]


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, tuple):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        np.testing.assert_allclose(
            np.asarray(found, np.float64), np.asarray(expected, np.float64), rtol=1e-4, atol=1e-4
        )


def test_seeds_address_chains_and_no_seed_goes_on_with_new_ones():
    env: Any = make_vector(2, domain="toy")
    first = env.reset(seed=3)[0]["x_t"]
    np.testing.assert_array_equal(env.reset(seed=[3, 4])[0]["x_t"], first)
    assert (env.reset()[0]["x_t"] != first).all()
    np.testing.assert_array_equal(env.reset(seed=4)[0]["x_t"][0], first[1])


UNBOUNDED = (  # a Gaussian's support is everything, so these hints of check_env cannot be followed
    "minimum value is -infinity",
    "maximum value is infinity",
    "we recommend using a symmetric and normalized space",
)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("name", BUILTIN)
def test_gymnasium_finds_nothing_to_complain_of_but_that_gaussians_are_unbounded(name: str, flat: bool):
    told = {**twin(name).told, "num_steps": 3, "flat": flat}
    gym.register(f"rayft/{name}{flat}-v0", "rayft.env:make", kwargs=told, vector_entry_point="rayft.env:make_vector")
    env: Any = gym.make(f"rayft/{name}{flat}-v0", disable_env_checker=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(env.env)  # as it is without gym.make's OrderEnforcing
        gym.make_vec(f"rayft/{name}{flat}-v0", num_envs=2)
    allowed = (*UNBOUNDED, "is different from the unwrapped version") if flat else UNBOUNDED
    complaints = [str(w.message) for w in caught if not any(hint in str(w.message) for hint in allowed)]
    assert complaints == []


@pytest.mark.parametrize("name", BUILTIN)
def test_the_flat_observation_holds_the_same_numbers(name: str):
    told = {**twin(name).told, "num_steps": 4}
    seen, row = (make(flat=flat, **told).reset(seed=1)[0] for flat in (False, True))
    context = [np.ravel(value) for _, value in sorted(seen.get("context", {}).items())]
    np.testing.assert_array_equal(row, np.concatenate([seen["x_t"].ravel(), [1.0], *context]).astype(np.float32))
    vector = make_vector(2, flat=True, **told)
    rows = vector.reset(seed=1)[0]
    np.testing.assert_array_equal(rows[0], row)
    assert rows in vector.observation_space
    actions = vector.action_space.sample()
    assert vector.step(actions)[0][1, seen["x_t"].size] == 0.75


def test_what_an_action_says_of_padding_and_drift_is_dropped():
    env, two = make("toy_masked"), {"context": {"mask": np.array([1, 1, 0, 0]), "class": 0}}
    drift, padding = 5 * np.array([1, 1, 0]), np.array([0, 0, 9, 9])[:, None]
    info = env.reset(seed=0, options=two)[1]
    seen, _, _, _, off = env.step(info["next_mean"] + drift + padding)
    close(seen["x_t"], info["next_mean"])
    env.reset(seed=0, options=two)
    close(off["log_prob"], env.step(info["next_mean"])[4]["log_prob"])


def test_the_observation_and_the_action_belong_to_the_caller():
    env: Any = make("toy")
    seen, info = env.reset(seed=0)
    expected = env.batch.reference.mean_at(torch.tensor(seen["x_t"])[None], 50, {})
    action = info["next_mean"].copy()
    seen["x_t"][:] = 1e6
    info["next_mean"][:] = 1e6
    moved, _, _, _, told = env.step(action)
    close(told["mean"], expected[0])
    action[:] = 1e6
    assert np.abs(env.batch.observation()["x_t"]).max() < 100
    close(moved["x_t"], expected[0])


def test_a_failed_reward_is_flagged_warned_of_and_scored_as_undecodable():
    env = make_vector(2, domain="toy", reward=rewards.FunctionReward(raises, undecodable=-3.0), num_steps=1)
    env.reset(seed=0)
    with pytest.warns(UserWarning, match="RuntimeError: no licence"):
        _, values, ended, _, info = env.step(np.zeros((2, 2)))
    assert values.tolist() == [-3.0, -3.0]
    assert ended.all()
    assert info["failed"].all()
    assert not info["undecodable"].any()


def test_a_reward_that_fails_on_one_sample_costs_that_sample_only():
    env = make_vector(3, domain="toy", reward=rewards.FunctionReward(fails_left_of_zero, -1.0), num_steps=1)
    env.reset(seed=0)
    with pytest.warns(UserWarning, match="left of zero"):
        _, values, _, _, info = env.step(np.array([[1.0, 0.0], [-1.0, 0.0], [np.nan, 0.0]]))
    assert values.tolist() == [1.0, -1.0, -1.0]
    assert info["failed"].tolist() == [False, True, False]
    assert info["undecodable"].tolist() == [False, False, True]


def test_one_more_step_starts_new_chains_in_the_batch_and_is_refused_in_the_single_environment():
    env = make("toy", num_steps=1)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(np.zeros(2))
    env.reset(seed=0)
    assert env.step(np.zeros(2))[2]
    with pytest.raises(gym.error.ResetNeeded, match=re.escape("call reset()")):
        env.step(np.zeros(2))
    with pytest.raises(gym.error.ResetNeeded):
        make_vector(2, domain="toy").step(np.zeros((2, 2)))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: make("toy", num_step=3), r"no 'num_step' \(did you mean 'num_steps'\?\)"),
        (lambda: make("toy", render_mode="human"), "render_mode is 'human'"),
        (lambda: make("tyo"), r"no domain 'tyo' \(did you mean 'toy'\?\)"),
        (lambda: make("plain", **{**TOLD["plain"], "reward": None}), "no reward of its own"),
        (lambda: make("toy", num_steps=51), "allows 1 to 50"),
        (lambda: make("toy").reset(options={"xT": 0}), "no option 'xT'"),
        (lambda: make("toy").reset(options={"x_T": np.zeros(3)}), r"x_T has the shape \[1, 3\].*must be \[1, 2\]"),
        (lambda: make("toy_masked").reset(options={"context": {"mask": np.ones(4)}}), "this domain's are class, mask"),
        (lambda: DenoisingVectorEnv(2, *named("toy")).reset(seed=[1]), "1 seeds for 2 chains"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call: Any, sentence: str):
    with pytest.raises(ValueError, match=sentence) as refused:
        call()
    assert "\n" not in str(refused.value)


def test_the_classes_take_objects_for_those_who_have_them():
    domain, reward, process = named("toy", num_steps=7)
    single, vector = DenoisingEnv(domain, reward, process), DenoisingVectorEnv(2, domain, reward)
    assert (single.reset()[0]["t"], vector.reset()[0]["t"].tolist()) == (7, [50, 50])
