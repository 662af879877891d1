"""Is a geometry one that a molecule can have? The checks of PoseBusters (Buttenschoen et al. 2024) on one molecule.

(1 - tolerance) lower_ij <= d_ij <= (1 + tolerance) upper_ij,    with the bounds of RDKit's distance geometry

Bonds are the pairs 1-2, angles the pairs 1-3. All others clash where they are nearer than 0.7 of the lower bound and of
the sum of their van der Waals radii: a bound above that sum is a guess at a torsion, which one molecule of QM9 in forty
does not follow. Flat is what has no atom more than 0.25 Angstrom off its plane. Hydrogens are looked at where
they are atoms of the molecule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from envs.molecules.reward import need

if TYPE_CHECKING:
    from rdkit.Chem import Mol

CHECKS = ("bond_lengths", "bond_angles", "no_clash", "flat_rings", "flat_double_bonds")
TOLERANCE = 0.25  # of a bound, for bonds and angles
CLASH_TOLERANCE = 0.3  # of the lower bound, of atoms further apart in the graph
FLAT = 0.25  # Angstrom off the plane
FAR = 1e6  # Angstrom from the origin: float32 tells no bond lengths there
RING_SIZES = (5, 6)
DOUBLE_BOND = "[C;X3;^2]=[C;X3;^2]"  # of two carbons, not aromatic


@dataclass(frozen=True)
class Verdict:
    """``passed`` is None where nothing can be said; ``reason`` is then why, and of a failure the worst place."""

    passed: bool | None
    reason: str = ""


@dataclass(frozen=True)
class Shared:
    """How many of those that one check could judge have passed it."""

    name: str
    passed: int
    judged: int


def check(mol: Mol | None) -> dict[str, Verdict]:
    """A verdict for each of CHECKS, of the first conformer. Never an exception."""
    chem = need("rdkit.Chem", "molecules")
    if mol is None or not mol.GetNumAtoms():
        return _unknown("not a molecule")
    if not mol.GetNumConformers() or not mol.GetConformer().Is3D():
        return _unknown("no geometry")
    xyz = mol.GetConformer().GetPositions()
    if not (np.abs(xyz) < FAR).all():
        return {name: Verdict(False, "a coordinate is not finite, or out of all reach") for name in CHECKS}
    mol = chem.Mol(mol)
    with need("rdkit.rdBase", "molecules").BlockLogs():
        if chem.SanitizeMol(mol, catchErrors=True) != chem.SanitizeFlags.SANITIZE_NONE:
            return _unknown("valences that RDKit refuses")
        return {**_distances(mol, xyz), **_flatness(mol, xyz)}


def shares(verdicts: Sequence[dict[str, Verdict]]) -> list[Shared]:
    """Per check, over many molecules; the last line, ``all``, has those that pass every check."""
    columns = {name: [each[name].passed for each in verdicts] for name in CHECKS}
    columns["all"] = [all(found) if None not in found else None for found in zip(*columns.values(), strict=True)]
    return [
        Shared(name, sum(found is True for found in column), sum(found is not None for found in column))
        for name, column in columns.items()
    ]


def _unknown(reason: str) -> dict[str, Verdict]:
    return {name: Verdict(None, reason) for name in CHECKS}


# -- distances


def _distances(mol: Mol, xyz: np.ndarray) -> dict[str, Verdict]:
    """All pairs at once: d / bound per pair, and how far apart in the graph they are."""
    geom, chem = need("rdkit.Chem.rdDistGeom", "molecules"), need("rdkit.Chem", "molecules")
    names, table = CHECKS[:3], chem.GetPeriodicTable()
    radii = np.array([table.GetRvdw(atom.GetAtomicNum()) for atom in mol.GetAtoms()])
    if len(xyz) < 2:
        return {name: Verdict(True) for name in names}
    try:
        bounds = geom.GetMoleculeBoundsMatrix(mol, set15bounds=True, scaleVDW=True)
    except (ValueError, RuntimeError) as error:
        return {name: Verdict(None, f"no bounds: {error}") for name in names}
    first, second = np.triu_indices(len(xyz), 1)
    upper, lower = bounds[first, second], bounds[second, first]
    steps = chem.GetDistanceMatrix(mol)[first, second]
    lower = np.where(steps > 2, np.minimum(lower, radii[first] + radii[second]), lower)
    distance = np.linalg.norm(xyz[first] - xyz[second], axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):  # a wildcard atom has no size
        near, far = 1.0 - distance / lower, distance / upper - 1.0
    kinds = (
        (steps == 1, np.maximum(near, far), TOLERANCE, "bond"),
        (steps == 2, np.maximum(near, far), TOLERANCE, "angle"),
        (steps > 2, near, CLASH_TOLERANCE, "pair"),
    )
    found = {}
    for name, (pairs, off, tolerance, what) in zip(names, kinds, strict=True):
        worst = int(np.where(pairs, off, -np.inf).argmax())
        passed = not pairs.any() or bool(off[worst] <= tolerance)
        atoms = f"{_atom(mol, int(first[worst]))}-{_atom(mol, int(second[worst]))}"
        told = f"{what} {atoms}: {distance[worst]:.2f} A, bounds {lower[worst]:.2f} and {upper[worst]:.2f} A"
        found[name] = Verdict(passed, "" if passed else told)
    return found


def _atom(mol: Mol, index: int) -> str:
    return f"{mol.GetAtomWithIdx(index).GetSymbol()}{index}"


# -- planes


def _flatness(mol: Mol, xyz: np.ndarray) -> dict[str, Verdict]:
    aromatic = [bond.GetIdx() for bond in mol.GetBonds() if bond.GetIsAromatic()]
    info, rings = mol.GetRingInfo(), []
    if aromatic:
        kept = set(aromatic)
        pairs = zip(info.AtomRings(), info.BondRings(), strict=True)
        rings = [atoms for atoms, bonds in pairs if len(atoms) in RING_SIZES and kept.issuperset(bonds)]
    groups = [
        {i, j, *(n.GetIdx() for k in (i, j) for n in mol.GetAtomWithIdx(k).GetNeighbors())}
        for i, j in mol.GetSubstructMatches(_double_bond())
    ]
    return {"flat_rings": _flat(mol, xyz, rings, "ring"), "flat_double_bonds": _flat(mol, xyz, groups, "double bond")}


def _flat(mol: Mol, xyz: np.ndarray, groups: Sequence[Any], what: str) -> Verdict:
    groups = [sorted(group) for group in groups if len(group) > 3]  # three points are always in one plane
    if not groups:
        return Verdict(True)
    off = off_plane(xyz, groups)
    worst = int(off.argmax())
    if off[worst] <= FLAT:
        return Verdict(True)
    return Verdict(
        False, f"{what} of {'-'.join(_atom(mol, i) for i in groups[worst])}: {off[worst]:.2f} A off its plane"
    )


def off_plane(xyz: np.ndarray, groups: Sequence[Sequence[int]]) -> np.ndarray:
    """Per group of points, the farthest from the plane that fits them best (least squares)."""
    size = np.array([len(group) for group in groups])
    real = np.arange(size.max()) < size[:, None]
    points = np.zeros((*real.shape, 3))
    points[real] = xyz[np.concatenate([np.asarray(group) for group in groups])]
    points -= points.sum(1, keepdims=True) / size[:, None, None]
    points *= real[..., None]  # a point at the centre is in every plane
    _, vectors = np.linalg.eigh(points.transpose(0, 2, 1) @ points)
    return np.abs(points @ vectors[:, :, :1]).max((1, 2))


@cache
def _double_bond() -> Any:
    return need("rdkit.Chem", "molecules").MolFromSmarts(DOUBLE_BOND)
