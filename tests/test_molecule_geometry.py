"""Geometries that molecules have pass every check, and each kind of damage fails its own, with a reason."""

import numpy as np
import pytest

pytest.importorskip("rdkit")

from noisy_molecules import events, judged
from rdkit import Chem
from rdkit.Chem import AllChem

from envs.molecules.decode import full
from envs.molecules.geometry import CHECKS, check, off_plane, shares


def made(smiles):
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    assert AllChem.EmbedMolecule(mol, randomSeed=3) == 0
    AllChem.MMFFOptimizeMolecule(mol)
    return mol


def placed(mol, xyz):
    moved = Chem.Mol(mol)
    moved.GetConformer().SetPositions(np.ascontiguousarray(xyz, dtype=float))
    return moved


def moved(mol, atoms, by):
    xyz = mol.GetConformer().GetPositions()
    xyz[atoms] += by
    return placed(mol, xyz)


def failed(mol):
    return {name for name, verdict in check(mol).items() if not verdict.passed}


@pytest.fixture(scope="module")
def qm9():
    golden = judged()
    return [mol for mol in full(*events(golden.take(golden.noise == 0))) if mol is not None]


@pytest.mark.parametrize("hydrogens", [True, False])
def test_qm9s_own_geometries_pass_each_check(qm9, hydrogens):
    mols = qm9 if hydrogens else [Chem.RemoveHs(mol) for mol in qm9]
    found = shares([check(mol) for mol in mols])
    assert [share.name for share in found] == [*CHECKS, "all"]
    assert all(share.judged == len(mols) > 90 for share in found)
    assert all(share.passed >= 0.98 * len(mols) for share in found)


@pytest.mark.parametrize("smiles", ["CC(=O)Oc1ccccc1C(=O)O", "Cn1c(=O)c2c(ncn2C)n(C)c1=O", "C=CC1CC1C#N", "C", "[He]"])
def test_an_embedded_molecule_passes_with_and_without_hydrogens(smiles):
    mol = made(smiles)
    assert failed(mol) == failed(Chem.RemoveHs(mol)) == set()


def test_a_bond_that_is_too_long_or_too_short_is_named():
    mol = made("CF")
    axis = np.diff(mol.GetConformer().GetPositions()[:2], axis=0)[0]
    for by, length in ((0.4 * axis, "1.9"), (-0.4 * axis, "0.8")):
        verdict = check(moved(mol, [1], by))["bond_lengths"]
        assert verdict.passed is False
        assert verdict.reason.startswith(f"bond C0-F1: {length}")
    assert check(moved(mol, [1], 0.1 * axis))["bond_lengths"].passed


def test_an_angle_that_is_bent_too_far_fails_and_the_bonds_do_not():
    water = made("O")
    for degrees, passed in ((104.5, True), (60.0, False)):
        angle = np.deg2rad(degrees)
        xyz = 0.96 * np.array([[0, 0, 0], [1, 0, 0], [np.cos(angle), np.sin(angle), 0]])
        found = check(placed(water, xyz))
        assert found["bond_angles"].passed is passed
        assert found["bond_lengths"].passed


def test_two_ends_of_a_chain_in_one_place_clash():
    mol = made("CCCCCCCC")
    xyz = mol.GetConformer().GetPositions()
    found = check(moved(mol, [7], xyz[0] - xyz[7] + 0.8))
    assert found["no_clash"].passed is False
    assert found["no_clash"].reason.startswith("pair")


def test_a_hydrogen_bond_inside_a_molecule_is_no_clash():
    assert failed(made("O=CC=CO")) == set()


def test_a_folded_aromatic_ring_fails_and_a_folded_saturated_one_does_not():
    benzene = made("c1ccccc1")
    normal = np.linalg.svd(benzene.GetConformer().GetPositions())[2][-1]
    found = check(moved(benzene, [0, 6], normal))
    assert found["flat_rings"].passed is False
    assert found["flat_rings"].reason.startswith("ring of C0-C1")
    assert check(moved(benzene, [0, 6], 0.2 * normal))["flat_rings"].passed
    assert check(made("C1CCCCC1"))["flat_rings"].passed


def test_a_twisted_double_bond_fails():
    half = np.array([[0, 0.67, 0], [0.92, 1.24, 0], [-0.92, 1.24, 0]])
    flat = np.stack([half, half * [1, -1, 1]], 1).reshape(-1, 3)
    twisted = np.stack([half, (half * [1, -1, 1])[:, [2, 1, 0]]], 1).reshape(-1, 3)
    mol = made("C=C")
    order = [0, 1, 2, 4, 3, 5]  # carbons, then each one's hydrogens
    assert check(placed(mol, flat[order]))["flat_double_bonds"].passed
    verdict = check(placed(mol, twisted[order]))["flat_double_bonds"]
    assert verdict.passed is False
    assert "off its plane" in verdict.reason


def test_the_distance_from_the_best_plane_is_exact_and_does_not_depend_on_the_other_groups():
    square = np.array([[1.0, 1, 0.3], [1, -1, -0.3], [-1, -1, 0.3], [-1, 1, -0.3]]) + 7.0
    line = np.array([[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [3, 0, 0], [4, 0, 0]])
    xyz = np.concatenate([square, line])
    assert off_plane(xyz, [range(4), range(4, 9)]) == pytest.approx([0.3, 0.0], abs=1e-9)
    assert off_plane(xyz, [range(4)]) == pytest.approx([0.3])


def test_what_is_no_molecule_or_has_no_geometry_is_not_judged_and_says_why():
    refused = made("F")
    bonds = Chem.RWMol(refused)
    bonds.GetBondWithIdx(0).SetBondType(Chem.BondType.TRIPLE)
    for mol, reason in (
        (None, "not a molecule"),
        (Chem.Mol(), "not a molecule"),
        (Chem.MolFromSmiles("CCO"), "no geometry"),
        (bonds.GetMol(), "valences that RDKit refuses"),
    ):
        assert {verdict.reason for verdict in check(mol).values()} == {reason}
        assert {verdict.passed for verdict in check(mol).values()} == {None}
    assert [share.judged for share in shares([check(None)])] == [0] * 6


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_a_coordinate_beyond_reach_fails(value):
    assert failed(moved(made("CO"), [0], value)) == set(CHECKS)


def test_atoms_on_one_spot_fail_and_a_molecule_may_lie_anywhere():
    mol = made("CC=O")
    assert {"bond_lengths", "bond_angles", "no_clash"} <= failed(placed(mol, np.zeros((7, 3))))
    assert failed(moved(mol, slice(None), [300.0, -400.0, 500.0])) == set()
    assert check(made("*C"))["bond_lengths"].passed


def test_the_sample_is_left_as_it_was(qm9):
    before = qm9[0].ToBinary()
    check(qm9[0])
    assert qm9[0].ToBinary() == before
