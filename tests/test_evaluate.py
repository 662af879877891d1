"""rayft.evaluate against what has a closed form: r ~ N(m, s^2) under p_pre is tilted into another normal.

J* = m + s^2/(2 alpha)      E_{p*}[r] = m + s^2/alpha      KL(p*||p_pre) = s^2/(2 alpha^2)
"""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import norm

from rayft import evaluate

M, S = 0.4, 1.5


def normal_grid(n=200_000):
    """N(M, S^2) without chance: its quantiles."""
    return M + S * norm.ppf((np.arange(n) + 0.5) / n)


def normal(n, seed, mean=M):
    return mean + S * np.random.default_rng(seed).normal(size=n)


# the optimum


@pytest.mark.parametrize("alpha", [1.5, 2.0, 3.0, 50.0])
def test_normal_rewards_have_the_closed_form_optimum_reward_and_kl(alpha):
    tilt = evaluate.tilted(normal_grid(), alpha)
    assert evaluate.optimum(normal_grid(), alpha) == tilt.optimum == pytest.approx(M + S**2 / (2 * alpha), rel=1e-3)
    assert tilt.reward == pytest.approx(M + S**2 / alpha, rel=2e-3)
    assert tilt.kl == pytest.approx(S**2 / (2 * alpha**2), rel=5e-3)
    assert tilt.effective_sample_size == pytest.approx(200_000 * math.exp(-((S / alpha) ** 2)), rel=0.02)


def test_two_groups_give_the_numbers_worked_by_hand():
    groups = np.array([7, 7, 2, 2, 2, 2])
    rewards = np.log([1, 3, 1, 1, 1, 13])  # mean exp r: 2 in group 7, 4 in group 2
    tilt = evaluate.tilted(rewards, 1.0, groups)
    assert tilt.optimum == pytest.approx((2 * math.log(2) + 4 * math.log(4)) / 6)
    climbed = (2 * (0.75 * math.log(3)) + 4 * (13 / 16 * math.log(13))) / 6  # p* = (1/4, 3/4) and (1, 1, 1, 13)/16
    assert tilt.reward == pytest.approx(climbed)
    assert tilt.kl == pytest.approx(climbed - tilt.optimum)
    squares = 0.5**2 + 1.5**2 + 3 * 0.25**2 + 3.25**2  # weights of mean 1 in each group
    assert evaluate.effective_sample_size(rewards, 1.0, groups) == pytest.approx(36 / squares)
    assert tilt.group_size == pytest.approx(6 / (2.5 / 2 + 10.75 / 4))
    assert evaluate.optimum(rewards, 1.0) == pytest.approx(math.log(20 / 6))


def test_one_group_is_the_textbook_log_mean_exp_and_effective_sample_size():
    rewards, weights = normal(500, 0), np.exp(normal(500, 0) / 0.7)
    tilt = evaluate.tilted(rewards, 0.7)
    assert tilt.optimum == pytest.approx(0.7 * (logsumexp(rewards / 0.7) - math.log(500)))
    assert tilt.effective_sample_size == pytest.approx(weights.sum() ** 2 / (weights**2).sum()) == tilt.group_size


def test_a_dear_kl_leaves_the_mean_and_a_free_one_reaches_the_maximum():
    rewards = normal(300, 1)
    assert evaluate.optimum(rewards, 1e9) == pytest.approx(rewards.mean(), abs=1e-8)
    gap = evaluate.optimum(rewards, 1e9) - rewards.mean()
    assert gap == pytest.approx(rewards.var() / 2e9, rel=1e-4)  # not lost to rounding
    assert evaluate.optimum(rewards, 1e-9) == pytest.approx(rewards.max(), abs=1e-7)
    assert evaluate.optimum(rewards * 1e5, 1e-300) == pytest.approx(rewards.max() * 1e5)


def test_shifting_or_scaling_the_reward_shifts_or_scales_the_optimum():
    rewards, groups = normal(400, 2), np.arange(400) % 3
    tilt, moved = evaluate.tilted(rewards, 0.8, groups), evaluate.tilted(5.0 * rewards - 1000.0, 4.0, groups)
    assert moved.optimum == pytest.approx(5.0 * tilt.optimum - 1000.0)
    assert moved.kl == pytest.approx(tilt.kl, rel=1e-6)
    assert moved.effective_sample_size == pytest.approx(tilt.effective_sample_size)


