"""Path consistency: at p* and its own v every piece of every path balances, whoever drew it."""

import numpy as np
import pytest
import torch

from rayft import losses
from rayft.algorithms.pcl import Kept, PCLConfig, pieces
from rayft.chain import Policy, reverse_process, sample
from rayft.schedule import linear
from rayft.space import FullSpace

ALPHA, SLOPE = 0.4, 1.3  # r(x) = SLOPE x: v stays linear in x, and p* keeps sigma_t
PROCESS = reverse_process(linear(4, 0.2, 0.6))


def base(x, timestep, context):
    return 0.3 * x + 0.2


def values():
    """v(x, t) = a_t x + b_t from t = 0 upwards: v_t(x) = E v_{t-1} + sigma_t^2 a_{t-1}^2 / (2 alpha)."""
    keep, gain, _, _ = PROCESS.linear_in("eps")
    a, b = [SLOPE], [0.0]
    for t in range(1, PROCESS.num_steps + 1):
        spread = float(PROCESS.sigma[t]) ** 2 * a[-1] ** 2 / (2 * ALPHA)
        b.append(b[-1] + a[-1] * 0.2 * float(gain[t]) + spread)
        a.append(a[-1] * float(keep[t] + 0.3 * gain[t]))
    return a, b


@pytest.mark.parametrize("length", [1, 2, 4])
def test_at_the_optimum_every_piece_balances_on_anybodys_path(length):
    reference, (a, b) = Policy(base, PROCESS, FullSpace()), values()
    generator = torch.Generator().manual_seed(0)
    x_T = 3 * torch.randn(50, 1, dtype=torch.float64, generator=generator)  # noqa: N806
    x = sample(reference, x_T, {}, generator).x
    for start in range(length, PROCESS.num_steps + 1, length):
        log_ratio = torch.zeros(50, dtype=torch.float64)
        for t in range(start - length + 1, start + 1):
            step = torch.full((50,), t)
            mean = reference.mean(x[t], step, {})
            best = mean + PROCESS.sigma[t] ** 2 * a[t - 1] / ALPHA
            log_ratio += reference.log_prob(x[t - 1], best, step, {}) - reference.log_prob(x[t - 1], mean, step, {})
        ends = [(a[t] * x[t] + b[t])[:, 0] for t in (start, start - length)]
        assert losses.path_consistency_loss(*ends, log_ratio, ALPHA).max() < 1e-20


def small(**training):
    config = PCLConfig().domain("toy").reward("quadratic").chain(num_steps=8)
    told = {"chains": 16, "minibatch_size": 16, "alpha": 0.5, **training}
    return config.training(**told).evaluate(every=0, chains=64, pretrained_chains=256)


@pytest.fixture
def algo(ray_session):
    built = small(steps=4, minibatch_size=32).build_algo()
    yield built
    built.stop()


def test_before_the_first_step_the_policy_is_the_reference_and_the_value_is_0(algo):
    credit, _ = algo.experience()
    rows = {k: torch.from_numpy(v) for k, v in credit.chains.gather(np.arange(32)).items()}
    learner = algo.learner_group._learner
    out = learner.pieces(rows)
    assert out["log_ratio"].abs().max() < 1e-4
    assert (out["value"] == 0).all()
    last = rows["t"] == 4  # pieces that end in an event have its reward there
    assert (out["value_end"][last] == rows["reward"][last]).all()
    assert (out["value_end"][~last] == 0).all()


def test_pieces_follow_each_other_and_cover_the_chain():
    x = np.arange(9 * 3 * 2, dtype=np.float32).reshape(9, 3, 2)
    found = pieces(Kept(x, np.arange(24, dtype=np.float32).reshape(8, 3), np.zeros(3), {}), 4)
    assert found.t.tolist() == [[4, 4, 4, 8, 8, 8]]
    path = found.columns["path"][0]
    for piece, (start, chain) in enumerate((s, c) for s in (4, 8) for c in range(3)):
        assert (path[piece] == x[start - np.arange(5), chain]).all()
    assert found.columns["log_ref"].tolist() == [np.arange(24).reshape(2, 4, 3).sum(1).ravel().tolist()]


def test_chains_whose_reward_failed_weigh_nothing():
    kept = Kept(np.zeros((9, 3, 2), np.float32), np.zeros((8, 3), np.float32), np.array([1.0, np.nan, 2.0]), {})
    alive = pieces(kept, 4).columns["alive"][0]
    assert alive.tolist() == pytest.approx([1.5, 0, 1.5, 1.5, 0, 1.5])


def test_older_chains_are_learned_from_again_and_the_oldest_are_let_go(ray_session, tmp_path):
    algo = small(replay=16, replay_size=32).build_algo()
    assert algo.experience()[0].chains.num_chains == 16  # nothing to replay yet
    for _ in range(4):
        algo.train()
    assert algo.experience()[0].chains.num_chains == 32
    assert 32 <= sum(len(k.rewards) for k in algo.kept) < 48
    path = algo.save_to_path(str(tmp_path / "state"))
    before = algo.kept
    algo.stop()
    again = small(replay=16, replay_size=32).build_algo()
    again.restore_from_path(path)
    assert all((a.x == b.x).all() and (a.rewards == b.rewards).all() for a, b in zip(again.kept, before, strict=True))
    again.stop()


def test_fewer_explorers_are_drawn_towards_an_end_that_is_known(ray_session):
    algo = small(explore=0.5, explore_end=0.0).build_algo()

    def explorers():
        """Chains that are the pretrained model's: their KL to it is 0."""
        return int((algo.draw_scored(algo.iteration)[0].draw.chains.columns["kl"] == 0).all(0).sum())

    algo.train()  # from here on the policy is another
    assert explorers() == 8  # whose run it is does not know when it ends
    algo.horizon = 5
    assert [algo.draw_settings(i)["explore"] for i in range(5)] == pytest.approx(
        [0.5, 0.4268, 0.25, 0.0732, 0], abs=1e-4
    )
    algo.train()
    assert explorers() == 4
    algo.stop()


def test_the_trust_region_pulls_the_policy_back_and_leaves_the_value_network_alone(ray_session):
    algo = small(lr=0.05, target_kl=0.1, value_lr=1e-2).build_algo()
    told = algo.train()["learners"]["default_policy"]
    assert told["update_kl"] < 0.2
    assert told["update_shrunk_to"] < 0.5
    critic = algo.learner_group._learner.module["default_policy"].unwrapped().critic
    assert critic.net[-1].bias.abs().item() > 5e-3
    algo.stop()


@pytest.mark.parametrize("steps", [None, 2])
def test_the_trust_region_measures_the_whole_chain(ray_session, steps):
    algo = small(chains=256, minibatch_size=256 if steps is None else 1024, lr=1e-2, target_kl=100.0, steps=steps)
    algo = algo.build_algo()
    told = algo.train()["learners"]["default_policy"]
    bench = algo.env_runner.module.bench()
    x_T, context = bench.start(2048, torch.Generator().manual_seed(0))  # noqa: N806
    before, after = bench.reference, bench.policy
    kl = sample(before, x_T, context, torch.Generator().manual_seed(1), reference=after).columns["kl"].sum(0)
    assert told["update_kl"] == pytest.approx(float(kl.mean()), rel=0.3)
    algo.stop()
