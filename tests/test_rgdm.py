"""RGDM through RLlib: what it pays, what it reads again for nothing, what it refuses, and that it learns."""

import numpy as np
import pytest

from rayft.algorithms.rgdm import RGDMConfig
from rayft.reward import Reward

TINY = {"chains": 256, "minibatch_size": 128, "num_candidates": 4, "lr": 1e-3}


class Constant(Reward):
    version = "1"

    def __call__(self, samples):
        return [0.5] * len(samples)


class Right(Reward):
    """Fails on the left half of the plane."""

    version = "1"

    def __call__(self, samples):
        return [None if sample[0] < 0 else float(sample[1]) for sample in samples]


@pytest.fixture
def built(ray_session):
    algos = []

    def build(reward="quadratic", scoring=None, evaluate=None, **training):
        config = RGDMConfig().domain("toy").reward(reward).training(**{**TINY, **training})
        config.evaluate(**{"every": 0, "chains": 256, "pretrained_chains": 1024, **(evaluate or {})})
        algos.append(config.scoring(**(scoring or {})).debugging(seed=0).build_algo())
        return algos[-1]

    yield build
    for algo in algos:
        algo.stop()


def weights(algo):
    return np.concatenate([v.ravel() for v in algo.policy_state().values()])


def iterate(algo, num):
    return [algo.train() for _ in range(num)]


def test_a_run_pays_for_its_candidates_and_learns_the_same_from_a_bank_for_nothing(built, tmp_path):
    plain, first, second = built(), built(bank=str(tmp_path / "bank")), None
    for algo in (plain, first):
        iterate(algo, 3)
        assert algo.counts["reward_calls"] == 3 * 256 * 4
        (part,) = algo.rewards.meter.summary()["purposes"]["payoff"]["parts"].values()
        assert part["calls"] == 3 * 256 * 4
    second = built(bank=str(tmp_path / "bank"))
    iterate(second, 3)
    assert second.counts["reward_calls"] == 0
    assert np.array_equal(weights(plain), weights(first)) and np.array_equal(weights(first), weights(second))


def test_another_temperature_and_radius_read_the_same_bank(built, tmp_path):
    told = {"bank": str(tmp_path / "bank"), "radii": [0.5, 1.0], "bank_pairs": 1024}
    first = built(**told, radius=1.0, temperature=5.0)
    iterate(first, 4)
    assert first.counts["reward_calls"] == 1024 * 4
    other = built(**told, radius=0.5, temperature=3.0, anchor=False, normalise="candidates")
    iterate(other, 4)
    assert other.counts["reward_calls"] == 0
    assert not np.allclose(weights(first), weights(other))


def test_iterations_shorter_than_shards_read_each_pair_once(built, tmp_path):
    built(bank=str(tmp_path / "bank")).train()
    short = built(bank=str(tmp_path / "bank"), chains=100, minibatch_size=100)
    iterate(short, 5)
    assert short.counts["reward_calls"] == 256 * 4  # 500 pairs: the second shard of 256 is begun
    assert sorted(path.name for path in (tmp_path / "bank").glob("*.arrow")) == [
        "shard_000000.arrow",
        "shard_000001.arrow",
    ]


def test_a_bank_of_another_reward_is_refused_before_anything_is_paid(built, tmp_path):
    built(bank=str(tmp_path / "bank")).train()
    with pytest.raises(ValueError, match=r"was made with reward .* and this run has"):
        built("stripes", bank=str(tmp_path / "bank"))


def test_a_pair_that_the_bank_says_too_little_about_is_refused(built, tmp_path):
    told = {"bank": str(tmp_path / "bank"), "bank_pairs": 512}
    algo = built(**told, temperature=0.01)
    with pytest.raises(ValueError, match=r"at temperature 0.01 and radius 1 .* are worth \d+ .*, fewer than 100"):
        algo.train()
    algo = built(**told, temperature=5.0)
    algo.train()


def test_effective_sizes_are_told_per_timestep(built):
    row = built(temperature=100.0).train()
    told = {k: v for k, v in row.items() if k.startswith("effective/")}
    assert len(told) == 10 and "effective/1-5" in told
    assert sum(told.values()) == pytest.approx(256 * 4, rel=0.01)


def test_a_constant_reward_is_said_to_teach_nothing_and_moves_nothing(built):
    algo = built(Constant)
    before = weights(algo)
    row = algo.train()
    assert row["guard_no_spread"] == 1.0
    assert np.abs(weights(algo) - before).max() < 1e-5


def test_failed_candidates_are_dropped_and_counted(built):
    row = built(Right, scoring={"max_failed": 1.0}, reward_at="x_prev").train()
    assert 0.2 < row["reward_failed"] / 1024 < 0.8
    assert np.isfinite(row["learners"]["default_policy"]["total_loss"])


