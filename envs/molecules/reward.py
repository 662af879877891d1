"""Rewards of a molecule's graph, by RDKit. A sample is a SMILES string or an RDKit Mol.

r = f(canonical molecule): hydrogens are implicit, so a string, a Mol and a Mol with hydrogens and a geometry agree

What cannot be read as a molecule has failed: its score is None, never 0, and the others keep theirs. RDKit is imported
when a reward is built. Rewards of a geometry are in ``quantum``, docking is in ``docking``.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rayft.reward import Reward

if TYPE_CHECKING:
    from rdkit.Chem import Mol

SEED = 7  # of every geometry that is made up from a graph
DECIMALS = 3  # of a coordinate in Angstrom that count when two geometries are told apart
FINGERPRINTS = ("morgan", "rdkit", "atom_pair", "torsion")

logger = logging.getLogger(__name__)


def need(module: str, extra: str) -> Any:
    """An optional module, or a sentence that says which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"this reward needs {module}, and {error}; pip install 'rayft[{extra}]'") from error


# -- what a sample is


def parse(sample: Any) -> Mol | None:
    """The molecule with implicit hydrogens and sane valences, or None. A geometry, where there is one, says the stereo.

    A string is one SMILES and nothing else: RDKit alone would read "C CO" as methane with a name.
    """
    chem = need("rdkit.Chem", "molecules")
    if isinstance(sample, str):
        mol = None if len(sample.split()) != 1 else chem.MolFromSmiles(sample.strip())
    elif isinstance(sample, chem.Mol):
        mol = chem.Mol(sample)
        try:
            chem.SanitizeMol(mol)
            if _has_geometry(mol):
                chem.AssignStereochemistryFrom3D(mol)
            mol = chem.RemoveHs(mol, _all_hydrogens())
        except (ValueError, RuntimeError):
            return None
    else:
        mol = None
    return mol if mol is not None and mol.GetNumAtoms() else None


def canonical(sample: Any) -> str:
    """Canonical SMILES: all that a graph's reward depends on. What is no molecule stands for itself."""
    with _quiet():
        mol = parse(sample)
        if mol is not None:
            return need("rdkit.Chem", "molecules").MolToSmiles(mol)
    return sample if isinstance(sample, str) else f"unreadable {type(sample).__name__}"


def canonical_geometry(sample: Any) -> str:
    """Canonical SMILES, and a digest of elements and coordinates where the sample has some.

    Atoms count in any order, coordinates to 0.001 Angstrom; a turned or shifted molecule is another one.
    """
    smiles = canonical(sample)
    with _quiet():
        if not _has_geometry(sample) or parse(sample) is None:
            return smiles
        mol = geometry(sample)
    xyz = np.round(mol.GetConformer().GetPositions(), DECIMALS) + 0.0  # -0.0 is 0.0
    rows = sorted((atom.GetAtomicNum(), *row) for atom, row in zip(mol.GetAtoms(), xyz.tolist(), strict=True))
    return f"{smiles} {hashlib.blake2b(repr(rows).encode(), digest_size=16).hexdigest()}"


def geometry(sample: Any) -> Mol:
    """The molecule with all hydrogens and one conformer: the sample's own first one, else ``embed``.

    Read only: embedded molecules are shared. ``ValueError`` where there is no molecule or no geometry.
    """
    chem = need("rdkit.Chem", "molecules")
    if _has_geometry(sample):
        mol = chem.Mol(sample)
        chem.SanitizeMol(mol)
        return chem.AddHs(mol, addCoords=True)
    mol = parse(sample)
    if mol is None:
        raise ValueError("not a molecule")
    return embed(chem.MolToSmiles(mol))


