"""One molecule at a time out of .xyz and .sdf text, and all at once out of EDM's .npz.

A record is a ``Molecule``, or ``Unreadable`` with the reason: one bad record never costs the others.
The published QM9 writes  1.2*^-6  for 1.2e-6; its comment line is  gdb <id> A B C mu ... Cv,  its line after the
frequencies is the SMILES string.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from envs.molecules.data import Molecule, Molecules
from envs.molecules.reward import parse

PERIODIC_TABLE = (
    "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Y Zr Nb "
    "Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au "
    "Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts "
    "Og"
)
SYMBOLS = PERIODIC_TABLE.split()
ATOMIC_NUMBERS = {symbol: number for number, symbol in enumerate(SYMBOLS, 1)}
QM9_PROPERTIES = ("A", "B", "C", "mu", "alpha", "homo", "lumo", "gap", "r2", "zpve", "U0", "U", "H", "G", "Cv")
QM9_TITLE = re.compile(r"(?:gdb|dsgdb9nsd)[_ ](\d+)\s*")


@dataclass(frozen=True)
class Unreadable:
    """A record that is no molecule: where, and with what it is the matter, as in 'left out: 3 with ...'."""

    label: str
    reason: str


Record = Molecule | Unreadable


def xyz(stream: BinaryIO, label: str) -> Iterator[Record]:
    """The frames of an .xyz file, the published QM9's included."""
    lines = stream.read().decode("utf-8-sig", "replace").replace("*^", "e").splitlines()
    at = frame = 0
    while at < len(lines):
        if not lines[at].strip():
            at += 1
            continue
        frame += 1
        where = label if frame == 1 else f"{label}, frame {frame}"
        count = lines[at].strip()
        if not count.isdecimal() or len(count) > 9:
            yield Unreadable(where, "no number of atoms in its first line")
            return
        end = at + 2 + int(count)
        gdb = _gdb(lines[at + 1 : at + 2])
        if len(lines) < end + (3 if gdb else 0):
            yield Unreadable(where, "fewer lines than it needs: it is cut off")
            return
        yield _frame(lines[at + 2 : end], where, gdb, lines[end + 1] if gdb else "")
        at = end + (3 if gdb else 0)
    if not frame:
        yield Unreadable(label, "nothing in the file")


def _gdb(comment: list[str]) -> Mapping[str, float]:
    """Id and properties of the published QM9; nothing where the comment is any other."""
    words = comment[0].split() if comment else []
    if len(words) != 2 + len(QM9_PROPERTIES) or words[0] != "gdb":
        return {}
    try:
        return dict(zip(("index", *QM9_PROPERTIES), map(float, words[1:]), strict=True))
    except ValueError:
        return {}


def _frame(lines: list[str], label: str, gdb: Mapping[str, float], smiles: str) -> Record:
    rows = [line.split(None, 4) for line in lines]
    numbers = []
    for row in rows:
        number = ATOMIC_NUMBERS.get(row[0].capitalize()) if row else None
        if number is None and row and row[0].isdecimal() and len(row[0]) < 10 and 0 < int(row[0]) <= len(SYMBOLS):
            number = int(row[0])
        if number is None:
            return Unreadable(label, f"an unknown element {row[0][:10]!r}" if row else "an empty line for an atom")
        numbers.append(number)
    try:
        positions = [(float(x), float(y), float(z)) for _, x, y, z, *_ in rows]
    except ValueError:
        return Unreadable(label, "an atom without three numbers for its place")
    properties = {name: gdb[name] for name in QM9_PROPERTIES if name in gdb}
    smiles = next(iter(smiles.split()), "")
    return Molecule(label, numbers, positions, smiles, int(gdb.get("index", -1)), properties)


def sdf(stream: BinaryIO, label: str) -> Iterator[Record]:
    """The records of an .sdf file, or the one of a .mol file, by RDKit; hydrogens are those that the file writes."""
    try:
        from rdkit import Chem, rdBase
    except ImportError as error:
        raise ValueError(f"{label} needs RDKit to be read, and {error}; pip install 'rayft[molecules]'") from error
    number = 0
    with rdBase.BlockLogs():
        for number, block in enumerate(_blocks(stream), 1):
            where = f"{label}, record {number}"
            try:
                mol = Chem.MolFromMolBlock(block, sanitize=False, removeHs=False)
            except (ValueError, RuntimeError):
                mol = None
            if mol is None or not (mol.GetNumConformers() or not mol.GetNumAtoms()):
                yield Unreadable(where, "a record that RDKit cannot read")
            else:
                yield _record(Chem, mol, block.partition("\n")[0], where)
    if not number:
        yield Unreadable(label, "nothing in the file")


