"""The light EGNN: what a turned, mirrored, reordered or padded molecule does to its answer."""

from __future__ import annotations

import pytest
import torch

from envs.molecules.light import SPACE, LightEGNN


def network(dtype=torch.float32) -> LightEGNN:
    torch.manual_seed(0)
    net = LightEGNN(max_atoms=9, num_features=4, num_steps=1000, width=32, num_layers=3).to(dtype)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net.eval()


def batch(sizes, dtype=torch.float32, width=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    context = {"mask": (torch.arange(width) < torch.tensor(sizes).unsqueeze(1)).to(dtype)}
    x = torch.randn(len(sizes), width, 7, generator=generator, dtype=dtype)
    return SPACE.project(x, context), torch.linspace(1, 1000, len(sizes)).long(), context


def orthogonal(seed, dtype=torch.float32):
    """A rotation; for odd seeds a reflection too."""
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]
    turn[0] *= torch.linalg.det(turn).sign() * (-1) ** seed
    return turn.to(dtype)


@pytest.mark.parametrize("seed", range(4))
def test_a_rotation_or_reflection_turns_the_answer_and_nothing_else(seed):
    net, turn = network(), orthogonal(seed)
    x, t, context = batch([9, 8, 5, 1, 2], seed=seed)
    turned = torch.cat([x[..., :3] @ turn, x[..., 3:]], -1)
    with torch.no_grad():
        said, again = net(x, t, context), net(turned, t, context)
    expected = torch.cat([said[..., :3] @ turn, said[..., 3:]], -1)
    assert float((again - expected).norm() / expected.norm()) < 1e-5


def test_reordered_atoms_get_reordered_answers():
    net, order = network(), torch.tensor([3, 0, 2, 4, 1, 5, 6, 7, 8])
    x, t, context = batch([5, 9])
    with torch.no_grad():
        said, again = net(x, t, context), net(x[:, order], t, {"mask": context["mask"][:, order]})
    assert float((again - said[:, order]).norm() / said.norm()) < 1e-5


def test_neither_padding_nor_company_changes_a_result():
    net = network()
    x, t, context = batch([4, 9, 7])
    alone = {"mask": context["mask"][:1, :4]}
    with torch.no_grad():
        said, single = net(x, t, context), net(x[:1, :4], t[:1], alone)
    assert float((said[:1, :4] - single).norm() / single.norm()) < 1e-5
    assert not bool(said[0, 4:].any())


def test_the_answer_has_no_drift():
    net = network()
    x, t, context = batch([9, 3, 6])
    with torch.no_grad():
        assert float(net(x, t, context)[..., :3].sum(1).abs().max()) < 1e-4


def test_the_gradient_is_that_of_finite_differences():
    net = network(torch.float64)
    x, t, context = batch([3, 2], torch.float64, width=3)
    assert torch.autograd.gradcheck(lambda x: net(x, t, context), x.requires_grad_(), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("sizes", [[1, 1], [0, 3]])
def test_single_atoms_and_empty_molecules_are_finite(sizes):
    net = network()
    x, t, context = batch(sizes)
    said = net(x.requires_grad_(), t, context)
    said.square().sum().backward()
    assert bool(said.isfinite().all())
    assert bool(x.grad.isfinite().all())


def test_atoms_on_one_spot_have_a_finite_answer_and_gradient():
    net = network()
    x, t, context = batch([9, 9])
    x = torch.cat([torch.zeros_like(x[..., :3]), x[..., 3:]], -1).requires_grad_()
    net(x, t, context).square().sum().backward()
    assert bool(x.grad.isfinite().all())


def test_bfloat16_is_near_float32():
    net = network()
    x, t, context = batch([9, 9, 8, 7])
    with torch.no_grad():
        exact = net(x, t, context)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = net(x, t, context)
    assert low.dtype == torch.float32
    assert float((low - exact).norm() / exact.norm()) < 0.02
