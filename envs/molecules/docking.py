"""Docking with AutoDock Vina 1.2 (Eberhardt et al. 2021): how well a molecule fits a pocket.

r = -affinity of the best pose, kcal/mol,    the receptor rigid, the ligand's bonds turning

The pose is searched from one ETKDG conformer of the canonical SMILES with a fixed seed, so the same molecule gets the
same number whichever way it is written. Protonation and tautomer are as drawn. An own receptor is a PDBQT file:
``mk_prepare_receptor.py --read_pdb protein.pdb -o protein -p``, a program of PyPI's meeko, writes one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from envs.molecules.reward import MoleculeReward, canonical, embed, need, parse

if TYPE_CHECKING:
    from rdkit.Chem import Mol

SPACING = 0.375  # Angstrom between the points of Vina's grid
LARGEST = 60.0  # Angstrom; a process takes 2 GB at this size, and 0.6 GB at 20


@dataclass(frozen=True)
class Pocket:
    """A shipped receptor and the box in which its ligands lie, in Angstrom."""

    file: str
    centre: tuple[float, float, float]
    size: tuple[float, float, float]


RECEPTORS = {
    "trypsin": Pocket("trypsin.pdbqt", (-1.9, 13.1, 17.6), (20.0, 20.0, 20.0)),  # S1 pocket to catalytic serine
}


class Docking(MoleculeReward):
    """-affinity in kcal/mol: higher is better, drugs reach 7 to 11, and large molecules score high merely for size.

    ``receptor`` is one of RECEPTORS or a rigid PDBQT file; with a file go ``centre`` and ``size`` of the box to search
    [Angstrom]. ``exhaustiveness`` is the number of independent searches. The time grows with it and steeply with the
    ligand: at the default 8, a molecule of 9 heavy atoms takes 2 s of one core, a flexible one of 37 takes minutes.
    What finds no pose inside the box has failed.
    """

    def __init__(
        self,
        receptor: str = "trypsin",
        centre: Sequence[float] | None = None,
        size: float | Sequence[float] | None = None,
        exhaustiveness: int = 8,
        seed: int = 1,
        cpu: int = 1,
    ) -> None:
        super().__init__()
        for module in ("vina", "meeko"):
            need(module, "docking")
        for name, value in (("exhaustiveness", exhaustiveness), ("seed", seed), ("cpu", cpu)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; Vina takes a whole number of at least 1")
        known = RECEPTORS.get(str(receptor))
        self.path = Path(__file__).with_name("receptors") / known.file if known else Path(receptor).expanduser()
        if self.path.suffix != ".pdbqt" or not self.path.is_file():
            raise ValueError(
                f"receptor {receptor} is no PDBQT file; give one of {', '.join(RECEPTORS)} or a file that "
                "'mk_prepare_receptor.py --read_pdb protein.pdb -o protein -p' wrote"
            )
        self.centre = _three("centre", centre if centre is not None or known is None else known.centre)
        self.size = _three("size", size if size is not None or known is None else known.size)
        if not all(0 < edge <= LARGEST for edge in self.size):
            raise ValueError(f"size is {size!r}; give the box's edges in Angstrom, above 0 and at most {LARGEST:g}")
        text = _receptor(self.path, self.centre, self.size)
        self.exhaustiveness, self.seed, self.cpu = exhaustiveness, seed, cpu
        self.canonical = partial(_canonical, hashlib.blake2b(text.encode(), digest_size=8).hexdigest())
        self.vina: Any = None

    def score(self, mol: Mol) -> float:
        return -self.dock(mol)[0]

    def dock(self, sample: Any) -> tuple[float, Mol]:
        """(affinity in kcal/mol, the molecule in its best pose, hydrogens included)."""
        chem, meeko = need("rdkit.Chem", "molecules"), need("meeko", "docking")
        mol = parse(sample)
        if mol is None:
            raise ValueError("not a molecule")
        setups = meeko.MoleculePreparation().prepare(embed(chem.MolToSmiles(mol)))
        text, fine, error = meeko.PDBQTWriterLegacy.write_string(setups[0])
        if not fine:
            raise ValueError(f"Vina cannot take this molecule: {error}")
        vina = self._vina()
        vina.set_ligand_from_string(text)
        vina.dock(exhaustiveness=self.exhaustiveness, n_poses=1)
        affinity = float(vina.energies(n_poses=1)[0][0])
        pose = meeko.PDBQTMolecule(vina.poses(n_poses=1), skip_typing=True)
        if (np.abs(pose.positions() - self.centre) > np.array(self.size) / 2 + SPACING).any():
            raise ValueError(f"no pose inside the box; Vina's score of {affinity:g} is its penalty for lying outside")
        return affinity, meeko.RDKitMolCreate.from_pdbqt_mol(pose)[0]

    def _vina(self) -> Any:
        """The receptor's maps, a second's work, done with the first molecule."""
        if self.vina is None:
            found = need("vina", "docking").Vina(sf_name="vina", cpu=self.cpu, seed=self.seed, verbosity=0)
            found.set_receptor(str(self.path))
            found.compute_vina_maps(center=list(self.centre), box_size=list(self.size))
            self.vina = found
        return self.vina


def _canonical(receptor: str, sample: Any) -> list[str]:
    """Docking depends on the receptor file's contents too, which its name does not tell."""
    return [canonical(sample), receptor]


def _three(name: str, value: Any) -> tuple[float, float, float]:
    """Three finite numbers; one number for ``size`` is a cube."""
    if value is None:
        raise ValueError(f"{name} is missing: an own receptor needs centre: [x, y, z] and size: [a, b, c] in Angstrom")
    if name == "size" and np.ndim(value) == 0:
        value = [value] * 3
    try:
        x, y, z = (float(number) for number in value)
    except (TypeError, ValueError):
        x = y = z = float("nan")
    if not np.isfinite([x, y, z]).all():
        raise ValueError(f"{name} is {value!r}; give three numbers in Angstrom, [x, y, z]")
    return x, y, z


def _receptor(path: Path, centre: tuple[float, float, float], size: tuple[float, float, float]) -> str:
    """The receptor's text, once it is plausible: it has atoms in the box."""
    text = path.read_text(errors="replace")
    lines = [line for line in text.splitlines() if line.startswith(("ATOM", "HETATM"))]
    try:
        atoms = np.array([[float(line[start : start + 8]) for start in (30, 38, 46)] for line in lines]).reshape(-1, 3)
    except ValueError:
        atoms = np.zeros((0, 3))
    if not len(atoms):
        raise ValueError(f"receptor {path} has no readable ATOM lines; prepare it again with mk_prepare_receptor.py")
    if not (np.abs(atoms - centre) <= np.array(size) / 2).all(axis=1).any():
        middle = np.round(atoms.mean(axis=0), 1).tolist()
        raise ValueError(
            f"no atom of {path.name} lies in the box at {list(centre)} of {list(size)} Angstrom; "
            f"the receptor's middle is {middle}, so give a centre near its pocket"
        )
    return text
