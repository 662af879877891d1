"""Bonds read off distances: EDM's verdicts, and what must not change them."""

import numpy as np
import pytest
from noisy_molecules import judged

from envs.molecules import bonds
from envs.molecules.bonds import Atoms, order, orders, stability, stable

METHANE = np.array([[0, 0, 0], [0.63, 0.63, 0.63], [-0.63, -0.63, 0.63], [-0.63, 0.63, -0.63], [0.63, -0.63, -0.63]])
H, C, N, F, P = 1, 6, 7, 9, 15


@pytest.fixture(scope="module")
def golden():
    return judged()


def given(pairs, num_atoms):
    """Bond orders of one molecule, as [1, n, n]."""
    found = np.zeros((1, num_atoms, num_atoms), np.int8)
    for i, j, k in pairs:
        found[0, i, j] = found[0, j, i] = k
    return found


def test_every_verdict_on_400_noisy_molecules_is_edms(golden):
    mol_stable, atoms_stable = stability(golden.atoms.positions, golden.atoms.numbers, golden.atoms.mask)
    assert mol_stable.tolist() == golden.mol_stable.tolist()
    assert atoms_stable.tolist() == golden.atoms_stable.tolist()
    assert 100 < mol_stable.sum() < 300


@pytest.mark.parametrize(
    ("first", "second", "distance", "expected"),
    [
        (C, C, 1.22, 3), (C, C, 1.24, 2), (C, C, 1.38, 2), (C, C, 1.40, 1), (C, C, 1.63, 1), (C, C, 1.65, 0),
        (N, N, 1.12, 3), (N, N, 1.14, 2), (C, 8, 1.24, 2), (C, 8, 1.26, 1), (8, 8, 1.25, 2), (8, 8, 1.57, 1),
        (H, C, 1.18, 1), (H, C, 1.20, 0), (H, H, 0.83, 1), (H, H, 0.85, 0), (C, F, 1.0, 1), (C, 16, 1.64, 2),
        (53, 53, 2.75, 1), (5, C, 1.5, 0), (33, 33, 1.0, 0),
    ],
)  # fmt: skip
def test_an_order_changes_at_the_tabulated_length_and_its_margin(first, second, distance, expected):
    assert order(first, second, distance) == order(second, first, distance) == expected


def test_an_order_is_that_of_many_pairs_at_once():
    assert order(np.array([C, C, H]), C, np.array([1.2, 1.5, 1.0])).tolist() == [3, 1, 1]


def test_a_distance_that_is_no_number_is_no_bond():
    assert order(C, C, np.array([np.nan, np.inf, 1e200])).tolist() == [0, 0, 0]


@pytest.mark.parametrize("number", [0, -3, 3, 54, 92, 1000])
def test_an_element_outside_the_table_has_no_bonds_and_is_never_stable(number):
    assert order(number, C, 1.0) == 0
    assert stability(np.zeros((1, 1, 3)), np.array([[number]]), np.ones((1, 1), bool))[0].tolist() == [False]


def test_a_longer_bond_never_has_the_higher_order():
    single, double, triple = bonds.REACH
    assert (single[double > 0] > double[double > 0]).all()
    assert (double[triple > 0] > triple[triple > 0]).all()


def test_methane_is_stable_and_without_one_hydrogen_only_its_hydrogens_are():
    numbers, mask = np.array([[C, H, H, H, H]] * 2), np.ones((2, 5), bool)
    mask[1, 4] = False
    mol_stable, atoms_stable = stability(np.stack([METHANE] * 2), numbers, mask)
    assert mol_stable.tolist() == [True, False]
    assert atoms_stable.tolist() == [5, 3]


def test_phosphorus_is_stable_with_three_bonds_and_with_five():
    for num_bonds, expected in ((3, True), (4, False), (5, True)):
        numbers = np.array([[P] + [F] * num_bonds])
        found = given([(0, i + 1, 1) for i in range(num_bonds)], num_bonds + 1)
        assert stable(found, numbers, numbers > 0)[0].tolist() == [expected]


def test_more_bonds_than_any_valence_are_not_stable():
    numbers = np.full((1, 20), C)
    assert stable(np.full((1, 20, 20), 3, np.int8), numbers, numbers > 0)[1].tolist() == [0]


def test_nothing_is_no_stable_molecule_and_no_batch_is_no_verdict():
    nothing = np.zeros((2, 4, 3)), np.zeros((2, 4), int), np.zeros((2, 4), bool)
    assert stability(*nothing)[0].tolist() == [False, False]
    assert stability(*(each[:0] for each in nothing))[0].shape == (0,)
    assert stability(*(each[:, :0] for each in nothing))[1].tolist() == [0, 0]


def test_orders_are_symmetric_and_no_atom_is_bonded_to_itself(golden):
    found = golden.atoms.orders()
    assert (found == found.transpose(0, 2, 1)).all()
    assert not found.diagonal(axis1=1, axis2=2).any()


def test_padding_may_hold_anything(golden):
    positions, numbers, mask = golden.atoms.positions.copy(), golden.atoms.numbers.copy(), golden.atoms.mask
    positions[~mask], numbers[~mask] = np.nan, C
    assert (orders(positions, numbers, mask) == golden.atoms.orders()).all()
    positions[~mask] = 0.0
    assert stability(positions, numbers, mask)[1].tolist() == golden.atoms_stable.tolist()


def test_a_batch_has_the_verdicts_of_its_molecules_one_by_one(golden):
    for i in range(0, 400, 40):
        one = golden.take([i])
        assert stability(one.positions, one.numbers, one.mask)[1].tolist() == [golden.atoms_stable[i]]


def test_turned_moved_and_renumbered_molecules_keep_their_verdicts(golden):
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    chosen = rng.permutation(golden.atoms.mask.shape[1])
    positions = (golden.atoms.positions @ turn + rng.normal(size=(400, 1, 3)))[:, chosen]
    found = stability(positions, golden.atoms.numbers[:, chosen], golden.atoms.mask[:, chosen])
    assert found[1].tolist() == golden.atoms_stable.tolist()


def test_numbers_beyond_all_reach_are_quietly_no_bonds():
    positions = np.array([[[1e300, 0, 0], [-1e300, 0, 0], [np.inf, 0, 0], [np.inf, 0, 0], [np.nan, 0, 0]]])
    numbers = np.full((1, 5), C)
    with np.errstate(all="raise"):
        assert not orders(positions, numbers, numbers > 0).any()


def test_orders_that_a_model_draws_are_taken_as_they_are():
    drawn = given([(0, 1, 2)], 2)
    far = Atoms(np.array([[[0, 0, 0], [9.0, 0, 0]]]), np.array([[C, C]]), np.ones((1, 2), bool), drawn)
    assert far.orders() is drawn
