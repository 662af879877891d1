"""Molecules as files: what is written is read again by RDKit, pyarrow and csv, and is the same."""

from __future__ import annotations

import csv
import subprocess
import sys
from functools import cache

import numpy as np
import pyarrow.parquet as pq
import pytest
from rdkit import Chem

from envs.molecules import files, write
from envs.molecules.decode import heavy
from envs.molecules.domain import ELEMENTS, Molecules
from envs.molecules.reward import QED, embed
from rayft.cli import main

SMILES = ["CCO", "CC#N", "C=CC", "CC(=O)N", "C[C@H](O)CF", "OCC(C)(C)CN"]  # bonds are read off their lengths
COLUMNS = ("index", "reward", "part/qed")


@cache
def embedded(smiles, max_atoms=9):
    """(x_0, mask) of a molecule's heavy atoms, as the model has them."""
    mol = Chem.RemoveHs(embed(smiles))
    x_0, n = np.zeros((max_atoms, 3 + len(ELEMENTS)), np.float32), mol.GetNumAtoms()
    x_0[:n, :3] = mol.GetConformer().GetPositions()
    x_0[:n, :3] -= x_0[:n, :3].mean(0)
    x_0[:n, 3:] = np.equal.outer([atom.GetAtomicNum() for atom in mol.GetAtoms()], ELEMENTS) / 4
    return x_0, (np.arange(max_atoms) < n).astype(np.float32)


def events(smiles, broken=()):
    """x_0 and context; atoms of the ``broken`` ones are far apart."""
    x_0, mask = (np.stack(part) for part in zip(*map(embedded, smiles), strict=True))
    x_0[list(broken), :, :3] *= 10
    return x_0, {"mask": mask}


@pytest.fixture(scope="module")
def made():
    """(samples, columns) of the molecules above; the third is undecodable, the fifth has no score."""
    samples = heavy(*events(SMILES, broken=[2]))
    assert [sample is None for sample in samples] == [i == 2 for i in range(6)]
    reward = np.array([0.1, 0.2, 0.0, 1 / 3, np.nan, 0.5])
    return samples, {"index": np.array([7, 3, 5, 11, 0, 2]), "reward": reward, "part/qed": reward * 2}


def test_an_sdf_gives_back_the_molecules_their_places_and_their_scores(made, tmp_path):
    samples, columns = made
    path = tmp_path / "best.sdf"
    assert write.sdf(path, samples, columns) == 5
    found = list(Chem.SDMolSupplier(str(path), removeHs=False))
    kept = [i for i in range(6) if samples[i] is not None]
    assert [mol.GetProp("_Name") for mol in found] == [f"sample_{columns['index'][i]}" for i in kept]
    assert [mol.GetProp("SMILES") for mol in found] == [Chem.CanonSmiles(SMILES[i]) for i in kept]
    for mol, i in zip(found, kept, strict=True):
        assert mol.GetConformer().Is3D()
        places = samples[i].GetConformer().GetPositions()
        np.testing.assert_allclose(mol.GetConformer().GetPositions(), places, atol=1e-4)
        Chem.AssignStereochemistryFrom3D(mol)
        assert Chem.MolToSmiles(mol) == mol.GetProp("SMILES")
        told = {name: float(mol.GetProp(name)) for name in COLUMNS if mol.HasProp(name)}
        expected = {name: columns[name][i] for name in COLUMNS if np.isfinite(columns[name][i])}
        assert told == pytest.approx(expected, rel=1e-7)
    assert not found[3].HasProp("reward")


def test_the_sdf_is_a_data_set_that_the_domain_reads(made, tmp_path):
    path = tmp_path / "made.sdf"
    write.sdf(path, *made)
    found = files.read(path)
    assert len(found) == 5
    assert found.num_atoms.tolist() == [mol.GetNumAtoms() for mol in made[0] if mol is not None]


def test_the_name_of_a_part_cannot_break_an_sdf(made, tmp_path):
    path = tmp_path / "made.sdf"
    write.sdf(path, made[0], {"part/a> <b\n$$$$\n": np.ones(6)})
    found = list(Chem.SDMolSupplier(str(path)))
    assert len(found) == 5
    assert found[0].GetPropsAsDict()["part/a___b_$$$$_"] == 1
    assert [mol.GetProp("_Name") for mol in found] == [f"sample_{i}" for i in (0, 1, 3, 4, 5)]


