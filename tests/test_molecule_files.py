"""A user's files of molecules: every format, and everything that can be wrong with one."""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile

import numpy as np
import pytest
import torch
from small_molecules import EDM, GOLDEN, IDS, PUBLISHED, WATER, archive, one_by_one, same, texts

from envs.molecules import data, files, qm9pack
from envs.molecules.data import Molecules as Table
from envs.molecules.domain import Molecules


@pytest.fixture
def published() -> Table:
    return files.read(PUBLISHED)


def test_the_published_text_and_qm9pack_say_the_same(published):
    packed = data.concatenate(list(qm9pack.chunks(GOLDEN / "qm9pack")))
    assert packed.index.tolist() == IDS
    assert packed.smiles[3] == "CC#CCN(C)C(N)=O" and packed.properties["Cv"][3] == 37.327
    assert same(packed, published)


def test_published_exponents_are_read(tmp_path):
    assert "0.0080009958" in METHANE and "\t0.\t" in METHANE
    text = METHANE.replace("0.0080009958", "1.2*^-6").replace("\t0.\t", "\t-6.1048*^-6\t")
    (tmp_path / "dsgdb9nsd_000001.xyz").write_text(text)
    found = files.read(tmp_path / "dsgdb9nsd_000001.xyz")
    assert found.positions[0, 2] == np.float32(1.2e-6) and found.properties["mu"][0] == -6.1048e-6


@pytest.mark.parametrize(
    ("name", "opener"),
    [("a.tar", open), ("a.tar.gz", gzip.open), ("a.tar.bz2", bz2.open), ("a.tar.xz", lzma.open), ("b.tar.bz2", open)],
)
def test_a_whole_archive_is_read_and_a_truncated_one_refused(name, opener, published, tmp_path):
    path = archive(tmp_path / name, texts() | {"readme.txt": "no molecule", "._a.xyz": "junk"}, opener)
    assert same(files.read(path), published)
    whole = path.read_bytes()
    for share in (0.02, 0.3, 0.5):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=r"is cut off.*get it again$"):
            files.read(path)


def test_an_archive_cut_between_two_files_or_spoilt_at_a_header_is_refused(tmp_path):
    path = archive(tmp_path / "a.tar", texts())
    with tarfile.open(path) as tar:
        headers = [member.offset for member in tar]
    whole = path.read_bytes()
    spoilt = whole[: headers[2]] + b"x" * 512 + whole[headers[2] + 512 :]
    for content in (whole[: headers[2]], whole[: headers[2] + 100], spoilt):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is cut off or damaged, 2 files into it; get it again"):
            files.read(path)
    path.write_text("<!DOCTYPE html><title>Are you a robot?</title>" * 20)
    with pytest.raises(ValueError, match="no tar archive, 0 files into it"):
        files.read(path)


def test_edms_file_is_read_without_its_padding():
    found = files.read(EDM)
    with np.load(EDM) as raw:
        assert found.index.tolist() == raw["index"].tolist() and found.num_atoms.tolist() == raw["num_atoms"].tolist()
        for place, (numbers, positions) in enumerate(one_by_one(found)):
            assert numbers == raw["charges"][place, : len(numbers)].tolist()
            assert np.array_equal(positions, raw["positions"][place, : len(numbers)])
        assert np.array_equal(found.properties["U0_thermo"], raw["U0_thermo"])
    twenty_two = found[found.index == 22]
    assert twenty_two.positions == pytest.approx(files.read(PUBLISHED / "dsgdb9nsd_000022.xyz").positions, abs=1e-6)


def test_an_npz_that_is_something_else_is_refused(tmp_path):
    with np.load(EDM) as raw:
        arrays = dict(raw)
    path = tmp_path / "a.npz"
    cases = [
        (arrays | {"index": np.array([{}] * 20)}, "no whole .npz of plain numbers .*allow_pickle=False"),
        ({k: v for k, v in arrays.items() if k != "charges"}, "has no 'charges'"),
        (arrays | {"num_atoms": arrays["num_atoms"] + 20}, "num_atoms .20,. up to"),
        (arrays | {"positions": arrays["positions"][:, :-1]}, "positions .20, 28, 3."),
        (arrays | {"positions": arrays["positions"] * 1j}, "has positions of complex64; give real numbers"),
        (arrays | {"charges": arrays["charges"] + 0.5}, "has charges that are no whole numbers; give the atomic"),
        (arrays | {"num_atoms": arrays["num_atoms"] * np.nan}, "has num_atoms that are no whole numbers"),
    ]
    for content, message in cases:
        np.savez(path, **content)
        with pytest.raises(ValueError, match=message):
            files.read(path)
    for content in (EDM.read_bytes()[:5000], b"", b"\x80\x04N."):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.npz is no whole \.npz"):
            files.read(path)


