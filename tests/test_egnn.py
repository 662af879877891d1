"""The equivariant network: EDM's own numbers, its symmetries, and molecules that do not feel the rest of the batch."""

from pathlib import Path

import numpy as np
import pytest
import torch

from envs.molecules import edm, egnn
from envs.molecules.egnn import EGNN, SPACE
from rayft.chain import Policy, reverse_process, sample
from rayft.schedule import polynomial

GOLDEN = Path(__file__).parent / "golden" / "edm"
TINY = {"num_features": 2, "num_steps": 10, "width": 4, "num_layers": 2}
VARIANTS = {
    "as in EDM": {},
    "plain": {"attention": False, "tanh": False, "normalization_factor": 3.0},
    "waves": {"sin_embedding": True, "num_inv_sublayers": 2, "norm_constant": 0.5},
    "told a property": {"num_properties": 2},
}
every_variant = pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())


def arrays(path):
    return {key: torch.from_numpy(value) for key, value in np.load(path).items()}


@pytest.fixture(scope="module")
def net():
    """EDM's golden network: weights large enough that every layer moves its atoms."""
    return edm.read(GOLDEN).denoiser.requires_grad_(False)


def make(seed=0, dtype=torch.float64, **settings):
    torch.manual_seed(seed)
    net = EGNN(**TINY | settings)
    for layer in net.layers:
        torch.nn.init.normal_(layer.move.last.weight)
    return net.to(dtype)


def molecules(sizes, padded, num_features=6, seed=0, dtype=torch.float32, num_properties=0):
    """(x_t, timestep, context) of molecules whose own numbers do not depend on their companions or on padding."""
    x, kept = torch.zeros(len(sizes), padded, 3 + num_features, dtype=dtype), torch.zeros(len(sizes), padded)
    for row, size in enumerate(sizes):
        own = torch.Generator().manual_seed(1000 * seed + size)
        x[row, :size] = torch.randn(size, 3 + num_features, generator=own, dtype=torch.float64).to(dtype)
        kept[row, :size] = 1
    context = {"mask": kept}
    if num_properties:
        context["property"] = torch.linspace(-1, 1, len(sizes) * num_properties, dtype=dtype).view(len(sizes), -1)
    return SPACE.project(x, context), torch.full((len(sizes),), 4), context


def relative(given, expected):
    return float((given - expected).norm() / expected.norm().clamp(min=1e-6))


# EDM's numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("which", range(4))
def test_outputs_are_edms_at_every_time(net, which, dtype):
    golden = arrays(GOLDEN / "forward.npz")
    timestep = torch.full((4,), round(float(golden["t"][which]) * 1000))
    out = net.to(dtype)(golden["z"].to(dtype), timestep, {"mask": golden["node_mask"].squeeze(-1)})
    net.float()
    expected = golden[f"eps_{which}"].to(dtype)
    assert relative(out[..., :3], expected[..., :3]) < 1e-6
    assert relative(out[..., 3:], expected[..., 3:]) < 1e-6
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-5)


def test_outputs_are_edms_with_waves_sublayers_and_properties_and_a_time_for_each_molecule():
    golden = arrays(GOLDEN / "conditional" / "forward.npz")
    net = edm.read(GOLDEN / "conditional").denoiser
    out = net(golden["z"], golden["t"], {"mask": golden["mask"], "property": golden["property"]})
    torch.testing.assert_close(out, golden["eps"], rtol=1e-5, atol=1e-6)


# symmetries


@pytest.mark.parametrize("seed", range(3))
def test_rotated_reflected_permuted_molecules_have_rotated_reflected_permuted_noise(net, seed):
    x_t, timestep, context = molecules(range(1, 30), 29, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=draw, dtype=torch.float64))[0]
    turn[:, 0] *= -turn.det().sign()  # with a reflection in it
    order = torch.randperm(29, generator=draw)
    turned = torch.cat([(x_t[..., :3].double() @ turn).float(), x_t[..., 3:]], -1)
    out, moved = net(x_t, timestep, context), net(turned[:, order], timestep, {"mask": context["mask"][:, order]})
    expected = torch.cat([(out[..., :3].double() @ turn).float(), out[..., 3:]], -1)[:, order]
    assert turn.det() < 0
    assert relative(moved, expected) < 1e-5
    for row in range(29):
        assert relative(moved[row], expected[row]) < 1e-5


