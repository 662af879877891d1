"""QM9 out of the PyPI package qm9pack 1.0.3, by the first author of QM9: text in a wheel, read and never imported.

qm9pack/data/qm9_part{1,2,3}.csv:    one row per molecule, Elements "['C','H',...]", XYZ_Ang "[[x,y,z],...]"
"""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from envs.molecules.data import Molecules
from envs.molecules.formats import SYMBOLS

REQUIREMENT, MEGABYTES = "qm9pack==1.0.3", 104
WHEEL = "qm9pack-*.whl"
PARTS = tuple(f"qm9_part{number}.csv" for number in (1, 2, 3))
PROPERTIES = {
    "A": "RotA_GHz",
    "B": "RotB_GHz",
    "C": "RotC_GHz",
    "mu": "Dipole_debye",
    "alpha": "Polarizability_bohr3",
    "homo": "HOMO_au",
    "lumo": "LUMO_au",
    "gap": "HOMO_LUMO_gap_au",
    "r2": "R2_bohr2",
    "zpve": "ZPVE_au",
    "U0": "InternalEnergy_0K_au",
    "U": "InternalEnergy_298K_au",
    "H": "Enthalphy_298K_au",
    "G": "GibbsFreeEnergy_298K_au",
    "Cv": "Heatcapacity_Cv_cal_mol_K",
}
"""Name in the papers -> the package's column."""
TYPES = {
    "Index": pa.int64(),
    "SMILES": pa.string(),
    "N_atoms": pa.int32(),
    "Elements": pa.string(),
    "XYZ_Ang": pa.string(),
    **dict.fromkeys(PROPERTIES.values(), pa.float64()),
}

logger = logging.getLogger(__name__)


def installed() -> Path | None:
    """The data folder of an installed qm9pack, found without importing it: it needs pkg_resources."""
    spec = importlib.util.find_spec("qm9pack")
    folder = Path(spec.origin).parent / "data" if spec and spec.origin else None
    return folder if folder and is_folder(folder) else None


def is_folder(path: Path) -> bool:
    """Whether the three tables lie here."""
    return all((path / part).is_file() for part in PARTS)


def download(folder: Path) -> Path:
    """The wheel, fetched by pip into ``folder``. ``ValueError`` with pip's last words where it cannot be had."""
    logger.warning("fetching %s, %d MB, once, from PyPI", REQUIREMENT, MEGABYTES)
    options = ("--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--retries=2", "--timeout=20")
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(folder.glob(WHEEL))
    if done.returncode or not found:
        words = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise ValueError(words[-1] if words else f"pip ended with {done.returncode}")
    return found[-1]


def chunks(path: Path) -> Iterator[Molecules]:
    """The molecules of the wheel, or of the folder with its three tables, some thousand at a time."""
    try:
        with ExitStack() as stack:
            if path.is_dir():
                tables: list[IO[bytes]] = [stack.enter_context((path / part).open("rb")) for part in PARTS]
            else:
                wheel = stack.enter_context(zipfile.ZipFile(path))
                tables = [stack.enter_context(wheel.open(f"qm9pack/data/{part}")) for part in PARTS]
            for table in tables:
                yield from _table(table)
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error, pa.ArrowException) as error:
        raise ValueError(
            f"{path} is cut off, damaged or not {REQUIREMENT} ({error}); delete it and get it again"
        ) from None


def _table(stream: IO[bytes]) -> Iterator[Molecules]:
    reader = pyarrow.csv.open_csv(
        stream,
        read_options=pyarrow.csv.ReadOptions(use_threads=False, block_size=8 << 20),
        convert_options=pyarrow.csv.ConvertOptions(include_columns=list(TYPES), column_types=TYPES),
    )
    for batch in reader:
        yield _molecules(batch)


def _molecules(batch: pa.RecordBatch) -> Molecules:
    compute: Any = pc  # its functions are made when it is imported: no type checker sees them
    coordinates = compute.split_pattern(compute.replace_substring_regex(batch["XYZ_Ang"], r"[\[\]]", ""), ",")
    symbols = compute.split_pattern(compute.replace_substring_regex(batch["Elements"], r"[\[\]' ]", ""), ",")
    num_atoms = batch["N_atoms"].to_numpy()
    places = compute.index_in(symbols.flatten(), value_set=pa.array(SYMBOLS))
    num_symbols, num_coordinates = (compute.list_value_length(lists).to_numpy() for lists in (symbols, coordinates))
    if places.null_count or (num_symbols != num_atoms).any() or (num_coordinates != 3 * num_atoms).any():
        raise ValueError("N_atoms, Elements and XYZ_Ang do not agree")
    return Molecules(
        num_atoms,
        (places.to_numpy() + 1).astype(np.uint8),
        coordinates.flatten().cast(pa.float64()).to_numpy().astype(np.float32).reshape(-1, 3),
        batch["SMILES"].to_numpy(zero_copy_only=False),
        batch["Index"].to_numpy(),
        {name: batch[column].to_numpy() for name, column in PROPERTIES.items()},
    )
