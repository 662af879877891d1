"""Conditional fine-tuning: what a model without a condition becomes for each, and that it begins as itself for all."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from envs.toy import data
from envs.toy.reward import Corner
from rayft import adapt, sampling, source, spec, store
from rayft.conditioned import Conditioned
from rayft.domain import build, find
from rayft.evaluate import optimum
from rayft.spec import algorithm

CORNERS = ["upper_right", "upper_left", "lower_left", "lower_right"]
SHIPPED = Path(__file__).parent.parent / "tune_configs" / "toy_conditional_ppo.yaml"


def toy(**told):
    return Conditioned("toy", CORNERS, **told)


def batch(num=12):
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 4, (num,), generator=generator)
    return torch.randn(num, 2, generator=generator), torch.arange(num) % 50 + 1, {"y": y}


def moved(net):
    """Adapters as after some training."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for up in net.adapters.up.values():
            up.normal_(std=0.05, generator=generator)
    return net


def test_it_begins_as_the_network_whatever_the_condition():
    net, base = toy().denoiser(), build("toy", {}).denoiser()
    x, t, context = batch()
    with torch.no_grad():
        torch.testing.assert_close(net(x, t, context), base(x, t, {}), rtol=0, atol=1e-6)


def test_every_row_is_answered_by_the_adapters_of_its_condition():
    net, (x, t, context) = moved(toy().denoiser()), batch()
    with torch.no_grad():
        said = net(x, t, context)
        for y in range(4):
            alone = build("toy", {}).denoiser()
            alone.load_state_dict(net.weights(y), strict=False)
            mine = context["y"] == y
            torch.testing.assert_close(said[mine], alone(x[mine], t[mine], {}), rtol=1e-5, atol=1e-6)
    assert float((net(x, t, {"y": 0 * context["y"]}) - net(x, t, {"y": 0 * context["y"] + 1})).abs().max()) > 1e-3


def test_one_condition_moves_no_other_s_adapters_and_never_the_network():
    net, (x, t, _) = moved(toy().denoiser()), batch()
    net(x, t, {"y": torch.full((12,), 2)}).square().sum().backward()
    trained = {name: p for name, p in net.named_parameters() if p.grad is not None}
    assert trained and all(name.startswith("adapters.") for name in trained)
    assert all(bool(p.grad[2].any()) and not bool(p.grad[[0, 1, 3]].any()) for p in trained.values())


def test_conditions_are_drawn_as_told_and_part_the_groups_of_the_domain():
    domain = toy(probabilities={"upper_left": 3, "lower_right": 1})
    y = domain.context(4000, torch.Generator().manual_seed(0))["y"]
    assert y.unique().tolist() == [1, 3]
    assert float((y == 1).float().mean()) == pytest.approx(0.75, abs=0.03)
    inner = build("toy_masked", {})
    world = Conditioned("toy_masked", ["a", "b", "c"])
    context = world.context(200, torch.Generator().manual_seed(0))
    pairs = set(zip(inner.groups(context).tolist(), context["y"].tolist(), strict=True))
    assert len(set(world.groups(context).tolist())) == len(pairs) > 6
    assert world.space is inner.space and world.rewards == inner.rewards


def test_data_say_nothing_of_a_condition_that_is_drawn_beside_them():
    x_0, context = toy().data(4000, torch.Generator().manual_seed(0))
    means = torch.stack([x_0[context["y"] == y].mean(0) for y in range(4)])
    assert float((means - x_0.mean(0)).abs().max()) < 0.1


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"probabilities": {"uper_left": 1}}, r"no class 'uper_left' \(did you mean 'upper_left'\?\); there are upper"),
        ({"probabilities": {"upper_left": -1}}, "probabilities.upper_left is -1; it should be a number of 0 or more"),
        ({"probabilities": {"upper_left": 0}}, "probabilities are all 0"),
        ({"classes": ["a"]}, "give the names of two or more classes"),
        ({"classes": ["a", "a"]}, "each once"),
        ({"rank": 0}, "rank is 0"),
        ({"domain": "toi"}, "no domain 'toi'"),
        ({"domain": {"num_steps": 10}}, "domain has no name"),
    ],
)
def test_what_cannot_be_conditioned_is_refused_by_name(told, said):
    with pytest.raises(ValueError, match=said):
        build("conditioned", {"domain": "toy", "classes": CORNERS, **told})


def test_a_condition_the_network_does_not_know_is_refused():
    x, t, context = batch()
    with pytest.raises(ValueError, match="y is 4; this network knows the conditions 0 to 3"):
        toy().denoiser()(x, t, {"y": context["y"] + (context["y"] == 3).long()})


