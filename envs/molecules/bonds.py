"""Bonds from distances, and the stability that EDM counts by them (Hoogeboom et al. 2022, App. C).

order(i, j) = #{k in 1, 2, 3 : 100 d_ij < length_k(Z_i, Z_j) + margin_k},    i is stable: sum_j order(i, j) in valences

Lengths in pm and margins are EDM's, tuned there on QM9. A pair without a tabulated length has no bond, an element
without a tabulated valence is never stable. Everything takes whole padded batches [B, n]; numpy only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

NUMBERS = {
    "H": 1, "B": 5, "C": 6, "N": 7, "O": 8, "F": 9, "Si": 14, "P": 15, "S": 16, "Cl": 17, "As": 33, "Br": 35, "I": 53
}  # fmt: skip
VALENCES = {
    "H": (1,), "B": (3,), "C": (4,), "N": (3,), "O": (2,), "F": (1,), "Si": (4,), "P": (3, 5), "S": (4,), "Cl": (1,),
    "As": (3,), "Br": (1,), "I": (1,),
}  # fmt: skip
MARGINS = (10.0, 5.0, 3.0)  # pm, of single, double and triple bonds
SINGLE = {
    "H": {"H": 74, "B": 119, "C": 109, "N": 101, "O": 96, "F": 92, "Si": 148, "P": 144, "S": 134, "Cl": 127,
          "As": 152, "Br": 141, "I": 161},
    "B": {"Cl": 175},
    "C": {"C": 154, "N": 147, "O": 143, "F": 135, "Si": 185, "P": 184, "S": 182, "Cl": 177, "Br": 194, "I": 214},
    "N": {"N": 145, "O": 140, "F": 136, "P": 177, "S": 168, "Cl": 175, "Br": 214, "I": 222},
    "O": {"O": 148, "F": 142, "Si": 163, "P": 163, "S": 151, "Cl": 164, "Br": 172, "I": 194},
    "F": {"F": 142, "Si": 160, "P": 156, "S": 158, "Cl": 166, "Br": 178, "I": 187},
    "Si": {"Si": 233, "S": 200, "Cl": 202, "Br": 215, "I": 243},
    "P": {"P": 221, "S": 210, "Cl": 203, "Br": 222},
    "S": {"S": 204, "Cl": 207, "Br": 225, "I": 234},
    "Cl": {"Cl": 199, "Br": 214},
    "Br": {"Br": 228},
    "I": {"I": 266},
}  # fmt: skip
DOUBLE = {
    "C": {"C": 134, "N": 129, "O": 120, "S": 160},
    "N": {"N": 125, "O": 121},
    "O": {"O": 121, "P": 150},
    "P": {"S": 186},
}
TRIPLE = {"C": {"C": 120, "N": 116, "O": 113}, "N": {"N": 110}}

KINDS = len(NUMBERS) + 1  # 0 is every other element, and padding
MAX_VALENCE = 8
BLOCK = 32  # molecules whose pairs are held at once: they stay in the cache, which is three times faster


def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Atomic number -> kind; squared reach of each order [3, kind * kind] in Angstrom^2; valences [kind, sum]."""
    kind_of = np.zeros(max(NUMBERS.values()) + 2, dtype=np.int64)
    kinds = {symbol: kind for kind, symbol in enumerate(NUMBERS, start=1)}
    allowed = np.zeros((KINDS, MAX_VALENCE + 1), dtype=bool)
    for symbol, kind in kinds.items():
        kind_of[NUMBERS[symbol]] = kind
        allowed[kind, list(VALENCES[symbol])] = True
    reach = np.zeros((3, KINDS, KINDS))
    lengths: tuple[Mapping[str, Mapping[str, int]], ...] = (SINGLE, DOUBLE, TRIPLE)
    for table, lengths_k, margin in zip(reach, lengths, MARGINS, strict=True):
        for a, others in lengths_k.items():
            for b, length in others.items():
                table[kinds[a], kinds[b]] = table[kinds[b], kinds[a]] = ((length + margin) / 100.0) ** 2
    return kind_of, reach.reshape(3, -1), allowed


KIND, REACH, ALLOWED = _tables()


@dataclass(frozen=True)
class Atoms:
    """A padded batch of molecules. What ``mask`` leaves out may hold anything."""

    positions: np.ndarray  # [B, n, 3] in Angstrom
    numbers: np.ndarray  # [B, n] atomic numbers
    mask: np.ndarray  # [B, n] bool
    given: np.ndarray | None = None  # [B, n, n] orders 0..3 where a model draws them itself

    def __len__(self) -> int:
        return len(self.numbers)

    def orders(self) -> np.ndarray:
        """[B, n, n]: the model's own, else by distance."""
        return orders(self.positions, self.numbers, self.mask) if self.given is None else self.given


def order(first: np.ndarray | int, second: np.ndarray | int, distance: np.ndarray | float) -> np.ndarray:
    """Bond order 0..3 of atomic numbers ``distance`` Angstrom apart; arrays broadcast. NaN is no bond."""
    pair = _kind(first) * KINDS + _kind(second)
    with np.errstate(over="ignore"):
        return _reached(pair, np.square(np.asarray(distance, dtype=np.float64)))


def orders(positions: np.ndarray, numbers: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Symmetric bond orders [B, n, n] in 0..3, zero on the diagonal and where ``mask`` is false."""
    kind = np.where(mask, _kind(numbers), 0)
    found = np.empty((*kind.shape, kind.shape[-1]), dtype=np.int8)
    for start in range(0, len(kind), BLOCK):
        part = slice(start, start + BLOCK)
        pair = kind[part, :, None] * KINDS + kind[part, None, :]
        found[part] = _reached(pair, squared_distances(positions[part]))
    diagonal = np.arange(kind.shape[-1])
    found[:, diagonal, diagonal] = 0
    return found


def squared_distances(positions: np.ndarray) -> np.ndarray:
    """[B, n, n] in float64; infinite and NaN positions give what they give, without a warning."""
    xyz = np.asarray(positions, dtype=np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        apart = [xyz[:, :, None, axis] - xyz[:, None, :, axis] for axis in range(3)]
        return apart[0] ** 2 + apart[1] ** 2 + apart[2] ** 2


def stability(positions: np.ndarray, numbers: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which molecules are stable [B], and how many of their atoms are [B]: all of them in a stable one."""
    return stable(orders(positions, numbers, mask), numbers, mask)


def stable(orders: np.ndarray, numbers: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``stability`` of known bond orders. Nothing is no stable molecule."""
    mask = np.asarray(mask, dtype=bool)
    bonds = np.minimum(orders.sum(-1, dtype=np.int64), MAX_VALENCE)
    atoms_stable = (ALLOWED[_kind(numbers), bonds] & mask).sum(-1)
    num_atoms = mask.sum(-1)
    return (atoms_stable == num_atoms) & (num_atoms > 0), atoms_stable


def _kind(numbers: np.ndarray | int) -> np.ndarray:
    return KIND.take(numbers, mode="clip")  # both ends of KIND are 0


def _reached(pair: np.ndarray, squared: np.ndarray) -> np.ndarray:
    """The reaches are nested, so the order is their count."""
    return sum((squared < reach[pair] for reach in REACH), start=np.zeros((), dtype=np.int8))
