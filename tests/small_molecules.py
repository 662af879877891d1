"""Five real molecules of QM9, and what compares and packs them."""

from __future__ import annotations

import io
import tarfile
from itertools import pairwise
from pathlib import Path

import numpy as np

from envs.molecules import data
from envs.molecules.data import Molecules

GOLDEN = Path(__file__).parent / "golden" / "molecules"
PUBLISHED, EDM = GOLDEN / "dsgdb9nsd", GOLDEN / "cormorant_test_first_20.npz"
IDS = [1, 3, 22, 53500, 126000]
WATER = "3\nwater\nO 0 0 0\nH 0.96 0 0\nH -0.24 0.93 0\n"


def same(a: Molecules, b: Molecules) -> bool:
    """Every column and property is equal, bit for bit."""
    columns = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in data.COLUMNS)
    properties = all(np.array_equal(a.properties[name], b.properties[name]) for name in a.properties)
    return columns and a.properties.keys() == b.properties.keys() and properties


def one_by_one(molecules: Molecules) -> list[tuple[list[int], np.ndarray]]:
    """Numbers and positions of each."""
    spans = pairwise(molecules.offsets.tolist())
    return [(molecules.numbers[begin:end].tolist(), molecules.positions[begin:end]) for begin, end in spans]


def texts() -> dict[str, str]:
    """File name -> published text."""
    return {file.name: file.read_text() for file in sorted(PUBLISHED.iterdir())}


def archive(path: Path, members: dict[str, str], opener=open) -> Path:
    """A tar file of these texts."""
    with opener(path, "wb") as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
        for name, text in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return path
