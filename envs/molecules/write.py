"""Generated molecules as files: ``.sdf`` with coordinates and scores, ``.csv`` and ``.parquet`` with scores, ``.smi``.

write(path, samples, columns) -> how many it wrote,    samples[i] = Mol or None,    columns[name][i] = its number

SMILES are canonical, with the stereo that the geometry says and hydrogens implicit: what the rewards of graphs score.
"""

from __future__ import annotations

import csv as tables
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from envs.molecules.reward import need, parse

if TYPE_CHECKING:
    from rdkit.Chem import Mol

Columns = Mapping[str, np.ndarray]


def smiles(sample: Any) -> str:
    """Canonical SMILES, "" where there is no molecule."""
    with need("rdkit.rdBase", "molecules").BlockLogs():
        mol = parse(sample)
    return "" if mol is None else need("rdkit.Chem", "molecules").MolToSmiles(mol)


def sdf(path: Path, samples: Sequence[Mol | None], columns: Columns) -> int:
    """Atoms, bonds and places as the model made them; SMILES and scores are properties. What is no Mol is left out."""
    chem = need("rdkit.Chem", "molecules")
    with path.open("w", newline="\n") as file, chem.SDWriter(file) as writer:
        for i, text in _readable(samples):
            mol = chem.Mol(samples[i])
            for name in list(mol.GetPropNames(includePrivate=True)):
                mol.ClearProp(name)
            mol.SetProp("_Name", _name(columns, i))
            mol.SetProp("SMILES", text)
            for name, column in columns.items():
                if np.isfinite(column[i]):
                    mol.SetProp(_tag(name), f"{column[i]:.8g}")
            writer.write(mol)
        return writer.NumMols()


def smi(path: Path, samples: Sequence[Mol | None], columns: Columns) -> int:
    """A line for each molecule: SMILES and name. Undecodable ones are left out."""
    lines = [f"{text} {_name(columns, i)}\n" for i, text in _readable(samples)]
    path.write_text("".join(lines), newline="\n")
    return len(lines)


def csv(path: Path, samples: Sequence[Mol | None], columns: Columns) -> int:
    """A row for every sample; ``smiles`` is empty where it is not ``valid``, a score where there is none."""
    told = _table(samples, columns)
    rows = zip(*told.values(), strict=True)
    with path.open("w", newline="") as file:
        writer = tables.writer(file, lineterminator="\n")
        writer.writerow(told)
        writer.writerows(["" if cell is None or cell != cell else cell for cell in row] for row in rows)
    return len(samples)


def parquet(path: Path, samples: Sequence[Mol | None], columns: Columns) -> int:
    """The same rows, typed; what is not there is null."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"smiles": pa.string(), "valid": pa.bool_(), "index": pa.int64()}
    told = {
        name: pa.array(column, kinds.get(name, pa.float64()), from_pandas=True)
        for name, column in _table(samples, columns).items()
    }
    pq.write_table(pa.table(told), path)
    return len(samples)


def _readable(samples: Sequence[Any]) -> Iterator[tuple[int, str]]:
    """(position, SMILES) of the molecules."""
    for i, sample in enumerate(samples):
        if sample is not None and (text := smiles(sample)):
            yield i, text


def _table(samples: Sequence[Any], columns: Columns) -> dict[str, Any]:
    known = dict(_readable(samples))
    found = {"smiles": [known.get(i) for i in range(len(samples))], "valid": [i in known for i in range(len(samples))]}
    return found | {name: column.tolist() for name, column in columns.items()}


def _name(columns: Columns, i: int) -> str:
    return f"sample_{int(columns['index'][i]) if 'index' in columns else i}"


def _tag(name: str) -> str:
    """A property's name as the format allows it: it stands in angle brackets, on one line."""
    return "".join("_" if letter in "<>" or not letter.isprintable() or letter.isspace() else letter for letter in name)
