"""How good a set of generated molecules is, in the numbers that papers report.

validity = valid / all,   uniqueness = |{SMILES}| / valid,   novelty = |{SMILES} - training| / |{SMILES}|

``describe`` looks at each molecule by itself, ``summary`` adds up what it found. Valid is what ``decode`` gives: sane,
and one fragment. EDM (Hoogeboom et al. 2022) counts a sample whose largest fragment is sane; its numbers stand beside,
as ``edm_``. Two molecules are the same when their graphs are: stereo and the way hydrogens are written do not count.
QED and SA are those of the rewards.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from envs.molecules import bonds, decode
from envs.molecules.bonds import Atoms
from envs.molecules.reward import QED, SA, need, parse
from rayft.reward import itself

if TYPE_CHECKING:
    from rdkit.Chem import Mol

BITS = 2048  # of a Morgan fingerprint of radius 2
MAX_COMPARED = 5000  # molecules: all their pairs are 12.5 million, a second
KNOWN = 0.99  # of a training set's molecules, by their SMILES
BLOCK = 500  # rows of the similarity matrix held at once
Known = Collection[str] | np.ndarray | None  # a training set: its ``graph_smiles``, or their ``digests``


@dataclass(frozen=True)
class Rows:
    """What ``describe`` found, one entry per sample. "" and NaN stand where there is no molecule."""

    smiles: tuple[str, ...]
    edm_smiles: tuple[str, ...]  # of the largest fragment
    scaffolds: tuple[str, ...]  # Murcko's; "" also for a molecule without rings
    qed: np.ndarray
    sa: np.ndarray
    fingerprints: np.ndarray  # [B, BITS / 8] packed bits
    num_atoms: np.ndarray  # NaN where no geometry was given, like the next two
    atoms_stable: np.ndarray
    stable: np.ndarray

    def __len__(self) -> int:
        return len(self.smiles)


@dataclass(frozen=True)
class Entry:
    """One line of a report. ``better`` is "higher" or "lower", ``count`` how many things it is taken over."""

    name: str
    value: float
    better: str
    count: int


def _line(name: str, count: str, better: str = "higher") -> Any:
    """A number that a report shows."""
    return field(metadata={"name": name, "count": count, "better": better})


@dataclass(frozen=True)
class Summary:
    """All numbers of a set. NaN where there is nothing to count: no geometry, no valid molecule, no training set."""

    num_samples: int
    num_judged: int  # samples whose geometry was given
    num_atoms: int
    num_valid: int
    num_unique: int
    num_edm_valid: int
    num_compared: int
    smiles: tuple[str, ...]  # one per sample, "" where it is invalid
    atom_stability: float = _line("atom stability", "num_atoms")
    molecule_stability: float = _line("molecule stability", "num_judged")
    validity: float = _line("validity", "num_samples")
    uniqueness: float = _line("uniqueness of valid", "num_valid")
    unique_and_valid: float = _line("unique and valid", "num_samples")
    novelty: float = _line("novelty of unique", "num_unique")
    edm_validity: float = _line("validity, largest fragment", "num_samples")
    edm_uniqueness: float = _line("uniqueness, largest fragment", "num_edm_valid")
    edm_unique_and_valid: float = _line("unique and valid, largest fragment", "num_samples")
    qed: float = _line("QED of valid", "num_valid")
    qed_of_all: float = _line("QED, invalid as 0", "num_samples")
    sa: float = _line("SA of valid, raw 1..10", "num_valid", "lower")
    synth: float = _line("synth = (10 - SA) / 9 of valid", "num_valid")
    num_scaffolds: int = _line("Murcko scaffolds of valid", "num_valid")
    diversity: float = _line("internal diversity of valid", "num_compared")

    def table(self) -> list[Entry]:
        """The report's lines."""
        told = [(each.name, each.metadata) for each in fields(self) if each.metadata]
        return [Entry(m["name"], getattr(self, key), m["better"], getattr(self, m["count"])) for key, m in told]

    def __str__(self) -> str:
        return "\n".join(f"{e.name:<36}{e.value:>12.4f}  {e.better:<8}{e.count:>9,}" for e in self.table())


def summarise(samples: Sequence[Any], atoms: Atoms | None = None, known: Known = None) -> Summary:
    """``summary(describe(...))``: a set that fits one process."""
    return summary(describe(samples, atoms), known)


# -- one molecule at a time