def test_the_optimum_falls_with_alpha_and_stays_between_mean_and_maximum():
    rewards = normal(200, 3)
    values = [evaluate.optimum(rewards, alpha) for alpha in np.logspace(-3, 3, 20)]
    assert all(a > b for a, b in itertools.pairwise(values))
    assert rewards.mean() < values[-1] < values[0] < rewards.max()


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan, math.inf])
def test_an_alpha_that_is_no_price_is_an_error_that_says_what_is_allowed(alpha):
    with pytest.raises(ValueError, match=f"alpha is {alpha}; .* needs a finite alpha > 0"):
        evaluate.optimum([0.0, 1.0], alpha)


# intervals


def test_the_bootstrap_has_the_error_of_a_mean_and_keeps_rows_whole():
    values = normal(400, 4)
    rows = evaluate.bootstrap(np.stack([values, 2 * values + 1], axis=1), np.random.default_rng(0), 4000)
    assert rows[0] == pytest.approx([values.mean(), 2 * values.mean() + 1])
    assert rows[1:, 0].std() == pytest.approx(values.std() / 20, rel=0.05)
    assert rows[:, 1] == pytest.approx(2 * rows[:, 0] + 1)


def test_chunks_bound_the_memory_and_do_not_change_the_bootstrap(monkeypatch):
    columns = normal(50, 5)[:, None]
    whole = evaluate.bootstrap(columns, np.random.default_rng(0), 100)
    monkeypatch.setattr(evaluate, "CHUNK", 170)
    assert evaluate.bootstrap(columns, np.random.default_rng(0), 100) == pytest.approx(whole)


def test_the_interval_of_the_share_covers_the_truth_at_about_its_nominal_rate():
    alpha, lift, kl = S, S, 0.6  # not p*: the chain spent more than the 0.5 nats it needed
    truth = (lift - alpha * kl) / (S**2 / (2 * alpha))
    hits = []
    for seed in range(100):
        pre, new = normal(1200, [0, seed]), normal(500, [1, seed], M + lift)
        spent = np.random.default_rng([2, seed]).exponential(kl, size=500)
        share = evaluate.attained(pre, new, spent, alpha, seed=seed).share
        hits.append(share.low <= truth <= share.high)
    assert 0.90 <= np.mean(hits) <= 0.99


def test_an_objective_is_the_mean_reward_less_the_price_of_its_kl():
    rewards, kl = normal(900, 6), np.full(900, 0.3)
    estimate = evaluate.objective(rewards, kl, 2.0)
    assert estimate.value == pytest.approx(rewards.mean() - 0.6)
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * rewards.std() / 30, rel=0.1)


def test_an_estimate_prints_the_digits_its_interval_supports():
    assert str(evaluate.Estimate(0.96234, 0.9511, 0.9723)) == "0.962 [0.951, 0.972]"
    assert str(evaluate.Estimate(1234.5, 1200.0, 1260.0)) == "1234 [1200, 1260]"
    assert str(evaluate.Estimate(1.0, 1.0, 1.0, "at least")) == "1.000 [1.000, 1.000] (at least)"
    assert str(evaluate.Estimate(math.nan, math.nan, math.nan, "no samples")) == "no samples"


# the attained share


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_samples_of_the_optimum_with_their_exact_kl_attain_all_of_it(alpha):
    new, kl = normal(5000, 8, M + S**2 / alpha), np.full(5000, S**2 / (2 * alpha**2))
    result = evaluate.attained(normal(10_000, 7), new, kl, alpha)
    assert result.refused is None
    assert result.share.value == pytest.approx(1.0, abs=0.08)
    assert result.share.low < 1.0 < result.share.high
    assert result.optimum.value == pytest.approx(M + S**2 / (2 * alpha), abs=0.06)
    assert result.baseline.value == pytest.approx(M, abs=0.04)
    assert result.effective_sample_size == pytest.approx(10_000 * math.exp(-((S / alpha) ** 2)), rel=0.4)


def test_the_pretrained_model_attains_nothing_and_a_costly_detour_less_than_nothing():
    pre = normal(2000, 9)
    assert evaluate.attained(pre, pre, np.zeros(2000), 1.5).share.value == pytest.approx(0.0, abs=1e-12)
    same = evaluate.attained(pre, normal(2000, 10), np.zeros(2000), 1.5).share
    assert same.low < 0 < same.high
    assert evaluate.attained(pre, pre, np.full(2000, 1.0), 1.5).share.value == pytest.approx(-2.0, abs=0.2)


