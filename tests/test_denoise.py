"""Plain denoising: its targets, the best loss there is, and an update that does not depend on who computes it."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from envs.toy.domain import Toy
from envs.toy.masked import MaskedToy
from envs.toy.model import ExactDenoiser
from rayft import denoise
from rayft.denoise import (
    Learner,
    PretrainSettings,
    denoising_loss,
    draw_batch,
    event_losses,
    lr_share,
    optimizers_of,
    target,
)
from rayft.domain import Denoiser
from rayft.muon import Muon, orthogonal
from rayft.resume import load_state
from rayft.schedule import Schedule
from rayft.seeds import torch_generator
from rayft.training import Training

FEW = PretrainSettings(steps=8, batch_size=65, weight_decay=0.01)


def mean_loss(domain, net, num=20_000):
    with torch.no_grad():
        return float(denoising_loss(domain, domain.schedule(), net, num, torch_generator(0, 0, "test")))


class Exact(ExactDenoiser):
    """The mixture's own answer, said as noise."""

    prediction = "eps"

    def forward(self, x_t, timestep, context):
        ab = self.alpha_bar[timestep].to(x_t.dtype).unsqueeze(-1)
        return (x_t - ab.sqrt() * super().forward(x_t, timestep, context)) / (1 - ab).sqrt()


# -- the loss


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
    x_t, said = a * x_0 + s * noise, target(prediction, schedule, x_0, noise, t)
    recovered = {"eps": (x_t - s * said) / a, "x0": said, "v": a * x_t - s * said}[prediction]
    torch.testing.assert_close(recovered, x_0, rtol=1e-3, atol=1e-3)


def test_the_step_size_rises_linearly_and_falls_along_half_a_cosine():
    settings = PretrainSettings(steps=100, warmup=3)
    assert [lr_share(step, settings) for step in (0, 1, 50)] == pytest.approx(
        [0.25, 0.5 * 0.5 * (1 + math.cos(math.pi / 100)), 0.5]
    )
    assert lr_share(99, settings) < 3e-4


# -- the slices of a batch


