"""Electronic properties by extended tight binding (GFN2-xTB, Bannwarth et al. 2019), through tblite.

gap = e_LUMO - e_HOMO [eV],    dipole = |mu| [Debye],    formation = (E_mol - sum_atoms E_atom) in eV, of one geometry

The geometry is the Mol's own conformer where it has one, and otherwise one ETKDG conformer relaxed by MMFF94. It is not
relaxed any further. Charge and unpaired electrons are the graph's.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from envs.molecules.reward import MoleculeReward, canonical_geometry, geometry, need

if TYPE_CHECKING:
    from rdkit.Chem import Mol

METHODS = ("GFN2-xTB", "GFN1-xTB", "IPEA1-xTB")
BOHR = 0.529177210903  # Angstrom
HARTREE = 27.211386245988  # eV
E_BOHR = 2.541746473  # Debye
UNPAIRED = {1: 1, 2: 0, 3: 1, 4: 2, 5: 3, 6: 2, 7: 1, 8: 0}  # valence electrons -> unpaired ones, by Hund's rule
MAIN_GROUPS = ((1, 20), (31, 38), (49, 56), (81, 86))  # atomic numbers whose free atom UNPAIRED describes


@dataclass(frozen=True)
class Electrons:
    """What one self-consistent calculation says."""

    energy: float  # Hartree
    gap: float | None  # eV; None where no orbital is empty
    dipole: float  # Debye, about the centre of mass where the molecule is charged


@lru_cache(maxsize=1024)
def single_point(
    method: str, numbers: tuple[int, ...], positions: tuple[float, ...], charge: int, unpaired: int
) -> Electrons:
    """One calculation, positions in bohr, one after the other; kept, for several rewards of the same molecule."""
    calculator = need("tblite.interface", "xtb").Calculator(
        method, np.array(numbers), np.array(positions).reshape(-1, 3), charge=float(charge), uhf=unpaired
    )
    calculator.set("verbosity", 0)
    found = calculator.singlepoint()
    levels, occupied = found.get("orbital-energies"), found.get("orbital-occupations")
    empty = (round(float(occupied.sum())) + unpaired + 1) // 2  # lowest empty orbital
    gap = float(levels[empty] - levels[empty - 1]) * HARTREE if 0 < empty < len(levels) else None
    return Electrons(float(found.get("energy")), gap, float(np.linalg.norm(found.get("dipole"))) * E_BOHR)


def solve(mol: Mol, method: str) -> Electrons:
    """``single_point`` of a molecule with all its hydrogens and a conformer."""
    atoms = list(mol.GetAtoms())
    masses = np.array([atom.GetMass() for atom in atoms])
    xyz = mol.GetConformer().GetPositions() / BOHR
    if not np.isfinite(xyz).all():
        raise ValueError("a coordinate is not finite")
    xyz = xyz - masses @ xyz / masses.sum()
    return single_point(
        method,
        tuple(atom.GetAtomicNum() for atom in atoms),
        tuple(xyz.ravel().tolist()),
        sum(atom.GetFormalCharge() for atom in atoms),
        sum(atom.GetNumRadicalElectrons() for atom in atoms),
    )


@cache
def atom_energy(method: str, number: int) -> float:
    """A free, neutral atom in its ground state's multiplicity [Hartree]; main groups only."""
    if not any(low <= number <= high for low, high in MAIN_GROUPS):
        raise ValueError(f"no free-atom energy for element {number}; main groups only")
    valence = need("rdkit.Chem", "molecules").GetPeriodicTable().GetNOuterElecs(number)
    return single_point(method, (number,), (0.0, 0.0, 0.0), 0, UNPAIRED[valence]).energy


class ElectronicReward(MoleculeReward):
    """A score of one calculation. ``method`` is one of METHODS."""

    read: Callable[[Any], Any] = staticmethod(geometry)
    canonical: Callable[[Any], Any] = staticmethod(canonical_geometry)

    def __init__(self, method: str = "GFN2-xTB") -> None:
        super().__init__()
        need("tblite.interface", "xtb")
        if method not in METHODS:
            raise ValueError(f"no method {method!r}; there is {', '.join(METHODS)}")
        self.method = method

    @abstractmethod
    def score(self, mol: Mol) -> float | None: ...


class Gap(ElectronicReward):
    """HOMO-LUMO gap in eV: on QM9 smaller than B3LYP's (5.1 for 6.9), in nearly its order (rank correlation 0.93)."""

    def score(self, mol: Mol) -> float | None:
        return solve(mol, self.method).gap


class Dipole(ElectronicReward):
    """Length of the dipole moment in Debye."""

    def score(self, mol: Mol) -> float:
        return solve(mol, self.method).dipole


class FormationEnergy(ElectronicReward):
    """Energy of formation from free atoms in eV, without vibrations: LOWER is more strongly bound.

    xTB binds atoms too strongly (-108 eV for B3LYP's -76 on QM9, correlation 0.98): compare molecules, not methods.
    ``per_atom`` divides by the number of atoms, hydrogens included; without it, larger molecules are always lower.
    """

    def __init__(self, method: str = "GFN2-xTB", per_atom: bool = False) -> None:
        super().__init__(method)
        self.per_atom = per_atom

    def score(self, mol: Mol) -> float:
        free = sum(atom_energy(self.method, atom.GetAtomicNum()) for atom in mol.GetAtoms())
        found = (solve(mol, self.method).energy - free) * HARTREE
        return found / mol.GetNumAtoms() if self.per_atom else found
