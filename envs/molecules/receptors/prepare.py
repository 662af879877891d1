"""Prepares trypsin.pdbqt from the deposited coordinates: polar hydrogens, AutoDock atom types, Gasteiger charges.

    pip download --no-deps --no-binary :all: pdb2pqr==3.8.0
    python -m envs.molecules.receptors.prepare pdb2pqr-3.8.0.tar.gz

PDB entry 1K1I lies in that archive's tests; README.md beside this file says more of it.
"""

from __future__ import annotations

import argparse
import hashlib
import tarfile
from pathlib import Path

import numpy as np

from envs.molecules.reward import need

MEMBER = "pdb2pqr-3.8.0/tests/data/1K1I.pdb"
SHA256 = "4e7188a702155f19f710625bf63e55ea4d54dfc0803737ba9580577ad7117feb"
POCKET = (("ASP", 189, "CG"), ("SER", 195, "OG"))  # floor of the S1 pocket, and the catalytic serine
REMARKS = (
    "Bovine trypsin, from PDB entry 1K1I (doi:10.2210/pdb1k1i/pdb), CC0; ligand and water left out.",
    "Prepared by envs/molecules/receptors/prepare.py; see README.md there.",
)


def main() -> None:
    """Writes the receptor and prints the box that its pocket wants."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("archive", type=Path, help="pdb2pqr-3.8.0.tar.gz")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("trypsin.pdbqt"))
    told = parser.parse_args()
    pdb = deposited(told.archive)
    told.out.write_text(prepared(pdb))
    print(f"{told.out}: centre {pocket(pdb)}")


def deposited(archive: Path) -> str:
    """The coordinates, checked by their digest."""
    with tarfile.open(archive) as opened:
        member = opened.extractfile(MEMBER)
        found = member.read() if member else b""
    if hashlib.sha256(found).hexdigest() != SHA256:
        raise ValueError(f"{MEMBER} in {archive} is not the file this was written for (sha256 {SHA256})")
    return found.decode()


def prepared(pdb: str) -> str:
    """PDBQT text of the rigid receptor."""
    meeko = need("meeko", "docking")
    templates = meeko.ResidueChemTemplates.create_from_defaults()
    polymer = meeko.Polymer.from_pdb_string(pdb, templates, meeko.MoleculePreparation())
    rigid, _ = meeko.PDBQTWriterLegacy.write_string_from_polymer(polymer)
    return "".join(f"REMARK  {line}\n" for line in REMARKS) + rigid


def pocket(pdb: str) -> list[float]:
    """The middle between the two atoms of POCKET, to 0.1 Angstrom."""
    found = [
        [float(line[start : start + 8]) for start in (30, 38, 46)]
        for line in pdb.splitlines()
        if line.startswith("ATOM") and (line[17:20], int(line[22:26]), line[12:16].strip()) in POCKET
    ]
    return np.round(np.mean(found, axis=0), 1).tolist()


if __name__ == "__main__":
    main()