def test_writing_leaves_the_samples_as_they_were(made, tmp_path):
    before = [None if mol is None else mol.ToBinary(Chem.PropertyPickleOptions.AllProps) for mol in made[0]]
    write.sdf(tmp_path / "made.sdf", *made)
    assert before == [None if mol is None else mol.ToBinary(Chem.PropertyPickleOptions.AllProps) for mol in made[0]]


def test_a_csv_has_a_row_for_every_sample_and_every_digit(made, tmp_path):
    path = tmp_path / "made.csv"
    assert write.csv(path, *made) == 6
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["smiles", "valid", *COLUMNS]
    assert [row["smiles"] for row in rows] == ["" if i == 2 else Chem.CanonSmiles(SMILES[i]) for i in range(6)]
    assert [row["valid"] for row in rows] == [str(i != 2) for i in range(6)]
    assert [row["index"] for row in rows] == [str(i) for i in made[1]["index"]]
    assert rows[4]["reward"] == ""
    assert [float(row["reward"] or "nan") for row in rows] == pytest.approx(list(made[1]["reward"]), abs=0, nan_ok=True)


def test_parquet_holds_the_rows_of_the_csv_typed(made, tmp_path):
    path = tmp_path / "made.parquet"
    assert write.parquet(path, *made) == 6
    table = pq.read_table(path)
    assert {name: str(table.schema.field(name).type) for name in table.column_names} == {
        "smiles": "string",
        "valid": "bool",
        "index": "int64",
        "reward": "double",
        "part/qed": "double",
    }
    assert table["smiles"].to_pylist()[2] is None
    assert table["reward"].to_pylist()[4] is None
    assert table["reward"].to_pylist()[3] == 1 / 3


def test_a_smi_has_a_molecule_and_its_name_on_each_line(made, tmp_path):
    path = tmp_path / "made.smi"
    assert write.smi(path, *made) == 5
    read = Chem.SmilesMolSupplier(str(path), titleLine=False)
    assert [mol.GetProp("_Name") for mol in read] == [f"sample_{i}" for i in (7, 3, 11, 0, 2)]
    assert path.read_text().startswith("CCO sample_7\n")


@pytest.mark.parametrize("suffix", Molecules.formats)
def test_where_nothing_can_be_decoded_the_file_is_whole(suffix, tmp_path):
    path = tmp_path / f"none{suffix}"
    name = Molecules.formats[suffix].partition(":")[2]
    written = getattr(write, name)(path, [None, None], {"index": np.arange(2), "reward": np.zeros(2)})
    assert written == (2 if suffix in (".csv", ".parquet") else 0)
    assert path.is_file()
    if suffix == ".parquet":
        assert pq.read_table(path)["smiles"].to_pylist() == [None, None]


def test_writing_and_drawing_load_neither_torch_nor_ray():
    code = "import sys, envs.molecules.write, envs.molecules.render; print({'torch', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_best_of_the_pretrained_model_go_into_an_sdf(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    told = ["sample", "molecules", "--num", "24", "--num-steps", "10"]
    assert main([*told, "--reward", "qed", "--top", "3", "--out", "best.sdf"]) == 0
    said = capfd.readouterr()
    assert said.err == ""
    found = list(Chem.SDMolSupplier("best.sdf"))
    assert said.out == f"{len(found)} samples in best.sdf: index, reward\n"
    assert 1 <= len(found) <= 3
    scores = [float(mol.GetProp("reward")) for mol in found]
    assert main([*told, "--out", "all.csv"]) == 0
    with open("all.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    valid = [row["smiles"] for row in rows if row["valid"] == "True"]
    assert capfd.readouterr().out == f"24 samples in all.csv: index; {24 - len(valid)} decode to nothing\n"
    assert [rows[int(mol.GetProp("index"))]["smiles"] for mol in found] == [mol.GetProp("SMILES") for mol in found]
    assert scores == pytest.approx(sorted(QED()(sorted(set(valid))), reverse=True)[:3])
