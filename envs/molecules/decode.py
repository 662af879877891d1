"""What the rewards of molecules are given: an RDKit Mol with its geometry, or None where there is no molecule.

sample = Mol  iff  finite, no two atoms on one spot, RDKit sanitises the graph, and the graph is one fragment

That is stricter than the validity EDM counts, which takes the largest of several fragments (``metrics`` has both). As
there, RDKit fills open valences of the graph with implicit hydrogens: a sample may lack hydrogens and still be valid.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from envs.molecules.bonds import BLOCK, Atoms, squared_distances
from envs.molecules.reward import need

if TYPE_CHECKING:
    from rdkit.Chem import Mol

ELEMENTS = np.array([1, 6, 7, 8, 9])  # H C N O F, the one-hot order of QM9 models
COINCIDENT = 0.3  # Angstrom: no two nuclei of a molecule are nearer, H2 has 0.74


def full(x_0: np.ndarray, context: Mapping[str, np.ndarray]) -> list[Mol | None]:
    """One sanitised Mol with all atoms and one conformer per event, or None; bonds are read off distances.

    Never an exception, whatever the values are. Coordinates are float32, which is what a pickled Mol keeps.
    """
    return molecules(atoms(x_0, context))


def heavy(x_0: np.ndarray, context: Mapping[str, np.ndarray]) -> list[Mol | None]:
    """The same for a model of heavy atoms, [B, n, 3 + 4] of C N O F: hydrogens are implicit where valences are open."""
    return molecules(atoms(x_0, context, ELEMENTS[1:]))


def atoms(x_0: np.ndarray, context: Mapping[str, np.ndarray], elements: np.ndarray = ELEMENTS) -> Atoms:
    """Events [B, n, 3 + elements] of coordinates in Angstrom and scores; one more column, EDM's charge, adds nothing.

    Where ``context["angstrom"]`` [B] is given, coordinates are multiples of it. An atom whose scores are not finite
    gets no place: its position is NaN.
    """
    x_0, mask = np.asarray(x_0), np.asarray(context["mask"])
    width = 3 + len(elements)
    if x_0.ndim != 3 or x_0.shape[-1] not in (width, width + 1) or mask.shape != x_0.shape[:2]:
        raise ValueError(
            f"events are {x_0.shape} and their mask is {mask.shape}; give [batch, atoms, {width}] (or {width + 1}, "
            "with a charge) and [batch, atoms]"
        )
    scores = x_0[..., 3:width]
    unit = np.asarray(context["angstrom"])[:, None, None] if "angstrom" in context else 1
    with np.errstate(over="ignore", invalid="ignore"):
        positions = (x_0[..., :3] * unit).astype(np.float32)
    known = np.isfinite(scores).all(-1, keepdims=True)
    return Atoms(np.where(known, positions, np.float32("nan")), elements[scores.argmax(-1)], mask.astype(bool))


def molecules(atoms: Atoms) -> list[Mol | None]:
    """The sample of each row."""
    orders, sane = atoms.orders(), finite(atoms) & apart(atoms)
    with need("rdkit.rdBase", "molecules").BlockLogs():
        return [_one_fragment(row(atoms, orders, i)) if sane[i] else None for i in range(len(atoms))]


def row(atoms: Atoms, orders: np.ndarray, i: int) -> Mol | None:
    """Molecule i of a batch, sanitised, in one fragment or more."""
    real = np.flatnonzero(atoms.mask[i])
    return sanitised(build(atoms.numbers[i, real], atoms.positions[i, real], orders[i][np.ix_(real, real)]))


def finite(atoms: Atoms) -> np.ndarray:
    """[B]: there are atoms, and each has a place."""
    placed = np.isfinite(atoms.positions).all(-1) | ~atoms.mask
    return np.logical_and(placed.all(-1), atoms.mask.any(-1))


def apart(atoms: Atoms) -> np.ndarray:
    """[B]: no two atoms are on one spot."""
    found, num_atoms = np.zeros(len(atoms), dtype=bool), atoms.mask.sum(-1)
    for start in range(0, len(atoms), BLOCK):
        part = slice(start, start + BLOCK)
        near = squared_distances(atoms.positions[part]) < COINCIDENT**2
        near &= atoms.mask[part, :, None] & atoms.mask[part, None, :]
        found[part] = near.sum((1, 2)) == num_atoms[part]  # each atom is near itself
    return found


def build(numbers: np.ndarray, positions: np.ndarray, orders: np.ndarray) -> Mol:
    """A graph with one conformer, not sanitised; orders [n, n] of 0..3. Hydrogens that are no atoms are implicit."""
    chem = need("rdkit.Chem", "molecules")
    mol, types = chem.RWMol(), chem.BondType.values
    for number in numbers.tolist():
        mol.AddAtom(_atom(number))
    first, second = np.nonzero(np.triu(orders, 1))
    for i, j, k in zip(first.tolist(), second.tolist(), orders[first, second].tolist(), strict=True):
        mol.AddBond(i, j, types[k])
    conformer = chem.Conformer(len(numbers))
    conformer.SetPositions(positions.astype(np.float64))
    mol.AddConformer(conformer)
    return mol.GetMol()


def sanitised(mol: Mol) -> Mol | None:
    """The same molecule with valences and aromaticity worked out, or None where RDKit refuses."""
    chem = need("rdkit.Chem", "molecules")
    return mol if chem.SanitizeMol(mol, catchErrors=True) == chem.SanitizeFlags.SANITIZE_NONE else None


def _one_fragment(mol: Mol | None) -> Mol | None:
    return mol if mol is not None and len(need("rdkit.Chem", "molecules").GetMolFrags(mol)) == 1 else None


@cache
def _atom(number: int) -> Any:
    """RDKit copies it into each molecule."""
    return need("rdkit.Chem", "molecules").Atom(number)
