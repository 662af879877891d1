"""The denoisers of shapes: R's network against the public implementation's numbers, and what the latent does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from envs.shapes.latent import LATENT, ROWS, Latents
from envs.shapes.model import WIDTHS, PointwiseNet, ShapeDenoiser

GOLDEN = Path(__file__).parent / "golden" / "point_clouds_network.npz"
NAMES = {"_layer": "layer", "_hyper_bias": "shift", "_hyper_gate": "gate"}


def renamed(key):
    for theirs, ours in NAMES.items():
        key = key.replace(theirs, ours)
    return key.removeprefix("weight.")


def test_the_network_gives_the_public_implementations_numbers():
    with np.load(GOLDEN) as file:
        known = {key: torch.from_numpy(file[key]) for key in file.files}
    net = PointwiseNet(known["context"].shape[1])
    net.load_state_dict({renamed(key): value for key, value in known.items() if key.startswith("weight.")})
    with torch.no_grad():
        found = net(known["x"], known["betas"][known["t"]], known["context"])
    assert [layer.layer.out_features for layer in net.layers] == list(WIDTHS[1:])
    assert float((found - known["y"]).abs().max()) < 1e-5


@pytest.fixture
def net():
    torch.manual_seed(0)
    return ShapeDenoiser(torch.linspace(0, 0.05, 101)).eval()


def test_points_know_nothing_of_each_other_but_the_latent(net):
    x_t, t = torch.randn(2, ROWS + 40, 3), torch.tensor([30, 30])
    with torch.no_grad():
        whole, part = net(x_t, t, {}), net(x_t[:, : ROWS + 10], t, {})
        other = x_t.clone()
        other[:, 0] += 1.0
        moved = net(other, t, {})
    assert torch.allclose(whole[:, : ROWS + 10], part, atol=1e-6)
    assert float((moved[:, ROWS:] - whole[:, ROWS:]).abs().max()) > 1e-4


def test_a_class_is_heard_in_the_latent_and_in_the_points():
    torch.manual_seed(0)
    net, x_t, t = (
        ShapeDenoiser(torch.linspace(0, 0.05, 101), 3).eval(),
        torch.randn(2, ROWS + 8, 3),
        torch.tensor([9, 9]),
    )
    with torch.no_grad():
        first, second = (net(x_t, t, {"label": torch.tensor([k, k], dtype=torch.int32)}) for k in (0, 2))
    gap = (first - second).abs()
    assert float(gap[:, :ROWS].max()) > 1e-3
    assert float(gap[:, ROWS:].max()) > 1e-5


def test_what_the_latent_means_travels_with_the_weights(net):
    told = Latents(np.random.default_rng(0).normal(size=1024).astype(np.float32), np.ones((LATENT, 1024), np.float32))
    net.remember(told)
    other = ShapeDenoiser(torch.linspace(0, 0.05, 101))
    other.load_state_dict(net.state_dict())
    assert (other.latents.mean == told.mean).all()
    assert (other.latents.axes == told.axes).all()
