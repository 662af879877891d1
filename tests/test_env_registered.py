"""The environments by their names: in a fresh process, under stock RLlib, and in a config of ours."""

from __future__ import annotations

import subprocess
import sys

import pytest
from ray.rllib.algorithms.ppo import PPOConfig as StockPPOConfig

from rayft.algorithms.rgdm import RGDMConfig


def fresh(program: str) -> str:
    """What a new process prints that runs ``program`` outside the repository."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_fresh_process_finds_the_environments_by_importing_the_module_or_naming_it():
    made = fresh(
        "import gymnasium as gym\n"
        "env = gym.make('rayft.env:rayft/Toy-v0', num_steps=5)\n"
        "same = gym.make('rayft/Toy-v0')\n"
        "batch = gym.make_vec('rayft/ToyMasked-v0', num_envs=3)\n"
        "print(env.unwrapped, same.unwrapped, batch.unwrapped, env.observation_space['t'].n)"
    )
    assert made == (
        "<DenoisingEnv<rayft/Toy-v0>> <DenoisingEnv<rayft/Toy-v0>> DenoisingVectorEnv(rayft/ToyMasked-v0, num_envs=3) 6"
    )


def test_the_entry_point_names_the_environments_without_importing_torch():
    names = fresh(
        "import sys\n"
        "import gymnasium as gym\n"
        "from importlib.metadata import entry_points\n"
        "from gymnasium.envs.registration import namespace\n"
        "(found,) = entry_points(group='gymnasium.envs', name='rayft')\n"
        "with namespace(found.name):\n"
        "    found.load()()\n"
        "assert not {'torch', 'ray', 'envs'} & set(sys.modules), 'imported too much'\n"
        "print(*[name for name in gym.registry if name.startswith('rayft/')])\n"
        "gym.make('rayft/Toy-v0')"
    )
    assert names == "rayft/Toy-v0 rayft/ToyMasked-v0"


def test_the_environments_need_no_ray():
    assert fresh("import sys, rayft.env; rayft.env.make('toy').reset(); print('ray' in sys.modules)") == "False"


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(("mode", "num_runners"), [("sync", 0), ("vector_entry_point", 0), ("vector_entry_point", 1)])
def test_stock_rllib_ppo_takes_two_iterations(mode: str, num_runners: int):
    config = (
        StockPPOConfig()
        .environment("rayft.env:rayft/Toy-v0", env_config={"flat": True, "num_steps": 5})
        .env_runners(num_env_runners=num_runners, num_envs_per_env_runner=4, gym_env_vectorize_mode=mode)
        .training(train_batch_size_per_learner=60, minibatch_size=30, num_epochs=1)
        .debugging(seed=0)
    )
    algo = config.build_algo()
    try:
        results = [algo.train() for _ in range(2)]
    finally:
        algo.stop()
    told = results[-1]["env_runners"]
    assert told["episode_len_mean"] == 5
    assert -20 < told["episode_return_mean"] < 0
    assert told["num_env_steps_sampled_lifetime"] >= 120


def test_an_environment_of_ours_in_a_config_means_its_domain():
    by_name, by_domain = RGDMConfig().environment("rayft/Toy-v0"), RGDMConfig().domain("toy")
    assert by_name.to_dict() == by_domain.to_dict()
    by_name = RGDMConfig().environment(
        "rayft/Toy-v0", env_config={"reward": "stripes", "reward_arguments": {"width": 1}}
    )
    assert by_name.to_dict() == RGDMConfig().domain("toy").reward("stripes", width=1).to_dict()
    by_name.training(chains=64, minibatch_size=64).validate()
