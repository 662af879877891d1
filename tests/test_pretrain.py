"""Plain denoising: it approaches the exact denoiser, and a resumed training is the same training."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from envs.toy.domain import Toy
from envs.toy.masked import MaskedToy
from envs.toy.model import ExactDenoiser
from rayft import pretrain
from rayft.cli import main
from rayft.domain import Plain
from rayft.pretrain import PretrainSettings, denoising_loss, train
from rayft.seeds import torch_generator

SHORT = PretrainSettings(steps=60, batch_size=64, checkpoint_every=20)


def mean_loss(domain, net, num=20_000):
    with torch.no_grad():
        return float(denoising_loss(domain, domain.schedule(), net, num, torch_generator(0, 0, "test")))


class Exact(ExactDenoiser):
    """The mixture's own answer, said as noise."""

    prediction = "eps"

    def forward(self, x_t, timestep, context):
        ab = self.alpha_bar[timestep].to(x_t.dtype).unsqueeze(-1)
        return (x_t - ab.sqrt() * super().forward(x_t, timestep, context)) / (1 - ab).sqrt()


def test_the_shipped_toy_is_within_two_percent_of_the_best_possible_loss():
    toy = Toy()
    assert mean_loss(toy, toy.denoiser()) < 1.02 * mean_loss(toy, Exact(toy.schedule()))


def test_the_masked_toy_starts_at_the_best_possible_loss():
    torch.manual_seed(0)
    domain, generator = MaskedToy(), torch_generator(0, 1, "test")
    net = domain.denoiser()
    before = mean_loss(domain, net)
    for parameter in net.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    assert mean_loss(domain, net) > before


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_each_kind_of_prediction_has_its_own_target(prediction):
    schedule, generator = Toy().schedule(), torch_generator(0, 2, "test")
    x_0, noise = torch.randn(5, 2, generator=generator), torch.randn(5, 2, generator=generator)
    t = torch.tensor([1, 10, 20, 40, 50])
    a, s = schedule.alpha_bar[t].sqrt().float()[:, None], (1 - schedule.alpha_bar[t]).sqrt().float()[:, None]
    x_t, said = a * x_0 + s * noise, pretrain.target(prediction, schedule, x_0, noise, t)
    recovered = {"eps": (x_t - s * said) / a, "x0": said, "v": a * x_t - s * said}[prediction]
    torch.testing.assert_close(recovered, x_0, rtol=1e-3, atol=1e-3)


def test_training_lowers_the_loss(tmp_path):
    toy = Toy(weights=None)
    weights, _ = train(toy, SHORT, 0, tmp_path / "state.pt", resume=False, quiet=True)
    net = toy.denoiser()
    before = mean_loss(toy, net)
    net.load_state_dict(weights)
    assert mean_loss(toy, net) < 0.8 * before


def test_a_resumed_training_gives_the_same_bits(tmp_path):
    toy = Toy(weights=None)
    whole, loss = train(toy, SHORT, 0, tmp_path / "whole.pt", resume=False, quiet=True)
    cut = tmp_path / "cut.pt"
    state = torch.load(tmp_path / "whole.pt", weights_only=True)
    assert state["step"] == 60
    half = PretrainSettings(steps=60, batch_size=64, checkpoint_every=40)  # its last state is at step 40
    train(toy, half, 0, cut, resume=False, quiet=True)
    assert torch.load(cut, weights_only=True)["step"] == 40
    resumed, again = train(toy, SHORT, 0, cut, resume=True, quiet=True)
    assert again == loss
    assert all(torch.equal(resumed[k], whole[k]) for k in whole)


def test_the_command_leaves_weights_that_the_domain_loads(tmp_path, capsys):
    told = ["pretrain.steps=20", "pretrain.batch_size=32", f"output={tmp_path}", "--quiet"]
    assert main(["pretrain", "toy_pretrain", *told]) == 0
    path = tmp_path / "toy_pretrain" / "weights.safetensors"
    assert str(path) in capsys.readouterr().out
    assert set(load_file(path)) == set(Toy(weights=str(path)).denoiser().state_dict())


def test_a_domain_without_data_says_so(tmp_path):
    plain = Plain("torch.nn:Identity", [2], [0.1, 0.2])
    with pytest.raises(ValueError, match="has no data set to pretrain on"):
        train(plain, SHORT, 0, tmp_path / "state.pt", resume=False, quiet=True)