@every_variant
def test_every_variant_is_equivariant_and_blind_to_shifts(settings):
    net = make(**settings)
    x_t, timestep, context = molecules([1, 3, 5], 6, 2, 0, torch.float64, settings.get("num_properties", 0))
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    turned = torch.cat([x_t[..., :3] @ turn + 7.0, x_t[..., 3:]], -1)
    out = net(x_t, timestep, context)
    expected = torch.cat([out[..., :3] @ turn, out[..., 3:]], -1)
    torch.testing.assert_close(net(turned, timestep, context), expected, rtol=1e-9, atol=1e-10)


def test_padding_is_zero_and_coordinates_are_centred(net):
    x_t, timestep, context = molecules([1, 9, 17, 29], 29)
    out = net(x_t, timestep, context)
    assert bool((out[context["mask"] == 0] == 0).all())
    assert float(out[..., :3].sum(1).abs().max()) < 1e-4
    assert float(out[..., :3].abs().max()) > 1


# what is around a molecule


def test_companions_order_and_padding_do_not_change_a_molecule(net):
    sizes = [18, 1, 9, 29, 5, 18]
    x_t, timestep, context = molecules(sizes, 29)
    together = net(x_t, timestep, context)
    for row, size in enumerate(sizes):
        alone = net(*molecules([size], size))
        torch.testing.assert_close(together[row, :size], alone[0], rtol=1e-5, atol=1e-5)
    wider = net(*molecules(sizes[::-1], 40)).flip(0)
    torch.testing.assert_close(wider[:, :29], together, rtol=1e-5, atol=1e-5)
    assert bool((wider[:, 29:] == 0).all())


def test_what_lies_in_the_padding_is_not_read(net):
    x_t, timestep, context = molecules([4, 7], 9)
    dirty = torch.where(context["mask"].unsqueeze(-1) == 0, torch.inf, x_t)
    assert torch.equal(net(dirty, timestep, context), net(x_t, timestep, context))


def test_edges_taken_in_parts_give_the_same(net, monkeypatch):
    batch = molecules([1, 9, 17], 29)
    whole = net(*batch)
    monkeypatch.setattr(egnn, "EDGES_AT_ONCE", 7)
    net._packing = None
    torch.testing.assert_close(net(*batch), whole, rtol=1e-5, atol=1e-5)
    net._packing = None


def test_a_mask_changed_in_place_is_noticed_and_a_boolean_one_is_the_same(net):
    x_t, timestep, context = molecules([5, 5], 9)
    before = net(x_t, timestep, context)
    assert torch.equal(net(x_t, timestep, {"mask": context["mask"].bool()}), before)
    packing = net._packing
    assert net(x_t, timestep, {"mask": context["mask"].clone()}) is not None and net._packing is packing
    context["mask"][1, 4] = 0
    changed = net(x_t, timestep, context)
    torch.testing.assert_close(changed[0], before[0])
    assert bool((changed[1, 4] == 0).all()) and not torch.allclose(changed[1, :4], before[1, :4])


# gradients


@every_variant
def test_gradients_are_finite_differences(settings):
    net = make(**settings)
    x_t, timestep, context = molecules([3, 1, 2], 3, 2, 0, torch.float64, settings.get("num_properties", 0))
    names, values = zip(*net.named_parameters(), strict=True)

    def noise(x, *parameters):
        return torch.func.functional_call(net, dict(zip(names, parameters, strict=True)), (x, timestep, context))

    inputs = [v.detach().requires_grad_() for v in (x_t, *values)]
    assert torch.autograd.gradcheck(noise, inputs, fast_mode=True)


