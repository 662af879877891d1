"""What an event becomes: EDM's molecules, and None, never an exception, for everything else."""

import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest

pytest.importorskip("rdkit")

from hypothesis import given, settings
from hypothesis import strategies as st
from noisy_molecules import events, judged
from rdkit import Chem, rdBase

from envs.molecules import decode
from envs.molecules.bonds import Atoms
from envs.molecules.decode import build, full, molecules, sanitised
from envs.molecules.geometry import CHECKS, check
from envs.molecules.reward import QED, canonical, geometry

WATER = np.array([[8, 0.0, 0.0, 0.0], [1, 0.96, 0.0, 0.0], [1, -0.24, 0.93, 0.0]])
FAR = np.array([0, 5.0, 0, 0])


@pytest.fixture(scope="module")
def golden():
    return judged()


@pytest.fixture(scope="module")
def found(golden):
    return full(*events(golden.atoms))


def rows(*lists, size=6):
    """Events of [number, x, y, z] rows, padded."""
    positions, numbers = np.zeros((len(lists), size, 3)), np.zeros((len(lists), size), int)
    for i, each in enumerate(lists):
        each = np.asarray(each, float).reshape(-1, 4)
        numbers[i, : len(each)], positions[i, : len(each)] = each[:, 0], each[:, 1:]
    return events(Atoms(positions, numbers, numbers > 0))


# -- as EDM


def test_the_graph_of_every_noisy_molecule_is_edms(golden):
    orders = golden.atoms.orders()
    with rdBase.BlockLogs():
        mols = [decode.row(golden.atoms, orders, i) for i in range(400)]
    assert ["" if mol is None else Chem.MolToSmiles(mol) for mol in mols] == golden.smiles


def test_a_sample_is_a_sane_molecule_in_one_fragment(golden, found):
    expected = [smiles if smiles and "." not in smiles else None for smiles in golden.smiles]
    assert [None if mol is None else Chem.MolToSmiles(mol) for mol in found] == expected
    assert 150 < sum(mol is not None for mol in found) < 250


def test_a_sample_has_the_atoms_of_its_event_in_their_order_and_places(golden, found):
    for i, mol in enumerate(found):
        if mol is not None:
            real = golden.atoms.mask[i]
            assert [atom.GetAtomicNum() for atom in mol.GetAtoms()] == golden.atoms.numbers[i, real].tolist()
            assert mol.GetConformer().Is3D()
            assert (mol.GetConformer().GetPositions() == golden.atoms.positions[i, real]).all()


def test_a_batch_decodes_as_its_events_one_by_one(golden, found):
    for i in range(0, 400, 25):
        (alone,) = full(*events(golden.take([i])))
        assert (alone is None) == (found[i] is None)
        assert alone is None or alone.ToBinary() == found[i].ToBinary()


def test_a_sample_sent_to_another_process_is_the_same(found):
    for mol in filter(None, found):
        sent = pickle.loads(pickle.dumps(mol))
        assert sent.GetConformer().Is3D()
        assert (sent.GetConformer().GetPositions() == mol.GetConformer().GetPositions()).all()
        assert Chem.MolToSmiles(sent) == Chem.MolToSmiles(mol)


def test_coordinates_in_double_precision_are_those_of_the_pickle(golden):
    x_0, context = events(golden.atoms)
    double = x_0[:20] + np.r_[np.full(3, 1e-9), np.zeros(5)]
    for mol in filter(None, full(double, {"mask": context["mask"][:20]})):
        sent = pickle.loads(pickle.dumps(mol))
        assert (sent.GetConformer().GetPositions() == mol.GetConformer().GetPositions()).all()


def test_hydrogens_that_are_missing_are_filled_in_as_edm_does():
    (mol,) = full(*rows(WATER[:2]))
    assert canonical(mol) == "O"
    assert mol.GetNumAtoms() == 2
    assert geometry(mol).GetNumAtoms() == 3


def test_a_column_of_charges_changes_nothing(golden, found):
    x_0, context = events(golden.take(np.arange(40)))
    told = full(np.concatenate([x_0, np.full((*x_0.shape[:2], 1), np.nan, np.float32)], -1), context)
    assert [mol and mol.ToBinary() for mol in told] == [mol and mol.ToBinary() for mol in found[:40]]


def test_element_scores_need_not_be_one_hot_and_the_mask_need_not_be_bool():
    x_0, context = rows(WATER)
    x_0[..., 3:] = x_0[..., 3:] * 0.25 - 7.0
    (mol,) = full(x_0, {"mask": context["mask"].astype(np.float32)})
    assert canonical(mol) == "O"


def test_real_atoms_may_lie_anywhere_between_the_padding():
    x_0, context = rows(WATER)
    chosen = np.array([3, 0, 4, 2, 5, 1])
    (mol,) = full(x_0[:, chosen], {"mask": context["mask"][:, chosen]})
    assert [atom.GetSymbol() for atom in mol.GetAtoms()] == ["O", "H", "H"]


# -- a graph that is given