def test_chance_in_how_often_groups_are_drawn_is_no_progress():
    in_a, in_b = normal(300, 11), 10 + normal(300, 12)
    pre, groups_pre = np.concatenate([in_a, in_b]), np.repeat([0, 1], 300)
    new, groups = np.concatenate([in_a, np.tile(in_b, 4)]), np.repeat([0, 1], [300, 1200])
    assert evaluate.attained(pre, new, np.zeros(1500), 1.5, groups_pre, groups).share.value == pytest.approx(
        0, abs=1e-9
    )
    assert evaluate.attained(pre, new, np.zeros(1500), 1.5).share.value > 0.5


def test_grouped_samples_of_the_optimum_attain_all_of_it():
    rng = np.random.default_rng(13)
    groups_pre, groups = rng.integers(3, size=9000), rng.integers(3, size=4000)
    spread = np.array([0.5, 1.0, 1.5])
    pre = 5.0 * groups_pre + spread[groups_pre] * rng.normal(size=9000)
    new = 5.0 * groups + spread[groups] ** 2 / 1.2 + spread[groups] * rng.normal(size=4000)
    kl = spread[groups] ** 2 / (2 * 1.2**2)
    share = evaluate.attained(pre, new, kl, 1.2, groups_pre, groups).share
    assert share.low < 1.0 < share.high
    assert share.high - share.low < 0.3
    wide = evaluate.frontier_share(pre, new, kl, groups_pre, groups)
    assert wide.low < 1.0 < wide.high


def test_the_same_seed_gives_the_same_interval():
    args = normal(300, 14), normal(100, 15, M + 1), np.full(100, 0.2), 1.5
    assert evaluate.attained(*args, seed=3) == evaluate.attained(*args, seed=3)
    assert evaluate.attained(*args, seed=3).share != evaluate.attained(*args, seed=4).share


# refusals


def refusal(pre, new, kl, alpha, *groups):
    result = evaluate.attained(pre, new, kl, alpha, *groups)
    assert result.share is None
    return result.refused


def test_a_refusal_says_what_is_wrong_and_what_to_do():
    pre, new, kl = normal(1000, 16), normal(200, 17, M + 1), np.full(200, 0.5)
    assert "effective sample size of exp(r/alpha) is" in refusal(pre, new, kl, 0.3)
    assert "at least 100 is needed: draw more pretrained samples, or raise alpha" in refusal(pre, new, kl, 0.3)
    assert "needs a finite alpha > 0" in refusal(pre, new, kl, 0.0)
    assert "needs a finite alpha > 0" in refusal(pre, new, kl, -2.0)
    assert "within the error" in refusal(pre, new, kl, 100.0)
    assert "constant" in refusal(np.ones(1000), np.ones(200), kl, 1.0)
    assert "diverged" in refusal(pre, new, np.where(np.arange(200) < 3, np.inf, kl), 1.0)
    assert "at least 20 are needed" in refusal(pre, new[:5], kl[:5], 1.5)
    assert refusal([], [], [], 1.0) == "0 pretrained samples were scored and at least 1 are needed: draw more"


def test_what_can_be_said_beside_a_refusal_is_said():
    pre, new, kl = normal(1000, 16), normal(200, 17, M + 1), np.full(200, 0.5)
    thin = evaluate.attained(pre, new, kl, 0.3)
    assert thin.optimum.value == evaluate.optimum(pre, 0.3)
    assert thin.optimum.note == thin.refused
    lone = evaluate.attained(np.append(pre, 1e6), new, kl, 1.0)  # most resamples underflow without that sample
    assert -10 < lone.optimum.low < lone.optimum.high <= 1e6
    free = evaluate.attained(pre, new, kl, 0.0)
    assert free.objective.value == pytest.approx(new.mean())
    assert math.isnan(free.optimum.value)
    assert free.baseline.value == pytest.approx(pre.mean())


def test_two_samples_a_group_are_refused_since_their_optimum_is_half_blind():
    rng = np.random.default_rng(18)
    groups = np.repeat(np.arange(1000), 2)
    pre = rng.normal(size=2000)
    tilt = evaluate.tilted(pre, 1.0, groups)
    assert tilt.effective_sample_size > 1000
    assert tilt.optimum - pre.mean() < 0.6 * 0.5  # s^2/(2 alpha) is 0.5
    assert "within a typical group" in refusal(pre, pre, np.zeros(2000), 1.0, groups, groups)