def test_the_frozen_network_says_the_same_as_the_one_in_training():
    net = make(dtype=torch.float32, width=16)
    batch = molecules([4, 7, 1], 9, 2)
    taught = net(*batch)
    assert taught.requires_grad
    with torch.no_grad():
        assert torch.equal(net(*batch), taught.detach())


@pytest.mark.parametrize("sizes", [[1], [0], [0, 0], [0, 1, 2]])
def test_one_atom_and_none_are_finite_forward_and_backward(sizes):
    net = make(dtype=torch.float32)
    x_t, timestep, context = molecules(sizes, 3, 2)
    out = net(x_t.requires_grad_(), timestep, context)
    out.square().sum().backward()
    assert bool(out.isfinite().all()) and bool(x_t.grad.isfinite().all())
    assert bool((out[torch.tensor(sizes) < 2][..., :3] == 0).all())
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters() if p.grad is not None)


@every_variant
def test_atoms_in_one_place_are_finite_forward_and_backward(settings):
    net = make(dtype=torch.float32, **settings)
    x_t, timestep, context = molecules([4, 5], 5, 2, num_properties=settings.get("num_properties", 0))
    x_t[..., :3] = 0
    out = net(x_t.requires_grad_(), timestep, context)
    out.square().sum().backward()
    assert bool(out.isfinite().all()) and bool(x_t.grad.isfinite().all())
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters())


# under autocast, in a chain, and asked for what it is not


def test_bfloat16_products_keep_float32_sums_and_positions(net):
    x_t, timestep, context = molecules(range(1, 30), 29)
    exact = net(x_t, timestep, context)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(x_t, timestep, context)
    assert out.dtype == torch.float32
    assert 1e-5 < relative(out, exact) < 0.02
    assert float(out[..., :3].sum(1).abs().max()) < 1e-4


def test_training_under_autocast_has_gradients_near_the_exact_ones():
    net = make(dtype=torch.float32, width=16)
    batch = molecules([9, 5], 9, 2)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = net(*batch)
        found.append(torch.autograd.grad(out.square().sum(), list(net.parameters())))
    exact, rounded = (torch.cat([g.flatten() for g in grads]) for grads in found)
    assert relative(rounded, exact) < 0.05


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_it_runs_a_chain(net, autocast):
    policy = Policy(net, reverse_process(polynomial(1000), num_steps=3), SPACE, autocast=autocast)
    context = {"mask": (torch.arange(29) < torch.tensor([[3], [19], [29]])).float()}
    generator = torch.Generator().manual_seed(0)
    chains = sample(policy, policy.noise(torch.zeros(3, 29, 9), context, generator), context, generator)
    assert chains.x.shape == (4, 3, 29, 9)
    assert bool(chains.columns["log_prob"].isfinite().all())
    torch.testing.assert_close(SPACE.project(chains.x_0, context), chains.x_0, rtol=1e-4, atol=1e-3)


def test_properties_that_are_not_told_or_too_many_are_named():
    net = make(num_properties=2)
    x_t, timestep, context = molecules([2, 3], 3, 2, 0, torch.float64)
    with pytest.raises(ValueError, match=r'context\["property"\] is absent; this network is told \(2, 2\)'):
        net(x_t, timestep, context)
    with pytest.raises(ValueError, match=r"is of shape \(2, 3\)"):
        net(x_t, timestep, context | {"property": torch.zeros(2, 3)})


@pytest.mark.parametrize("name", ["num_features", "num_steps", "width", "num_layers", "num_inv_sublayers"])
@pytest.mark.parametrize("count", [0, -3, 2.5])
def test_counts_are_whole_numbers(name, count):
    with pytest.raises(ValueError, match=rf"{name} is {count}; an EGNN needs a whole number of at least 1"):
        EGNN(**TINY | {name: count})
