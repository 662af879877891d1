"""Guides by name: against a Gaussian of which everything is known, in their spaces, and what they refuse."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from rayft import domain as domains
from rayft.arguments import GUIDES
from rayft.bench import Bench
from rayft.chain import Policy, reverse_process, sample
from rayft.cli import main
from rayft.domain import Domain, PlainDenoiser
from rayft.guidance import registry
from rayft.guidance.base import Ground, Reward
from rayft.guidance.fit import log_domain_loss
from rayft.guidance.path_integral import PathIntegral
from rayft.guidance.smc import systematic
from rayft.guidance.value import Climbing, Value
from rayft.schedule import linear
from rayft.settings import explain

SCHEDULE = linear(20, 5e-3, 0.4)
CENTRE, ALPHA = 1.0, 0.5
POLICIES = ["mc", "soft_q", "tweedie", "classifier", "path_integral"]
QUICK = {"mc": {"chains": 256, "steps": 20}, "soft_q": {"chains": 256, "steps": 20}}


class Line(Domain):
    """x_0 ~ N(0, 1), whose E[noise | x_t] is the whole of x_t but its signal."""

    event_shape = (1,)

    def schedule(self):
        return SCHEDULE

    def denoiser(self):
        return PlainDenoiser(nn.Identity())


def standard_normal(x_t, timestep, context):
    return (1 - SCHEDULE.alpha_bar[timestep]).sqrt().to(x_t.dtype).reshape(-1, 1) * x_t


def quadratic(x_0, context):
    return -0.5 * (x_0 - CENTRE).square().flatten(1).sum(1)


def reward_of(function, differentiable=True):
    return Reward("quadratic", lambda x, c: (function(x, c), len(x)), function if differentiable else None)


def line():
    policy = Policy(standard_normal, reverse_process(SCHEDULE), Line.space)
    return Bench(Line(), policy, policy, torch.device("cpu"), torch.float32)


def build(name, ground, **told):
    return registry.build(registry.settings(name, told), ground)


class Column(nn.Module):
    def forward(self, x_t, timestep, context):
        return x_t


class Exact(nn.Module):
    """w(mu, t) / alpha in closed form: x_0 | mu_t ~ N(ahead mu_t, spread), by the chain's own recursion."""

    def __init__(self, policy):
        super().__init__()
        slope = policy.mean(torch.ones(20, 1), torch.arange(1, 21), {}).flatten().tolist()
        ahead, spread, self.table = 1.0, 0.0, {0: (1.0, 0.0)}
        for t in range(1, 21):
            spread += ahead**2 * float(policy.process.sigma[t]) ** 2
            self.table[t] = (ahead, spread)
            ahead *= slope[t - 1]

    def forward(self, mean, timestep, context):
        ahead, spread = torch.tensor([self.table[int(t)] for t in timestep]).T
        stiff = 1 + spread / ALPHA
        return -0.5 * stiff.log() - (ahead * mean.flatten() - CENTRE).square() / (2 * ALPHA * stiff)


@pytest.fixture(scope="module")
def bench():
    return line()


@pytest.fixture(scope="module")
def exact(bench):
    return Value(Exact(bench.policy), bench.policy, ALPHA, 0.0)


@pytest.fixture(scope="module", params=["mc", "soft_q"])
def fitted(request, bench):
    told = {"chains": 4096, "steps": 400, "alpha": ALPHA} | ({"ahead": 5} if request.param == "soft_q" else {})
    reward = reward_of(quadratic, differentiable=False)
    return build(request.param, Ground(bench, reward), **told), reward


def chain(policy, num=2048, **told):
    x_T = torch.randn(num, 1, generator=torch.Generator().manual_seed(0))  # noqa: N806
    return sample(policy, x_T, {}, torch.Generator().manual_seed(1), **told)


# -- against what is known