def test_groups_that_one_set_lacks_are_left_out_or_refused():
    pre, groups_pre = normal(1000, 19), np.repeat([0, 1, 2], [480, 480, 40])
    new, kl = normal(400, 20, M + 1), np.full(400, 0.3)
    groups = np.repeat([0, 1], 200)
    result = evaluate.attained(pre, new, kl, 1.5, groups_pre, groups)
    assert result.optimum.value == pytest.approx(evaluate.optimum(pre[:960], 1.5, groups_pre[:960]))
    assert "52% of samples are in groups the other set lacks" in refusal(pre, new, kl, 1.5, groups_pre, groups * 9)
    with pytest.raises(ValueError, match="give groups_pre and groups, or neither"):
        evaluate.attained(pre, new, kl, 1.5, groups_pre)


def test_arrays_that_do_not_match_are_an_error_that_names_their_shapes():
    with pytest.raises(ValueError, match=r"one number per sample; got \(3,\), \(2,\), \(3,\)"):
        evaluate.objective([1.0, 2.0, 3.0], [0.1, 0.1], 1.0)


# failed rewards


def test_failed_rewards_leave_every_number_and_are_counted():
    pre, new, kl = normal(900, 21), normal(300, 22, M + 1), np.random.default_rng(23).exponential(0.3, 300)
    holes_pre, holes = np.append(pre, [np.nan] * 50), np.append(new, [np.nan] * 25)
    clean = evaluate.attained(pre, new, kl, 1.5)
    holed = evaluate.attained(holes_pre, holes, np.append(kl, [np.nan] * 20 + [99.0] * 5), 1.5)
    assert (holed.share, holed.objective, holed.optimum) == (clean.share, clean.objective, clean.optimum)
    assert (clean.num_failed, holed.num_failed) == (0, 75)
    assert "75 rewards failed" in holed.note
    assert "failed" not in clean.note
    assert evaluate.objective(holes, np.append(kl, [0.0] * 25), 1.5) == evaluate.objective(new, kl, 1.5)
    assert evaluate.optimum(holes_pre, 1.5) == evaluate.optimum(pre, 1.5)


def test_a_reward_that_mostly_fails_is_refused():
    pre, new, kl = normal(900, 24), normal(300, 25), np.zeros(300)
    mostly = np.where(np.arange(300) < 160, np.nan, new)
    assert refusal(pre, mostly, kl, 1.5).startswith("160 of 300 fine-tuned rewards failed and at most half may")
    assert "600 of 900 pretrained" in refusal(np.where(np.arange(900) < 600, np.nan, pre), new, kl, 1.5)
    assert "160 of 300" in str(evaluate.frontier_share(pre, mostly, kl))
    assert str(evaluate.objective([np.nan], [0.0], 1.0)) == "no chain has a finite reward"


def test_the_note_names_the_tail_that_no_number_sees():
    note = evaluate.attained(normal(900, 26), normal(300, 27), np.zeros(300), 1.5).note
    assert "Neither the effective sample size nor the interval sees" in note
    assert "never drew" in note


# the frontier


def test_the_frontier_of_normal_rewards_is_the_root_of_the_kl():
    curve = evaluate.frontier(normal_grid(50_000))
    for kl in (1e-4, 0.01, 0.1, 0.5, 1.0, 2.0):
        assert curve.reward_at(kl) == pytest.approx(M + S * math.sqrt(2 * kl), rel=3e-3)
    assert curve.kl[0] < 1e-7
    assert curve.trusted_kl == curve.kl[-1]
    assert 100 <= curve.effective_sample_size[-1] < 150  # one alpha further it is under 100


def test_the_frontier_rises_and_is_concave_and_holds_every_optimum():
    rewards = normal(2000, 28) ** 3
    curve = evaluate.frontier(rewards)
    assert (np.diff(curve.kl) > 0).all()
    assert (np.diff(curve.reward) > 0).all()
    assert (np.diff(curve.alpha) < 0).all()
    assert (curve.effective_sample_size >= 100).all()
    slopes = np.diff(curve.reward) / np.diff(curve.kl)
    assert (np.diff(slopes[60:]) < 0).all()  # the first KLs are too small to divide by
    assert slopes[100] == pytest.approx(curve.alpha[100], rel=0.1)  # dF/dKL = alpha
    on_curve = [curve.reward_at(kl) for kl in curve.kl]
    assert on_curve == pytest.approx(curve.reward)
    assert curve.reward - curve.alpha * curve.kl == pytest.approx([evaluate.optimum(rewards, a) for a in curve.alpha])
    between = [evaluate.tilted(rewards, a) for a in np.sqrt(curve.alpha[80:-1] * curve.alpha[81:])]
    excess = [curve.reward_at(tilt.kl) - tilt.reward for tilt in between]
    assert min(excess) >= -1e-12  # between its alphas the curve is never too low ...
    assert max(excess) < 2e-3 * (curve.reward[-1] - curve.baseline)  # ... and hardly too high


