"""Metrics of a set of molecules: numbers worked out by hand, EDM's way of counting, and chunks that add up."""

import math
import warnings
from dataclasses import asdict

import numpy as np
import pytest

pytest.importorskip("rdkit")

from noisy_molecules import events, judged
from rdkit import Chem, DataStructs
from rdkit.Chem import AllChem, rdFingerprintGenerator

from envs.molecules import metrics
from envs.molecules.bonds import Atoms
from envs.molecules.decode import atoms, full, molecules
from envs.molecules.metrics import describe, digests, diversity, graph_smiles, summarise, summary
from envs.molecules.reward import QED, SA

ETHANOL, BENZENE, SALT = "CCO", "c1ccccc1", "CC.O"
WATER = np.array([[8, 0.0, 0.0, 0.0], [1, 0.96, 0.0, 0.0], [1, -0.24, 0.93, 0.0]])


@pytest.fixture(scope="module")
def golden():
    return judged()


@pytest.fixture(scope="module")
def decoded(golden):
    read = atoms(*events(golden.atoms))
    return molecules(read), read


@pytest.fixture(scope="module")
def rows(decoded):
    return describe(*decoded)


def numbers(found):
    return {name: value for name, value in asdict(found).items() if name != "smiles"}


def made(smiles, seed=5):
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    assert AllChem.EmbedMolecule(mol, randomSeed=seed) == 0
    return mol


# -- by hand


def test_a_small_set_has_the_numbers_counted_by_hand():
    found = summarise([ETHANOL, "OCC", BENZENE, None, SALT, "C("], known={"CCO", "CC"})
    assert (found.num_samples, found.num_valid, found.num_unique, found.num_edm_valid) == (6, 3, 2, 4)
    assert (found.validity, found.uniqueness, found.unique_and_valid, found.novelty) == (3 / 6, 2 / 3, 2 / 6, 1 / 2)
    assert (found.edm_validity, found.edm_uniqueness, found.edm_unique_and_valid) == (4 / 6, 3 / 4, 3 / 6)
    assert found.smiles == (ETHANOL, ETHANOL, BENZENE, "", "", "")
    assert found.num_scaffolds == 1  # ethanol has none
    assert math.isnan(found.molecule_stability) and math.isnan(found.atom_stability)


def test_qed_and_sa_are_those_of_the_rewards(decoded):
    mols = [mol for mol in decoded[0] if mol is not None][:60]
    found = summarise([*mols, None])
    assert found.qed == pytest.approx(np.mean(QED()(mols)), abs=1e-12)
    assert found.qed_of_all == pytest.approx(np.sum(QED()(mols)) / (len(mols) + 1), abs=1e-12)
    assert found.sa == pytest.approx(np.mean(SA()(mols)), abs=1e-12)
    assert found.synth == pytest.approx((10 - found.sa) / 9)


def test_scaffolds_are_counted_without_their_side_chains():
    found = summarise(["Cc1ccccc1", "CCc1ccccc1O", "C1CC1CC", "CCC"])
    assert found.num_scaffolds == 2


def test_stereo_and_the_way_hydrogens_are_written_make_no_other_molecule():
    twice = [made("C[C@H](O)F"), made("C[C@@H](O)F"), "CC(O)F", made("CC(O)F"), Chem.RemoveHs(made("OC(C)F"))]
    assert {graph_smiles(each) for each in twice} == {"CC(O)F"}
    imine = made("N=CCO")  # RDKit keeps the hydrogen that says which side it is on
    assert {graph_smiles(each) for each in (imine, "N=CCO", "[H]/N=C/CO")} == {"N=CCO"}


# -- stability, and EDM's way of counting


def test_stability_is_edms(golden, rows):
    found = summary(rows)
    assert found.molecule_stability == golden.mol_stable.mean()
    assert found.atom_stability == golden.atoms_stable.sum() / golden.atoms.mask.sum()
    assert (found.num_judged, found.num_atoms) == (400, golden.atoms.mask.sum())


def test_validity_is_strict_and_beside_it_as_edm_counts(golden, rows):
    found = summary(rows)
    assert found.edm_validity == np.mean([smiles != "" for smiles in golden.smiles])
    assert found.validity == np.mean([smiles != "" and "." not in smiles for smiles in golden.smiles])
    assert found.validity < found.edm_validity


def test_edm_takes_the_fragment_with_most_atoms_hydrogens_included():
    rows = np.concatenate([WATER, [[6, 9.0, 0, 0], [6, 10.2, 0, 0]]])  # three atoms, and two carbons 1.2 A apart
    read = Atoms(rows[None, :, 1:], rows[None, :, 0].astype(int), np.ones((1, 5), bool))
    rows = describe(molecules(read), read)
    assert rows.smiles == ("",)
    assert rows.edm_smiles == ("O",)
    assert rows.atoms_stable.tolist() == [3]


