"""Adapters and partial fine-tuning: the network they begin as, the one they become, and who knows of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from rayft import adapt, domain, plan, spec, store
from rayft.algorithms.config import DiffusionConfig
from rayft.cli import main
from rayft.spec import algorithm

TOLD = {"lora_rank": 4}
SMALL = ["training.chains=64", "training.minibatch_size=128", "chain.num_steps=10", "evaluate.every=0"]
SMALL += ["evaluate.chains=128", "evaluate.pretrained_chains=256", "--quiet"]


class Twice(nn.Module):
    """Every kind of weight: a table, a convolution, a bias, and one matrix under two names."""

    def __init__(self):
        super().__init__()
        self.time = nn.Embedding(6, 4)
        self.conv = nn.Conv1d(1, 4, 3, padding=1)
        self.first = nn.Linear(4, 4)
        self.again = nn.Linear(4, 4)
        self.again.weight = self.first.weight
        self.last = nn.Conv1d(4, 1, 1)

    def forward(self, x, t):
        h = self.conv(x) + self.time(t).unsqueeze(-1)
        return self.last(self.again(self.first(h.transpose(1, 2)).relu()).transpose(1, 2))


def twice() -> domain.Denoiser:
    torch.manual_seed(0)
    return domain.PlainDenoiser(Twice())


def batch(num=7):
    x = torch.randn(num, 1, 5, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(num) % 5 + 1, {}


def moved(net):
    """Adapters as after some training."""
    with torch.no_grad():
        for up in net.adapters.up.values():
            up.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    return net


def config(name="ppo", num_learners=0, **training) -> DiffusionConfig:
    told = {"chains": 128, "minibatch_size": 1280, "lr": 1e-3, **TOLD, **training}
    made = algorithm(name)().domain("toy").reward("quadratic").chain(num_steps=10).training(**told)
    return made.evaluate(every=0, chains=64, pretrained_chains=256, alpha=0.5).learners(num_learners=num_learners)


def gap(a, b):
    return max(float(np.abs(a[k] - b[k]).max()) for k in a)


# -- the network


def test_adapters_begin_as_the_network_bit_for_bit():
    net, base = adapt.adapted(twice(), 2, None, None), twice()
    assert all(torch.equal(value, base.get_parameter(name)) for name, value in net.weights().items())
    with torch.no_grad():
        torch.testing.assert_close(net(*batch()), base(*batch()), rtol=0, atol=1e-6)


def test_merged_weights_are_the_adapted_network_also_where_one_weight_has_two_names():
    net, merged = moved(adapt.adapted(twice(), 2, None, None)), twice()
    state = adapt.plain(net, {k: v.numpy() for k, v in net.state_dict().items()})
    assert state.keys() == merged.state_dict().keys()
    merged.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()})
    with torch.no_grad():
        torch.testing.assert_close(net(*batch()), merged(*batch()), rtol=1e-5, atol=1e-6)
        assert float((net(*batch()) - twice()(*batch())).abs().max()) > 0.1
    for slow, own in zip(adapt.parameters(net), merged.parameters(), strict=True):
        assert torch.equal(slow, own)


def test_nothing_but_adapters_of_the_rank_gets_a_gradient():
    net = moved(adapt.adapted(twice(), 2, None, None))
    net(*batch()).square().sum().backward()
    trained = {name: p for name, p in net.named_parameters() if p.grad is not None}
    assert trained and all(name.startswith("adapters.") for name in trained)
    assert all(bool(p.grad.any()) for p in trained.values())
    shapes = {name: tuple(p.shape[1:]) for name, p in trained.items()}
    assert shapes["adapters.down.net/time/weight"] == (2, 4) and shapes["adapters.up.net/time/weight"] == (6, 2)
    assert shapes["adapters.down.net/conv/weight"] == (2, 3), "a kernel's axes are one side"
    assert shapes["adapters.up.net/last/weight"] == (1, 1), "a weight with a side of 1 has rank 1"


def test_half_precision_rounds_the_network_and_not_its_adapters():
    net = moved(adapt.adapted(twice(), 2, None, None))
    exact = net.weights()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(value, exact[name]) for name, value in net.weights().items())


def test_putting_weights_into_an_adapted_network_makes_it_that_network():
    net, other = moved(adapt.adapted(twice(), 2, None, None)), twice()
    with torch.no_grad():
        other.net.first.weight.add_(0.5)
    adapt.put(net, other.state_dict())
    assert all(torch.equal(value, other.get_parameter(name)) for name, value in net.weights().items())
    with torch.no_grad():
        torch.testing.assert_close(net(*batch()), other(*batch()), rtol=0, atol=1e-6)


def test_patterns_choose_what_is_trained_by_the_names_of_an_export():
    net = adapt.adapted(twice(), 0, None, ["first.*", "last.bias"])
    trained = [name for name, p in net.named_parameters() if p.requires_grad]
    assert trained == ["net.first.weight", "net.first.bias", "net.last.bias"]
    assert adapt.adapted(twice(), 2, None, ["first.*"]).adapters.names == ["net.first.weight"]


@pytest.mark.parametrize(
    ("rank", "patterns", "said"),
    [
        (0, ["frist.*"], "no parameter of the network is named like 'frist.*'"),
        (0, ["firs.weight"], "did you mean 'first.weight'"),
        (2, ["*.bias"], "training.trainable names none"),
        (5, None, "more than the smaller side of every adapted weight"),
    ],
)
def test_what_cannot_be_trained_so_is_refused(rank, patterns, said):
    with pytest.raises(ValueError, match=said.replace("*", r"\*")):
        adapt.adapted(twice(), rank, None, patterns)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.lora_scale=2", "training.lora_scale is 2.0 without adapters; set training.lora_rank"),
        ("training.trainable=[]", "training.trainable is empty"),
        ("training.trainable=[net.9.*]", "no parameter of the network is named like 'net.9.*' (did you mean"),
        ("training.lora_rank=65", "training.lora_rank is 65, more than"),
    ],
)
def test_the_command_line_refuses_it_in_one_sentence(override, said, capsys):
    assert main(["run", "toy_ppo", override, "--dry-run"]) == 2
    assert said in capsys.readouterr().err


def test_the_plan_counts_what_is_trained():
    whole = plan.plan(spec.read("toy_ppo"))
    assert "network: 9,218 weights, 9,218 trained;" in whole
    small = plan.plan(spec.read("toy_ppo", ["training.lora_rank=2"]))
    assert "network: 9,218 weights, 794 in adapters trained;" in small
    assert "network: 9,218 weights, 130 trained;" in plan.plan(spec.read("toy_ppo", ["training.trainable=[net.6.*]"]))


# -- a run


def test_one_learner_or_two_take_the_same_steps_with_adapters(ray_session):
    outcomes, credit = [], None
    for num_learners in (0, 2):
        algo = config(num_learners=num_learners, precision="float64", ema=0.9).build_algo()
        credit = credit or algo.experience()[0]
        algo.learn(credit)
        outcomes.append({**algo.policy_state(), **{f"ema/{k}": v for k, v in algo.policy_state("ema").items()}})
        start = algo.policy_state("reference")
        algo.stop()
    assert gap(*outcomes) <= 1e-12
    weights, biases = ([k for k in start if k.endswith(end)] for end in ("weight", "bias"))
    assert all((outcomes[0][k] != start[k]).any() for k in weights)
    assert all((outcomes[0][k] == start[k]).all() for k in biases)


@pytest.mark.parametrize("name", spec.known_algorithms())
def test_every_algorithm_trains_adapters_and_a_resumed_run_goes_on_with_the_same_bits(ray_session, tmp_path, name):
    told = {"chains": 256, "minibatch_size": 256, "ema": 0.9}
    algo = config(name, **told).build_algo()
    start = algo.policy_state("reference")
    algo.train()
    path = algo.save_to_path(str(tmp_path / "state"))
    between = algo.policy_state()
    algo.train()
    expected = algo.policy_state(), algo.policy_state("ema")
    algo.stop()
    assert gap(start, between) > 0
    again = config(name, **told).build_algo()
    again.restore_from_path(path)
    again.sync()
    assert gap(again.policy_state(), between) == 0
    again.train()
    assert gap(again.policy_state(), expected[0]) == gap(again.policy_state("ema"), expected[1]) == 0
    again.stop()


def test_the_average_is_that_of_the_merged_weights(ray_session):
    algo = config(ema=0.5, num_epochs=1).build_algo()
    start = algo.policy_state("ema")
    algo.train()
    fast, slow = algo.policy_state(), algo.policy_state("ema")
    assert gap(slow, {k: (start[k] + fast[k]) / 2 for k in start}) < 1e-6
    assert gap(fast, start) > 1e-4
    algo.stop()


def test_a_policy_that_is_put_back_is_that_policy_on_learner_and_runner(ray_session):
    algo = config(ema=0.9).build_algo()
    algo.train()
    kept = algo.policy_state()
    algo.train()
    algo.set_policy(kept)
    assert gap(algo.policy_state(), kept) == gap(algo.policy_state("ema"), kept) == 0
    runner = algo.env_runner.module.denoiser
    assert all(np.array_equal(value.detach().numpy(), kept[name]) for name, value in runner.weights().items())
    algo.reset_policy()
    assert gap(algo.policy_state(), algo.policy_state("reference")) == 0
    algo.stop()


def test_state_of_other_adapters_is_refused(ray_session, tmp_path):
    algo = config().build_algo()
    path = algo.save_to_path(str(tmp_path / "state"))
    algo.stop()
    other = config(lora_rank=0).build_algo()
    with pytest.raises(ValueError, match="made with other adapters"):
        other.restore_from_path(path)
    other.stop()


def test_adapters_reach_the_optimum_of_the_toy(ray_session):
    made = algorithm("ppo")().domain("toy").reward("quadratic").training(alpha=0.5, lora_rank=8)
    algo = made.evaluate(every=0, chains=2048, pretrained_chains=8192).build_algo()
    for _ in range(10):
        algo.train()
    verdict = algo.evaluate_policy().scalars()
    algo.stop()
    print("attained by adapters of rank 8:", round(verdict["attained"], 3))
    assert verdict["attained"] > 0.9


def test_a_run_with_adapters_is_exported_judged_and_resumed_as_plain_weights(ray_session, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "toy_ppo", *SMALL, "iterations=2", "training.lora_rank=4", "training.trainable=[net.*]"]) == 0
    assert main(["export", "runs/toy_ppo", "net.safetensors"]) == 0
    net = domain.build("toy", {}).denoiser()
    start = {k: v.clone() for k, v in net.state_dict().items()}
    net.load_state_dict(load_file("net.safetensors"))
    assert any(not torch.equal(start[k], v) for k, v in net.state_dict().items())
    assert main(["evaluate", "runs/toy_ppo", "--chains", "128", "--pretrained-chains", "128"]) == 0
    assert main(["run", "--resume", "runs/toy_ppo", "--quiet"]) == 0
    told = store.load(tmp_path / "runs/toy_ppo"), spec.open_folder(tmp_path / "runs/toy_ppo").full()
    with pytest.raises(ValueError, match=r"with training\.lora_rank 4 and cannot go on with 2; resume with the same"):
        store.continues(told[0], {**told[1], "training": {**told[1]["training"], "lora_rank": 2}})
