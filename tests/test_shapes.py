"""Shapes as a Domain: what an event is made of, and what a class does."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from envs.shapes import decode
from envs.shapes.domain import LATENT_SCALE, ConditionalShapes, Shapes
from envs.shapes.latent import LATENT, ROWS
from envs.shapes.model import ShapeDenoiser


@pytest.fixture(scope="module")
def fresh():
    return Shapes(num_points=64, weights=None)


def test_an_event_is_the_latent_and_points_of_one_shape(fresh):
    x_0, context = fresh.data(200, torch.Generator().manual_seed(0))
    assert x_0.shape == (200, *fresh.event_shape) == (200, ROWS + 64, 3)
    assert context == {}
    z, points = x_0[:, :ROWS].flatten(1) / LATENT_SCALE, x_0[:, ROWS:]
    assert float(z.std()) == pytest.approx(1, abs=0.15)
    assert float(points.std()) == pytest.approx(1, abs=0.05)
    assert float(points.mean()) == pytest.approx(0, abs=0.05)


def test_points_are_drawn_anew_and_none_twice(fresh):
    x_0, _ = fresh.data(3, torch.Generator().manual_seed(0))
    again, _ = fresh.data(3, torch.Generator().manual_seed(1))
    assert all(len(np.unique(cloud[ROWS:].numpy(), axis=0)) == 64 for cloud in x_0)
    assert not torch.equal(x_0, again)


def test_what_is_held_out_is_not_trained_on(fresh):
    parts = {name: set(part.name.tolist()) for name, part in fresh.shapes.table.items()}
    assert not parts["train"] & parts["valid"]
    assert not parts["train"] & parts["test"]
    found = fresh.held_out(5, torch.Generator().manual_seed(0))
    assert found is not None
    assert found[0].shape == (5, *fresh.event_shape)


def test_the_schedule_is_the_papers(fresh):
    ab = fresh.schedule().alpha_bar
    beta = 1 - ab[1:] / ab[:-1]
    assert len(beta) == 100
    assert float(beta[0]) == pytest.approx(1e-4)
    assert float(beta[-1]) == pytest.approx(0.05)


def test_a_fresh_network_knows_what_the_latent_means(fresh):
    net = fresh.denoiser()
    assert isinstance(net, ShapeDenoiser)
    z = net.latents.of(fresh.shapes.embeddings["train"])
    assert z.shape[1] == LATENT
    assert float(z.std()) == pytest.approx(1, abs=0.02)


def test_shipped_weights_draw_clouds_of_any_size():
    from rayft.chain import Policy, reverse_process, sample

    domain = Shapes(num_points=96)
    net = domain.denoiser().eval()
    policy = Policy(net, reverse_process(domain.schedule(), num_steps=20), domain.space, net.prediction)
    x_T = torch.randn(16, *domain.event_shape, generator=torch.Generator().manual_seed(0))  # noqa: N806
    x_0 = sample(policy, x_T, {}, torch.Generator().manual_seed(1)).x_0.numpy()
    clouds = decode.clouds(x_0, {})
    assert all(cloud is not None and cloud.shape == (96, 3) for cloud in clouds)
    spread = np.stack(clouds).std((0, 1))
    assert spread[0] > spread[2]  # aircraft are long and flat


def test_what_is_no_cloud_decodes_to_nothing():
    x_0 = np.random.default_rng(0).normal(size=(5, ROWS + 8, 3)).astype(np.float32)
    x_0[1, ROWS + 2, 0], x_0[2, ROWS:], x_0[3, ROWS, 1] = np.nan, 0.5, 1e6
    x_0[4, 0, 0] = np.inf  # the latent is not looked at
    assert [cloud is not None for cloud in decode.clouds(x_0, {})] == [True, False, False, False, True]


def test_the_conditional_model_is_told_the_class_that_is_asked_for():
    domain = ConditionalShapes("helicopter", num_points=8, weights=None)
    place = domain.shapes.classes.index("helicopter")
    assert (domain.context(4, torch.Generator())["label"] == place).all()
    anyone = ConditionalShapes(num_points=8, weights=None)
    drawn = anyone.context(2000, torch.Generator().manual_seed(0))["label"]
    share = float((anyone.shapes.table["train"].label == place).mean())
    assert float((drawn == place).float().mean()) == pytest.approx(share, abs=0.03)
    x_0, context = anyone.data(6, torch.Generator().manual_seed(0))
    assert anyone.denoiser()(x_0, torch.full((6,), 5), context).shape == x_0.shape


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({"num_points": 0}, "num_points is 0"),
        ({"num_points": 4096}, "1 to 2048"),
        ({"group": "aircrafts"}, "aircraft"),
        ({"classes": ["helicoptre"]}, "helicopter"),
    ],
)
def test_what_the_data_do_not_have_is_refused_with_what_is_near(told, why):
    with pytest.raises(ValueError, match=why):
        Shapes(weights=None, **told).data(1, torch.Generator())


def test_of_what_is_generated_the_aircraft_are_meant_and_of_files_all_shapes(tmp_path):
    assert set(Shapes(weights=None).shapes.classes) == {"jet", "propeller", "biplane", "helicopter"}
    vehicles = Shapes(weights=None, group="vehicle").shapes.table["train"]
    assert set(vehicles.classes) == {"car", "bus", "truck", "tractor"}
    kinds, names = np.array(vehicles.classes)[vehicles.label], vehicles.name.astype(str)
    np.savez(tmp_path / "mine.npz", points=vehicles.points[:40], category=kinds[:40], name=names[:40])
    own = Shapes(weights=None, data=str(tmp_path / "mine.npz")).shapes
    assert sum(len(part) for part in own.table.values()) == 40


@pytest.mark.parametrize("domain", [Shapes, ConditionalShapes])
def test_weights_that_are_not_there_are_said_to_be_made_and_named(domain, tmp_path):
    training = domain.training
    remedy = f"with `rayft pretrain {training}`, then domain.weights=runs/{training}/weights.safetensors"
    with pytest.raises(ValueError, match=re.escape(remedy)):
        domain(weights=str(tmp_path / "none.safetensors")).denoiser()


def test_a_label_that_is_none_is_refused():
    with pytest.raises(ValueError, match="the classes are"):
        ConditionalShapes("teapot", weights=None).context(1, torch.Generator())
