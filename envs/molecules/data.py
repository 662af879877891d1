"""Molecules with a geometry, as flat arrays: no object per molecule, so 130,831 of them load at once.

atom a of molecule i is row offsets[i] + a of ``numbers`` and ``positions``,    offsets = 0, cumsum(num_atoms)

On disk they are one Arrow file, mapped into memory and written in one piece. Readers of other files are in ``files``.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

HYDROGEN = 1
COLUMNS = ("num_atoms", "numbers", "positions", "smiles", "index")
PROPERTY = "property "  # in front of a property's name, which may be any


@dataclass(frozen=True, eq=False)
class Molecules:
    """N molecules in the order they came. Read only: arrays may be a file on disk."""

    num_atoms: np.ndarray
    """[N] int32."""
    numbers: np.ndarray
    """[atoms] uint8, the atomic numbers of all molecules, one after the other."""
    positions: np.ndarray
    """[atoms, 3] float32, in Angstrom."""
    smiles: np.ndarray
    """[N] strings, '' where unknown."""
    index: np.ndarray
    """[N] int64, the number in the data set they come from, -1 where unknown."""
    properties: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Name -> [N] float64, in the units of the source."""

    def __post_init__(self) -> None:
        size, atoms = len(self.num_atoms), int(np.sum(self.num_atoms))
        if self.positions.shape != (atoms, 3) or self.numbers.shape != (atoms,):
            raise ValueError(
                f"num_atoms adds up to {atoms}, numbers has shape {self.numbers.shape} and positions "
                f"{self.positions.shape}; give one number and three coordinates per atom"
            )
        per_molecule = {"smiles": self.smiles, "index": self.index, **self.properties}
        wrong = [f"{len(column)} in {name}" for name, column in per_molecule.items() if len(column) != size]
        if wrong:
            raise ValueError(f"num_atoms has {size} molecules, and there are {', '.join(wrong)}; give one per molecule")

    def __len__(self) -> int:
        return len(self.num_atoms)

    def __getitem__(self, which: Any) -> Molecules:
        """A slice, a mask, an array of places in any order, or one place: always ``Molecules``."""
        return self.take(np.atleast_1d(np.arange(len(self))[which]))

    @cached_property
    def offsets(self) -> np.ndarray:
        """[N + 1] where each molecule's atoms begin; the last is the number of all atoms."""
        return np.concatenate([[0], np.cumsum(self.num_atoms, dtype=np.int64)])

    def take(self, places: np.ndarray) -> Molecules:
        """The molecules at these places, as often as they are named."""
        num_atoms = self.num_atoms[places]
        ends = np.cumsum(num_atoms, dtype=np.int64)
        starts = self.offsets[:-1][places] - (ends - num_atoms)
        rows = np.repeat(starts, num_atoms) + np.arange(num_atoms.sum())
        return Molecules(
            num_atoms,
            self.numbers[rows],
            self.positions[rows],
            self.smiles[places],
            self.index[places],
            {name: column[places] for name, column in self.properties.items()},
        )

    def heavy(self) -> Molecules:
        """The same molecules without hydrogens, in the same places: H2 has no atom left."""
        kept = self.numbers != HYDROGEN
        before = np.concatenate([[0], np.cumsum(kept)])
        num_atoms = np.diff(before[self.offsets]).astype(np.int32)
        numbers, positions = self.numbers[kept], self.positions[kept]
        return Molecules(num_atoms, numbers, positions, self.smiles, self.index, self.properties)

    def padded(self, max_atoms: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions [N, n, 3] around each molecule's mean, numbers [N, n], mask [N, n]; padding is zero and False."""
        largest = int(self.num_atoms.max(initial=0))
        if largest > max_atoms:
            raise ValueError(
                f"max_atoms is {max_atoms}, and there is a molecule of {largest} atoms; give at least {largest}, or "
                "leave larger molecules out with molecules[molecules.num_atoms <= max_atoms]"
            )
        mask = np.arange(max_atoms) < self.num_atoms[:, None]
        numbers = np.zeros(mask.shape, np.uint8)
        numbers[mask] = self.numbers
        positions = np.zeros((*mask.shape, 3), np.float32)
        positions[mask] = self.positions
        centre = positions.sum(1, dtype=np.float64) / np.maximum(self.num_atoms, 1)[:, None]
        positions[mask] -= np.repeat(centre, self.num_atoms, axis=0).astype(np.float32)
        return positions, numbers, mask

    def save(self, path: str | Path) -> None:
        """As an Arrow file, in one piece or not at all."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        try:
            with temporary.open("wb") as file:
                with pa.ipc.new_file(file, (batch := self._batch()).schema) as writer:
                    writer.write_batch(batch)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise ValueError(
                f"{path} could not be written ({error.strerror or error}); free some space or choose another folder"
            ) from None
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _batch(self) -> pa.RecordBatch:
        atoms = pa.array(self.offsets, pa.int64())
        coordinates = pa.FixedSizeListArray.from_arrays(pa.array(self.positions.reshape(-1)), 3)
        columns = (
            pa.array(self.num_atoms, pa.int32()),
            pa.LargeListArray.from_arrays(atoms, pa.array(self.numbers, pa.uint8())),
            pa.LargeListArray.from_arrays(atoms, coordinates),
            pa.array(self.smiles, pa.string()),
            pa.array(self.index, pa.int64()),
        )
        named = {PROPERTY + name: pa.array(column, pa.float64()) for name, column in self.properties.items()}
        return pa.record_batch({**dict(zip(COLUMNS, columns, strict=True)), **named})


def load(path: str | Path) -> Molecules:
    """What ``Molecules.save`` wrote; numbers, positions and properties stay on disk until they are used."""
    try:
        with pa.memory_map(str(path)) as mapped, pa.ipc.open_file(mapped) as reader:
            batch = reader.get_batch(0)
            batch.validate()
        columns = [batch.column(name) for name in COLUMNS]
        atoms = columns[2].flatten()
        return Molecules(
            columns[0].to_numpy(),
            columns[1].flatten().to_numpy(),
            atoms.flatten().to_numpy().reshape(-1, 3),
            columns[3].to_numpy(zero_copy_only=False),
            columns[4].to_numpy(),
            {
                name.removeprefix(PROPERTY): batch.column(name).to_numpy()
                for name in batch.schema.names
                if name.startswith(PROPERTY)
            },
        )
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}; give the path of one that Molecules.save wrote") from None
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"{path} is damaged or no file of molecules ({error}); delete it and make it again") from None


def concatenate(parts: Sequence[Molecules]) -> Molecules:
    """One after the other, with the properties that all of them have; an empty part lacks none."""
    parts = [part for part in parts if len(part)] or [collate([])]
    shared = [name for name in parts[0].properties if all(name in part.properties for part in parts)]
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in COLUMNS}
    properties = {name: np.concatenate([part.properties[name] for part in parts]) for name in shared}
    return Molecules(**columns, properties=properties)


@dataclass(frozen=True)
class Molecule:
    """One molecule on its way from a file into ``Molecules``. ``label`` is where it was found, for messages."""

    label: str
    numbers: Sequence[int]
    positions: Any
    smiles: str = ""
    index: int = -1
    properties: Mapping[str, float] = field(default_factory=dict)


def collate(molecules: Iterable[Molecule]) -> Molecules:
    """Single molecules as one ``Molecules``, with the properties that all of them have."""
    found = list(molecules)
    shared = [name for name in found[0].properties if all(name in one.properties for one in found)] if found else []
    empty = np.zeros((0, 3), np.float32)
    with np.errstate(over="ignore"):
        positions = [np.asarray(one.positions, np.float64).reshape(-1, 3).astype(np.float32) for one in found]
    return Molecules(
        np.array([len(one.numbers) for one in found], np.int32),
        np.array([number for one in found for number in one.numbers], np.uint8),
        np.concatenate([empty, *positions]),
        np.array([one.smiles for one in found], object),
        np.array([one.index for one in found], np.int64),
        {name: np.array([one.properties[name] for one in found], np.float64) for name in shared},
    )