def describe(samples: Sequence[Any], atoms: Atoms | None = None) -> Rows:
    """Samples as ``decode`` gives them, or SMILES. ``atoms`` are what they were decoded from.

    Without ``atoms`` a None is invalid for EDM too, and nothing is said of stability. Nor is it where a model draws the
    bond orders itself: EDM's stability is of bonds read off distances, with all hydrogens.
    """
    if atoms is not None and len(atoms) != len(samples):
        raise ValueError(f"{len(samples)} samples and the atoms of {len(atoms)}; give those they were decoded from")
    with need("rdkit.rdBase", "molecules").BlockLogs():
        found = [_whole(sample) for sample in samples]
        graphs = [None if mol is None else _graph(mol) for mol in found]
        smiles = [_smiles(graph) for graph in graphs]
        lenient = list(smiles)
        for i, sample in _fragmented(samples, smiles, atoms):
            lenient[i] = _smiles(_graph(_largest(sample)))
        scaffolds = [_scaffold(graph) for graph in graphs]
        prints = [_fingerprint(graph) for graph in graphs]
    qed, sa = ([np.nan if value is None else value for value in score(found)] for score in _scores())
    packed = np.array(prints, dtype=np.uint8).reshape(len(samples), BITS // 8)
    strings = tuple(smiles), tuple(lenient), tuple(scaffolds)
    return Rows(*strings, np.array(qed, float), np.array(sa, float), packed, *_stability(len(samples), atoms))


def graph_smiles(sample: Any) -> str:
    """The SMILES by which molecules are told apart here, without stereo; "" where there is none."""
    with need("rdkit.rdBase", "molecules").BlockLogs():
        return _smiles(_graph(parse(sample)))


def digests(smiles: Iterable[str]) -> np.ndarray:
    """Sorted 8-byte digests of a training set's ``graph_smiles``: ``known`` for a large set, in 8 bytes a molecule."""
    found = [hashlib.blake2b(one.encode(), digest_size=8).digest() for one in smiles]
    return np.unique(np.frombuffer(b"".join(found), dtype=np.uint64))


def training_set(smiles: Iterable[str]) -> np.ndarray:
    """``known`` for novelty, of a training set's SMILES; refused where too few are known, as all would look new."""
    found = [graph_smiles(one) for one in smiles]
    num_read = sum(map(bool, found))
    if num_read < KNOWN * len(found):
        raise ValueError(
            f"{num_read:,} of {len(found):,} training molecules have a SMILES, and novelty needs {KNOWN:.0%}; "
            "EDM's .npz has none: delete qm9_v1.arrow in $RAYFT_DATA (or ~/.cache/rayft), and make it of qm9pack"
        )
    return digests(filter(None, found))


def _whole(sample: Any) -> Mol | None:
    """As the rewards read it, where it is one fragment."""
    mol = parse(sample)
    return mol if mol is not None and len(need("rdkit.Chem", "molecules").GetMolFrags(mol)) == 1 else None


def _fragmented(samples: Sequence[Any], smiles: Sequence[str], atoms: Atoms | None) -> Iterable[tuple[int, Any]]:
    """The invalid samples that may be valid for EDM, and their molecules."""
    left = [i for i, found in enumerate(smiles) if not found]
    yield from ((i, samples[i]) for i in left if samples[i] is not None)
    if atoms is not None:
        orders, finite = atoms.orders(), decode.finite(atoms)
        yield from ((i, decode.row(atoms, orders, i)) for i in left if samples[i] is None and finite[i])


def _largest(sample: Any) -> Mol | None:
    """As the rewards read it, the fragment with most atoms; hydrogens count where they are atoms of the sample."""
    chem = need("rdkit.Chem", "molecules")
    mol = parse(sample) if isinstance(sample, str) else sample
    if not isinstance(mol, chem.Mol):
        return None
    parts = chem.GetMolFrags(mol, asMols=True, sanitizeFrags=False)
    return parse(max(parts, key=lambda part: part.GetNumAtoms(), default=None))


def _graph(mol: Mol | None) -> Mol | None:
    """Without stereo, and so also without the hydrogens that RDKit keeps because they define it."""
    if mol is None:
        return None
    chem = need("rdkit.Chem", "molecules")
    chem.RemoveStereochemistry(graph := chem.Mol(mol))
    return chem.RemoveHs(graph)


def _smiles(graph: Mol | None) -> str:
    return "" if graph is None else need("rdkit.Chem", "molecules").MolToSmiles(graph)


def _scaffold(graph: Mol | None) -> str:
    found = need("rdkit.Chem.Scaffolds.MurckoScaffold", "molecules").MurckoScaffoldSmiles
    return "" if graph is None else found(mol=graph)


def _fingerprint(graph: Mol | None) -> np.ndarray:
    return np.zeros(BITS // 8, np.uint8) if graph is None else np.packbits(_morgan().GetFingerprintAsNumPy(graph))


def _stability(num_samples: int, atoms: Atoms | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if atoms is None or atoms.given is not None:
        nothing = np.full(num_samples, np.nan)
        return nothing, nothing, nothing
    stable, atoms_stable = bonds.stability(atoms.positions, atoms.numbers, atoms.mask)
    return atoms.mask.sum(-1).astype(float), atoms_stable.astype(float), stable.astype(float)


@cache
def _scores() -> tuple[QED, SA]:
    """The rewards, given molecules that are read already."""
    qed, sa = QED(), SA()
    qed.read = sa.read = itself
    return qed, sa


@cache
def _morgan() -> Any:
    return need("rdkit.Chem.rdFingerprintGenerator", "molecules").GetMorganGenerator(radius=2, fpSize=BITS)


# -- the set


def summary(rows: Rows, known: Known = None) -> Summary:
    """The numbers of a set."""
    valid = np.array([bool(smiles) for smiles in rows.smiles], dtype=bool)
    unique, edm = set(rows.smiles) - {""}, [smiles for smiles in rows.edm_smiles if smiles]
    judged = np.isfinite(rows.stable)
    num_atoms, num_valid, num_samples = int(np.nansum(rows.num_atoms)), int(valid.sum()), len(rows)
    sa = _mean(rows.sa[valid])
    return Summary(
        num_samples=num_samples,
        num_judged=int(judged.sum()),
        num_atoms=num_atoms,
        num_valid=num_valid,
        num_unique=len(unique),
        num_edm_valid=len(edm),
        num_compared=min(num_valid, MAX_COMPARED),
        atom_stability=_share(np.nansum(rows.atoms_stable), num_atoms),
        molecule_stability=_mean(rows.stable),
        validity=_share(num_valid, num_samples),
        uniqueness=_share(len(unique), num_valid),
        unique_and_valid=_share(len(unique), num_samples),
        novelty=math.nan if known is None else 1.0 - _share(_num_known(unique, known), len(unique)),
        edm_validity=_share(len(edm), num_samples),
        edm_uniqueness=_share(len(set(edm)), len(edm)),
        edm_unique_and_valid=_share(len(set(edm)), num_samples),
        qed=_mean(rows.qed[valid]),
        qed_of_all=_share(np.nansum(rows.qed), num_samples),
        sa=sa,
        synth=(10.0 - sa) / 9.0,
        num_scaffolds=len(set(rows.scaffolds) - {""}),
        diversity=diversity(rows.fingerprints[valid]),
        smiles=rows.smiles,
    )


def diversity(fingerprints: np.ndarray, seed: int = 0) -> float:
    """1 - mean Tanimoto over all pairs of different rows [n, bytes], a copy of a molecule being another row.

    Exact up to MAX_COMPARED rows; of more, over the pairs of so many drawn with ``seed``.
    """
    if len(fingerprints) > MAX_COMPARED:
        kept = np.random.default_rng(seed).choice(len(fingerprints), MAX_COMPARED, replace=False)
        fingerprints = fingerprints[np.sort(kept)]
    if len(fingerprints) < 2:
        return math.nan
    bits = np.unpackbits(fingerprints, axis=1)
    bits = bits[:, bits.any(0)].astype(np.float32)
    size, total = bits.sum(1), 0.0
    for start in range(0, len(bits), BLOCK):
        common = bits[start : start + BLOCK] @ bits[start:].T
        alike = common / np.maximum(size[start : start + BLOCK, None] + size[None, start:] - common, 1.0)
        total += 2.0 * alike[:, BLOCK:].sum(dtype=np.float64) + alike[:, :BLOCK].sum(dtype=np.float64)
        total -= np.trace(alike, dtype=np.float64)
    return 1.0 - total / (len(bits) * (len(bits) - 1))


def _num_known(smiles: Collection[str], known: Collection[str] | np.ndarray) -> int:
    if isinstance(known, np.ndarray):
        return int(np.isin(digests(smiles), known).sum())
    return sum(one in known for one in smiles)


def _share(part: float, whole: int) -> float:
    return float(part) / whole if whole else math.nan


def _mean(values: np.ndarray) -> float:
    found = values[np.isfinite(values)]
    return float(found.mean()) if len(found) else math.nan
