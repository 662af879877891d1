"""One update is the same update, however many learners share it and in however many pieces it is computed."""

from __future__ import annotations

import numpy as np
import pytest

from rayft.spec import algorithm, known_algorithms

WHOLE = ("backprop", "pcl")  # rows are chains


def build(name="ppo", num_learners=0, **training):
    """128 chains of 32 steps: 4,096 transitions."""
    told = {"chains": 4096 if name == "rgdm" else 128, "minibatch_size": 128 if name in WHOLE else 4096, "lr": 1e-3}
    config = algorithm(name)().domain("toy").reward("quadratic").chain(num_steps=32).training(**told | training)
    config.evaluate(every=0, chains=64, pretrained_chains=256, alpha=0.5)
    return config.learners(num_learners=num_learners).build_algo()


def update(algo, credit):
    """(weights after one update, loss of its last minibatch)."""
    before = algo.policy_state()
    algo.learn(credit)
    after = algo.policy_state()
    loss = algo.metrics.peek(("learners", "default_policy", "total_loss"))
    assert any((after[k] != before[k]).any() for k in after), "the update changed nothing"
    return after, float(loss)


def credit_of(algo):
    return algo.experience()[0]


def largest_gap(a, b):
    return max(float(np.abs(a[k] - b[k]).max()) for k in a)


@pytest.mark.parametrize(
    ("name", "precision", "minibatch_size", "tolerance"),
    # Adam divides by the size of the gradient, so four steps amplify the rounding of one.
    [
        ("ppo", "float32", 4096, 1e-6),
        *(
            pytest.param(name, "float64", 32 if name in WHOLE else 1024, 1e-9, marks=pytest.mark.slow)
            for name in known_algorithms()
        ),
        pytest.param("ppo", "float64", 4096, 1e-12, marks=pytest.mark.slow),
    ],
)
def test_zero_one_and_two_learners_take_the_same_steps(ray_session, name, precision, minibatch_size, tolerance):
    outcomes, credit = [], None
    for num_learners in (0, 1, 2):
        told = {"precision": precision, "minibatch_size": minibatch_size, "num_epochs": 1}
        algo = build(name, num_learners=num_learners, **told)
        credit = credit or credit_of(algo)
        outcomes.append(update(algo, credit))
        algo.stop()
    for weights, loss in outcomes[1:]:
        print(f"{name} {precision} {minibatch_size}: weights differ by {largest_gap(weights, outcomes[0][0]):.1e}")
        assert largest_gap(weights, outcomes[0][0]) <= tolerance
        # RLlib averages the learners' logged losses in float32
        assert loss == pytest.approx(outcomes[0][1], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "precision", "tolerance"),
    [("ppo", "float32", 1e-6), *((name, "float64", 1e-12) for name in known_algorithms())],
)
def test_four_microbatches_are_one_minibatch(ray_session, name, precision, tolerance):
    outcomes, credit = [], None
    for microbatches in (1, 4):
        algo = build(name, precision=precision, microbatches=microbatches, num_epochs=1)
        credit = credit or credit_of(algo)
        outcomes.append(update(algo, credit))
        algo.stop()
    assert largest_gap(outcomes[0][0], outcomes[1][0]) <= tolerance
    assert outcomes[0][1] == pytest.approx(outcomes[1][1], abs=tolerance)


def test_the_ratio_is_one_before_the_first_step(ray_session):
    algo = build()
    assert algo.train()["learners"]["default_policy"]["guard_ratio"] < 1e-4
    algo.stop()


def test_an_absurd_learning_rate_moves_the_policy_no_further_than_the_trust_region(ray_session):
    algo = build(lr=5.0, target_kl=0.3, minibatch_size=512, num_epochs=2)
    for _ in range(3):
        assert algo.train()["learners"]["default_policy"]["update_kl"] <= 0.35
    assert algo.evaluate_policy().scalars()["kl"] < 5
    algo.stop()


def test_without_the_trust_region_the_same_learning_rate_destroys_the_policy(ray_session):
    algo = build(lr=5.0, target_kl=None, minibatch_size=512, num_epochs=2)
    algo.train()
    assert not algo.evaluate_policy().scalars()["kl"] < 1000
    algo.stop()


def test_rows_whose_reward_failed_change_nothing(ray_session):
    algo = build(precision="float64", target_kl=None)
    draw = algo.collect("train", algo.draw_function(), algo.settings.chains)
    rewards = algo.score(draw).rewards
    rewards[::2] = np.nan
    credit = algo.credit(draw, rewards)
    assert (credit.chains.columns["advantage"][:, ::2] == 0).all()
    assert (credit.chains.columns["alive"][:, ::2] == 0).all()
    assert np.isfinite(update(algo, credit)[1])
    algo.stop()


def test_timesteps_left_out_change_nothing(ray_session):
    """What their rows say may be anything, not a number even."""
    outcomes, credit = [], None
    for spoil in (False, True):
        algo = build(timesteps=(5, 20), minibatch_size=512, target_kl=None, num_epochs=1)
        credit = credit or credit_of(algo)
        if spoil:
            out = (credit.chains.t < 5) | (credit.chains.t > 20)
            credit.chains.columns["advantage"][out] = np.nan
        outcomes.append(update(algo, credit)[0])
        assert algo.metrics.peek(("learners", "default_policy", "num_minibatches")) == 16 * 128 // 512
        algo.stop()
    assert all(np.isfinite(v).all() for v in outcomes[1].values())
    assert largest_gap(*outcomes) == 0


def test_a_share_of_the_rows_is_learned_from(ray_session):
    algo = build(row_share=0.25, minibatch_size=128, target_kl=None, num_epochs=2)
    update(algo, credit_of(algo))
    assert algo.metrics.peek(("learners", "default_policy", "num_minibatches")) == 2 * 32 * 128 // 4 // 128
    algo.stop()


def test_no_share_of_the_rows_or_more_than_all_are_refused(ray_session):
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match="row_share"):
            build(row_share=share)


@pytest.mark.parametrize("timesteps", [(0, 5), (6, 5), (1, 33)])
def test_timesteps_that_the_chain_does_not_have_are_refused(ray_session, timesteps):
    with pytest.raises(ValueError, match="timesteps"):
        build(timesteps=timesteps)


def test_the_step_size_falls_to_its_share_where_the_end_is_known(ray_session):
    algo = build(lr=1e-3, lr_end=0.1)

    def used():
        return algo.train()["learners"]["default_policy"]["step_size"]

    assert [used(), used()] == pytest.approx([1e-3, 1e-3])
    algo.horizon = 5
    assert [used(), used(), used()] == pytest.approx([0.55e-3, 0.1e-3 + 0.9e-3 * (1 - 0.5**0.5) / 2, 1e-4])
    algo.stop()