def test_a_fitted_value_is_that_of_the_gaussian(fitted, bench, exact):
    policy, reward = fitted
    x = chain(bench.policy, 512).x
    for t in (1, 5, 10, 15, 20):
        steps = torch.full((512,), t)
        wanted, found = exact(x[t], steps, {}), policy.value(x[t], steps, {})
        assert float((found - wanted).abs().median()) < 0.06, t
    assert reward.calls == 4096, "the fit is all that the reward is asked for"


def test_guided_by_a_fitted_value_chains_go_where_the_exact_one_leads(fitted, bench, exact):
    """exp(-(x - 1)^2 / (2 alpha)) N(0, 1) has its mean at 1 / (1 + alpha)."""
    found, wanted = (chain(policy, reference=bench.policy) for policy in (fitted[0], Climbing(exact)))
    assert float(wanted.x_0.mean()) == pytest.approx(1 / (1 + ALPHA), abs=0.03)
    assert float((found.x_0 - wanted.x_0).abs().mean()) < 0.12
    kl = [float(chains.columns["kl"].sum(0).mean()) for chains in (found, wanted)]
    assert kl[0] == pytest.approx(kl[1], rel=0.2) and kl[1] > 0.3


def test_the_gradient_at_the_mean_is_the_exact_mean_of_the_optimum_at_any_step_size(bench, exact):
    """N(mu, sigma^2) tilted by exp(v/alpha), v a parabola: the two means, weighted by their precision."""
    x_t = torch.linspace(-2, 2, 9).unsqueeze(1)
    for t in (1, 10, 20):
        step, mean = torch.full((9,), t), bench.policy.mean_at(x_t, t, {})
        ahead, spread = exact.critic.table[t]
        sigma = float(bench.policy.process.sigma[t])
        # v of the next state is -(ahead x - 1)^2 / (2 (1 + rest / alpha)) but for a constant
        stiff = ahead**2 / (ALPHA + spread - ahead**2 * sigma**2)
        wanted = (mean / sigma**2 + stiff * CENTRE / ahead) / (1 / sigma**2 + stiff)
        assert torch.allclose(Climbing(exact).mean(x_t, step, {}), wanted, atol=1e-5), t


def test_a_path_integral_finds_the_exact_mean_without_a_gradient(bench, exact):
    x_t, reward = torch.linspace(-2, 2, 9).unsqueeze(1), reward_of(quadratic, differentiable=False)
    for value, steps in ((None, (1,)), (exact, (1, 5, 15, 20))):
        guide = PathIntegral(bench.policy, reward, ALPHA, 8192, torch.Generator().manual_seed(0), value)
        for t in steps:
            step = torch.full((9,), t)
            sigma = float(bench.policy.process.sigma[t])
            wanted = Climbing(exact).mean(x_t, step, {})
            assert float((guide.mean(x_t, step, {}) - wanted).abs().max()) < 0.05 * sigma, (value, t)
    assert reward.calls == 2 * 9 * 8192, "with a value only the last transition asks the reward"


def test_many_particles_are_a_draw_of_the_optimum(bench):
    guide = build("smc", Ground(bench, reward_of(quadratic)), alpha=ALPHA, particles=2048)
    x_0, _ = guide(4096, torch.Generator().manual_seed(0))
    assert float(x_0.mean()) == pytest.approx(1 / (1 + ALPHA), abs=0.07)
    assert float(x_0.var()) == pytest.approx(ALPHA / (1 + ALPHA), abs=0.07)


def test_resampling_keeps_to_the_shares_within_one():
    share = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    chosen = systematic(share, torch.Generator().manual_seed(0))
    assert torch.bincount(chosen[0], minlength=4).tolist() == [2, 1, 1, 0] and chosen[1].tolist() == [2] * 4