def test_the_slices_of_all_learners_are_the_batch():
    domain = MaskedToy()

    def drawn(rank, of):
        return draw_batch(domain, domain.data, 20, 11, torch_generator(0, 3, "test"), rank, of)

    whole, parts = drawn(0, 1), [drawn(rank, 3) for rank in range(3)]
    assert [len(part.t) for part in parts] == [3, 4, 4] and all(part.whole == 11 for part in parts)
    for name in ("x_0", "t", "noise"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name
    for name, value in whole.context.items():
        assert torch.equal(torch.cat([part.context[name] for part in parts]), value), name
    net = domain.denoiser()
    losses = [event_losses(domain, domain.schedule(), net, part) for part in parts]
    torch.testing.assert_close(torch.cat(losses), event_losses(domain, domain.schedule(), net, whole))


class Ring:
    """Learners of one process, each in a thread: every all_reduce is the sum over them."""

    def __init__(self, of):
        self.given, self.barrier = [torch.empty(0)] * of, threading.Barrier(of)

    def all_reduce(self, tensor):
        self.given[int(threading.current_thread().name)] = tensor.clone()
        self.barrier.wait()
        total = torch.stack(self.given).sum(0)
        self.barrier.wait()
        tensor.copy_(total)


def trained(monkeypatch, domain, settings):
    """Learner 0 after all steps, and what its steps returned."""
    of = settings.num_learners
    learners = [Learner(domain, settings, 0, rank=rank) for rank in range(of)]
    monkeypatch.setattr(denoise, "distributed", Ring(of))
    told = [[] for _ in learners]

    def work(rank):
        told[rank] = [learners[rank].step(step) for step in range(settings.steps)]

    threads = [threading.Thread(target=work, args=(rank,), name=str(rank)) for rank in range(of)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return learners[0], told[0]


class Skipping(Denoiser):
    """A second layer that only events on the left pass through, and a third that none does."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))

    def forward(self, x_t, timestep, context):
        out = self.layers[0](x_t)
        left = x_t[:, 0] < -1.5
        return out + self.layers[1](x_t) * left[:, None] if bool(left.any()) else out


class Skipped(Toy):
    def denoiser(self):
        return Skipping()


TOYS = {"adamw": Toy(weights=None), "muon": Toy(weights=None), "masked": MaskedToy(), "skipped": Skipped()}


@pytest.mark.parametrize("of", [2, 5])
@pytest.mark.parametrize("which", TOYS)
def test_the_update_is_the_same_for_any_number_of_learners(which, of, monkeypatch):
    domain = TOYS[which]
    settings = replace(FEW, batch_size=13 if which == "skipped" else FEW.batch_size, grad_clip=0.1)
    settings = replace(settings, muon_lr=0.02 if which == "muon" else 0.0)
    alone, first = trained(monkeypatch, domain, settings)
    shared, second = trained(monkeypatch, domain, replace(settings, num_learners=of))
    for (loss, levels), (same_loss, same_levels) in zip(first, second, strict=True):
        torch.testing.assert_close(same_loss, loss)
        torch.testing.assert_close(same_levels, levels)
        assert levels[1].sum() == settings.batch_size
        assert float(levels[0].sum()) / settings.batch_size == pytest.approx(float(loss))
    x_t, t, context = draw(domain, 30)
    for name in ("net", "average"):
        one, other = (getattr(learner, name) for learner in (alone, shared))
        said = [domain.space.project(net(x_t, t, context), context) for net in (one, other)]
        torch.testing.assert_close(*said, rtol=0, atol=1e-6)
        if which != "masked":  # a drift that the projection takes away has no gradient but rounding
            same(one, other)


def draw(domain, num):
    batch = draw_batch(domain, domain.data, domain.num_steps, num, torch_generator(0, 5, "test"))
    return batch.x_0, batch.t, batch.context


def same(one, other):
    for key, value in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value, rtol=0, atol=1e-6)


def test_nothing_of_a_step_stays_on_the_cpu(monkeypatch):
    """On the meta device, which refuses to mix as a GPU does and has nothing to compute."""
    meta = torch.device("meta")

    def on_meta(schedule, device):
        told = object.__new__(Schedule)  # its check would look at numbers
        vars(told).update({name: value.to(device) for name, value in vars(schedule).items()})
        return told

    monkeypatch.setattr(denoise, "on", on_meta)
    monkeypatch.setattr(denoise.torch, "autocast", lambda *told, **more: contextlib.nullcontext())
    learner = Learner(MaskedToy(), replace(FEW, muon_lr=0.02), 0, meta)
    for told in learner.step(0):
        assert told.device == meta
    assert all(v.device == meta for name in ("net", "average") for v in learner.state()[name].values())


# -- Muon


def test_muon_makes_every_singular_value_about_one_and_keeps_the_vectors():
    generator = torch_generator(0, 4, "test")
    u, v = (torch.linalg.qr(torch.randn(2, size, 32, generator=generator))[0] for size in (64, 40))
    s = torch.logspace(0, -2, 32)
    for matrices in ((u * s) @ v.mT, v * s @ u.mT):
        told = orthogonal(matrices)
        assert told.shape == matrices.shape
        found = torch.linalg.svdvals(told)[:, :32]
        assert float(found.min()) > 0.67 and float(found.max()) < 1.21
    inner = u.mT @ orthogonal((u * s) @ v.mT) @ v
    assert float((inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))).abs().max()) < 1e-3


def test_muon_takes_the_steps_of_torchs_up_to_its_rounding():
    torch.manual_seed(0)
    sizes = [(64, 32), (32, 64), (32, 64)]
    mine, theirs = ([nn.Parameter(torch.ones(size)) for size in sizes] for _ in range(2))
    optimizers = Muon(mine, lr=0.1, weight_decay=0.1), torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1)
    for _ in range(3):
        for one, other in zip(mine, theirs, strict=True):
            one.grad = torch.randn(one.shape)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(mine, theirs, strict=True):
        assert (one - other).abs().max().item() < 0.02 * (one - 1).abs().max().item()


def test_muon_moves_large_matrices_and_adamw_the_rest():
    net = Toy(weights=None).denoiser()
    net.net[2].bias.requires_grad_(False)
    adam, muon = optimizers_of(net, PretrainSettings(muon_lr=0.02))
    assert isinstance(adam, torch.optim.AdamW) and isinstance(muon, Muon)
    assert [tuple(p.shape) for p in muon.param_groups[0]["params"]] == [(64, 64), (64, 64)]
    assert len(adam.param_groups[0]["params"]) == len(list(net.parameters())) - 3


# -- learners in processes


def at_step(training, number, act):
    """``act()`` as step ``number`` begins."""
    step = training.learner.step
    training.learner.step = lambda n: (act() if n == number else None, step(n))[1]


@pytest.mark.parametrize("muon_lr", [pytest.param(0.0, marks=pytest.mark.slow), 0.02], ids=["adamw", "muon"])
def test_two_processes_stop_together_and_one_goes_on_to_the_same_weights(muon_lr, tmp_path):
    settings = replace(FEW, muon_lr=muon_lr)
    whole = Training(Toy(weights=None), settings, 0, tmp_path / "whole", {})
    assert whole.run()
    two = Training(Toy(weights=None), replace(settings, num_learners=2), 0, tmp_path / "cut", {})
    started = []
    at_step(two, 4, lambda: (started.extend(two.peers.processes), signal.raise_signal(signal.SIGINT)))
    assert not two.run() and two.step == two.saved == 5
    assert [process.returncode for process in started] == [0], "a learner that is told to stop does"
    assert not torch.distributed.is_initialized()
    one = Training(Toy(weights=None), settings, 0, tmp_path / "cut", {})
    assert one.run(resume=True)
    same(one.learner.net, whole.learner.net)
    same(one.learner.average, whole.learner.average)


def test_a_killed_learner_ends_the_training_in_a_sentence_and_costs_no_step(tmp_path):
    training = Training(Toy(weights=None), replace(FEW, num_learners=2), 0, tmp_path, {})
    at_step(training, 4, lambda: training.peers.processes[0].kill())
    with pytest.raises(ValueError, match=r"learner 1 of 2 was killed \(SIGKILL\).*the state of step 4 is kept"):
        training.run()
    assert load_state(tmp_path / "state.pt")["step"] == 4
    again, whole = (Training(Toy(weights=None), FEW, 0, folder, {}) for folder in (tmp_path, tmp_path / "whole"))
    assert again.run(resume=True) and whole.run()
    same(again.learner.net, whole.learner.net)


class Unbuildable(Toy):
    """Cannot be taken to another process."""

    def __init__(self):
        super().__init__(weights=None)
        self.lock = threading.Lock()


def test_a_domain_that_cannot_travel_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(ValueError, match="cannot be sent to another process"):
        Training(Unbuildable(), replace(FEW, num_learners=2), 0, tmp_path, {})


@pytest.mark.slow
def test_a_learner_that_cannot_start_says_why(tmp_path):
    class Picky(Toy):
        def denoiser(self):
            if os.getpid() != self.parent:
                raise OSError("no GPU left")
            return super().denoiser()

    domain = Picky(weights=None)
    domain.parent = os.getpid()
    training = Training(domain, replace(FEW, num_learners=2), 0, tmp_path, {})
    with pytest.raises(ValueError, match="learner 1 of 2 could not start: OSError: no GPU left"):
        training.run()


ORPHANS = """
import os, sys
from pathlib import Path
from envs.toy.domain import Toy
from rayft.denoise import PretrainSettings
from rayft.training import Training
training = Training(Toy(weights=None), PretrainSettings(num_learners=2), 0, Path(sys.argv[1]), {})
assert not {"ray", "rdkit"} & set(sys.modules)
training.learner.step = lambda number: (print(training.peers.processes[0].pid, flush=True), os.kill(os.getpid(), 9))
training.run()
"""


def test_a_killed_training_leaves_no_learner_behind(tmp_path):
    done = subprocess.run([sys.executable, "-c", ORPHANS, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    until = time.monotonic() + 30
    while alive(int(done.stdout)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(int(done.stdout))


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