@lru_cache(maxsize=1024)
def embed(smiles: str) -> Mol:
    """One conformer by ETKDG (Riniker and Landrum 2015) with a fixed seed, relaxed by MMFF94, else by UFF.

    From canonical SMILES the same molecule gets the same geometry in whatever order its atoms came.
    """
    chem, geom = need("rdkit.Chem", "molecules"), need("rdkit.Chem.rdDistGeom", "molecules")
    fields = need("rdkit.Chem.rdForceFieldHelpers", "molecules")
    mol = chem.AddHs(chem.MolFromSmiles(smiles))
    if len(chem.GetMolFrags(mol)) > 1:
        raise ValueError(f"{smiles} is several molecules, and nothing says how they lie")
    how = geom.ETKDGv3()
    how.randomSeed = SEED
    if geom.EmbedMolecule(mol, how) < 0:
        how.useRandomCoords = True
        if geom.EmbedMolecule(mol, how) < 0:
            raise ValueError(f"no geometry found for {smiles}")
    if fields.MMFFHasAllMoleculeParams(mol):
        fields.MMFFOptimizeMolecule(mol, maxIters=1000)
    elif fields.UFFHasAllMoleculeParams(mol):
        fields.UFFOptimizeMolecule(mol, maxIters=1000)
    return mol


@cache
def _all_hydrogens() -> Any:
    """Also those that say on which side of an imine they are: its SMILES, and so its SA, should not depend on them."""
    found = need("rdkit.Chem", "molecules").RemoveHsParameters()
    found.removeDefiningBondStereo = True
    return found


def _has_geometry(mol: Any) -> bool:
    if not isinstance(mol, need("rdkit.Chem", "molecules").Mol) or not mol.GetNumConformers():
        return False
    return mol.GetConformer().Is3D()


def _quiet() -> Any:
    """RDKit says nothing inside: a generator's failures are counted, not printed."""
    return need("rdkit.rdBase", "molecules").BlockLogs()


# -- rewards


class MoleculeReward(Reward):
    """A score of one molecule at a time. Whatever goes wrong with one is None for that one alone."""

    version = "1"
    read: Callable[[Any], Any] = staticmethod(parse)
    """Sample -> what ``score`` takes; None, or an exception, where there is nothing to score."""
    canonical: Callable[[Any], Any] = staticmethod(canonical)

    def __init__(self) -> None:
        need("rdkit.Chem", "molecules")

    @abstractmethod
    def score(self, mol: Mol) -> float | None:
        """The molecule's number; None or an exception where it has none."""

    def __call__(self, samples: Sequence[Any]) -> list[float | None]:
        with _quiet():
            return [self._score(sample) for sample in samples]

    def _score(self, sample: Any) -> float | None:
        try:
            mol = self.read(sample)
            found = None if mol is None else self.score(mol)
        except Exception as error:  # RDKit, xtb and Vina each raise their own
            logger.debug("%s failed on a sample: %s", type(self).__name__, error)
            return None
        return None if found is None or not math.isfinite(found) else float(found)


class Descriptor(MoleculeReward):
    """A number that one function of RDKit gives."""

    function: tuple[str, str]
    """Module and name."""

    def __init__(self) -> None:
        super().__init__()
        module, name = self.function
        self.calculate = getattr(need(module, "molecules"), name)

    def score(self, mol: Mol) -> float:
        return self.calculate(mol)


class QED(Descriptor):
    """Drug-likeness in 0..1 (Bickerton et al. 2012): weighted geometric mean of eight desirabilities, mean weights."""

    function = "rdkit.Chem.QED", "qed"


class SA(MoleculeReward):
    """Synthetic accessibility (Ertl and Schuffenhauer 2009), raw: 1 easy .. 10 hard. LOWER is easier; see ``Synth``."""

    undecodable = 10.0

    def __init__(self) -> None:
        super().__init__()
        self.calculate = _sascorer().calculateScore

    def score(self, mol: Mol) -> float:
        return self.calculate(mol)


class Synth(SA):
    """(10 - SA) / 9: 1 easy .. 0 hard to make."""

    undecodable = 0.0

    def score(self, mol: Mol) -> float:
        return (10.0 - super().score(mol)) / 9.0