def test_one_event_of_a_group_is_drawn_as_all_of_them_are(bench):
    """Resampled in their parents' order, the first is above 0 in 92 of 100 groups, and of all events 96 are."""
    short = bench.policy.respaced(2)
    ground = Ground(dataclasses.replace(bench, policy=short), reward_of(lambda x, _: x[:, 0].sign()))
    guide, generator = build("smc", ground, alpha=0.5, particles=8, every=2), torch.Generator().manual_seed(0)
    every = torch.cat([guide(8, generator)[0] for _ in range(1000)])
    one = torch.cat([guide(1, generator)[0] for _ in range(2000)])
    assert float((one > 0).float().mean()) == pytest.approx(float((every > 0).float().mean()), abs=0.02)


def test_the_loss_of_the_fit_is_least_at_the_log_of_the_mean_exponential():
    y = torch.tensor([-1.0, 0.5, 1.0])
    h = torch.tensor(0.0, requires_grad=True)
    for _ in range(200):
        (slope,) = torch.autograd.grad(log_domain_loss(h, y), h)
        h = (h - 0.3 * slope).detach().requires_grad_(True)
    assert float(h.detach()) == pytest.approx(math.log(float(y.exp().mean())), abs=1e-4)


# -- what changes nothing


@pytest.mark.parametrize("name", POLICIES)
def test_an_infinite_temperature_guides_nobody(name, bench):
    guide = build(name, Ground(bench, reward_of(quadratic)), alpha=1e9, **QUICK.get(name, {}))
    assert torch.allclose(chain(guide, 64).x_0, chain(bench.policy, 64).x_0, atol=1e-4)


