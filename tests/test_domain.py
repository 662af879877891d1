"""Bringing one's own world: the plain domain, things named by file and path, and what is said when a name is wrong."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rayft import imports
from rayft.chain import Policy, reverse_process, sample
from rayft.domain import Denoiser, Domain, Plain, PlainDenoiser, build, builtin, find, load_weights, try_out
from rayft.schedule import cosine, linear
from rayft.space import FullSpace


class Clock(nn.Module):
    """net(x, t) that answers with the t it was called with."""

    def forward(self, x, t):
        return t.to(x.dtype).reshape(-1, 1).expand_as(x)


# the plain domain


def test_a_plain_domain_is_a_module_its_weights_its_betas_and_a_shape(user_file, tmp_path):
    net = imports.load(f"{user_file}:Net")(width=16)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    x, t = torch.randn(5, 3), torch.arange(1, 6)
    for weights in ("net.pt", "net.safetensors"):
        told = {
            "network": f"{user_file}:Net",
            "network_arguments": {"width": 16},
            "event_shape": [3],
            "betas": [0.1, 0.2, 0.3, 0.4, 0.5],
            "weights": str(tmp_path / weights),
        }
        domain = build("plain", told)
        assert isinstance(domain, Plain) and domain.event_shape == (3,)
        denoiser = domain.denoiser()
        torch.testing.assert_close(denoiser(x, t, {}), net(x, (t - 1).float()))
        assert denoiser.exported().state_dict().keys() == net.state_dict().keys()
        policy = Policy(denoiser, reverse_process(domain.schedule()), domain.space, denoiser.prediction)
        chains = sample(policy, x, {}, torch.Generator().manual_seed(0))
        assert chains.x_0.shape == (5, 3) and bool(torch.isfinite(chains.x).all())


def test_betas_are_a_list_or_a_schedule_by_name():
    given = Plain(Clock, [1], [0.5, 0.2]).schedule().alpha_bar
    torch.testing.assert_close(given, torch.tensor([1.0, 0.5, 0.4]).double())
    named = Plain(Clock, [1], {"name": "linear", "num_steps": 30, "beta_1": 1e-4, "beta_T": 0.02}).schedule()
    assert torch.equal(named.alpha_bar, linear(30).alpha_bar)
    assert torch.equal(Plain(Clock, [1], {"num_steps": 30}).schedule().alpha_bar, linear(30).alpha_bar)
    other = Plain(Clock, [1], {"name": "cosine", "num_steps": 12}).schedule()
    assert torch.equal(other.alpha_bar, cosine(12).alpha_bar)


@pytest.mark.parametrize(("first", "wanted"), [(0, [0, 1, 2, 3, 4]), (1, [1, 2, 3, 4, 5])])
def test_a_network_is_called_with_the_timesteps_it_was_trained_with(first, wanted):
    denoiser = Plain(Clock, [1], [0.1] * 5, first_timestep=first).denoiser()
    assert denoiser(torch.zeros(5, 1), torch.arange(1, 6), {})[:, 0].tolist() == wanted


@pytest.mark.parametrize(("first", "wanted"), [(0, [249, 499, 749, 999]), (1, [250, 500, 750, 1000])])
def test_so_it_is_on_a_respaced_chain(first, wanted):
    domain = Plain(Clock, [1], {"num_steps": 1000}, first_timestep=first)
    timestep = domain.schedule().respace(4).timestep[1:]
    assert domain.denoiser()(torch.zeros(4, 1), timestep, {})[:, 0].tolist() == wanted


def test_the_state_dict_stays_the_users():
    net = nn.Linear(2, 2)
    assert PlainDenoiser(net).exported() is net


@pytest.mark.parametrize(
    ("betas", "sentence"),
    [
        ({"name": "linaer"}, "no schedule 'linaer' .did you mean 'linear'.*choose linear, cosine, polynomial"),
        ({"num_step": 5}, "schedule .?linear.? takes no 'num_step' .did you mean 'num_steps'"),
        ({"name": "cosine"}, "schedule .?cosine.? needs num_steps; give it in the YAML"),
        ([0.1, 1.5], "betas must be one row of numbers strictly between 0 and 1"),
    ],
)
def test_a_wrong_schedule_is_refused_in_a_sentence(betas, sentence):
    with pytest.raises(ValueError, match=sentence):
        Plain(Clock, [1], betas).schedule()


@pytest.mark.parametrize(
    ("network", "arguments", "sentence"),
    [
        ("Net", {"widht": 3}, "takes no 'widht' .did you mean 'width'.*it takes width"),
        ("Nets", {}, "has no 'Nets' .did you mean 'Net'"),
        ("not_a_network", {}, "gives int; a network is a torch.nn.Module"),
        ("NUMBER", {}, "a network is a torch.nn.Module"),
    ],
)
def test_a_wrong_network_is_refused_in_a_sentence(user_file, network, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        Plain(f"{user_file}:{network}", [3], [0.1], network_arguments=arguments).denoiser()


class Short(nn.Module):
    def forward(self, x, t):
        return x[:, :1]


class Absent(nn.Module):
    def forward(self, x, t):
        return None


def test_a_network_that_fits_its_events_is_tried_without_a_word():
    try_out(Plain(Clock, [3], [0.1, 0.2]))
    try_out(build("toy_masked", {}))


@pytest.mark.parametrize(
    ("network", "told", "sentence"),
    [
        (Short, {}, r"the network gives \(2, 1\) for x_t of shape \(2, 3\); it should keep the shape"),
        (Absent, {}, r"the network gives NoneType for x_t of shape \(2, 3\)"),
        (lambda: nn.Linear(2, 3), {}, r"the network fails on x_t of shape \(2, 3\)"),
        (Clock, {"prediction": "score"}, "prediction is 'score'; a network predicts eps, x0, v"),
    ],
)
def test_a_network_that_does_not_fit_is_refused_before_the_run(network, told, sentence):
    with pytest.raises(ValueError, match=sentence):
        try_out(Plain(network, [3], [0.1, 0.2], **told))


# weights


class Bomb:
    """What a pickle may hold: code that runs when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("write", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))])
