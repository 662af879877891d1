"""Randomness is addressed, not carried: every draw's generator is seeded from where the draw stands in the run.

    generator = f(run seed, iteration, purpose, index)

No process has to save or restore its generator, so a lost runner or a killed run comes back to the same numbers.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def address(seed: int, iteration: int, purpose: str, index: int = 0) -> int:
    """A seed for this draw: 63 bits, of which torch's CPU generator keeps 32 and numpy's all."""
    text = f"{seed}/{iteration}/{purpose}/{index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def torch_generator(seed: int, iteration: int, purpose: str, index: int = 0) -> torch.Generator:
    """The torch generator at this address, on the CPU: what is drawn does not depend on where it is used."""
    return torch.Generator().manual_seed(address(seed, iteration, purpose, index))


def numpy_generator(seed: int, iteration: int, purpose: str, index: int = 0) -> np.random.Generator:
    """The numpy generator at this address."""
    return np.random.default_rng(address(seed, iteration, purpose, index))