def test_particles_of_equal_weight_are_the_plain_sample(bench):
    flat = reward_of(lambda x, _: torch.zeros(len(x)))
    found, _ = build("smc", Ground(bench, flat), particles=8)(64, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    x_T, context = bench.start(64, generator)  # noqa: N806
    assert torch.allclose(found, sample(bench.policy, x_T, context, generator).x_0, atol=1e-5)


def test_a_failed_candidate_weighs_nothing_and_where_all_failed_nothing_moves(bench):
    nan = torch.tensor(torch.nan)
    below = reward_of(lambda x, _: torch.where(x[:, 0] > 0, 0.0, nan), differentiable=False)
    guide = PathIntegral(bench.policy, below, ALPHA, 512, torch.Generator().manual_seed(0))
    x_t, t = torch.tensor([[0.0], [-9.0]]), torch.tensor([1, 1])
    shift = guide.mean(x_t, t, {}) - bench.policy.mean(x_t, t, {})
    assert float(shift[0]) == pytest.approx(math.sqrt(2 / math.pi) * float(bench.policy.process.sigma[1]), rel=0.1)
    assert float(shift[1]) == pytest.approx(0, abs=1e-6)


# -- what chooses among whole events


def test_the_best_of_n_is_the_highest_of_n_plain_samples_and_never_a_failed_one(bench):
    def known(x_0, context):
        return torch.where(x_0[:, 0] < 0.5, x_0[:, 0], torch.tensor(torch.nan))

    reward = reward_of(known)
    found, _ = build("best_of_n", Ground(bench, reward), n=16)(32, torch.Generator().manual_seed(3))
    generator, rounds = torch.Generator().manual_seed(3), []
    for _ in range(16):
        x_T, context = bench.start(32, generator)  # noqa: N806
        rounds.append(known(sample(bench.policy, x_T, context, generator).x_0, {}))
    assert torch.equal(found[:, 0], torch.stack(rounds).nan_to_num(-9).max(0).values)
    assert reward.calls == 16 * 32


@pytest.mark.parametrize("name", registry.names())
def test_every_guide_keeps_sets_of_points_in_their_space(name):
    domain = domains.build("toy_masked", {})
    net = domains.pretrained(domain).requires_grad_(False)
    policy = Policy(net, reverse_process(domain.schedule()), domain.space, net.prediction)
    bench = Bench(domain, policy, policy, torch.device("cpu"), torch.float32)
    ground = Ground(bench, reward_of(quadratic))
    told = {"best_of_n": {"n": 2}, "smc": {"particles": 4}, "path_integral": {"candidates": 4}}
    told = {**(told | QUICK).get(name, {})} | ({"alpha": 20.0} if name != "best_of_n" else {})
    draw = registry.drawing(build(name, ground, **told), ground)
    x_0, context = draw(10, torch.Generator().manual_seed(0))
    assert x_0.shape == (10, 4, 3) and bool(x_0.isfinite().all()) and not x_0.requires_grad
    assert torch.allclose(domain.space.project(x_0, context), x_0, atol=1e-5)
    assert ground.reward.calls > 0


# -- what is refused


def test_a_guide_that_throws_the_chain_out_is_stopped_with_advice(bench):
    with pytest.raises(ValueError, match=r"at t = \d+ the guide moves the mean by .* diverges; raise guide.alpha"):
        chain(build("tweedie", Ground(bench, reward_of(quadratic)), alpha=1e-5))


@pytest.mark.parametrize(("alpha", "nats"), [(0.2, 40), (0.03, None)])
def test_many_small_shifts_that_throw_the_chain_out_are_stopped_too(bench, alpha, nats):
    """Of a linear reward each transition is moved by sigma_t / alpha of its noise, and no single one is absurd."""
    guide = build("classifier", Ground(bench, reward_of(lambda x, _: x[:, 0])), alpha=alpha)
    if nats is None:
        with pytest.raises(ValueError, match=r"at t = \d+ the guide has moved a chain by 1,\d{3} nats: .* above 0.03"):
            chain(guide)
    else:
        for _ in range(20):  # each draw pays anew
            assert float(chain(guide, reference=bench.policy).columns["kl"].sum(0).max()) > nats


def test_a_value_network_of_the_wrong_shape_is_refused(bench):
    class Wide(Line):
        def critic(self):
            return Column()

    wide = Bench(Wide(), bench.policy, bench.policy, bench.device, bench.dtype)
    with pytest.raises(ValueError, match=r"value network of Wide gives \(2, 1\) for 2 chains; it should give one"):
        build("mc", Ground(wide, reward_of(quadratic)))


@pytest.mark.parametrize(
    ("reward", "why"),
    [(lambda x, _: 1e4 * x[:, 0], "worth 1.0 equally weighted"), (lambda x, _: x[:, 0] * torch.nan, "the 0 chains")],
)
def test_rewards_that_say_too_little_for_a_value_are_refused(bench, reward, why):
    with pytest.raises(ValueError, match=rf"{why}.*larger guide.alpha or more guide.chains"):
        build("mc", Ground(bench, reward_of(reward)), chains=256)


def test_a_value_that_has_learnt_nothing_guides_nobody(bench):
    cliffs = reward_of(lambda x, _: (x[:, 0] * 50).floor() % 2)
    with pytest.raises(ValueError, match=r"from 512 chains the value network learnt nothing of .* take smc or best"):
        build("mc", Ground(bench, cliffs), chains=512, steps=40)


@pytest.mark.parametrize(
    ("told", "why"),
    [
        (["--guide", "softq"], "no guide 'softq' (did you mean 'soft_q'?); there are best_of_n, classifier, mc"),
        (["--guide", "mc", "guide.alfa=1"], "guide has no key 'alfa' (did you mean 'alpha'?); it has alpha, chains"),
        (["--guide", "mc", "guide.alpha=0"], "guide.alpha is 0; it should be greater than 0"),
        (["--guide", "smc", "guide.alpha=-1"], "guide.alpha is -1; it should be greater than 0"),
        (["--guide", "path_integral", "guide.candidates=3"], "guide.candidates is 3; it should be a multiple of 2"),
        (["guide.alpha=1"], "'guide.alpha=1' needs a guide: add --guide NAME, of best_of_n, classifier, mc"),
        (["--guide", "mc", "guide.value=x.pt"], "guide.value is x.pt; give a .safetensors file in a folder"),
        (["--guide", "path_integral", "guide.value=no.safetensors"], "no.safetensors is no whole .safetensors file"),
        (["--guide", "tweedie", "--reward", "stripes"], "tweedie follows the reward's gradient and stripes has none"),
        (
            ["--guide", "tweedie", "--reward", "combine", "reward.parts={q: {name: quadratic, transform: zscore}}"],
            "tweedie follows the reward's gradient and a composition has none",
        ),
    ],
)
def test_what_cannot_guide_is_said_in_a_sentence(told, why, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    told = told if "--reward" in told else ["--reward", "quadratic", *told]
    assert main(["sample", "toy", "--num", "4", *told]) == 2
    out, err = capfd.readouterr()
    assert why in err and err.count("\n") == 1 and out == ""
    assert list(tmp_path.iterdir()) == []


# -- on the command line


def test_a_guided_sample_is_better_counted_and_alike_for_one_seed(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    told = ["sample", "toy", "--reward", "quadratic", "--num", "100", "--num-steps", "10"]
    guide = ["--guide", "path_integral", "guide.alpha=0.5", "guide.candidates=8"]
    for out, more in (("plain", []), ("a", guide), ("b", guide), ("c", [*guide, "--seed", "1"])):
        assert main([*told, *more, "--out", f"{out}.npz"]) == 0
    said = capfd.readouterr().out.splitlines()
    assert said[0] == "100 samples in plain.npz: x_0, reward"
    assert said[1] == "100 samples in a.npz: x_0, reward; guided by path_integral, 4,800 reward calls"
    found = {name: np.load(f"{name}.npz") for name in ("plain", "a", "b", "c")}
    assert found["a"]["reward"].mean() > found["plain"]["reward"].mean() + 0.5
    assert np.array_equal(found["a"]["x_0"], found["b"]["x_0"])
    assert not np.array_equal(found["a"]["x_0"], found["c"]["x_0"])


def test_a_kept_value_is_paid_once_and_serves_its_own_model_reward_and_alpha_only(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    told = ["sample", "toy", "--num", "8", "--num-steps", "10", "guide.value=./v.safetensors"]
    small = [*told, "--reward", "quadratic", "guide.alpha=0.5", "guide.chains=256", "guide.steps=20"]
    assert main([*small, "--guide", "mc"]) == 0
    assert "guided by mc, 256 reward calls" in capfd.readouterr().out
    first = np.load("samples.npz")["x_0"]
    assert main([*small, "--guide", "mc"]) == 0
    assert "guided by mc, 0 reward calls" in capfd.readouterr().out
    assert np.array_equal(np.load("samples.npz")["x_0"], first)
    integral = [*told, "--reward", "quadratic", "guide.alpha=0.5", "--guide", "path_integral", "guide.candidates=4"]
    assert main(integral) == 0
    assert "guided by path_integral, 32 reward calls" in capfd.readouterr().out
    for other, why in (
        ([*small, "guide.alpha=0.2"], "was fitted for alpha 0.5, not 0.2"),
        ([*small, "--reward", "stripes"], "was fitted for another reward"),
        ([*small, "reward.centre=[0.1, 0.1]"], "was fitted for another reward"),
        ([*small, "--num-steps", "11"], "was fitted for another model"),
    ):
        assert main([*other, "--guide", "mc"]) == 2
        assert why in capfd.readouterr().err
    (tmp_path / "v.safetensors").write_bytes(b"half")
    assert main([*small, "--guide", "mc"]) == 2
    assert "v.safetensors is no whole .safetensors file" in capfd.readouterr().err


def test_the_help_names_every_guide_and_every_number_has_its_sentence():
    for name in registry.names():
        assert name in GUIDES
        kind = type(registry.settings(name, {}))
        assert set(explain(kind)) == set(kind.__dataclass_fields__), name
