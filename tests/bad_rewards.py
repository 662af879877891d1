"""Rewards that fail on some samples, in a file that imports nothing heavy: scoring processes load it often."""

from __future__ import annotations

import os

from rayft.reward import Reward


class Halting(Reward):
    """Fails on every third sample and cannot score a batch that holds one."""

    def __call__(self, samples):
        if any(sample[0] > 1 for sample in samples):
            raise RuntimeError("no")
        return [float(sample[1]) for sample in samples]


class Deadly(Reward):
    """Ends its process on some samples."""

    def __call__(self, samples):
        if any(sample[0] > 2.2 for sample in samples):
            os._exit(1)
        return [float(sample[1]) for sample in samples]
