"""One contract over every algorithm, every domain and every placement; learning to a known optimum."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from rayft import domain as domains
from rayft.reward import DifferentiableReward
from rayft.settings import explain
from rayft.spec import algorithm, known_algorithms

BAD = Path(__file__).with_name("bad_rewards.py")
GOLDEN = Path(__file__).parent / "golden"
SMALL = {"data": str(GOLDEN / "molecules/dsgdb9nsd")}  # not all of QM9
TOLD = {
    "molecules": SMALL,
    "molecules_conditional": {**SMALL, "weights": None},
    "molecules_edm": {**SMALL, "model": str(GOLDEN / "edm/conditional"), "at": {"alpha": 0, "gap": 0}},
}
WORLDS = {"toy": "quadratic", "toy_flow": "quadratic", "toy_masked": "spread", **dict.fromkeys(TOLD, "weight")}
TOLD |= {"conditioned": {"domain": "toy", "classes": [0, 1, 2, 3]}}
TOLD |= {"shapes": {"num_points": 16}, "shapes_conditional": {"num_points": 16, "weights": None}}
WORLDS |= {"conditioned": "corner"}
WORLDS |= {"shapes": "symmetry", "shapes_conditional": "symmetry"}
STUDY = {"surrogate": 2, "surrogate_chains": 64, "surrogate_steps": 5, "steps": 2}  # for rewards that have no gradient


def small(name, world="toy", reward=None, **training):
    config = algorithm(name)().domain(world, **TOLD.get(world, {})).reward(reward or WORLDS[world])
    study = STUDY if name == "backprop" and (reward or WORLDS[world]) != "quadratic" else {}
    told = {"chains": 64, "minibatch_size": 64, **study, **training}
    return config.training(**told).chain(num_steps=10).evaluate(every=0, chains=64, pretrained_chains=256)


@pytest.mark.parametrize("name", known_algorithms())
def test_every_setting_has_a_sentence_and_a_default(name):
    cls = algorithm(name).settings_class
    said = explain(cls)
    for field in dataclasses.fields(cls):
        assert field.default is not dataclasses.MISSING
        assert len(said.get(field.name, "")) > 15, f"{name}.{field.name} has no sentence"


def pairs():
    """Every algorithm in every domain; the fast tests leave out what two of each kind show already."""
    for name in known_algorithms():
        for world in sorted(set(domains.builtin()) - {"plain"}):
            few = name not in ("ppo", "rgdm") and world not in ("toy", "toy_masked", "molecules", "shapes")
            yield pytest.param(name, world, marks=pytest.mark.slow if few else ())


@pytest.mark.parametrize(("name", "world"), pairs())
def test_every_algorithm_trains_on_every_domain_and_restores(ray_session, tmp_path, name, world):
    config = small(name, world)
    algo = config.build_algo()
    before = algo.policy_state()
    algo.train()
    path = algo.save_to_path(str(tmp_path / "state"))
    after = algo.policy_state()
    assert any((after[k] != before[k]).any() for k in after), "training changed nothing"
    assert all(np.isfinite(v).all() for v in after.values())
    expected = algo.train()["reward_mean"]
    algo.stop()
    again = small(name, world).build_algo()
    again.restore_from_path(path)
    again.sync()
    restored = again.policy_state()
    assert all((restored[k] == after[k]).all() for k in after)
    assert again.train()["reward_mean"] == expected
    again.stop()


@pytest.mark.parametrize(
    ("name", "told"), [("rwmle", {"roll_in": "noised", "rows": 256, "alpha": 0.5}), ("backprop", STUDY)]
)
def test_what_was_scored_before_a_checkpoint_is_learned_from_after_it(ray_session, tmp_path, name, told):
    algo = small(name, **told).build_algo()
    for _ in range(2):
        algo.train()
    assert [len(one.x_0) for one in algo.seen] == [64, 64]
    path = algo.save_to_path(str(tmp_path / "state"))
    algo.train()
    expected = algo.policy_state()
    algo.stop()
    again = small(name, **told).build_algo()
    again.restore_from_path(path)
    again.train()
    found = again.policy_state()
    assert sum(len(one.x_0) for one in again.seen) == 192
    again.stop()
    assert all((found[k] == expected[k]).all() for k in expected)


class Holed(DifferentiableReward):
    """Is no number right of 0, nor is its slope."""

    def value(self, x_0, context):
        return (-x_0[:, 0]).sqrt()


def test_backpropagation_goes_on_past_chains_whose_reward_failed_and_counts_them(ray_session):
    algo = small("backprop", reward=Holed, surrogate=0, steps=2, minibatch_size=16, num_epochs=2).build_algo()
    before = algo.policy_state()
    told = algo.train()
    learnt = told["learners"]["default_policy"]
    after = algo.policy_state()
    algo.stop()
    assert learnt["guard_non_finite"] == 0 and learnt["num_minibatches"] == 8
    assert any((after[k] != before[k]).any() for k in after) and all(np.isfinite(v).all() for v in after.values())
    assert told["reward_failed"] == pytest.approx(128 * learnt["failed"], abs=0.5)
    assert 20 < told["reward_failed"] < 108 and told["reward_mean"] > 0.5


def test_rows_are_for_the_roll_in_that_makes_them(ray_session):
    with pytest.raises(ValueError, match="rows is for roll_in noised"):
        small("rwmle", rows=256).build_algo()


@pytest.mark.parametrize(
    ("name", "reward", "told", "why"),
    [
        ("pcl", "quadratic", {"alpha": 0.0}, "training.alpha is 0.0; it should be greater than 0"),
        ("pcl", "quadratic", {"steps": 3}, "pieces of a chain of 10 may have 1, 2, 5, 10"),
        ("pcl", "quadratic", {"timesteps": [1, 5]}, "no piece starts: .* every 10th t of 10; give shorter pieces"),
        ("pcl", "quadratic", {"timesteps": [6, 9], "steps": 5}, "no piece starts: .* every 5th"),
        ("pcl", "quadratic", {"steps": 20}, "training.steps is 20; pieces of a chain of 10"),
        ("grpo", "quadratic", {"group_size": 1}, "compared with nobody"),
        ("grpo", "quadratic", {"group_size": 6}, "need a multiple of 6"),
        ("backprop", "quadratic", {"steps": 11}, "the chain has only 10 transitions"),
        ("backprop", "quadratic", {"timesteps": [1, 5]}, "learn from single transitions"),
        ("backprop", "quadratic", {"target_kl": 0.1}, "lower lr here"),
        ("backprop", "stripes", {"surrogate": 0}, "stripes is none: .* training.surrogate to 2 or more"),
        ("forward", "quadratic", {"sampling_steps": 11}, "the chain has only 10 transitions"),
    ],
)
def test_what_an_algorithm_cannot_do_is_refused_with_what_it_can(name, reward, told, why):
    with pytest.raises(ValueError, match=why):
        small(name, reward=reward, **told).validate()


@pytest.mark.parametrize(
    "parts",
    [
        {"q": {"name": "quadratic", "weight": 2.0}},
        {"q": {"name": "quadratic", "transform": [{"clip": {"high": 0}}]}},
        {"q": "quadratic", "c": "corner"},
    ],
)
def test_a_reward_that_is_not_counted_as_it_is_has_no_gradient(parts):
    with pytest.raises(ValueError, match="backpropagation needs one differentiable reward and a composition is none"):
        small("backprop").reward("combine", parts=parts).training(surrogate=0).validate()


def test_a_forward_batch_whose_rewards_are_all_alike_does_not_blow_up(ray_session):
    algo = small("forward", alpha=0.3).build_algo()
    draw = algo.collect("train", algo.draw_function(), 64)
    assert algo.credit(draw, np.full(64, 0.7)).scalars["kl_weight"] == pytest.approx(0.3)
    algo.stop()


@pytest.mark.parametrize("name", ["backprop", "rgdm"])
def test_one_reward_alone_in_a_composition_has_its_own_gradient(ray_session, name):
    told = {"sampler": "gradient", "num_candidates": 2} if name == "rgdm" else {"steps": 2}
    algo = small(name, reward="quadratic", **told).reward("combine", parts={"q": "quadratic"}).build_algo()
    algo.train()
    algo.stop()


@pytest.mark.parametrize(
    ("name", "iterations", "told", "least"),
    [
        ("ppo", 12, {"alpha": 0.5, "chains": 512, "minibatch_size": 4096}, 0.90),
        ("rwmle", 25, {"alpha": 0.5, "chains": 512, "minibatch_size": 4096}, 0.88),
        ("rwmle", 40, {"alpha": 0.5, "chains": 4096, "minibatch_size": 512, "roll_in": "current"}, 0.6),
        ("rwmle", 15, {"alpha": 0.5, "chains": 1024, "rows": 16384, "minibatch_size": 512, "roll_in": "noised"}, 0.8),
        ("rgdm", 15, {"temperature": 0.3, "radius": 1.5}, 0.85),
        ("grpo", 15, {"alpha": 0.5, "chains": 512, "minibatch_size": 4096}, 0.85),
        ("backprop", 40, {"alpha": 0.5, "lr": 2e-3, "chains": 256, "minibatch_size": 256}, 0.9),
        ("backprop", 15, {"alpha": 0.5, "lr": 2e-3, "chains": 512, "surrogate": 2, "surrogate_steps": 60}, 0.75),
        ("pcl", 80, {"alpha": 0.5, "chains": 128, "minibatch_size": 128}, 0.9),
        ("pcl", 30, {"alpha": 0.5, "chains": 128, "steps": 5, "minibatch_size": 512, "replay": 128}, 0.6),
        ("forward", 20, {"alpha": 0.5, "chains": 512, "minibatch_size": 4096}, 0.7),
        ("forward", 20, {"alpha": 0.5, "chains": 1024, "minibatch_size": 4096, "sampling_steps": 25}, 0.6),
        ("forward", 20, {"alpha": 0.5, "chains": 512, "minibatch_size": 4096, "average": 0.3}, 0.7),
    ],
    ids=[
        *("ppo", "rwmle", "rwmle-current", "rwmle-noised", "rgdm", "grpo", "backprop", "backprop-surrogate"),
        *("pcl", "pcl-replay", "forward", "forward-short", "forward-pushed"),
    ],
)
def test_every_algorithm_comes_near_the_known_optimum(ray_session, name, iterations, told, least):
    config = algorithm(name)().domain("toy").reward("quadratic").training(**told)
    algo = config.evaluate(every=0, chains=4096, pretrained_chains=16384).build_algo()
    for _ in range(iterations):
        algo.train()
    verdict = algo.evaluate_policy().scalars()
    algo.stop()
    print(name, {k: round(verdict[k], 3) for k in ("reward", "kl", "frontier_share")})
    assert verdict["frontier_share" if name == "rgdm" else "attained"] > least


def test_a_cliff_of_a_reward_is_climbed_too(ray_session):
    config = small("ppo", alpha=0.1, chains=1024, minibatch_size=2048).chain(num_steps=50)
    config.reward("stripes", width=1.0).evaluate(every=0, chains=2048, pretrained_chains=8192)
    algo = config.build_algo()
    for _ in range(20):
        algo.train()
    verdict = algo.evaluate_policy().scalars()
    algo.stop()
    assert verdict["reward"] > verdict["reward_pretrained"] + 0.2
    assert verdict["attained"] > 0.5


def test_the_masked_policy_keeps_padding_at_zero_and_drift_out(ray_session):
    algo = small("ppo", "toy_masked").build_algo()
    algo.train()
    draw = algo.collect("test", algo.draw_function(), 64)
    x, mask = draw.chains.x, draw.chains.context["mask"]
    algo.stop()
    assert np.abs(x * (1 - mask[None, :, :, None])).max() == 0
    assert np.abs((x[..., :2] * mask[None, :, :, None]).sum(-2)).max() < 1e-4


def test_two_runners_draw_what_the_parts_say_whoever_makes_them(ray_session):
    algo = small("ppo").env_runners(num_env_runners=2).build_algo()
    first = algo.collect("train", algo.draw_function(), 64)
    again = algo.collect("train", algo.draw_function(), 64)
    other = algo.collect("other", algo.draw_function(), 64)
    algo.stop()
    assert (first.chains.x == again.chains.x).all()
    assert (first.chains.x != other.chains.x).any()


def test_the_newest_weights_reach_every_runner_however_fast_they_follow(ray_session):
    algo = small("ppo").env_runners(num_env_runners=2).build_algo()
    start = algo.policy_state()
    for shift in (0.1, 0.2, 0.3):
        algo.set_policy({name: value + np.float32(shift) for name, value in start.items()})
    held = algo.env_runner_group.foreach_env_runner(lambda runner: runner.module.denoiser.state_dict())
    assert len(held) == 3
    for state in held:
        assert all(np.allclose(state[name].numpy(), value + np.float32(0.3)) for name, value in start.items())
    algo.stop()


@pytest.mark.parametrize("actors", [0, 2])
def test_a_reward_that_raises_costs_its_samples_only(ray_session, actors):
    algo = small("ppo", reward=f"{BAD}:Halting").scoring(actors=actors).build_algo()
    draw = algo.collect("train", algo.draw_function(), 64)
    scores = algo.score(draw)
    bad = draw.events[:, 0] > 1
    assert bad.any()
    assert not bad.all()
    assert (np.isnan(scores.rewards) == bad).all()
    assert np.isfinite(algo.train()["reward_mean"])
    assert algo.counts["failed"] > 0
    algo.stop()


def test_a_reward_that_ends_its_process_costs_its_samples_only(ray_session):
    algo = small("ppo", reward=f"{BAD}:Deadly", chains=256).scoring(actors=4).build_algo()
    draw = algo.collect("train", algo.draw_function(), 256)
    bad = draw.events[:, 0] > 2.2
    scores = algo.score(draw)
    assert (np.isnan(scores.rewards) == bad).all()
    np.testing.assert_allclose(scores.rewards[~bad], draw.events[~bad, 1], rtol=1e-6)
    for _ in range(2):
        assert np.isfinite(algo.train()["reward_mean"])
    algo.stop()


def test_the_moving_average_is_what_is_evaluated_and_lags_the_weights(ray_session):
    algo = small("ppo", ema=0.9).build_algo()
    start = algo.policy_state("reference")
    for _ in range(2):
        algo.train()
    fast, slow = algo.policy_state(), algo.policy_state("ema")
    moved = sum(float(np.abs(fast[k] - start[k]).sum()) for k in start)
    lagging = sum(float(np.abs(slow[k] - start[k]).sum()) for k in start)
    assert 0 < lagging < moved
    runner = algo.env_runner.module
    assert all((runner.ema.state_dict()[k].numpy() == slow[k]).all() for k in slow)
    algo.stop()