def test_the_corner_s_reward_is_the_mixture_s_own_posterior_and_its_optimum_is_known():
    """At alpha = 1, J* = E_y log E_pre p(y|x) = E_y log w_y."""
    x_0 = data.draw(40_000, torch.Generator().manual_seed(0)).double().numpy()
    rewards = np.stack([Corner()(list(x_0), [{"y": y}] * len(x_0)) for y in range(4)])
    np.testing.assert_allclose(np.exp(rewards).sum(0), 1.0, rtol=1e-6)
    drawn = np.random.default_rng(0).integers(0, 4, len(x_0))
    found = optimum(rewards[drawn, np.arange(len(x_0))], 1.0, drawn)
    assert found == pytest.approx(float(data.WEIGHTS.log().mean()), abs=0.02)
    with pytest.raises(ValueError, match="take the domain conditioned"):
        Corner()(list(x_0[:2]), [{}, {}])


def asked_for(algo):
    """The share of the policy's samples that lie in the corner they were asked for, by corner."""
    draw = algo.collect("test", algo.draw_function(), 2048)
    corner = torch.cdist(torch.from_numpy(draw.events), data.CENTRES).argmin(-1).numpy()
    return np.array([(corner == y)[draw.context["y"] == y].mean() for y in range(4)])


def test_ppo_teaches_a_model_to_draw_what_it_is_asked_for(ray_session):
    config = algorithm("ppo")().domain("conditioned", domain="toy", classes=CORNERS).reward("corner")
    config.chain(num_steps=20).training(alpha=1.0, minibatch_size=2048)
    algo = config.evaluate(every=0, chains=1024, pretrained_chains=8192).build_algo()
    before = asked_for(algo)
    for _ in range(10):
        algo.train()
    after, verdict = asked_for(algo), algo.evaluate_policy().scalars()
    algo.stop()
    print("asked for:", before.round(2), "->", after.round(2), "attained:", round(verdict["attained"], 3))
    np.testing.assert_allclose(before, data.WEIGHTS, atol=0.08)
    assert after.min() > 0.75
    assert verdict["attained"] > 0.8
    assert verdict["optimum"] == pytest.approx(float(data.WEIGHTS.log().mean()), abs=0.15)


def test_a_trained_condition_is_drawn_by_name(tmp_path):
    net = moved(toy().denoiser())
    save_file(net.state_dict(), tmp_path / "tuned.safetensors")
    told = ["domain.domain=toy", f"domain.classes=[{', '.join(CORNERS)}]", "domain.probabilities={lower_left: 1}"]
    told += [f"domain.weights={tmp_path / 'tuned.safetensors'}"]
    found = source.find("conditioned", source.Asked(True, "corner", num_steps=10, overrides=told))
    drawn = sampling.draw(found, 16, 0)
    assert (drawn.context["y"] == 2).all() and np.isfinite(drawn.columns["reward"]).all()
    assert find("conditioned") is Conditioned


def kept(folder):
    """A checkpoint as a run of the shipped YAML leaves it."""
    told = spec.read(str(SHIPPED)).full()
    keys = ("algorithm", "domain", "reward", "chain")
    more = {"iteration": 1, "alpha_bar": toy().schedule().alpha_bar.tolist(), "config": told}
    weights = {k: v.detach().numpy() for k, v in moved(toy().denoiser()).state_dict().items()}
    store.save(folder, {"weights": weights}, {key: told[key] for key in keys} | more, lambda path: None)
    return str(folder)


def test_a_checkpoint_is_drawn_from_at_the_conditions_that_are_asked_for_and_is_else_as_it_was(tmp_path):
    folder = kept(tmp_path / "iteration_000001")
    for given, drawn in ([], {0, 1, 2, 3}), (["domain.probabilities={lower_left: 1}"], {2}):
        found = sampling.draw(source.find(folder, source.Asked(True, overrides=given)), 64, 0)
        assert set(found.context["y"].tolist()) == drawn
    with pytest.raises(ValueError, match=r"domain\.rank is as the checkpoint was trained; only domain\.probabilities"):
        source.find(folder, source.Asked(overrides=["domain.rank=3"]))


def test_adapters_are_not_adapted_again():
    with pytest.raises(ValueError, match=r"lora_rank is 2, but .* by adapters already: .* domain\.rank"):
        adapt.adapted(toy().denoiser(), 2, None, None)


def test_the_shipped_run_is_valid():
    assert SHIPPED.read_text().startswith("# ") and "\n# rayft run toy_conditional_ppo" in SHIPPED.read_text()
    told = spec.read(str(SHIPPED))
    told.tried()
    assert math.isclose(told.config().evaluation_alpha(), 1.0)