def test_without_the_atoms_nothing_is_said_of_stability_and_none_is_invalid_to_edm_too(decoded):
    found = summarise(decoded[0][:40])
    assert math.isnan(found.atom_stability) and math.isnan(found.molecule_stability)
    assert found.edm_validity == found.validity
    assert (found.num_judged, found.num_atoms) == (0, 0)


def test_orders_that_a_model_draws_have_fragments_and_no_stability():
    drawn = np.zeros((1, 4, 4), np.int8)
    drawn[0, 0, 1] = drawn[0, 1, 0] = 1
    drawn[0, 1, 2] = drawn[0, 2, 1] = 1
    read = Atoms(np.eye(4, 3)[None], np.array([[6, 6, 8, 7]]), np.ones((1, 4), bool), drawn)
    rows = describe(molecules(read), read)
    assert (rows.smiles, rows.edm_smiles) == (("",), ("CCO",))
    assert np.isnan(rows.stable).all()


def test_atoms_that_are_nowhere_are_valid_to_nobody():
    read = Atoms(np.full((2, 2, 3), np.nan), np.full((2, 2), 6), np.array([[True, True], [False, False]]))
    found = summarise(molecules(read), read)
    assert (found.validity, found.edm_validity, found.molecule_stability) == (0.0, 0.0, 0.0)


def test_atoms_of_other_samples_are_refused(decoded):
    with pytest.raises(ValueError, match="3 samples and the atoms of 400"):
        describe([ETHANOL] * 3, decoded[1])


# -- the training set


def test_a_training_set_of_digests_says_what_the_set_of_smiles_says(rows):
    known = [smiles for smiles in rows.smiles[::3] if smiles]
    told = summary(rows, set(known)).novelty
    assert told == summary(rows, digests(known)).novelty
    assert told == 1 - len(set(known)) / len(set(rows.smiles) - {""})
    assert summary(rows, digests([])).novelty == summary(rows, set()).novelty == 1.0
    assert math.isnan(summary(rows).novelty)


def test_a_training_set_without_smiles_is_no_reason_to_call_all_new(rows):
    assert np.array_equal(metrics.training_set(["CCO", "N"] * 60 + [""]), digests(["CCO", "N"]))
    with pytest.raises(ValueError, match=r"2 of 3 training molecules have a SMILES, and novelty needs 99%; .* delete"):
        metrics.training_set(["CCO", "N", ""])


def test_digests_are_sorted_and_single():
    found = digests(["CCO", "C", "CCO", "N"])
    assert len(found) == 3
    assert (np.diff(found.astype(object)) > 0).all()


# -- diversity


def test_internal_diversity_is_rdkits_tanimoto_over_all_pairs(monkeypatch, decoded):
    monkeypatch.setattr(metrics, "BLOCK", 37)
    rows = describe(decoded[0][:150])
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=2048)
    prints = [generator.GetFingerprint(Chem.MolFromSmiles(smiles)) for smiles in rows.smiles if smiles]
    pairs = [
        value for i in range(1, len(prints)) for value in DataStructs.BulkTanimotoSimilarity(prints[i], prints[:i])
    ]
    assert summary(rows).diversity == pytest.approx(1 - np.mean(pairs), abs=1e-6)


def test_a_large_set_is_compared_in_part_with_a_seed(monkeypatch, rows):
    exact = summary(rows).diversity
    monkeypatch.setattr(metrics, "MAX_COMPARED", 60)
    found = summary(rows)
    assert found.num_compared == 60
    assert found.diversity == summary(rows).diversity == pytest.approx(exact, abs=0.02)
    valid = rows.fingerprints[rows.fingerprints.any(1)]
    assert diversity(valid, seed=1) != diversity(valid, seed=2)


def test_copies_of_one_molecule_have_no_diversity_and_one_molecule_has_none_to_speak_of():
    assert summarise([ETHANOL] * 3).diversity == pytest.approx(0.0, abs=1e-9)
    assert math.isnan(summarise([ETHANOL]).diversity)


# -- chunks and reports


def test_an_empty_set_and_one_without_a_molecule_have_no_numbers_and_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        empty, invalid = summarise([]), summarise([None, "C("])
    assert empty.num_samples == empty.num_scaffolds == 0
    assert math.isnan(empty.validity) and math.isnan(empty.qed)
    assert (invalid.validity, invalid.qed_of_all) == (0.0, 0.0)
    assert math.isnan(invalid.qed) and math.isnan(invalid.uniqueness)


def test_a_report_says_of_each_number_what_is_better_and_over_how_many(rows):
    found = summary(rows)
    table = {entry.name: entry for entry in found.table()}
    assert table["validity"].value == found.validity
    assert table["validity"].count == 400
    assert table["QED of valid"].count == found.num_valid
    assert [name for name, entry in table.items() if entry.better == "lower"] == ["SA of valid, raw 1..10"]
    assert len(str(found).splitlines()) == len(table) == 15


def test_a_set_from_an_event_to_a_report_takes_two_calls(golden):
    x_0, context = events(golden.take(np.arange(12)))
    assert summarise(full(x_0, context), atoms(x_0, context)).num_judged == 12