@cache
def _sascorer() -> Any:
    """RDKit's Contrib module; it is no part of RDKit's package everywhere, so it is loaded from its file."""
    path = Path(need("rdkit.RDConfig", "molecules").RDContribDir) / "SA_Score" / "sascorer.py"
    spec = importlib.util.spec_from_file_location("rdkit_sascorer", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ValueError(f"this RDKit comes without {path}; take the one of pip install 'rayft[molecules]'")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class LogP(Descriptor):
    """Octanol-water log P (Wildman and Crippen 1999), the raw number."""

    function = "rdkit.Chem.Crippen", "MolLogP"


class Weight(Descriptor):
    """Average molecular weight in g/mol, hydrogens included, the raw number."""

    function = "rdkit.Chem.Descriptors", "MolWt"


class Lipinski(MoleculeReward):
    """The rule of five (Lipinski et al. 1997): weight <= 500, log P <= 5, N-H and O-H <= 5, N and O <= 10.

    The share of the four that are met; with ``allowed`` (the paper: 1), 1 if at most so many are broken and 0 if more.
    """

    def __init__(self, allowed: int | None = None) -> None:
        super().__init__()
        if allowed is not None and (isinstance(allowed, bool) or allowed not in range(4)):
            raise ValueError(
                f"allowed is {allowed!r}; give 0 to 3 broken rules, or leave it out for the share of rules met"
            )
        self.allowed = allowed
        self.weight = need("rdkit.Chem.Descriptors", "molecules").MolWt
        self.logp = need("rdkit.Chem.Crippen", "molecules").MolLogP
        self.counts = need("rdkit.Chem.rdMolDescriptors", "molecules")

    def score(self, mol: Mol) -> float:
        donors, acceptors = self.counts.CalcNumLipinskiHBD(mol), self.counts.CalcNumLipinskiHBA(mol)
        broken = (self.weight(mol) > 500) + (self.logp(mol) > 5) + (donors > 5) + (acceptors > 10)
        return 1.0 - broken / 4 if self.allowed is None else float(broken <= self.allowed)


class Similarity(MoleculeReward):
    """Tanimoto |a & b| / |a | b| of bit fingerprints with the nearest of the references, in 0..1.

    ``fingerprint`` is one of FINGERPRINTS, ``radius`` is morgan's (2 is ECFP4), ``bits`` its length.
    """

    def __init__(
        self,
        reference: str | Sequence[str],
        fingerprint: str = "morgan",
        radius: int = 2,
        bits: int = 2048,
        chirality: bool = False,
    ) -> None:
        super().__init__()
        chem, made = need("rdkit.Chem", "molecules"), need("rdkit.Chem.rdFingerprintGenerator", "molecules")
        references = [reference] if isinstance(reference, str | chem.Mol) else list(reference)
        for name, value, least in (("radius", radius, 0), ("bits", bits, 8)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}; a fingerprint needs a whole number of at least {least}")
        if fingerprint not in FINGERPRINTS:
            raise ValueError(f"no fingerprint {fingerprint!r}; there is {', '.join(FINGERPRINTS)}")
        generators = {
            "morgan": lambda: made.GetMorganGenerator(radius=radius, fpSize=bits, includeChirality=chirality),
            "rdkit": lambda: made.GetRDKitFPGenerator(fpSize=bits),
            "atom_pair": lambda: made.GetAtomPairGenerator(fpSize=bits, includeChirality=chirality),
            "torsion": lambda: made.GetTopologicalTorsionGenerator(fpSize=bits, includeChirality=chirality),
        }
        self.fingerprint = generators[fingerprint]().GetFingerprint
        self.nearest = need("rdkit.DataStructs", "molecules").BulkTanimotoSimilarity
        with _quiet():
            found = [(one, parse(one)) for one in references]
        unread = [one for one, mol in found if mol is None]
        if unread or not found:
            raise ValueError(
                f"reference {unread[0] if unread else references!r} is no SMILES; give one or a list of them"
            )
        self.references = [self.fingerprint(mol) for _, mol in found]

    def score(self, mol: Mol) -> float:
        return max(self.nearest(self.fingerprint(mol), self.references))


class Substructure(MoleculeReward):
    """1 where the SMARTS pattern occurs, 0 where it does not; with ``count``, in how many places."""

    def __init__(self, smarts: str, count: bool = False) -> None:
        super().__init__()
        with _quiet():
            pattern = need("rdkit.Chem", "molecules").MolFromSmarts(smarts) if isinstance(smarts, str) else None
        if pattern is None or not pattern.GetNumAtoms():
            raise ValueError(f"smarts is {smarts!r}, which is no pattern; for a carboxylic acid write 'C(=O)[OX2H1]'")
        self.pattern, self.count = pattern, count

    def score(self, mol: Mol) -> float:
        return len(mol.GetSubstructMatches(self.pattern)) if self.count else float(mol.HasSubstructMatch(self.pattern))