def _blocks(stream: Iterable[bytes]) -> Iterator[str]:
    """The text between lines of $$$$. What follows the last of them counts if there is anything in it."""
    lines: list[str] = []
    for raw in stream:
        line = raw.decode("utf-8", "replace").rstrip("\r\n")
        if line.startswith("$$$$"):
            yield "\n".join(lines)
            lines = []
        else:
            lines.append(line)
    if any(line.strip() for line in lines):
        yield "\n".join(lines)


def _record(chem: Any, mol: Any, title: str, label: str) -> Record:
    numbers = [atom.GetAtomicNum() for atom in mol.GetAtoms()]
    if not numbers:
        return Molecule(label, [], [])
    if 0 in numbers:
        return Unreadable(label, f"an unknown element {mol.GetAtomWithIdx(numbers.index(0)).GetSymbol()[:10]!r}")
    if not mol.GetConformer().Is3D():
        return Unreadable(label, "a flat drawing and no geometry")
    graph, found = parse(mol), QM9_TITLE.fullmatch(title)
    smiles = "" if graph is None else chem.MolToSmiles(graph)
    return Molecule(label, numbers, mol.GetConformer().GetPositions(), smiles, int(found[1]) if found else -1)


def npz(file: BinaryIO, label: str) -> Molecules:
    """The file of EDM and Cormorant: num_atoms [N], charges [N, n], positions [N, n, 3], index [N], numbers [N].

    Nothing is unpickled. An atomic number outside 1..118 becomes 0.
    """
    what = "num_atoms [N], charges [N, n] and positions [N, n, 3]"
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        num_atoms, charges, positions = (arrays.pop(name) for name in ("num_atoms", "charges", "positions"))
    except KeyError as error:
        raise ValueError(f"{label} has no {error.args[0]!r}; EDM's and Cormorant's format has {what}") from None
    except (ValueError, AttributeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{label} is no whole .npz of plain numbers ({error}); get it or write it again") from None
    shape = (*num_atoms.shape, *charges.shape[1:])
    fits = num_atoms.ndim == 1 and charges.ndim == 2 and charges.shape == shape and positions.shape == (*shape, 3)
    for name, array in (("num_atoms", num_atoms), ("charges", charges), ("positions", positions)):
        if array.dtype.kind not in "iuf":
            raise ValueError(f"{label} has {name} of {array.dtype}; give real numbers")
    if not (num_atoms == np.trunc(num_atoms)).all():
        raise ValueError(f"{label} has num_atoms that are no whole numbers; give the atoms of each molecule")
    if not fits or (num_atoms < 0).any() or (num_atoms > charges.shape[1]).any():
        raise ValueError(
            f"{label} has num_atoms {num_atoms.shape} up to {num_atoms.max(initial=0)}, charges {charges.shape} and "
            f"positions {positions.shape}; EDM's and Cormorant's format has {what}"
        )
    atoms = charges[np.arange(charges.shape[1]) < num_atoms[:, None]]
    if not (atoms == np.trunc(atoms)).all():
        raise ValueError(f"{label} has charges that are no whole numbers; give the atomic number of each atom")
    return _unpadded(num_atoms, charges, positions, arrays)


def _unpadded(num_atoms: np.ndarray, charges: np.ndarray, positions: np.ndarray, others: dict[str, Any]) -> Molecules:
    mask = np.arange(charges.shape[1]) < num_atoms[:, None]
    numbers = charges[mask]
    known = (numbers >= 1) & (numbers <= len(SYMBOLS))
    with np.errstate(over="ignore"):
        places = positions[mask].astype(np.float32)
    index = others.pop("index", None)
    whole = isinstance(index, np.ndarray) and index.shape == num_atoms.shape and np.issubdtype(index.dtype, np.integer)
    properties = {
        name: column.astype(np.float64)
        for name, column in others.items()
        if column.shape == num_atoms.shape and column.dtype.kind in "fiu"
    }
    return Molecules(
        num_atoms.astype(np.int32),
        np.where(known, numbers, 0).astype(np.uint8),
        places,
        np.full(len(num_atoms), "", object),
        index.astype(np.int64) if whole else np.full(len(num_atoms), -1, np.int64),
        properties,
    )
