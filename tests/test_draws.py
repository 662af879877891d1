"""Draws: who is rolled out, what is scored, what must be independent, and seeds by address."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest, pearsonr
from torch import nn

from envs.toy.domain import Toy
from envs.toy.masked import MaskedToy
from rayft import seeds
from rayft.bench import Bench
from rayft.chain import Policy, expand, reverse_process
from rayft.domain import Denoiser, Domain
from rayft.draws import (
    draw_current,
    draw_events,
    draw_grouped,
    draw_mixed,
    draw_pretrained,
    draw_roll_in,
    draw_starts,
    join,
)
from rayft.schedule import linear
from rayft.space import squared_norm

DRAWS = {"current": draw_current, "pretrained": draw_pretrained, "roll_in": draw_roll_in}
every_draw = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def close(a, b, rtol=1e-8, atol=1e-9):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def bench(domain=None, shift=0.0, sigma="beta", dtype=torch.float64):
    """``shift`` moves the policy being trained away from the pretrained one."""
    domain = domain or MaskedToy()
    process = reverse_process(domain.schedule(), sigma)
    nets = [domain.denoiser().to(dtype).requires_grad_(False) for _ in range(2)]
    if shift:
        nn.init.constant_(nets[0].residual[-1].bias, shift)
    policy, reference = (Policy(net, process, domain.space, net.prediction) for net in nets)
    return Bench(domain, policy, reference, torch.device("cpu"), dtype)


class Zero(Denoiser):
    prediction = "x0"

    def forward(self, x_t, timestep, context):
        return torch.zeros_like(x_t)


class Dial(Domain):
    """A number beside a dial that says how it should be read: two draws from one generator, in either order."""

    event_shape = (1,)

    def schedule(self):
        return linear(6, 0.1, 0.6)

    def denoiser(self):
        return Zero()

    def context(self, num_chains, generator):
        return {"dial": torch.rand(num_chains, generator=generator)}


# what is drawn


def test_current_chains_are_the_policys_with_the_pretrained_means_beside_them():
    b = bench(shift=0.2)
    draw = draw_current(b, 30, seeded(0), {})
    rows = draw.chains.gather(torch.arange(30 * 20))
    context = {"mask": rows["context/mask"], "class": rows["context/class"]}
    mean = b.policy.mean(rows["x_t"], rows["t"], context)
    close(b.policy.log_prob(rows["x_prev"], mean, rows["t"], context), rows["log_prob"])
    close(b.reference.mean(rows["x_t"], rows["t"], context), rows["mean_ref"])
    close(b.policy.kl(mean, rows["mean_ref"], rows["t"]), rows["kl"])
    assert float(rows["kl"].min()) > 0
    assert torch.equal(draw.events, draw.chains.x[0])
    assert torch.equal(draw.context["class"], draw.chains.context["class"])


def test_pretrained_chains_are_anchored_to_their_own_means_wherever_the_policy_went():
    b = bench(shift=0.2)
    draw = draw_pretrained(b, 30, seeded(0), {})
    assert float(draw.chains.columns["kl"].abs().max()) == 0
    rows = draw.chains.gather(torch.arange(30 * 20))
    context = {"mask": rows["context/mask"], "class": rows["context/class"]}
    close(b.reference.mean(rows["x_t"], rows["t"], context), rows["mean_ref"])
    assert torch.equal(draw.events, draw_pretrained(bench(), 30, seeded(0), {}).events)


def test_before_the_first_update_current_and_pretrained_chains_are_the_same():
    current, pretrained = (draw(bench(), 10, seeded(3), {}) for draw in (draw_current, draw_pretrained))
    assert torch.equal(current.chains.x, pretrained.chains.x)


def test_roll_in_gives_one_transition_a_chain_at_timesteps_drawn_evenly():
    b = bench(shift=0.2)
    draw = draw_roll_in(b, 3000, seeded(0), {})
    assert draw.chains.num_rows == 1
    assert chisquare(torch.bincount(draw.chains.t[0], minlength=21)[1:].numpy()).pvalue > 1e-3
    rows = draw.chains.gather(torch.arange(3000))
    context = {"mask": rows["context/mask"], "class": rows["context/class"]}
    close(b.reference.mean(rows["x_t"], rows["t"], context), rows["mean_ref"])
    standard = (rows["x_prev"] - rows["mean_ref"]) / expand(b.policy.sigma(rows["t"]), rows["x_prev"])
    dim = b.domain.space.dim(standard, context)
    assert float(squared_norm(standard).sum() / dim.sum()) == pytest.approx(1, abs=0.03)
    padding = ~draw.context["mask"].bool()
    assert float(draw.events[padding].abs().max()) == 0


# independence


@pytest.mark.parametrize("seed", [0, 1])
def test_x_T_says_nothing_of_the_context(seed):  # noqa: N802
    x_T, context = bench(Dial(), dtype=torch.float32).start(4000, seeded(seed))  # noqa: N806
    size = x_T[:, 0].abs().numpy()
    assert pearsonr(size, context["dial"].numpy()).pvalue > 1e-3


# parts


@every_draw
def test_a_draw_depends_on_its_generator_alone(draw):
    b = bench(shift=0.2)
    once, again, other = (draw(b, 12, seeded(seed), {}).numpy() for seed in (5, 5, 6))
    assert np.array_equal(once.events, again.events) and np.array_equal(once.chains.x, again.chains.x)
    assert not np.array_equal(once.events, other.events)


@every_draw
def test_parts_lie_side_by_side_in_the_order_given(draw):
    b = bench(shift=0.2)
    parts = [draw(b, n, seeded(n), {}).numpy() for n in (5, 3, 4)]
    whole = join(parts)
    assert whole.chains.num_chains == 12
    per_chain = len(whole.events) // 12
    begin = 0
    for part in parts:
        end = begin + part.chains.num_chains
        assert np.array_equal(whole.chains.x[:, begin:end], part.chains.x)
        assert np.array_equal(whole.chains.t[:, begin:end], part.chains.t)
        assert np.array_equal(whole.events[begin * per_chain : end * per_chain], part.events)
        for name, column in part.chains.columns.items():
            assert np.array_equal(whole.chains.columns[name][:, begin:end], column)
        for name, told in part.chains.context.items():
            assert np.array_equal(whole.chains.context[name][begin:end], told)
        for name, told in part.context.items():
            assert np.array_equal(whole.context[name][begin * per_chain : end * per_chain], told)
        begin = end
    assert join(parts[:1]) is parts[0]


@every_draw
def test_a_domain_without_context_draws_all_the_same(draw):
    b = bench(Toy(weights=None))
    found = draw(b, 7, seeded(0), {}).numpy()
    assert found.events.dtype == np.float64
    assert np.isfinite(found.events).all() and found.context == {}


def test_float32_domains_stay_float32_throughout():
    for draw in DRAWS.values():
        found = draw(bench(dtype=torch.float32), 4, seeded(0), {})
        floats = [found.events, found.chains.x, *found.chains.columns.values()]
        assert {a.dtype for a in floats} == {torch.float32}


# seeds


def test_every_part_of_an_address_matters():
    base = seeds.address(1, 2, "train", 3)
    others = [
        seeds.address(*a) for a in ((2, 2, "train", 3), (1, 3, "train", 3), (1, 2, "probe", 3), (1, 2, "train", 4))
    ]
    assert len({base, *others}) == 5
    many = {seeds.address(s, i, p, k) for s in range(5) for i in range(40) for p in ("a", "b") for k in range(25)}
    assert len(many) == 10_000
    assert min(many) >= 0 and max(many) < 2**63
    assert kstest(np.array(list(many)) / 2**63, "uniform").pvalue > 1e-3


def test_parts_of_an_address_do_not_run_together():
    assert seeds.address(1, 12, "train") != seeds.address(11, 2, "train")
    assert seeds.address(1, 12, "train") != seeds.address(1, 1, "2train")
    assert seeds.address(1, 2, "train", 34) != seeds.address(1, 2, "train3", 4)


def test_the_same_address_gives_the_same_numbers_in_any_process():
    code = (
        "import torch; from rayft import seeds; "
        "print(torch.randn(3, generator=seeds.torch_generator(7, 1, 'train', 2)).tolist(), "
        "seeds.numpy_generator(7, 1, 'train', 2).normal(size=3).tolist())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = torch.randn(3, generator=seeds.torch_generator(7, 1, "train", 2)).tolist()
    there = seeds.numpy_generator(7, 1, "train", 2).normal(size=3).tolist()
    assert ran.stdout.strip() == f"{here} {there}"


def test_neighbouring_addresses_give_unrelated_numbers():
    drawn = torch.stack([torch.randn(2000, generator=seeds.torch_generator(0, i, "train")) for i in range(20)])
    off_diagonal = torch.corrcoef(drawn) - torch.eye(20)
    assert float(off_diagonal.abs().max()) < 0.1


# draws of single algorithms


def settled(**told):
    return {"group_size": 4, "share": "x_T", "explore": 0.0, "sampling_steps": None, **told}


@pytest.mark.parametrize("share", ["x_T", "context"])
def test_neighbours_of_a_group_begin_alike_and_go_their_own_ways(share):
    drawn = draw_grouped(bench(), 12, seeded(0), settled(share=share))
    x, mask = drawn.chains.x, drawn.chains.context["mask"]
    groups = [slice(start, start + 4) for start in (0, 4, 8)]
    for rows in groups:
        assert (mask[rows] == mask[rows][0]).all()
        assert bool((x[-1, rows] == x[-1, rows][0]).all()) == (share == "x_T")
    assert (x[0, 0] != x[0, 1]).any()
    assert (x[-1, 0] != x[-1, 4]).any()


def test_explorers_are_the_pretrained_models_and_the_others_the_policys():
    place = bench(shift=0.5)
    drawn = draw_mixed(place, 12, seeded(0), settled(explore=0.25))
    kl = drawn.chains.columns["kl"].sum(0)
    assert (kl[:3] == 0).all()
    assert (kl[3:] > 0).all()
    for share, other in ((0.0, draw_current), (1.0, draw_pretrained)):
        found = draw_mixed(place, 12, seeded(0), settled(explore=share))
        expected = other(place, 12, seeded(0), {})
        close(found.chains.x, expected.chains.x)
        close(found.chains.columns["mean_ref"], expected.chains.columns["mean_ref"])


def test_of_events_nothing_of_the_way_is_kept_and_a_shorter_way_may_lead_there():
    place = bench(Toy(), dtype=torch.float64)
    whole, expected = draw_events(place, 4000, seeded(0), settled()), draw_current(place, 4000, seeded(0), {})
    assert len(whole.chains.x) == 2
    close(whole.events, expected.events)
    close(whole.chains.columns["kl"].sum(0), expected.chains.columns["kl"].sum(0))
    short = draw_events(place, 4000, seeded(0), settled(sampling_steps=25))
    assert "kl" not in short.chains.columns
    close(short.events.mean(0), whole.events.mean(0), rtol=0, atol=0.15)
    close(short.events.std(0), whole.events.std(0), rtol=0.1)


def test_starts_are_x_T_and_context_alone():  # noqa: N802
    place = bench()
    drawn = draw_starts(place, 6, seeded(0), settled())
    x_T, context = place.start(6, seeded(0))  # noqa: N806
    assert (drawn.chains.x == x_T).all()
    assert (drawn.chains.t == place.policy.process.num_steps).all()
    assert (drawn.chains.context["mask"] == context["mask"]).all()
    assert len(drawn.events) == 0
