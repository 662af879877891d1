"""What an iteration takes on N nodes, predicted from what its parts take on one.

    seconds(N) = ceil(chains / N) chain + ceil(samples / N) sample + rest

A node has one runner and one reward actor; they draw, then score. ``rest`` is what does not shrink: credit, learning,
handing out weights, and the driver. With ``overlap`` pieces a draw is scored while the next is drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Parts:
    """Seconds of an iteration's parts, measured on one node, and how many chains it has; each is scored once."""

    chain: float
    sample: float
    rest: float
    chains: int


def seconds(parts: Parts, nodes: int, pieces: int = 1) -> float:
    """Of one iteration on so many nodes."""
    share = math.ceil(parts.chains / nodes)
    draw, score = share * parts.chain / pieces, share * parts.sample / pieces
    return draw + (pieces - 1) * max(draw, score) + score + parts.rest


def efficiency(parts: Parts, nodes: int) -> float:
    """Perfect time over predicted time: 1 if only drawing and scoring took any, and both could be cut at will."""
    return parts.chains * (parts.chain + parts.sample) / nodes / seconds(parts, nodes)


@dataclass(frozen=True)
class Price:
    """Of an hour, in whatever currency."""

    head: float
    node: float


def cost(parts: Parts, nodes: int, iterations: int, price: Price) -> float:
    """Of a run."""
    return iterations * seconds(parts, nodes) / 3600 * (price.head + nodes * price.node)