def test_an_sdf_gives_geometry_smiles_and_qm9s_id(published, tmp_path):
    from rdkit import Chem

    mols = []
    for (numbers, positions), smiles in zip(one_by_one(published), published.smiles, strict=True):
        mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
        assert [atom.GetAtomicNum() for atom in mol.GetAtoms()] == numbers
        conformer = Chem.Conformer(len(numbers))
        conformer.SetPositions(positions.astype(float))
        mol.AddConformer(conformer)
        mols.append(mol)
    with Chem.SDWriter(str(tmp_path / "gdb9.sdf")) as writer:
        for mol, index in zip(mols, published.index, strict=True):
            mol.SetProp("_Name", f"gdb_{index}")
            writer.write(mol)
    (tmp_path / "alone").mkdir()
    Chem.MolToMolFile(mols[1], str(tmp_path / "alone" / "water.mol"))
    found = files.read(tmp_path / "gdb9.sdf")
    assert found.index.tolist() == published.index.tolist() and found.numbers.tolist() == published.numbers.tolist()
    assert [Chem.CanonSmiles(s, useChiral=0) for s in found.smiles] == [Chem.CanonSmiles(s) for s in published.smiles]
    np.testing.assert_allclose(found.positions, published.positions, atol=6e-5)  # four decimals in an .sdf
    assert len(files.read(tmp_path)) == 6

    text = (tmp_path / "gdb9.sdf").read_text()
    (tmp_path / "gdb9.sdf").write_text(text[: text.rindex("M  END") - 40])
    kept, skipped = files.read_counted(tmp_path / "gdb9.sdf")
    assert len(kept) == 4
    assert str(skipped) == "1 with a record that RDKit cannot read (first: gdb9.sdf, record 5)"
    (tmp_path / "flat.sdf").write_text(Chem.MolToMolBlock(Chem.MolFromSmiles("CCO")) + "$$$$\n")
    with pytest.raises(ValueError, match=r"none of the 1 molecules in .*flat\.sdf can be used: 1 with a flat drawing"):
        files.read(tmp_path / "flat.sdf")


METHANE = texts()["dsgdb9nsd_000001.xyz"]
BAD = {
    "binary.xyz": ("\x00\x01\x02", "no number of atoms in its first line"),
    "cut.xyz": (WATER[:-20], "fewer lines than it needs: it is cut off"),
    "cut_in_a_line.xyz": (WATER[:-4], "an atom without three numbers for its place"),
    "cut_tail.xyz": (METHANE[: METHANE.index("InChI")], "fewer lines than it needs: it is cut off"),
    "empty.xyz": ("", "nothing in the file"),
    "empty.sdf": ("", "nothing in the file"),
    "endless.xyz": ("9" * 5000, "no number of atoms in its first line"),
    "huge.xyz": (WATER.replace("0.96", "1e200"), "a coordinate that is no finite number"),
    "nan.xyz": (WATER.replace("0.96", "nan"), "a coordinate that is no finite number"),
    "no_atoms.xyz": ("0\n\n", "no atoms"),
    "text.xyz": ("not a molecule", "no number of atoms in its first line"),
    "text.sdf": ("not a molecule", "a record that RDKit cannot read"),
    "long.xyz": (WATER.replace("O 0", "000000001999 0"), "an unknown element '0000000019'"),
    "unknown.xyz": (WATER.replace("O", "Xx"), "an unknown element 'Xx'"),
}


def test_bad_molecules_are_left_out_and_counted_by_reason(tmp_path, caplog):
    for name, (content, _) in BAD.items():
        (tmp_path / name).write_text(content)
    others = WATER.replace("O", "8") + WATER.replace("O", "S").lower()
    (tmp_path / "good.xyz").write_text("\ufeff" + WATER + "\n" + others)
    (tmp_path / "some.xyz").write_text(WATER + WATER.replace("H -", "Q -"))
    molecules, skipped = files.read_counted(tmp_path)
    assert molecules.numbers.tolist() == [8, 1, 1, 8, 1, 1, 16, 1, 1, 8, 1, 1]
    assert skipped.counts.total() == len(BAD) + 1
    for name, (_, reason) in BAD.items():
        (found,) = [told for told in skipped.counts if told.startswith(reason)]
        assert skipped.counts[found] == sum(other.startswith(reason) for _, other in BAD.values()), name
    assert skipped.first["an unknown element 'Q'"] == "some.xyz, frame 2"
    assert len(files.read(tmp_path)) == 4
    (record,) = caplog.records
    assert record.message.startswith(f"15 of 19 molecules in {tmp_path} are left out: 3 with no number of atoms in its")
    assert record.message.endswith("5 for other reasons")


def test_molecules_that_a_model_cannot_take_are_left_out():
    kept, skipped = files.read_counted(PUBLISHED, max_atoms=5, elements=["H", "C", "O"])
    assert kept.index.tolist() == [1, 3]
    assert str(skipped) == (
        "2 with an element N, which is not among H, C, O (first: dsgdb9nsd_053500.xyz), "
        "1 with more than 5 atoms (first: dsgdb9nsd_000022.xyz)"
    )
    assert str(files.read_counted(GOLDEN, max_atoms=9)[1]).endswith("(first: cormorant_test_first_20.npz, molecule 3)")
    with pytest.raises(ValueError, match=r"none of the 5 molecules .*: 4 with an element C, which is not among Cl"):
        files.read(PUBLISHED, elements=["Cl"])
    with pytest.raises(ValueError, match=r"elements has \['Xx'\]; give symbols"):
        files.read(PUBLISHED, elements=["H", "Xx"])


def test_a_model_s_own_limits_are_told_like_a_file_s(caplog):
    assert Molecules(data=str(PUBLISHED), max_atoms=4).context(3, torch.Generator())["mask"].shape == (3, 4)
    (record,) = caplog.records
    assert record.message.startswith(f"2 of 5 molecules in {PUBLISHED} are left out: 2 with more than 4 atoms (first:")
    with pytest.raises(
        ValueError, match=r"no molecule of 1 to 9 atoms of Cl: 4 with an element C, .*; raise max_atoms"
    ):
        files.fitting(files.read(PUBLISHED), "mine", 9, ["Cl"])


def test_a_path_with_nothing_to_read_says_what_is_allowed(tmp_path):
    (tmp_path / "a.csv").touch()
    for path, message in (
        ("b.xyz", "there is no"),
        ("a.csv", "a name that says no format"),
        (".", "holds none of .xyz"),
    ):
        with pytest.raises(ValueError, match=rf"{message}.*give .xyz, .sdf, .mol, .npz, a folder"):
            files.read(tmp_path / path)
