"""One call under way: what is known so far of each of its events, and how a person knows them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rayft.reward import label


@dataclass
class Call:
    """One call under way: what is known so far of each event."""

    number: int
    events: Any
    context: Mapping[str, np.ndarray]
    purpose: str
    metadata: dict[str, Any]
    found: np.ndarray = field(init=False)  # [event] 1 decoded, 0 undecodable, NaN failed or not yet tried
    broken: np.ndarray = field(init=False)  # [event] the decoder itself failed
    raw: dict[str, np.ndarray] = field(default_factory=dict)  # component -> [event]
    called: dict[str, np.ndarray] = field(default_factory=dict)  # component -> [event] whether it was due
    reasons: dict[tuple[str, int], str] = field(default_factory=dict)  # (component, event) -> "kind: detail"
    labels: dict[int, str] = field(default_factory=dict)
    digests: dict[tuple[int, int], bytes] = field(default_factory=dict)  # (component number, event)
    extras: dict[str, np.ndarray] = field(default_factory=dict)
    paid: int = 0
    spared: int = 0

    def __post_init__(self) -> None:
        self.found = np.full(len(self.events), np.nan)
        self.broken = np.zeros(len(self.events), dtype=bool)

    def extra(self, component: str, name: str) -> np.ndarray:
        """The column of a number that a reward returns beside its scores."""
        return self.extras.setdefault(f"{component}.{name}", np.full(len(self.events), np.nan))


class Labels(Mapping[int, str]):
    """How a person knows the events of a call: by their samples where those are known, else by their numbers."""

    def __init__(self, call: Call) -> None:
        self.call = call

    def __getitem__(self, row: int) -> str:
        return self.call.labels.get(row) or label(self.call.events[row])

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def __len__(self) -> int:
        return len(self.call.events)
