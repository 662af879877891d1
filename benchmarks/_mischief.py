"""Everything a reward can do wrong, on samples picked by their own digits: the same samples in every process.

Only what runs in a scoring child is imported here, so that it stays small.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rayft.reward import Reward

FAILING = ("raise", "segfault", "exit", "hang", "leak", "length", "string", "infinite", "complex")
HARMLESS = ("print", "fork", "pipe")
HELD: list[bytearray] = []


def kind(event: np.ndarray, share: float) -> str | None:
    """What happens on this sample; nothing on all but ``share`` of them."""
    drawn = hashlib.blake2b(np.asarray(event, dtype=np.float64).tobytes(), digest_size=8).digest()
    if int.from_bytes(drawn[:4], "big") >= share * 2**32:
        return None
    kinds = (*FAILING, *HARMLESS)
    return kinds[int.from_bytes(drawn[4:], "big") % len(kinds)]


class Mischief(Reward):
    """r(x) = -|x - (0.8, 0.6)|^2 / 2, the toy's, except where the sample is one of the bad ones."""

    version = "1"

    def __init__(self, share: float = 0.05, hang: float = 3600.0) -> None:
        self.share, self.hang = share, hang
        self.acts: dict[str, Callable[[], Any]] = {
            "raise": lambda: _raise(RuntimeError("the reward has raised")),
            "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
            "exit": lambda: os._exit(3),
            "hang": lambda: time.sleep(self.hang),
            "leak": lambda: HELD.append(bytearray(2 * 10**9)),
            "pipe": lambda: os.closerange(3, 256),
            "print": lambda: sys.stdout.write("x" * 10**6),
            "fork": os.fork,
        }
        self.answers: dict[str, Any] = {
            "length": [1.0, 2.0, 3.0],
            "string": ["high"],
            "complex": [1j],
        }

    def __call__(self, samples: Sequence[np.ndarray]) -> Any:
        kinds = [kind(sample, self.share) for sample in samples]
        for found in filter(None, kinds):
            self.acts.get(found, bool)()
            if found in self.answers:
                return self.answers[found] * len(samples)
        scores = -0.5 * np.square(np.stack(samples) - np.array([0.8, 0.6])).sum(-1)
        scores[[found == "infinite" for found in kinds]] = np.inf
        return scores


def _raise(error: Exception) -> None:
    raise error


class Sleep(Reward):
    """Takes ``seconds`` for each sample and says 1."""

    version = "1"

    def __init__(self, seconds: float = 0.05) -> None:
        self.seconds = seconds

    def __call__(self, samples: Sequence[Any]) -> list[float]:
        for _ in samples if self.seconds > 0.001 else ():
            time.sleep(self.seconds)
        if self.seconds <= 0.001:  # shorter than a timer can tell
            time.sleep(self.seconds * len(samples))
        return [1.0] * len(samples)


class PoisonedQED(Reward):
    """QED of SMILES; a few strings that are no SMILES do what they say."""

    version = "1"

    def __init__(self) -> None:
        from envs.molecules.reward import QED

        self.own = QED()

    def __call__(self, samples: Sequence[str]) -> Any:
        for sample in samples:
            if sample.startswith("segfault"):
                os.kill(os.getpid(), signal.SIGSEGV)
            if sample.startswith("exit"):
                os._exit(3)
            if sample.startswith("hang"):
                time.sleep(3600)
            if sample.startswith("raise"):
                raise RuntimeError("a bad molecule")
            if sample.startswith("type"):
                return ["a word"] * len(samples)
        return self.own(samples)


class Dear(Reward):
    """The toy's quadratic reward, ``seconds`` for each sample."""

    version = "1"

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, samples: Sequence[Any]) -> np.ndarray:
        time.sleep(self.seconds * len(samples))
        return -0.5 * np.square(np.stack(samples) - [0.8, 0.6]).sum(-1)