def test_beyond_the_trusted_kl_the_frontier_is_a_tangent_and_a_share_a_bound():
    pre = normal(2000, 29)
    curve = evaluate.frontier(pre)
    far = curve.trusted_kl + 5.0
    assert curve.reward_at(far) == pytest.approx(curve.reward[-1] + 5.0 * curve.alpha[-1])
    assert curve.reward_at(far) > M + S * math.sqrt(2 * far)
    share = evaluate.frontier_share(pre, normal(500, 30, M + S * math.sqrt(2 * far)), np.full(500, far))
    assert 0.4 < share.value < 1.0
    assert share.note.startswith("at least: its KL of")
    assert "at least" in str(share)


def test_a_reward_whose_maximum_is_common_has_a_frontier_that_ends_flat():
    pre = np.repeat([0.0, 1.0], [3000, 1000])
    curve = evaluate.frontier(pre)
    assert curve.kl[-1] == pytest.approx(math.log(4))
    assert curve.trusted_kl == math.inf
    assert curve.reward_at(50.0) == pytest.approx(1.0, abs=1e-3)
    share = evaluate.frontier_share(pre, np.ones(100), np.full(100, 7.0))
    assert share.value == pytest.approx(1.0, abs=1e-3)
    assert share.note == ""


@pytest.mark.parametrize("kl", [0.05, 0.5, 1.5])
def test_points_of_the_optimum_have_frontier_share_one_and_half_the_way_is_half(kl):
    pre, best = normal(8000, 31), M + S * math.sqrt(2 * kl)
    share = evaluate.frontier_share(pre, normal(4000, 32, best), np.full(4000, kl))
    assert share.low < 1.0 < share.high
    half = evaluate.frontier_share(pre, normal(4000, 32, (M + best) / 2), np.full(4000, kl))
    assert half.low < 0.5 < half.high


def test_no_frontier_share_is_given_where_it_would_mean_nothing():
    pre, kl = normal(500, 33), np.zeros(100)
    assert "the policy has hardly moved" in str(evaluate.frontier_share(pre, normal(100, 34), kl))
    assert "too few" in str(evaluate.frontier_share(pre[:60], normal(100, 34), kl + 1))
    assert "constant" in str(evaluate.frontier_share(np.full(500, 0.1), np.full(100, 0.1), kl + 1))
    empty = evaluate.frontier(pre[:60])
    assert (len(empty.kl), empty.trusted_kl) == (0, 0.0)
    assert math.isnan(empty.reward_at(1.0))


# diversity, decoding, imports


def test_diversity_is_the_mean_distance_over_pairs():
    assert evaluate.diversity([[0.0, 0.0], [3.0, 4.0]]) == 5.0
    assert evaluate.diversity(np.array([0.0, 1.0, 3.0])) == pytest.approx(2.0)
    events = np.random.default_rng(35).normal(size=(2000, 8, 4))
    expected = 2 * math.exp(math.lgamma(16.5) - math.lgamma(16))  # sqrt(2) E|z|, z in 32 dimensions
    assert evaluate.diversity(events) == pytest.approx(expected, rel=0.01)
    assert evaluate.diversity(events, seed=1) == evaluate.diversity(events, seed=1)
    events[0] = np.nan
    assert math.isfinite(evaluate.diversity(events[:20]))


def test_a_lone_sample_or_copies_of_one_have_no_diversity():
    assert evaluate.diversity(np.zeros((0, 3))) == evaluate.diversity(np.ones((1, 3))) == 0.0
    assert evaluate.diversity(np.ones((5000, 3)), max_pairs=50) == 0.0
    assert evaluate.diversity(np.eye(20), max_pairs=100) == pytest.approx(math.sqrt(2))  # no event is its own pair


def test_the_undecodable_share_has_wilsons_interval():
    estimate = evaluate.undecodable_share([True] * 10 + [False] * 90)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((0.1, 0.0552, 0.1744), abs=1e-4)
    none = evaluate.undecodable_share(np.zeros(100, dtype=bool))
    assert (none.value, none.low) == (0.0, 0.0)
    assert none.high == pytest.approx(0.0370, abs=1e-4)
    assert str(evaluate.undecodable_share([])) == "there are no samples"


def test_evaluating_imports_neither_torch_nor_ray():
    code = "import sys, rayft.evaluate; sys.exit(any(name in sys.modules for name in ('torch', 'ray', 'scipy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
