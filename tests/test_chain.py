"""The chain against closed forms: what a mean is, how dense a transition, and where linear chains end."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from envs.toy import data as mixture
from envs.toy.masked import MEANS, SPREAD, MaskedToy
from envs.toy.model import ExactDenoiser
from rayft.chain import PIECE, Chains, Policy, expand, forward_noise, posterior_mean, reverse_process, sample
from rayft.schedule import from_alpha_bar, linear, polynomial
from rayft.space import FullSpace

PROCESSES = {
    "beta": reverse_process(linear(12, 0.01, 0.5), "beta"),
    "gamma": reverse_process(linear(12, 0.01, 0.5), "gamma"),
    "ddim": reverse_process(linear(12, 0.01, 0.5), "gamma", 0.4),
    "edm respaced": reverse_process(polynomial(1000).respace(12), "gamma"),
}
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def drawn(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


def close(a, b, rtol=1e-9, atol=1e-10):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def guess_x_0(x_t, timestep):
    """A made-up belief about x_0, bounded and different at every timestep."""
    return torch.sin(2 * x_t + expand(timestep.double() / 5, x_t)) * 0.8


def three_policies(process):
    """One belief told as x_0, as noise and as v."""
    ab = torch.zeros(1001, dtype=torch.float64)
    ab[process.schedule.timestep] = process.schedule.alpha_bar

    def x0(x_t, timestep, context):
        return guess_x_0(x_t, timestep)

    def eps(x_t, timestep, context):
        a = expand(ab[timestep], x_t)
        return (x_t - a.sqrt() * guess_x_0(x_t, timestep)) / (1 - a).sqrt()

    def v(x_t, timestep, context):
        a = expand(ab[timestep], x_t)
        return a.sqrt() * eps(x_t, timestep, context) - (1 - a).sqrt() * guess_x_0(x_t, timestep)

    return {name: Policy(fn, process, FullSpace(), name) for name, fn in (("x0", x0), ("eps", eps), ("v", v))}


def masked_toy(num_steps=20, sigma="beta", shift=0.0):
    """The masked toy in float64; ``shift`` moves the trainable residual away from zero."""
    domain = MaskedToy(num_steps)
    net = domain.denoiser().double()
    nn.init.constant_(net.residual[-1].bias, shift)
    return domain, Policy(net, reverse_process(domain.schedule(), sigma), domain.space, net.prediction)


def start(domain, policy, num_chains, seed):
    context = domain.context(num_chains, seeded(seed))
    like = torch.empty(num_chains, *domain.event_shape, dtype=torch.float64)
    return policy.noise(like, context, seeded(seed + 1)), context


# what a mean is


@every_process
def test_noise_x_0_and_v_denoisers_of_one_belief_are_one_policy(process):
    x_t, t = drawn(0, 60, 3), torch.arange(60) % 12 + 1
    policies = three_policies(process)
    belief = guess_x_0(x_t, process.schedule.timestep[t])
    wanted = posterior_mean(process, x_t, belief, t)
    for policy in policies.values():
        close(policy.x0_hat(x_t, t, {}), belief)
        close(policy.mean(x_t, t, {}), wanted)


@every_process
def test_the_mean_of_a_batch_at_one_timestep_is_the_mean_row_by_row(process):
    x_t = drawn(1, 5, 3)
    for policy in three_policies(process).values():
        for step in range(1, 13):
            close(policy.mean_at(x_t, step, {}), policy.mean(x_t, torch.full((5,), step), {}))


def test_without_a_gradient_a_large_batch_is_one_network_call_a_piece_and_the_same_mean():
    """What is asked for with a gradient goes through whole."""
    calls = []

    def network(x_t, timestep, context):
        calls.append(len(x_t))
        assert len(timestep) == len(context["scale"]) == len(x_t)
        return x_t * context["scale"][:, None] + timestep[:, None]

    policy = Policy(network, reverse_process(linear(10, 0.01, 0.3)), FullSpace())
    x_t, context = drawn(0, 700, PIECE // 300), {"scale": drawn(1, 700)}
    t = torch.arange(700) % 10 + 1
    whole = policy.mean(x_t, t, context)
    with torch.no_grad():
        assert torch.equal(policy.mean(x_t, t, context), whole)
        row = policy.mean_at(x_t, 3, context)
    assert calls == [700, *[300, 300, 100] * 2]
    close(row, policy.mean(x_t, torch.full((700,), 3), context))


def test_the_mean_is_ddpms_formula():
    process = PROCESSES["beta"]
    ab, ab_prev = process.schedule.alpha_bar[1:], process.schedule.alpha_bar[:-1]
    alpha = ab / ab_prev
    x_t, t = drawn(2, 12, 3), torch.arange(1, 13)
    eps = drawn(3, 12, 3)
    policy = Policy(lambda x, timestep, context: eps, process, FullSpace())
    wanted = (x_t - expand((1 - alpha) / (1 - ab).sqrt(), x_t) * eps) / expand(alpha.sqrt(), x_t)
    close(policy.mean(x_t, t, {}), wanted)


@every_process
def test_the_error_of_a_step_is_the_shift_less_c_t_times_the_noise_error(process):
    """x_prev - mu_theta = eps_star - c_t (eps - eps_theta)   (math.md, Sec. 3)"""
    t = torch.arange(48) % 12 + 1
    x_0, eps, eps_star = drawn(4, 48, 3), drawn(5, 48, 3), drawn(6, 48, 3)
    x_t = forward_noise(process.schedule, x_0, t, eps)
    policy = three_policies(process)["eps"]
    eps_theta = policy.network(x_t, process.schedule.timestep[t], {})
    x_prev = posterior_mean(process, x_t, x_0, t) + eps_star
    wanted = eps_star - expand(process.eps_gain[t], x_t) * (eps - eps_theta)
    close(x_prev - policy.mean(x_t, t, {}), wanted)


def test_at_t_0_x0_hat_is_the_event_and_the_network_is_not_asked_about_t_0():
    asked = []

    def network(x_t, timestep, context):
        asked.append(timestep)
        return torch.full_like(x_t, torch.nan) if bool((timestep == 0).any()) else torch.zeros_like(x_t)

    policy = Policy(network, PROCESSES["gamma"], FullSpace())
    x, t = drawn(7, 4, 3), torch.tensor([0, 3, 0, 12])
    x_0 = policy.x0_hat(x, t, {})
    assert torch.equal(x_0[[0, 2]], x[[0, 2]])
    close(x_0[[1, 3]], x[[1, 3]] / policy.process.schedule.alpha_bar[[3, 12]].sqrt().unsqueeze(1))
    assert int(torch.cat(asked).min()) == 1


def test_a_respaced_chain_tells_the_network_the_timesteps_it_was_trained_with():
    schedule = linear(1000).respace(4)

    def network(x_t, timestep, context):
        return expand(timestep.double(), x_t).expand_as(x_t)

    policy = Policy(network, reverse_process(schedule), FullSpace())
    x = torch.zeros(4, 2, dtype=torch.float64)
    told = policy.mean(x, torch.arange(1, 5), {}) / -expand(policy.process.eps_gain[1:], x)
    close(told[:, 0], torch.tensor([250.0, 500.0, 750.0, 1000.0]).double())


def test_a_v_denoiser_may_start_from_pure_noise():
    """alpha_bar_T = 0 (zero terminal SNR): x_T says nothing of x_0, and v = -x_0 there."""
    process = reverse_process(from_alpha_bar(torch.tensor([1.0, 0.6, 0.2, 0.0])))
    policy = Policy(lambda x, timestep, context: -0.3 * torch.ones_like(x), process, FullSpace(), "v")
    x_t = drawn(8, 5, 2)
    close(policy.x0_hat(x_t, torch.full((5,), 3), {}), torch.full_like(x_t, 0.3))
    wanted = process.from_x0[3] * 0.3 + process.from_xt[3] * x_t
    close(policy.mean(x_t, torch.full((5,), 3), {}), wanted)


def test_predicted_noise_that_says_nothing_of_x_0_is_refused_in_a_sentence():
    process = reverse_process(from_alpha_bar(torch.tensor([1.0, 0.6, 0.2, 0.0])))
    with pytest.raises(ValueError, match=r"alpha_bar is 0 at T, .* use an x0 or v network"):
        Policy(lambda x, timestep, context: x, process, FullSpace(), "eps")


def test_an_unknown_prediction_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="a denoiser predicts 'eps', 'x0' or 'v'; this one says 'score'"):
        PROCESSES["beta"].linear_in("score")


def test_forward_noise_has_the_marginals_mean_and_variance():
    schedule, x_0, noise = linear(12, 0.01, 0.5), drawn(9, 12, 2), drawn(10, 12, 2)
    ab = schedule.alpha_bar[1:].reshape(12, 1)
    x_t = forward_noise(schedule, x_0, torch.arange(1, 13), noise)
    close(x_t, ab.sqrt() * x_0 + (1 - ab).sqrt() * noise)
    close(forward_noise(schedule, x_0, torch.zeros(12, dtype=torch.long), noise), x_0)


def test_autocast_runs_the_network_alone_in_bfloat16():
    torch.manual_seed(0)
    net = nn.Linear(4, 4).requires_grad_(False)
    process, x_t, t = reverse_process(linear(12, 0.01, 0.5)), drawn(11, 6, 4).float(), torch.arange(1, 7)
    exact = Policy(lambda x, timestep, context: net(x), process, FullSpace())
    rough = Policy(lambda x, timestep, context: net(x), process, FullSpace(), autocast=torch.bfloat16)
    assert rough.mean(x_t, t, {}).dtype == torch.float32
    gap = (rough.mean(x_t, t, {}) - exact.mean(x_t, t, {})).abs() / expand(process.eps_gain[t], x_t)
    assert 0 < float(gap.max()) < 0.03


# how dense a transition


@every_process
def test_transition_log_probs_and_kls_are_torchs(process):
    policy = three_policies(process)["x0"]
    x_t, other, t = drawn(12, 12, 3), drawn(13, 12, 3), torch.arange(1, 13)
    mean, sigma = policy.mean(x_t, t, {}), process.sigma[t].reshape(12, 1)
    x_prev = mean + sigma * drawn(14, 12, 3)
    close(policy.log_prob(x_prev, mean, t, {}), Normal(mean, sigma).log_prob(x_prev).sum(1))
    close(policy.kl(mean, other, t), kl_divergence(Normal(mean, sigma), Normal(other, sigma)).sum(1))


# whole chains


def test_stored_log_probs_are_the_ones_of_any_other_batch():
    domain, policy = masked_toy(shift=0.1)
    chains = sample(policy, *start(domain, policy, 50, 0), seeded(2))
    index = torch.randperm(50 * 20, generator=seeded(3))
    for part in index.split(333):
        rows = chains.gather(part)
        context = {k.removeprefix("context/"): v for k, v in rows.items() if k.startswith("context/")}
        mean = policy.mean(rows["x_t"], rows["t"], context)
        close(policy.log_prob(rows["x_prev"], mean, rows["t"], context), rows["log_prob"])


def test_float32_log_probs_repeat_to_rounding():
    domain = MaskedToy()
    net = domain.denoiser().requires_grad_(False)
    policy = Policy(net, reverse_process(domain.schedule()), domain.space, net.prediction)
    x_T, context = start(domain, policy, 40, 0)  # noqa: N806
    chains = sample(policy, x_T.float(), context, seeded(2))
    rows = chains.gather(torch.arange(40 * 20))
    told = {k.removeprefix("context/"): v for k, v in rows.items() if k.startswith("context/")}
    again = policy.log_prob(rows["x_prev"], policy.mean(rows["x_t"], rows["t"], told), rows["t"], told)
    assert float((again - rows["log_prob"]).abs().max()) < 1e-3


def test_a_chain_holds_its_transitions_in_the_order_of_t():
    domain, policy = masked_toy()
    x_T, context = start(domain, policy, 6, 0)  # noqa: N806
    chains = sample(policy, x_T, context, seeded(2))
    assert (chains.num_rows, chains.num_chains) == (20, 6)
    assert torch.equal(chains.x[20], x_T)
    assert torch.equal(chains.t[:, 3], torch.arange(1, 21))
    row = chains.gather(torch.tensor([4 * 6 + 2]))  # row 4 is t = 5
    assert int(row["t"]) == 5
    assert torch.equal(row["x_t"][0], chains.x[5, 2]) and torch.equal(row["x_prev"][0], chains.x[4, 2])
    assert torch.equal(row["context/mask"][0], context["mask"][2])


def test_every_chain_keeps_its_own_context():
    domain, policy = masked_toy()
    chains = sample(policy, *start(domain, policy, 4000, 0), seeded(2))
    real = chains.context["mask"].bool()
    assert float(chains.x[:, ~real].abs().max()) == 0
    assert float((chains.x * real.unsqueeze(-1))[..., :2].sum(-2).abs().max()) < 1e-10
    for label in (0, 1):  # the third feature is not centred: its mean is the class's
        chosen = chains.context["class"] == label
        feature = chains.x_0[chosen][..., 2][real[chosen]]
        assert float(feature.mean()) == pytest.approx(float(MEANS[label, 0, 2]), abs=0.03)


def test_gathered_rows_of_numpy_chains_are_those_of_torch_chains():
    domain, policy = masked_toy()
    chains = sample(policy, *start(domain, policy, 6, 0), seeded(2), reference=policy)
    index = torch.tensor([0, 7, 119, 5])
    found, wanted = chains.numpy().gather(index.numpy()), chains.gather(index)
    assert found.keys() == wanted.keys()
    for name, rows in wanted.items():
        close(torch.from_numpy(found[name]), rows, rtol=0, atol=0)
    only = chains.with_columns(weight=chains.t).keep("weight", "kl")
    assert only.columns.keys() == {"weight", "kl"} and torch.equal(only.x, chains.x)


def test_a_chain_of_the_pretrained_policy_has_kl_0():
    domain, policy = masked_toy()
    copy = masked_toy()[1]
    for reference in (policy, copy):
        chains = sample(policy, *start(domain, policy, 20, 0), seeded(2), reference=reference)
        assert float(chains.columns["kl"].abs().max()) == 0
        close(chains.columns["mean_ref"][7], policy.mean_at(chains.x[8], 8, chains.context), rtol=0, atol=0)


@pytest.mark.parametrize("sigma", ["beta", "gamma"])
def test_the_chain_kl_of_a_shifted_policy_is_the_sum_of_squared_shifts_over_twice_the_variance(sigma):
    domain, reference = masked_toy(sigma=sigma)
    _, policy = masked_toy(sigma=sigma, shift=0.05)  # x_0 predictions move by 0.05 in every coordinate
    chains = sample(policy, *start(domain, policy, 3000, 0), seeded(2), reference=reference)
    process, size = policy.process, chains.context["mask"].sum(1).double()
    squared = 0.05**2 * size  # the two centred coordinates cannot shift, the third feature can
    per_step = (process.from_x0[1:, None] ** 2 * squared) / (2 * process.sigma[1:, None] ** 2)
    close(chains.columns["kl"], per_step, rtol=1e-6)
    rows = [chains.gather(torch.arange(3000) + 3000 * row) for row in range(20)]
    log_ref = [
        reference.log_prob(r["x_prev"], r["mean_ref"], r["t"], {"mask": r["context/mask"], "class": r["context/class"]})
        for r in rows
    ]
    log_ratio = (chains.columns["log_prob"] - torch.stack(log_ref)).sum(0)
    standard_error = float(log_ratio.std()) / math.sqrt(3000)
    assert float(log_ratio.mean()) == pytest.approx(float(per_step.sum(0).mean()), abs=4 * standard_error)


@pytest.mark.parametrize("sigma", ["beta", "gamma"])
def test_linear_chains_end_where_the_recursion_of_mean_and_variance_says(sigma):
    """x0_hat = m + g (x_t - a m) makes mu affine in x_t, so x_0 ~ N(mean P m, variance P), exactly."""
    n = 12_000
    domain, policy = masked_toy(sigma=sigma)
    process, ab = policy.process, policy.process.schedule.alpha_bar
    x_0 = sample(policy, *start(domain, policy, n, 0), seeded(2)).x_0
    mean, variance = 0.0, 1.0  # mean in units of m
    for t in range(20, 0, -1):
        a = float(ab[t].sqrt())
        g = SPREAD**2 * a / (SPREAD**2 * a**2 + 1 - a**2)
        slope = float(process.from_xt[t] + process.from_x0[t] * g)
        mean = slope * mean + float(process.from_x0[t]) * (1 - g * a)
        variance = slope**2 * variance + float(process.sigma[t]) ** 2
    context = domain.context(n, seeded(0))
    group = domain.groups(context)
    assert len(group.unique()) == 6
    for label in group.unique():
        found = x_0[group == label].flatten(1)
        one = {k: v[group == label][:1] for k, v in context.items()}
        centre = mean * domain.space.project(MEANS[one["class"]].double(), one).flatten()
        error = math.sqrt(variance / len(found))
        assert float((found.mean(0) - centre).abs().max()) < 4.5 * error
        unit = torch.eye(12, dtype=torch.float64).reshape(12, 4, 3)
        projector = domain.space.project(unit, {"mask": one["mask"].expand(12, -1)}).flatten(1)
        assert float((torch.cov(found.T) - variance * projector).abs().max()) < 5 * variance * math.sqrt(2 / len(found))


def mixture_moments():
    weight, centres = mixture.WEIGHTS.double(), mixture.CENTRES.double()
    mean = weight @ centres
    return mean, (centres.T * weight) @ centres - mean.outer(mean) + mixture.SPREAD**2 * torch.eye(2).double()


def exact_samples(num_steps, sigma, num_chains):
    schedule = linear(num_steps, 0.1 / num_steps, 17.5 / num_steps)
    net = ExactDenoiser(schedule)
    policy = Policy(net, reverse_process(schedule, sigma), FullSpace(), net.prediction)
    return sample(policy, drawn(0, num_chains, 2), {}, seeded(1)).x_0


def test_chains_of_the_exact_denoiser_reproduce_the_mixture():
    x_0, (mean, covariance) = exact_samples(100, "beta", 20_000), mixture_moments()
    assert float((x_0.mean(0) - mean).abs().max()) < 0.03
    assert float((torch.cov(x_0.T) - covariance).abs().max()) < 0.035
    true = mixture.draw(100_000, seeded(2)).double()
    at = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]).double()
    assert float((x_0.quantile(at, dim=0) - true.quantile(at, dim=0)).abs().max()) < 0.06
    share = torch.tensor([float(((x_0 * corner) > 0).all(1).double().mean()) for corner in mixture.CENTRES])
    wanted = torch.tensor([float(((true * corner) > 0).all(1).double().mean()) for corner in mixture.CENTRES])
    assert float((share - wanted).abs().max()) < 0.012


def test_the_posteriors_variance_leaves_samples_too_narrow_by_an_error_that_halves_with_twice_the_steps():
    """gamma_t forgets how unsure x0_hat is: one reason why fine-tuning defaults to beta_t."""
    _, covariance = mixture_moments()
    lost = [float((covariance - torch.cov(exact_samples(n, "gamma", 20_000).T)).trace()) for n in (25, 50)]
    assert lost[0] > lost[1] > 0.1
    assert lost[0] / lost[1] == pytest.approx(2, rel=0.25)


def test_sampling_leaves_no_graph_behind():
    domain, policy = masked_toy()
    chains = sample(policy, *start(domain, policy, 4, 0), seeded(2), reference=policy)
    arrays = [chains.x, *chains.columns.values()]
    assert isinstance(chains, Chains) and not any(a.requires_grad for a in arrays)
