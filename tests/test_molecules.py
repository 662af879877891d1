"""Molecules as a domain: what the shipped model knows, and that its events and their decoder agree with QM9."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_molecules import PUBLISHED

from envs.molecules import domain, files
from envs.molecules.data import Molecules as Table
from envs.molecules.decode import heavy
from envs.molecules.domain import ELEMENTS, MAX_ATOMS, NUM_OF_SIZE, Molecules, denser_near_data, events_of
from rayft.chain import Policy, reverse_process
from rayft.schedule import polynomial


@pytest.fixture(scope="module")
def table() -> Table:
    return files.read(PUBLISHED).heavy()


def test_events_decode_to_the_molecules_they_were_made_of(table):
    from rdkit import Chem

    events, mask = events_of(table)
    found = heavy(events, {"mask": mask})
    assert all(mol is not None for mol in found)
    known = [Chem.CanonSmiles(smiles) for smiles in table.smiles]
    pairs = [(Chem.MolToSmiles(mol), smiles) for mol, smiles in zip(found, known, strict=True) if "n" not in smiles]
    assert all(own == smiles for own, smiles in pairs)  # an aromatic ring's bonds are too alike to have an order
    assert len(pairs) == 4


def test_events_lie_in_the_space_of_the_chain(table):
    events, mask = (torch.from_numpy(array) for array in events_of(table))
    torch.testing.assert_close(Molecules().space.project(events, {"mask": mask}), events, atol=1e-5, rtol=0)


def test_sizes_are_drawn_as_qm9_has_them():
    sizes = Molecules().groups(Molecules().context(20_000, torch.Generator().manual_seed(0)))
    expected = np.array(NUM_OF_SIZE) / sum(NUM_OF_SIZE)
    assert np.abs(np.bincount(sizes, minlength=10) / 20_000 - expected).max() < 0.01


@pytest.mark.parametrize("num_steps", [1, 10, 50, 100, 1000])
def test_a_chain_of_any_length_has_its_steps_closer_together_near_the_data(num_steps):
    schedule = denser_near_data(polynomial(1000), num_steps)
    gaps = schedule.timestep.diff()
    assert schedule.num_steps == num_steps
    assert int(schedule.timestep[-1]) == 1000
    assert bool((gaps >= 1).all())
    assert num_steps < 3 or gaps[-1] >= gaps[0]


@pytest.mark.parametrize("num_steps", [0, 1001])
def test_a_chain_the_model_does_not_have_is_refused(num_steps):
    with pytest.raises(ValueError, match="allows 1 to 1000"):
        Molecules(num_steps=num_steps).schedule()


def test_the_shipped_model_makes_molecules():
    domain = Molecules()
    generator = torch.Generator().manual_seed(0)
    process = reverse_process(domain.schedule())
    policy = Policy(domain.denoiser().eval(), process, domain.space, "v", torch.bfloat16)
    context = domain.context(128, generator)
    x = policy.noise(torch.empty(128, *domain.event_shape), context, generator)
    with torch.no_grad():
        for step in range(process.num_steps, 0, -1):
            x = policy.mean_at(x, step, context) + process.sigma[step].float() * policy.noise(x, context, generator)
    found = heavy(x.numpy(), {"mask": context["mask"].numpy()})
    assert sum(mol is not None for mol in found) > 0.7 * len(found)


def test_the_shipped_model_is_small():
    assert sum(p.numel() for p in Molecules(weights=None).denoiser().parameters()) * 4 < 3e6
    assert len(ELEMENTS) + 3 == Molecules().event_shape[1]
    assert len(NUM_OF_SIZE) == MAX_ATOMS + 1


def test_what_is_held_out_is_qm9s_validation_split_and_nothing_of_ones_own_data(table, monkeypatch):
    asked = []
    monkeypatch.setattr(domain, "trained_on", lambda *told: asked.append(told) or table.heavy())
    x_0, context = Molecules().held_out(5, torch.Generator().manual_seed(0))
    assert asked == [("qm9", MAX_ATOMS, "valid")]
    assert x_0.shape == (5, MAX_ATOMS, 7) and context["mask"].shape == (5, MAX_ATOMS)
    assert Molecules(data="mine.sdf").held_out(5, torch.Generator()) is None