@pytest.mark.parametrize(
    "told",
    [
        {"sampler": "annealing", "sampler_steps": 3},
        {"sampler": "annealing", "sampler_steps": 3, "sampler_end": "temperature"},
        {"sampler": "gradient", "sampler_steps": 5},
        {"normalise": "timestep"},
        {"timestep_weight": "simple"},
        {"radius_unit": "kl", "radius": 3.0},
        {"reward_at": "x_0", "radius": 0.0},
        {"reward_at": "x_prev", "centre": "sample"},
        {"x_0_above": 10},
        {"anchor": False, "kl_weight": 0.1},
    ],
    ids=lambda told: " ".join(map(str, told.values())),
)
def test_every_way_of_drawing_and_reading_moves_the_policy_uphill(built, told):
    """The mean candidate reward of the policy's own transitions is not told; its samples' reward must not fall."""
    algo = built(**{"chains": 1024, "minibatch_size": 256, "lr": 3e-3, **told}, evaluate={"chains": 2048})
    iterate(algo, 6)
    verdict = algo.evaluate_policy().scalars()
    assert verdict["reward"] > verdict["reward_pretrained"] + 0.02
    assert np.isfinite(verdict["kl"]) and verdict["kl"] > 0


def test_annealing_pays_for_every_step(built):
    algo = built(sampler="annealing", sampler_steps=3)
    algo.train()
    assert algo.counts["reward_calls"] == 256 * 4 * (1 + 3) == algo.config.num_events()


def test_a_budget_of_calls_ends_before_it_is_passed_and_knows_what_a_bank_has(built, tmp_path):
    told = {"scoring": {"max_reward_calls": 3 * 1024 + 256 + 1024}, "bank": str(tmp_path / "bank")}
    algo = built(**told)
    iterate(algo, 3)
    assert "max_reward_calls" in (algo.refusal() or "")
    again = built(**told)
    iterate(again, 3)
    assert again.refusal() is None  # nothing paid so far: the bank had it all


def test_payoff_actors_change_nothing_but_who_draws(built):
    plain, ahead = built(), built(payoff_actors=1)
    assert [row["reward_mean"] for row in iterate(plain, 3)] == [row["reward_mean"] for row in iterate(ahead, 3)]
    assert np.array_equal(weights(plain), weights(ahead))


def test_a_restored_run_goes_on_as_if_it_had_not_stopped(built, tmp_path):
    straight, broken = built(normalise="timestep"), built(normalise="timestep")
    iterate(straight, 4)
    iterate(broken, 2)
    broken.save_to_path(str(tmp_path / "state"))
    resumed = built(normalise="timestep")
    resumed.restore_from_path(str(tmp_path / "state"))
    resumed.sync()
    iterate(resumed, 2)
    assert np.array_equal(weights(straight), weights(resumed))


BAD = [
    ({"radius": -1.0}, "training.radius is -1.0; it should be greater than or equal to 0"),
    ({"temperature": 0.0}, "training.temperature is 0.0; it should be greater than 0"),
    ({"radii": [0.5, 1.0], "radius": 2.0}, r"training.radius is 2, which a bank of radii \[0.5, 1.0\] does not hold"),
    ({"radii": [0.5, 1.0], "radius": 0.0}, "does not hold"),
    ({"radii": [0.5, 0.5]}, "give different numbers"),
    ({"radii": [0.5, 1.0, 2.0]}, "num_candidates is 4; with 3 radii it must be a multiple of that"),
    ({"sampler": "annealing", "radii": [1.0]}, "radii are for sampler importance"),
    ({"sampler": "annealing", "radius": 0.0}, "has nowhere to search"),
    ({"sampler": "gradient", "reward_at": "x_0"}, "which reward_at: x_0 does not look at"),
    ({"x_0_above": 5, "reward_at": "x_0"}, "x_0_above is for reward_at x0_hat or x_prev"),
    ({"sampler": "anealing"}, "training.sampler is 'anealing'; it should be 'importance', 'annealing' or 'gradient'"),
    ({"bank_pairs": 0}, "training.bank_pairs is 0"),
]


@pytest.mark.parametrize(("told", "said"), BAD, ids=[str(told) for told, _ in BAD])
def test_bad_settings_are_refused_before_ray_starts(told, said):
    with pytest.raises(ValueError, match=said):
        RGDMConfig().domain("toy").reward("quadratic").training(**{**TINY, **told}).validate()


def test_a_gradient_is_not_asked_of_a_black_box():
    with pytest.raises(ValueError, match="needs one differentiable reward and stripes is none"):
        RGDMConfig().domain("toy").reward("stripes").training(sampler="gradient").validate()
