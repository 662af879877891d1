"""Docking: benzamidine finds trypsin's pocket, and the same molecule always gets the same number."""

import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("rdkit")
pytest.importorskip("vina")
pytest.importorskip("meeko")

from rdkit import Chem

from envs.molecules.docking import Docking
from rayft.reward import build

BENZAMIDINE, BENZENE, PHENOL = "NC(=[NH2+])c1ccccc1", "c1ccccc1", "Oc1ccccc1"
ASP_189 = (-4.000, 11.160, 12.951)  # its carboxylate carbon


QUICK = {"centre": [-2.5, 12.5, 16.0], "size": 14.0, "exhaustiveness": 1}  # the S1 pocket alone


@pytest.fixture(scope="module")
def trypsin():
    return Docking(**QUICK)


def test_benzamidine_puts_its_amidine_to_aspartate_189(trypsin):
    affinity, pose = trypsin.dock(BENZAMIDINE)
    amidine = pose.GetSubstructMatch(Chem.MolFromSmarts("[CX3](N)=[N;+]"))[0]
    assert np.linalg.norm(pose.GetConformer().GetPositions()[amidine] - ASP_189) < 4.5  # 3.9 in crystals
    assert affinity == pytest.approx(-5.8, abs=0.3)  # 18 uM measured: -6.5 kcal/mol
    assert trypsin([BENZAMIDINE]) == [-affinity]


def test_the_scores_are_in_the_order_of_the_measured_affinities(trypsin):
    scores = trypsin(["Nc1ccc(C(N)=[NH2+])cc1", BENZAMIDINE, PHENOL, BENZENE])  # 8 uM, 18 uM, none, none
    assert scores == sorted(scores, reverse=True) and scores[0] > scores[1] + 0.2 > scores[3] + 1.5


def test_one_molecule_has_one_number_in_any_order_company_and_form(trypsin):
    mol = Chem.AddHs(Chem.MolFromSmiles(BENZAMIDINE))
    backwards = Chem.RenumberAtoms(mol, list(range(mol.GetNumAtoms()))[::-1])
    first, *others = trypsin([BENZAMIDINE, PHENOL, mol, BENZENE, backwards, "[NH2+]=C(N)c1ccccc1", PHENOL])
    assert [others[1], others[3], others[4]] == [first] * 3 and others[0] == others[5]
    assert others[0] is not None and Docking(**QUICK)([PHENOL]) == [others[0]]


def test_a_new_process_gets_the_same_number(trypsin):
    told = f"from envs.molecules.docking import Docking; print(repr(Docking(**{QUICK})(['{PHENOL}'])))"
    found = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.strip() == repr(trypsin([PHENOL]))


def test_what_vina_cannot_take_fails_alone_and_in_silence(trypsin, capfd):
    bad = ["C(", "[Pt]", "OB(O)c1ccccc1", "CCO.CCO", "[Na+]"]
    found = trypsin([PHENOL, *bad, PHENOL])
    assert found[1:-1] == [None] * len(bad) and found[0] == found[-1] is not None
    assert capfd.readouterr() == ("", "")


def test_a_molecule_larger_than_the_box_fails():
    tight = Docking(centre=[0.2, 15.1, 22.2], size=4, exhaustiveness=1)
    assert tight(["c1ccc(-c2ccc(-c3ccccc3)cc2)cc1"]) == [None]  # Vina's own number is minus some millions


def test_an_own_receptor_scores_as_the_shipped_one_and_the_cache_key_knows_its_contents(tmp_path, trypsin):
    own = tmp_path / "own.pdbqt"
    own.write_text(trypsin.path.read_text())
    copied = Docking(receptor=str(own), **QUICK)
    assert copied([BENZENE]) == trypsin([BENZENE])
    assert copied.canonical("OCC") == trypsin.canonical("OCC")
    assert copied.canonical("OCC")[0] == Docking.canonical("OCC") == "CCO"
    own.write_text(own.read_text().replace("ASP A 189", "ALA A 189"))
    assert Docking(receptor=str(own), **QUICK).canonical("OCC") != copied.canonical("OCC")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"receptor": "tripsin"}, "give one of trypsin"),
        ({"receptor": "absent.pdbqt"}, "is no PDBQT file"),
        ({"receptor": "x.pdb"}, "mk_prepare_receptor"),
        ({"size": -1}, "size is -1"),
        ({"size": [20, 20]}, "three numbers"),
        ({"size": [20, 20, 500]}, "at most 60"),
        ({"centre": "here"}, "three numbers"),
        ({"centre": [0, 0, float("nan")]}, "three numbers"),
        ({"centre": [500, 0, 0]}, "no atom of trypsin.pdbqt lies in the box"),
        ({"exhaustiveness": 0}, "exhaustiveness is 0"),
        ({"seed": 0}, "seed is 0"),  # Vina would draw one
        ({"cpu": 1.5}, "cpu is 1.5"),
    ],
)
def test_a_wrong_argument_is_answered_with_a_sentence(arguments, said):
    with pytest.raises(ValueError, match=said):
        build("envs.molecules.docking:Docking", arguments)


def test_an_own_receptor_needs_a_box_and_atoms(tmp_path):
    empty = tmp_path / "empty.pdbqt"
    empty.write_text("REMARK nothing here\nATOM      1  C   ILE A  16      ??????\n")
    with pytest.raises(ValueError, match="centre is missing"):
        Docking(receptor=str(empty))
    with pytest.raises(ValueError, match="no readable ATOM lines"):
        Docking(receptor=str(empty), centre=[0, 0, 0], size=20)