def test_a_given_graph_needs_no_hydrogens_and_becomes_aromatic():
    ring = np.zeros((6, 6), np.int8)
    for i in range(6):
        ring[i, (i + 1) % 6] = ring[(i + 1) % 6, i] = 1 + i % 2
    angle = np.arange(6) * np.pi / 3
    xyz = 1.39 * np.stack([np.cos(angle), np.sin(angle), 0 * angle], 1)
    mol = sanitised(build(np.full(6, 6), xyz, ring))
    assert Chem.MolToSmiles(mol) == "c1ccccc1"
    (same,) = molecules(Atoms(xyz[None], np.full((1, 6), 6), np.ones((1, 6), bool), ring[None]))
    assert canonical(same) == "c1ccccc1"


def test_what_rdkit_refuses_is_built_and_not_sanitised():
    with rdBase.BlockLogs():
        assert sanitised(build(np.array([9, 9]), np.eye(2, 3), np.array([[0, 2], [2, 0]]))) is None


# -- what is no molecule


@pytest.mark.parametrize(
    "bad",
    [
        [],  # no atoms
        [[8, np.nan, 0, 0], *WATER[1:]],
        [[8, np.inf, 0, 0], *WATER[1:]],
        [[8, 3e38, 0, 0], *WATER[1:]],
        [[8, 1e200, 0, 0], *WATER[1:]],  # no float32
        [*WATER, [6, 1e6, 0, 0]],
        [*WATER, *(WATER + FAR)],  # two fragments
        [*WATER, [1, 0.96, 0.0, 0.0]],  # two hydrogens on one spot
        [[1, 0, 0, 0], [1, 0, 0, 0]],
        [[6, 0, 0, 0], [6, 0, 0, 0.2]],
        [[9, 0, 0, 0], [9, 1.4, 0, 0], [9, 2.8, 0, 0]],  # fluorine with two bonds
        [[6, i * 0.6, 0, 0] for i in range(6)],
    ],
)
def test_what_is_no_molecule_decodes_to_none_and_its_neighbours_do_not(bad):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before, none, after = full(*rows(WATER, bad, WATER))
    assert none is None
    assert canonical(before) == canonical(after) == "O"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_element_score_that_is_not_finite_decodes_to_none(value):
    x_0, context = rows(WATER, WATER)
    x_0[0, 1, 5] = value
    none, other = full(x_0, context)
    assert none is None
    assert other is not None


def test_padding_may_hold_anything(golden):
    x_0, context = events(golden.take(np.arange(60)))
    rest = ~context["mask"]
    for value in (np.nan, np.inf, 1e38, 0.0):
        dirty = x_0.copy()
        dirty[rest] = value
        told = [mol and mol.ToBinary() for mol in full(dirty, context)]
        assert told == [mol and mol.ToBinary() for mol in full(x_0, context)]


def test_no_events_and_no_atoms_are_no_trouble():
    assert full(np.zeros((0, 29, 8)), {"mask": np.zeros((0, 29))}) == []
    assert full(np.zeros((3, 0, 8)), {"mask": np.zeros((3, 0))}) == [None] * 3
    assert full(np.zeros((2, 5, 9)), {"mask": np.zeros((2, 5))}) == [None] * 2


@pytest.mark.parametrize(
    ("shape", "mask"), [((2, 5, 7), (2, 5)), ((2, 5, 10), (2, 5)), ((5, 8), (5,)), ((2, 5, 8), (2, 4))]
)
def test_events_of_another_shape_are_refused_with_a_sentence(shape, mask):
    with pytest.raises(ValueError, match=r"give \[batch, atoms, 8\]"):
        full(np.zeros(shape), {"mask": np.ones(mask)})


numbers = st.one_of(
    st.floats(-2.5, 2.5, width=32),
    st.floats(width=32),
    st.sampled_from([0.0, -0.0, np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 1e-45, 1e6, 1.09, 1.5]),
)


@st.composite
def garbage(draw):
    batch, size, width = draw(st.integers(1, 3)), draw(st.integers(1, 8)), draw(st.sampled_from([8, 9]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    x_0 = rng.normal(scale=draw(st.sampled_from([0.01, 0.5, 0.9, 1.3, 1e3, 1e30])), size=(batch, size, width))
    for _ in range(draw(st.integers(0, 4))):
        at = tuple(draw(st.integers(0, top - 1)) for top in x_0.shape)
        x_0[at] = draw(numbers)
    with np.errstate(over="ignore"):
        x_0 = x_0.astype(draw(st.sampled_from([np.float32, np.float64, np.float16])))
    return x_0, {"mask": rng.random((batch, size)) < draw(st.sampled_from([0.0, 0.7, 1.0]))}


@settings(max_examples=200, deadline=None)
@given(garbage())
def test_garbage_is_decoded_quietly_and_what_comes_out_can_be_scored_and_sent(made):
    x_0, context = made
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        samples = full(x_0, context)
    assert len(samples) == len(x_0)
    for mol in filter(None, samples):
        assert len(Chem.GetMolFrags(mol)) == 1
        assert canonical(pickle.loads(pickle.dumps(mol))) == canonical(mol)
        assert 0.0 < QED()([mol])[0] < 1.0
        assert set(check(mol)) == set(CHECKS)


def test_decoding_and_measuring_load_neither_torch_nor_ray():
    code = (
        "import sys; from envs.molecules import bonds, decode, geometry, metrics; assert 'rdkit' not in sys.modules;"
        "metrics.summarise(['CCO']); print([name for name in ('torch', 'ray', 'scipy') if name in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
