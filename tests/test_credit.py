"""Credit by hand, and its gradient against the exact one of J_alpha on a chain that is Gaussian throughout."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from gaussian_line import ALPHA, PROCESSES, THETA, THETA_PRE, Line, exact_gradient, exact_objective, reward

from rayft import credit, losses
from rayft.chain import Chains, Policy, sample
from rayft.space import FullSpace

KL = np.array([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])  # rows t = 1, 2, 3; two chains
NAN = float("nan")


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


# by hand


def test_later_sums_the_smaller_timesteps_and_leaves_out_its_own():
    assert credit.later(KL).tolist() == [[0.0, 0.0], [1.0, 10.0], [3.0, 30.0]]


def test_reward_to_go_charges_each_step_for_the_steps_after_it():
    found = credit.reward_to_go(np.array([5.0, 7.0]), KL, 0.1)
    assert found == pytest.approx(np.array([[5.0, 7.0], [4.9, 6.0], [4.7, 4.0]]))


def test_without_a_price_every_step_gets_the_reward():
    assert credit.reward_to_go(np.array([5.0, 7.0]), KL, 0.0).tolist() == [[5.0, 7.0]] * 3


def test_advantages_by_hand():
    found, scale = credit.advantage(np.array([[1.0, 3.0], [0.0, 6.0]]))  # centred: -1, 1 and -3, 3
    assert scale == pytest.approx(np.sqrt(5))
    assert found == pytest.approx(np.array([[-1.0, 1.0], [-3.0, 3.0]]) / np.sqrt(5))


def test_advantages_have_mean_0_at_every_timestep_and_one_standard_deviation_over_all():
    returns = normal(0, 7, 300) * np.arange(1, 8)[:, None] + np.arange(7)[:, None]
    found, scale = credit.advantage(returns)
    assert found.mean(axis=1) == pytest.approx(np.zeros(7), abs=1e-12)
    assert found.std() == pytest.approx(1)
    spread = returns - returns.mean(axis=1, keepdims=True)
    assert found * scale == pytest.approx(spread)


def test_shifting_or_scaling_all_rewards_leaves_the_advantages():
    returns = normal(1, 4, 50)
    found, scale = credit.advantage(returns)
    moved, wider = credit.advantage(100 + 3 * returns)
    assert moved == pytest.approx(found)
    assert wider == pytest.approx(3 * scale)


def test_failed_chains_get_0_and_move_no_statistic():
    rewards, kl = normal(2, 40), np.abs(normal(3, 6, 40))
    kept, kept_scale = credit.advantage(credit.reward_to_go(rewards, kl, 0.3))
    where = np.sort(np.random.default_rng(4).permutation(50)[:40])
    holed, wide = np.full(50, NAN), np.full((6, 50), 1e6)
    holed[where], wide[:, where] = rewards, kl
    found, scale = credit.advantage(credit.reward_to_go(holed, wide, 0.3))
    assert scale == pytest.approx(kept_scale)
    assert found[:, where] == pytest.approx(kept)
    dead = np.setdiff1d(np.arange(50), where)
    assert np.all(found[:, dead] == 0)
    assert credit.alive(holed).mean() == pytest.approx(1)
    assert credit.alive(holed)[dead].tolist() == [0.0] * 10
    assert credit.alive(holed)[where] == pytest.approx(np.full(40, 1.25))


@pytest.mark.parametrize("rewards", [np.full(8, NAN), np.full(8, 2.5)], ids=["all failed", "all equal"])
def test_rewards_that_say_nothing_give_no_advantage(rewards):
    found, scale = credit.advantage(credit.reward_to_go(rewards, np.zeros((3, 8)), 0.1))
    assert np.all(found == 0)
    assert scale == pytest.approx(0, abs=1e-8)


def test_exponential_weights_by_hand():
    rewards = np.log(np.array([1.0, 3.0, 1.0, 1.0, 4.0]))
    weight = credit.exponential_weight(rewards, 1.0, np.array([7, 7, 2, 2, 2]))
    assert weight == pytest.approx(np.array([0.5, 1.5, 0.5, 0.5, 2.0]))
    sharper = credit.exponential_weight(rewards, 0.5, np.array([7, 7, 2, 2, 2]))
    assert sharper == pytest.approx(np.array([0.2, 1.8, 3 / 18, 3 / 18, 48 / 18]))


def test_exponential_weights_have_mean_1_in_each_group_whatever_the_groups_rewards():
    groups = np.random.default_rng(5).integers(0, 4, 400)
    rewards = normal(6, 400) + 50 * groups
    weight = credit.exponential_weight(rewards, 0.5, groups)
    for label in range(4):
        assert weight[groups == label].mean() == pytest.approx(1)
    across = credit.exponential_weight(rewards, 0.5)
    assert across.mean() == pytest.approx(1)
    assert across[groups < 3].max() < 1e-12  # without groups the best class takes all


def test_failed_chains_weigh_nothing_and_do_not_tip_the_balance_of_groups():
    groups = np.repeat([0, 1], 100)
    rewards = normal(7, 200)
    rewards[:60] = NAN
    weight = credit.exponential_weight(rewards, 1.0, groups)
    assert np.all(weight[:60] == 0)
    assert weight.mean() == pytest.approx(1)
    assert weight[60:100].mean() == pytest.approx(weight[100:].mean())
    assert np.all(credit.exponential_weight(np.full(5, NAN), 1.0) == 0)


def test_weights_of_huge_and_tiny_rewards_stay_finite():
    weight = credit.exponential_weight(np.array([-1e6, 0.0, 1e6, 1e6]), 0.01)
    assert weight.tolist() == [0.0, 0.0, 2.0, 2.0]


def test_effective_share_counts_equal_weights():
    assert credit.effective_share(np.full(10, 0.3)) == pytest.approx(1)
    assert credit.effective_share(np.array([0.0, 0.0, 5.0, 5.0])) == pytest.approx(0.5)
    assert credit.effective_share(np.array([1.0, 3.0])) == pytest.approx(16 / 20)


def test_group_advantages_by_hand_are_against_the_others_of_the_group():
    returns = np.array([[1.0, 3.0, 10.0, 20.0, 60.0, NAN]])  # groups of three: others' means 6.5, 5.5, 2 and 60, 20, -
    found, scale = credit.group_advantage(returns, 3, own_scale=False)
    centred = np.array([1 - 6.5, 3 - 5.5, 10 - 2, 20 - 60, 60 - 20, 0.0])
    assert scale == pytest.approx(np.full(6, np.sqrt(np.square(centred).sum() / 5)))
    assert found[0] * scale == pytest.approx(centred)
    own, scales = credit.group_advantage(returns, 3, own_scale=True)
    assert scales[3:] == pytest.approx(np.full(3, 40.0))
    assert own[0, 3:].tolist() == [-1.0, 1.0, 0.0]


def test_one_group_of_all_is_the_batch_up_to_leaving_oneself_out():
    returns = normal(8, 5, 60)
    one, scale = credit.advantage(returns)
    other, wide = credit.group_advantage(returns, 60, own_scale=False)
    assert other == pytest.approx(one)
    assert wide == pytest.approx(np.full(60, scale * 60 / 59))


def test_a_group_that_agrees_or_has_one_survivor_says_nothing():
    returns = np.array([[2.0, 2.0, 5.0, NAN, 1.0, 4.0]])
    for own_scale in (False, True):
        found, _ = credit.group_advantage(returns, 2, own_scale)
        assert found[0, :4].tolist() == [0.0] * 4
        assert np.all(np.abs(found[0, 4:]) > 0.5)


# against the exact gradient

NUM_CHAINS, NUM_BLOCKS = 120_000, 24


@dataclass
class Walk:
    """Chains of the policy at theta with the pretrained one beside it."""

    policy: Policy
    chains: Chains
    rewards: np.ndarray
    kl: np.ndarray
    log_ratio: np.ndarray  # sampled: log p_old - log p_pre, per transition


@pytest.fixture(scope="module", params=PROCESSES.values(), ids=PROCESSES.keys())
def walk(request):
    process = request.param
    policy, reference = (Policy(Line(theta), process, FullSpace()) for theta in (THETA, THETA_PRE))
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(NUM_CHAINS, 1, dtype=torch.float64, generator=generator)  # noqa: N806
    chains = sample(policy, x_T, {}, generator, reference=reference)
    log_ref = [
        reference.log_prob(chains.x[row], chains.columns["mean_ref"][row], chains.t[row], {})
        for row in range(process.num_steps)
    ]
    log_ratio = chains.columns["log_prob"] - torch.stack(log_ref)
    return Walk(
        policy, chains, reward(chains.x_0[:, 0]).numpy(), chains.columns["kl"].numpy(), log_ratio.detach().numpy()
    )


def surrogate_gradient(
    walk: Walk, returns: np.ndarray, explicit: float, group: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """dJ/dtheta by PPO's rows at theta_old, and its standard error over blocks of chains.

    ``explicit`` is the price of the differentiable KL_t term; J is the sum over t, where a loss is the mean of rows.
    """
    advantage, scale = credit.advantage(returns)
    if group is not None:
        advantage, scales = credit.group_advantage(returns, group, own_scale=False)
        scale = float(scales[0])
    blocks = []
    for block in torch.arange(NUM_CHAINS).chunk(NUM_BLOCKS):
        index = (torch.arange(len(walk.chains.t)).unsqueeze(1) * NUM_CHAINS + block).flatten()
        rows = walk.chains.with_columns(advantage=torch.from_numpy(advantage)).gather(index)
        mean = walk.policy.mean(rows["x_t"], rows["t"], {})
        sigma = walk.policy.sigma(rows["t"])
        log_prob = walk.policy.log_prob(rows["x_prev"], mean, rows["t"], {})
        loss = losses.ppo_loss(log_prob, rows["log_prob"], rows["advantage"], clip=0.2)
        loss = loss + explicit / scale * losses.transition_kl(mean, rows["mean_ref"], sigma)
        (gradient,) = torch.autograd.grad(loss.mean() * len(walk.chains.t) * scale, walk.policy.network.theta)
        blocks.append(-gradient.numpy())
    found = np.stack(blocks)
    return found.mean(0), found.std(0, ddof=1) / np.sqrt(NUM_BLOCKS)


def test_the_recursion_is_the_pathwise_gradient(walk):
    """The reference itself, by reparametrised chains: x_prev = mu_theta(x_t) + sigma_t z with z held fixed."""
    process, theta, num_chains = walk.policy.process, THETA.clone().requires_grad_(), 120_000
    generator = torch.Generator().manual_seed(1)
    policy = Policy(lambda x, timestep, context: theta[0] * x + theta[1], process, FullSpace())
    reference = Policy(Line(THETA_PRE), process, FullSpace())
    x = torch.randn(num_chains, 1, dtype=torch.float64, generator=generator)
    objective = torch.zeros(num_chains, dtype=torch.float64)
    for step in range(process.num_steps, 0, -1):
        t = torch.full((num_chains,), step)
        mean = policy.mean(x, t, {})
        objective = objective - ALPHA * policy.kl(mean, reference.mean(x, t, {}), t)
        x = mean + process.sigma[step] * policy.noise(x, {}, generator)
    objective = objective + reward(x[:, 0])
    (gradient,) = torch.autograd.grad(objective.mean(), theta)
    assert float(objective.detach().mean()) == pytest.approx(float(exact_objective(THETA, process)), abs=0.02)
    assert gradient.numpy() == pytest.approx(exact_gradient(process).numpy(), rel=0.06)


def test_later_kls_in_the_advantage_and_this_steps_kl_in_the_loss_give_the_exact_gradient(walk):
    returns = credit.reward_to_go(walk.rewards, walk.kl, ALPHA)
    found, error = surrogate_gradient(walk, returns, explicit=ALPHA)
    exact = exact_gradient(walk.policy.process).numpy()
    assert np.all(np.abs(found - exact) < 4 * error)
    assert np.linalg.norm(found - exact) < 0.06 * np.linalg.norm(exact)


@pytest.mark.parametrize("group", [2, 8])
def test_groups_however_small_give_the_exact_gradient_because_nobody_is_in_his_own_baseline(walk, group):
    found, error = surrogate_gradient(walk, credit.reward_to_go(walk.rewards, walk.kl, ALPHA), ALPHA, group)
    exact = exact_gradient(walk.policy.process).numpy()
    assert np.all(np.abs(found - exact) < 4 * error)
    assert np.linalg.norm(found - exact) < 0.08 * np.linalg.norm(exact)


def test_sampled_log_ratios_of_this_step_and_the_later_ones_give_the_exact_gradient(walk):
    own_and_later = credit.later(walk.log_ratio) + walk.log_ratio
    found, error = surrogate_gradient(walk, walk.rewards - ALPHA * own_and_later, explicit=0.0)
    exact = exact_gradient(walk.policy.process).numpy()
    assert np.all(np.abs(found - exact) < 4 * error)
    assert np.linalg.norm(found - exact) < 0.06 * np.linalg.norm(exact)


def test_a_closed_form_kl_of_step_t_inside_the_advantage_does_not(walk):
    """It depends on x_t only, so it is a baseline: the penalty on step t vanishes. T Eq. 21 holds nothing else."""
    own_and_later = credit.later(walk.kl) + walk.kl
    found, error = surrogate_gradient(walk, walk.rewards - ALPHA * own_and_later, explicit=0.0)
    exact = exact_gradient(walk.policy.process).numpy()
    assert np.max(np.abs(found - exact) / error) > 20
    assert np.linalg.norm(found - exact) > 0.5 * np.linalg.norm(exact)
    only_own = walk.rewards - ALPHA * walk.kl  # T Eq. 21
    printed, error = surrogate_gradient(walk, only_own, explicit=0.0)
    assert np.max(np.abs(printed - exact) / error) > 20


def test_counting_step_t_twice_does_not_either(walk):
    own_and_later = credit.later(walk.log_ratio) + walk.log_ratio
    found, error = surrogate_gradient(walk, walk.rewards - ALPHA * own_and_later, explicit=ALPHA)
    assert np.max(np.abs(found - exact_gradient(walk.policy.process).numpy()) / error) > 20


def test_a_kl_costs_as_much_where_nothing_differs_as_beside_what_does():
    assert credit.price(0.1, np.array([0.5, 0.0, 0.7])) == pytest.approx([0.2, 0.1 / 0.6, 0.1 / 0.7])
    assert credit.price(0.1, np.zeros(2)) == pytest.approx(0.1)
    assert credit.price(0.0, np.array([0.5, 0.0])) == pytest.approx(0.0)