def test_weights_never_run_code(tmp_path, write):
    write({"weight": Bomb(tmp_path / "ran")}, tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"net\.pt .*damaged"):
        load_weights(nn.Linear(2, 2), tmp_path / "net.pt")
    assert not (tmp_path / "ran").exists()


def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path):
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "net.pt")
    net = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"net\.pt does not fit Linear") as caught:
        load_weights(net, tmp_path / "net.pt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors"])
def test_damaged_weights_are_refused_in_one_line(tmp_path, name):
    (tmp_path / name).write_bytes(b"not weights")
    with pytest.raises(ValueError, match=f"{name} .*damaged") as caught:
        load_weights(nn.Linear(2, 2), tmp_path / name)
    assert "\n" not in str(caught.value)


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no weights at .*gone\.pt; give a \.safetensors or \.pt"):
        load_weights(nn.Linear(2, 2), tmp_path / "gone.pt")


# domains by name


def test_built_in_domains_have_short_names():
    assert {"plain", "toy", "toy_masked"} <= builtin().keys()
    for name in ("plain", "toy", "toy_masked"):
        assert issubclass(find(name), Domain)


def test_a_domain_may_be_named_by_path_by_file_or_be_given_itself(tmp_path):
    file = tmp_path / "world.py"
    file.write_text("from rayft.domain import Plain\nclass World(Plain):\n    pass\n")
    assert find("envs.toy.domain:Toy") is find("toy")
    assert find(f"{file}:World").__name__ == "World"
    assert find(Plain) is Plain


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("toi", "no domain 'toi' .did you mean 'toy'.*there are .*toy_masked, or an import path"),
        ("rayft.schedule:Schedule", "rayft.schedule:Schedule is not a Domain: make it a subclass"),
        ("rayft.domain:load_weights", "is not a Domain"),
        (nn.Linear, "is not a Domain"),
        (3, "3 is not a Domain"),
    ],
)
def test_what_is_no_domain_is_refused_in_a_sentence(path, sentence):
    with pytest.raises(ValueError, match=sentence):
        find(path)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"network": Clock, "event_shape": [1], "beta": [0.1]},
            "domain .?plain.? takes no 'beta' .did you mean 'betas'",
        ),
        ({"network": Clock}, "domain .?plain.? needs event_shape, betas; give them in the YAML"),
        ({"network": Clock, "event_shape": [1]}, "domain .?plain.? needs betas; give it in the YAML"),
    ],
)
def test_wrong_arguments_of_a_domain_are_refused_before_it_is_built(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        build("plain", arguments)


class Typed(Plain):
    """Every kind of hint that is checked, and some that are not."""

    def __init__(self, num: int = 1, rate: float | None = 0.5, path: str = "", on: bool = True, rest: Any = None):
        super().__init__(lambda: Clock(), [1], [0.1])
        self.told = num, rate, path, on, rest


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ({"num": "abc"}, "num is 'abc'; it should be a whole number"),
        ({"num": 2.5}, r"num is 2\.5; it should be a whole number"),
        ({"num": True}, "num is True; it should be a whole number"),
        ({"rate": "high"}, "rate is 'high'; it should be a number or null"),
        ({"rate": False}, "rate is False; it should be a number or null"),
        ({"path": 3}, "path is 3; it should be text"),
        ({"path": None}, "path is None; it should be text"),
        ({"on": 1}, "on is 1; it should be true or false"),
    ],
)
def test_a_value_of_another_kind_than_a_domain_asks_for_is_refused(told, sentence):
    with pytest.raises(ValueError, match=f"^domain Typed: {sentence}$"):
        build(Typed, told)


def test_and_what_fits_or_is_not_said_is_taken():
    told = {"num": np.int64(3), "rate": 1, "path": Path("x"), "on": False, "rest": [object]}
    found = build(Typed, told)
    assert isinstance(found, Typed) and found.told == tuple(told.values())
    for told in ({"width": "abc"}, {"data": 5}, {"weights": 3}, {"num_steps": "ten"}):
        with pytest.raises(ValueError, match=f"^domain molecules: {next(iter(told))} is "):
            build("molecules", told)


class Still(Domain):
    """The least a user must write."""

    event_shape = (2,)

    def schedule(self):
        return linear(3)

    def denoiser(self):
        return Zero()


class Zero(Denoiser):
    def forward(self, x_t, timestep, context):
        return torch.zeros_like(x_t)


def test_a_domain_needs_a_shape_a_schedule_and_a_denoiser_and_nothing_else():
    domain = build(Still, {})
    generator = torch.Generator().manual_seed(0)
    assert domain.context(5, generator) == {} and domain.groups({}) is None and domain.data(5, generator) is None
    assert isinstance(domain.space, FullSpace) and domain.rewards == {}
    net = domain.denoiser()
    assert net.exported() is net and net.prediction == "eps"
    assert imports.load(domain.decoder)(np.array([[1.0, 2.0], [np.nan, 0.0]]), {})[1] is None
