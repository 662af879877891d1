"""Spaces against brute force: an explicit orthonormal basis of the masked, zero-mean subspace."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from rayft.chain import Policy, log_normal, reverse_process
from rayft.schedule import linear
from rayft.space import FullSpace, MaskedSpace, squared_norm

ITEMS, FEATURES = 5, 4
CENTRED = pytest.mark.parametrize("num_centred", [0, 2, 4])
MASKS = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 0, 0, 1], [0, 0, 0, 1, 0]])


def basis(mask, num_centred):
    """Orthonormal columns: padding is zero, each centred feature sums to zero over the real items."""
    allowed = []
    for feature in range(FEATURES):
        for item in range(ITEMS):
            if not mask[item]:
                row = torch.zeros(ITEMS, FEATURES, dtype=torch.float64)
                row[item, feature] = 1
                allowed.append(row.flatten())
        if feature < num_centred:
            row = torch.zeros(ITEMS, FEATURES, dtype=torch.float64)
            row[:, feature] = mask.double()
            allowed.append(row.flatten())
    if not allowed:
        return torch.eye(ITEMS * FEATURES, dtype=torch.float64)
    constraints = torch.stack(allowed)
    rank = int(torch.linalg.matrix_rank(constraints))
    return torch.linalg.svd(constraints)[2][rank:].T


def drawn(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@CENTRED
def test_the_projector_is_the_one_of_the_explicit_basis(num_centred):
    space, x = MaskedSpace(num_centred), drawn(0, len(MASKS), ITEMS, FEATURES)
    for row, mask in enumerate(MASKS):
        b = basis(mask, num_centred)
        wanted = (b @ (b.T @ x[row].flatten())).reshape(ITEMS, FEATURES)
        torch.testing.assert_close(space.project(x[row : row + 1], {"mask": mask[None]})[0], wanted)


@CENTRED
def test_projecting_twice_changes_nothing_and_the_projector_is_symmetric(num_centred):
    space, context = MaskedSpace(num_centred), {"mask": MASKS}
    x, y = drawn(1, len(MASKS), ITEMS, FEATURES), drawn(2, len(MASKS), ITEMS, FEATURES)
    once = space.project(x, context)
    torch.testing.assert_close(space.project(once, context), once)
    left, right = (once * y).sum((1, 2)), (x * space.project(y, context)).sum((1, 2))
    torch.testing.assert_close(left, right)


@CENTRED
def test_dim_is_the_rank_for_every_mask_even_an_empty_one(num_centred):
    masks = torch.cat([MASKS, torch.zeros(1, ITEMS, dtype=torch.long)])
    x = torch.zeros(len(masks), ITEMS, FEATURES, dtype=torch.float64)
    ranks = [float(basis(mask, num_centred).shape[1]) for mask in masks]
    assert MaskedSpace(num_centred).dim(x, {"mask": masks}).tolist() == ranks


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_masks_of_any_dtype_mean_the_same(dtype):
    space, x = MaskedSpace(2), drawn(3, len(MASKS), ITEMS, FEATURES)
    wanted = space.project(x, {"mask": MASKS.double()})
    found = space.project(x, {"mask": MASKS.to(dtype)})
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, wanted)
    assert torch.equal(space.dim(x, {"mask": MASKS.to(dtype)}), space.dim(x, {"mask": MASKS.double()}))


def test_the_full_space_leaves_everything_free():
    x = drawn(4, 3, 2, 5)
    assert FullSpace().project(x, {}) is x
    assert FullSpace().dim(x, {}) == 10


def test_the_density_of_the_full_space_is_torchs():
    x, mean, sigma = drawn(5, 4, 3, 2), drawn(6, 4, 3, 2), torch.tensor([0.1, 0.5, 1.0, 3.0], dtype=torch.float64)
    wanted = Normal(mean, sigma.reshape(4, 1, 1)).log_prob(x).sum((1, 2))
    torch.testing.assert_close(log_normal(FullSpace(), x, mean, sigma, {}), wanted)
    torch.testing.assert_close(
        log_normal(FullSpace(), x[:1], mean[:1], 0.1, {}), wanted[:1]
    )  # a float serves a whole batch


@CENTRED
def test_the_density_of_a_subspace_is_the_gaussian_in_its_coordinates(num_centred):
    space, context = MaskedSpace(num_centred), {"mask": MASKS}
    x = space.project(drawn(7, len(MASKS), ITEMS, FEATURES), context)
    mean = space.project(drawn(8, len(MASKS), ITEMS, FEATURES), context)
    sigma = torch.tensor([0.1, 0.5, 1.0, 3.0], dtype=torch.float64)
    found = log_normal(space, x, mean, sigma, context)
    for row, mask in enumerate(MASKS):
        b = basis(mask, num_centred)
        if b.shape[1] == 0:
            assert float(found[row]) == 0.0  # one point alone: its law is a point mass
            continue
        law = MultivariateNormal(b.T @ mean[row].flatten(), sigma[row] ** 2 * torch.eye(b.shape[1]).double())
        torch.testing.assert_close(found[row], law.log_prob(b.T @ x[row].flatten()))


def test_drift_and_padding_do_not_enter_the_density():
    space, context = MaskedSpace(2), {"mask": MASKS}
    x, mean = drawn(9, len(MASKS), ITEMS, FEATURES), drawn(10, len(MASKS), ITEMS, FEATURES)
    sigma = torch.ones(len(MASKS), dtype=torch.float64)
    drift = torch.zeros(len(MASKS), ITEMS, FEATURES, dtype=torch.float64)
    drift[..., :2] = 3.0
    drift[MASKS == 0] = 7.0
    torch.testing.assert_close(
        log_normal(space, x + drift, mean, sigma, context), log_normal(space, x, mean, sigma, context)
    )


@pytest.mark.parametrize("mask", MASKS[:3], ids=["five", "three", "two"])
def test_noise_lies_in_the_subspace_with_the_identity_as_covariance_there(mask):
    space, n = MaskedSpace(2), 40_000
    policy = Policy(lambda x, t, context: x, reverse_process(linear(2)), space)
    context, like = {"mask": mask.expand(n, -1)}, torch.empty(n, ITEMS, FEATURES, dtype=torch.float64)
    noise = policy.noise(like, context, torch.Generator().manual_seed(0))
    torch.testing.assert_close(space.project(noise, context), noise)
    covariance = noise.flatten(1).T @ noise.flatten(1) / n
    b = basis(mask, 2)
    assert float((covariance - b @ b.T).abs().max()) < 6 * math.sqrt(2 / n)
    assert float(squared_norm(noise).mean()) == pytest.approx(b.shape[1], rel=0.02)
